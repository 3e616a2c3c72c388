"""Benchmarks of lm-evaluation-harness, dense and pruned side by side: python evals/harness.py --ckpt CKPT --tasks ...

    pip install "lm-eval[ruler]" "lm-eval[longbench]"
    python evals/harness.py --ckpt smollm2-135m-instruct --tasks niah_single_1,ruler_vt --limit 100 --out answers.jsonl

Nothing is downloaded. RULER's tasks make their texts by themselves; those that hide things in essays need a text,
--essays FILE. LongBench's need its files, --longbench DIR. Other tasks of the harness run if their data is in the
local cache. A second call with the same --out computes only what is missing.
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
from pathlib import Path
from statistics import mean, stdev
from unittest import mock

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import datasets
import nltk
import numpy as np

nltk.download = lambda *args, **kwargs: (
    False
)  # RULER asks for it on import, and needs it for essays alone
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import apply_template

from evals.lm import SlimLM
from loading.files import one_line
from planning.checkpoint import Checkpoint

RULER = {  # task: its module, the function that makes its data
    **{
        name: ("niah_utils", name)
        for name in (
            "niah_single_1",
            "niah_single_2",
            "niah_single_3",
            "niah_multikey_1",
            "niah_multikey_2",
            "niah_multikey_3",
            "niah_multivalue",
            "niah_multiquery",
        )
    },
    "ruler_vt": ("vt_utils", "get_vt_dataset"),
    "ruler_cwe": ("cwe_utils", "get_cw_dataset"),
    "ruler_fwe": ("fwe_utils", "fwe_download"),
}
WITHOUT_ESSAYS = (
    "niah_single_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "ruler_vt",
    "ruler_cwe",
    "ruler_fwe",
)
MAKERS = {  # what makes 500 samples a length, whatever is asked for
    "niah_utils": "generate_samples",
    "vt_utils": "sys_vartrack_w_noise_random",
    "cwe_utils": "sys_word_pair_random",
    "fwe_utils": "sys_kwext",
}
NO_CHAT = (
    "trec",
    "triviaqa",
    "samsum",
    "lsht",
    "lcc",
    "repobench-p",
)  # LongBench's few-shot and code tasks
COLUMNS = {"dense": ("dense", "peak"), "paper": ("paper", "paper"), "default": ("auto", "peak")}


def ruler_task(name: str, folder: Path, lengths: list[int], n: int, essays: Path | None) -> dict:
    """Return a RULER task of the harness with n samples of each length, in tokens of the checkpoint's tokenizer."""
    if name not in WITHOUT_ESSAYS and essays is None:
        raise ValueError(
            f"{name} hides things in essays that are not here; give a text with --essays FILE"
        )
    where, function = RULER[name]
    with contextlib.redirect_stdout(
        io.StringIO()
    ):  # it says that it downloaded something, which it did not
        module, prepare, shared = (
            importlib.import_module(f"lm_eval.tasks.ruler.{name}")
            for name in (where, "prepare_niah", "common_utils")
        )
    make = getattr(module, MAKERS[where])

    def few(*args, **kwargs):
        return make(*args, **kwargs | {"num_samples": min(n, kwargs.get("num_samples", n))})

    def words(type_haystack):
        return (
            essays.read_text("utf-8").split()
            if type_haystack == "essay"
            else haystack(type_haystack)
        )

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(module, MAKERS[where], few))
        if where == "niah_utils":
            haystack = module.get_haystack
            stack.enter_context(mock.patch.object(module, "get_haystack", words))
            sentences = re.compile(r"(?<=[.!?]) ")
            stack.enter_context(mock.patch.object(prepare, "sent_tokenize", sentences.split))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        random.seed(0)
        np.random.seed(0)
        data = getattr(module, function)(tokenizer=str(folder), max_seq_lengths=lengths)
    metrics = [
        {"metric": str(length), "aggregation": shared.aggregate_metrics, "higher_is_better": True}
        for length in {*lengths, *shared.DEFAULT_SEQ_LENGTHS}
    ]
    return {"task": name, "custom_dataset": lambda **_: data, "metric_list": metrics}


def last_line(doc: dict) -> str:
    """Return the question of a RULER sample."""
    return "\n" + doc["input"].rpartition("\n")[2]


def longbench_task(name: str, folder: Path | None) -> dict:
    """Return a LongBench task of the harness that reads its file in a folder."""
    file = folder and longbench_file(name, folder)
    if not file or not file.is_file():
        raise ValueError(
            f"{name} needs {file or 'its file'}; give LongBench's folder of .jsonl files with --longbench"
        )
    try:
        with file.open(encoding="utf-8") as lines:
            docs = [json.loads(line) for line in lines]
        docs = [
            {"question": doc.get("input", "")} | doc for doc in docs
        ]  # the harness's name for it
        data = {"test": datasets.Dataset.from_list(docs)}
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{file} is not a file of LongBench's: {error}; give another folder"
        ) from None
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
            if folder is None:
                raise ValueError(
                    "longbench needs its files; give LongBench's folder of .jsonl files with --longbench"
                )
            found += (
                all_of_it := [
                    task
                    for task in long_tasks().task_index
                    if task.startswith("longbench_") and longbench_file(task, folder).is_file()
                ]
            )
            if not all_of_it:
                raise ValueError(
                    f"--longbench {folder} has no file of LongBench's, such as qasper.jsonl"
                )
        else:
            found += WITHOUT_ESSAYS if name == "ruler" else [name]
    return list(dict.fromkeys(found))


