"""Does pruning keep the answer? Accuracy by task, length, budget and method on the demo checkpoint.

    python bench/quality.py main        # methods x tasks at equal budgets
    python bench/quality.py lengths     # dense accuracy by task and length
    python bench/quality.py boundary    # first boundary by layer, slim against random blocks
    python bench/quality.py settings    # block_len, unit_len, window, gamma, re-selection off
    python bench/quality.py rules       # from the paper's score to summed attention, one change at a time
    python bench/quality.py diffusion   # the fact's own blocks removed at layer l, and nothing else
    python bench/quality.py depth       # where in the document the fact lies, by length
    python bench/quality.py questions   # later questions on one document against asking afresh

An answer counts if the whole of it, its end of line included, is generated greedily.
Every method prunes through the engine's own boundary, so it differs in nothing but the
scores; budgets are shares of the prompt. Documents and the random method are seeded: a
second run prints the same figures, by however many --workers. `questions` and `rules` have
documents that no other experiment sees. A row of `main` in which random blocks lose less
than ten points against dense cannot tell methods apart and is marked with a ~. Rows go
to stderr and into --out as they come, so a stopped run keeps what it has.
"""

import argparse
import json
import multiprocessing
import platform
import sys
import time
from collections.abc import Callable
from functools import cache, lru_cache, partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]
import tasks

import prune
import slim
import tokenizer
from loading.find import find_checkpoint

# ---- methods: newest queries (W, H, D), keys (N, B, G, D), block numbers (N,) -> scores (N,) -------------


def random_blocks(queries, keys, blocks, unit_len):
    return torch.rand(len(blocks))


def recent_blocks(queries, keys, blocks, unit_len):
    """Sink and newest tokens, as in StreamingLLM."""
    return blocks.float()


