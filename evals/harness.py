"""Benchmarks of lm-evaluation-harness, dense and pruned side by side.

    pip install "lm-eval[ruler]" "lm-eval[longbench]"
    python evals/harness.py --ckpt smollm2-135m-instruct --tasks ruler --out answers.jsonl

Nothing is downloaded. RULER's tasks make their own texts; those that hide things in essays need a
text, --essays FILE. LongBench's tasks need its files, --longbench DIR. Other tasks of the harness
run if their data is in the local cache. A second call with the same --out computes only what is
missing.
"""

import argparse
import contextlib
import functools
import importlib
import io
import json
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from unittest import mock

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
try:
    import datasets
    import nltk
    import numpy as np

    nltk.download = lambda *_, **__: False  # RULER asks on import, and needs it for essays alone
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import apply_template
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    print(f"harness.py: error: {error}; pip install 'lm-eval[ruler]'", file=sys.stderr)
    raise SystemExit(2) from None

from evals.lm import SlimLM
from loading.files import one_line
from planning.checkpoint import Checkpoint

HAYSTACK = "niah_utils"  # the module of tasks that hide needles
NEEDLES = ("single_1", "single_2", "single_3", "multikey_1", "multikey_2", "multikey_3")
NEEDLES += ("multivalue", "multiquery")
RULER = {f"niah_{name}": (HAYSTACK, f"niah_{name}") for name in NEEDLES} | {
    "ruler_vt": ("vt_utils", "get_vt_dataset"),
    "ruler_cwe": ("cwe_utils", "get_cw_dataset"),
    "ruler_fwe": ("fwe_utils", "fwe_download"),
}  # task: its module, and the function that makes its data
ESSAYS = ("single_2", "single_3", "multikey_1", "multivalue", "multiquery")
WITHOUT_ESSAYS = [name for name in RULER if name.removeprefix("niah_") not in ESSAYS]
MAKERS = {  # what makes 500 samples a length, whatever is asked for
    HAYSTACK: "generate_samples",
    "vt_utils": "sys_vartrack_w_noise_random",
    "cwe_utils": "sys_word_pair_random",
    "fwe_utils": "sys_kwext",
}
# LongBench's few-shot and code tasks
NO_CHAT = ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")
# schedule and rule
COLUMNS = {
    "dense": ("dense", "lookup"),
    "paper": ("paper", "paper"),
    "default": ("auto", "lookup"),
}


def ruler_task(name: str, folder: Path, lengths: list[int], n: int, essays: Path | None) -> dict:
    """Return a RULER task with n samples of each length, in tokens of the checkpoint."""
    if name not in WITHOUT_ESSAYS and essays is None:
        raise ValueError(f"{name} hides things in essays; give a text with --essays FILE")
    where, function = RULER[name]
    # importing says that something was downloaded, which it was not
    with contextlib.redirect_stdout(io.StringIO()):
        module = importlib.import_module(f"lm_eval.tasks.ruler.{where}")
        prepare = importlib.import_module("lm_eval.tasks.ruler.prepare_niah")
        shared = importlib.import_module("lm_eval.tasks.ruler.common_utils")
    make = getattr(module, MAKERS[where])

    def few(*args, **options):
        options["num_samples"] = min(n, options.get("num_samples", n))
        return make(*args, **options)

    def words(type_haystack: str):
        if type_haystack == "essay":
            return essays.read_text("utf-8").split()
        return haystack(type_haystack)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(module, MAKERS[where], few))
        if where == HAYSTACK:
            haystack = module.get_haystack
            sentences = re.compile(r"(?<=[.!?]) ")
            stack.enter_context(mock.patch.object(module, "get_haystack", words))
            stack.enter_context(mock.patch.object(prepare, "sent_tokenize", sentences.split))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        random.seed(0)
        np.random.seed(0)
        data = getattr(module, function)(tokenizer=str(folder), max_seq_lengths=lengths)
    scoring = {"aggregation": shared.aggregate_metrics, "higher_is_better": True}
    every_length = {*lengths, *shared.DEFAULT_SEQ_LENGTHS}
    metrics = [{"metric": str(length), **scoring} for length in every_length]
    return {"task": name, "custom_dataset": lambda **_: data, "metric_list": metrics}


def last_line(doc: dict) -> str:
    """Return the question of a RULER sample."""
    return "\n" + doc["input"].rpartition("\n")[2]


