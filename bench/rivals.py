"""The ways to answer that bench/accuracy.py compares: Slim, other schedules, other methods.

Rivals choose as their authors define it, at the FLOPs of the paper's schedule. They prune tokens
where Slim prunes blocks. SnapKV and OmniKV select after a dense prefill; here they choose at the
boundaries.
"""

import math
from bisect import bisect
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
from planning.schedule import at_depth, auto_schedule

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


def at_layers(*shares: str) -> Schedule:
    """Return the default's boundaries with other shares; "0" leaves a boundary out."""

    def schedule(ckpt: Checkpoint, n_prompt: int) -> dict:
        found = by_heads(ckpt, n_prompt)
        cuts = {layer: Fraction(share) for layer, share in zip(found, shares)}
        return {layer: share for layer, share in cuts.items() if share}

    return schedule


def of_30_layers(text: str) -> Schedule:
    """Return a schedule such as "9:1/4 19:1/8", of 30 layers, for models of any depth."""
    pairs = [part.split(":") for part in text.split()]

    def schedule(ckpt: Checkpoint, n_prompt: int) -> dict:
        return {at_depth(ckpt.config.n_layers, int(p), 30): Fraction(share) for p, share in pairs}

    return schedule


def at_least(n_blocks: int) -> Schedule:
    """Return the default with another floor than prune.LEAST_BLOCKS."""

    def schedule(ckpt: Checkpoint, n_prompt: int) -> dict:
        shares = auto(ckpt, n_prompt)
        return {p: max(64 * n_blocks, int(share * n_prompt)) for p, share in shares.items()}

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
    second_run: bool = False  # GemFilter: choose tokens, then run them alone


DENSE = Entry(schedule=dense)

LOOKUP = prune.RULES["lookup"]

HEADS = {
    "dense": DENSE,
    "Slim": Entry(LOOKUP, by_heads),
    "Slim, one cut": Entry(LOOKUP, at_layers("1/4")),
    "Slim, deeper": Entry(LOOKUP, at_layers("1/8", "1/16")),
    "Slim, peak": Entry(),
    "peak at the same layers": Entry(prune.RULES["peak"], by_heads),
    "lookup at the paper's layers": Entry(LOOKUP, auto),
}

RIVALS = {
    "dense": DENSE,
    "Slim": Entry(LOOKUP, by_heads),
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
    "window 512, no sinks": Entry(LOOKUP, by_heads, local=Local(512, 0)),
    "window 512, last 256": Entry(LOOKUP, by_heads, local=Local(512, 64, last=256)),
}

FLOORS = {f"at least {n} blocks": Entry(schedule=at_least(n)) for n in (4, 6, 8, 12)}

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
