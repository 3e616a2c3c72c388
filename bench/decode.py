"""First token and decoding of a real checkpoint, dense and pruned, on a text that is fed on after the prompt.

    python bench/decode.py --text BOOK.txt --tokens 4096 --schedules dense auto
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import mean, median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import slim


def measure(ckpt: str, dtype: str, schedule: str, text: str, n: int, new: int) -> str:
    """Return a line: seconds to the first token, milliseconds of each later one, swaps and revivals a token."""
    engine = slim.load(ckpt, "auto", dtype, schedule)
    ids = engine.tokenizer.encode(text)[: n + new]
    engine.prefill(ids[:64])  # what is made once is not the prompt's
    started = time.perf_counter()
    engine.prefill(ids[:n], room=new)
    first, steps = time.perf_counter() - started, []
    for token in ids[n:]:
        started = time.perf_counter()
        engine.extend([token])
        steps.append(1000 * (time.perf_counter() - started))
    swaps, revived = (engine.stats[name] / len(steps) for name in ("swaps", "revived"))
    return (
        f"{schedule}: first token {first:.2f} s; then {mean(steps):.0f} ms each, median {median(steps):.0f}, "
        f"least {min(steps):.0f}; {swaps:.1f} swaps and {revived:.1f} revivals a token"
    )


def main() -> None:
    p = argparse.ArgumentParser(prog="decode.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--ckpt", default="smollm2-135m-instruct")
    p.add_argument("--text", required=True, help="a long text, UTF-8")
    p.add_argument("--dtype", default="float32")
    p.add_argument("--tokens", type=int, default=4096)
    p.add_argument("--new", type=int, default=40, help="tokens that follow one by one")
    p.add_argument("--rounds", type=int, default=1)
    p.add_argument("--schedules", nargs="+", default=["dense", "auto"])
    args = p.parse_args()
    text = Path(args.text).read_text(encoding="utf-8")[100_000:][: 8 * (args.tokens + args.new)]
    for _ in range(args.rounds):
        for schedule in args.schedules:
            print(measure(args.ckpt, args.dtype, schedule, text, args.tokens, args.new), flush=True)


if __name__ == "__main__":
    main()
