"""Peaks of memory beside what Slim planned.

    python bench/memory.py --lengths 4096

Every kind of work runs in a process of its own. The peak is what the process takes above what it
has once torch has multiplied two matrices; the plan is weights, keys and values, what is pruned,
and temporaries. Peaks are read from /proc, so this needs Linux.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import slim
from bench.common import Parser, check_numbers, last_line, memory_bytes, read_lengths, row, table
from loading.files import format_bytes
from planning.checkpoint import Checkpoint
from planning.memory import KERNEL_BYTES, plan, step_bytes

WORK = ("prompt", "follow-ups", "save", "resume")
RANKINGS = (
    ("dense", "lookup"),
    ("auto", "lookup"),
    ("auto", "peak"),
    ("auto", "paper"),
)  # schedule and score


def memory_table(args) -> None:
    """Measure every kind of work in a process of its own."""
    context = Checkpoint.open(args.ckpt, "cpu", args.dtype).config.max_len
    most = (context - args.new) * 4 // 7  # three follow-ups of a quarter each
    why = f"as follow-ups must fit into the model's context of {context:,} too"
    lengths = read_lengths(args.lengths, 4, most, why)
    print(table(["tokens", "schedule, score", "work", "peak", "planned", ""], []), flush=True)
    command = [sys.executable, __file__]
    command += [f"--{name}={getattr(args, name)}" for name in ("ckpt", "dtype", "new")]
    for n in lengths:
        for ranking in RANKINGS:
            with tempfile.TemporaryDirectory() as folder:
                for work in WORK:
                    one = json.dumps([work, *ranking, n, f"{folder}/text.slim"])
                    peak, planned = json.loads(last_line([*command, f"--one={one}"]))
                    cells = [f"{n:,}", ", ".join(ranking), work]
                    cells += [format_bytes(peak), format_bytes(planned), f"{peak / planned:.2f}"]
                    print(row(cells), flush=True)


def memory_of(args, work: str, schedule: str, score: str, n: int, file: str) -> tuple[int, int]:
    """Do one kind of work in this process; return its peak and what was planned, in bytes."""
    torch.ones(512, 512) @ torch.ones(512, 512)
    before = memory_bytes("VmRSS")
    ckpt = Checkpoint.open(args.ckpt, "cpu", args.dtype, schedule, score)
    vocab = ckpt.config.vocab_size - 5
    ids = [5 + (i * 7919 + i * i * 31) % vocab for i in range(n + args.new)]
    engine = slim.start(ckpt, n, args.new)
    need = plan(ckpt, n, args.new)
    if work == "resume":
        engine.resume(file, room=args.new)
        homes = engine.stats["kv_cpu_bytes"] // engine.kv.home_memory.entry_bytes
        need = plan(ckpt, n + args.new, args.new, args.new, homes)
    else:
        engine.prefill(ids[:n], room=args.new)
    for token in ids[n:]:
        engine.extend([token])
    planned = need.total + need.host
    if work == "follow-ups":
        for _ in range(3):
            planned = need.weights + KERNEL_BYTES + follow_up_bytes(engine, n // 4)
            engine.extend(ids[: n // 4])
    if work == "save":
        engine.save(file)
    return memory_bytes() - before, planned


def follow_up_bytes(engine: slim.Engine, n: int) -> int:
    """Return the bytes of a conversation and of what n more tokens are checked for."""
    kv = engine.kv
    end = kv.length + n
    held = sum(engine.stats[key] for key in ("kv_gpu_bytes", "kv_cpu_bytes", "aux_cpu_bytes"))
    slots = [stage.n_slots for stage in kv.stages]
    step = step_bytes(engine.ckpt, slots, n, end - kv.tail_start)
    return held + kv.growth_bytes(end) + kv.exchange_bytes() + step


# ---- command line -----------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    p = Parser("memory.py")
    p.add_argument("--ckpt", default="smollm2-135m-instruct")
    p.add_argument("--dtype", default="auto")
    p.add_argument("--lengths", default="4096", help="prompts in tokens, with commas")
    p.add_argument("--new", type=int, default=40, help="tokens that follow one by one")
    p.add_argument("--one", help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    try:
        check_numbers(args, {"new": (1, 2**20)})
        if args.one:
            print(json.dumps(memory_of(args, *json.loads(args.one))))
        else:
            memory_table(args)
    except (ValueError, OSError, MemoryError) as error:
        p.error(error)


if __name__ == "__main__":
    main()
