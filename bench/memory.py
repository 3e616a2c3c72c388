"""The peak of a process's memory beside what was planned: prompts, answers, follow-ups, saving and resuming, on a CPU.

    python bench/memory.py --ckpt smollm2-135m-instruct --lengths 4096

Each row is a process of its own. Its peak is VmHWM of /proc/self/status (Linux) above what the process takes once torch
is imported and has multiplied two matrices; planned are weights, keys and values, what is pruned, and temporaries.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import slim
from bench.compare import Parser, check_numbers, last_line, memory_bytes, read_lengths
from loading.files import format_bytes
from planning.checkpoint import Checkpoint
from planning.memory import KERNEL_BYTES, plan, step_bytes

WORK = "prompt", "follow-ups", "save", "resume"
SETTINGS = ("dense", "peak"), ("auto", "peak"), ("auto", "paper")  # schedule and score


def measure(args, work: str, schedule: str, score: str, n: int, file: str) -> dict:
    """Do one kind of work; return its peak and what was planned, in bytes."""
    torch.ones(512, 512) @ torch.ones(512, 512)
    before = memory_bytes("VmRSS")
    ckpt, new = Checkpoint.open(args.ckpt, "cpu", args.dtype, schedule, score), args.new
    ids = [5 + (i * 7919 + i * i * 31) % (ckpt.config.vocab_size - 5) for i in range(n + new)]
    if work == "resume":
        engine = slim.start(ckpt)
        engine.resume(file, room=new)
        homes = engine.stats["kv_cpu_bytes"] // engine.kv.home_memory.entry_bytes
        need = plan(ckpt, n + new, new, new, homes)
    else:
        engine = slim.start(ckpt, n, new)
        engine.prefill(ids[:n], room=new)
        need = plan(ckpt, n, new)
    for token in ids[n:]:
        engine.extend([token])
    planned = need.total + need.host
    if work == "follow-ups":
        for _ in range(3):
            planned = need.weights + KERNEL_BYTES + planned_for(engine, n // 4)
            engine.extend(ids[: n // 4])
    if work == "save":
        engine.save(file)
    return {"peak": memory_bytes() - before, "planned": planned}


def planned_for(engine: slim.Engine, n: int) -> int:
    """Return the bytes of a conversation and of what n more tokens are checked for."""
    kv, end = engine.kv, engine.kv.length + n
    there = sum(engine.stats[key] for key in ("kv_gpu_bytes", "kv_cpu_bytes", "aux_cpu_bytes"))
    step = step_bytes(engine.ckpt, [stage.n_slots for stage in kv.stages], n, end - kv.tail_start)
    return there + kv.growth_bytes(end) + kv.swap_bytes() + step


def print_table(args) -> None:
    """Measure every kind of work in a process of its own."""
    context = Checkpoint.open(args.ckpt, "cpu", args.dtype).config.max_len
    most = (context - args.new) * 4 // 7  # three follow-ups of a quarter each
    lengths = read_lengths(
        args.lengths, 4, most, f"as follow-ups must fit into the model's context of {context:,} too"
    )
    print(
        "| tokens | schedule, score | work | peak | planned | peak / planned |\n"
        + "|---" * 6
        + "|",
        flush=True,
    )
    options = [f"--{name}={getattr(args, name)}" for name in ("ckpt", "dtype", "new")]
    for n in lengths:
        for setting in SETTINGS:
            with tempfile.TemporaryDirectory() as folder:
                for work in WORK:
                    one = json.dumps([work, *setting, n, f"{folder}/text.slim"])
                    r = json.loads(last_line([sys.executable, __file__, *options, f"--one={one}"]))
                    cells = (
                        f"{n:,}",
                        ", ".join(setting),
                        work,
                        format_bytes(r["peak"]),
                        format_bytes(r["planned"]),
                    )
                    print(
                        "| " + " | ".join(cells) + f" | {r['peak'] / r['planned']:.2f} |",
                        flush=True,
                    )


def main(argv: list[str] | None = None) -> None:
    p = Parser(prog="memory.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--ckpt", default="smollm2-135m-instruct")
    p.add_argument("--dtype", default="float32")
    p.add_argument("--lengths", default="4096", help="prompts in tokens, with commas")
    p.add_argument("--new", type=int, default=16, help="tokens that follow one by one")
    p.add_argument("--one", help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    try:
        check_numbers(args, {"new": (1, 2**20)})
        print(json.dumps(measure(args, *json.loads(args.one)))) if args.one else print_table(args)
    except (ValueError, OSError) as error:
        p.error(error)


if __name__ == "__main__":
    main()
