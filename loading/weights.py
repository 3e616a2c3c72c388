"""Safetensors files, memory-mapped: checked by name, shape and dtype, then copied once.

Every tensor of a checkpoint is used, is known to be harmless, or is refused by name.
"""

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import packed
from loading import gguf_file
from loading.files import read_json, stamp
from loading.quantised import FLOATS, Matrix, copy_rows, gather, tensor_problem
from loading.rope import inverse_frequencies
from model import Config, Layer, Weights

EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
HARMLESS = re.compile(  # computed from config.json, as transformers does
    r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
)
LEAST_IN_BLOCKS = 2**18  # numbers: for smaller matrices the call costs more than it saves
MAPPED_BYTES = 2**23  # bytes read of a file before it is mapped anew


class MappedFile:
    """A safetensors file, mapped anew now and then: pages that were read count as our memory.

    Raises SafetensorError or OSError if it cannot be opened, ValueError if it changed meanwhile.
    """

    def __init__(self, path):
        self.path = path
        self.version = stamp(path)
        self.file = safe_open(path, framework="pt", device="cpu")
        self.keys = self.file.keys
        self.metadata = self.file.metadata
        self.aliases = {}  # name asked for -> name in the file
        self.read = math.inf

    def get_slice(self, name: str):
        return self.file.get_slice(self.aliases.get(name, name))

    def get_tensor(self, name: str) -> Tensor:
        """Return a tensor, mapped, not read yet."""
        if self.read > MAPPED_BYTES:
            if stamp(self.path) != self.version:
                raise ValueError(f"{self.path} changed while it was read; try again")
            self.part = safe_open(self.path, framework="pt", device="cpu")
            self.read = 0
        tensor = self.part.get_tensor(self.aliases.get(name, name))
        self.read += tensor.nbytes
        return tensor


# ---- what a checkpoint must have ----------------------------------------------------------


def tensor_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor that a checkpoint of this config must have."""
    shapes = {EMBED: (config.vocab_size, config.dim), "model.norm.weight": (config.dim,)}
    if not config.tied:
        shapes[HEAD] = (config.vocab_size, config.dim)
    of_layer = layer_shapes(config)
    for i in range(config.n_layers):
        for name, shape in of_layer.items():
            shapes[f"model.layers.{i}.{name}"] = shape
    return shapes


def layer_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of one layer, by its name within the layer."""
    dim = config.dim
    q_rows = config.n_heads * config.head_dim
    kv_rows = config.n_kv_heads * config.head_dim
    heads = {"q": q_rows, "k": kv_rows, "v": kv_rows}
    ffn = {"gate": config.hidden_dim, "up": config.hidden_dim}
    if config.fused:
        heads = {"qkv": q_rows + 2 * kv_rows}
        ffn = {"gate_up": 2 * config.hidden_dim}
    shapes = {
        "input_layernorm.weight": (dim,),
        "self_attn.o_proj.weight": (dim, q_rows),
        "post_attention_layernorm.weight": (dim,),
        "mlp.down_proj.weight": (dim, config.hidden_dim),
    }
    for name, rows in heads.items():
        shapes[f"self_attn.{name}_proj.weight"] = (rows, dim)
        if config.qkv_bias:
            shapes[f"self_attn.{name}_proj.bias"] = (rows,)
    for name, rows in ffn.items():
        shapes[f"mlp.{name}_proj.weight"] = (rows, dim)
    if config.qk_norm:
        shapes["self_attn.q_norm.weight"] = (config.head_dim,)
        shapes["self_attn.k_norm.weight"] = (config.head_dim,)
    if config.o_bias:
        shapes["self_attn.o_proj.bias"] = (dim,)
    return shapes


def matrix_shapes(config: Config) -> dict[str, tuple[int, int]]:
    """Return rows and columns of a layer's matrices, as they are fused."""
    dim = config.dim
    q_rows = config.n_heads * config.head_dim
    kv_rows = config.n_kv_heads * config.head_dim
    return {
        "wqkv": (q_rows + 2 * kv_rows, dim),
        "wo": (dim, q_rows),
        "w_gate_up": (2 * config.hidden_dim, dim),
        "w_down": (dim, config.hidden_dim),
    }


