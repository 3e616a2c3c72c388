"""RoPE: what config.json asks for, checked, and the frequencies; `model.rotate` applies them.

Frequencies are computed in float32 and in transformers' order of operations, whatever the dtype of
a run: models were trained with these roundings, and at a million tokens one unit in the last place
is an angle of 0.01.
"""

import math

import torch
from torch import Tensor

from loading.files import positive
from model import Config

ORIGINAL = "original_max_position_embeddings"
TYPES = {  # rope type: keys it needs, keys it may have with their default
    "default": ((), {}),
    "linear": (("factor",), {}),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", ORIGINAL), {}),
    "yarn": (
        ("factor", ORIGINAL),
        {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": True,
            "attention_factor": None,
            "mscale": None,
            "mscale_all_dim": None,
            "llama_4_scaling_beta": None,
        },
    ),
    "longrope": (("factor", ORIGINAL, "short_factor", "long_factor"), {"attention_factor": None}),
}


# ---- config.json --------------------------------------------------------------------------


def rope_keys(config: dict, path) -> dict:
    """Gather RoPE's keys under older and newer names; raise ValueError if they contradict."""
    rope = {}
    for key in ("rope_theta", "partial_rotary_factor", ORIGINAL):
        if config.get(key) is not None:
            rope[key] = config[key]
    for key in ("rope_scaling", "rope_parameters"):
        part = config.get(key)
        if part is None:
            continue
        if not isinstance(part, dict):
            raise ValueError(f"{path}: key {key!r} is {part!r:.60}, not an object")
        for name, value in part.items():
            name = "rope_type" if name == "type" else name
            if value is not None and rope.setdefault(name, value) != value:
                raise ValueError(
                    f"{path}: {name!r:.60} is given twice, as {rope[name]!r:.60} "
                    f"and as {value!r:.60}; leave one"
                )
    return rope


def stretch(config: dict, factor: float, path) -> dict:
    """Return the config with YaRN by a factor added; raise ValueError if it scales RoPE already."""
    rope = rope_keys(config, path)
    kind = rope.get("rope_type", "default")
    if kind != "default":
        raise ValueError(
            f"--rope-yarn {factor:g}: {path} scales RoPE itself, by {kind!r:.60}; "
            "leave --rope-yarn out"
        )
    max_len = config.get("max_position_embeddings")
    trained = positive(max_len, f"{path}: key 'max_position_embeddings'", int, 2**40)
    if (config.get("model_type"), trained) == ("qwen3", 40960):
        trained = 32768  # Qwen3's authors stretch from here; they keep the rest for answers
    rope |= {"rope_type": "yarn", "factor": factor, ORIGINAL: trained}
    stretched = {"rope_parameters": rope, "max_position_embeddings": int(trained * factor)}
    older = {"rope_scaling": None, ORIGINAL: None}  # so that they contradict nothing
    return {**config, **older, **stretched}


def check_rope(
    rope: dict, model_type: str, max_len: int, rotary_dim: int, theta: float, where: str
) -> dict:
    """Return RoPE's scaling: "rope_type" and every number that it needs.

    where: the file and its key, for errors. Raises ValueError for a type or a key that is not
    understood, and for numbers that make no sense.
    """
    rope = dict(rope)
    if rope.get("max_position_embeddings") == max_len:
        del rope["max_position_embeddings"]  # Ministral 3 repeats it here
    kind = rope.pop("rope_type", None if rope.keys() - {ORIGINAL} else "default")
    if model_type == "phi3" and kind in ("su", "yarn") and "long_factor" in rope:
        kind = "longrope"  # its older names
    if not isinstance(kind, str) or kind not in TYPES:
        known = ", ".join(TYPES)
        raise ValueError(f"{where} type {kind!r:.60} is not supported; supported are {known}")
    needed, optional = TYPES[kind]
    unknown = rope.keys() - {ORIGINAL, *needed, *optional}
    if unknown:
        raise ValueError(
            f"{where} key {min(unknown)!r:.60} is not known for type {kind!r}; "
            "it may change the numbers"
        )
    if kind in ("yarn", "longrope"):
        original = rope_value(ORIGINAL, rope.get(ORIGINAL, max_len), rotary_dim, where)
        rope = {"factor": max_len / original, **optional, **rope, ORIGINAL: original}
    found = {"rope_type": kind}
    for key in (*needed, *optional):
        if key in needed or rope.get(key) is not None:
            found[key] = rope_value(key, rope.get(key), rotary_dim, where)
    check_sense(found, theta, where)
    if kind in ("yarn", "longrope"):
        found.setdefault("attention_factor", attention_factor(found))
    return found


def rope_value(key: str, value, rotary_dim: int, where: str):
    """Return one value of RoPE's scaling, checked: a number, but for a flag and two lists."""
    if key == "truncate":
        if not isinstance(value, bool):
            raise ValueError(f"{where} key 'truncate' is {value!r:.60}; it must be true or false")
        return value
    if key in ("short_factor", "long_factor"):
        n_pairs = rotary_dim // 2
        if not isinstance(value, list) or len(value) != n_pairs:
            raise ValueError(
                f"{where} key {key!r} is {value!r:.60}; it must list {n_pairs} numbers"
            )
        what = f"{where} key {key!r}: one number"
        return tuple(positive(number, what, float, 2**40) for number in value)
    return positive(value, f"{where} key {key!r}", float, 2**40)


def check_sense(scaling: dict, theta: float, where: str) -> None:
    """Raise ValueError for numbers that contradict each other."""
    kind = scaling["rope_type"]
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise ValueError(
            f"{where} key 'high_freq_factor' is {scaling['high_freq_factor']}; "
            f"it must be above low_freq_factor, {scaling['low_freq_factor']}"
        )
    if kind in ("yarn", "longrope"):
        factor = scaling["factor"]
        original = scaling[ORIGINAL]
        if factor < 1 or original < 2 or theta <= 1:
            raise ValueError(
                f"{where} of type {kind!r} stretches {original:g} tokens by the factor {factor:g} "
                f"at rope_theta {theta:g}; the factor must be at least 1, and the others above 1"
            )


def attention_factor(scaling: dict) -> float:
    """Return the factor of cos and sin, from YaRN's and LongRoPE's papers or DeepSeek's mscale."""
    log = math.log(scaling["factor"])
    if scaling["rope_type"] == "longrope":
        return math.sqrt(1 + log / math.log(scaling[ORIGINAL]))
    if "mscale" in scaling and "mscale_all_dim" in scaling:
        return (0.1 * scaling["mscale"] * log + 1) / (0.1 * scaling["mscale_all_dim"] * log + 1)
    return 0.1 * log + 1


# ---- frequencies --------------------------------------------------------------------------


def inverse_frequencies(config: Config, long: bool = True) -> Tensor:
    """Return RoPE's inverse frequencies (R/2,) in float32, scaled as the checkpoint asks.

    linear divides all by one factor; longrope each by its own, with other factors for long prompts.
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
    """Divide frequencies that turn seldom in the original context, keep fast ones, mix between."""
    lowest = scaling["low_freq_factor"]
    highest = scaling["high_freq_factor"]
    turns = scaling[ORIGINAL] / (2 * math.pi / inverse)
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
    """Return which pair of dims, not rounded, turns so many times in the original context."""
    context = config.rope_scaling[ORIGINAL]
    size = math.log(context / (times * 2 * math.pi))
    return config.rotary_dim * size / (2 * math.log(config.rope_theta))
