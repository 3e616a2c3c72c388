"""Which blocks of a prompt stay: the method itself, as pure functions.

SlimInfer (arXiv 2508.06447) rests on *information diffusion*: on its way up the layers, what the
critical tokens know spreads over the whole sequence, so whole blocks of prompt tokens can leave the
hidden states. At a *boundary* the candidate blocks are ranked, and the best within a token budget
stay for the layers above.

Three rules rank them: `lookup`, the default, by the few heads that look things up; `peak`, by all
heads; and `paper`, which is SlimInfer's. A rule of your own is a `Rule`, passed as
`slim.load(..., score=yours)`.

Shapes: W window queries, H heads, G KV heads, D head_dim, N blocks, B block_len.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

# ---- schedules: {boundary: budget} ------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """A share of the prompt, but at least so many tokens."""

    part: Fraction  # within 0..1
    least: int  # tokens


Budget = int | float | Fraction | Share  # tokens, or a share of the prompt within 0..1

SHARED_FROM = 1024  # tokens: a share prunes no shorter prompt, as there is nothing to gain
LEAST_BLOCKS = 8  # that a share keeps: with 4, prompts of 2,048 tokens lost chains of facts


def share(budget: float | Fraction | Share) -> Fraction:
    part = budget.part if isinstance(budget, Share) else budget
    return Fraction(part).limit_denominator(10**6)


def tokens(budget: Budget, n_prompt: int, block_len: int) -> int:
    """Return a budget in tokens.

    A share keeps at least LEAST_BLOCKS blocks, and all of a prompt below SHARED_FROM tokens.
    """
    if type(budget) is int:
        return budget
    if n_prompt < SHARED_FROM:
        return n_prompt
    least = LEAST_BLOCKS * block_len
    if isinstance(budget, Share):
        least = max(least, budget.least)
    return max(least, int(share(budget) * n_prompt))


def stage_blocks(n_prompt: int, schedule: dict[int, Budget], block_len: int) -> list[int]:
    """Return the number of active blocks of every stage, with sink and last block; it is fixed.

    A budget that covers the prompt prunes nothing, even if the prompt's last block is partial.
    """
    size = -(-n_prompt // block_len)
    sizes = [size]
    for budget in schedule.values():
        n = tokens(budget, n_prompt, block_len)
        if n < n_prompt:
            size = min(size, max(2, n // block_len))
        sizes.append(size)
    return sizes


# ---- rules: what a block is worth -------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """How blocks are ranked: a function, and what it is given.

    sees "weights": score(weights (W, H, N, B)) -> (W, N), what each block is worth to each query,
    from the softmax attention weights of one layer. It runs in every layer, and a block's score is
    its maximum over layers and newest queries; a block that a layer does not hold keeps its score
    from the layers below. Without `every_layer` it runs in the boundary's layer alone.

    sees "keys": score(queries (W, H, D), keys (N, B, G, D), blocks (N,), unit_len) -> (N,), from
    the post-RoPE queries and keys of the boundary's layer, and the blocks' numbers.

    sees "lookup": as "weights", of the model's lookup heads alone (planning/probe.py), and score
    returns two results: what a block is worth, and what its end is worth to the next block.

    Higher is kept. window: newest queries that count. gamma: overlap of the new choice with the
    active blocks from which those stay (paper: 0.9); 1 swaps whenever the choice changes. The name
    belongs to a saved conversation; a rule without one cannot be saved.

    recent: the share of a stage's slots that the newest blocks before the tail always have.

    revive_margin: by how much a pruned block must score above the last one chosen to come back.
    revive_at_most: blocks that may come back for each new token, the best first; others wait for
    the next, as long as the window remembers them. Both bound what a token costs.

    heads: per layer the heads it is given; None: all. `Checkpoint` fills them in for `lookup`.

    join: with the heads on several GPUs, "max" joins the scores that each GPU's heads gave; "all"
    gives the function the heads of all GPUs: right for any function, but what it sees must be sent.
    """

    name: str
    score: Callable
    sees: str = "weights"
    every_layer: bool = True
    window: int = 32
    gamma: float = 1.0
    recent: Fraction = Fraction(0)
    revive_margin: float = 0.0
    revive_at_most: int | None = None
    join: str = "all"
    heads: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self):
        if not isinstance(self.name, str):
            raise ValueError(f"a rule's name is {self.name!r:.60}; it must be text")
        rule = f"rule {self.name!r:.60}"
        if not callable(self.score):
            raise ValueError(f"{rule}: score is {self.score!r:.60}; it must be a function")
        if self.sees not in ("weights", "keys", "lookup"):
            known = "'weights', 'keys' or 'lookup'"
            raise ValueError(f"{rule}: sees is {self.sees!r:.60}; it must be {known}")
        if self.sees == "lookup" and self.every_layer is not True:
            raise ValueError(f"{rule}: a rule that sees 'lookup' must look at every layer")
        if type(self.every_layer) is not bool:
            raise ValueError(f"{rule}: every_layer is {self.every_layer!r:.60}; it must be a bool")
        if type(self.window) is not int or not 1 <= self.window <= 2**16:
            raise ValueError(
                f"{rule}: window is {self.window!r}; it must be a whole number in 1..65536"
            )
        if type(self.gamma) not in (int, float) or not 0 <= self.gamma <= 1:
            raise ValueError(f"{rule}: gamma is {self.gamma!r}; it must be an overlap within 0..1")
        if not isinstance(self.recent, (int, float, Fraction)) or not 0 <= self.recent < 1:
            raise ValueError(
                f"{rule}: recent is {self.recent!r:.60}; it must be a share within 0..1"
            )
        if type(self.revive_margin) not in (int, float) or not self.revive_margin >= 0:
            raise ValueError(
                f"{rule}: revive_margin is {self.revive_margin!r}; it must be a number from 0"
            )
        most = self.revive_at_most
        if most is not None and (type(most) is not int or most < 0):
            raise ValueError(
                f"{rule}: revive_at_most is {most!r}; it must be a number of blocks, or None"
            )
        if self.heads is not None and not is_heads(self.heads):
            raise ValueError(
                f"{rule}: heads is {self.heads!r:.60}; it must be a tuple of layers, each "
                "of ascending head numbers"
            )
        if self.join not in ("all", "max"):
            raise ValueError(f"{rule}: join is {self.join!r:.60}; it must be 'all' or 'max'")


def is_heads(heads) -> bool:
    """Return whether this is a tuple of layers, each a tuple of head numbers."""
    if not isinstance(heads, tuple) or not all(isinstance(found, tuple) for found in heads):
        return False
    if not all(type(head) is int and head >= 0 for found in heads for head in found):
        return False
    return all(list(found) == sorted(set(found)) for found in heads)


def peak(weights: Tensor) -> Tensor:
    """Return each query's strongest weight (W, H, N, B) on a token of each block: (W, N).

    A maximum keeps the signal of the few heads that retrieve; a mean over heads, queries or tokens
    dilutes it. It is also the same, bit for bit, in any order of heads, layers and devices.
    """
    return weights.amax((1, 3))


END_LEN = 16  # a match among a block's last 16 tokens counts for the following block too


def lookup(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Score blocks by the weights (W, H, N, B) of lookup heads: (own, of_next), each (W, N).

    of_next: what a block's end finds for the next block. A copy runs on into it, where nothing has
    looked yet. In one row, weight alone underrates a match that several blocks share, and contrast,
    the ratio to the median block's weight, overrates rows that look at nothing here. So the score
    is half way: (log weight + log contrast) / 2, up to a factor log weight - log median / 2. A
    maximum over heads, so the same in any order. 1e-7: less is no weight in float32.
    """
    best = weights.amax(3).clamp(min=1e-7).log()  # (W, H, N)
    end = weights[..., -END_LEN:].amax(3).clamp(min=1e-7).log()
    median = best[..., 1:].median(-1, keepdim=True).values  # without slot 0, which holds the sink
    return (best - median / 2).amax(1), (end - median / 2).amax(1)


