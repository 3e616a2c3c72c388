"""Floating-point operations of a prefill, by the formula of the layers it runs."""

import time
from collections.abc import Iterator

import prune
from model import FULL, TILE, Config, Local


def layer_flops(config: Config, rows: int, keys: float, ffn_rows: int | None = None) -> float:
    """Return a layer's operations for rows that see `keys` keys on average.

    ffn_rows: rows of its feed-forward, if different.
    """
    heads = 2 * config.n_heads + 2 * config.n_kv_heads  # of q and the output, of k and v
    projections = config.dim * heads * config.head_dim
    ffn = 3 * config.dim * config.hidden_dim
    ffn_rows = rows if ffn_rows is None else ffn_rows
    return attention_flops(config, rows, keys) + 2 * rows * projections + 2 * ffn_rows * ffn


def attention_flops(config: Config, rows: int, keys: float) -> float:
    """Return the operations of a layer's two products with keys and values."""
    return 4 * rows * keys * config.n_heads * config.head_dim


def local_keys(n_prompt: int, local: Local) -> float:
    """Return how many keys a row of a prompt sees on average, with local attention."""
    n_local = local.n_rows(n_prompt)
    total = (n_prompt - n_local) * (n_prompt + n_local) / 2  # of the rows that see everything
    for start in range(0, n_local, TILE):
        window_start = local.window_start(start)
        left_out = window_start - local.sinks if window_start else 0
        total += TILE * (start + TILE / 2 - left_out)
    return total / n_prompt


def layer_work(
    config: Config, n_prompt: int, schedule: dict, block_len: int = 64, local: Local = FULL
) -> Iterator[tuple[int, float, int]]:
    """Yield (rows, keys a row on average, rows of the feed-forward) of every layer of a prefill."""
    sizes = prune.stage_blocks(n_prompt, schedule, block_len)
    rows_of = {0: n_prompt}  # from this layer on
    for boundary, size in zip(schedule, sizes[1:]):
        rows_of[boundary] = n_prompt - (sizes[0] - size) * block_len
    prunes = sizes[-1] < sizes[0]
    few_keys = local_keys(n_prompt, local) if prunes else n_prompt / 2
    rows = n_prompt
    for layer in range(config.n_layers):
        rows = rows_of.get(layer, rows)
        ffn_rows = rows_of.get(layer + 1, rows)  # below a boundary only its survivors
        keys = rows / 2
        if rows == n_prompt:
            far = len(local.far_heads(layer)) / config.n_heads  # share of heads
            keys = far * keys + (1 - far) * few_keys
        yield rows, keys, ffn_rows


def prefill_flops(
    config: Config, n_prompt: int, schedule: dict, block_len: int = 64, local: Local = FULL
) -> float:
    """Return the floating-point operations of a prefill: every layer, and the head once."""
    total = 2 * config.dim * config.vocab_size
    for rows, keys, ffn_rows in layer_work(config, n_prompt, schedule, block_len, local):
        total += layer_flops(config, rows, keys, ffn_rows)
    return total


class WorkDone:
    """How far a prefill is, by the work of its layers; `share` is asked before each chunk.

    part: "whole"; "below" the first boundary, as of `Engine.read`; or "above", as of the first
    question about a text that was read so.
    """

    def __init__(self, engine, part: str = "whole"):
        self.engine = engine
        self.part = part
        self.prompt = None  # which is being read: a probe may come before the one that is asked for

    def share(self, layer: int, n_rows: int) -> float:
        """Return the share of the work that is done before these rows of a layer."""
        kv = self.engine.kv
        prompt = kv.n_prompt, kv.schedule
        if prompt != self.prompt:
            self.prompt = prompt
            self.begin()
        share = min(1.0, self.done / self.total)
        self.done += layer_flops(self.engine.config, n_rows, self.work[layer][1])
        return share

    def begin(self) -> None:
        config = self.engine.config
        kv = self.engine.kv
        local = self.engine.running.local
        self.started = time.perf_counter()
        self.done = 0.0  # operations
        self.work = [*layer_work(config, kv.n_prompt, kv.schedule, kv.block_len, local)]
        n_below = kv.stages[0].layers.stop
        wanted = {"whole": self.work, "below": self.work[:n_below], "above": self.work[n_below:]}
        self.total = sum(layer_flops(config, rows, keys) for rows, keys, _ in wanted[self.part])

    def seconds_left(self, share: float) -> float:
        return (time.perf_counter() - self.started) * (1 - share) / share
