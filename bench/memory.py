"""The peak of a process's memory beside what was planned: prompts, answers, follow-ups, saving and resuming, on a CPU.

    python bench/memory.py --ckpt smollm2-135m-instruct --lengths 4096

Each row is a process of its own. Its peak is VmHWM of /proc/self/status (Linux) above what the process takes once torch
is imported and has multiplied two matrices; planned are weights, keys and values, what is pruned, and temporaries.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import slim
from loading.plan import KERNEL_BYTES, Checkpoint, format_bytes, plan, step_bytes

WORK = "prompt", "follow-ups", "save", "resume"


def memory(name: str) -> int:
    """Return a line of /proc/self/status in bytes."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def measure(args) -> dict:
    """Do one kind of work; return its peak and what was planned, in bytes."""
    torch.ones(512, 512) @ torch.ones(512, 512)
    before = memory("VmRSS")
    ckpt = Checkpoint.open(args.ckpt, "cpu", args.dtype, args.schedule, args.score)
    n, new = args.n, args.new
    ids = [5 + (i * 7919 + i * i * 31) % (ckpt.config.vocab_size - 5) for i in range(n + new)]
    if args.work == "resume":
        engine = slim.start(ckpt)
        engine.resume(args.file, room=new)
        need = plan(ckpt, n, 2 * new, new)
    else:
        engine = slim.start(ckpt, n, new)
        engine.prefill(ids[:n], room=new)
        need = plan(ckpt, n, new)
    for token in ids[n:]:
        engine.extend([token])
    planned = need.total + need.host
    kv = engine.kv
    if args.work == "follow-ups":
        for _ in range(3):
            slots, n_tail = [stage.n_slots for stage in kv.stages], kv.length + n // 4 - kv.tail_start
            step = step_bytes(ckpt, slots, n // 4, n_tail)
            there = sum(engine.stats[key] for key in ("kv_gpu_bytes", "kv_cpu_bytes", "aux_cpu_bytes"))
            there += need.weights + KERNEL_BYTES
            planned = there + kv.growth_bytes(kv.length + n // 4) + kv.swap_bytes() + step
            engine.extend(ids[: n // 4])
    if args.work == "save":
        engine.save(args.file)
    return {"peak": memory("VmHWM") - before, "planned": planned, "revived": engine.stats["revived"]}


def run(args, work: str, schedule: str, score: str, n: int, file: str) -> dict:
    """Measure in a process of its own."""
    options = {"one": work, "schedule": schedule, "score": score, "n": n, "file": file}
    options |= {name: getattr(args, name) for name in ("ckpt", "dtype", "new")}
    command = [sys.executable, __file__, *(f"--{key}={value}" for key, value in options.items())]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise ValueError(why.removeprefix("memory.py: error: "))
    return json.loads(done.stdout.splitlines()[-1])


def numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="memory.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--ckpt", default="smollm2-135m-instruct")
    p.add_argument("--dtype", default="float32")
    p.add_argument("--lengths", type=numbers, default="4096", help="with commas")
    p.add_argument("--new", type=int, default=16, help="tokens that follow one by one")
    for name in ("--one", "--schedule", "--score", "--file"):
        p.add_argument(name, help=argparse.SUPPRESS)
    p.add_argument("--n", type=int, help=argparse.SUPPRESS)
    args = p.parse_args()
    args.work = args.one
    if min(args.new, *args.lengths) < 1:
        p.error(f"--new {args.new} and each of --lengths must be at least 1")
    return args


def main() -> None:
    args = parse_args()
    try:
        if args.one:
            return print(json.dumps(measure(args)))
        print("| tokens | schedule, score | work | peak | planned | peak / planned |\n" + "|---" * 6 + "|", flush=True)
        for n in args.lengths:
            for schedule, score in (("dense", "peak"), ("auto", "peak"), ("auto", "paper")):
                with tempfile.TemporaryDirectory() as folder:
                    for work in WORK:
                        r = run(args, work, schedule, score, n, f"{folder}/text.slim")
                        cells = f"{n:,}", f"{schedule}, {score}", work, *map(format_bytes, (r["peak"], r["planned"]))
                        print("| " + " | ".join(cells) + f" | {r['peak'] / r['planned']:.2f} |", flush=True)
    except (ValueError, OSError) as error:
        print(f"memory.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
