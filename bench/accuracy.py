"""Does pruning keep the answer? Rules for choosing blocks, compared on real models and real prose.

    python bench/accuracy.py --text BOOK.txt --lengths 4096 --samples 60 --out accuracy.jsonl
    python bench/accuracy.py --ckpt qwen2.5-coder-0.5b-instruct --text BOOK.txt --out accuracy.jsonl
    python bench/accuracy.py --out accuracy.jsonl --table       # of all models in the file
    python bench/accuracy.py --text BOOK.txt --set floors --part 0 ...   # texts for choosing

Every entry of a set (bench/rivals.py) answers the same questions about the same documents
(bench/prose.py). The answer is teacher-forced: after the prompt its tokens are fed, whatever the
model would have said, and a token counts if the model would have chosen it. `frozen` entries choose
blocks once, after the prompt, and then take the whole answer at once; the others go token by token
and choose anew at each, as the engine does for a user. What all prompts of a document begin with is
run once, and with it the layers below an entry's first boundary: densely, and again for every local
attention among the entries. Each result, of one entry on one question, is a line of --out; a second
call computes only what is missing.
"""

import json
import os
import sys
import time
from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import slim
from bench import prose, report, rivals
from bench.common import Parser, check_numbers, read_lengths
from bench.report import Key
from bench.rivals import Entry
from kvcache import KVCache
from model import FULL, Local, attention_weights
from planning.checkpoint import dtype_name
from planning.flops import prefill_flops
from planning.schedule import format_schedule

SHORTEST = 1024  # tokens that the questions and a text between them take
MOST_QUERIES = 64  # kept of the dense run: the widest window of any rule, and the longest answer


# ---- one question, every entry ---------------------------------------------------------------


class Record(NamedTuple):
    """What one step of a run without pruning left behind."""

    queries: list[Tensor]  # the newest queries, by layer
    x: dict[int, Tensor | None]  # x after the attention below some boundaries


@dataclass
class Base:
    """A run without pruning, from which entries take the layers below their first boundary."""

    kv: KVCache
    local: Local
    n_layers: int  # that are run; those above are left out
    n_shared: int  # tokens that all questions begin with
    records: dict[str, Record]  # of the steps: shared, question, answer


