"""Does pruning keep the answer? Rules for choosing blocks, compared on a real model and real prose.

    python bench/accuracy.py --text BOOK.txt --set rivals --lengths 4096 --samples 60 --out rivals.jsonl
    python bench/accuracy.py --set rivals --out rivals.jsonl --table       # what is there so far
    python bench/accuracy.py --text BOOK.txt --set choose --part 0 ...     # the texts that nothing is reported on

Every entry of a set answers the same questions about the same documents (bench/prose.py). The answer is
teacher-forced: after the prompt its tokens are fed, whatever the model would have said, and each counts that the model
would have chosen. `frozen` entries choose blocks once, after the prompt, and then take the whole answer at once; the
others go token by token and choose anew at each, as the engine does for a user. A document's dense run, and with it
the layers below an entry's first boundary, is computed once for all its questions. A line of --out is one entry's
result on one question; a second call computes only what is missing.

Rivals stand here as their authors define the choice, at the FLOPs of the paper's schedule. They prune tokens where
Slim prunes blocks; SnapKV and OmniKV select after a dense prefill, so here their choice is made at the boundaries.
"""

import argparse
import json
import math
import os
import sys
import time
from bisect import bisect
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
import prose

import prune
import slim
from kvcache import KVCache
from model import attention_weights
from planning.flops import prefill_flops
from planning.schedule import at_depth, auto_schedule, format_schedule

SHORTEST = 1024  # tokens that the questions and a text between them take
MOST_QUERIES = 64  # kept of the dense run: the widest window of any rule, and the longest answer


class Entry(NamedTuple):
    """One way to answer; an empty schedule is dense."""

    rule: prune.Rule = prune.RULES["peak"]
    schedule: Callable = lambda bench, n: {}  # (bench, prompt tokens) -> {boundary: budget}
    window: int | None = None  # None: the rule's
    block_len: int = 64
    gamma: float | None = None
    frozen: bool = True
    second_run: bool = False  # GemFilter: choose tokens, then run them alone


# ---- schedules ---------------------------------------------------------------------------


def steps(*pairs):
    """Return a schedule of (boundary of 30 layers, one over the share), for a model of any depth."""
    return lambda bench, n: {
        at_depth(bench.n_layers, p, 30): Fraction(1) / Fraction(s) for p, s in pairs
    }


def AUTO(bench, n):
    """Return the engine's default: the paper's boundaries by depth, shares of the prompt for its budgets."""
    return auto_schedule(bench.n_layers)


def at_least(blocks: int):
    """Return AUTO with another floor than prune.LEAST_BLOCKS."""
    return lambda bench, n: {
        p: max(64 * blocks, int(share * n)) for p, share in AUTO(bench, n).items()
    }


def at_equal_flops(boundary: int):
    """Return a schedule with one boundary (of 30 layers) that costs what AUTO does."""

    def schedule(bench, n):
        goal, layer = bench.flops(AUTO, n), at_depth(bench.n_layers, boundary, 30)
        return {
            layer: bisect(
                range(n), goal, key=lambda kept: prefill_flops(bench.config, n, {layer: kept}, 1)
            )
            - 1
        }

    return schedule


# ---- rules of others: queries (W, H, D), keys (N, B, G, D), blocks (N,) -> (N,) -------------


