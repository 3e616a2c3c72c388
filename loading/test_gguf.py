"""GGUF files: what transformers, tokenizers and gguf say of them; damaged ones are refused."""

import contextlib
import json
import os
import random
import re
import shutil
import struct
import sys
import tracemalloc
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import slim
import tokenizer
from conftest import ATOL, DATA, draw, make_checkpoint, needs_data
from loading import gguf_file, gguf_tokens
from loading.find import find_checkpoint
from loading.test_vocabulary import HARD, by_reference, random_text, trained
from loading.vocabulary import BYTE_OF, stop_tokens

gguf = pytest.importorskip("gguf", reason="the package gguf is missing")

HEADER = 2200  # bytes that a header of `small` has, or fewer
NAMES = {ours: theirs for theirs, ours in gguf_file.TENSORS.items()}


def gguf_name(name):
    """Translate Hugging Face's name of a tensor."""
    middle, _, end = name.rpartition(".")
    if not middle.startswith("model.layers."):
        return f"{NAMES[middle]}.{end}"
    _, _, number, rest = middle.split(".", 3)
    return f"blk.{number}.{NAMES[rest]}.{end}"


def in_pairs(weight, n_heads):
    """Put the rows that RoPE turns together side by side, as llama's files have them."""
    size = len(weight) // n_heads
    rows = []
    for head in range(n_heads):
        for i in range(size // 2):
            rows += [head * size + i, head * size + size // 2 + i]
    return weight[rows]


def write_gguf(path, folder, kind="F32", tokens=None, extra=None, **part):
    """Write a checkpoint folder's weights as a GGUF file, matrices in one type."""
    config = json.loads((folder / "config.json").read_text())
    arch = {"mistral": "llama"}.get(config["model_type"], config["model_type"])
    writer = gguf.GGUFWriter(path, arch)
    rope = config.get("rope_parameters") or {}
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    for key, value in (extra or {}).items():
        writer.add_key_value(key.format(arch=arch), value, type_of(value))
    (tokens or plain_tokens)(writer, config["vocab_size"])
    for name, weight in load_file(folder / "model.safetensors").items():
        if arch == "llama" and "_proj" in name and ("q_proj" in name or "k_proj" in name):
            key = "num_attention_heads" if "q_proj" in name else "num_key_value_heads"
            weight = in_pairs(weight, config[key])
        stored = gguf.GGMLQuantizationType["F32" if weight.dim() == 1 else kind]
        data = gguf.quantize(weight.float().numpy(), stored)
        writer.add_tensor(gguf_name(name), data, raw_dtype=stored)
    if arch == "llama" and rope.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(rope, size))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def type_of(value):
    kinds = {str: "STRING", float: "FLOAT32", bool: "BOOL", int: "UINT32"}
    return gguf.GGUFValueType[kinds[type(value)]]


def llama3_factors(rope, size):
    """Return what Llama 3.1 divides its frequencies by."""
    theta = rope["rope_theta"] ** (np.arange(0, size, 2) / size)
    turns = rope["original_max_position_embeddings"] / (2 * np.pi * theta)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clip(0, 1)
    return (1 / ((1 - kept) / rope["factor"] + kept)).astype(np.float32)


def plain_tokens(writer, n):
    """The smallest tokenizer: one whose text nobody asks for."""
    names = [*map(chr, range(33, 32 + n)), "!!"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(names)
    writer.add_token_types([1] * n)
    writer.add_token_merges(["! !"])
    writer.add_add_bos_token(False)


# ---- weights ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family",
    [
        *("llama2-mha", "llama3-gqa", "llama3.1-rope", "llama3.2-tied", "head-dim", "linear-rope"),
        *("yarn", "qwen2-bias", "qwen3", "mistral"),
    ],
)
def test_a_gguf_file_says_what_its_folder_says(checkpoints, tmp_path, family):
    """Rows in pairs, biases, norms of heads, a tied head, stretched RoPE: all from the file."""
    folder, model = checkpoints[family]
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    extra = {}
    if rope["rope_type"] in ("linear", "yarn"):
        extra["{arch}.rope.scaling.factor"] = rope["factor"]
    if rope["rope_type"] == "yarn":  # linear is what no type means
        extra["{arch}.rope.scaling.type"] = "yarn"
    if rope["rope_type"] == "yarn":
        original = rope["original_max_position_embeddings"]
        extra["{arch}.rope.scaling.original_context_length"] = original
    file = write_gguf(tmp_path / "a.gguf", folder, extra=extra)
    ids = draw(400)
    with torch.no_grad():
        want = model(torch.tensor([ids])).logits[0, -1]
    engine = slim.load(file, "cpu", "float32", "dense")
    torch.testing.assert_close(engine.prefill(ids), want, atol=ATOL[torch.float32], rtol=0)
    assert engine.config.tied == (family == "llama3.2-tied")


def test_frequencies_and_another_stretch_are_refused(checkpoints, tmp_path):
    """One of the two would be left out, and each answer be a little wrong."""
    extra = {"{arch}.rope.scaling.type": "linear", "{arch}.rope.scaling.factor": 4.0}
    file = write_gguf(tmp_path / "a.gguf", checkpoints["llama3.1-rope"][0], extra=extra)
    refused(file, "both rope_freqs.weight and rope.scaling")


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_types_are_widened_as_gguf_does(checkpoints, tmp_path, kind):
    """Against a folder of the values that the package gguf makes of the same bytes."""
    folder, _ = checkpoints["qwen2-bias"]
    plain = tmp_path / "plain"
    shutil.copytree(folder, plain)
    stored = gguf.GGMLQuantizationType[kind]
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if weight.dim() == 2:
            data = gguf.quantize(weight.numpy(), stored)
            weights[name] = torch.from_numpy(gguf.dequantize(data, stored).copy())
    save_file(weights, plain / "model.safetensors")
    file = write_gguf(tmp_path / "a.gguf", folder, kind)
    for dtype in ("float32", "bfloat16"):
        engines = [slim.load(place, "cpu", dtype, weights="full") for place in (file, plain)]
        got, want = (engine.prefill(draw(50)) for engine in engines)
        assert torch.equal(got, want)


def every_type():
    return [kind for kind in gguf.GGML_QUANT_SIZES if gguf_file.can_widen(kind)]


@pytest.mark.filterwarnings("ignore:overflow")  # scales are random
@pytest.mark.parametrize("kind", every_type(), ids=lambda kind: kind.name)
def test_any_part_of_a_matrix_is_as_gguf_widens_it(tmp_path, monkeypatch, kind):
    """Some rows at a time, in another order, and cut for a rank; on random bytes."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (24, 2 * block_bytes), np.uint8)
    values = data.view(np.uint16 if kind.name == "BF16" else np.float16)
    values[~np.isfinite(values.astype(np.float32)) | (values > 1e4)] = 0  # no inf, no NaN
    want = torch.from_numpy(gguf.dequantize(data, kind)).view(24, 2 * block)
    path = tmp_path / "rows"
    path.write_bytes(b"1234567" + data.tobytes())
    tensor = gguf_file.Stored(path, gguf_file.stamp(path), kind, want.shape, 7, 2 * block_bytes)
    order = rng.permutation(24)
    monkeypatch.setattr("loading.quantised.CHUNK", 10 * block)  # five rows
    same = dict(rtol=0, atol=0, equal_nan=True)
    for rows in (None, order):
        ordered = want if rows is None else want[rows]
        matrix = gguf_file.matrix(tensor, rows)
        torch.testing.assert_close(torch.cat([*matrix.chunks()]), ordered, **same)
        part = matrix.cut(0, [slice(3, 9), slice(20, 21)])
        found = torch.cat([*part.chunks()])
        torch.testing.assert_close(found, torch.cat([ordered[3:9], ordered[20:21]]), **same)
        found = torch.cat([*matrix.cut(1, [slice(1, block)]).chunks()])
        torch.testing.assert_close(found, ordered[:, 1:block], **same)
        assert bool(matrix.group) == (kind.name in ("Q4_0", "Q4_1", "Q4_K"))
        if matrix.group:
            q, scale, zero = (torch.cat(one) for one in zip(*matrix.groups()))
            assert q.dtype == torch.uint8 and q.max() < 16
            scale, zero = (one.repeat_interleave(32, 1) for one in (scale, zero))
            found = (q - 8.0) * scale + zero
            rounding = 1e-6 * float(scale.abs().max()) * 16
            torch.testing.assert_close(found, ordered, rtol=1e-5, atol=rounding)


def test_the_type_of_a_run_follows_the_file(checkpoints, tmp_path):
    folder, _ = checkpoints["llama3-gqa"]
    for kind, dtype in (("F32", "float32"), ("F16", "float16"), ("Q8_0", "bfloat16")):
        file = write_gguf(tmp_path / f"{kind}.gguf", folder, kind)
        config = gguf_file.as_folder(file)["config.json"]
        assert config["torch_dtype"] == dtype
        assert config["rms_norm_eps"] == 1e-6  # float32 in the file


def test_a_file_in_parts_is_one_model(tiny, tmp_path):
    """By any of their names; a part that is missing, another's or a copy is named."""
    whole = write_gguf(tmp_path / "whole.gguf", tiny)
    tensors = load_file(tiny / "model.safetensors")
    names = sorted(tensors)
    parts = []
    for i in range(3):
        folder = tmp_path / str(i)
        shutil.copytree(tiny, folder)
        save_file({name: tensors[name] for name in names[i::3]}, folder / "model.safetensors")
        extra = {"split.no": i, "split.count": 3}
        parts.append(tmp_path / f"m-0000{i + 1}-of-00003.gguf")
        write_gguf(parts[-1], folder, extra=extra)
    want = slim.load(whole, "cpu").prefill(draw(50))
    for part in parts:
        assert torch.equal(slim.load(part, "cpu").prefill(draw(50)), want)
    part = parts[1]
    kept = part.read_bytes()
    part.unlink()
    with pytest.raises(FileNotFoundError, match="m-00002-of-00003.gguf is missing"):
        slim.load(parts[0], "cpu")
    part.symlink_to(parts[0])  # a circle: it would lead to itself for ever
    with pytest.raises(ValueError, match="calls itself part 0 of 3"):
        slim.load(parts[0], "cpu")
    part.unlink()
    part.symlink_to(part)
    with pytest.raises(FileNotFoundError, match="is missing"):
        slim.load(parts[0], "cpu")
    (tmp_path / "alone.gguf").write_bytes(kept)
    with pytest.raises(ValueError, match="is one of 3 parts"):
        slim.load(tmp_path / "alone.gguf", "cpu")


def test_a_gguf_file_is_found_by_path_name_and_folder(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("SLIM_CHECKPOINTS", str(tmp_path))
    file = write_gguf(tmp_path / "a.b.gguf", tiny)
    assert find_checkpoint(file) == find_checkpoint("a.b") == find_checkpoint("a.b.gguf") == file
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "one-00001-of-00002.gguf").touch()
    (folder / "one-00002-of-00002.gguf").touch()
    assert find_checkpoint(folder).name == "one-00001-of-00002.gguf"
    (folder / "two.gguf").touch()
    with pytest.raises(ValueError, match="holds 2 models; name one of one-00001"):
        find_checkpoint(folder)
    (folder / "config.json").touch()
    assert find_checkpoint(folder) == folder
    file.rename(tmp_path / "sha256-123")  # as some programs keep them
    assert find_checkpoint(tmp_path / "sha256-123").name == "sha256-123"
    (tmp_path / "text").write_text("a text")
    with pytest.raises(ValueError, match="is a file, and not GGUF"):
        find_checkpoint(tmp_path / "text")


def test_a_conversation_is_saved_and_a_changed_file_is_noticed(tiny, tmp_path):
    """The identity of the weights is the file's; bytes of two files never mix."""
    file = write_gguf(tmp_path / "a.gguf", tiny, "Q8_0")
    engine = slim.load(file, "cpu", "float32", "dense")
    engine.prefill(draw(50))
    engine.save(tmp_path / "talk.slim")
    slim.load(file, "cpu", "float32", "dense").resume(tmp_path / "talk.slim")
    ckpt = engine.ckpt
    write_gguf(file, tiny, "Q4_0")
    with pytest.raises(ValueError, match="changed while it was read"):
        slim.start(ckpt)
    other = slim.load(file, "cpu", "float32", "dense")
    with pytest.raises(ValueError, match="other weights"):
        other.resume(tmp_path / "talk.slim")


# ---- tokenizers ---------------------------------------------------------------------------

PRES = {"smollm2": "smollm", "qwen": "qwen2", "llama3": "llama-bpe", "tekken": "tekken"}


def tokens_of(reference, pre, **ids):
    """Return a function that writes the tokenizer of the library `tokenizers`."""
    model = json.loads(reference.to_str())
    added = {token["id"]: token for token in model["added_tokens"]}

    def write(writer, n):
        names = [reference.id_to_token(i) or f"[PAD{i}]" for i in range(n)]
        kinds = [1 if i < reference.get_vocab_size() else 5 for i in range(n)]
        for i, token in added.items():
            kinds[i] = 3 if token["special"] else 4
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(names)
        writer.add_token_types(kinds)
        pairs = model["model"]["merges"]
        writer.add_token_merges(
            [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs]
        )
        writer.add_chat_template("{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}")
        for key, id in ids.items():
            getattr(writer, f"add_{key}")(id)

    return write


def sized(tmp_path, n):
    """Return a folder with a checkpoint of n tokens."""
    make_checkpoint(tmp_path / "folder", layers=1, vocab=n)
    return tmp_path / "folder"


@pytest.mark.parametrize("kind", PRES)
def test_a_tokenizer_in_a_file_gives_the_ids_of_hugging_face(tmp_path, kind):
    """All four ways to split a text, with tokens that a text gives and rows that none has."""
    reference = trained(kind)
    n = reference.get_vocab_size() + 5
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    if kind == "qwen":
        start = reference.token_to_id("<|im_start|>")
        ids = {"bos_token_id": start, "eos_token_id": start + 1}
    file = write_gguf(
        tmp_path / "a.gguf", sized(tmp_path, n), tokens=tokens_of(reference, PRES[kind], **ids)
    )
    tok = tokenizer.load(file, n)
    rng = random.Random(0)
    n_texts = int(os.environ.get("SLIM_STRINGS", "500"))
    for text in HARD + [random_text(rng) for _ in range(n_texts)]:
        assert tok.encode(text) == by_reference(kind, text), text
    names = {key: reference.id_to_token(id) for key, id in ids.items()}
    starts_with_bos = kind in ("llama3", "tekken")
    assert tok.bos_id == (ids["bos_token_id"] if starts_with_bos else None)
    text = f"{names['bos_token_id']}hi{names['eos_token_id']}"
    assert tok.template.render([{"role": "user", "content": "hi"}]) == text
    assert stop_tokens(file, n) >= {ids["eos_token_id"]}


@needs_data
@pytest.mark.parametrize("name, golden", [("llama3", "llama3-bpe"), ("llama2", "llama2-spm")])
def test_real_vocabularies_in_a_file_give_the_goldens(name, golden):
    """As llama.cpp writes them: merges for Llama 3, pieces with scores for Llama 2."""
    real = tokenizer.load(DATA / name)
    facts = llama3_facts(real) if name == "llama3" else llama2_facts()
    files = gguf_tokens.make_files(Path("a.gguf"), facts)
    with held(files) as folder:
        tok = tokenizer.load(folder)
        rng = random.Random(0)
        texts = (DATA / f"goldens/{golden}.inp").read_bytes().decode()
        texts = texts.split("\n__ggml_vocab_test__\n")[:46]
        lines = (DATA / f"goldens/{golden}.out").read_text().splitlines()
        assert [tok.encode(text) for text in texts] == [list(map(int, i.split())) for i in lines]
        for _ in range(int(os.environ.get("SLIM_STRINGS", "500"))):
            text = random_text(rng)
            ids = tok.encode(text)
            assert ids == real.encode(text), text
            assert tok.decode(ids) == real.decode(ids)
        assert tok.bos_id == real.bos_id and tok.special.items() <= real.special.items()


@contextlib.contextmanager
def held(files):
    """Give a path that stands for a folder with these files."""
    path = Path(__file__)
    with mock.patch.object(gguf_file, "as_folder", lambda folder: files if folder == path else {}):
        yield path


def llama2_facts():
    """Return what a GGUF file says of Llama 2's sentencepiece model."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(DATA / "llama2/tokenizer.model"))
    kinds = []
    ids = range(model.vocab_size())
    for id in ids:
        kind = 2 if model.is_unknown(id) else 3 if model.is_control(id) else 1
        kinds.append(6 if model.is_byte(id) else kind)
    facts = {
        "model": "llama",
        "tokens": [model.id_to_piece(id) for id in ids],
        "scores": [model.get_score(id) for id in ids],
        "token_type": kinds,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in facts.items()}


def llama3_facts(real):
    """Return what a GGUF file says of Llama 3's ranks: every pair of tokens that makes another."""
    ranks = real.v.ranks
    letters = {byte: char for char, byte in BYTE_OF.items()}

    def spelled(word):
        return "".join(letters[byte] for byte in word)

    merges = []
    for word in ranks:
        pairs = [(word[:i], word[i:]) for i in range(1, len(word))]
        pairs = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        pairs.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [" ".join(map(spelled, pair)) for pair in pairs]
    facts = {
        "model": "gpt2",
        "pre": "llama-bpe",
        "tokens": [*map(spelled, ranks), *real.special],
        "token_type": [1] * len(ranks) + [3] * len(real.special),
        "merges": merges,
        "bos_token_id": real.bos_id,
        "eos_token_id": real.bos_id + 1,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in facts.items()}


# ---- what is refused ----------------------------------------------------------------------


def changed(writes, **facts):
    """Return a tokenizer's writer that adds facts, or takes those that are None."""

    def write(writer, n):
        writes(writer, n)
        for key, value in facts.items():
            key = f"tokenizer.ggml.{key}"
            for part in writer.kv_data:
                part.pop(key, None)
            if value is not None:
                writer.add_key_value(key, value, type_of(value))

    return write


REFUSED = {  # what the line must name: (facts of the model, facts of the tokenizer)
    "architecture 'gemma3' is not supported": ({"general.architecture": "gemma3"}, {}),
    "mixture of experts": ({"{arch}.expert_count": 8}, {}),
    "sliding_window": ({"{arch}.attention.sliding_window": 512}, {}),
    "'llama.logit_scale' is 8.0": ({"{arch}.logit_scale": 8.0}, {}),
    "short_factor": ({"{arch}.rope.scaling.type": "longrope"}, {}),
    "llama.rope.scaling": ({"{arch}.rope.scaling.attn_factor": 2.0}, {}),
    "rope.dimension_count is 4": ({"{arch}.rope.dimension_count": 4}, {}),
    "attention.value_length is 16": ({"{arch}.attention.value_length": 16}, {}),
    "key 'num_hidden_layers' is 0": ({"{arch}.block_count": 0}, {}),
    "key 'hidden_size' is 'x'": ({"{arch}.embedding_length": "x"}, {}),
    "general.alignment is 24": ({"general.alignment": 24}, {}),
    "pre is 'default'; supported are llama-bpe": ({}, {"pre": "default"}),
    "pre is None": ({}, {"pre": None}),
    "tokenizer 'bert' is not supported": ({}, {"model": "bert"}),
    "no tokenizer": ({}, {"tokens": None}),
    "whose tokens have no types": ({}, {"token_type": None}),
    "there are no merges": ({}, {"merges": None}),
    "eos_token_id is 99": ({}, {"eos_token_id": 99}),
    "tokens without scores": ({}, {"model": "llama"}),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_slim_cannot_do_is_refused_by_name(tiny, tmp_path, words):
    """Before weights are read, with what is wrong and its value."""
    extra, tokens = REFUSED[words]
    file = tmp_path / "a.gguf"

    def write(writer, n):
        changed(plain_tokens, **tokens)(writer, n)
        for key, value in extra.items():
            key = key.format(arch="llama")
            writer.kv_data[0].pop(key, None)
            writer.add_key_value(key, value, type_of(value))
        writer.data_alignment = 32

    write_gguf(file, tiny, tokens=write)
    refused(file, words)


def refused(file, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words) as raised:
        slim.load(file, "cpu")
        tokenizer.load(file)
    message = str(raised.value)
    assert str(file.parent) in message and "\n" not in message and len(message) < 600


# ---- damage -------------------------------------------------------------------------------


def text(data):
    return struct.pack("<Q", len(data)) + data


def header(*facts, tensors=(), n_facts=None, n_tensors=None, version=3):
    """Return the bytes of a small file: facts and tensors as bytes, counts that may be wrong."""
    n_tensors = len(tensors) if n_tensors is None else n_tensors
    n_facts = len(facts) if n_facts is None else n_facts
    start = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_facts)
    return start + b"".join(facts) + b"".join(tensors)


def array(kind, n):
    return text(b"a") + struct.pack("<IIQ", 9, kind, n)


def tensor(name=b"token_embd.weight", shape=(32, 2), kind=0, offset=0):
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dims + struct.pack("<IQ", kind, offset)


U32 = text(b"k") + struct.pack("<II", 4, 1)
HUGE = 2**60
DAMAGED = {  # what is in the file: (its bytes, what the line must say)
    "nothing": (b"", "no GGUF file: it starts with b''"),
    "a pickle": (b"\x80\x04\x95", "no GGUF file"),
    "version 1": (header(version=1), "version 1 is not"),
    "big-endian": (header(version=3 << 24), "version 50331648 is not"),
    "a cut": (header(U32)[:-2], "asks for 4 bytes"),
    "2^60 facts": (header(U32, n_facts=HUGE), "claims 0 tensors and 1,152,921,504,606,846,976"),
    "2^60 tensors": (header(n_tensors=HUGE), "claims 1,152,921,504,606,846,976 tensors"),
    "more facts than there are": (header(U32, n_facts=2), "asks for 8 bytes"),
    "a text of 2 GiB": (header(struct.pack("<Q", 2**31)), "asks for 2,147,483,648 bytes"),
    "a text of 2^63": (header(struct.pack("<Q", 2**63)), "asks for 9,223,372,036,854,775,808"),
    "2^60 numbers": (header(array(10, HUGE)), "asks for 9,223,372,036,854,775,808"),
    "2^60 texts": (header(array(8, HUGE)), "lists 1,152,921,504,606,846,976 texts"),
    "a list of lists": (header(array(9, 1)), "type 9, which is not known"),
    "an unknown type": (header(text(b"k") + struct.pack("<I", 77)), "type 77"),
    "a name twice": (header(U32, U32), "gives 'k' twice"),
    "no UTF-8": (header(text(b"\xff\xfe")), "is not UTF-8"),
    "a tensor twice": (header(tensors=[tensor()] * 2), "stands twice"),
    "three dimensions": (header(tensors=[tensor(shape=(1, 2, 3))]), "has 3 dimensions"),
    "2^32 dimensions": (header(tensors=[text(b"t") + b"\xff" * 4]), "has 4294967295 dimensions"),
    "an unknown tensor type": (header(tensors=[tensor(kind=999)]), "type 999, which this version"),
    "a type without values": (header(tensors=[tensor(kind=26)]), "type I32, which cannot"),
    "a block cut": (header(tensors=[tensor(shape=(31, 2), kind=2)]), "not made of blocks of 32"),
    "no rows": (header(tensors=[tensor(shape=(32, 0))]), "ends at byte"),
    "2^63 rows": (header(tensors=[tensor(shape=(32, 2**63))]), "ends at byte"),
    "an offset outside": (header(tensors=[tensor(offset=HUGE)]), "ends at byte"),
    "an end outside": (header(tensors=[tensor()]), "ends at byte"),
    "no architecture": (header(U32), "architecture None is not supported"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_header_is_refused_in_one_line(tmp_path, what):
    """Before memory is taken for what it claims."""
    data, words = DAMAGED[what]
    file = tmp_path / "a.gguf"
    file.write_bytes(data)
    tracemalloc.start()
    refused(file, re.escape(words))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The bytes of a file with a model of one layer, and a place to write a damaged one."""
    folder = tmp_path_factory.mktemp("small")
    make_checkpoint(folder, layers=1, vocab=40)
    file = write_gguf(folder / "a.gguf", folder)
    return file.read_bytes(), file


EDITS = st.lists(
    st.tuples(
        st.floats(0, 1),
        st.sampled_from(["flip", "cut", "insert", "number"]),
        st.integers(0, 2**64 - 1),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=300, deadline=None)
@given(edits=EDITS)
def test_any_damage_is_one_line_or_a_model(small, edits):
    """Bytes flipped, cut, inserted or replaced by a number anywhere in the header."""
    whole, file = small
    data = bytearray(whole)
    for place, edit, number in edits:
        at = int(place * HEADER)
        if edit == "flip":
            data[at] ^= 1 << number % 8
        elif edit == "cut":
            del data[at : at + number % 40]
        elif edit == "insert":
            data[at:at] = number.to_bytes(8, "little")[: number % 8]
        else:
            data[at : at + 8] = number.to_bytes(8, "little")
    file.write_bytes(data)
    tracemalloc.start()
    try:
        slim.load(file, "cpu", "float32", "dense")
    except (ValueError, FileNotFoundError) as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**25


def test_a_cut_at_any_byte_is_refused(small):
    """A download that stopped is never a model."""
    whole, file = small
    for n in [*range(0, HEADER, 97), len(whole) - 1]:
        file.write_bytes(whole[:n])
        with pytest.raises(ValueError):
            slim.load(file, "cpu")


def test_a_missing_package_is_named(tiny, tmp_path):
    """It is needed for GGUF alone: nothing else imports it."""
    file = write_gguf(tmp_path / "a.gguf", tiny)
    with mock.patch.dict(sys.modules, gguf=None):
        with pytest.raises(ValueError, match="needs the package gguf, which is missing; pip inst"):
            slim.load(file, "cpu")
        slim.load(tiny, "cpu")


# ---- real files ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct"])
def test_a_real_file_says_what_transformers_says(name):
    """$SLIM_GGUF names a folder that holds the files; transformers reads them in its own way."""
    file = Path(os.environ.get("SLIM_GGUF", "no-folder")) / f"{name}.gguf"
    if not file.is_file():
        pytest.skip(f"$SLIM_GGUF does not name a folder with {file.name}")
    pytest.importorskip("accelerate", reason="transformers reads GGUF with accelerate")
    engine = slim.load(file, "cpu", "float32", "dense")
    auto = transformers.AutoModelForCausalLM
    reference = auto.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    ids = engine.tokenizer.chat("Write a Python function that reverses a list.")
    with torch.no_grad():
        want = reference(torch.tensor([ids])).logits[0, -1]
    torch.testing.assert_close(engine.prefill(ids), want, atol=1e-3, rtol=0)
    ours = list(engine.generate(ids, max_new_tokens=30))
    with torch.no_grad():
        theirs = reference.generate(torch.tensor([ids]), max_new_tokens=30, do_sample=False)
    assert ours == theirs[0, len(ids) :].tolist()[: len(ours)]
    assert len(ours) > 10