class Bench:
    """A model whose layers below a boundary are taken from a run without pruning.

    It stands in for the model's attention and FFN: in a base's run it records their results, in an
    entry's run it puts them in.
    """

    def __init__(
        self, ckpt: str, device: str, dtype: str, entries: dict[str, Entry], weights="auto"
    ):
        self.engine = slim.load(ckpt, device, dtype, schedule="dense", weights=weights)
        if self.engine.ckpt.with_schedule("auto").needs_probe:
            self.engine.find_heads()
        self.ckpt = self.engine.ckpt
        self.model = self.engine.model
        self.config = self.engine.config
        self.caches: dict[object, KVCache] = {}
        self.attention = self.model.attention
        self.ffn = self.model.ffn
        self.model.attention = self.attend
        self.model.ffn = self.feed
        schedules = [entry.schedule(self.ckpt, 4096) for entry in entries.values()]
        self.first_boundaries = {next(iter(schedule)) for schedule in schedules if schedule}
        self.first = 0  # layers below this one are taken from the base
        self.recording: Record | None = None

    def cache(self, name, block_len: int) -> KVCache:
        config = self.config
        if name not in self.caches:
            self.caches[name] = KVCache(
                config.n_layers,
                config.n_kv_heads,
                config.head_dim,
                config.dim,
                block_len,
                self.engine.kv.dtype,
                self.engine.kv.device,
            )
        return self.caches[name]

    # the model's attention and FFN

    def attend(self, layer: int, x: Tensor, rows) -> Tensor:
        if self.recording is not None:
            return self.record(layer, x, rows)
        if self.model.kv.reading_prompt and layer < self.first:
            return self.replay(layer, x, rows)
        return self.attention(layer, x, rows)

    def record(self, layer: int, x: Tensor, rows) -> Tensor:
        if layer >= self.base.n_layers:
            return x[:0]
        if self.base.local.window and self.base.kv.reading_prompt:
            rows = replace(rows, n_local=len(x))
        queries = self.attention(layer, x, rows)
        self.recording.queries.append(queries)
        if layer + 1 in self.recording.x:
            self.recording.x[layer + 1] = x.clone()
        return queries

    def replay(self, layer: int, x: Tensor, rows) -> Tensor:
        slab = self.model.kv.slabs[layer]
        slab[:, :, : len(x)] = self.base.kv.slabs[layer][:, :, : len(x)]
        if layer == self.first - 1:
            x[:] = torch.cat([record.x[self.first] for record in self.prompt_records()])
        return self.last_queries(layer)[-len(rows.newest) :]

    def feed(self, layer: int, x: Tensor) -> None:
        if self.recording is not None and layer >= self.base.n_layers:
            return
        if self.model.kv.length or layer >= self.first - 1:
            self.ffn(layer, x)

    def prompt_records(self) -> tuple[Record, Record]:
        return self.base.records["shared"], self.base.records["question"]

    def last_queries(self, layer: int) -> Tensor:
        """Return the base's newest queries (w, H, D) after the prompt."""
        parts = [record.queries[layer] for record in self.prompt_records()]
        return torch.cat(parts)[-MOST_QUERIES:]

    # runs without pruning

    def read_document(self, shared: list[int], room: int) -> None:
        """Run the beginning of all prompts of a document; its dense runs go on from there."""
        self.shared = shared
        self.room = room
        self.local_bases: dict[tuple[Local, int], Base] = {}
        self.dense = self.new_base(FULL, len(shared), self.config.n_layers)

    def new_base(self, local: Local, n_shared: int, n_layers: int) -> Base:
        """Run n_shared tokens of the document, each with this local attention."""
        kv = self.cache(("base", local, n_shared if local.window else 0), 64)
        kv.reset(n_shared, {}, len(self.shared) - n_shared + self.room)
        base = Base(kv, local, n_layers, n_shared, {})
        self.run_from(base)
        self.logits = self.base_step("shared", self.shared[:n_shared])
        return base

    def run_from(self, base: Base) -> None:
        """Let the model run a base, or an entry take its lower layers from it."""
        self.base = base
        self.model.kv = base.kv
        self.model.local = base.local
        self.model.window = MOST_QUERIES
        self.first = 0

    def run_dense(self, prompt: list[int], answer: list[int]) -> Tensor:
        """Answer one question without pruning; return the logits (answer tokens, V)."""
        logits = self.ask(self.dense, prompt)
        later = self.base_step("answer", answer[:-1], len(answer) - 1)
        return torch.cat([logits, later])

    def ask(self, base: Base, prompt: list[int]) -> Tensor:
        """Run a question after a base; all its rows see everything."""
        self.run_from(base)
        base.kv.rewind(base.n_shared)
        question = prompt[base.n_shared :]
        return self.base_step("question", question) if question else self.no_question()

    def base_step(self, part: str, ids: list[int], n_logits: int = 1) -> Tensor:
        self.recording = Record([], dict.fromkeys(self.first_boundaries))
        self.base.records[part] = self.recording
        logits = self.model.step(torch.tensor(ids), n_logits)
        self.recording = None
        return logits

    def no_question(self) -> Tensor:
        """Record a step of no tokens: the prompt is what all prompts of the document begin with."""
        shared = self.base.records["shared"]
        queries = [queries[:0] for queries in shared.queries]
        x = {boundary: rows[:0] for boundary, rows in shared.x.items()}
        self.base.records["question"] = Record(queries, x)
        return self.logits

    def local_base(self, local: Local, prompt: list[int], n_layers: int) -> Base:
        """Return the lower layers of a prompt with local attention.

        The document's rows with local attention are run once for all questions; then the prompt's
        last rows, which see everything.
        """
        n_local = local.n_rows(len(prompt))
        if n_local == 0:
            return self.dense
        if (local, n_local) not in self.local_bases:
            logits = self.logits
            self.local_bases[local, n_local] = self.new_base(local, n_local, n_layers)
            self.logits = logits
        base = self.local_bases[local, n_local]
        self.ask(base, prompt)
        return base

    def oracle(self, n_prompt: int) -> Tensor:
        """Return (n_prompt,): the strongest weight on each token from rows that name the answer."""
        best = torch.zeros(n_prompt)
        for layer in range(self.config.n_layers * 9 // 30, self.config.n_layers):
            answer = self.dense.records["answer"]
            naming = [self.last_queries(layer)[-1:], answer.queries[layer]]
            for i, query in enumerate(torch.cat(naming)):
                keys, _ = self.dense.kv.read(layer, n_prompt + i)
                weights = attention_weights(query[None], keys)[0, :, :n_prompt]  # (H, n_prompt)
                best = torch.maximum(best, weights.amax(0).float().cpu())
        return best

    # an entry's run

    def run(self, entry: Entry, prompt: list[int], answer: list[int], oracle: Tensor | None):
        """Answer as an entry does; return the logits (answer tokens, V)."""
        self.base = self.dense
        schedule = entry.schedule(self.ckpt, len(prompt))
        rule = entry.rule
        if rule.sees == "lookup":
            rule = replace(rule, heads=self.ckpt.heads_below(max(schedule)))
        if rule is rivals.ORACLE:
            rule = oracle_rule(oracle, entry.block_len)
        if entry.second_run:
            prompt = self.second_run_prompt(rule, prompt, next(iter(schedule)))
            schedule = {}
        local = self.local_of(entry, schedule)
        if local.window and schedule:
            self.base = self.local_base(local, prompt, next(iter(schedule)))
        kv = self.cache(entry.block_len, entry.block_len)
        self.model.kv = kv
        self.model.local = local
        self.model.rule = rule
        self.model.window = entry.window or entry.rule.window
        self.model.gamma = 0.0 if entry.frozen else rule.gamma
        self.model.unit_len = min(8, entry.block_len)
        kv.reset(len(prompt), schedule, len(answer))
        self.first = kv.stages[0].layers[-1] + 1 if len(kv.stages) > 1 else 0
        logits = [self.model.step(torch.tensor(prompt))]
        fed = torch.tensor(answer[:-1])
        if entry.frozen:
            logits.append(self.model.step(fed, len(fed)))
        else:
            logits += [self.model.step(token[None]) for token in fed]
        return torch.cat(logits)

    def local_of(self, entry: Entry, schedule: dict) -> Local:
        """Return an entry's local attention, with the model's lookup heads below the boundary."""
        if not (schedule and entry.local.window and entry.far_heads):
            return entry.local
        return replace(entry.local, heads=self.ckpt.heads_below(next(iter(schedule))))

    def second_run_prompt(self, rule, prompt: list[int], boundary: int) -> list[int]:
        """Return the tokens that GemFilter's first run chooses, in their order."""
        keys, _ = self.dense.kv.read(boundary - 1, len(prompt))
        scores = rule.score(self.last_queries(boundary - 1)[-1:], keys[:, None], None, 1)
        kept = scores.topk(self.second_run_length(boundary, len(prompt))).indices
        return [prompt[i] for i in kept.sort().values.tolist()]

    def second_run_length(self, n_layers: int, n_prompt: int) -> int:
        """Return how many tokens may run after n_layers of a first run, at the default's FLOPs."""
        default = prefill_flops(self.config, n_prompt, rivals.auto(self.ckpt, n_prompt))
        whole = prefill_flops(self.config, n_prompt, {}, 1)
        left = default - whole * n_layers / self.config.n_layers
        return bisect(
            range(1, n_prompt), left, key=lambda kept: prefill_flops(self.config, kept, {}, 1)
        )

    def saving(self, entry: Entry, n_prompt: int) -> float:
        """Return how many times fewer FLOPs an entry's first token takes than dense."""
        schedule = rivals.auto if entry.second_run else entry.schedule
        cut = schedule(self.ckpt, n_prompt)
        local = self.local_of(entry, cut)
        cost = prefill_flops(self.config, n_prompt, cut, entry.block_len, local)
        return prefill_flops(self.config, n_prompt, {}) / cost


def oracle_rule(oracle: Tensor, block_len: int):
    """Return a rule that gives each block the oracle's best score of its tokens."""
    padded = F.pad(oracle, (0, -len(oracle) % block_len))
    scores = padded.view(-1, block_len).amax(1)
    return rivals.of_keys(lambda queries, keys, blocks, unit_len: scores[blocks.cpu()])


def judge(logits: Tensor, answer: list[int]) -> dict:
    """Return the mean loss of the answer's tokens, the share that is right, and whether all are."""
    truth = torch.tensor(answer)
    logits = logits.cpu().float()
    right = logits.argmax(-1) == truth
    return {
        "nll": round(F.cross_entropy(logits, truth).item(), 5),
        "right": round(right.float().mean().item(), 5),
        "whole": right.all().item(),
    }


# ---- all questions ---------------------------------------------------------------------------


def run(args, ckpt: str, entries: dict[str, Entry]) -> None:
    """Compute the results of one model that --out lacks, and add them to it."""
    out = Path(args.out)
    known = report.read(out)
    bench = Bench(ckpt, args.device, args.dtype, entries, args.weights)
    text = Path(args.text).read_text(encoding="utf-8")
    book = prose.Book(text, bench.engine.tokenizer, args.part)
    name = Path(ckpt).name.lower()
    dtype = dtype_name(bench.engine.kv.dtype)
    if bench.ckpt.kept_as != "full":
        dtype += f", {bench.ckpt.kept_as}"
    seeds = range(args.first, args.first + args.samples)
    with out.open("a") as file, torch.inference_mode():
        if not (out.read_bytes() or b"\n").endswith(b"\n"):
            file.write("\n")  # the last line was cut: nothing may be written into it
        for seed in seeds:
            for n in args.lengths:
                keys = [
                    Key(name, task, n, args.part, seed, entry, dtype)
                    for task in args.tasks
                    for entry in entries
                ]
                missing = [key for key in keys if key not in known]
                if not missing:
                    continue
                started = time.perf_counter()
                document = prose.document(book, n, seed)
                for result in run_document(bench, document, missing, entries):
                    file.write(json.dumps(result) + "\n")
                    file.flush()
                seconds = time.perf_counter() - started
                print(f"{name}, {n:,} tokens, #{seed}: {seconds:.0f} s", file=sys.stderr)


def run_document(bench: Bench, document, missing: list[Key], entries: dict) -> Iterator[dict]:
    """Yield the missing results of one document."""
    bench.read_document(document.shared, 2 * prose.ROOM)
    for task in dict.fromkeys(key.task for key in missing):
        prompt, answer = document.questions[task]
        asked = [key for key in missing if key.task == task]
        dense_logits = bench.run_dense(prompt, answer)
        oracle = None
        if any(entries[key.entry].rule is rivals.ORACLE for key in asked):
            oracle = bench.oracle(len(prompt))
        for key in asked:
            entry = entries[key.entry]
            torch.manual_seed(key.seed)
            logits = dense_logits
            if entry.schedule is not rivals.dense:
                logits = bench.run(entry, prompt, answer, oracle)
            yield (
                key._asdict()
                | judge(logits, answer)
                | {
                    "revived": bench.model.kv.revived,
                    "flops": round(bench.saving(entry, len(prompt)), 4),
                    "schedule": format_schedule(entry.schedule(bench.ckpt, len(prompt))),
                }
            )


# ---- command line ----------------------------------------------------------------------------


def parser() -> Parser:
    p = Parser("accuracy.py")
    data = os.environ.get("SLIM_TEST_DATA")
    book = data and f"{data}/texts/war_and_peace.txt"
    p.add_argument("--ckpt", default="smollm2-135m-instruct", help="one or more, with commas")
    p.add_argument("--text", default=book, help="a long text, UTF-8")
    p.add_argument("--set", choices=rivals.SETS, default="rivals")
    p.add_argument("--only", help="names of entries, or how names begin, with semicolons")
    p.add_argument("--tasks", default=",".join(prose.TASKS))
    p.add_argument("--lengths", default="4096", help="prompts in tokens, with commas")
    p.add_argument("--samples", type=int, default=60, help="documents; each has all tasks")
    p.add_argument("--first", type=int, default=0, help="number of the first document")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    part = "0: texts for choosing, 1: for reporting"
    p.add_argument("--part", type=int, choices=(0, 1), default=1, help=part)
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="auto")
    p.add_argument("--weights", default="auto", help="full, int8 or int4")
    p.add_argument("--out", required=True, help="results; --table takes several, with commas")
    p.add_argument("--plot", metavar="PNG", help="draw the first of --lengths; needs matplotlib")
    p.add_argument("--table", action="store_true", help="compute nothing")
    return p


