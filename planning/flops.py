"""Floating-point operations of a prefill, by the formula of the layers it runs."""

import prune
from model import Config


def layer_flops(c: Config, rows: int, keys: float, ffn_rows: int | None = None) -> float:
    """Return a layer's operations for rows that see `keys` keys on average; ffn_rows: rows of its FFN, if different."""
    projections, ffn = (
        c.dim * (2 * c.n_heads + 2 * c.n_kv_heads) * c.head_dim,
        3 * c.dim * c.hidden_dim,
    )
    ffn_rows = rows if ffn_rows is None else ffn_rows
    return 2 * rows * projections + 2 * ffn_rows * ffn + 4 * rows * keys * c.n_heads * c.head_dim


def prefill_flops(c: Config, n_prompt: int, schedule: dict, block_len: int = 64) -> float:
    """Return the floating-point operations of a prefill: matrices and causal attention, the head once."""
    sizes = prune.stage_blocks(n_prompt, schedule, block_len)
    rows = [n_prompt - (sizes[0] - n) * block_len for n in sizes]
    alive = [
        r for a, b, r in zip([0, *schedule], [*schedule, c.n_layers], rows) for _ in range(a, b)
    ]
    ffn_rows = alive[1:] + alive[-1:]  # the FFN below a boundary runs on its survivors
    return (
        sum(layer_flops(c, n, n / 2, m) for n, m in zip(alive, ffn_rows)) + 2 * c.dim * c.vocab_size
    )
