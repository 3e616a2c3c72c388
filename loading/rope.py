"""RoPE's frequencies, scaled as the checkpoint asks; `model.rotate` applies them.

All in float32 and in transformers' order of operations, whatever the dtype of a run: models were trained with these
roundings, and at a million tokens one unit in the last place is an angle of 0.01.
"""

import math

import torch
from torch import Tensor

from model import Config


def inverse_frequencies(config: Config, long: bool = True) -> Tensor:
    """Return RoPE's inverse frequencies (R/2,) in float32, scaled as the checkpoint's rope type asks.

    linear: all divided by the factor; longrope: each divided by its own, another one for a long prompt.
    """
    scaling = config.rope_scaling
    pairs = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32)
    periods = config.rope_theta ** (pairs / config.rotary_dim)
    match scaling["rope_type"]:
        case "linear":
            return 1.0 / periods / scaling["factor"]
        case "llama3":
            return llama3(1.0 / periods, scaling)
        case "yarn":
            return yarn(periods, config)
        case "longrope":
            factors = scaling["long_factor" if long else "short_factor"]
            return 1.0 / (torch.tensor(factors, dtype=torch.float32) * periods)
    return 1.0 / periods


def llama3(inverse: Tensor, scaling: dict) -> Tensor:
    """Keep frequencies that turn often within the original context, divide those that turn seldom, mix between."""
    lowest = scaling["low_freq_factor"]
    highest = scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / (2 * math.pi / inverse)
    kept = ((turns - lowest) / (highest - lowest)).clamp(0, 1)
    return (1 - kept) * inverse / scaling["factor"] + kept * inverse


def yarn(periods: Tensor, config: Config) -> Tensor:
    """Do as `llama3` does, but mix by the index of the pair (YaRN, arXiv 2309.00071)."""
    scaling = config.rope_scaling
    first = pair_that_turns(scaling["beta_fast"], config)
    last = pair_that_turns(scaling["beta_slow"], config)
    if scaling["truncate"]:
        first = math.floor(first)
        last = math.ceil(last)
    first = max(first, 0)
    last = min(last, config.rotary_dim - 1)
    pairs = torch.arange(len(periods), dtype=torch.float32)
    kept = 1 - ((pairs - first) / (last - first or 0.001)).clamp(0, 1)
    return 1.0 / (scaling["factor"] * periods) * (1 - kept) + 1.0 / periods * kept


def pair_that_turns(times: float, config: Config) -> float:
    """Return the index, not rounded, of the pair of dims that turns so many times within the original context."""
    context = config.rope_scaling["original_max_position_embeddings"]
    size = math.log(context / (times * 2 * math.pi))
    return config.rotary_dim * size / (2 * math.log(config.rope_theta))
