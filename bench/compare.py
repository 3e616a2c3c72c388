"""A real checkpoint beside llama.cpp and transformers: first token, decoding, memory.

    python bench/compare.py --text BOOK.txt --lengths 2048,4096,8000
    python bench/compare.py --text BOOK.txt --llama-cpp "node bench/llama_cpp.mjs MODEL.gguf"

Every run is a process of its own, so that its peak memory is its own, and contestants take turns. One that fails is
out for that length, its row says why, and the exit code is 1. The text goes on after the prompt: its tokens are fed
one by one, whatever the model would have said (llama.cpp feeds its own). The floor of decoding is the bytes a token
must read, weights and keys and values of all layers, over the rate at which this machine sums 256 MB. --llama-cpp is a
command that gets threads and new tokens as its last arguments and ids on stdin, and prints JSON as `one` returns it;
llama_cpp.mjs is one for the npm package node-llama-cpp. Peak memory is read from /proc, so this needs Linux.
"""

import argparse
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean, median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import slim
import tokenizer
from loading.files import one_line
from loading.find import find_checkpoint
from loading.weights import weight_bytes
from model import Config
from planning.checkpoint import Checkpoint
from planning.memory import plan
from planning.schedule import resolve_schedule

PROGRAMS = ("llama.cpp", "transformers")  # any other contestant is a schedule of Slim's
EXAMPLE = "node bench/llama_cpp.mjs MODEL.gguf"


# ---- one run, in a process of its own -----------------------------------------------------


def run_slim(args, schedule: str, ids: list[int], n: int) -> dict:
    engine = slim.load(args.ckpt, "cpu", args.dtype, schedule, n_prompt=n, n_new=len(ids) - n)
    engine.prefill(ids[:64])  # what is made once is not the prompt's
    times = [time.perf_counter()]
    engine.prefill(ids[:n], room=len(ids) - n).argmax().item()
    times.append(time.perf_counter())
    for token in ids[n:]:
        engine.extend([token]).argmax().item()
        times.append(time.perf_counter())
    return figures(times) | {name: engine.stats[name] / args.new for name in ("swaps", "revived")}


@torch.inference_mode()
def run_transformers(args, ids: list[int], n: int) -> dict:
    import transformers

    folder = find_checkpoint(args.ckpt)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, args.dtype)
    ).eval()
    model(torch.tensor([ids[:64]]))
    times = [time.perf_counter()]
    out = model(torch.tensor([ids[:n]]), logits_to_keep=1, use_cache=True)
    out.logits.argmax().item()
    times.append(time.perf_counter())
    for token in ids[n:]:
        model(torch.tensor([[token]]), past_key_values=out.past_key_values).logits.argmax().item()
        times.append(time.perf_counter())
    return figures(times)


def figures(times: list[float]) -> dict:
    steps = [1000 * (b - a) for a, b in zip(times[1:], times[2:])]
    return {"first_s": times[1] - times[0], "steps_ms": steps, "peak_bytes": memory_bytes()}


def memory_bytes(name: str = "VmHWM") -> int:
    """Return the memory of this process: its peak, VmHWM, or VmRSS, that of now; raise OSError if /proc lacks it.

    Not `ru_maxrss`: in a child it starts at what its parent had.
    """
    found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    if not found:
        raise OSError(f"/proc/self/status has no {name}, the memory of a process")
    return 1024 * int(found[1])


def last_line(command: list[str], stdin: str = "") -> str:
    """Run a command and return the last line it prints; raise ValueError with the reason if it fails."""
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, errors="replace")
    if done.returncode < 0:
        raise ValueError(f"killed by signal {-done.returncode}")
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        said = [
            line for line in said if "rror" in line
        ] or said  # a stack trace may end with something else
        raise ValueError(f"{one_line(said[-1].partition('.py: error: ')[2] or said[-1]):.300}")
    return (done.stdout.strip().splitlines() or [""])[-1]


def one(args, name: str, ids: list[int], n: int) -> dict:
    """Run one contestant in a process of its own; return seconds, milliseconds of each step, peak bytes.

    Raises ValueError if it fails or prints something else.
    """
    if name == "llama.cpp":
        command, ids = [*shlex.split(args.llama_cpp), str(args.threads), str(args.new)], ids[:n]
    else:
        options = {
            "ckpt": args.ckpt,
            "dtype": args.dtype,
            "threads": args.threads,
            "new": args.new,
            "one": name,
        }
        command = [
            sys.executable,
            __file__,
            *(f"--{key}={value}" for key, value in options.items()),
        ]
    said = last_line(command, json.dumps(ids))
    try:
        found = json.loads(said)
        if all(
            0 < x < math.inf
            for x in (found["first_s"], found["peak_bytes"], mean(found["steps_ms"]))
        ):
            return found
    except (ValueError, LookupError, TypeError, AttributeError):
        pass
    raise ValueError(
        f"it printed {said!r:.80}, but its last line must be JSON with first_s, steps_ms and peak_bytes"
    )