def longbench_task(name: str, folder: Path | None) -> dict:
    """Return a LongBench task of the harness that reads its file in a folder."""
    file = longbench_file(name, folder) if folder else None
    if not file or not file.is_file():
        missing = file or "its file"
        raise ValueError(f"{name} needs {missing}; give LongBench's .jsonl files with --longbench")
    try:
        with file.open(encoding="utf-8") as lines:
            docs = [json.loads(line) for line in lines]
        # the harness has another name for the input
        docs = [{"question": doc.get("input", "")} | doc for doc in docs]
        data = {"test": datasets.Dataset.from_list(docs)}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} is not a file of LongBench's: {error}") from None
    return {"task": name, "custom_dataset": lambda **_: data}


def longbench_file(name: str, folder: Path) -> Path:
    return folder / f"{name.removeprefix('longbench_')}.jsonl"


def after_context(name: str, doc: dict) -> str:
    """Return what a LongBench prompt has after its text; "" where that holds no question."""
    after = long_tasks().task_index[name].cfg["doc_to_text"].partition("{{context}}")[2]
    return apply_template(after, doc) if "{{question}}" in after else ""


@functools.cache
def all_tasks() -> TaskManager:
    return TaskManager()  # reads thousands of files


@functools.cache
def long_tasks() -> TaskManager:
    folder = Path(importlib.import_module("lm_eval.tasks").__file__).parent
    return TaskManager(
        include_path=[str(folder / "ruler"), str(folder / "longbench")], include_defaults=False
    )


def manager_of(name: str) -> TaskManager:
    return long_tasks() if name in long_tasks().task_index else all_tasks()


def expand(names: str, folder: Path | None) -> list[str]:
    """Return the names of tasks; `ruler` and `longbench` stand for all that can run."""
    found = []
    for name in names.split(","):
        if name == "longbench":
            found += longbench_names(folder)
        else:
            found += WITHOUT_ESSAYS if name == "ruler" else [name]
    return list(dict.fromkeys(found))


def longbench_names(folder: Path | None) -> list[str]:
    """Return LongBench's tasks whose files are in a folder; raise ValueError if there is none."""
    if folder is None:
        raise ValueError("longbench needs its .jsonl files; give their folder with --longbench")
    names = [name for name in long_tasks().task_index if name.startswith("longbench_")]
    names = [name for name in names if longbench_file(name, folder).is_file()]
    if not names:
        raise ValueError(f"--longbench {folder} has no file of LongBench's, such as qasper.jsonl")
    return names


def evaluate(
    lm: SlimLM, task: dict, chat: bool, limit: int, question=lambda doc: None
) -> list[dict]:
    """Run one task; return its rows: a metric, its mean over the samples and the standard error."""
    lm.question = question
    lm.used = []
    result = simple_evaluate(
        lm,
        tasks=[{"group": "slim", "task": [task]}],
        limit=limit,
        apply_chat_template=chat,
        bootstrap_iters=0,
        task_manager=manager_of(task["task"]),
        verbosity="ERROR",
    )
    rows = []
    for name, samples in result["samples"].items():
        for metric in sorted({metric for sample in samples for metric in sample["metrics"]}):
            scores = [sample.get(metric) for sample in samples]
            scores = [score for score in scores if isinstance(score, int | float) and score != -1]
            if scores:
                n = len(scores)
                error = stdev(scores) / n**0.5 if n > 1 else float("nan")
                row = {"task": name, "metric": metric, "n": n, "mean": mean(scores), "error": error}
                rows.append(row)
    if not rows:
        raise ValueError(
            f"{task['task']} has no score of single samples, which the table needs; leave it out"
        )
    return rows


def notes_of(lm: SlimLM) -> dict[str, str]:
    """Return the notes under a column: what its requests saw, lost and cost."""
    views = Counter(used.in_view for used in lm.used)
    seen = ", ".join(f"{view} {n}" for view, n in views.items())
    if len(views) == 1:
        seen = next(iter(views))
    if not lm.ckpt.schedule:
        seen = "nothing is pruned"
    cut = sum(used.cut for used in lm.used)
    return {
        "question in view when the text is pruned": seen,
        "prompts cut in the middle, to the context": f"{cut} of {len(lm.used)}",
        "FLOPs of the prefill, of dense": f"{lm.flops():.1%}",
    }


