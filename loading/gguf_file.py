"""A GGUF file, read as if it were a folder in Hugging Face layout.

`as_folder` returns the small files that such a folder has, made from the file's own header;
`open_tensors` the weights under Hugging Face's names. The header is checked as it is read: every
number in it may be wrong, so nothing is allocated or followed that the file's size does not cover.
"""

import functools
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from loading import gguf_tokens, gguf_types
from loading.files import stamp
from loading.quantised import Held, Matrix
from loading.rope import ORIGINAL

MAGIC = b"GGUF"
VERSIONS = 2, 3
MOST = 2**25  # bytes of a header; 150,000 tokens with their merges take 6 MB
MOST_ENTRIES = 2**16  # tensors, or facts
NUMBERS = {  # GGUF's number of a type: numpy's name of it
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
STRING = 8
ARRAY = 9
PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",  # Mistral too
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
CONFIG_KEYS = {  # after the architecture's name: of config.json
    "vocab_size": "vocab_size",
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
    "expert_count": "num_local_experts",
}
ROPE_KEYS = {  # after rope.scaling: of rope_parameters
    "type": "rope_type",
    "factor": "factor",
    "original_context_length": ORIGINAL,
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
TENSORS = {  # Hugging Face's names, of a layer without its number
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
LENGTH = struct.Struct("<Q")  # before a text
TEXT_BYTES = 2**20  # that are read at a time
FREQUENCIES = "rope_freqs.weight"  # what each of RoPE's frequencies is divided by
DTYPES = {"F32": "float32", "F16": "float16"}  # of a run, by the type of a matrix; else bfloat16


# ---- the header -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """A tensor as the header describes it, checked against the size of the file."""

    path: Path
    version: tuple  # of the file, see `stamp`
    kind: object  # a gguf.GGMLQuantizationType
    shape: tuple[int, ...]  # (rows, columns) or (numbers,)
    offset: int  # of its first byte in the file
    row_bytes: int


class Reader:
    """Reads a header from front to back, and never more than the file has."""

    def __init__(self, path: Path, file):
        self.path = path
        self.file = file
        self.size = path.stat().st_size
        self.at = 0

    def bad(self, what: str) -> ValueError:
        return ValueError(f"{self.path} is damaged: {what}; download it again")

    def left(self) -> int:
        """Return how many bytes of a header may still come."""
        return min(self.size, MOST) - self.at

    def take(self, n: int) -> bytes:
        if n > self.left():
            raise self.bad(
                f"its header asks for {n:,} bytes at byte {self.at:,}, and the file has "
                f"{self.size:,}, of which a header may be {MOST:,}"
            )
        data = self.file.read(n)
        self.at += n
        if len(data) < n:
            raise self.bad("it became shorter while it was read")
        return data

    def number(self, kind: str = "<I") -> int:
        return struct.unpack(kind, self.take(struct.calcsize(kind)))[0]

    def text(self) -> str:
        return self.decode(self.take(self.number("<Q")))

    def decode(self, data: bytes) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise self.bad(f"{data[:40]!r} at byte {self.at:,} is not UTF-8") from None

    def texts(self, n: int) -> list[str]:
        """Return n texts, cut from pieces of the file: 300,000 calls of `text` take a second."""
        found = []
        while len(found) < n:
            piece = self.file.read(min(TEXT_BYTES, self.left()))
            at = 0  # in the piece
            while len(found) < n and at + 8 <= len(piece):
                end = at + 8 + LENGTH.unpack_from(piece, at)[0]
                if end > len(piece):
                    break
                found.append(self.decode(piece[at + 8 : end]))
                at = end
            self.at += at
            self.file.seek(self.at)
            if at == 0:  # the next one is longer than a piece, or than the file
                found.append(self.text())
        return found

    def value(self):
        """Return what stands behind a key: a number, a text, or a list of either."""
        kind = self.number()
        if kind != ARRAY:
            return self.values(kind, 1)[0]
        kind = self.number()
        return self.values(kind, self.number("<Q"))

    def values(self, kind: int, n: int) -> list:
        if kind == STRING:
            if n > MOST // 8:
                raise self.bad(f"it lists {n:,} texts at byte {self.at:,}")
            return self.texts(n)
        if kind not in NUMBERS:
            raise self.bad(f"a value at byte {self.at:,} has the type {kind}, which is not known")
        dtype = np.dtype(NUMBERS[kind])
        found = np.frombuffer(self.take(n * dtype.itemsize), dtype)
        return found if n > 1 else found.tolist()  # numpy's take an eighth of the memory


def read_header(path: Path) -> tuple[dict, dict[str, Stored]]:
    """Return the facts and the tensors of one GGUF file; raise ValueError for anything else."""
    with path.open("rb") as file:
        reader = Reader(path, file)
        start = file.peek(4)[:4]
        if start != MAGIC:
            raise ValueError(f"{path} is no GGUF file: it starts with {start!r}, not {MAGIC!r}")
        reader.take(4)
        version = reader.number()
        if version not in VERSIONS:
            raise ValueError(
                f"{path}: GGUF version {version} is not supported, only 2 and 3, little-endian; "
                "convert the model anew"
            )
        n_tensors = reader.number("<Q")
        n_facts = reader.number("<Q")
        if max(n_tensors, n_facts) > MOST_ENTRIES:
            raise reader.bad(f"it claims {n_tensors:,} tensors and {n_facts:,} facts")
        facts = {}
        for _ in range(n_facts):
            key = reader.text()
            if key in facts:
                raise reader.bad(f"it gives {key!r:.60} twice")
            facts[key] = reader.value()
        return facts, read_tensors(reader, n_tensors, facts)


def read_tensors(reader: Reader, n: int, facts: dict) -> dict[str, Stored]:
    found = {}
    for _ in range(n):
        name = reader.text()
        n_dims = reader.number()
        if name in found or n_dims not in (1, 2):
            raise reader.bad(f"tensor {name!r:.60} stands twice or has {n_dims} dimensions")
        shape = [reader.number("<Q") for _ in range(n_dims)]
        found[name] = shape[::-1], reader.number(), reader.number("<Q")
    step = facts.get("general.alignment", 32)
    if type(step) is not int or step < 1 or step & (step - 1):
        raise reader.bad(f"general.alignment is {step!r:.40}, no power of two")
    start = -(-reader.at // step) * step
    version = stamp(reader.path)
    tensors = {}
    for name, (shape, kind, offset) in found.items():
        tensors[name] = check_tensor(reader, version, name, shape, kind, start + offset)
        if offset % step:
            raise reader.bad(f"tensor {name!r:.60} does not start at a multiple of {step}")
    return tensors


def check_tensor(reader, version, name: str, shape: list[int], kind: int, offset: int) -> Stored:
    """Return a tensor; raise ValueError unless its type can be read and its bytes are there."""
    where = f"tensor {name!r:.60}"
    kind = tensor_type(kind, f"{reader.path}: {where}")
    block, block_bytes = package().GGML_QUANT_SIZES[kind]
    columns = shape[-1] if len(shape) == 2 else 1
    if len(shape) == 1 and block > 1 or columns % block:
        raise reader.bad(f"{where} of shape {tuple(shape)} is not made of blocks of {block}")
    row_bytes = columns // block * block_bytes
    end = offset + shape[0] * row_bytes
    if not all(shape) or end > reader.size:
        raise reader.bad(
            f"{where} of shape {tuple(shape)} ends at byte {end:,}, the file at {reader.size:,}"
        )
    return Stored(reader.path, version, kind, tuple(shape), offset, row_bytes)


def package():
    """Return the package gguf; raise ValueError if it is missing."""
    try:
        import gguf
    except ImportError:
        raise ValueError(
            "reading a GGUF file needs the package gguf, which is missing; pip install gguf"
        ) from None
    return gguf


def tensor_type(number: int, where: str):
    """Return a tensor's type; raise ValueError for one that gguf does not know or cannot widen."""
    gguf = package()
    try:
        kind = gguf.GGMLQuantizationType(number)
    except ValueError:
        raise ValueError(
            f"{where} has the type {number}, which this version of the package gguf does not know; "
            "update it, or take a file of Q4_K_M or Q8_0"
        ) from None
    if not can_widen(kind):
        raise ValueError(
            f"{where} has the type {kind.name}, which cannot be read; take a file of Q4_K_M or Q8_0"
        )
    return kind


@functools.cache
def can_widen(kind) -> bool:
    gguf = package()
    n_bytes = gguf.GGML_QUANT_SIZES[kind][1]
    try:
        gguf.dequantize(np.zeros((1, n_bytes), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


# ---- all parts of a model -------------------------------------------------------------------


def read_parts(path: Path) -> tuple[dict, dict[str, Stored]]:
    """Return the facts of a model's first file, and the tensors of all."""
    match = PART.fullmatch(path.name)
    if match is None:
        facts, tensors = read_header(path)
        n_parts = facts.get("split.count", 0)
        if n_parts not in (0, 1):
            raise ValueError(
                f"{path} is one of {n_parts!r:.20} parts; call them by their published names, "
                "which end in -00001-of-0000N.gguf"
            )
        return facts, tensors
    n_parts = int(match[3])
    all_facts = {}
    all_tensors = {}
    for i in range(n_parts):
        part = path.with_name(f"{match[1]}-{i + 1:05}-of-{match[3]}.gguf")
        if not part.is_file():
            raise FileNotFoundError(f"{part} is missing, a part of {path.name}; download it too")
        facts, tensors = read_header(part)
        if (facts.get("split.no"), facts.get("split.count")) != (i, n_parts):
            raise ValueError(
                f"{part} calls itself part {facts.get('split.no')!r:.20} of "
                f"{facts.get('split.count')!r:.20}, counted from 0; download it again"
            )
        twice = tensors.keys() & all_tensors.keys()
        if twice:
            raise ValueError(f"{part} repeats tensor {min(twice)!r:.60}; download it again")
        all_facts = all_facts or facts
        all_tensors |= tensors
    return all_facts, all_tensors


def as_folder(path: Path) -> dict[str, dict | bytes]:
    """Return {name: contents} of the files that a folder of this model would have."""
    return read_model(path, stamp(path))[0]


def open_tensors(path: Path) -> dict[str, Held]:
    """Return {Hugging Face's name: the tensor, not read yet}."""
    return dict(read_model(path, stamp(path))[1])


@functools.lru_cache(maxsize=1)
def read_model(path: Path, version: tuple) -> tuple[dict, dict[str, Held]]:
    """Return the files and the tensors of a model; version: of its file, so that it is read anew.

    Raises ValueError or FileNotFoundError, in one line.
    """
    facts, stored = read_parts(path)
    try:
        return translate(path, facts, stored)
    except (LookupError, TypeError, AttributeError, OverflowError, struct.error) as error:
        raise ValueError(
            f"{path} is not laid out as its architecture asks for ({error!r:.100}); take another"
        ) from None


def translate(path: Path, facts: dict, stored: dict[str, Stored]) -> tuple[dict, dict[str, Held]]:
    """Return what `read_model` does, from what the header says."""
    frequencies = stored.pop(FREQUENCIES, None)
    config = make_config(path, facts, stored)
    if frequencies is not None:
        if "rope_scaling" in config:
            raise ValueError(
                f"{path} has both {FREQUENCIES} and rope.scaling, {config['rope_scaling']!r:.80}; "
                "only one of them is supported"
            )
        add_frequencies(config, matrix(frequencies)[:])
    files = gguf_tokens.make_files(path, facts)
    files["config.json"] = config
    tensors = {}
    for name, tensor in stored.items():
        make = functools.partial(matrix, tensor, row_order(name, tensor, config))
        tensors[hugging_face_name(name)] = Held(make)
    return files, tensors


# ---- config.json ----------------------------------------------------------------------------


def make_config(path: Path, facts: dict, stored: dict[str, Stored]) -> dict:
    """Return the keys of a config.json; `parse_config` checks them, and refuses those unknown."""
    kind = facts.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"{path}: architecture {kind!r:.60} is not supported in GGUF; supported are "
            f"{', '.join(ARCHITECTURES)} (Mistral is llama)"
        )
    own = {}
    for key, value in facts.items():
        if key.startswith(f"{kind}."):
            own[key.removeprefix(f"{kind}.")] = plain(value)
    config = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "hidden_act": "silu",
        "torch_dtype": run_dtype(stored),
        "tie_word_embeddings": "output.weight" not in stored,
    }
    if "token_embd.weight" in stored:
        config["vocab_size"] = stored["token_embd.weight"].shape[0]
    if kind != "qwen2":
        config["attention_bias"] = "blk.0.attn_q.bias" in stored
    rope = {}
    for key, value in own.items():
        if key in CONFIG_KEYS:
            config[CONFIG_KEYS[key]] = value
        elif key.startswith("rope.scaling.") and key != "rope.scaling.finetuned":
            end = key.removeprefix("rope.scaling.")
            rope[ROPE_KEYS.get(end, end)] = value
        elif key not in ("rope.dimension_count", "attention.value_length", "expert_used_count"):
            config[f"{kind}.{key}"] = value  # refused by this name
    check_heads(path, config, own)
    if not config.get("num_local_experts"):
        config.pop("num_local_experts", None)
    if "rope_type" not in rope and rope.get("factor") in (0, 1):
        del rope["factor"]  # it stretches nothing
    if "factor" in rope:
        rope.setdefault("rope_type", "linear")  # as llama.cpp takes it
    if rope.get("rope_type", "none") != "none":
        config["rope_scaling"] = rope
    elif set(rope) - {"rope_type", "factor", ORIGINAL}:
        config[f"{kind}.rope.scaling"] = rope  # refused: no type says what it is for
    return config


def plain(value):
    """Return a value as JSON would have it; float32 as the number that was meant, such as 1e-05."""
    if isinstance(value, float):
        return float(str(np.float32(value)))
    return value[:1000].tolist() if isinstance(value, np.ndarray) else value


def run_dtype(stored: dict[str, Stored]) -> str:
    first = stored.get("blk.0.attn_q.weight")
    return "bfloat16" if first is None else DTYPES.get(first.kind.name, "bfloat16")


def check_heads(path: Path, config: dict, own: dict) -> None:
    """Raise ValueError for heads that Slim cannot have: cut short by RoPE, or wider values."""
    n_heads = config.get("num_attention_heads")
    size = config.get("head_dim")
    if size is None and type(n_heads) is int and n_heads > 0:
        size = config["head_dim"] = config.get("hidden_size", 0) // n_heads
    for key in ("rope.dimension_count", "attention.value_length"):
        if own.get(key, size) != size:
            raise ValueError(
                f"{path}: {key} is {own[key]!r:.40}, but heads have the size {size!r:.40}; only "
                "models where both are equal are supported in GGUF"
            )


def add_frequencies(config: dict, factors: Tensor) -> None:
    """Let RoPE's frequencies be divided by the file's own factors (Llama 3.1's stretch)."""
    config["rope_scaling"] = {
        "rope_type": "longrope",
        "factor": 1.0,
        ORIGINAL: config.get("max_position_embeddings"),
        "attention_factor": 1.0,
        "short_factor": factors.tolist(),
        "long_factor": factors.tolist(),
    }


# ---- tensors --------------------------------------------------------------------------------


def hugging_face_name(name: str) -> str:
    """Translate blk.7.attn_q.bias, for example, into model.layers.7.self_attn.q_proj.bias."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in TENSORS:
        return name  # which no model has, so that it is refused by this name
    layer = "" if match[1] is None else f"model.layers.{match[1]}."
    return f"{layer}{TENSORS[match[2]]}.{match[3]}"


def row_order(name: str, tensor: Stored, config: dict) -> np.ndarray | None:
    """Return where each row lies in the file: llama keeps the two that RoPE turns side by side."""
    kind = name.split(".")[-2]
    if config["model_type"] != "llama" or kind not in ("attn_q", "attn_k"):
        return None
    rows = np.arange(tensor.shape[0])
    size = config["head_dim"]
    if type(size) is not int or size < 2 or len(rows) % size or size % 2:
        return None  # refused as soon as the config is checked
    pairs = rows.reshape(-1, size // 2, 2)
    return pairs.swapaxes(1, 2).reshape(-1)


def matrix(tensor: Stored, order: np.ndarray | None = None) -> Matrix:
    def widen(start: int, stop: int) -> Tensor:
        raw = read_rows(tensor, order, start, stop)
        return gguf_types.widen(raw, tensor.kind, package()).view(-1, *tensor.shape[1:])

    def split(start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        raw = read_rows(tensor, order, start, stop)
        return gguf_types.split(raw, tensor.kind).in_4_bits()

    name = tensor.kind.name
    group = gguf_types.TYPES[name][2] if name in gguf_types.TYPES else 0
    return Matrix(name, tensor.shape, widen, group, split if group else None)


def read_rows(tensor: Stored, order: np.ndarray | None, start: int, stop: int) -> np.ndarray:
    """Return rows (N, bytes) as they are stored."""
    first, last = start, stop
    if order is not None:
        wanted = order[start:stop]
        first, last = wanted.min(), wanted.max() + 1
    if stamp(tensor.path) != tensor.version:
        raise ValueError(f"{tensor.path} changed while it was read; try again")
    count = (last - first) * tensor.row_bytes
    offset = tensor.offset + first * tensor.row_bytes
    raw = np.fromfile(tensor.path, np.uint8, count, offset=offset).reshape(-1, tensor.row_bytes)
    return raw if order is None else raw[wanted - first]
