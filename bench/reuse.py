"""What a second question about the same text costs, in time and accuracy.

    python bench/reuse.py --text BOOK.txt

Each document (bench/prose.py) is asked four questions, each in one message with the text, as a chat
client sends them. `again`: the text is read once, with the first question, and rewound for each
other one. `fresh`: it is read anew with each question. The first question counts for neither. An
answer is right if it begins with the right words.
"""

import sys
import time
from pathlib import Path
from statistics import mean, median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import slim
from bench import prose
from bench.common import Parser, check_numbers
from serve.texts import Texts

ASKED = ("chain", "fact", "lookalike", "reworded")


def ask(texts: Texts, prompt: list[int], answer: list[int]) -> tuple[bool, float]:
    """Answer one question; return whether it is right, and the seconds to the first token."""
    started = time.perf_counter()
    cached, tail = texts.reuse(prompt, len(answer))
    tokens = texts.engine.generate(
        prompt[cached:], len(answer), follow_up=cached > 0, keep_last=tail
    )
    found = [next(tokens, 0)]
    seconds = time.perf_counter() - started
    found += tokens
    return found == answer, seconds


def measure(args, schedule: str) -> None:
    """Print what a schedule's questions cost, and how many are right."""
    engine = slim.load(args.ckpt, schedule=schedule)
    texts = Texts(engine)
    book = prose.Book(Path(args.text).read_text("utf-8"), engine.tokenizer, part=1)
    for again in (True, False):
        right = []
        seconds = []
        for seed in range(args.samples):
            questions = prose.document(book, args.length, seed).questions
            engine.forget()
            for task in ASKED:
                if not again:
                    engine.forget()
                is_right, took = ask(texts, *questions[task])
                if task != ASKED[0]:
                    right.append(is_right)
                    seconds.append(took)
        how = "again" if again else "fresh"
        print(f"{schedule}, {how}: {100 * mean(right):.0f}% of {len(right)} right,", end=" ")
        print(f"first token {median(seconds):.2f} s, at most {max(seconds):.2f}", flush=True)


def main(argv: list[str] | None = None) -> None:
    p = Parser("reuse.py")
    p.add_argument("--ckpt", default="smollm2-135m-instruct")
    p.add_argument("--text", required=True, help="a long text, UTF-8")
    p.add_argument("--length", type=int, default=6800, help="tokens of a text")
    p.add_argument("--samples", type=int, default=4, help="texts")
    p.add_argument("--schedules", nargs="+", default=["dense", "auto"])
    args = p.parse_args(argv)
    try:
        check_numbers(args, {"length": (1024, 2**20), "samples": (1, 10**6)})
        for schedule in args.schedules:
            measure(args, schedule)
    except (ValueError, OSError) as error:
        p.error(error)


if __name__ == "__main__":
    main()
