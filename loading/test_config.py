"""What config.json says is what transformers makes of it, or it is refused by name."""

import json
import re

import pytest
import transformers

from conftest import edit_json
from loading.config import read_config


def test_ministral3_that_says_nothing_of_rope_has_the_yarn_of_transformers(checkpoints, tmp_path):
    folder, _ = checkpoints["ministral3"]
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    edit_json(tmp_path / "config.json", rope_parameters="remove")
    theirs = transformers.Ministral3Config.from_pretrained(tmp_path)
    silent = read_config(tmp_path / "config.json")
    assert silent.rope_theta == 1e6 and silent.rope_scaling["rope_type"] == "yarn"
    edit_json(tmp_path / "config.json", rope_parameters=theirs.rope_parameters | {"type": None})
    assert silent == read_config(tmp_path / "config.json")
    edit_json(tmp_path / "config.json", rope_parameters=None)
    assert silent == read_config(tmp_path / "config.json")
    with pytest.raises(ValueError, match="scales RoPE itself"):
        read_config(tmp_path / "config.json", 4.0)


def test_yarn_on_request_is_what_the_config_would_say(checkpoints, tmp_path):
    """Qwen3's 40,960 are 32,768 and room for an answer: its authors stretch the 32,768."""
    folder, _ = checkpoints["qwen3"]
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    edit_json(tmp_path / "config.json", max_position_embeddings=40960)
    asked = read_config(tmp_path / "config.json", 4.0)
    rope = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
    }
    for written in (
        131072,
        40960,
        32768,
    ):  # Qwen's cards add YaRN and leave the shorter context as it is
        edit_json(tmp_path / "config.json", max_position_embeddings=written, rope_parameters=rope)
        assert asked == read_config(tmp_path / "config.json"), written
    edit_json(
        tmp_path / "config.json", rope_parameters="remove", rope_scaling=rope, rope_theta=10000.0
    )
    assert asked == read_config(tmp_path / "config.json")
    with pytest.raises(ValueError, match="scales RoPE itself"):
        read_config(tmp_path / "config.json", 4.0)
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    edit_json(
        tmp_path / "config.json",
        rope_parameters=plain,
        rope_scaling=plain,
        max_position_embeddings=40960,
    )
    edit_json(
        tmp_path / "config.json", original_max_position_embeddings=4096
    )  # of an older stretch
    assert asked == read_config(tmp_path / "config.json", 4.0)


def test_a_window_must_cover_what_yarn_stretches_the_context_to(checkpoints, tmp_path):
    folder, _ = checkpoints["mistral"]
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    rope = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 4096,
    }
    edit_json(tmp_path / "config.json", rope_parameters=rope, sliding_window=16384)
    assert read_config(tmp_path / "config.json").max_len == 16384
    edit_json(tmp_path / "config.json", sliding_window=4096)
    with pytest.raises(ValueError, match="sliding_window"):
        read_config(tmp_path / "config.json")


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    "rope, said",
    [
        ({"rope_type": "dynamic"}, "type 'dynamic'"),
        ({"rope_type": "linear", "factor": "x"}, "key 'factor'"),
        ({"rope_type": "yarn", "factor": 2.0, "truncate": 1}, "key 'truncate'"),
    ],
)
def test_what_is_wrong_with_rope_names_the_file_and_its_key(tiny, tmp_path, key, rope, said):
    (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())
    edit_json(tmp_path / "config.json", rope_parameters="remove")
    edit_json(tmp_path / "config.json", **{key: rope})
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'config.json'}: {key} {said}")):
        read_config(tmp_path / "config.json")


@pytest.mark.parametrize("name", ["su", "yarn", "longrope"])
def test_older_names_of_longrope_are_longrope(checkpoints, tmp_path, name):
    """As in Phi-3's first files, and as transformers reads them."""
    folder, _ = checkpoints["phi3-longrope"]
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    shared = "short_factor", "long_factor", "original_max_position_embeddings"
    old = {"type": name, **{key: rope[key] for key in shared}}
    edit_json(
        tmp_path / "config.json", rope_parameters="remove", rope_scaling=old, rope_theta=10000.0
    )
    assert (
        transformers.Phi3Config.from_pretrained(tmp_path).rope_parameters["rope_type"] == "longrope"
    )
    assert read_config(tmp_path / "config.json") == read_config(folder / "config.json")


LONG = ["x" * 10_000]


