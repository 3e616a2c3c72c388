"""config.json, read strictly: a key that is not understood and would change the numbers is an error that names it."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from loading.files import read_json
from model import DTYPES, Config


@dataclass(frozen=True)
class Family:
    """How a family differs from Llama, as data: the step asks what a layer has, never which family it is."""

    model_type: str
    adds: dict = field(default_factory=dict)  # fields of Config
    defaults: dict = field(
        default_factory=dict
    )  # what transformers takes where a config.json leaves a key out
    reads: tuple[str, ...] = ()  # keys of NEUTRAL that mean something here
    theta: float = 10000.0  # rope_theta where none is given
    rope: dict = field(default_factory=dict)  # rope_parameters where nothing is said of RoPE


ORIGINAL = "original_max_position_embeddings"
FAMILIES = {
    "LlamaForCausalLM": Family("llama"),
    "Qwen2ForCausalLM": Family(
        "qwen2", adds={"qkv_bias": True}, defaults={"use_sliding_window": False}
    ),
    "Qwen3ForCausalLM": Family(
        "qwen3", adds={"qk_norm": True}, defaults={"head_dim": 128, "use_sliding_window": False}
    ),
    "MistralForCausalLM": Family("mistral", defaults={"sliding_window": 4096}),
    "Ministral3ForCausalLM": Family(
        "ministral3",
        defaults={"head_dim": 128},
        reads=("llama_4_scaling_beta",),
        rope={
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 16.0,
            ORIGINAL: 16384,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    ),
    "SmolLM3ForCausalLM": Family(
        "smollm3",
        theta=2e6,
        defaults={
            "no_rope_layer_interval": 4,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
        },
        reads=(
            "no_rope_layers",
            "no_rope_layer_interval",
            "pretraining_tp",
        ),  # the last is not used in SmolLM3
    ),
    "Phi3ForCausalLM": Family(
        "phi3", adds={"fused": True}, defaults={ORIGINAL: 4096}, reads=("partial_rotary_factor",)
    ),
}
NEUTRAL = {  # keys that would change the numbers, with the value that does not
    "hidden_act": "silu",
    "mlp_bias": False,
    "lm_head_bias": False,
    "use_sliding_window": False,
    "use_mrope": False,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "logit_scale": 1.0,
    "use_qk_norm": False,
    "pretraining_tp": 1,
    "no_rope_layers": None,
    "no_rope_layer_interval": None,
    "llama_4_scaling_beta": None,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,  # Granite's
    "attention_multiplier": None,  # instead of 1 / sqrt(head_dim)
}
CANNOT = {  # why a model does not run here: what its architecture, or a kind of its layers, is called; or keys it has
    "its recurrent layers (linear attention, state space) keep one state of all tokens, which pruning would break": (
        "linear|mamba|rwkv|recurrent|qwen3next|qwen3_5|jamba|bamba|zamba|falconh1|nemotronh|lfm2|moehybrid|kimi",
        ("linear_num_key_heads", "mamba_d_state", "ssm_cfg", "state_size"),
    ),
    "it is a mixture of experts, whose feed-forward Slim does not have": (
        "moe|mixtral|deepseek|gptoss|llama4|dbrx",
        ("num_experts", "num_local_experts", "n_routed_experts"),
    ),
    "some of its layers see a sliding window alone, and Slim's attention is over the whole text": (
        "sliding|chunked|gemma[234]|cohere2|^ministral(?!3)",
        ("sliding_window_pattern",),
    ),
    "it reads more than text": ("conditionalgeneration|vision", ("vision_config",)),
}
ROPE_KEYS = {  # type: keys it needs, keys it may have with their default
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


def read_config(path: Path, rope_yarn: float = 0.0) -> Config:
    """Read config.json; rope_yarn: the factor of a YaRN that it does not have.

    Raises FileNotFoundError, or a ValueError that names the key.
    """
    return parse_config(read_json(path), path, rope_yarn)


def stretch(c: dict, factor: float, path) -> dict:
    """Return the config with YaRN by a factor added; raise ValueError if it scales RoPE already."""
    rope = rope_keys(c, path)
    kind = rope.get("rope_type", "default")
    if kind != "default":
        raise ValueError(
            f"--rope-yarn {factor:g}: {path} scales RoPE itself, by {kind!r:.60}; leave --rope-yarn out"
        )
    trained = positive(
        c.get("max_position_embeddings"), f"{path}: key 'max_position_embeddings'", int, 2**40
    )
    if (c.get("model_type"), trained) == ("qwen3", 40960):
        trained = 32768  # Qwen3's authors stretch from here; they keep the rest for answers
    rope = {**rope, "rope_type": "yarn", "factor": factor, ORIGINAL: trained}
    rest = {
        k: v for k, v in c.items() if k not in ("rope_scaling", ORIGINAL)
    }  # so that no older key contradicts it
    return {**rest, "rope_parameters": rope, "max_position_embeddings": int(trained * factor)}


def parse_config(c: dict, path, rope_yarn: float = 0.0) -> Config:
    """Return the Config of a config.json's keys; raise ValueError for what is not understood."""
    family = check_architecture(c, path)
    c = {**family.defaults, **c}
    if family.rope and not c.get("rope_scaling") and c.get("rope_parameters") is None:
        c["rope_parameters"] = family.rope
    if rope_yarn:
        c = stretch(c, rope_yarn, path)

    def number(key: str, default=None, kind=int, most=2**20):
        return positive(
            default if c.get(key) is None else c[key], f"{path}: key {key!r}", kind, most
        )

    rope = rope_keys(c, path)
    for key, value in {**c, **rope}.items():
        if key in NEUTRAL and key not in family.reads and value not in (NEUTRAL[key], None):
            raise ValueError(
                f"{path}: key {key!r} is {value!r:.60}; only {NEUTRAL[key]!r} is supported"
            )
    dim, n_heads = number("hidden_size"), number("num_attention_heads")
    n_layers = number("num_hidden_layers", most=1000)
    n_kv_heads, head_dim = (
        number("num_key_value_heads", n_heads),
        number("head_dim", max(1, dim // n_heads)),
    )
    max_len = number("max_position_embeddings", most=2**40)
    partial = positive(
        rope.pop("partial_rotary_factor", 1.0), f"{path}: key 'partial_rotary_factor'", float, 1
    )
    rotary_dim = int(head_dim * partial)
    if n_heads % n_kv_heads or head_dim % 2 or rotary_dim % 2 or not rotary_dim:
        raise ValueError(
            f"{path}: {n_heads} heads over {n_kv_heads} KV heads of size {head_dim} ({rotary_dim} for RoPE) do not "
            "divide evenly"
        )
    theta = positive(rope.pop("rope_theta", family.theta), f"{path}: key 'rope_theta'", float, 1e12)
    where = f"{path}: " + (
        "rope_scaling" if c.get("rope_parameters") is None else "rope_parameters"
    )
    scaling = check_rope(rope, family, max_len, rotary_dim, theta, where)
    if (
        scaling["rope_type"] == "yarn"
    ):  # Qwen's cards add it to a config.json that keeps the shorter context
        max_len = max(max_len, int(scaling["factor"] * scaling[ORIGINAL]))
    if (
        "use_sliding_window" not in family.defaults
        and number("sliding_window", max_len, most=2**40) < max_len
    ):
        raise ValueError(
            f"{path}: key 'sliding_window' is {c['sliding_window']}; only full attention is supported, so a window of "
            f"the context's {max_len:,} tokens or none"
        )
    if c.get("layer_types") not in (None, ["full_attention"] * n_layers):
        raise ValueError(
            f"{path}: key 'layer_types' is {c['layer_types']!r:.60}; only full attention in every layer is supported"
        )
    bias = read_flag(c, "attention_bias", path)
    adds = {
        "qkv_bias": bias,
        "o_bias": bias,
        "no_rope": layers_without_rope(c, n_layers, path),
        **family.adds,
    }
    return Config(
        model_type=family.model_type,
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        hidden_dim=number("intermediate_size"),
        vocab_size=number("vocab_size", most=2**24),
        norm_eps=number("rms_norm_eps", kind=float, most=1),
        max_len=max_len,
        rope_theta=theta,
        rope_scaling=scaling,
        tied=read_flag(c, "tie_word_embeddings", path),
        dtype=read_dtype(c, path),
        tile=fp8_tile(c, path),
        **adds,
    )


def check_architecture(c: dict, path) -> Family:
    """Return the family of a config.json; raise ValueError, with the reason where there is one, if it cannot run."""
    names = c.get("architectures")
    architecture = (
        names[0] if isinstance(names, list) and names and isinstance(names[0], str) else str(names)
    )
    kinds = c["layer_types"] if isinstance(c.get("layer_types"), list) else []
    words = [*map(str, kinds), *([] if architecture in FAMILIES else [architecture])]
    for reason, (pattern, keys) in CANNOT.items():
        if any(re.search(pattern, word.lower()) for word in words) or any(
            c.get(key) for key in keys
        ):
            raise ValueError(f"{path}: {architecture:.60} cannot run here: {reason}")
    if architecture not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(
            f"{path}: architecture {architecture!r:.60} is not supported; supported are {known}"
        )
    family = FAMILIES[architecture]
    if c.get("model_type") not in (family.model_type, None):
        raise ValueError(
            f"{path}: key 'model_type' is {c['model_type']!r:.60}, but {architecture} is {family.model_type!r}"
        )
    return family


def fp8_tile(c: dict, path) -> tuple[int, int] | None:
    """Return the tile of FP8 weights that shares a scale, None of plain ones; raise ValueError for another kind."""
    quantised = c.get("quantization_config")
    if quantised is None:
        return None
    given = quantised if isinstance(quantised, dict) else {}
    kind, tile = given.get("quant_method"), given.get("weight_block_size")
    if kind != "fp8" or not (
        isinstance(tile, list) and len(tile) == 2 and all(type(n) is int and n > 0 for n in tile)
    ):
        raise ValueError(
            f"{path}: key 'quantization_config' is of kind {kind!r:.40} with tiles {tile!r:.40}, so quantised; "
            "only FP8 with a scale for each tile is read, and weights that are not quantised"
        )
    return tile[0], tile[1]


def layers_without_rope(c: dict, n_layers: int, path) -> tuple[int, ...]:
    """Return the layers that a config.json of SmolLM3's kind exempts from RoPE: listed with a 0, or every nth."""
    given, every = c.get("no_rope_layers"), c.get("no_rope_layer_interval")
    if given is None:
        if every is None:
            return ()
        every = positive(every, f"{path}: key 'no_rope_layer_interval'", int, 2**20)
        given = [(i + 1) % every != 0 for i in range(n_layers)]
    if (
        not isinstance(given, list)
        or len(given) < n_layers
        or any(one not in (0, 1) for one in given)
    ):
        raise ValueError(
            f"{path}: key 'no_rope_layers' is {given!r:.60}; it must list 1 (RoPE) or 0 (none) for {n_layers} layers"
        )
    return tuple(i for i in range(n_layers) if not given[i])


def read_flag(c: dict, key: str, path) -> bool:
    if not isinstance(c.get(key), bool | None):
        raise ValueError(f"{path}: key {key!r} is {c[key]!r:.60}; it must be true or false")
    return bool(c.get(key))


def read_dtype(c: dict, path):
    given = [c[key] for key in ("torch_dtype", "dtype") if c.get(key) is not None]
    name = str(given[0]).removeprefix("torch.") if given else "float32"
    if name not in DTYPES:
        raise ValueError(
            f"{path}: key 'torch_dtype' is {name!r:.60}; supported are {', '.join(DTYPES)}"
        )
    return DTYPES[name]


def rope_keys(c: dict, path) -> dict:
    """Gather a config's RoPE keys under older and newer names; raise ValueError if they contradict."""
    shared = "rope_theta", "partial_rotary_factor", ORIGINAL
    rope = {key: c[key] for key in shared if c.get(key) is not None}
    for key in ("rope_scaling", "rope_parameters"):
        part = {} if c.get(key) is None else c[key]
        if not isinstance(part, dict):
            raise ValueError(f"{path}: key {key!r} is {part!r:.60}, not an object")
        for name, value in part.items():
            name = "rope_type" if name == "type" else name
            if value is not None and rope.setdefault(name, value) != value:
                raise ValueError(
                    f"{path}: {name!r:.60} is given twice, as {rope[name]!r:.60} and as {value!r:.60}; leave one"
                )
    return rope


def check_rope(
    rope: dict, family: Family, max_len: int, rotary_dim: int, theta: float, where: str
) -> dict:
    """Return RoPE's scaling: {"rope_type": ..., every number that `inverse_frequencies` needs, "attention_factor"}.

    where: the file and its key, for errors. Raises ValueError for a type or a key that is not understood, and for
    numbers that make no sense.
    """
    rope = {k: v for k, v in rope.items() if k not in NEUTRAL or k in family.reads}
    if rope.get("max_position_embeddings") == max_len:
        del rope["max_position_embeddings"]  # Ministral 3 repeats it here
    kind = rope.pop("rope_type", None if rope.keys() - {ORIGINAL} else "default")
    if family.model_type == "phi3" and kind in ("su", "yarn") and "long_factor" in rope:
        kind = "longrope"  # its older names
    if not isinstance(kind, str) or kind not in ROPE_KEYS:
        raise ValueError(
            f"{where} type {kind!r:.60} is not supported; supported are {', '.join(ROPE_KEYS)}"
        )
    needed, optional = ROPE_KEYS[kind]
    if unknown := rope.keys() - {ORIGINAL, *needed, *optional}:
        raise ValueError(
            f"{where} key {min(unknown)!r:.60} is not known for type {kind!r}; it may change the numbers"
        )
    if kind in ("yarn", "longrope"):
        old = rope_value(ORIGINAL, rope.get(ORIGINAL, max_len), rotary_dim, where)
        rope = {"factor": max_len / old, **optional, **rope, ORIGINAL: old}
    found = {"rope_type": kind}
    for key in (*needed, *(key for key in optional if rope.get(key) is not None)):
        found[key] = rope_value(key, rope.get(key), rotary_dim, where)
    if kind == "llama3" and found["high_freq_factor"] <= found["low_freq_factor"]:
        high, low = found["high_freq_factor"], found["low_freq_factor"]
        raise ValueError(
            f"{where} key 'high_freq_factor' is {high}; it must be above low_freq_factor, {low}"
        )
    if kind in ("yarn", "longrope") and (found["factor"] < 1 or found[ORIGINAL] < 2 or theta <= 1):
        raise ValueError(
            f"{where} of type {kind!r} stretches {found[ORIGINAL]:g} tokens by the factor {found['factor']:g} "
            f"at rope_theta {theta:g}; the factor must be at least 1, and the others above 1"
        )
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
        if not isinstance(value, list) or len(value) != rotary_dim // 2:
            raise ValueError(
                f"{where} key {key!r} is {value!r:.60}; it must list {rotary_dim // 2} numbers"
            )
        return tuple(
            positive(number, f"{where} key {key!r}: one number", float, 2**40) for number in value
        )
    return positive(value, f"{where} key {key!r}", float, 2**40)


def attention_factor(rope: dict) -> float:
    """Return what cos and sin are multiplied by, as the papers of YaRN and LongRoPE say and DeepSeek's mscale does."""
    log = math.log(rope["factor"])
    if rope["rope_type"] == "longrope":
        return math.sqrt(1 + log / math.log(rope[ORIGINAL]))
    if "mscale" in rope and "mscale_all_dim" in rope:
        return (0.1 * rope["mscale"] * log + 1) / (0.1 * rope["mscale_all_dim"] * log + 1)
    return 0.1 * log + 1


def positive(value, what: str, kind: type, most: float):
    """Return value as `kind`, int or float; raise ValueError unless it is a number above 0 and up to `most`."""
    number = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value <= most:  # so also for NaN
        raise ValueError(
            f"{what} is {value!r:.60}; it must be a positive {kind.__name__} up to {most:g}"
        )
    return kind(value)
