"""config.json, read strictly: a key that is not understood and would change the numbers is an error that names it."""

import json
from pathlib import Path

from model import DTYPES, Config

ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}
NEUTRAL = {  # keys that would change the numbers of these architectures, with the value that does not
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False,
    "quantization_config": None, "partial_rotary_factor": 1.0, "rope_interleaved": False,
    "attn_logit_softcapping": None, "final_logit_softcapping": None, "logit_scale": 1.0,
    "use_qk_norm": False, "pretraining_tp": 1, "no_rope_layers": None,
}  # fmt: skip
LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ROPE_KEYS = {"default": (), "linear": ("factor",), "llama3": LLAMA3_KEYS}


def read_config(path: Path) -> Config:
    """Read config.json; raise FileNotFoundError, or a ValueError that names the key."""
    return parse_config(read_json(path), path)


def parse_config(c: dict, path) -> Config:
    """Return the Config of a config.json's keys; raise ValueError for what is not understood."""

    def number(key: str, default=None, kind=int, most=2**20):
        return positive(default if c.get(key) is None else c[key], f"{path}: key {key!r}", kind, most)

    model_type = check_architecture(c, path)
    rope = rope_keys(c, path)
    for key, value in {**c, **rope}.items():
        if key in NEUTRAL and value not in (NEUTRAL[key], None):
            raise ValueError(f"{path}: key {key!r} is {value!r}; only {NEUTRAL[key]!r} is supported")
    if model_type == "llama" and c.get("sliding_window") is not None:
        raise ValueError(f"{path}: key 'sliding_window' is {c['sliding_window']!r}; only full attention is supported")
    theta = rope.pop("rope_theta", 10000.0)  # Llama 2 files may leave it out
    tied = False if c.get("tie_word_embeddings") is None else c["tie_word_embeddings"]
    if not isinstance(tied, bool):
        raise ValueError(f"{path}: key 'tie_word_embeddings' is {tied!r}; it must be true or false")
    dim, n_heads = number("hidden_size"), number("num_attention_heads")
    n_layers = number("num_hidden_layers", most=1000)
    n_kv_heads, head_dim = number("num_key_value_heads", n_heads), number("head_dim", max(1, dim // n_heads))
    if n_heads % n_kv_heads or head_dim % 2:
        raise ValueError(f"{path}: {n_heads} heads over {n_kv_heads} KV heads of size {head_dim} do not divide evenly")
    if c.get("layer_types") not in (None, ["full_attention"] * n_layers):
        raise ValueError(
            f"{path}: key 'layer_types' is {c['layer_types']!r:.200}; only full attention in every layer is supported"
        )
    return Config(
        model_type=model_type, dim=dim, n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim,
        hidden_dim=number("intermediate_size"), vocab_size=number("vocab_size", most=2**24),
        norm_eps=number("rms_norm_eps", kind=float, most=1), max_len=number("max_position_embeddings", most=2**40),
        rope_theta=positive(theta, f"{path}: key 'rope_theta'", float, 1e12), rope_scaling=check_rope(rope),
        tied=tied, dtype=read_dtype(c, path),
    )  # fmt: skip


def check_architecture(c: dict, path) -> str:
    """Return our name of the architecture; raise ValueError if it is not supported."""
    names = c.get("architectures")
    architecture = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else str(names)
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"{path}: architecture {architecture!r} is not supported; supported are {known}")
    model_type = ARCHITECTURES[architecture]
    if c.get("model_type") not in (model_type, None):
        raise ValueError(f"{path}: key 'model_type' is {c['model_type']!r}, but {architecture} is {model_type!r}")
    return model_type


def read_dtype(c: dict, path):
    given = [c[key] for key in ("torch_dtype", "dtype") if c.get(key) is not None]
    name = str(given[0]).removeprefix("torch.") if given else "float32"
    if name not in DTYPES:
        raise ValueError(f"{path}: key 'torch_dtype' is {name!r}; supported are {', '.join(DTYPES)}")
    return DTYPES[name]


def rope_keys(c: dict, path) -> dict:
    """Gather what a config says of RoPE under its older and newer names; raise ValueError where it contradicts
    itself.
    """
    rope = {"rope_theta": c["rope_theta"]} if c.get("rope_theta") is not None else {}
    for key in ("rope_scaling", "rope_parameters"):
        part = {} if c.get(key) is None else c[key]
        if not isinstance(part, dict):
            raise ValueError(f"{path}: key {key!r} is {part!r}, not an object")
        for name, value in part.items():
            name = "rope_type" if name == "type" else name
            if value is not None and rope.setdefault(name, value) != value:
                raise ValueError(f"{path}: {name!r} is given twice, as {rope[name]!r} and as {value!r}; leave one")
    return rope


def check_rope(rope: dict) -> dict:
    """Return RoPE's scaling {"rope_type": ..., numbers as floats}; raise ValueError for a type or key not
    understood.
    """
    rope = {k: v for k, v in rope.items() if k not in NEUTRAL}
    kind = rope.pop("rope_type", None if rope else "default")
    if not isinstance(kind, str) or kind not in ROPE_KEYS:
        raise ValueError(f"rope_scaling type {kind!r} is not supported; supported are {', '.join(ROPE_KEYS)}")
    if unknown := set(rope) - {"original_max_position_embeddings", *ROPE_KEYS[kind]}:
        raise ValueError(
            f"rope_scaling key {min(unknown)!r} is not known for type {kind!r}; it may change the numbers"
        )
    numbers = {key: positive(rope.get(key), f"rope_scaling key {key!r}", float, 2**40) for key in ROPE_KEYS[kind]}
    if kind == "llama3" and numbers["high_freq_factor"] <= numbers["low_freq_factor"]:
        high, low = numbers["high_freq_factor"], numbers["low_freq_factor"]
        raise ValueError(f"rope_scaling key 'high_freq_factor' is {high}; it must be above low_freq_factor, {low}")
    return {"rope_type": kind, **numbers}


def positive(value, what: str, kind: type, most: float):
    """Return value as `kind`, int or float; raise ValueError unless it is a number above 0 and up to `most`."""
    number = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value <= most:  # so also for NaN
        raise ValueError(f"{what} is {value!r}; it must be a positive {kind.__name__} up to {most:g}")
    return kind(value)


def read_json(path: Path) -> dict:
    """Read a JSON object; raise FileNotFoundError or ValueError with the path."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a checkpoint is a folder in Hugging Face layout")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def stop_tokens(folder: Path, vocab_size: int) -> set[int]:
    """Return every id that ends an answer: Llama 3 has three, and generation_config.json lists them."""
    for path in (folder / "generation_config.json", folder / "config.json"):
        ids = read_json(path).get("eos_token_id") if path.is_file() else None
        ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
        if not all(type(i) is int and 0 <= i < vocab_size for i in ids):
            raise ValueError(
                f"{path}: key 'eos_token_id' is {ids!r}; it must be a token id below {vocab_size} or a list of them"
            )
        if ids:
            return set(ids)
    return set()
