"""RoPE's frequencies, scaled as the checkpoint asks; `model.rotate` applies them."""

import math

import torch
from torch import Tensor

from model import Config


def inverse_frequencies(c: Config, long: bool = True) -> Tensor:
    """Return RoPE's inverse frequencies (R/2,) in float64, scaled as the checkpoint's rope type asks.

    linear: all divided by factor. llama3: a frequency that turns seldom within the original context is
    divided, one that turns often is kept, a ramp between; yarn (arXiv 2309.00071) makes the ramp over
    the pairs' indices. longrope: each divided by its own factor, another one for a long prompt.
    """
    r, kind = c.rope_scaling, c.rope_scaling["rope_type"]
    half = torch.arange(c.rotary_dim // 2, dtype=torch.float64)
    inv, keep = (
        c.rope_theta ** (-2 * half / c.rotary_dim),
        0.0,
    )  # keep: 1 as it is, 0 divided by factor
    if kind == "longrope":
        return inv / torch.tensor(r["long_factor" if long else "short_factor"], dtype=torch.float64)
    if kind == "llama3":
        low, high = r["low_freq_factor"], r["high_freq_factor"]
        turns = (
            r["original_max_position_embeddings"] * inv / (2 * math.pi)
        )  # within the original context
        keep = ((turns - low) / (high - low)).clamp(0, 1)
    if kind == "yarn":
        turned = [
            r["original_max_position_embeddings"] / (2 * math.pi * r[key])
            for key in ("beta_fast", "beta_slow")
        ]
        low, high = (
            c.rotary_dim * math.log(n) / (2 * math.log(c.rope_theta)) for n in turned
        )  # pairs that turn so
        if r["truncate"]:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, c.rotary_dim - 1)
        keep = 1 - ((half - low) / (high - low or 0.001)).clamp(0, 1)
    return inv * keep + inv / r.get("factor", 1.0) * (1 - keep)
