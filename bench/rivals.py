"""The ways to answer that bench/accuracy.py compares: Slim, other schedules, other methods.

Rivals choose as their authors define it, at the FLOPs of the default. They prune tokens
where Slim prunes blocks. SnapKV and OmniKV select after a dense prefill; here they choose at the
boundaries.
"""

import dataclasses
import math
from bisect import bisect, bisect_left
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import prune
from model import FULL, Local
from planning.checkpoint import Checkpoint
from planning.flops import prefill_flops
from planning.probe import strength_below
from planning.schedule import at_depth, auto_schedule
from planning.settings import LOCAL_WINDOW

Schedule = Callable[[Checkpoint, int], dict]  # (model, prompt tokens) -> {boundary: budget}

# ---- schedules ---------------------------------------------------------------------------


def dense(ckpt: Checkpoint, n_prompt: int) -> dict:
    return {}


def auto(ckpt: Checkpoint, n_prompt: int) -> dict:
    """Return the engine's default for a model without lookup heads, by depth."""
    return auto_schedule(ckpt.config.n_layers)


def by_heads(ckpt: Checkpoint, n_prompt: int) -> dict:
    """Return the engine's default, by the model's lookup heads."""
    return ckpt.with_schedule("auto").schedule


def keep(kept: str) -> Schedule:
    """Return the default's boundary with another share."""

    def schedule(ckpt: Checkpoint, n_prompt: int) -> dict:
        return {next(iter(by_heads(ckpt, n_prompt))): Fraction(kept)}

    return schedule


def at_parts(text: str) -> Schedule:
    """Return a schedule such as "1/16:1/4 2/3:1/8", by parts of the heads' total strength."""

    def schedule(ckpt: Checkpoint, n_prompt: int) -> dict:
        below = strength_below(ckpt.strengths)
        cuts = {}
        for pair in text.split():
            part, share = pair.split(":")
            cuts[1 + bisect_left(below, Fraction(part) * below[-1])] = Fraction(share)
        return cuts

    return schedule


def of_30_layers(text: str) -> Schedule:
    """Return a schedule such as "9:1/4 19:1/8", of 30 layers, for models of any depth."""
    pairs = [part.split(":") for part in text.split()]

    def schedule(ckpt: Checkpoint, n_prompt: int) -> dict:
        return {at_depth(ckpt.config.n_layers, int(p), 30): Fraction(share) for p, share in pairs}

    return schedule


def at_least(n_blocks: int) -> Schedule:
    """Return the default with another floor; its own is 16 blocks, 1,024 tokens."""

    def schedule(ckpt: Checkpoint, n_prompt: int) -> dict:
        shares = by_heads(ckpt, n_prompt)
        return {p: max(64 * n_blocks, int(prune.share(n) * n_prompt)) for p, n in shares.items()}

    return schedule


def at_equal_flops(boundary: int) -> Schedule:
    """Return a schedule with one boundary (of 30 layers) that costs what the default does."""

    def schedule(ckpt: Checkpoint, n_prompt: int) -> dict:
        layer = at_depth(ckpt.config.n_layers, boundary, 30)

        def cost(kept: int) -> float:
            return prefill_flops(ckpt.config, n_prompt, {layer: kept}, 1)

        goal = prefill_flops(ckpt.config, n_prompt, auto(ckpt, n_prompt))
        return {layer: bisect(range(n_prompt), goal, key=cost) - 1}

    return schedule


# ---- rules: queries (W, H, D), keys (N, B, G, D), blocks (N,), unit_len -> (N,) ------------


