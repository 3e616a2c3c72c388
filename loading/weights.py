"""Safetensors files, memory-mapped: checked by name, shape and dtype, then copied once to where they are used."""

import hashlib
import math
import os
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loading.files import read_json
from loading.rope import inverse_frequencies
from model import Config, Layer, Weights

SCALE = "_scale_inv"  # of FP8 weights: what a tile is multiplied by
MAPPED_BYTES = 2**23  # of a file, read before it is mapped anew


def stamp(path) -> tuple:
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


class MappedFile:
    """A safetensors file. What is read of a mapped file counts as this process's memory, so it is mapped anew at times.

    Raises SafetensorError or OSError if it cannot be opened, ValueError if it changed meanwhile.
    """

    def __init__(self, path):
        self.path, self.version = path, stamp(path)
        self.file, self.read = safe_open(path, framework="pt", device="cpu"), math.inf
        self.keys, self.metadata, self.get_slice = (
            self.file.keys,
            self.file.metadata,
            self.file.get_slice,
        )

    def get_tensor(self, name: str) -> Tensor:
        """Return a tensor, mapped, not read yet."""
        if self.read > MAPPED_BYTES:
            if stamp(self.path) != self.version:
                raise ValueError(f"{self.path} changed while it was read; try again")
            self.part, self.read = safe_open(self.path, framework="pt", device="cpu"), 0
        tensor = self.part.get_tensor(name)
        self.read += tensor.nbytes
        return tensor


def tensor_shapes(c: Config) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor that a checkpoint of this config must have."""
    q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    shapes = {"model.embed_tokens.weight": (c.vocab_size, c.dim), "model.norm.weight": (c.dim,)}
    if not c.tied:
        shapes["lm_head.weight"] = (c.vocab_size, c.dim)
    heads, ffn = {"q": q, "k": kv, "v": kv}, {"gate": c.hidden_dim, "up": c.hidden_dim}
    if c.fused:
        heads, ffn = {"qkv": q + 2 * kv}, {"gate_up": 2 * c.hidden_dim}
    for i in range(c.n_layers):
        p = f"model.layers.{i}."
        shapes |= {
            p + "input_layernorm.weight": (c.dim,),
            p + "post_attention_layernorm.weight": (c.dim,),
        }
        shapes |= {p + f"self_attn.{n}_proj.weight": (rows, c.dim) for n, rows in heads.items()}
        shapes |= {
            p + f"self_attn.{n}_proj.bias": (rows,) for n, rows in heads.items() if c.qkv_bias
        }
        shapes |= {p + f"self_attn.{n}_norm.weight": (c.head_dim,) for n in "qk" if c.qk_norm}
        shapes |= {p + "self_attn.o_proj.bias": (c.dim,)} if c.o_bias else {}
        shapes[p + "self_attn.o_proj.weight"] = (c.dim, q)
        shapes |= {p + f"mlp.{n}_proj.weight": (rows, c.dim) for n, rows in ffn.items()}
        shapes[p + "mlp.down_proj.weight"] = (c.dim, c.hidden_dim)
    return shapes


def scale_shape(shape: tuple[int, ...], tile: tuple[int, int]) -> tuple[int, ...]:
    """Return how many tiles a tensor of FP8 weights has; each has one scale."""
    return tuple(-(-n // size) for n, size in zip(shape, tile))


def weight_bytes(c: Config, dtype: torch.dtype) -> int:
    return sum(torch.Size(shape).numel() for shape in tensor_shapes(c).values()) * dtype.itemsize


def open_shards(folder: Path) -> dict[str, object]:
    """Open every safetensors file of a folder, memory-mapped; return {tensor name: open file}."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if not (folder / names[0]).is_file() and index.is_file():
        names = shard_names(index)
    tensors = {}
    for name in names:
        path = folder / name
        if not path.is_file():
            where = f"named by {index.name}" if index.is_file() else "the only format read"
            raise FileNotFoundError(
                f"{path} does not exist ({where}); download the checkpoint again or convert it to safetensors"
            )
        try:
            shard = MappedFile(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} is truncated or not safetensors ({error}); download it again"
            ) from None
        tensors |= dict.fromkeys(shard.keys(), shard)
    return tensors