def matrix_names(config: Config, i: int) -> dict[str, list[str]]:
    """Return the tensors that make up each matrix of a layer."""
    attn = f"model.layers.{i}.self_attn."
    mlp = f"model.layers.{i}.mlp."
    qkv = ["qkv"] if config.fused else ["q", "k", "v"]
    gate_up = ["gate_up"] if config.fused else ["gate", "up"]
    return {
        "wqkv": [f"{attn}{name}_proj.weight" for name in qkv],
        "wo": [attn + "o_proj.weight"],
        "w_gate_up": [f"{mlp}{name}_proj.weight" for name in gate_up],
        "w_down": [mlp + "down_proj.weight"],
    }


# ---- how matrices are kept ------------------------------------------------------------------


def exact_groups(config: Config, tensors: dict) -> dict[str, int]:
    """Return {name: columns of a group} of the tensors whose 4-bit numbers can stay."""
    groups = {}
    for name, shape in tensor_shapes(config).items():
        if len(shape) == 2:
            groups[name] = getattr(tensors[name].get_slice(name), "group", 0)
    return {name: group for name, group in groups.items() if group}


def packing(kind: str, exact: dict, names: list[str], shape: tuple[int, int]) -> tuple[int, int]:
    """Return the bits of a matrix in a run, 0: it stays plain; and its columns of a group.

    kind: "full", "int8", "int4", or "file": 4 bits where the file has 4. exact: of
    `exact_groups`. Embedding and head take 8 bits unless the file has them in 4; so does a matrix
    that torch's int4 kernels do not take.
    """
    suits = shape[0] % 64 == 0 and shape[1] % packed.GROUP == 0
    groups = {exact.get(name, 0) for name in names}
    if suits and kind in ("int4", "file") and len(groups) == 1 and 0 not in groups:
        return 4, groups.pop()
    if kind in ("full", "file"):
        return 0, 0
    in_layer = names[0] not in (EMBED, HEAD)
    return (4, packed.GROUP) if kind == "int4" and suits and in_layer else (8, 0)


def stored(config: Config, kind: str, exact: dict) -> Iterator[tuple[tuple, int, int]]:
    """Yield the shape, bits and group of each matrix, as they are fused; the embedding first."""
    outside = (config.vocab_size, config.dim)
    for name in [EMBED] if config.tied else [EMBED, HEAD]:
        yield outside, *packing(kind, exact, [name], outside)
    shapes = matrix_shapes(config)
    for i in range(config.n_layers):
        for matrix, names in matrix_names(config, i).items():
            yield shapes[matrix], *packing(kind, exact, names, shapes[matrix])


def weight_bytes(
    config: Config, device: torch.device, dtype: torch.dtype, kind: str, exact: dict
) -> int:
    """Return the bytes of all weights in a run; kind, exact: as in `packing`."""
    numbers = sum(math.prod(shape) for shape in tensor_shapes(config).values())
    if copies_head(config, device, dtype, kind):
        numbers += config.vocab_size * config.dim
    total = numbers * dtype.itemsize
    for shape, bits, group in stored(config, kind, exact):
        total -= math.prod(shape) * dtype.itemsize
        total += packed.matrix_bytes(shape, bits, group, dtype)
    return total


# ---- what it has --------------------------------------------------------------------------


def open_shards(folder: Path) -> dict[str, MappedFile]:
    """Open a GGUF file, or every safetensors file of a folder; return {tensor name: open file}."""
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds an adapter (adapter_config.json), which would not be applied; "
            "merge it into the weights, or delete its files"
        )
    if folder.is_file():
        return gguf_file.open_tensors(folder)
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if not (folder / names[0]).is_file() and index.is_file():
        names = shard_names(index)
    tensors = {}
    for name in names:
        shard = open_shard(folder / name, index)
        for tensor in shard.keys():
            if tensor in tensors:
                raise ValueError(
                    f"{shard.path} and {tensors[tensor].path.name} both hold {tensor}; "
                    "download the checkpoint again"
                )
            tensors[tensor] = shard
    return tensors


def open_shard(path: Path, index: Path) -> MappedFile:
    if not path.is_file():
        where = f"named by {index.name}" if index.is_file() else "the only format read"
        raise FileNotFoundError(
            f"{path} does not exist ({where}); "
            "download the checkpoint again or convert it to safetensors"
        )
    try:
        return MappedFile(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is truncated or not safetensors ({error}); download it again"
        ) from None