def token_weights(queries: Tensor, keys: Tensor) -> Tensor:
    """Return softmax weights (W, H, N*B) on all tokens, unmasked: all of them came before."""
    w, h, d = queries.shape
    g = keys.shape[2]
    keys = keys.float().flatten(0, 1).permute(1, 2, 0)  # (G, D, N*B)
    groups = queries.float().view(w, g, h // g, d)  # (W, G, H/G, D)
    weights = (groups @ keys / d**0.5).softmax(-1)  # (W, G, H/G, N*B)
    return weights.flatten(1, 2)


def pooled(scores: Tensor, width: int, pool: Callable) -> Tensor:
    """Pool scores (N,) with their neighbours."""
    return pool(scores[None, None], width, stride=1, padding=width // 2)[0, 0]


def keep_newest(scores: Tensor, n: int) -> Tensor:
    """Let the n newest tokens win, whatever their scores."""
    scores[-n:] = math.inf
    return scores


def summed(queries, keys, blocks, unit_len):
    """Attention summed over a block's tokens, mean over heads and queries."""
    return token_weights(queries, keys).mean((0, 1)).view(len(blocks), -1).sum(1)


def snapkv(queries, keys, blocks, unit_len):
    """Sum over the last 64 queries and the heads, average pool of 5; the window stays."""
    sums = token_weights(queries, keys).sum((0, 1))
    return keep_newest(pooled(sums, 5, F.avg_pool1d), 64)


def fastkv(queries, keys, blocks, unit_len):
    """Sum over the last 8 queries and the heads, max pool of 7; the window stays."""
    sums = token_weights(queries, keys).sum((0, 1))
    return keep_newest(pooled(sums, 7, F.max_pool1d), 8)


def lazyllm(queries, keys, blocks, unit_len):
    """The last query's attention, mean over heads."""
    return token_weights(queries[-1:], keys).mean((0, 1))


def omnikv(queries, keys, blocks, unit_len):
    """The last query's attention, the strongest head's."""
    return token_weights(queries[-1:], keys).amax((0, 1))


def gemfilter(queries, keys, blocks, unit_len):
    """Products with the last query, summed over heads without a softmax, average pool of 5."""
    keys = keys[:, 0].float()  # (N, G, D)
    query = queries[-1].float().unflatten(0, (keys.shape[1], -1))  # (G, H/G, D)
    products = torch.einsum("grd,ngd->n", query, keys)
    return pooled(products, 5, F.avg_pool1d)


def recent(queries, keys, blocks, unit_len):
    return blocks.float()


def by_chance(queries, keys, blocks, unit_len):
    return torch.rand(len(blocks))


def of_keys(score: Callable) -> prune.Rule:
    return prune.Rule(score.__name__, score, sees="keys")


ORACLE = prune.Rule("oracle", by_chance, sees="keys")  # the bench puts in each question's scores

# ---- sets of entries -----------------------------------------------------------------------


class Entry(NamedTuple):
    """One way to answer."""

    rule: prune.Rule = prune.RULES["peak"]  # of "lookup" the bench puts in the model's heads
    schedule: Schedule = auto
    window: int | None = None  # None: the rule's
    block_len: int = 64
    frozen: bool = False  # choose once, after the prompt, and not again at each token
    local: Local = FULL  # attention of the prompt's rows below the first boundary
    far_heads: bool = True  # and lookup heads see everything there
    second_run: bool = False  # GemFilter: choose tokens, then run them alone


DENSE = Entry(schedule=dense)

LOOKUP = prune.RULES["lookup"]

NEAR = Local(LOCAL_WINDOW, sinks=64)


def lookup_by(score: Callable, **changes) -> prune.Rule:
    """Return the default rule with another score of two results, or other changes."""
    return dataclasses.replace(LOOKUP, score=score, name="lookup, changed", **changes)


def by_weight(weights: Tensor) -> tuple[Tensor, Tensor]:
    return weights.amax((1, 3)), weights[..., -prune.END_LEN :].amax((1, 3))


def by_contrast(weights: Tensor) -> tuple[Tensor, Tensor]:
    best = weights.amax(3).clamp(min=1e-7)
    end = weights[..., -prune.END_LEN :].amax(3).clamp(min=1e-7)
    median = best[..., 1:].median(-1, keepdim=True).values
    return (best / median).log().amax(1), (end / median).log().amax(1)


def without_next(weights: Tensor) -> tuple[Tensor, Tensor]:
    own, of_next = prune.lookup(weights)
    return own, of_next.fill_(-math.inf)


NEWEST_ONLY = Fraction(1, 10**6)  # a share that keeps one block

HEADS = {
    "dense": DENSE,
    "Slim": Entry(LOOKUP, by_heads, local=NEAR),
    "full attention": Entry(LOOKUP, by_heads),
    "keep 1/2": Entry(LOOKUP, keep("1/2"), local=NEAR),
    "keep 3/8": Entry(LOOKUP, keep("3/8"), local=NEAR),
    "keep 1/8": Entry(LOOKUP, keep("1/8"), local=NEAR),
    "two cuts": Entry(LOOKUP, at_parts("1/16:1/4 2/3:1/8"), local=NEAR),
    "late second cut": Entry(LOOKUP, at_parts("1/16:1/4 9/10:1/8"), local=NEAR),
    "earlier cut": Entry(LOOKUP, at_parts("1/32:1/4"), local=NEAR),
    "newest block only": Entry(lookup_by(prune.lookup, recent=NEWEST_ONLY), by_heads, local=NEAR),
    "recent half": Entry(lookup_by(prune.lookup, recent=Fraction(1, 2)), by_heads, local=NEAR),
    "all revivals": Entry(
        lookup_by(prune.lookup, revive_margin=0.0, revive_at_most=None), by_heads, local=NEAR
    ),
    "no margin": Entry(lookup_by(prune.lookup, revive_margin=0.0), by_heads, local=NEAR),
    "weight": Entry(lookup_by(by_weight), by_heads, local=NEAR),
    "contrast": Entry(lookup_by(by_contrast), by_heads, local=NEAR),
    "not the next block": Entry(lookup_by(without_next), by_heads, local=NEAR),
    "window 8": Entry(LOOKUP, by_heads, window=8, local=NEAR),
    "window 64": Entry(LOOKUP, by_heads, window=64, local=NEAR),
    "all heads, peak": Entry(prune.RULES["peak"], by_heads, local=NEAR),
    "recent": Entry(of_keys(recent), by_heads, frozen=True, local=NEAR),
    "SnapKV": Entry(of_keys(snapkv), by_heads, window=64, block_len=1, frozen=True),
    "oracle": Entry(ORACLE, by_heads, frozen=True),
}

RIVALS = {
    "dense": DENSE,
    "Slim": Entry(LOOKUP, by_heads, local=NEAR),
    "Slim, peak": Entry(),
    "Slim, peak, frozen": Entry(frozen=True),
    "paper's rule": Entry(prune.RULES["paper"]),
    "summed attention, frozen": Entry(of_keys(summed), window=4, frozen=True),
    "SnapKV, frozen": Entry(of_keys(snapkv), window=64, block_len=1, frozen=True),
    "FastKV, frozen": Entry(of_keys(fastkv), at_equal_flops(9), window=8, block_len=1, frozen=True),
    "GemFilter, frozen": Entry(
        of_keys(gemfilter),
        of_30_layers("9:1"),
        window=1,
        block_len=1,
        frozen=True,
        second_run=True,
    ),
    "LazyLLM": Entry(of_keys(lazyllm), window=1, block_len=1),
    "OmniKV, frozen": Entry(of_keys(omnikv), window=1, block_len=1, frozen=True),
    "recent, frozen": Entry(of_keys(recent), frozen=True),
    "random, frozen": Entry(of_keys(by_chance), frozen=True),
    "oracle, frozen": Entry(ORACLE, frozen=True),
}

LOCAL = {
    "dense": DENSE,
    "full attention": Entry(LOOKUP, by_heads),
    "window 256": Entry(LOOKUP, by_heads, local=Local(256, 64)),
    "window 512": Entry(LOOKUP, by_heads, local=Local(512, 64)),
    "window 1024": Entry(LOOKUP, by_heads, local=Local(1024, 64)),
    "window 256, all heads": Entry(LOOKUP, by_heads, local=Local(256, 64), far_heads=False),
    "window 512, no sinks": Entry(LOOKUP, by_heads, local=Local(512, 0)),
    "window 512, last 256": Entry(LOOKUP, by_heads, local=Local(512, 64, last=256)),
}

FLOORS = {f"at least {n} blocks": Entry(LOOKUP, at_least(n), local=NEAR) for n in (6, 8, 12, 16)}

SCHEDULES = {
    text: Entry(schedule=of_30_layers(text))
    for text in (
        "9:1/4 19:1/8 28:1/16",
        "9:1/4 15:1/8 21:1/16",
        "9:1/8 19:1/16",
        "9:1/8",
        "12:1/4 19:1/8",
        "7:1/2 9:1/4 19:1/8 28:1/16",
        "5:1/2 9:1/4 19:1/8 28:1/16",
        "3:1/2 9:1/4 19:1/8 28:1/16",
        "5:3/4 9:1/4 19:1/8 28:1/16",
    )
}

SETS = {
    "heads": HEADS,
    "local": LOCAL,
    "rivals": RIVALS,
    "floors": {"dense": DENSE} | FLOORS,
    "schedules": {"dense": DENSE} | SCHEDULES,
}