def token_attention(queries, keys, blocks, unit_len):
    """Attention of the last token, mean over heads, of single tokens, as in LazyLLM: needs block_len 1."""
    q, k = queries[-1], keys.repeat_interleave(queries.shape[1] // keys.shape[2], 2)  # (H, D), (N, B, H, D)
    logits = torch.einsum("hd,nbhd->hnb", q.float(), k.float()) / q.shape[-1] ** 0.5
    return logits.flatten(1).softmax(-1).view_as(logits).mean(0).sum(-1)


def attention_mass(queries, keys, blocks, unit_len):
    """Attention that each of the newest queries pays to a block, summed over its tokens, mean over heads and
    queries.
    """
    k = keys.repeat_interleave(queries.shape[1] // keys.shape[2], 2)  # (N, B, H, D)
    logits = torch.einsum("whd,nbhd->whnb", queries.float(), k.float()) / queries.shape[-1] ** 0.5
    return logits.flatten(2).softmax(-1).view_as(logits).mean((0, 1)).sum(-1)


def average_pooled(queries, keys, blocks, unit_len):
    """The whole block as one unit."""
    return prune.paper(queries, keys, blocks, keys.shape[1])


def max_pooled(queries, keys, blocks, unit_len):
    """A block's key is its largest value in every dimension."""
    return prune.paper(queries, keys.amax(1, keepdim=True), blocks, 1)


METHODS = {
    "peak": prune.RULES["peak"],
    "paper's rule": prune.paper,
    "average pool": average_pooled,
    "max pool": max_pooled,
    "attention mass": attention_mass,
    "token attention": token_attention,
    "recent blocks": recent_blocks,
    "random blocks": random_blocks,
}


def rule(
    queries, keys, blocks, unit_len, unit=None, newest=None, query="mean first", weight="abs", heads="mean", over="max"
):
    """Slim's score as it stands; each option turns one step of it towards `attention_mass`, or elsewhere.

    unit: tokens a unit; newest: queries counted; query: "mean first", or each query scored by itself and then
    their "mean" or "max"; weight: "abs" or "signed" dot products, or their "softmax" over all units; heads: "mean"
    or "max"; over: a block's "max" or "sum" over its units.
    """
    units = prune.unit_keys(keys, unit or unit_len)  # (N, U, G, D)
    n, u, g, d = units.shape
    q = queries[-(newest or len(queries)) :].to(units.dtype)
    q = (q.mean(0, keepdim=True) if query == "mean first" else q).view(-1, g, q.shape[1] // g, d)  # (W, G, H/G, D)
    dots = (q @ units.view(n * u, g, d).permute(1, 2, 0)).flatten(1, 2)  # (W, H, N*U)
    dots = {"abs": dots.abs, "signed": lambda: dots, "softmax": lambda: (dots / d**0.5).softmax(-1)}[weight]()
    dots = dots.amax(1) if heads == "max" else dots.mean(1)  # (W, N*U)
    dots = (dots.amax(0) if query == "max" else dots.mean(0)).view(n, u)
    return dots.amax(1) if over == "max" else dots.sum(1)


MASS = {"unit": 1, "query": "mean", "weight": "softmax", "over": "sum"}  # rule(**MASS) is attention_mass
RULES = {
    "slim": {},
    "slim, signed": {"weight": "signed"},
    "slim, units of 1": {"unit": 1},
    "slim, max over queries": {"query": "max"},
    "slim, mean over queries": {"query": "mean"},
    "slim, softmax over units": {"weight": "softmax"},
    "slim, sum over units": {"over": "sum"},
    "slim, max over heads": {"heads": "max"},
    "slim, window 1": {"newest": 1},
    "attention mass, units": MASS | {"unit": None},
    "attention mass, mean query": MASS | {"query": "mean first"},
    "attention mass, abs for softmax": MASS | {"weight": "abs"},
    "attention mass, max token": MASS | {"over": "max"},
    "attention mass": MASS,
}

# ---- one question -----------------------------------------------------------------------


def ask(engine, ids: list[int], answer: list[int], schedule=None) -> bool:
    """Say whether greedy decoding gives exactly `answer` after ids."""
    engine.prefix.prompt = ids
    return goes_on(engine, engine.prefill(ids, schedule=schedule), answer)


def goes_on(engine, logits, answer: list[int]) -> bool:
    """Say whether greedy decoding goes on with exactly `answer`; stops at the first wrong token."""
    for n, token in enumerate(answer):
        if int(logits.argmax()) != token:
            engine.pending = answer[n:]  # a conversation goes on with the right answer
            return False
        if n < len(answer) - 1:
            logits = engine.extend([token])
    engine.pending = answer[-1:]
    return True


def spell(tok, sample, question) -> tuple[list[int], list[int]]:
    """Return the ids of document and question, and of the answer."""
    ids = [tok.bos_id] + tok.encode(sample.document + "\n") + tok.encode("question: " + question.text)
    return ids, tok.encode(" " + question.answer + "\n")


@cache
def load_tokenizer(ckpt: str):
    return tokenizer.load(find_checkpoint(ckpt))


@lru_cache(4096)
def one_question(ckpt: str, kind: str, length: int, seed: int, depth: float | None):
    """Return a document with one question, the ids of both, and those of the answer."""
    tok = load_tokenizer(ckpt)
    sample = tasks.make(kind, length, seed, tok, n_questions=1, depth=depth)
    return sample, *spell(tok, sample, sample.questions[0])


class Prefix:
    """The layers below the first boundary, computed once a prompt: all methods start there from the same state.

    Takes the place of a model's attention and ffn; `prompt` names what is read next. Bit for
    bit what the engine computes, as it is what the engine computed.
    """

    def __init__(self, engine):
        self.kv, self.prompt, self.of = engine.kv, None, None
        self.attention, self.ffn = engine.model.attention, engine.model.ffn
        engine.model.attention, engine.model.ffn = self.attend, self.feed

    def below(self, layer: int) -> bool:
        return self.kv.length == 0 and len(self.kv.stages) > 1 and layer in self.kv.stages[0].layers

    def attend(self, layer, x, rows):
        known, last = (self.prompt, self.kv.stages[0].layers), self.kv.stages[0].layers[-1]
        if not self.below(layer):
            return self.attention(layer, x, rows)
        if self.of == known:
            self.kv.slabs[layer].copy_(self.slabs[layer])
            if layer == last:
                x.copy_(self.x)
            return self.queries[layer], None
        queries, weights = self.attention(layer, x, rows)
        self.slabs = [*(self.slabs if layer else []), self.kv.slabs[layer].clone()]
        self.queries = [*(self.queries if layer else []), queries]
        if layer == last:
            self.of, self.x = known, x.clone()
        return queries, weights

    def feed(self, layer, x):
        last = self.kv.stages[0].layers[-1]
        if not (self.below(layer) and layer < last and self.of == (self.prompt, self.kv.stages[0].layers)):
            self.ffn(layer, x)


@lru_cache(2)  # as many engines as one table takes turns with
def load_engine(ckpt: str, device: str, dtype: str, settings: tuple):
    engine = slim.load(ckpt, device, dtype, schedule="dense", **dict(settings))
    engine.prefix = Prefix(engine)
    return engine


def load(args, **settings):
    settings = {"block_len": args.block_len, "unit_len": args.unit_len, "gamma": args.gamma} | settings
    return load_engine(args.ckpt, args.device, args.dtype, tuple(settings.items()))


def as_rule(score) -> prune.Rule:
    return score if isinstance(score, prune.Rule) else prune.Rule("", score, sees="keys")


class Try(NamedTuple):
    """How to answer a question: dense without a share."""

    share: float | None = None
    score: Callable = prune.paper
    boundary: int = 0


DENSE = Try()


def hits(args, kind: str, length: int, tries: list[Try], depth, settings: dict, i: int) -> list[bool]:
    """Say of each try whether it answers the i-th question of a cell."""
    _, ids, answer = one_question(args.ckpt, kind, length, args.first_seed + i, depth)
    found = []
    for share, score, boundary in tries:
        single = {"block_len": 1, "unit_len": 1, "window": 1} if score is token_attention else {}
        engine = load(args, **settings | single)
        engine.model.rule = as_rule(score)
        torch.manual_seed(i)
        block_len = engine.ckpt.settings.block_len
        found.append(
            ask(
                engine,
                ids,
                answer,
                {} if share is None else {boundary or args.boundary: max(int(len(ids) * share), 2 * block_len)},
            )
        )
    return found


def each(args, work, n: int) -> list:
    """Return [work(0), ..., work(n - 1)], by --workers processes."""
    if args.workers == 1:
        return [work(i) for i in range(n)]
    return pool(args.workers, args.threads).map(work, range(n))


@cache
def pool(workers: int, threads: int):
    return multiprocessing.get_context("spawn").Pool(workers, torch.set_num_threads, [threads])


def cells(args, kind: str, length: int, tries: list[Try], n=None, depth=None, **settings) -> list[float]:
    """Return the accuracy of every try over n questions, one a document."""
    n = n or args.questions
    return [
        sum(column) / n for column in zip(*each(args, partial(hits, args, kind, length, tries, depth, settings), n))
    ]


# ---- experiments: each yields the head of a table, then its rows -------------------------


def lengths(args):
    yield ["dense, by prompt tokens", *(f"{n:,}" for n in args.lengths)]
    for kind in args.kinds:
        yield [kind, *(cells(args, kind, n, [DENSE])[0] for n in args.lengths)]


def main_table(args):
    """Every method at every budget, by task and length."""
    yield [f"boundary {args.boundary}", "dense", *METHODS]
    for length in args.lengths:
        for kind in args.kinds:
            dense, *rest = cells(
                args, kind, length, [DENSE, *(Try(share, score) for share in args.shares for score in METHODS.values())]
            )
            for share in args.shares:
                row, rest = rest[: len(METHODS)], rest[len(METHODS) :]
                blind = "" if dense - row[[*METHODS].index("random blocks")] >= 0.1 else " ~"
                yield [f"{kind}, {length:,} tokens, {one_in(share)}{blind}", dense, *row]


def one_in(share: float) -> str:
    return f"1/{1 / share:g}"


def boundary(args):
    """The first boundary by layer: where does random selection start to hurt, and slim not?"""
    layers, share = range(1, load(args).config.n_layers), args.shares[0]
    yield [f"{one_in(share)}, boundary at", *map(str, layers)]
    for length in args.lengths:
        for kind in args.kinds:
            names = dict.fromkeys([args.method, "random blocks"])
            found = cells(args, kind, length, [Try(share, METHODS[name], b) for b in layers for name in names])
            for i, name in enumerate(names):
                yield [f"{kind}, {length:,} tokens, {name}", *found[i :: len(names)]]


def settings(args):
    """One setting changed at a time; gamma 0 never selects again after the prompt."""
    changes = [
        {},
        {"block_len": 32},
        {"block_len": 64},
        {"unit_len": 4},
        {"unit_len": args.block_len},
        {"window": 1},
        {"window": 16},
        {"gamma": 0.0},
        {"gamma": 0.5},
        {"gamma": 1.0},
    ]
    yield [f"{one_in(args.shares[-1])}, boundary {args.boundary}", *args.kinds]
    for length in args.lengths:
        for change in changes:
            name = ", ".join(f"{k} {v}" for k, v in change.items()) or "as it is"
            yield [
                f"{length:,} tokens, {name}",
                *(
                    cells(args, kind, length, [Try(args.shares[-1], METHODS[args.method])], **change)[0]
                    for kind in args.kinds
                ),
            ]


def rules(args):
    """What parts the paper's score from summed attention: one step of either exchanged for the other's."""
    share = args.shares[0]
    yield [f"{one_in(share)}, boundary {args.boundary}", *args.kinds]
    scores = {"random blocks": random_blocks} | {name: partial(rule, **options) for name, options in RULES.items()}
    for length in args.lengths:
        columns = [
            cells(args, kind, length, [DENSE, *(Try(share, score) for score in scores.values())]) for kind in args.kinds
        ]
        for name, row in zip(["dense", *scores], zip(*columns)):
            yield [f"{length:,} tokens, {name}", *row]


def without_facts(args, kind: str, length: int, i: int) -> list[bool]:
    """Say for each layer whether the i-th question is answered if the facts' blocks leave there."""
    engine, tok, b = load(args), load_tokenizer(args.ckpt), args.block_len
    sample, ids, answer = one_question(args.ckpt, kind, length, args.first_seed + i, None)
    places = [1 + len(tok.encode(sample.document[:at])) for span in sample.questions[0].fact_spans for at in span]
    gone = {p // b for start, end in zip(places[::2], places[1::2]) for p in range(start, end)} - {
        0,
        (len(ids) - 1) // b,
    }
    engine.model.rule = as_rule(
        lambda q, k, blocks, u: torch.tensor([-1.0 if x in gone else 1.0 for x in blocks.tolist()])
    )
    budget = (-(-len(ids) // b) - len(gone)) * b
    return [ask(engine, ids, answer, {layer: budget} if gone else {}) for layer in range(1, engine.config.n_layers)]


def diffusion(args):
    """At boundary l exactly the blocks of the facts leave: who can still answer has moved what they say."""
    yield ["facts removed at layer", *map(str, range(1, load(args).config.n_layers))]
    for length in args.lengths:
        for kind in args.kinds:
            hits = each(args, partial(without_facts, args, kind, length), args.questions)
            yield [f"{kind}, {length:,} tokens", *(sum(column) / len(hits) for column in zip(*hits))]


def depth(args):
    spots = (0.02, 0.25, 0.5, 0.75, 0.98)
    yield ["lookalike, tokens; fact at", *map(str, spots)]
    for length in args.lengths:
        yield [
            f"{length:,}",
            *(
                cells(args, "lookalike", length, [Try(args.shares[0], METHODS[args.method])], args.questions // 4, d)[0]
                for d in spots
            ),
        ]


def conversation(args, length: int, i: int):
    """Ask eight questions on a document afresh and as follow-ups.

    Return the later seven's hits of both, blocks revived, seconds to the first token of the
    prefill, and of each follow-up.
    """
    engine, tok = load(args), load_tokenizer(args.ckpt)
    sample = tasks.make("lookalike", length, args.first_seed + i, tok, n_questions=8)
    spelled = [spell(tok, sample, question) for question in sample.questions]
    engine.model.rule = as_rule(METHODS[args.method])
    schedules = [{args.boundary: max(int(len(ids) * args.shares[0]), 2 * args.block_len)} for ids, _ in spelled]
    afresh = sum(ask(engine, ids, answer, schedule) for (ids, answer), schedule in list(zip(spelled, schedules))[1:])
    ask(engine, *spelled[0], schedules[-1])
    later, first, seconds = 0, engine.prefill_s, []
    for question, (_, answer) in list(zip(sample.questions, spelled))[1:]:
        start = time.perf_counter()
        logits = engine.extend(tok.encode("question: " + question.text))
        seconds.append(time.perf_counter() - start)
        later += goes_on(engine, logits, answer)
    return afresh, later, engine.stats["revived"], first, seconds


def questions(args):
    """Eight questions on a document: as follow-ups of one conversation, and each with a prefill of its own."""
    yield ["tokens", "asked afresh", "as a follow-up"]
    n = max(1, args.questions // 7)
    for length in args.lengths:
        afresh, later, revived, first, seconds = zip(*each(args, partial(conversation, args, length), n))
        ratio = median(f / s for f, each_s in zip(first, seconds) for s in each_s)
        args.notes.append(
            f"{length:,} tokens: {sum(revived)} blocks revived in {n} conversations; "
            f"first token of a prefill {median(first):.3f} s, "
            f"of a follow-up {median(sum(seconds, [])):.3f} s, median ratio {ratio:.1f}"
        )
        print(args.notes[-1], file=sys.stderr)
        yield [f"{length:,}", sum(afresh) / (7 * n), sum(later) / (7 * n)]


EXPERIMENTS = {
    "main": main_table,
    "lengths": lengths,
    "boundary": boundary,
    "settings": settings,
    "rules": rules,
    "diffusion": diffusion,
    "depth": depth,
    "questions": questions,
}
FIRST_SEED = {"questions": 10**6, "rules": 2 * 10**6}  # above --seed-base

# ---- command line -----------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"quality: error: {' '.join(str(message).split())}\n")


def numbers(kind: type, least):
    """Return an argparse type: numbers with commas between them, each at least `least`."""

    def read(text: str) -> list:
        try:
            values = [kind(part) for part in text.split(",")]
        except ValueError:
            values = []
        if not values or not all(least <= value < float("inf") for value in values):
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 4,8, each at least {least}")
        return values

    return read


def kinds(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in tasks.KINDS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is unknown; there are {', '.join(tasks.KINDS)}")
    return names


def parse_args() -> tuple[Parser, argparse.Namespace]:
    p = Parser(
        prog="quality.py",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("experiment", choices=EXPERIMENTS)
    p.add_argument("--ckpt", default=str(ROOT / "demo"))
    p.add_argument("--questions", type=int, default=200, help="a cell")
    p.add_argument("--lengths", type=numbers(int, 64), default="2048", help="prompt tokens")
    p.add_argument("--kinds", type=kinds, default="single,lookalike,latest,two_hop")
    p.add_argument(
        "--shares", type=numbers(float, 1), default="4,8,16", help="budgets, as one over the share of the prompt"
    )
    p.add_argument("--boundary", type=int, default=4)
    p.add_argument("--method", choices=METHODS, default="peak", help="of boundary, settings, depth and questions")
    p.add_argument("--block-len", type=int, default=16)
    p.add_argument("--unit-len", type=int, default=8)
    p.add_argument("--gamma", type=float, default=0.9)
    p.add_argument(
        "--seed-base", type=int, default=10**6, help="number of the first document; another gives fresh ones"
    )
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="float32")
    p.add_argument("--workers", type=int, default=1, help="processes that share the questions of a cell")
    p.add_argument("--threads", type=int, default=0, help="of torch in each process; 0 shares them out")
    p.add_argument("--out", help="write the figures as JSON, after every row")
    args = p.parse_args()
    for name, least in (("questions", 1), ("workers", 1), ("threads", 0), ("seed_base", 0)):
        if getattr(args, name) < least:
            p.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least {least}")
    if args.out and (Path(args.out).is_dir() or not Path(args.out).absolute().parent.is_dir()):
        p.error(f"--out {args.out!r} cannot be written: it is a folder, or its folder does not exist")
    args.shares, args.notes = [1 / n for n in args.shares], []
    args.threads = args.threads or max(1, torch.get_num_threads() // args.workers)
    args.first_seed = args.seed_base + FIRST_SEED.get(args.experiment, 0)
    return p, args


def main() -> None:
    p, args = parse_args()
    torch.set_num_threads(args.threads)
    try:
        table = EXPERIMENTS[args.experiment](args)
        head, rows = next(table), []
        for row in table:
            rows.append(row)
            print(line(row), file=sys.stderr, flush=True)
            if args.out:
                Path(args.out).write_text(
                    json.dumps(
                        {
                            **vars(args),
                            "ckpt": Path(args.ckpt).name,
                            "machine": platform.machine(),
                            "torch": torch.__version__,
                            "head": head,
                            "rows": rows,
                        },
                        indent=1,
                    )
                    + "\n"
                )
    except (ValueError, OSError) as error:
        p.error(error)
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|", *map(line, rows), sep="\n")


def line(row: list) -> str:
    return f"| {row[0]} | " + " | ".join(f"{100 * figure:.1f}" for figure in row[1:]) + " |"


if __name__ == "__main__":
    main()