def shard_names(index: Path) -> list[str]:
    """Return the files that an index names; raise ValueError for one outside the index's folder."""
    weight_map = read_json(index).get("weight_map")
    given = weight_map.values() if isinstance(weight_map, dict) else [None]
    if not all(isinstance(name, str) for name in given):
        raise ValueError(
            f"{index}: key 'weight_map' does not map tensor names to file names; download it again"
        )
    names = sorted(set(given))
    for name in names:
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or ":" in name:
            raise ValueError(
                f"{index} names {name!r:.60}, outside its folder; "
                "only files in that folder are read"
            )
    return names


def settle_head(config: Config, tensors: dict[str, MappedFile]) -> Config:
    """Compare a tied head with the embedding, and return the config with `tied` as it truly is.

    A head that differs is used, as transformers does. A tied tensor may be stored under either
    name; afterwards `tensors` has it under the embedding's alone.
    """
    if not config.tied or HEAD not in tensors:
        return config
    if EMBED not in tensors:
        tensors[HEAD].aliases[EMBED] = HEAD
        tensors[EMBED] = tensors.pop(HEAD)
        return config
    if not same_values(tensors, (config.vocab_size, config.dim)):
        return replace(config, tied=False)
    del tensors[HEAD]
    return config


def same_values(tensors: dict[str, MappedFile], shape: tuple[int, int]) -> bool:
    """Return whether head and embedding are equal in every byte.

    Some rows are compared at a time, each from a new mapping: read pages count as our memory.
    """
    embed = tensors[EMBED].get_slice(EMBED)
    head = tensors[HEAD].get_slice(HEAD)
    if not embed.get_shape() == head.get_shape() == list(shape):
        return False  # `check_tensors` names the wrong one
    if embed.get_dtype() != head.get_dtype():
        return False
    n_rows = max(1, MAPPED_BYTES // (8 * shape[1]))
    for start in range(0, shape[0], n_rows):
        rows = slice(start, start + n_rows)
        ours = tensors[EMBED].get_tensor(EMBED)[rows].view(torch.uint8)
        theirs = tensors[HEAD].get_tensor(HEAD)[rows].view(torch.uint8)
        if not torch.equal(ours, theirs):
            return False
    return True


def check_tensors(folder: Path, config: Config, tensors: dict[str, MappedFile]) -> None:
    """Put together what is quantised, in `tensors`.

    Raises ValueError that lists every missing, unexpected or mis-shaped tensor.
    """
    needed = tensor_shapes(config)
    problems = gather(tensors, needed, config.scheme)
    if not problems:
        for name, shape in needed.items():
            problems += tensor_problem(name, tensors, shape, FLOATS)
    for name in sorted(tensors.keys() - needed.keys()):
        if not HARMLESS.fullmatch(name):
            problems.append(f"unexpected {name}")
    if problems:
        more = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(f"{folder} does not fit its config.json: {'; '.join(problems[:20])}{more}")


# ---- loading ------------------------------------------------------------------------------


def load_weights(
    tensors: dict,
    config: Config,
    device: torch.device,
    dtype: torch.dtype,
    kind: str,
    exact: dict[str, int],
    progress=None,
) -> Weights:
    """Copy each tensor from its mapped file to the device; QKV and gate/up become one matrix each.

    progress(done, total) is called after each matrix, in bytes. kind, exact: as in `packing`.
    """
    loader = Loader(tensors, config, device, dtype, kind, exact, progress)
    embed = loader.matrix([EMBED])
    if not config.tied:
        head = loader.matrix([HEAD])
    elif copies_head(config, device, dtype, kind):
        head = to_blocks(embed)
        loader.count(embed)  # the copy has as many bytes
    else:
        head = embed
    inv_freq = [inverse_frequencies(config, long) for long in (False, True)]
    return Weights(
        embed=embed,
        layers=[loader.layer(i) for i in range(config.n_layers)],
        norm=loader.fuse(["model.norm.weight"]),
        head=head,
        inv_freq=torch.stack(inv_freq).to(device),
    )


class Loader:
    """Copies tensors to a device, packs matrices if `kind` says so, and counts the bytes."""

    def __init__(
        self, tensors: dict, config: Config, device, dtype, kind: str, exact: dict, progress
    ):
        self.tensors = tensors
        self.config = config
        self.device = device
        self.dtype = dtype
        self.progress = progress
        self.done = 0
        self.total = weight_bytes(config, device, dtype, kind, exact)
        self.kind = kind
        self.exact = exact

    def fuse(self, names: list[str]) -> Tensor:
        """Return tensors, one below the other, as one."""
        parts = [self.tensors[name].get_tensor(name) for name in names]  # mapped, not read yet
        sizes = [len(part) for part in parts]
        shape = (sum(sizes), *parts[0].shape[1:])
        fused = torch.empty(shape, dtype=self.dtype, device=self.device)
        for part, rows in zip(parts, fused.split(sizes)):
            copy_rows(rows, part)
        self.count(fused)
        return fused

    def count(self, loaded: Tensor | packed.Packed) -> None:
        self.done += loaded.nbytes
        if self.progress:
            self.progress(self.done, self.total)

    def matrix(self, names: list[str]) -> Tensor | packed.Packed:
        """Return matrices, one below the other, as one, plain or packed."""
        parts = [self.tensors[name].get_tensor(name) for name in names]
        shape = sum(len(part) for part in parts), columns_of(parts[0])
        bits, group = packing(self.kind, self.exact, names, shape)
        if not bits:
            return self.plain_matrix(names)
        w = packed.empty(*shape, bits, self.dtype, group)
        start = 0
        for name, part in zip(names, parts):
            if bits == 4 and name in self.exact:
                for rows in part.groups():
                    start = packed.put(w, start, *rows)
            else:
                for rows in plain_rows(part):
                    start = packed.fill(w, start, rows)
        w = packed.prepare(w, self.device)
        self.count(w)
        return w

    def plain_matrix(self, names: list[str]) -> Tensor:
        """Return tensors as one matrix, in oneDNN's blocks if that is faster."""
        plain = self.fuse(names)
        few = plain.numel() < LEAST_IN_BLOCKS
        if few or names == [EMBED] or not in_blocks(self.device, self.dtype):
            return plain
        return to_blocks(plain)

    def layer(self, i: int) -> Layer:
        config = self.config
        layer = f"model.layers.{i}."
        attn = layer + "self_attn."
        names = matrix_names(config, i)
        biases = [name.removesuffix("weight") + "bias" for name in names["wqkv"]]
        return Layer(
            attn_norm=self.fuse([layer + "input_layernorm.weight"]),
            wqkv=self.matrix(names["wqkv"]),
            bqkv=self.fuse(biases) if config.qkv_bias else None,
            q_norm=self.fuse([attn + "q_norm.weight"]) if config.qk_norm else None,
            k_norm=self.fuse([attn + "k_norm.weight"]) if config.qk_norm else None,
            wo=self.matrix(names["wo"]),
            bo=self.fuse([attn + "o_proj.bias"]) if config.o_bias else None,
            ffn_norm=self.fuse([layer + "post_attention_layernorm.weight"]),
            w_gate_up=self.matrix(names["w_gate_up"]),
            w_down=self.matrix(names["w_down"]),
        )


def to_blocks(matrix: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(matrix, 1)


def copies_head(config: Config, device: torch.device, dtype: torch.dtype, kind: str) -> bool:
    """Return whether a tied head is a copy of the embedding, in blocks.

    The embedding is read by rows, so it cannot be in blocks itself. The copy takes memory, a fifth
    more for a small model, and saves a token a twentieth of its time. Not of weights that are kept
    packed, to be small. kind: as in `packing`.
    """
    large = config.vocab_size * config.dim >= LEAST_IN_BLOCKS
    return config.tied and kind == "full" and large and in_blocks(device, dtype)


def in_blocks(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether plain matrices are laid out in the blocks that oneDNN multiplies by.

    In bfloat16 a CPU multiplies one row up to 1.8 times faster so, and twenty 1.3 times; many rows
    take the matrix out of its blocks where float32 is faster (`packed.opened`). Float32 is as fast
    as stored.
    """
    if device.type != "cpu" or dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return False
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def columns_of(part: Tensor | Matrix) -> int:
    columns = getattr(part, "columns", None)
    return part.shape[1] if columns is None else columns.stop - columns.start


def plain_rows(part: Tensor | Matrix) -> Iterator[Tensor]:
    """Yield a matrix's rows as plain numbers, some at a time."""
    if isinstance(part, Matrix):
        return part.chunks()
    return iter(part.split(packed.rows_at_once(part.shape[1])))


def fingerprint(config: Config, tensors: dict[str, MappedFile]) -> str:
    """Hash the config and each tensor's name, shape and first row, to tell models apart quickly."""
    digest = hashlib.sha256(repr(config).encode())
    for name in sorted(tensor_shapes(config)):
        part = tensors[name].get_slice(name)
        digest.update(f"{name} {part.get_shape()} {part.get_dtype()}".encode())
        digest.update(part[:1].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