def recent_blocks(rule: Rule, n_slots: int) -> int:
    """Return how many of the newest blocks a stage keeps, whatever their scores."""
    return max(1, int(rule.recent * n_slots)) if rule.recent else 0


def unit_keys(keys: Tensor, unit_len: int) -> Tensor:
    """Average the post-RoPE keys (N, B, G, D) of every unit: (N, U, G, D), in at least float32."""
    wide = torch.promote_types(keys.dtype, torch.float32)
    return keys.unflatten(1, (-1, unit_len)).mean(2, dtype=wide)


def paper(queries: Tensor, keys: Tensor, blocks: Tensor, unit_len: int) -> Tensor:
    """Score blocks as SlimInfer does: max over units of mean over heads of |mean query . unit key|.

    queries: (W, H, D) and keys: (N, B, G, D) after RoPE; blocks: (N,) their numbers, unused here.
    Returns (N,).
    """
    units = unit_keys(keys, unit_len)  # (N, U, G, D)
    n_blocks, n_units, n_kv_heads, head_dim = units.shape
    query = queries.to(units.dtype).mean(0).view(n_kv_heads, -1, head_dim)  # (G, H/G, D)
    units = units.flatten(0, 1).permute(1, 2, 0)  # (G, D, N*U)
    dots = (query @ units).abs().mean((0, 1))  # (N*U,)
    return dots.view(n_blocks, n_units).amax(1)  # (N,)


