"""What it costs to read a prompt: dense, pruned, and pruned with local attention.

    python bench/reading.py --text BOOK.txt --lengths 4096,8000 --dtype bfloat16
    python bench/reading.py --count --lengths 131072,1048576     # of an 8B model, nothing is run

All ways run in one process and take turns. `full`: the schedule, and every row of the layers below
its first boundary sees everything; `local`: the same with a local window. Peaks of memory are
those of the process, read from /proc, so this needs Linux. --count: FLOPs by the formula, and bytes
by the plan, of Llama-3.1-8B's shape in bfloat16 with boundaries by depth and no lookup heads.
"""

import sys
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import slim
from bench.common import Parser, check_numbers, memory_bytes, read_lengths, row, table
from bench.shapes import random_checkpoint
from bench.speed import read_text
from loading.files import format_bytes
from planning.checkpoint import Checkpoint, dtype_name
from planning.flops import attention_flops, layer_work, prefill_flops
from planning.memory import plan
from planning.settings import LOCAL_WINDOW

WAYS = ["dense", "full", "local"]
HEAD = ["tokens", "", "seconds", "times faster", "fewer FLOPs", "peak"]
COUNT_HEAD = ["tokens", "", "PFLOP", "times fewer", "of it attention below", "and above"]
COUNT_HEAD += ["KV on the device", "pruned, on the host"]


def ways(ckpt: Checkpoint, local_window: int) -> dict[str, Checkpoint]:
    """Return the runs that are compared."""
    full = replace(ckpt, settings=replace(ckpt.settings, local_window=0))
    local = replace(ckpt, settings=replace(ckpt.settings, local_window=local_window))
    return {"dense": full.with_schedule("dense"), "full": full, "local": local}


def flops(ckpt: Checkpoint, n: int) -> float:
    return prefill_flops(ckpt.config, n, ckpt.schedule, ckpt.settings.block_len, ckpt.local)


def measure(args) -> None:
    """Print what each way takes, by the median of the rounds."""
    torch.set_num_threads(args.threads)
    engine = slim.load(args.ckpt, "cpu", args.dtype, args.schedule, weights=args.weights)
    every = ways(engine.ckpt, args.local_window)
    runs = {name: every[name] for name in args.ways}
    lengths = read_lengths(args.lengths, 1024, engine.config.max_len, "the model's context")
    texts = read_text(args, engine.tokenizer, max(lengths))  # one a round
    dtype = dtype_name(engine.kv.dtype)
    print(f"{dtype}, {args.threads} threads, torch {torch.__version__}\n\n{table(HEAD, [])}")
    for n in lengths:
        seconds, peaks = take_turns(engine, runs, texts, n)
        for name, ckpt in runs.items():
            took = median(seconds[name])
            faster = f"{median(seconds['dense']) / took:.2f}" if "dense" in runs else ""
            fewer = flops(every["dense"], n) / flops(ckpt, n)
            cells = [f"{n:,}", name, f"{took:.2f}", faster, f"{fewer:.2f}"]
            print(row([*cells, format_bytes(peaks[name])]), flush=True)


def take_turns(engine, runs: dict[str, Checkpoint], texts: list[list[int]], n: int):
    """Read n tokens of each text in every way; return {way: seconds} and {way: peak of memory}."""
    seconds = {name: [] for name in runs}
    peaks = {}
    for text in texts:
        for name, ckpt in runs.items():
            engine.ckpt = ckpt
            engine.forget()
            engine.kv.reset(1, {})
            forget_peak()
            engine.prefill(text[:n])
            seconds[name].append(engine.prefill_s)
            peaks[name] = memory_bytes()
    return seconds, peaks


def forget_peak() -> None:
    """Let the peak of this process's memory begin here."""
    Path("/proc/self/clear_refs").write_text("5")


def count(args) -> None:
    """Print the FLOPs and the bytes of an 8B model, which is not run."""
    runs = ways(
        random_checkpoint("llama3.1-8b", "cpu", "bfloat16", args.schedule), args.local_window
    )
    print(table(COUNT_HEAD, []))
    for n in read_lengths(args.lengths, 1024, 2**24, "for which the formula is meant"):
        for name, run in runs.items():
            total = flops(run, n)
            fewer = flops(runs["dense"], n) / total
            below, above = attention_shares(run, n)
            need = plan(run, n)
            cells = [f"{n:,}", name, f"{total / 1e15:.1f}", f"{fewer:.1f}"]
            cells += [f"{100 * below / total:.0f}%", f"{100 * above / total:.0f}%"]
            print(row([*cells, format_bytes(need.kv), format_bytes(need.host)]))


def attention_shares(ckpt: Checkpoint, n: int) -> tuple[float, float]:
    """Return the FLOPs of attention in the layers that run all rows, and in those above."""
    config = ckpt.config
    below = 0.0
    above = 0.0
    for rows, keys, _ in layer_work(config, n, ckpt.schedule, local=ckpt.local):
        spent = attention_flops(config, rows, keys)
        if rows == n:
            below += spent
        else:
            above += spent
    return below, above


def parser() -> Parser:
    p = Parser("reading.py")
    p.add_argument("--ckpt", default="smollm2-135m-instruct")
    p.add_argument("--text", help="a long text, UTF-8")
    p.add_argument("--skip", type=int, default=100_000, help="characters of the text to leave out")
    p.add_argument("--dtype", default="auto")
    p.add_argument("--weights", default="auto", help="full, int8 or int4")
    p.add_argument("--lengths", default="4096,8000", help="prompts in tokens, with commas")
    p.add_argument("--schedule", default="auto")
    p.add_argument("--local-window", type=int, default=LOCAL_WINDOW, help="tokens")
    p.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--count", action="store_true", help="FLOPs and bytes of an 8B model instead")
    return p


def main(argv: list[str] | None = None) -> None:
    p = parser()
    args = p.parse_args(argv)
    try:
        check_numbers(args, {"rounds": (1, 1000), "threads": (1, 1024), "skip": (0, 2**40)})
        if args.count:
            count(args)
        else:
            measure(args)
    except (ValueError, OSError, MemoryError) as error:
        p.error(error)


if __name__ == "__main__":
    main()
