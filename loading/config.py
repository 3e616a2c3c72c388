"""config.json, read strictly: every key must be known.

A key is read, or must have the one value that changes nothing, or is about something else. Any
other key is refused by name, because it may change the numbers.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from loading.files import positive, read_json
from loading.quantised import read_scheme
from loading.rope import ORIGINAL, check_rope, rope_keys, stretch
from model import DTYPES, Config


@dataclass(frozen=True)
class Family:
    """How a family differs from Llama, as data; the step asks what a layer has, not its family."""

    model_type: str
    adds: dict = field(default_factory=dict)  # fields of Config
    defaults: dict = field(
        default_factory=dict
    )  # keys that transformers adds where they are left out
    reads: tuple[str, ...] = ()  # keys of NEUTRAL that mean something here
    theta: float = 10000.0  # rope_theta where none is given
    rope: dict = field(default_factory=dict)  # rope_parameters where RoPE is not mentioned


FAMILIES = {
    "LlamaForCausalLM": Family("llama"),
    "Qwen2ForCausalLM": Family(
        "qwen2",
        adds={"qkv_bias": True},
        defaults={"use_sliding_window": False},
    ),
    "Qwen3ForCausalLM": Family(
        "qwen3",
        adds={"qk_norm": True},
        defaults={"head_dim": 128, "use_sliding_window": False},
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
        # the last is not used in SmolLM3
        reads=("no_rope_layers", "no_rope_layer_interval", "pretraining_tp"),
    ),
    "Phi3ForCausalLM": Family(
        "phi3",
        adds={"fused": True},
        defaults={ORIGINAL: 4096},
        reads=("partial_rotary_factor",),
    ),
}

# Keys that are read for every family.
READ = {
    *("architectures", "model_type", "torch_dtype", "dtype", "quantization_config"),
    *("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "rms_norm_eps"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias"),
    *("sliding_window", "layer_types", "tie_word_embeddings", "eos_token_id"),
    *("rope_theta", "rope_scaling", "rope_parameters", "max_position_embeddings", ORIGINAL),
}
# Keys that would change the numbers, or may, with the value that does not.
NEUTRAL = {
    "hidden_act": "silu",
    "activation": "swiglu",  # Falcon 3's second name of it
    "mlp_bias": False,
    "lm_head_bias": False,
    "use_sliding_window": False,
    "use_mrope": False,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "pretraining_tp": 1,
    "no_rope_layers": None,
    "no_rope_layer_interval": None,
    "llama_4_scaling_beta": None,
    "use_qk_norm": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "logit_scale": 1.0,
    "embedding_multiplier": 1.0,  # Granite's, as the next three
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
    "attention_multiplier": None,  # instead of 1 / sqrt(head_dim)
    "full_attn_mod": 1,  # of Phi-4-mini, as the next one
    "interpolate_factor": 1,
    "is_llama_config": True,
    "is_encoder_decoder": False,
    "tie_encoder_decoder": False,
    "add_cross_attention": False,
}
# Keys about training, the tokenizer, sampling, or how another program runs the model.
HARMLESS = {
    *("initializer_range", "gradient_checkpointing", "problem_type", "finetuning_task"),
    *("id2label", "label2id", "num_labels", "task_specific_params", "prefix", "is_decoder"),
    *("use_cache", "use_flash_attn", "use_bfloat16", "torchscript", "tf_legacy_loss", "auto_map"),
    *("attn_implementation", "return_dict", "return_dict_in_generate", "chunk_size_feed_forward"),
    *(
        "pruned_heads",
        "max_window_layers",
        "max_sequence_length",
        "model_max_length",
        "name_or_path",
    ),
    *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups"),
    *("temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty"),
    *("diversity_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids"),
    *("num_return_sequences", "remove_invalid_values", "suppress_tokens", "begin_suppress_tokens"),
    *("transformers.js_config",),
}
HARMLESS_NAMES = re.compile(  # of the same kinds, by how they begin or end
    r"(_|output_|tokenizer_|unsloth_).*|.*(_token_id|_version|dropout|dropout_prob|_pdrop)"
)

# Why a model cannot run: what its architecture, or a kind of its layers, is called; or keys it has.
CANNOT = {
    "its recurrent layers (linear attention, state space) keep one state of all tokens, "
    "which pruning would break": (
        "linear|mamba|rwkv|recurrent|qwen3next|qwen3_5|jamba|bamba|zamba|falconh1|nemotronh|lfm2"
        "|moehybrid|kimi",
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


def read_config(path: Path, rope_yarn: float = 0.0) -> Config:
    """Read config.json; rope_yarn: apply YaRN with this factor, which config.json does not ask for.

    Raises FileNotFoundError, or a ValueError that names the key.
    """
    return parse_config(read_json(path), path, rope_yarn)


def parse_config(given: dict, path, rope_yarn: float = 0.0) -> Config:
    """Return the Config of a config.json's keys; raise ValueError for what is not understood."""
    family = check_architecture(given, path)
    values = {**family.defaults, **given}
    if family.rope and not values.get("rope_scaling") and values.get("rope_parameters") is None:
        values["rope_parameters"] = family.rope
    if rope_yarn:
        values = stretch(values, rope_yarn, path)
    rope = rope_keys(values, path)
    keys = Keys(values, path)
    check_known(keys, rope, family)
    for key in NEUTRAL.keys() - {"partial_rotary_factor", *family.reads}:
        rope.pop(key, None)
    n_layers = keys.number("num_hidden_layers", most=1000)
    heads = read_heads(keys, rope)
    max_len = keys.number("max_position_embeddings", most=2**40)
    theta = positive(rope.pop("rope_theta", family.theta), keys.name("rope_theta"), float, 1e12)
    given_as = "rope_scaling" if values.get("rope_parameters") is None else "rope_parameters"
    where = f"{path}: {given_as}"
    scaling = check_rope(rope, family.model_type, max_len, heads["rotary_dim"], theta, where)
    if scaling["rope_type"] == "yarn":  # Qwen's cards add it and leave the shorter context in place
        max_len = max(max_len, int(scaling["factor"] * scaling[ORIGINAL]))
    check_full_attention(keys, family, n_layers, max_len)
    adds = {
        "qkv_bias": keys.flag("attention_bias"),
        "o_bias": keys.flag("attention_bias"),
        "no_rope": layers_without_rope(keys, n_layers),
        **family.adds,
    }
    return Config(
        model_type=family.model_type,
        dim=keys.number("hidden_size"),
        n_layers=n_layers,
        hidden_dim=keys.number("intermediate_size"),
        vocab_size=keys.number("vocab_size", most=2**24),
        norm_eps=keys.number("rms_norm_eps", kind=float, most=1),
        max_len=max_len,
        rope_theta=theta,
        rope_scaling=scaling,
        tied=keys.flag("tie_word_embeddings"),
        dtype=read_dtype(keys),
        scheme=read_scheme(keys.get("quantization_config"), keys.name("quantization_config")),
        **heads,
        **adds,
    )


