"""Floating-point operations of a prefill, by the formula of the layers it runs."""

import prune
from model import Config


def layer_flops(config: Config, rows: int, keys: float, ffn_rows: int | None = None) -> float:
    """Return a layer's operations for rows that see `keys` keys on average.

    ffn_rows: rows of its feed-forward, if different.
    """
    heads = 2 * config.n_heads + 2 * config.n_kv_heads  # of q and the output, of k and v
    projections = config.dim * heads * config.head_dim
    ffn = 3 * config.dim * config.hidden_dim
    attention = 2 * keys * config.n_heads * config.head_dim
    ffn_rows = rows if ffn_rows is None else ffn_rows
    return 2 * rows * (projections + attention) + 2 * ffn_rows * ffn


def prefill_flops(config: Config, n_prompt: int, schedule: dict, block_len: int = 64) -> float:
    """Return the floating-point operations of a prefill: every layer, and the head once."""
    sizes = prune.stage_blocks(n_prompt, schedule, block_len)
    rows_of = {0: n_prompt}  # from this layer on
    for boundary, size in zip(schedule, sizes[1:]):
        rows_of[boundary] = n_prompt - (sizes[0] - size) * block_len
    total = 2 * config.dim * config.vocab_size
    rows = n_prompt
    for layer in range(config.n_layers):
        rows = rows_of.get(layer, rows)
        ffn_rows = rows_of.get(layer + 1, rows)  # below a boundary only its survivors
        total += layer_flops(config, rows, rows / 2, ffn_rows)
    return total
