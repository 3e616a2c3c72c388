"""Which heads of a model look things up: the model shows it itself, without data, in seconds.

It reads random ids twice in a row. A head that looks things up puts its weight on the place where
the id stood the first time (a duplicate-token head), or on the one after it (an induction head,
which copies what came next). Few heads do, and they do it strongly; all others look at what is
near, or at the first token. What is found is kept in a cache folder, by the weights' fingerprint.
"""

import json
import os
import random
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from loading.files import replace_file
from model import Model, attention_weights

PROBE_LEN = 256  # ids, read twice
QUERIES = 64  # the last of them are looked at
LEAST = 0.05  # weight from which a head counts; at 0.2 a head is lost on which SmolLM2 depends
NO_HEADS = 1.0  # total strength below which a model has none; 7.1 and 26.3 in two real ones


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
    except (OSError, ValueError, TypeError, RuntimeError):
        return None
    right = strengths.shape == (n_layers, n_heads) and strengths.isfinite().all()
    return strengths if right else None


def write_cache(key: str, strengths: Tensor) -> None:
    """Keep strengths for the next start; where that cannot be, they are measured again."""
    with suppress(OSError, ValueError, RuntimeError):  # RuntimeError: there is no home folder
        path = cache_file(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as file:
            file.write(json.dumps(strengths.tolist()).encode())