def evaluate(
    lm: SlimLM, task: dict, chat: bool, limit: int, question=lambda doc: None
) -> list[dict]:
    """Run one task; return its rows: a metric, its mean over the samples and the standard error."""
    lm.question, lm.used = question, []
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
            scores = [
                s[metric]
                for s in samples
                if isinstance(s.get(metric), int | float) and s[metric] != -1
            ]
            if scores:
                error = stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else float("nan")
                rows.append(
                    {
                        "task": name,
                        "metric": metric,
                        "n": len(scores),
                        "mean": mean(scores),
                        "error": error,
                    }
                )
    if not rows:
        raise ValueError(
            f"{task['task']} has no score of single samples, which the table is made of; leave it out"
        )
    return rows


def notes_of(lm: SlimLM) -> dict[str, str]:
    """Return what is said under a column: what its requests saw, lost and cost."""
    views = Counter(used.in_view for used in lm.used)
    seen = (
        next(iter(views))
        if len(views) == 1
        else ", ".join(f"{view} {n}" for view, n in views.items())
    )
    return {
        "question in view when the text is pruned": seen
        if lm.ckpt.schedule
        else "nothing is pruned",
        "prompts cut in the middle, to the context": f"{sum(used.cut for used in lm.used)} of {len(lm.used)}",
        "FLOPs of the prefill, of dense": f"{lm.flops():.1%}",
    }


def table(columns: dict[str, list[dict]], notes: dict[str, dict[str, str]]) -> str:
    """Return a Markdown table: a row per task and metric, a column per way to answer; then the notes."""
    lines = [
        "| task | metric | samples | " + " | ".join(columns) + " |",
        "|---|---|---|" + "---|" * len(columns),
    ]
    for rows in zip(*columns.values(), strict=True):
        cells = [f"{100 * row['mean']:.1f} ± {100 * row['error']:.1f}" for row in rows]
        lines.append(
            f"| {rows[0]['task']} | {rows[0]['metric']} | {rows[0]['n']} | "
            + " | ".join(cells)
            + " |"
        )
    for what in next(iter(notes.values())):
        lines.append(f"| {what} | | | " + " | ".join(notes[name][what] for name in columns) + " |")
    return "\n".join(lines)


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--ckpt", required=True)
    p.add_argument(
        "--tasks",
        required=True,
        help="with commas; ruler: all without essays; longbench: all with a file",
    )
    p.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=[4096],
        help="of RULER's samples, in tokens (%(default)s)",
    )
    p.add_argument("--limit", type=int, default=100, help="samples a task and length (%(default)s)")
    p.add_argument(
        "--columns",
        nargs="+",
        default=[*COLUMNS],
        help="dense, paper, default, or SCHEDULE or SCHEDULE@RULE",
    )
    p.add_argument(
        "--question-later",
        action="store_true",
        help="also read the text first and the question later",
    )
    p.add_argument("--out", type=Path, help="file of answers; what is in it is not computed again")
    p.add_argument("--raw", action="store_true", help="no chat template")
    p.add_argument(
        "--essays", type=Path, metavar="FILE", help="a text for RULER's tasks that want essays"
    )
    p.add_argument(
        "--longbench", type=Path, metavar="DIR", help="folder of LongBench's .jsonl files"
    )
    p.add_argument(
        "--max-len", type=int, default=0, help="tokens of prompt and answer (the model's context)"
    )
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="auto")
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
    ways = {}
    for column in args.columns:
        schedule, rule = COLUMNS.get(column) or (*column.split("@"), "peak")[:2]
        ckpt = Checkpoint.open(args.ckpt, args.device, args.dtype, schedule, rule)
        if not 0 <= args.max_len <= ckpt.config.max_len:
            raise ValueError(
                f"--max-len {args.max_len} must be within 1..{ckpt.config.max_len}, the model's context"
            )
        ways[column] = SlimLM(ckpt, False, args.out, args.max_len)
        if args.question_later and ckpt.schedule:
            ways[f"{column}, question later"] = SlimLM(ckpt, True, args.out, args.max_len)
    tasks = []
    for name in expand(args.tasks, args.longbench):
        if name in RULER:
            if max(args.lengths) > ways[column].max_len:
                most = ways[column].max_len
                raise ValueError(
                    f"--lengths {max(args.lengths)} is above the context of {most} tokens; give less"
                )
            task = ruler_task(name, ckpt.folder, args.lengths, args.limit, args.essays)
            tasks.append((task, not args.raw, last_line))
        elif name.startswith("longbench_") and name in long_tasks().task_index:
            few_shot = name.removeprefix("longbench_").removesuffix("_e") in NO_CHAT
            question = functools.partial(after_context, name)
            tasks.append(
                (longbench_task(name, args.longbench), not args.raw and not few_shot, question)
            )
        elif name in all_tasks().task_index:
            tasks.append(({"task": name}, not args.raw, lambda doc: None))
        else:
            raise ValueError(
                f"there is no task {name!r}; lm_eval ls tasks lists those of the harness"
            )
    columns, notes = {}, {}
    for column, lm in ways.items():
        columns[column], used = [], []
        for task, chat, question in tasks:
            limit = args.limit * (len(args.lengths) if task["task"] in RULER else 1)
            columns[column] += evaluate(
                lm, task, chat and lm.tok.template is not None, limit, question
            )
            used += lm.used
            print(f"evals: {column}: {columns[column][-1]}", file=sys.stderr, flush=True)
        lm.used, lm.engine = used, None
        notes[column] = notes_of(lm)
    return table(columns, notes)


if __name__ == "__main__":
    raise SystemExit(main())
