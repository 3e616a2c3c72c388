"""Which heads of a model look things up: the model shows it itself, without data, in seconds.

It reads random ids twice in a row. A head that looks things up puts its weight on the place where
the id stood the first time (a duplicate-token head), or on the one after it (an induction head,
which copies what came next). Few heads do, and they do it strongly; all others look at what is
near, or at the first token. What is found is kept in a cache folder, by the weights' fingerprint.
"""

import json
import os
import random
import warnings
from fractions import Fraction
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from loading.files import replace_file
from model import Model, attention_weights

PROBE_LEN = 256  # ids, read twice
QUERIES = 64  # the last of them are looked at
LEAST = 0.05  # weight from which a head counts; at 0.2 head 7.7 is lost, on which SmolLM2 depends
ENOUGH = Fraction(1, 16)  # of the heads' total strength must lie below the first boundary
NO_HEADS = 1.0  # total strength below which a model has none; SmolLM2 7.1, Qwen2.5-Coder-0.5B 26.3


def random_ids(vocab_size: int, is_text) -> list[int]:
    """Return ids to read, always the same; is_text(id) tells special and unused ones apart."""
    rng = random.Random(0)
    ids = []
    for _ in range(100 * PROBE_LEN):
        token = rng.randrange(vocab_size)
        if is_text(token):
            ids.append(token)
        if len(ids) == PROBE_LEN:
            return ids
    return [rng.randrange(vocab_size) for _ in range(PROBE_LEN)]  # hardly any id is text: a toy


def measure(model: Model, ids: list[int]) -> Tensor:
    """Return the strength (L, H) of each head: the larger of its two mean weights.

    Runs a step, so it drops the conversation in the model's KV.
    """
    kv = model.kv
    queries = torch.arange(QUERIES, device=kv.device)
    first = queries + len(ids) - QUERIES  # where each query's id stood the first time
    strengths = []

    def look(layer: int, newest: Tensor) -> None:
        keys, _ = kv.read(layer, 2 * len(ids))
        weights = attention_weights(newest, keys)  # (W, H, S)
        same = weights[queries, :, first].mean(0)  # (H,)
        after = weights[queries, :, first + 1].mean(0)
        strengths.append(torch.maximum(same, after))

    before = model.window, model.on_queries
    model.window = QUERIES
    model.on_queries = look
    kv.reset(2 * len(ids), {})
    try:
        model.step(torch.tensor(ids + ids))
    finally:
        model.window, model.on_queries = before
    return torch.stack(strengths).float().cpu()


def lookup_heads(strengths: Tensor) -> tuple[tuple[int, ...], ...]:
    """Return each layer's lookup heads; none at all where their total strength is too small."""
    strong = strengths > LEAST
    if strengths[strong].sum() < NO_HEADS:
        strong = torch.zeros_like(strong)
    return tuple(tuple(row.nonzero().flatten().tolist()) for row in strong)


def strength_below(strengths: Tensor) -> list[float]:
    """Return for each layer the total strength of the lookup heads in it and below."""
    by_layer = []
    for layer, found in enumerate(lookup_heads(strengths)):
        by_layer.append(sum(strengths[layer, list(found)].tolist()))
    return list(accumulate(by_layer))


def can_rank(strengths: Tensor, boundary: int) -> bool:
    """Return whether enough lookup heads lie below a boundary to rank the blocks there."""
    below = strength_below(strengths)
    return below[-1] > 0 and below[boundary - 1] >= ENOUGH * below[-1]


def names(heads: tuple[tuple[int, ...], ...]) -> list[str]:
    """Return heads as "layer.head"."""
    return [f"{layer}.{head}" for layer, found in enumerate(heads) for head in found]


# ---- the cache ----------------------------------------------------------------------------


def cache_file(key: str) -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "slim" / f"heads-{key}.json"


def read_cache(key: str, n_layers: int, n_heads: int) -> Tensor | None:
    """Return strengths (L, H) kept earlier; None if there are none, or the file is damaged."""
    try:
        strengths = torch.tensor(json.loads(cache_file(key).read_text()), dtype=torch.float32)
    except (OSError, ValueError, TypeError, RuntimeError, OverflowError):
        return None
    right = strengths.shape == (n_layers, n_heads)
    right = right and bool(((strengths >= 0) & (strengths <= 1.01)).all())  # mean weights, no NaN
    return strengths if right else None


def write_cache(key: str, strengths: Tensor) -> None:
    """Keep strengths for the next start; where that cannot be, warn."""
    try:
        path = cache_file(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as file:
            file.write(json.dumps(strengths.tolist()).encode())
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: there is no home folder
        warnings.warn(
            f"the model's lookup heads cannot be kept ({error}), so they are looked for at every "
            "start; let XDG_CACHE_HOME name a folder that can be written",
            stacklevel=2,
        )