def table(columns: dict[str, list[dict]], notes: dict[str, dict[str, str]]) -> str:
    """Return a Markdown table: a row for each metric of a task, then the notes."""
    lines = [
        "| task | metric | samples | " + " | ".join(columns) + " |",
        "|---" * (3 + len(columns)) + "|",
    ]
    for rows in zip(*columns.values(), strict=True):
        cells = [rows[0]["task"], rows[0]["metric"], str(rows[0]["n"])]
        cells += [f"{100 * row['mean']:.1f} ± {100 * row['error']:.1f}" for row in rows]
        lines.append("| " + " | ".join(cells) + " |")
    for what in next(iter(notes.values())):
        lines.append(f"| {what} | | | " + " | ".join(notes[name][what] for name in columns) + " |")
    return "\n".join(lines)


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = p.add_argument
    add("--ckpt", required=True)
    add(
        "--tasks",
        required=True,
        help="with commas; ruler: all without essays; longbench: all files",
    )
    add("--lengths", type=int, nargs="+", default=[4096], help="tokens of RULER's samples")
    add("--limit", type=int, default=100, help="samples a task and length (%(default)s)")
    columns = "dense, paper, default, SCHEDULE or SCHEDULE@RULE"
    add("--columns", nargs="+", default=[*COLUMNS], help=columns)
    add("--question-later", action="store_true", help="also read the text before the question")
    add("--out", type=Path, help="file of answers; what is in it is not computed again")
    add("--raw", action="store_true", help="no chat template")
    add("--essays", type=Path, metavar="FILE", help="a text for RULER's tasks that want essays")
    add("--longbench", type=Path, metavar="DIR", help="folder of LongBench's .jsonl files")
    add("--max-len", type=int, default=0, help="tokens of prompt and answer (the context)")
    add("--device", default="auto")
    add("--dtype", default="auto")
    return p.parse_args(argv)


def main(argv=None) -> int:
    args = parse_args(argv)
    try:
        print(run(args))
    except (ValueError, OSError, MemoryError, KeyError) as error:
        print(f"evals: error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def run(args) -> str:
    """Check everything, make the tasks once, answer them in every column, and return the table."""
    if args.limit < 1 or min(args.lengths) < 512:
        raise ValueError(
            f"--limit {args.limit} and --lengths {args.lengths} must be at least 1 and 512"
        )
    if args.out and not args.out.resolve().parent.is_dir():
        raise ValueError(f"--out {args.out} lies in a folder that does not exist; make it first")
    models = open_columns(args)
    lm = next(iter(models.values()))
    tasks = [make_task(args, name, lm) for name in expand(args.tasks, args.longbench)]
    columns = {}
    notes = {}
    for column, lm in models.items():
        columns[column] = []
        used = []
        for task, chat, question in tasks:
            limit = args.limit * (len(args.lengths) if task["task"] in RULER else 1)
            chat = chat and lm.tok.template is not None
            columns[column] += evaluate(lm, task, chat, limit, question)
            used += lm.used
            print(f"evals: {column}: {columns[column][-1]}", file=sys.stderr, flush=True)
        lm.used = used
        lm.engine = None  # its memory is for the next column
        notes[column] = notes_of(lm)
    return table(columns, notes)


def open_columns(args) -> dict[str, SlimLM]:
    """Return {column: the model that answers in it}."""
    models = {}
    for column in args.columns:
        schedule, rule = COLUMNS.get(column) or (*column.split("@"), "lookup")[:2]
        ckpt = Checkpoint.open(args.ckpt, args.device, args.dtype, schedule, rule)
        context = ckpt.config.max_len
        if not 0 <= args.max_len <= context:
            raise ValueError(
                f"--max-len {args.max_len} must be within 1..{context}, the model's context"
            )
        models[column] = SlimLM(ckpt, False, args.out, args.max_len)
        if args.question_later and ckpt.schedule:
            models[f"{column}, question later"] = SlimLM(ckpt, True, args.out, args.max_len)
    return models


def make_task(args, name: str, lm: SlimLM) -> tuple[dict, bool, Callable]:
    """Return a task, whether its prompts are chats, and what finds a prompt's question."""
    if name in RULER:
        if max(args.lengths) > lm.max_len:
            raise ValueError(
                f"--lengths {max(args.lengths)} is above the context of {lm.max_len} tokens"
            )
        if name == "ruler_vt" and min(args.lengths) < 1024:
            # with less, its example alone does not fit and the harness tries forever
            raise ValueError(f"--lengths {min(args.lengths)}: ruler_vt needs at least 1024")
        task = ruler_task(name, lm.ckpt.folder, args.lengths, args.limit, args.essays)
        return task, not args.raw, last_line
    if name.startswith("longbench_") and name in long_tasks().task_index:
        few_shot = name.removeprefix("longbench_").removesuffix("_e") in NO_CHAT
        question = functools.partial(after_context, name)
        return longbench_task(name, args.longbench), not args.raw and not few_shot, question
    if name in all_tasks().task_index:
        return {"task": name}, not args.raw, lambda doc: None
    raise ValueError(f"there is no task {name!r}; lm_eval ls tasks lists those of the harness")


if __name__ == "__main__":
    raise SystemExit(main())