# ---- what is measured against ---------------------------------------------------------------


def read_rate() -> float:
    """Return bytes/s of summing 256 MB, the best of ten."""
    big, best = torch.ones(2**26), 0.0
    for _ in range(10):
        started = time.perf_counter()
        big.sum()
        best = max(best, big.nbytes / (time.perf_counter() - started))
    return best


def weights_read(c: Config, dtype: torch.dtype) -> int:
    """Return the bytes of weights that a decoded token must read: all, but one row of an embedding that is no head."""
    unread = 0 if c.tied else (c.vocab_size - 1) * c.dim * dtype.itemsize
    return weight_bytes(c, dtype) - unread


def floor_bytes(ckpt: Checkpoint, n: int, new: int) -> int:
    """Return the bytes that a token decoded after n others must read: weights, and the keys and values there are."""
    return weights_read(ckpt.config, ckpt.dtype) + plan(ckpt, n, new).kv


# ---- input ------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse prints its usage first; one line is enough
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")


def parser() -> Parser:
    p = Parser(prog="compare.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--ckpt", default="smollm2-135m-instruct")
    p.add_argument("--text", help="a long text, UTF-8")
    p.add_argument(
        "--skip", type=int, default=100_000, help="characters at the start of the text to leave out"
    )
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    p.add_argument("--lengths", default="4096", help="prompts in tokens, with commas")
    p.add_argument("--new", type=int, default=40, help="tokens that follow one by one")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    what = "with commas: llama.cpp, transformers, and Slim's schedules: a name or one boundary, as in 9:1/4"
    p.add_argument("--contestants", default="llama.cpp,transformers,dense,auto", help=what)
    p.add_argument(
        "--llama-cpp", metavar="CMD", help="runs llama.cpp, which is left out without it"
    )
    p.add_argument("--one", help=argparse.SUPPRESS)
    return p


def check_numbers(args, limits: dict[str, tuple[int, int]]) -> None:
    """Raise ValueError unless each named option is within its limits, both included."""
    for name, (least, most) in limits.items():
        if not least <= (value := getattr(args, name)) <= most:
            raise ValueError(f"--{name} {value} must be within {least}..{most:,}")


def read_lengths(text: str, least: int, most: int, of: str) -> list[int]:
    """Read '4096,8192'; raise ValueError unless all are different whole numbers within least..most; of: of what."""
    parts = text.split(",")
    for part in parts:
        if not (
            part.isascii() and part.isdigit() and len(part) < 16 and least <= int(part) <= most
        ):
            raise ValueError(
                f"--lengths: {part!r:.40} is not a number of tokens within {least}..{most:,}, {of}"
            )
        if parts.count(part) > 1:
            raise ValueError(f"--lengths: {part} is there twice")
    return [int(part) for part in parts]


def read_contestants(args) -> dict[str, Checkpoint]:
    """Return {name: the checkpoint with its schedule, dense for other programs}; raise ValueError for wrong names."""
    names = [name.strip() for name in args.contestants.split(",")]
    if args.llama_cpp is None:
        names = [name for name in names if name != "llama.cpp"]
    if not names:
        raise ValueError("--contestants has llama.cpp alone, which needs --llama-cpp CMD")
    if "" in names or len({*names}) < len(names):
        raise ValueError(f"--contestants {args.contestants!r:.200} has an empty name, or one twice")
    schedules = {name: "dense" if name in PROGRAMS else name for name in names}
    dense = Checkpoint.open(
        args.ckpt, "cpu", args.dtype, "dense"
    )  # what is wrong with it is not wrong with a name
    try:
        return {name: replace_schedule(dense, schedule) for name, schedule in schedules.items()}
    except ValueError as error:
        raise ValueError(
            f"--contestants are {', '.join(PROGRAMS)}, or schedules: {error}"
        ) from None


def replace_schedule(ckpt: Checkpoint, schedule: str) -> Checkpoint:
    return replace(ckpt, schedule=resolve_schedule(schedule, ckpt.config, ckpt.settings.block_len))


