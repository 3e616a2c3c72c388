"""A real checkpoint beside llama.cpp and transformers: first token, decoding, memory.

    python bench/compare.py --text BOOK.txt --lengths 2048,4096,8000
    python bench/compare.py --text BOOK.txt --llama-cpp "node bench/llama_cpp.mjs MODEL.gguf"

Every run is a process of its own, so that its peak memory is its own, and contestants take turns. The text goes on
after the prompt: its tokens are fed one by one, whatever the model would have said (llama.cpp feeds its own). The
floor of decoding is the bytes a token must read, weights and keys and values of all layers, over the rate at which
this machine sums 256 MB. --llama-cpp is a command that gets threads and new tokens as its last arguments and ids
on stdin, and prints JSON as `one` does; llama_cpp.mjs is one for the npm package node-llama-cpp.
"""

import argparse
import json
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import slim
import tokenizer
from loading.find import find_checkpoint
from loading.schedule import parse_schedule
from loading.weights import weight_bytes


def run_slim(args, schedule: str, ids: list[int], n: int) -> dict:
    engine = slim.load(args.ckpt, "cpu", args.dtype, schedule, n_prompt=n, n_new=len(ids) - n)
    engine.prefill(ids[:64])  # what is made once is not the prompt's
    times = [time.perf_counter()]
    engine.prefill(ids[:n], room=len(ids) - n).argmax().item()
    times.append(time.perf_counter())
    for token in ids[n:]:
        engine.extend([token]).argmax().item()
        times.append(time.perf_counter())
    counts = {name: engine.stats[name] / args.new for name in ("swaps", "revived")}
    sizes = {"weight_bytes": weight_bytes(engine.ckpt.config, engine.ckpt.dtype), "kv_bytes": engine.kv.gpu_bytes()}
    return figures(times) | counts | sizes


@torch.inference_mode()
def run_transformers(args, ids: list[int], n: int) -> dict:
    import transformers

    folder = find_checkpoint(args.ckpt)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype)).eval()
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
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"first_s": times[1] - times[0], "steps_ms": steps, "peak_bytes": peak}


def one(args, name: str, ids: list[int], n: int) -> dict:
    """Run one contestant in a process of its own; return seconds, milliseconds of each step, peak bytes."""
    if name == "llama.cpp":
        command, ids = [*shlex.split(args.llama_cpp), str(args.threads), str(args.new)], ids[:n]
    else:
        options = {"ckpt": args.ckpt, "dtype": args.dtype, "threads": args.threads, "new": args.new, "one": name}
        command = [sys.executable, __file__, *(f"--{key}={value}" for key, value in options.items())]
    done = subprocess.run(command, input=json.dumps(ids), capture_output=True, text=True)
    try:
        found = json.loads(done.stdout.splitlines()[-1])
        if not done.returncode and {"first_s", "steps_ms", "peak_bytes"} <= found.keys():
            return found
    except (ValueError, LookupError, AttributeError):
        pass
    why = (done.stderr.strip() or f"exit code {done.returncode}, and no figures").splitlines()[-1]
    raise ValueError(f"{name} failed: {why:.300}")


def read_rate() -> float:
    """Return bytes/s of summing 256 MB, the best of ten."""
    big, best = torch.ones(2**26), 0.0
    for _ in range(10):
        started = time.perf_counter()
        big.sum()
        best = max(best, big.nbytes / (time.perf_counter() - started))
    return best


def row(name: str, runs: list[dict], floor_s: float) -> str:
    steps = [ms for run in runs for ms in run["steps_ms"]]
    if runs[0].get("swaps"):
        name += f" ({mean(r['revived'] for r in runs):.2f} revivals a token)"
    return (
        f"| {name} | {median(r['first_s'] for r in runs):.2f} | {1000 / mean(steps):.1f} | {1000 / median(steps):.1f} "
        f"| {100_000 * floor_s / median(steps):.0f}% | {median(r['peak_bytes'] for r in runs) / 2**20:,.0f} MiB |"
    )


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="compare.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--ckpt", default="smollm2-135m-instruct")
    p.add_argument("--text", help="a long text, UTF-8")
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    p.add_argument(
        "--lengths", type=lambda s: [int(n) for n in s.split(",")], default="4096", help="tokens, with commas"
    )
    p.add_argument("--new", type=int, default=40, help="tokens that follow one by one")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument(
        "--contestants", default="llama.cpp,transformers,dense,auto", help="what is no program is a schedule of Slim's"
    )
    p.add_argument("--llama-cpp", metavar="CMD", help="runs llama.cpp, which else is left out")
    p.add_argument("--one", help=argparse.SUPPRESS)
    args = p.parse_args()
    if not args.one and not args.text:
        p.error("--text is missing: a long text to read, UTF-8")
    least = min(args.rounds, args.new - 1, args.threads, *args.lengths)
    if least < 1:
        p.error("--rounds, --threads and each of --lengths must be at least 1, and --new 2")
    return args


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    if args.one:
        ids = json.load(sys.stdin)
        n, name = len(ids) - args.new, args.one
        print(json.dumps(run_transformers(args, ids, n) if name == "transformers" else run_slim(args, name, ids, n)))
        return
    try:
        compare(args)
    except (ValueError, OSError) as error:
        print(f"compare.py: error: {error}", file=sys.stderr)
        sys.exit(2)


def compare(args) -> None:
    """Run each contestant `rounds` times at each length, and print a table a length."""
    text = Path(args.text).read_text(encoding="utf-8")[100_000:]
    tok, rate = tokenizer.load(find_checkpoint(args.ckpt)), read_rate()
    print(f"{args.dtype}, {args.threads} threads, torch {torch.__version__}, memory read at {rate / 1e9:.1f} GB/s")
    names = [name for name in args.contestants.split(",") if name != "llama.cpp" or args.llama_cpp]
    for name in set(names) - {"llama.cpp", "transformers"}:
        parse_schedule(name)
    if not names:
        raise ValueError("--contestants leaves nobody to run; llama.cpp runs with --llama-cpp CMD alone")
    for n in args.lengths:
        ids = tok.encode(text[: 8 * (n + args.new)])[: n + args.new]
        if len(ids) < n + args.new:
            raise ValueError(f"--text {args.text} has {len(ids):,} tokens from character 100,000 on, fewer than {n:,}")
        runs: dict[str, list] = {name: [] for name in names}
        for _ in range(args.rounds):
            for name in names:
                runs[name].append(one(args, name, ids, n))
        print(f"\n{n:,} tokens, {args.rounds} rounds\n")
        print("| | first token, s | tokens/s, mean | by the median | of the floor | peak memory |\n" + "|---" * 6 + "|")
        for name in names:
            bytes_read = sum(runs.get("dense", runs[name])[0].get(key, 0) for key in ("weight_bytes", "kv_bytes"))
            own = sum(runs[name][0].get(key, 0) for key in ("weight_bytes", "kv_bytes"))
            print(row(name, runs[name], (own or bytes_read) / rate), flush=True)


if __name__ == "__main__":
    main()