class Keys:
    """The keys of a config.json, checked as they are read; errors name file, key and value."""

    def __init__(self, values: dict, path):
        self.values = values
        self.path = path

    def name(self, key: str) -> str:
        return f"{self.path}: key {key!r:.60}"

    def get(self, key: str):
        return self.values.get(key)

    def wrong(self, key: str, problem: str) -> ValueError:
        return ValueError(f"{self.name(key)} is {self.get(key)!r:.60}; {problem}")

    def number(self, key: str, default=None, kind=int, most=2**20):
        value = default if self.get(key) is None else self.get(key)
        return positive(value, self.name(key), kind, most)

    def flag(self, key: str) -> bool:
        if not isinstance(self.get(key), bool | None):
            raise self.wrong(key, "it must be true or false")
        return bool(self.get(key))


def check_architecture(values: dict, path) -> Family:
    """Return the family of a config.json; raise ValueError if it cannot run, with the reason."""
    names = values.get("architectures")
    if isinstance(names, list) and names and isinstance(names[0], str):
        architecture = names[0]
    else:
        architecture = str(names)
    kinds = values.get("layer_types")
    words = [str(kind) for kind in kinds] if isinstance(kinds, list) else []
    if architecture not in FAMILIES:
        words.append(architecture)
    for reason, (pattern, keys) in CANNOT.items():
        by_name = any(re.search(pattern, word.lower()) for word in words)
        if by_name or any(values.get(key) for key in keys):
            raise ValueError(f"{path}: {architecture:.60} cannot run here: {reason}")
    if architecture not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(
            f"{path}: architecture {architecture!r:.60} is not supported; supported are {known}"
        )
    family = FAMILIES[architecture]
    model_type = values.get("model_type")
    if model_type not in (family.model_type, None):
        raise ValueError(
            f"{path}: key 'model_type' is {model_type!r:.60}, "
            f"but {architecture} is {family.model_type!r}"
        )
    return family


