"""What a second question on the same text costs, in time and accuracy: python bench/reuse.py --text BOOK.txt

Each sample is a piece of the book with facts put in. All questions are put to one text, each in one message with it,
as a chat client sends them. `again`: the text is read once, by the first question, and rewound for each other one.
`fresh`: it is read anew with each question; not done for dense, where it is the same. The first question counts for
neither. An answer is right if the fact's number is in its first tokens.
"""

import argparse
import random
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import slim
from serve.api import chat_ids
from serve.texts import Texts

PLACES = "Lisbon", "Oslo", "Cairo", "Lima", "Kyoto", "Dublin", "Havana", "Quebec"


def make_sample(tok, book: str, n_tokens: int, rng) -> tuple[str, list[tuple[str, str]]]:
    """Return a text of some n_tokens and its facts: [(place, number)]."""
    start = rng.randrange(len(book) - 8 * n_tokens)
    lines = tok.decode(tok.encode(book[start : start + 8 * n_tokens])[:n_tokens]).split("\n")
    facts = [(place, str(rng.randrange(1000, 10000))) for place in PLACES]
    for place, number in facts:
        lines.insert(
            rng.randrange(len(lines)), f"\nThe special magic number for {place} is: {number}.\n"
        )
    return "\n".join(lines), facts


def ask(texts: Texts, tok, text: str, place: str) -> tuple[str, float, int]:
    """Return the answer, the seconds to its first token, and the tokens that were not read again."""
    question = f"{text}\n\nWhat is the special magic number for {place} mentioned in the text?"
    start = f"The special magic number for {place} mentioned in the text is"
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": start}]
    engine, ids, started = texts.engine, chat_ids(tok, messages), time.perf_counter()
    cached, tail = texts.reuse(ids, 16)
    answer = engine.generate(ids[cached:], 16, follow_up=cached > 0, keep_last=tail)
    out = [next(answer, 0)]
    seconds = time.perf_counter() - started
    return tok.decode([*out, *answer]), seconds, cached


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--ckpt", default="smollm2-135m-instruct")
    p.add_argument("--text", required=True)
    p.add_argument("--tokens", type=int, default=6800)
    p.add_argument("--samples", type=int, default=4)
    p.add_argument("--schedules", nargs="+", default=["dense", "auto"])
    args = p.parse_args()
    book = Path(args.text).read_text("utf-8")
    for schedule in args.schedules:
        engine = slim.load(args.ckpt, schedule=schedule)
        rng, tok, texts = random.Random(0), engine.tokenizer, Texts(engine)
        right, seconds = {"fresh": [], "again": []}, {"fresh": [], "again": []}
        for i in range(args.samples):
            text, facts = make_sample(tok, book, args.tokens, rng)
            for how in ("again", "fresh") if engine.ckpt.schedule else ("again",):
                engine.forget()
                for j, (place, number) in enumerate(facts):
                    if how == "fresh":
                        engine.forget()
                    said, took, cached = ask(texts, tok, text, place)
                    seconds["again" if cached else "fresh"].append(took)
                    if j:
                        right[how].append(number in said)
            shown = ", ".join(
                f"{how} {sum(got)} of {len(got)}" for how, got in right.items() if got
            )
            first, later = median(seconds["fresh"]), seconds["again"]
            print(
                f"{schedule}: {i + 1} texts; right {shown}; first token {first:.2f} s fresh, {median(later):.2f} s "
                f"again (1/{first / median(later):.0f}; {min(later):.2f} to {max(later):.2f} s)",
                flush=True,
            )


if __name__ == "__main__":
    main()
