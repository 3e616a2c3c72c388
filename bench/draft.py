"""What drafting by lookup gains, and whether answers stay the same.

    python bench/draft.py --text BOOK.txt
    python bench/draft.py --text BOOK.txt --tasks values,chain,reworded --documents 10 --rounds 1

`passage` has the model quote its text, `continuation` has it write on; the other tasks of prose.py
can be asked too. Each answer of --new greedy tokens is written without and
with drafts in turn; the first token, which a prefill gives, is not timed. "CPU" is the time of all
threads, which other programs on the machine change least. "right" is the share of the tokens that
the text wants, of as many as it tells.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import slim
from bench import prose
from bench.common import Parser, check_numbers, row, table
from planning.settings import MOST_DRAFTED

HEAD = ["task", "tokens/s", "with drafts", "times", "by CPU", "tokens a step"]
HEAD += ["drafted", "accepted", "same answers", "right", "with drafts"]


def answer(engine: slim.Engine, prompt: list[int], n_new: int, draft: int) -> dict:
    """Write an answer; return its tokens, the seconds of all but the first, and the counters."""
    engine.ckpt.stop.clear()  # all answers have one length
    tokens = engine.generate(prompt, n_new, draft=draft)
    ids = [next(tokens)]
    started = time.perf_counter()
    started_cpu = time.process_time()
    steps = engine.steps
    ids += tokens
    return {
        "ids": ids,
        "seconds": time.perf_counter() - started,
        "cpu": time.process_time() - started_cpu,
        "steps": engine.steps - steps,
        "drafted": engine.stats["drafted"],
        "accepted": engine.stats["accepted"],
    }


def measure(args, engine: slim.Engine, task: str) -> list[str]:
    """Return a table's row: both ways on every document, in turn."""
    book = prose.Book(Path(args.text).read_text("utf-8"), engine.tokenizer, args.part)
    plain = []
    drafted = []
    wanted = []
    for seed in range(args.documents):
        prompt, answer_ids = prose.document(book, args.length, seed).questions[task]
        for _ in range(args.rounds):
            plain.append(answer(engine, prompt, args.new, 0))
            drafted.append(answer(engine, prompt, args.new, args.draft))
            wanted.append(answer_ids[: args.new])
    return cells(task, plain, drafted, wanted)


def cells(task: str, plain: list[dict], drafted: list[dict], wanted: list[list[int]]) -> list[str]:
    rates = [median(more(run) / run["seconds"] for run in runs) for runs in (plain, drafted)]
    times = median(ratio(a, b, "seconds") for a, b in zip(plain, drafted))
    by_cpu = median(ratio(a, b, "cpu") for a, b in zip(plain, drafted))
    same = sum(a["ids"] == b["ids"] for a, b in zip(plain, drafted))
    return [
        task,
        *(f"{rate:.1f}" for rate in rates),
        f"{times:.2f}",
        f"{by_cpu:.2f}",
        f"{sum(map(more, drafted)) / sum(run['steps'] for run in drafted):.2f}",
        str(sum(run["drafted"] for run in drafted)),
        str(sum(run["accepted"] for run in drafted)),
        f"{same} of {len(plain)}",
        *(f"{100 * right(runs, wanted):.1f}%" for runs in (plain, drafted)),
    ]


def ratio(plain: dict, drafted: dict, name: str) -> float:
    """Return how many times as fast drafts are."""
    return plain[name] / more(plain) * more(drafted) / drafted[name]


def more(run: dict) -> int:
    """Return how many tokens came after the first."""
    return len(run["ids"]) - 1


def right(runs: list[dict], wanted: list[list[int]]) -> float:
    found = 0
    for run, ids in zip(runs, wanted):
        found += sum(a == b for a, b in zip(run["ids"], ids))
    return found / sum(len(ids) for ids in wanted)


def parser() -> Parser:
    p = Parser("draft.py")
    p.add_argument("--ckpt", default="smollm2-135m-instruct")
    p.add_argument("--text", required=True, help="a long text, UTF-8")
    p.add_argument("--tasks", default="passage,continuation", help="of prose.py, with commas")
    p.add_argument("--part", type=int, default=0, help="of the text: 0 for choosing, 1 to report")
    p.add_argument("--documents", type=int, default=3)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--length", type=int, default=4096, help="tokens of a document")
    p.add_argument("--new", type=int, default=128, help="tokens of an answer")
    p.add_argument("--draft", type=int, default=MOST_DRAFTED)
    p.add_argument("--schedules", default="dense,auto", help="with commas")
    p.add_argument("--dtype", default="auto")
    p.add_argument("--weights", default="auto", help="full, int8 or int4")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    return p


def run(args: argparse.Namespace) -> None:
    counts = {"documents": (1, 1000), "rounds": (1, 1000), "new": (2, 10**6)}
    check_numbers(args, counts | {"threads": (1, 1024), "part": (0, 1), "length": (1, 2**20)})
    tasks = args.tasks.split(",")
    unknown = [task for task in tasks if task not in prose.TASKS]
    if unknown:
        raise ValueError(f"--tasks has {unknown[0]!r:.40}; there are {', '.join(prose.TASKS)}")
    torch.set_num_threads(args.threads)
    for schedule in args.schedules.split(","):
        engine = slim.load(args.ckpt, "cpu", args.dtype, schedule, weights=args.weights)
        print(f"\n{args.ckpt}, {engine.kv.dtype}, {schedule}\n\n{table(HEAD, [])}")
        for task in tasks:
            print(row(measure(args, engine, task)), flush=True)


def main(argv: list[str] | None = None) -> None:
    p = parser()
    args = p.parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError, MemoryError) as error:
        p.error(error)


if __name__ == "__main__":
    main()