def check_known(keys: Keys, rope: dict, family: Family) -> None:
    """Raise ValueError for a key that is not known, or has a value that changes the numbers."""
    for key, value in {**keys.values, **rope}.items():
        if value is None or key in READ or key in family.reads:
            continue
        if key in NEUTRAL:
            if value != NEUTRAL[key]:
                raise ValueError(
                    f"{keys.name(key)} is {value!r:.60}; only {NEUTRAL[key]!r} is supported"
                )
        elif key in keys.values and key not in HARMLESS and not HARMLESS_NAMES.fullmatch(key):
            raise keys.wrong(
                key, "Slim does not know it; if it does not change the numbers, take it out"
            )


def read_heads(keys: Keys, rope: dict) -> dict:
    """Return the fields of Config about heads; pops the share of a head that RoPE turns."""
    dim = keys.number("hidden_size")
    n_heads = keys.number("num_attention_heads")
    n_kv_heads = keys.number("num_key_value_heads", n_heads)
    head_dim = keys.number("head_dim", max(1, dim // n_heads))
    share = rope.pop("partial_rotary_factor", 1.0)
    rotary_dim = int(head_dim * positive(share, keys.name("partial_rotary_factor"), float, 1))
    if n_heads % n_kv_heads or head_dim % 2 or rotary_dim % 2 or not rotary_dim:
        raise ValueError(
            f"{keys.path}: {n_heads} heads over {n_kv_heads} KV heads of size {head_dim} "
            f"({rotary_dim} for RoPE) do not divide evenly"
        )
    return {
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "head_dim": head_dim,
        "rotary_dim": rotary_dim,
    }


def check_full_attention(keys: Keys, family: Family, n_layers: int, max_len: int) -> None:
    """Raise ValueError unless every layer sees the whole context."""
    has_switch = "use_sliding_window" in family.defaults  # which is off: see NEUTRAL
    if not has_switch and keys.number("sliding_window", max_len, most=2**40) < max_len:
        raise keys.wrong(
            "sliding_window",
            "only full attention is supported, so a window of the context's "
            f"{max_len:,} tokens or none",
        )
    if keys.get("layer_types") not in (None, ["full_attention"] * n_layers):
        raise keys.wrong("layer_types", "only full attention in every layer is supported")


def layers_without_rope(keys: Keys, n_layers: int) -> tuple[int, ...]:
    """Return the layers that SmolLM3 exempts from RoPE: listed with a 0, or every nth."""
    listed = keys.get("no_rope_layers")
    if listed is None:
        if keys.get("no_rope_layer_interval") is None:
            return ()
        every = keys.number("no_rope_layer_interval")
        return tuple(range(every - 1, n_layers, every))
    is_list = isinstance(listed, list) and len(listed) >= n_layers
    if not is_list or any(one not in (0, 1) for one in listed):
        raise keys.wrong(
            "no_rope_layers", f"it must list 1 (RoPE) or 0 (none) for {n_layers} layers"
        )
    return tuple(i for i in range(n_layers) if not listed[i])


def read_dtype(keys: Keys):
    given = [keys.get(key) for key in ("torch_dtype", "dtype") if keys.get(key) is not None]
    name = str(given[0]).removeprefix("torch.") if given else "float32"
    if name not in DTYPES:
        known = ", ".join(DTYPES)
        raise ValueError(f"{keys.name('torch_dtype')} is {name!r:.60}; supported are {known}")
    return DTYPES[name]
