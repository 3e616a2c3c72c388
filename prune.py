"""Which blocks of a prompt stay: the method itself, as pure functions.

SlimInfer (arXiv 2508.06447) rests on *information diffusion*: on its way up the layers,
what the critical tokens know spreads over the whole sequence, so whole blocks of prompt
tokens can leave the hidden states. At a *boundary* every block is scored by the newest
queries against the mean keys of its units, and the best blocks within a token budget
stay for the layers above.

Nothing here has state or knows a device. A method of your own is one function with the
signature of `block_scores`, handed to `slim.load(..., score=yours)`.

Shapes: W window queries, H heads, G KV heads, D head_dim, N candidate blocks, B block_len.
"""

import torch
from torch import Tensor

# {boundary: token budget} for 32 layers (paper); Qwen2's budgets are its own.
FRACTIONS = (10, 20, 30)  # boundaries, in 32nds of the depth
BUDGETS = {"llama": (8192, 4096, 2048), "qwen2": (12288, 6144, 4096)}


def default_schedule(n_layers: int, model_type: str = "llama") -> dict[int, int]:
    """Return {boundary: token budget} for a depth: the paper's for 32 layers (Llama) and 28 (Qwen2).

    Boundaries that rounding pushes out of 1..n_layers-1, or onto an earlier one, are dropped.
    """
    schedule: dict[int, int] = {}
    for fraction, budget in zip(FRACTIONS, BUDGETS[model_type]):
        boundary = int(n_layers * fraction / 32 + 0.5)  # round half up
        if 1 <= boundary < n_layers:
            schedule.setdefault(boundary, budget)
    return schedule


def parse_schedule(text: str) -> dict[int, int] | str:
    """Read '10:8192,20:4096' as {10: 8192, 20: 4096}; 'auto' and 'dense' pass through."""
    if text in ("auto", "dense"):
        return text
    try:
        pairs = [tuple(int(n) for n in part.split(":")) for part in text.split(",")]
        layers = [layer for layer, _ in pairs]
    except ValueError:
        raise ValueError(f"--schedule {text!r} is not of the form LAYER:TOKENS,LAYER:TOKENS, as in 10:8192,20:4096") from None
    check_increasing(layers)  # before a dict would hide a boundary given twice
    return dict(pairs)


def check_increasing(layers: list[int]) -> None:
    if any(b <= a for a, b in zip(layers, layers[1:])):
        raise ValueError(f"schedule boundaries {layers} do not increase; give them in ascending layer order, each once")


def check_schedule(schedule: dict[int, int], n_layers: int, block_len: int) -> None:
    """Raise ValueError unless boundaries rise within 1..n_layers-1 and budgets fall, each at least 2 blocks."""
    layers, budgets = list(schedule), list(schedule.values())
    if not all(type(n) is int for n in layers + budgets):
        raise ValueError(f"schedule {schedule} must map whole layer numbers to whole token budgets")
    check_increasing(layers)
    for layer, budget in schedule.items():
        if not 1 <= layer < n_layers:
            raise ValueError(f"schedule boundary {layer} is outside 1..{n_layers - 1}, the boundaries of a {n_layers}-layer model")
        if budget < 2 * block_len:
            raise ValueError(f"schedule budget {budget} at layer {layer} is below 2 blocks = {2 * block_len} tokens; raise it or lower --block-len")
    if any(b >= a for a, b in zip(budgets, budgets[1:])):
        raise ValueError(f"schedule budgets {budgets} do not decrease; a later boundary must keep fewer tokens")


def stage_blocks(n_prompt: int, schedule: dict[int, int], block_len: int) -> list[int]:
    """Return the number of active blocks of every stage, sink and last block counted; it never changes later.

    A budget that covers the prompt prunes nothing, even if the prompt's last block is partial.
    """
    sizes = [-(-n_prompt // block_len)]
    for budget in schedule.values():
        sizes.append(sizes[-1] if budget >= n_prompt else min(sizes[-1], max(2, budget // block_len)))
    return sizes


def unit_keys(keys: Tensor, unit_len: int) -> Tensor:
    """Average the post-RoPE keys (N, B, G, D) of every unit: (N, B / unit_len, G, D), in at least float32."""
    n, block_len, g, d = keys.shape
    dtype = torch.promote_types(keys.dtype, torch.float32)
    return keys.view(n, block_len // unit_len, unit_len, g, d).mean(2, dtype=dtype)  # (N, U, G, D)


def block_scores(queries: Tensor, keys: Tensor, blocks: Tensor, unit_len: int) -> Tensor:
    """Score candidate blocks: max over units of the mean over heads of |mean query . unit key| (paper).

    queries: (W, H, D) newest post-RoPE queries; keys: (N, B, G, D) post-RoPE keys of the
    candidates; blocks: (N,) their block numbers (unused here, for methods that go by
    place). Returns (N,) scores, higher is kept.
    """
    units = unit_keys(keys, unit_len)  # (N, U, G, D)
    n, u, g, d = units.shape
    query = queries.to(units.dtype).mean(0).view(g, -1, d)  # (G, H/G, D)
    dots = query @ units.view(n * u, g, d).permute(1, 2, 0)  # (G, H/G, N*U)
    return dots.abs().mean((0, 1)).view(n, u).amax(1)  # (N,)


def select(scores: Tensor, blocks: list[int], k: int) -> list[int]:
    """Return the k best of `blocks`, ascending; block 0 (the attention sink) always, ties to the lower block.

    scores: (N,) of any device; reading them here is the one time a step waits for the device.
    Raises ValueError for scores of another shape or not a number.
    """
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        raise ValueError(f"the scoring function returned {scores!r:.60}; it must return a tensor of floating-point scores")
    scores = scores.cpu()
    if scores.shape != (len(blocks),) or scores.isnan().any():
        raise ValueError(f"the scoring function returned {scores}; it must return ({len(blocks)},) scores, none of them NaN")
    blocks, order = torch.tensor(blocks).sort()  # slots hold blocks in any order; the sink comes first
    scores = scores[order]
    scores[0] = torch.inf
    best = scores.argsort(descending=True, stable=True)[:k]
    return sorted(blocks[best].tolist())


def overlap(new: set[int], active: set[int]) -> float:
    """Return the share of the new selection that is active already (paper: swap only below gamma)."""
    return len(new & active) / len(new)