def token_weights(queries, keys):
    """Return softmax weights (W, H, N*B) of the queries on all candidates' tokens, and no mask: all came before."""
    (w, h, d), (n, b, g, _) = queries.shape, keys.shape
    logits = queries.float().view(w, g, h // g, d).permute(1, 0, 2, 3).reshape(
        g, -1, d
    ) @ keys.float().view(n * b, g, d).permute(1, 2, 0)
    return (logits / d**0.5).softmax(-1).view(g, w, h // g, -1).transpose(0, 1).flatten(1, 2)


def pooled(scores, width, how):  # (N,) -> (N,)
    pool = F.avg_pool1d if how == "mean" else F.max_pool1d
    return pool(scores[None, None], width, stride=1, padding=width // 2)[0, 0]


def newest(scores, n):
    """Keep the n newest tokens whatever their scores."""
    scores[-n:] = math.inf
    return scores


def summed(queries, keys, blocks, unit_len):
    """Attention summed over a block's tokens, mean over heads and queries."""
    return token_weights(queries, keys).mean((0, 1)).view(len(blocks), -1).sum(1)


def snapkv(queries, keys, blocks, unit_len):
    """Sum over the last 64 queries and the heads, average pool of 5; the window stays."""
    return newest(pooled(token_weights(queries, keys).sum((0, 1)), 5, "mean"), 64)


def fastkv(queries, keys, blocks, unit_len):
    """Sum over the last 8 queries and the heads, max pool of 7; the window stays."""
    return newest(pooled(token_weights(queries, keys).sum((0, 1)), 7, "max"), 8)


def lazyllm(queries, keys, blocks, unit_len):
    """The last query's attention, mean over heads."""
    return token_weights(queries[-1:], keys).mean((0, 1))


def omnikv(queries, keys, blocks, unit_len):
    """The last query's attention, the strongest head's."""
    return token_weights(queries[-1:], keys).amax((0, 1))


def gemfilter(queries, keys, blocks, unit_len):
    """Products with the last query, summed over heads without a softmax, average pool of 5."""
    q, k = queries[-1].float(), keys[:, 0].float()  # (H, D), (N, G, D)
    return pooled(torch.einsum("grd,ngd->n", q.view(k.shape[1], -1, k.shape[2]), k), 5, "mean")


def recent(queries, keys, blocks, unit_len):
    return blocks.float()


def by_chance(queries, keys, blocks, unit_len):
    return torch.rand(len(blocks))


def of_keys(score) -> prune.Rule:
    return prune.Rule(score.__name__, score, sees="keys")


ORACLE = prune.Rule(
    "oracle", by_chance, sees="keys"
)  # its scores are made of the dense run of each sample
TOKENS = {"schedule": AUTO, "block_len": 1}

RIVALS = {
    "dense": Entry(),
    "Slim, peak": Entry(schedule=AUTO, frozen=False),
    "Slim, peak, frozen": Entry(schedule=AUTO),
    "Slim, at least 4 blocks": Entry(schedule=at_least(4), frozen=False),
    "Slim, at least 4 blocks, frozen": Entry(schedule=at_least(4)),
    "paper's rule": Entry(prune.RULES["paper"], AUTO, frozen=False),
    "summed attention, frozen": Entry(of_keys(summed), AUTO, window=4),
    "SnapKV, frozen": Entry(of_keys(snapkv), window=64, **TOKENS),
    "FastKV, frozen": Entry(of_keys(fastkv), at_equal_flops(9), window=8, block_len=1),
    "GemFilter, frozen": Entry(
        of_keys(gemfilter), steps((9, 1)), window=1, block_len=1, second_run=True
    ),
    "LazyLLM": Entry(of_keys(lazyllm), window=1, frozen=False, **TOKENS),
    "OmniKV, frozen": Entry(of_keys(omnikv), window=1, **TOKENS),
    "recent, frozen": Entry(of_keys(recent), AUTO),
    "random, frozen": Entry(of_keys(by_chance), AUTO),
    "oracle, frozen": Entry(ORACLE, AUTO),
}


def mean_of_heads(weights):
    """Peak with a mean in place of the maximum over heads."""
    return weights.mean(1).amax(-1)


def sum_of_tokens(weights):
    """Peak with a sum in place of the maximum over a block's tokens."""
    return weights.sum(3).amax(1)


def anew(schedule, **settings) -> Entry:
    return Entry(schedule=schedule, frozen=False, **settings)


def of_weights(score, **settings) -> prune.Rule:
    return prune.Rule(score.__name__, score, **settings)


def at_shares(a, b, c):
    """Return the entries of one point of the curves: the paper's boundaries, with other shares."""
    schedule, shares = steps((9, a), (19, b), (28, c)), f"1/{a} 1/{b} 1/{c}"
    tokens = {"schedule": schedule, "block_len": 1}
    return {
        f"Slim, peak, {shares}": anew(schedule),
        f"paper's rule, {shares}": Entry(prune.RULES["paper"], schedule, frozen=False),
        f"summed attention, frozen, {shares}": Entry(of_keys(summed), schedule, window=4),
        f"SnapKV, frozen, {shares}": Entry(of_keys(snapkv), window=64, **tokens),
        f"random, frozen, {shares}": Entry(of_keys(by_chance), schedule),
        f"oracle, frozen, {shares}": Entry(ORACLE, schedule),
    }


SETS = {
    "rivals": RIVALS,
    "floors": {"dense": Entry()}
    | {f"at least {n} blocks": anew(at_least(n)) for n in (4, 6, 8, 12)},
    "curves": {"dense": Entry(), **at_shares(2, 4, 8), **at_shares(8, 16, 32)},
    "schedules": {
        "dense": Entry(),
        **{
            " ".join(f"{layer}:{Fraction(1) / Fraction(share)}" for layer, share in pairs): anew(
                steps(*pairs)
            )
            for pairs in (
                ((9, 4), (19, 8), (28, 16)),
                ((9, 4), (15, 8), (21, 16)),
                ((9, 8), (19, 16)),
                ((9, 8),),
                ((12, 4), (19, 8)),
                ((7, 2), (9, 4), (19, 8), (28, 16)),
                ((5, 2), (9, 4), (19, 8), (28, 16)),
                ((3, 2), (9, 4), (19, 8), (28, 16)),
                ((5, "4/3"), (9, 4), (19, 8), (28, 16)),
            )
        },
    },
    "ablations": {
        "dense": Entry(),
        "peak": anew(AUTO),
        **{f"window {w}": anew(AUTO, window=w) for w in (1, 4, 8, 16)},
        **{f"blocks of {b}": anew(AUTO, block_len=b) for b in (32, 16)},
        "the boundary's layer alone": anew(AUTO, rule=of_weights(prune.peak, every_layer=False)),
        "mean over heads": anew(AUTO, rule=of_weights(mean_of_heads)),
        "sum over tokens": anew(AUTO, rule=of_weights(sum_of_tokens)),
        "gamma 0.9": anew(AUTO, gamma=0.9),
    },
}


# ---- one sample, every entry ---------------------------------------------------------------


class Record(NamedTuple):
    """Of one step of the dense run: the newest queries by layer, and x above the attention below some boundaries."""

    queries: list[torch.Tensor]
    x: dict[int, torch.Tensor]


class Bench:
    """A model whose layers below a boundary are taken from the dense run."""

    def __init__(self, ckpt: str, device: str, dtype: str, entries: dict):
        self.engine = slim.load(ckpt, device, dtype, schedule="dense")
        self.model, self.config, self.n_layers = (
            self.engine.model,
            self.engine.config,
            self.engine.config.n_layers,
        )
        self.caches: dict = {}
        self.attention, self.ffn = self.model.attention, self.model.ffn
        self.model.attention, self.model.ffn = self.attend, self.feed
        self.wanted = {
            next(iter(schedule)) for e in entries.values() if (schedule := e.schedule(self, 4096))
        }
        self.first, self.recording = 0, None

    def flops(self, schedule: Callable, n: int, block_len: int = 64) -> float:
        return prefill_flops(self.config, n, schedule(self, n), block_len)

    def saving(self, entry: Entry, n: int) -> float:
        """Return how many times fewer FLOPs an entry's first token takes than dense."""
        cost = self.flops(AUTO if entry.second_run else entry.schedule, n, entry.block_len)
        return self.flops(lambda bench, n: {}, n) / cost

    def cache(self, block_len, key=None) -> KVCache:
        c, kv = self.config, self.engine.kv
        if (block_len, key) not in self.caches:
            self.caches[block_len, key] = KVCache(
                c.n_layers, c.n_kv_heads, c.head_dim, c.dim, block_len, kv.dtype, kv.device
            )
        return self.caches[block_len, key]

    # the model's attention and ffn: record them, or put in what was recorded

    def attend(self, layer, x, rows):
        kv = self.model.kv
        if kv.length == 0 and layer < self.first:
            n = len(x)
            kv.slabs[layer][:, :, :n] = self.dense.slabs[layer][:, :, :n]
            if layer == self.first - 1:
                x[:] = torch.cat(
                    [self.record["shared"].x[self.first], self.record["question"].x[self.first]]
                )
            return self.last_queries(layer)[-self.model.window :], None
        queries, weights = self.attention(layer, x, rows)
        if self.recording is not None:
            self.recording.queries.append(queries)
            if layer + 1 in self.recording.x:
                self.recording.x[layer + 1] = x.clone()
        return queries, weights

    def feed(self, layer, x):
        if self.model.kv.length or layer >= self.first - 1:
            self.ffn(layer, x)

    def last_queries(self, layer: int) -> torch.Tensor:
        """Return the dense run's newest queries (w, H, D) after the prompt."""
        parts = [self.record[part].queries[layer] for part in ("shared", "question")]
        return torch.cat(parts)[-MOST_QUERIES:]

    def dense_step(self, part: str, ids: list[int], n_logits: int = 1) -> torch.Tensor:
        self.record[part] = self.recording = Record([], dict.fromkeys(self.wanted))
        logits = self.model.step(torch.tensor(ids), n_logits) if ids else self.logits
        if not ids:  # the question is the text itself
            nothing, layers = self.record["shared"], range(self.n_layers)
            self.record[part] = Record(
                [nothing.queries[i][:0] for i in layers], {i: x[:0] for i, x in nothing.x.items()}
            )
        self.recording = None
        return logits

    def read_document(self, shared: list[int], room: int) -> None:
        """Run what all prompts of a document begin with, without pruning, and keep what others go on from."""
        self.model.kv = self.dense = self.cache(64, "dense")
        self.model.window, self.first, self.record = MOST_QUERIES, 0, {}
        self.dense.reset(len(shared), {}, room)
        self.logits = self.dense_step("shared", shared)

    def run_dense(self, prompt: list[int], answer: list[int]) -> torch.Tensor:
        """Answer one question without pruning; return the logits (answer tokens, V)."""
        self.model.kv, self.model.window, self.first = self.dense, MOST_QUERIES, 0
        self.dense.rewind(self.dense.n_prompt)
        logits = [self.dense_step("question", prompt[self.dense.length :])]
        logits.append(self.dense_step("answer", answer[:-1], len(answer) - 1))
        return torch.cat(logits)

    def oracle(self, n: int) -> torch.Tensor:
        """Return (n,): the strongest weight that a row which names an answer's token casts on each prompt token."""
        best = torch.zeros(n)
        for layer in range(self.n_layers * 9 // 30, self.n_layers):
            rows = torch.cat([self.last_queries(layer)[-1:], self.record["answer"].queries[layer]])
            for i, row in enumerate(rows):
                keys, _ = self.dense.read(layer, n + i)
                best = torch.maximum(
                    best, attention_weights(row[None], keys)[0, :, :n].amax(0).float().cpu()
                )
        return best

    def run(
        self, entry: Entry, prompt: list[int], answer: list[int], oracle: torch.Tensor
    ) -> torch.Tensor:
        """Answer as an entry does; return the logits (answer tokens, V)."""
        n, b = len(prompt), entry.block_len
        schedule, rule = entry.schedule(self, n), entry.rule
        if rule is ORACLE:
            scores = F.pad(oracle, (0, -n % b)).view(-1, b).amax(1)
            rule = of_keys(lambda queries, keys, blocks, unit_len: scores[blocks.cpu()])
        if entry.second_run:
            layer = next(iter(schedule)) - 1
            keys, _ = self.dense.read(layer, n)
            k = self.second_run_tokens(layer + 1, n)
            best = (
                rule.score(self.last_queries(layer)[-1:], keys[:, None], None, 1)
                .topk(k)
                .indices.sort()
                .values
            )
            prompt, schedule = [prompt[i] for i in best.tolist()], {}
        self.model.kv = kv = self.cache(b)
        self.model.rule, self.model.window = rule, entry.window or entry.rule.window
        gamma = entry.rule.gamma if entry.gamma is None else entry.gamma
        self.model.gamma = 0.0 if entry.frozen else gamma
        self.model.unit_len = min(8, b)
        kv.reset(len(prompt), schedule, len(answer))
        self.first = kv.stages[0].layers[-1] + 1 if len(kv.stages) > 1 else 0
        fed, logits = torch.tensor(answer[:-1]), [self.model.step(torch.tensor(prompt))]
        if entry.frozen:
            logits.append(self.model.step(fed, len(fed)))
        else:
            logits += [self.model.step(token[None]) for token in fed]
        return torch.cat(logits)

    def second_run_tokens(self, layers: int, n: int) -> int:
        """Return how many tokens a second run may have that starts anew after `layers` layers of a first, at
        AUTO's FLOPs.
        """
        left = self.flops(AUTO, n) - prefill_flops(self.config, n, {}, 1) * layers / self.n_layers
        return bisect(range(1, n), left, key=lambda k: prefill_flops(self.config, k, {}, 1))


def measure(logits: torch.Tensor, answer: list[int]) -> dict:
    truth, logits = torch.tensor(answer), logits.cpu()
    right = logits.argmax(-1) == truth
    return {
        "nll": F.cross_entropy(logits.float(), truth).item(),
        "right": right.float().mean().item(),
        "whole": right.all().item(),
    }


# ---- results: a line each --------------------------------------------------------------------


def read_results(path: Path) -> dict:
    """Return {(task, n, part, seed, entry): result} of a file that may not be there yet."""
    if not path.is_file():
        return {}
    rows = [
        json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")
    ]  # one may be cut
    return {(r["task"], r["n"], r["part"], r["seed"], r["entry"]): r for r in rows}


def read_all(paths: str) -> dict:
    """Return the results of files with commas between."""
    return {key: r for path in paths.split(",") for key, r in read_results(Path(path)).items()}


def error(values: list[float]) -> float:
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan


def tables(results: dict, entries: dict, part: int) -> list[str]:
    """Return a Markdown table a length: answer tokens right, whole answers, against dense, with standard errors."""
    lines = []
    for n in sorted({key[1] for key in results if key[2] == part}):
        tasks = [t for t in prose.TASKS if any(key[:3] == (t, n, part) for key in results)]
        rows: dict = {}  # (entry, task) -> [(result, dense's)]
        for key, r in results.items():
            if key[1:3] == (n, part) and (dense := results.get((*key[:4], "dense"))):
                rows.setdefault((key[4], key[0]), []).append((r, dense))
        lines += [
            f"\n{n:,} tokens: answer tokens right, % ± standard error of the difference to dense (whole answers "
            "right, %); continuation: perplexity over dense's\n",
            "| | FLOPs, times fewer | texts | " + " | ".join(tasks) + " |",
            "|---" * (len(tasks) + 3) + "|",
        ]
        for name in entries:
            pairs = {t: rows.get((name, t), []) for t in tasks}
            if not any(pairs.values()):
                continue
            cells = []
            for t, both in pairs.items():
                if not both:
                    cells.append("")
                elif t == "continuation":
                    gap = [r["nll"] - d["nll"] for r, d in both]
                    cells.append(f"{math.exp(mean(gap)):.3f} ± {error(gap):.3f}")
                else:
                    right, gap = (
                        mean(r["right"] for r, _ in both),
                        error([r["right"] - d["right"] for r, d in both]),
                    )
                    whole = mean(r["whole"] for r, _ in both)
                    cells.append(f"{100 * right:.1f} ± {100 * gap:.1f} ({100 * whole:.0f})")
            ratio = mean(r["flops"] for both in pairs.values() for r, _ in both)
            lines.append(
                f"| {name} | {ratio:.2f} | {max(map(len, pairs.values()))} | "
                + " | ".join(cells)
                + " |"
            )
    return lines


def plot(path: str, results: dict, n: int) -> None:
    """Draw answer tokens right less dense's on the same texts, mean over the tasks, against FLOPs."""
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(8.5, 4.5))
    labels: list[tuple[float, float, bool]] = []
    ax.axhline(0, color="#222222", lw=1)
    points = []
    for name in dict.fromkeys(key[4] for key in results if key[1] == n and key[4] != "dense"):
        rows = {
            key: r
            for key, r in results.items()
            if key[1] == n and key[4] == name and key[0] != "continuation"
        }
        gaps: dict = {}
        for key, r in rows.items():
            gaps.setdefault(key[2:4], []).append(
                100 * (r["right"] - results[(*key[:4], "dense")]["right"])
            )
        means = [mean(gap) for gap in gaps.values()]
        points.append((mean(means), mean(r["flops"] for r in rows.values()), error(means), name))
    for y, x, spread, name in sorted(points):
        ours = "#C0392B" if name.startswith("Slim") else "#E59866" if ":" in name else "#2E86C1"
        ax.errorbar(x, y, yerr=spread, fmt="o", ms=5, color=ours, elinewidth=1)
        left = RIVALS.get(name, Entry()).block_len == 1
        while any(abs(x - a) < 0.12 and side == left and y - b < 2.0 for a, b, side in labels):
            y += 0.1  # labels do not lie on each other
        labels.append((x, y, left))
        ax.text(
            x + (-0.02 if left else 0.02),
            y,
            name,
            fontsize=7,
            color=ours,
            va="center",
            ha="right" if left else "left",
        )
    ax.set(
        xlabel="FLOPs of the first token, times fewer",
        ylabel="answer tokens right, points over dense",
    )
    ax.set(title=f"{n:,} tokens, mean of six tasks", xlim=(2.1, 4.7))
    ax.grid(color="#E6E6E6")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def run(args, entries: dict) -> dict:
    out, results = Path(args.out), read_results(Path(args.out))
    bench = Bench(args.ckpt, args.device, args.dtype, entries)
    book = prose.Book(
        Path(args.text).read_text(encoding="utf-8"), bench.engine.tokenizer, args.part
    )
    with out.open("a") as file, torch.inference_mode():
        if not (out.read_bytes() or b"\n").endswith(b"\n"):
            file.write("\n")  # the last line was cut: nothing may be written into it
        for seed, n in (
            (s, n) for s in range(args.first, args.first + args.samples) for n in args.lengths
        ):
            missing = [
                (task, name)
                for task in args.tasks
                for name in entries
                if (task, n, args.part, seed, name) not in results
            ]
            if not missing:
                continue
            started, document = time.perf_counter(), prose.document(book, n, seed)
            bench.read_document(document.shared, 2 * prose.ROOM)
            for task in dict(missing):
                prompt, answer = document.questions[task]
                dense_logits = bench.run_dense(prompt, answer)
                names = [name for other, name in missing if other == task]
                oracle = (
                    bench.oracle(len(prompt))
                    if any(entries[name].rule is ORACLE for name in names)
                    else None
                )
                for name in names:
                    torch.manual_seed(seed)
                    logits = (
                        dense_logits
                        if name == "dense"
                        else bench.run(entries[name], prompt, answer, oracle)
                    )
                    row = {"task": task, "n": n, "part": args.part, "seed": seed, "entry": name}
                    row |= {
                        **measure(logits, answer),
                        "flops": bench.saving(entries[name], len(prompt)),
                    }
                    row["schedule"] = format_schedule(entries[name].schedule(bench, len(prompt)))
                    results[task, n, args.part, seed, name] = row
                    file.write(json.dumps(row) + "\n")
                file.flush()
            print(
                f"{n:,} tokens, #{seed}: {time.perf_counter() - started:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    return results


def parse_args() -> argparse.Namespace:
    data = os.environ.get("SLIM_TEST_DATA")
    p = argparse.ArgumentParser(
        prog="accuracy.py",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--ckpt", default="smollm2-135m-instruct")
    p.add_argument(
        "--text", default=data and f"{data}/texts/war_and_peace.txt", help="a long text, UTF-8"
    )
    p.add_argument("--set", choices=SETS, default="rivals")
    p.add_argument(
        "--only", help="entries of the set, with semicolons between: names, or how names begin"
    )
    p.add_argument("--tasks", type=lambda s: s.split(","), default=",".join(prose.TASKS))
    p.add_argument("--lengths", type=lambda s: [int(n) for n in s.split(",")], default="4096")
    p.add_argument(
        "--samples", type=int, default=60, help="documents; each has a question of every task"
    )
    p.add_argument("--first", type=int, default=0, help="number of the first document")
    p.add_argument(
        "--threads",
        type=int,
        default=0,
        help="of torch; two processes with one thread each, and files of their own, finish sooner than one with two",
    )
    p.add_argument(
        "--part",
        type=int,
        choices=(0, 1),
        default=1,
        help="0: texts for choosing, 1: for reporting",
    )
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="float32")
    p.add_argument(
        "--out",
        required=True,
        help="results, a line each; a call computes only what is missing; --table takes several, with commas between",
    )
    p.add_argument(
        "--plot", help="draw all results of the first of --lengths as a PNG; needs matplotlib"
    )
    p.add_argument("--table", action="store_true", help="compute nothing")
    args = p.parse_args()
    if unknown := set(args.tasks) - set(prose.TASKS):
        p.error(f"--tasks {min(unknown)!r} is unknown; there are {', '.join(prose.TASKS)}")
    if args.samples < 1 or args.first < 0 or args.threads < 0 or min(args.lengths) < SHORTEST:
        p.error(
            f"--samples must be at least 1, --first and --threads 0, and each of --lengths {SHORTEST} tokens"
        )
    names = SETS[args.set]
    for word in args.only.split(";") if args.only else ():
        if not any(name.startswith(word) for name in names):
            p.error(f"--only {word!r} is none of the set's entries: {'; '.join(names)}")
    if missing := [path for path in args.out.split(",") if args.table and not Path(path).is_file()]:
        p.error(f"--out {missing[0]} does not exist, so there is nothing for a table")
    if not args.table and not args.text:
        p.error(
            "--text is needed: a long text to make questions of, such as War and Peace from Project Gutenberg"
        )
    return args


def main() -> None:
    args = parse_args()
    entries = SETS[args.set]
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.only:
        words = args.only.split(";")
        begun = tuple(
            word for word in words if word not in entries
        )  # a whole name means itself alone
        entries = {
            k: e
            for k, e in entries.items()
            if k in ("dense", *words) or begun and k.startswith(begun)
        }
    try:
        results = read_all(args.out) if args.table else run(args, entries)
    except (ValueError, OSError) as err:
        print(f"accuracy: error: {err}", file=sys.stderr)
        sys.exit(2)
    print("\n".join(tables(results, entries, args.part)))
    if args.plot:
        plot(args.plot, results, args.lengths[0])


if __name__ == "__main__":
    main()