RULES = {
    "lookup": Rule(
        "lookup",
        lookup,
        sees="lookup",
        recent=Fraction(1, 4),
        revive_margin=math.log(2),
        revive_at_most=1,
        join="max",
    ),
    "peak": Rule("peak", peak, join="max"),
    "paper": Rule("paper", paper, sees="keys", window=4, gamma=0.9),
}


# ---- selection --------------------------------------------------------------------------


def check_scores(scores, n_blocks: int) -> Tensor:
    """Return a rule's scores (N,) on the CPU; reading them is the one time a step waits for a GPU.

    Raises ValueError for scores of another shape or not a number.
    """
    right = isinstance(scores, Tensor) and scores.is_floating_point()
    if not right or scores.shape != (n_blocks,):
        raise ValueError(
            f"the scoring function returned {scores!r:.60}; it must return {(n_blocks,)} float "
            "scores"
        )
    scores = scores.cpu()
    n_nan = int(scores.isnan().sum())
    if n_nan:
        raise ValueError(
            f"the scores of {n_nan} of {n_blocks} blocks are NaN: the weights are bad, the scoring "
            "function is, or --dtype is too narrow"
        )
    return scores


def select(
    scores: Tensor, blocks: list[int], k: int, lacking: Tensor | None = None, rule=None, n_new=1
) -> list[int]:
    """Return the k best of `blocks`, ascending; the sink is always one; ties to the lower block.

    scores: (N,), in the blocks' order. lacking: (N,) the blocks that would have to be revived, of
    which a rule lets few come back for n_new tokens; None: no block would.
    """
    in_order, order = torch.tensor(blocks).sort()  # slots hold blocks in any order; now sink first
    scores = scores[order]
    scores[0] = torch.inf
    ranked = scores.argsort(descending=True, stable=True)
    if lacking is not None:
        held = held_back(scores, lacking[order], scores[ranked[k - 1]], rule, n_new)
        ranked = ranked[held[ranked].int().argsort(stable=True)]  # they come last
    return sorted(in_order[ranked[:k]].tolist())


def held_back(scores: Tensor, lacking: Tensor, last: Tensor, rule: Rule, n_new: int) -> Tensor:
    """Return (N,) which of the lacking blocks may not come back now; last: the k-th best score."""
    held = lacking & (scores < last + rule.revive_margin)
    if rule.revive_at_most is not None:
        ranked = scores.masked_fill(~lacking, -torch.inf).argsort(descending=True, stable=True)
        too_many = ranked[rule.revive_at_most * n_new :]
        held[too_many] = lacking[too_many]
    return held


def overlap(new: set[int], active: set[int]) -> float:
    """Return the share of the new choice that is active already (paper: swap only below gamma)."""
    return len(new & active) / len(new)