def shard_names(index: Path) -> list[str]:
    """Return the files that an index names; raise ValueError for one outside the index's folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) for name in weight_map.values()
    ):
        raise ValueError(
            f"{index}: key 'weight_map' does not map tensor names to file names; download it again"
        )
    names = sorted(set(weight_map.values()))
    for name in names:
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or ":" in name:
            raise ValueError(
                f"{index} names {name!r:.60}, outside its folder; only files in that folder are read"
            )
    return names


def check_tensors(folder: Path, c: Config, tensors: dict) -> None:
    """Raise ValueError that lists every missing, unexpected, mis-shaped or quantised tensor."""
    needed, problems = tensor_shapes(c), []
    kinds = ("F64", "F32", "F16", "BF16")
    scales = [name for name in needed if name + SCALE in tensors] if c.tile else []
    for name, shape in [
        *needed.items(),
        *((name + SCALE, scale_shape(needed[name], c.tile)) for name in scales),
    ]:
        if name not in tensors:
            problems.append(f"missing {name}")
        elif (found := tuple(tensors[name].get_slice(name).get_shape())) != shape:
            problems.append(f"{name} has shape {found}, config.json asks for {shape}")
        elif (kind := tensors[name].get_slice(name).get_dtype()) not in (
            *kinds,
            "F8_E4M3" if name in scales else "",
        ):
            problems.append(f"{name} has dtype {kind}, quantised weights are not supported")
    harmless = (
        ("rotary_emb.inv_freq", "lm_head.weight") if c.tied else ("rotary_emb.inv_freq",)
    )  # derived or shared
    problems += [
        f"unexpected {name}"
        for name in sorted(tensors)
        if name not in needed
        and not name.endswith(harmless)
        and name.removesuffix(SCALE) not in scales
    ]
    if problems:
        more = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(f"{folder} does not fit its config.json: {'; '.join(problems[:20])}{more}")


def load_weights(
    tensors: dict, c: Config, device: torch.device, dtype: torch.dtype, progress=None
) -> Weights:
    """Copy each tensor from its mapped file to the device; QKV and gate/up become one matrix each."""
    done, total = 0, weight_bytes(c, dtype)

    def fuse(*names: str) -> Tensor:
        nonlocal done
        parts = [tensors[name].get_tensor(name) for name in names]  # mapped, not read yet
        fused = torch.empty(
            sum(len(p) for p in parts), *parts[0].shape[1:], dtype=dtype, device=device
        )
        for name, part, rows in zip(names, parts, fused.split([len(p) for p in parts])):
            if part.dtype != torch.float8_e4m3fn:
                rows.copy_(part)
                continue
            (high, wide), scale = c.tile, tensors[name + SCALE].get_tensor(name + SCALE).float()
            for some, to, by in zip(
                part.split(high), rows.split(high), scale
            ):  # a row of tiles at a time
                to.copy_(some.float() * by.repeat_interleave(wide)[: part.shape[1]])
        done += fused.nbytes
        if progress:
            progress(done, total)
        return fused

    def layer(i: int) -> Layer:
        attn, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        qkv, gate_up = (["qkv"], ["gate_up"]) if c.fused else ("qkv", ["gate", "up"])
        return Layer(
            attn_norm=fuse(f"model.layers.{i}.input_layernorm.weight"),
            wqkv=fuse(*(f"{attn}{n}_proj.weight" for n in qkv)),
            bqkv=fuse(*(f"{attn}{n}_proj.bias" for n in qkv)) if c.qkv_bias else None,
            q_norm=fuse(attn + "q_norm.weight") if c.qk_norm else None,
            k_norm=fuse(attn + "k_norm.weight") if c.qk_norm else None,
            wo=fuse(attn + "o_proj.weight"),
            bo=fuse(attn + "o_proj.bias") if c.o_bias else None,
            ffn_norm=fuse(f"model.layers.{i}.post_attention_layernorm.weight"),
            w_gate_up=fuse(*(f"{mlp}{n}_proj.weight" for n in gate_up)),
            w_down=fuse(mlp + "down_proj.weight"),
        )

    embed = fuse("model.embed_tokens.weight")
    head = embed if c.tied else fuse("lm_head.weight")
    inv_freq = torch.stack([inverse_frequencies(c, long) for long in (False, True)]).to(device)
    return Weights(
        embed, [layer(i) for i in range(c.n_layers)], fuse("model.norm.weight"), head, inv_freq
    )


def fingerprint(c: Config, tensors: dict) -> str:
    """Hash the config and every tensor's name, shape and first row: tells checkpoints apart without reading them."""
    digest = hashlib.sha256(repr(c).encode())
    for name in sorted(tensor_shapes(c)):
        part = tensors[name].get_slice(name)
        first = part[:1].contiguous().view(torch.uint8).numpy().tobytes()
        digest.update(f"{name} {part.get_shape()} {part.get_dtype()}".encode() + first)
    return digest.hexdigest()[:16]