def check(args) -> None:
    """Split the lists and raise ValueError for wrong options."""
    check_numbers(args, {"samples": (1, 10**6), "first": (0, 10**6), "threads": (1, 1024)})
    args.lengths = read_lengths(args.lengths, SHORTEST, 2**20, "which questions and a text take")
    args.tasks = args.tasks.split(",")
    for task in args.tasks:
        if task not in prose.TASKS + prose.MORE_TASKS:
            known = ", ".join(prose.TASKS + prose.MORE_TASKS)
            raise ValueError(f"--tasks {task!r} is unknown; there are {known}")
    if not args.table and not args.text:
        raise ValueError("--text is missing: a long book, such as War and Peace")
    for path in args.out.split(",") if args.table else ():
        if not Path(path).is_file():
            raise ValueError(f"--out {path} does not exist, so there is nothing for a table")


def pick(entries: dict[str, Entry], only: str | None) -> dict[str, Entry]:
    """Return dense and the entries that --only names; a whole name means itself alone."""
    if not only:
        return entries
    words = only.split(";")
    for word in words:
        if not any(name.startswith(word) for name in entries):
            raise ValueError(f"--only {word!r} is none of {'; '.join(entries)}")
    begun = tuple(word for word in words if word not in entries)
    return {
        name: entry
        for name, entry in entries.items()
        if name in ("dense", *words) or name.startswith(begun)
    }


def main(argv: list[str] | None = None) -> None:
    p = parser()
    args = p.parse_args(argv)
    try:
        check(args)
        entries = pick(rivals.SETS[args.set], args.only)
        torch.set_num_threads(args.threads)
        for ckpt in () if args.table else args.ckpt.split(","):
            run(args, ckpt, entries)
        results = report.read_all(args.out)
        print("\n".join(report.tables(results, list(entries), args.part)))
        if args.plot:
            report.plot(args.plot, results, args.lengths[0])
    except (ValueError, OSError, ModuleNotFoundError) as error:
        p.error(error)


if __name__ == "__main__":
    main()