def check_command(text: str) -> None:
    """Raise ValueError unless --llama-cpp names a program that is there."""
    try:
        command = shlex.split(text)
    except ValueError as error:
        raise ValueError(
            f"--llama-cpp {text!r:.200}: {error}; give a command such as {EXAMPLE!r}"
        ) from None
    if not command or not shutil.which(command[0]):
        raise ValueError(
            f"--llama-cpp {text!r:.200}: there is no such program; give a command such as {EXAMPLE!r}"
        )


def read_ids(args, n: int) -> list[int]:
    """Return the n ids that follow what is skipped; raise ValueError if the text is too short or cannot be read."""
    try:
        text = Path(args.text).read_text(encoding="utf-8")[args.skip :]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--text {args.text!r:.200} cannot be read as UTF-8 text: {error}"
        ) from None
    tok, part = tokenizer.load(find_checkpoint(args.ckpt)), 8 * n
    while len(ids := tok.encode(text[:part])) < n and part < len(text):
        part *= 2
    if len(ids) < n:
        raise ValueError(
            f"--text {args.text} has {len(ids):,} tokens after the first {args.skip:,} characters, which --skip leaves "
            f"out, but --lengths and --new take {n:,}; give a longer text or a smaller --skip"
        )
    return ids[:n]


# ---- the comparison -----------------------------------------------------------------------------


def row(name: str, runs: list[dict], error: str, floor_s: float) -> str:
    if error:
        name += (
            " failed"
            + (f" after {len(runs)} rounds" if runs else "")
            + f": {error.replace('|', '/')}"
        )
    if not runs:
        return f"| {name} |" + " |" * 5
    steps = [ms for run in runs for ms in run["steps_ms"]]
    if runs[0].get("swaps"):
        name += f" ({mean(r['revived'] for r in runs):.2f} revivals a token)"
    return (
        f"| {name} | {median(r['first_s'] for r in runs):.2f} | {1000 / mean(steps):.1f} | {1000 / median(steps):.1f} "
        f"| {100_000 * floor_s / median(steps):.0f}% | {median(r['peak_bytes'] for r in runs) / 2**20:,.0f} MiB |"
    )


def compare(args) -> int:
    """Run each contestant `rounds` times at each length, and print a table a length; return 1 if one failed."""
    if not args.text:
        raise ValueError("--text is missing: a long text to read, UTF-8")
    check_numbers(args, {"rounds": (1, 1000), "new": (2, 2**20), "skip": (0, 2**40)})
    if args.llama_cpp is not None:
        check_command(args.llama_cpp)
    contestants = read_contestants(args)
    context = next(iter(contestants.values())).config.max_len
    of = f"the model's context of {context:,} less --new {args.new}"
    lengths = read_lengths(args.lengths, 1, context - args.new, of)
    ids, failed = read_ids(args, max(lengths) + args.new), False
    rate = read_rate()
    print(
        f"{args.dtype}, {args.threads} threads, torch {torch.__version__}, memory read at {rate / 1e9:.1f} GB/s"
    )
    for n in lengths:
        runs, errors = run_rounds(args, list(contestants), ids[: n + args.new], n)
        print(f"\n{n:,} tokens, {args.rounds} rounds\n")
        print(
            "| | first token, s | tokens/s, mean | by the median | of the floor | peak memory |\n"
            + "|---" * 6
            + "|"
        )
        for name, ckpt in contestants.items():
            print(
                row(name, runs[name], errors.get(name, ""), floor_bytes(ckpt, n, args.new) / rate),
                flush=True,
            )
        failed = failed or bool(errors)
    return int(failed)


def run_rounds(
    args, names: list[str], ids: list[int], n: int
) -> tuple[dict[str, list], dict[str, str]]:
    """Return every contestant's runs, and why one failed: it keeps the runs it has, and the others go on."""
    runs, errors = {name: [] for name in names}, {}
    for _ in range(args.rounds):
        for name in names:
            if name not in errors:
                try:
                    runs[name].append(one(args, name, ids, n))
                except (ValueError, OSError) as error:
                    errors[name] = one_line(error)
    return runs, errors


def main(argv: list[str] | None = None) -> int:
    p = parser()
    args = p.parse_args(argv)
    try:
        check_numbers(args, {"threads": (1, 1024)})
        torch.set_num_threads(args.threads)
        if not args.one:
            return compare(args)
        ids = json.load(sys.stdin)
        n, name = len(ids) - args.new, args.one
        print(
            json.dumps(
                run_transformers(args, ids, n)
                if name == "transformers"
                else run_slim(args, name, ids, n)
            )
        )
        return 0
    except (ValueError, OSError) as error:
        p.error(error)


if __name__ == "__main__":
    sys.exit(main())