@pytest.mark.parametrize(
    "keys",
    [
        {"hidden_size": LONG},
        {"attention_bias": LONG},
        {"dtype": LONG},
        {"model_type": LONG},
        {"rope_scaling": LONG},
        {"layer_types": LONG},
        {"hidden_act": LONG},
        {"rope_theta": LONG},
        {"rope_scaling": {"type": LONG}},
        {"rope_scaling": {"type": "linear", LONG[0]: 1}},
        {"rope_parameters": {"type": "linear", "factor": LONG}},
        {"rope_parameters": {"type": "yarn", "factor": 2.0, "truncate": LONG}},
        {"architectures": LONG},
        {"quantization_config": LONG},
        {"sliding_window": LONG},
        {"no_rope_layers": LONG},
    ],
)
def test_a_long_value_is_cut_in_the_line_about_it(tiny, tmp_path, keys):
    (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())
    edit_json(tmp_path / "config.json", rope_parameters="remove")
    edit_json(tmp_path / "config.json", **keys)
    with pytest.raises(ValueError) as error:
        read_config(tmp_path / "config.json")
    assert len(str(error.value)) < 500 + len(str(tmp_path))


def edited(folder, tmp_path, **keys):
    """Return the config of a checkpoint with other keys."""
    path = tmp_path / "config.json"
    path.write_bytes((folder / "config.json").read_bytes())
    edit_json(path, **keys)
    return read_config(path)


@pytest.mark.parametrize(
    "key, value",
    [
        ("clip_qkv", 8.0),
        ("bias", True),
        ("attention_sinks", 4),
        ("embedding_scale", 2.0),
        ("num_nextn_predict_layers", 1),
        ("quantization", {"bits": 4}),
        ("activation", "relu"),
        ("interpolate_factor", 2),
        ("is_encoder_decoder", True),
        ("a new key", False),
    ],
)
def test_a_key_that_is_not_known_is_refused_by_name(tiny, tmp_path, key, value):
    """A list of known dangers lets the next one through, so every key must be known."""
    with pytest.raises(ValueError, match=f"key {key!r} is "):
        edited(tiny, tmp_path, **{key: value})
    assert edited(tiny, tmp_path, **{key: None}) == read_config(tiny / "config.json")


@pytest.mark.parametrize(
    "key, neutral, wrong",
    [
        ("logits_scaling", 1.0, 8.0),
        ("logits_scaling", 1, 0),
        ("residual_multiplier", 1.0, 0.22),
        ("embedding_multiplier", 1.0, 12.0),
        ("attention_multiplier", None, 0.0078125),
        ("attn_logit_softcapping", None, 50.0),
        ("final_logit_softcapping", None, 30.0),
        ("logit_scale", 1.0, 0.0625),
        ("use_qk_norm", False, True),
    ],
)
def test_scales_and_caps_pass_where_they_change_nothing(tiny, tmp_path, key, neutral, wrong):
    """Keys of Granite, Gemma 2 and Cohere, which a converted checkpoint keeps."""
    assert edited(tiny, tmp_path, **{key: neutral}) == read_config(tiny / "config.json")
    with pytest.raises(ValueError, match=f"key {key!r} is {wrong}; only"):
        edited(tiny, tmp_path, **{key: wrong})


PUBLISHED = {  # keys of published files that say nothing of the numbers
    "llama3-gqa": """pretraining_tp use_cache initializer_range attention_dropout bos_token_id
        pad_token_id transformers_version _name_or_path _attn_implementation_autoset mlp_bias
        max_sequence_length unsloth_version unsloth_fixed is_llama_config rope_interleaved
        transformers.js_config temperature top_p max_length auto_map activation use_flash_attn
        _commit_hash tokenizer_class""",
    "qwen2-bias": """attention_dropout max_window_layers use_mrope use_sliding_window
        initializer_range""",
    "qwen3": "attention_dropout max_window_layers use_sliding_window torch_dtype pad_token_id",
    "mistral": "sliding_window attention_dropout use_cache",
    "smollm3": "max_window_layers pretraining_tp mlp_bias attention_dropout use_sliding_window",
    "phi3": """embd_pdrop resid_pdrop full_attn_mod interpolate_factor lm_head_bias mlp_bias
        auto_map partial_rotary_factor attention_dropout""",
}
VALUES = {
    "pretraining_tp": 1,
    "is_llama_config": True,
    "rope_interleaved": False,
    "mlp_bias": False,
    "lm_head_bias": False,
    "use_mrope": False,
    "use_sliding_window": False,
    "sliding_window": None,
    "activation": "swiglu",
    "full_attn_mod": 1,
    "interpolate_factor": 1,
    "torch_dtype": "float32",
    "partial_rotary_factor": 1.0,
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_keys_of_published_configs_are_known(checkpoints, tmp_path, family):
    folder, _ = checkpoints[family]
    keys = {key: VALUES.get(key, 0.5) for key in PUBLISHED[family].split()}
    assert edited(folder, tmp_path, **keys) == read_config(folder / "config.json")


def test_every_key_that_transformers_writes_is_known(checkpoints, tmp_path):
    """Also those at their defaults, which it leaves out of a file by itself."""
    for folder, reference in checkpoints.values():
        config = read_config(folder / "config.json")
        assert edited(folder, tmp_path, **reference.config.to_dict()) == config
