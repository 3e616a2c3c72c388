"""Read a long text with a language model, and answer questions about it.

    python slim.py --ckpt llama3.1-8b --prompt file.txt

`load` checks everything it can before it allocates anything, so a checkpoint is either
wholly loaded or refused with one line that says why. Only safetensors and JSON are read.
An `Engine` holds one conversation: `prefill` starts it, `extend` goes on with it, be it a
decoded token or a follow-up question, and `generate` is the two in a loop.
"""

import contextlib
import hashlib
import json
import operator
import os
import shutil
import signal
import sys
import time
import zlib

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported ends the program and nothing else

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import prune
import tokenizer as tokenizers
from kvcache import KVCache
from model import DTYPES, Config, Layer, Model, Weights, look_rows, read_json

ALIASES = {
    "llama2-7b": "meta-llama/Llama-2-7b-hf", "llama2-7b-chat": "meta-llama/Llama-2-7b-chat-hf",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B", "llama3-8b-instruct": "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama3.1-8b": "meta-llama/Llama-3.1-8B", "llama3.1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "llama3.2-1b": "meta-llama/Llama-3.2-1B", "llama3.2-1b-instruct": "meta-llama/Llama-3.2-1B-Instruct",
    "llama3.2-3b": "meta-llama/Llama-3.2-3B", "llama3.2-3b-instruct": "meta-llama/Llama-3.2-3B-Instruct",
    "llama3.3-70b-instruct": "meta-llama/Llama-3.3-70B-Instruct", "tinyllama": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B", "qwen2.5-7b-instruct": "Qwen/Qwen2.5-7B-Instruct",
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Everything that can be set about a run, with its default; validated when built."""

    block_len: int = 64  # tokens a block
    unit_len: int = 8  # tokens a unit inside a block
    window: int = 0  # newest queries that count; 0: as many as the rule wants
    gamma: float = -1.0  # overlap from which the active blocks stay; -1: what the rule wants
    chunk: int = 0  # rows computed at a time; 0: 1024 on a CPU, 2048 on a GPU
    overlap: bool = True  # copies on a stream of their own
    pool_mib: float = 64.0  # CPU memory for pruned blocks is taken in pieces of this size

    def __post_init__(self):
        for name, least, most in (("block_len", 1, 2**24), ("unit_len", 1, 2**24), ("window", 0, 2**16), ("chunk", 0, 2**24)):
            if type(value := getattr(self, name)) is not int or not least <= value <= most:
                raise ValueError(f"--{name.replace('_', '-')} is {value!r}; it must be a whole number within {least}..{most}")
        if self.block_len % self.unit_len:
            raise ValueError(f"--unit-len {self.unit_len} does not divide --block-len {self.block_len}; choose a divisor")
        if type(self.gamma) not in (int, float) or not (0 <= self.gamma <= 1 or self.gamma == -1):
            raise ValueError(f"--gamma {self.gamma!r} is outside 0..1, the range of an overlap; -1 leaves it to the rule")
        if type(self.overlap) is not bool or type(self.pool_mib) not in (int, float) or not 0 <= self.pool_mib <= 2**20:
            raise ValueError(f"overlap {self.overlap!r} must be a bool, pool_mib {self.pool_mib!r} within 0..{2**20}")


# ---- finding a checkpoint ---------------------------------------------------------------


def find_checkpoint(name: str | Path) -> Path:
    """Return the folder of a checkpoint: a path, a name under checkpoints/ or $SLIM_CHECKPOINTS, or in the Hugging Face cache."""
    try:
        path = Path(name).expanduser()
        path.is_dir()
    except (RuntimeError, TypeError, OSError, ValueError):
        raise ValueError(f"--ckpt {name!r:.200} is no path and no name of a checkpoint") from None
    if not str(name):
        raise ValueError("--ckpt is empty; give a folder, a name or a Hugging Face id")
    if path.is_file():
        raise ValueError(f"--ckpt {name} is a file; give the folder that holds config.json and the safetensors")
    repo = ALIASES.get(str(name).lower(), str(name))
    hub = Path(os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME", "~/.cache/huggingface")) / "hub").expanduser()
    places = [path, Path("checkpoints") / path]
    if "SLIM_CHECKPOINTS" in os.environ:
        places.append(Path(os.environ["SLIM_CHECKPOINTS"]).expanduser() / path)
    if repo.count("/") == 1:
        for repo_id in (repo, repo.replace("/Llama-3", "/Meta-Llama-3")):  # 3 and 3.1 were renamed
            places.append(main_snapshot(hub / f"models--{repo_id.replace('/', '--')}"))
    for place in places:
        if place.is_dir():
            return place
    known = repo if repo.count("/") == 1 else "ORG/NAME"
    looked = ", ".join(dict.fromkeys(str(place) for place in places))
    raise FileNotFoundError(f"no checkpoint {str(name)!r} (looked at {looked}); to download one: hf download {known} --local-dir checkpoints/{Path(name).name}")


def main_snapshot(folder: Path) -> Path:
    """Return the snapshot that a Hugging Face cache folder calls main, or the folder's pattern if there is none."""
    main = folder / "refs" / "main"
    return folder / "snapshots" / (main.read_text().strip() if main.is_file() else "*")


# ---- weights ----------------------------------------------------------------------------


def tensor_shapes(c: Config) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor that a checkpoint of this config must have."""
    q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    shapes = {"model.embed_tokens.weight": (c.vocab_size, c.dim), "model.norm.weight": (c.dim,)}
    if not c.tied:
        shapes["lm_head.weight"] = (c.vocab_size, c.dim)
    for i in range(c.n_layers):
        p = f"model.layers.{i}."
        shapes |= {p + "input_layernorm.weight": (c.dim,), p + "post_attention_layernorm.weight": (c.dim,)}
        shapes |= {p + f"self_attn.{n}_proj.weight": (rows, c.dim) for n, rows in (("q", q), ("k", kv), ("v", kv))}
        if c.qkv_bias:
            shapes |= {p + f"self_attn.{n}_proj.bias": (rows,) for n, rows in (("q", q), ("k", kv), ("v", kv))}
        shapes[p + "self_attn.o_proj.weight"] = (c.dim, q)
        shapes |= {p + f"mlp.{n}_proj.weight": (c.hidden_dim, c.dim) for n in ("gate", "up")}
        shapes[p + "mlp.down_proj.weight"] = (c.dim, c.hidden_dim)
    return shapes


def open_shards(folder: Path) -> dict[str, object]:
    """Open every safetensors file of a folder, memory-mapped; return {tensor name: open file}."""
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if not (folder / "model.safetensors").is_file() and index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"{index}: key 'weight_map' does not map tensor names to file names; download it again")
        names = set(weight_map.values())
    tensors = {}
    for name in sorted(names):
        path = folder / name
        if not path.is_file():
            where = f"named by {index.name}" if index.is_file() else "the only format read"
            raise FileNotFoundError(f"{path} does not exist ({where}); download the checkpoint again or convert it to safetensors")
        try:
            shard = safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is truncated or not safetensors ({error}); download it again") from None
        tensors |= dict.fromkeys(shard.keys(), shard)
    return tensors


def check_tensors(folder: Path, c: Config, tensors: dict) -> None:
    """Raise ValueError that lists every missing, unexpected, mis-shaped or quantised tensor."""
    wanted, problems = tensor_shapes(c), []
    for name, shape in wanted.items():
        if name not in tensors:
            problems.append(f"missing {name}")
        elif (found := tuple(tensors[name].get_slice(name).get_shape())) != shape:
            problems.append(f"{name} has shape {found}, config.json asks for {shape}")
        elif (kind := tensors[name].get_slice(name).get_dtype()) not in ("F64", "F32", "F16", "BF16"):
            problems.append(f"{name} has dtype {kind}, quantised weights are not supported")
    harmless = ("rotary_emb.inv_freq", "lm_head.weight") if c.tied else ("rotary_emb.inv_freq",)  # derived or shared
    problems += [f"unexpected {name}" for name in sorted(tensors) if name not in wanted and not name.endswith(harmless)]
    if problems:
        more = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(f"{folder} does not fit its config.json: {'; '.join(problems[:20])}{more}")


def load_weights(tensors: dict, c: Config, device: torch.device, dtype: torch.dtype, progress=None) -> Weights:
    """Copy each tensor from its mapped file straight to its place on the device; QKV and gate/up become one matrix each."""
    done, total = 0, sum(torch.Size(shape).numel() for shape in tensor_shapes(c).values())

    def fuse(*names: str) -> Tensor:
        nonlocal done
        parts = [tensors[name].get_tensor(name) for name in names]  # mapped, not read yet
        whole = torch.empty(sum(len(p) for p in parts), *parts[0].shape[1:], dtype=dtype, device=device)
        for part, place in zip(parts, whole.split([len(p) for p in parts])):
            place.copy_(part)
        done += whole.numel()
        if progress:
            progress(done, total)
        return whole

    def layer(i: int) -> Layer:
        p = f"model.layers.{i}."
        qkv = [p + f"self_attn.{n}_proj" for n in "qkv"]
        return Layer(
            attn_norm=fuse(p + "input_layernorm.weight"),
            wqkv=fuse(*(n + ".weight" for n in qkv)),
            bqkv=fuse(*(n + ".bias" for n in qkv)) if c.qkv_bias else None,
            wo=fuse(p + "self_attn.o_proj.weight"),
            ffn_norm=fuse(p + "post_attention_layernorm.weight"),
            w_gate_up=fuse(p + "mlp.gate_proj.weight", p + "mlp.up_proj.weight"),
            w_down=fuse(p + "mlp.down_proj.weight"),
        )

    embed = fuse("model.embed_tokens.weight")
    head = embed if c.tied else fuse("lm_head.weight")
    return Weights(embed, [layer(i) for i in range(c.n_layers)], fuse("model.norm.weight"), head)


# ---- memory -----------------------------------------------------------------------------


def pick_device(name: str) -> torch.device:
    """Return the torch device for auto, cpu, cuda or cuda:N; raise ValueError if it is unknown or absent."""
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda:0" if cuda else "cpu")
    kind, _, index = str(name).partition(":")
    if kind not in ("cpu", "cuda") or (kind == "cpu" and index) or not (index or "0").isascii() or not (index or "0").isdigit():
        raise ValueError(f"--device {name!r} is unknown; use auto, cpu, cuda or cuda:N")
    if kind == "cuda" and int(index or 0) >= cuda:
        raise ValueError(f"--device {name!r}: this machine has {cuda} CUDA devices that torch can use; try --device cpu")
    return torch.device("cpu" if kind == "cpu" else f"cuda:{index or 0}")


def free_bytes(device: torch.device) -> int:
    """Return the memory a device can still give, in bytes; what torch holds but does not use counts as free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux: all there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Plan:
    """Bytes a run needs: weights, KV slabs, and the biggest temporaries at one time."""

    weights: int
    kv: int
    temporary: int

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.temporary

    def __str__(self) -> str:
        return f"{size(self.weights)} weights + {size(self.kv)} KV + {size(self.temporary)} temporary = {size(self.total)}"


def plan(ckpt: "Checkpoint", n_prompt: int, n_new: int = 0) -> Plan:
    """Return what a prompt of n_prompt tokens and n_new more will take on the device."""
    c, item, block_len = ckpt.config, ckpt.dtype.itemsize, ckpt.settings.block_len
    sizes, edges = prune.stage_blocks(n_prompt, ckpt.schedule, block_len), [0, *ckpt.schedule, c.n_layers]
    rows = [(n - sizes[0]) * block_len + n_prompt + n_new for n in sizes]
    kv = sum((b - a) * r for a, b, r in zip(edges, edges[1:], rows)) * 2 * c.n_kv_heads * c.head_dim * item
    weights = sum(torch.Size(shape).numel() for shape in tensor_shapes(c).values()) * item
    chunk = min(ckpt.chunk, n_prompt)
    hidden = (n_prompt + rows[min(1, len(rows) - 1)]) * c.dim * item + n_prompt * c.head_dim * 16  # x, its survivors, cos and sin
    attention = chunk * 3 * (c.n_heads + c.n_kv_heads) * c.head_dim * 4  # q, k, v, output
    pruned = (rows[0] - rows[-1]) * c.dim * item if ckpt.device.type == "cpu" else 0  # aux shares this memory
    wide = torch.promote_types(ckpt.dtype, torch.float32).itemsize
    looks = min(ckpt.window, look_rows(c.n_heads, n_prompt)) * c.n_heads * n_prompt * 3  # products, softmax, a copy
    looks = (looks + n_prompt * c.n_kv_heads * c.head_dim) * wide  # and the keys, wider or laid out anew
    return Plan(weights, kv, hidden + pruned + max(attention, looks, chunk * 4 * c.hidden_dim * item))


def check_memory(ckpt: "Checkpoint", n_prompt: int, n_new: int, loaded: int = 0) -> Plan:
    """Return the plan; raise ValueError naming the flag that would make it fit if it does not. `loaded`: bytes in place."""
    need, free = plan(ckpt, n_prompt, n_new), free_bytes(ckpt.device)
    if need.total - loaded <= free:
        return need
    default = prune.auto_schedule(ckpt.config.n_layers)
    small = {layer: max(2 * ckpt.settings.block_len, 1024 >> i) for i, layer in enumerate(default)}
    ways = {"--chunk 64": replace(ckpt, settings=replace(ckpt.settings, chunk=64))}
    ways |= {f"--schedule {prune.format_schedule(s)}": replace(ckpt, schedule=s) for s in (default, small)}
    if ckpt.dtype.itemsize > 2:
        ways["--dtype bfloat16"] = replace(ckpt, dtype=torch.bfloat16)
    fits = [flag for flag, way in ways.items() if plan(way, n_prompt, n_new).total - loaded <= free]
    advice = f"it would fit with {fits[0]}" if fits else "no flag makes it fit: use a shorter prompt or a smaller model"
    raise ValueError(f"not enough memory on {ckpt.device}: {need} for {n_prompt:,} tokens, but {size(free)} free; {advice}")


def size(n: float) -> str:
    """Write a byte count as B, KiB, MiB or GiB."""
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            break
        n /= 1024
    else:
        unit = "GiB"
    return f"{n:.0f} {unit}" if unit == "B" or n >= 100 else f"{n:.2f} {unit}"


# ---- the engine -------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint and how it is to be run: all of it checked, none of it loaded."""

    folder: Path
    config: Config
    tensors: dict  # name -> open file
    stop: set[int]  # ids that end an answer
    device: torch.device
    dtype: torch.dtype
    schedule: dict[int, prune.Budget]
    rule: prune.Rule
    settings: Settings

    @staticmethod
    def open(ckpt, device="auto", dtype="auto", schedule="auto", score="peak", **settings) -> "Checkpoint":
        """Find a checkpoint and check it, its tensors and the settings; see `load`."""
        options, rule, where, folder = Settings(**settings), prune.find_rule(score), pick_device(device), find_checkpoint(ckpt)
        config = Config.read(folder / "config.json")
        kind, budgets = pick_dtype(dtype, config, where), resolve_schedule(schedule, config, options)
        tensors = open_shards(folder)
        check_tensors(folder, config, tensors)
        return Checkpoint(folder, config, tensors, stop_tokens(folder, config.vocab_size), where, kind, budgets, rule, options)

    @property
    def identity(self) -> dict:
        """What a saved conversation depends on: settings, schedule, dtype, rule and weights."""
        return {
            **{name: getattr(self.settings, name) for name in ("block_len", "unit_len", "chunk")},
            "window": self.window, "gamma": self.gamma,
            "schedule": prune.format_schedule(self.schedule), "dtype": str(self.dtype).removeprefix("torch."),
            "score": self.rule.name, "weights": self.fingerprint,
        }  # fmt: skip

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the config and of every tensor's name, shape and first row: tells checkpoints apart without reading them."""
        digest = hashlib.sha256(repr(self.config).encode())
        for name in sorted(tensor_shapes(self.config)):
            part = self.tensors[name].get_slice(name)
            digest.update(f"{name} {part.get_shape()} {part.get_dtype()}".encode() + part[:1].contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def chunk(self) -> int:
        return self.settings.chunk or (2048 if self.device.type == "cuda" else 1024)

    @property
    def window(self) -> int:
        return self.settings.window or self.rule.window

    @property
    def gamma(self) -> float:
        return self.rule.gamma if self.settings.gamma == -1 else self.settings.gamma

    def engine(self, reserve=(1, 0), progress=None) -> "Engine":
        """Load the weights, with pinned memory for a prompt and new tokens of `reserve`, and return the Engine."""
        c, s = self.config, self.settings
        if not (isinstance(reserve, tuple) and len(reserve) == 2 and all(type(n) is int for n in reserve) and reserve[0] >= 1 and reserve[1] >= 0):
            raise ValueError(f"reserve is {reserve!r}; it must be (prompt tokens, at least 1; new tokens, at least 0)")
        if not callable(progress or print):
            raise ValueError(f"progress is {progress!r}; it must be a function like print")
        check_memory(self, *reserve)
        kv = KVCache(c.n_layers, c.n_kv_heads, c.head_dim, c.dim, s.block_len, self.dtype, self.device, s.overlap, s.pool_mib)
        kv.reset(reserve[0], self.schedule, reserve[1])
        weights = load_weights(self.tensors, c, self.device, self.dtype, progress)
        return Engine(self, Model(c, weights, kv, self.rule, s.unit_len, self.window, self.gamma, self.chunk))


def load(ckpt, device="auto", dtype="auto", schedule="auto", score="peak", reserve=(1, 0), progress=None, **settings) -> "Engine":
    """Load a checkpoint and return an Engine.

    schedule: "auto", "paper", "dense", {} or {boundary: tokens, or a share of the prompt};
    score: a name in prune.RULES, a prune.Rule, or a function of attention weights; reserve: (prompt, new) tokens to plan and pin memory for, so
    that the first token does not wait for it; progress(done, total) follows the weights;
    settings: fields of Settings. Raises ValueError or FileNotFoundError, in one line, before
    anything is allocated.
    """
    return Checkpoint.open(ckpt, device, dtype, schedule, score, **settings).engine(reserve, progress)


def pick_dtype(name: str, config: Config, device: torch.device) -> torch.dtype:
    """Return the dtype of a run; auto is the checkpoint's own, but float32 on a CPU that is slow in half precision."""
    if not isinstance(name, str) or name != "auto" and name not in DTYPES:
        raise ValueError(f"--dtype {name!r} is unknown; use auto, {', '.join(DTYPES)}")
    dtype = config.dtype if name == "auto" else DTYPES[name]
    if dtype == torch.float64 and device.type == "cuda":
        raise ValueError("--dtype float64 is for exactness tests on a CPU; use float32, bfloat16 or float16 on CUDA")
    slow = dtype == torch.float16 or dtype == torch.bfloat16 and not multiplies_bfloat16()
    return torch.float32 if name == "auto" and device.type == "cpu" and slow else dtype


def multiplies_bfloat16() -> bool:
    """Say whether this CPU has instructions for bfloat16; without them a prefill takes some six times as long."""
    known = getattr(torch.cpu, "get_capabilities", dict)()  # newer than the oldest torch we run on
    return not known or any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def resolve_schedule(schedule, config: Config, settings: Settings) -> dict[int, int]:
    """Return {boundary: budget} for "auto", "paper", "dense", a string or a dict, checked against the model."""
    if isinstance(schedule, str):
        schedule = prune.parse_schedule(schedule)
    if schedule == "auto":
        schedule = prune.auto_schedule(config.n_layers)
    elif schedule == "paper":
        schedule = prune.paper_schedule(config.n_layers, config.model_type)
    schedule = {} if schedule == "dense" else schedule
    if not isinstance(schedule, dict):
        raise ValueError(f"schedule {schedule!r} must be 'auto', 'paper', 'dense' or a dict of boundary: budget")
    prune.check_schedule(schedule, config.n_layers, settings.block_len)
    return dict(schedule)  # the caller's may change later


def stop_tokens(folder: Path, vocab_size: int) -> set[int]:
    """Return every id that ends an answer: Llama 3 has three, and generation_config.json lists them."""
    for name in ("generation_config.json", "config.json"):
        ids = read_json(folder / name).get("eos_token_id") if (folder / name).is_file() else None
        ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
        if not all(type(i) is int and 0 <= i < vocab_size for i in ids):
            raise ValueError(f"{folder / name}: key 'eos_token_id' is {ids!r}; a token id below {vocab_size} or a list of them is needed")
        if ids:
            return set(ids)
    return set()


SAVED = "slim 2"  # the format of a saved conversation


def check_path(path) -> Path:
    """Return the file that a path to write to stands for, links followed; raise ValueError if it cannot be one."""
    try:
        target = Path(os.path.realpath(path))
        if target.is_dir() or target.exists() and not target.is_file():
            raise ValueError("it is no file")
        if not os.access(target.parent, os.W_OK | os.X_OK):
            raise ValueError("its folder does not exist or is closed to writing")
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"{path!s:.200} cannot be written: {error}") from None
    return target


@contextlib.contextmanager
def whole_file(path) -> Iterator[str]:
    """Give a path to write to; what is written there takes the place of `path` at the end, or vanishes.

    It lies in a folder of its own, as the library puts temporary files beside it: what is
    left of a killed process goes with the next try. Raises ValueError if writing fails.
    """
    path = check_path(path)
    folder = path.with_name(f".{zlib.crc32(os.fsencode(path.name)):08x}.part")
    part = folder / path.name
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir()
        yield str(part)
        os.umask(mask := os.umask(0))
        part.chmod(0o666 & ~mask)  # the library's files are for their owner alone
        with open(part, "rb") as file:
            os.fsync(file.fileno())  # before the name points to it
        os.replace(part, path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be written ({error}); choose another place") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def checksum(header: str, tensors) -> str:
    """Return the CRC of a header and of pairs (name, tensor), dtypes and shapes included."""
    crc = zlib.crc32(header.encode())
    for name, tensor in tensors:
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.contiguous().view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"


def read_saved(path) -> tuple[dict, object]:
    """Return the header of a saved conversation and its open file; raise ValueError for anything else."""
    try:
        if not Path(path).is_file():
            raise FileNotFoundError("no such file")
        file = safe_open(path, framework="pt", device="cpu")
        header = json.loads((file.metadata() or {})["slim"])
        if header["format"] != SAVED:
            raise OSError(f"its format is {header['format']!r}, not {SAVED!r}")
        if isinstance(header["identity"], dict) and isinstance(header["ids"], list) and isinstance(header["extra"], dict):
            return header, file
        problem = "parts are missing"
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        problem = str(error) if isinstance(error, OSError) else "truncated, or never one"
    raise ValueError(f"{path} is no conversation saved by Slim: {problem}; write one with --save")


def check_saved(path, header: dict, identity: dict) -> None:
    """Raise ValueError that lists all in which a saved conversation differs from the engine that is to go on with it."""
    theirs = header["identity"]
    if wrong := [key for key in identity if theirs.get(key) != identity[key]]:
        shown = ", ".join("other weights" if key == "weights" else f"{key} {theirs.get(key)!r} where this run has {identity[key]!r}" for key in wrong)
        raise ValueError(f"{path} was saved with {shown}; open it with what it was saved with, or read the document again")


class Engine:
    """One conversation with a model. Make it with `load`."""

    def __init__(self, ckpt: Checkpoint, model: Model):
        self.ckpt, self.model, self.config, self.kv = ckpt, model, ckpt.config, model.kv
        self.ids: list[int] = []  # run so far in this conversation
        self.pending: list[int] = []  # generated, but not yet run through the model
        self.whole = False  # False while a step runs, and after one that was broken off
        self.steps = 0  # of all conversations: tells a generator that it is no longer alone
        self.prefill_s = self.extend_s = 0.0
        self.extend_tokens = 0

    @cached_property
    def tokenizer(self):
        """The checkpoint's tokenizer, loaded when first asked for: the engine itself needs ids only."""
        return tokenizers.load(self.ckpt.folder)

    def prefill(self, ids, reserve: int = 0, schedule=None) -> Tensor:
        """Start afresh with a prompt and return the logits (V,) after it, in float32 (float64 for float64).

        reserve: room to leave for new tokens; schedule: one for this conversation instead
        of the engine's. Raises ValueError for ids outside the vocabulary, or too little memory.
        """
        ids, kv, ckpt = self.check_ids(ids), self.kv, self.ckpt
        if schedule is not None:
            ckpt = replace(ckpt, schedule=resolve_schedule(schedule, self.config, ckpt.settings))
        self.check_room(ckpt, len(ids), 0, reserve)
        self.ids, self.pending, self.prefill_s, self.extend_s, self.extend_tokens = [], [], 0.0, 0.0, 0
        started = time.perf_counter()
        self.whole = False
        kv.reset(len(ids), ckpt.schedule, reserve)
        logits = self.run(ids)[0]
        self.prefill_s = time.perf_counter() - started
        return logits

    def extend(self, ids=(), all_logits=False) -> Tensor:
        """Append ids, one (a decode step) or many (a follow-up), and return the logits (V,) after them.

        all_logits: those after each of the tokens run, (T, V). Tokens that `generate` has yielded but not run are run first. Raises ValueError
        before any prefill, after a step that was broken off, for wrong ids, or too little memory.
        """
        ids = self.check_ids([*self.pending, *ids] if self.pending else ids)
        if not self.whole:
            raise ValueError("there is no whole conversation to extend; call prefill first")
        if (need := self.kv.growth_bytes(self.kv.length + len(ids))) > 0 and need > free_bytes(self.kv.device):
            raise ValueError(f"{len(ids):,} more tokens need {size(need)} on {self.kv.device}, more than is free; ask less, or start afresh with a larger reserve")
        started = time.perf_counter()
        logits = self.run(ids, len(ids) if all_logits else 1)
        self.pending = []
        self.extend_s += time.perf_counter() - started
        self.extend_tokens += len(ids)
        return logits if all_logits else logits[0]

    def run(self, ids: list[int], n_logits: int = 1) -> Tensor:
        self.whole = False
        self.steps += 1
        logits = self.model.step(torch.tensor(ids), n_logits).clone()  # of inference mode no more: callers may write to it
        if not logits.isfinite().all():  # waits for the device too, so the seconds in stats are of finished work
            raise ValueError(f"the logits are not finite numbers: the weights are damaged, or too large for {self.kv.dtype}; try a wider --dtype")
        self.whole = True
        self.ids += ids
        return logits

    def rewind(self) -> None:
        """Forget all that came after the prompt, without reading the prompt again.

        The blocks active now stay so until the next tokens choose; of a dense engine, what
        follows is bit for bit what follows a new prefill.
        """
        if not self.whole:
            raise ValueError("there is no whole conversation to go back in; call prefill first")
        self.kv.rewind()
        self.ids, self.pending = self.ids[: self.kv.n_prompt], []
        self.steps += 1

    # ---- a conversation in a file -----------------------------------------------------

    def save(self, path, extra: dict | None = None) -> None:
        """Write the conversation to a safetensors file, whole or not at all; `extra` is JSON kept with it.

        Raises ValueError if there is none, or the file cannot be written.
        """
        if not self.whole:
            raise ValueError("there is no whole conversation to save; call prefill first")
        if not self.model.rule.name:
            raise ValueError("the scoring function has no name to know it by when the file is opened; give it one: score=prune.Rule('name', function)")
        layout, tensors = self.kv.dump()
        identity = replace(self.ckpt, schedule=self.kv.schedule).identity
        header = json.dumps({"format": SAVED, "ckpt": str(self.ckpt.folder.resolve()), "identity": identity, "kv": layout,
                             "ids": self.ids, "pending": self.pending, "prefill_s": self.prefill_s, "extra": extra or {}})  # fmt: skip
        with whole_file(path) as part:
            save_file(tensors, part, {"slim": header, "crc": checksum(header, sorted(tensors.items()))})

    def resume(self, path, reserve: int = 0) -> dict:
        """Go on with a saved conversation, bit for bit as if it had never stopped; return its `extra`.

        Raises ValueError if the file is damaged, was saved with other weights or settings, or
        does not fit into memory; what the engine held before is then untouched.
        """
        header, file = read_saved(path)
        check_saved(path, header, self.ckpt.identity)
        tensors = ((name, file.get_tensor(name)) for name in sorted(file.keys()))
        if checksum(file.metadata()["slim"], tensors) != file.metadata().get("crc"):
            raise ValueError(f"{path} is damaged; read the document again")
        layout, ids = header["kv"], self.check_ids(header["ids"])
        self.check_room(self.ckpt, layout["n_prompt"], len(ids) - layout["n_prompt"], reserve)
        self.whole = False
        self.kv.restore(layout, file.get_tensor, self.ckpt.schedule, reserve)
        self.ids, self.pending, self.prefill_s, self.extend_s, self.extend_tokens = ids, header["pending"], header["prefill_s"], 0.0, 0
        self.whole, self.steps = True, self.steps + 1
        return header["extra"]

    def check_room(self, ckpt: Checkpoint, n_prompt: int, n_after: int, reserve: int) -> None:
        """Raise ValueError unless a conversation and a reserve after it fit in the place of the one there is."""
        if type(reserve) is not int or reserve < 0:
            raise ValueError(f"reserve is {reserve!r}; it must be a whole number of tokens, 0 or more")
        check_memory(ckpt, n_prompt, n_after + reserve, loaded=self.model.weights.nbytes + self.kv.gpu_bytes())

    def check_ids(self, ids) -> list[int]:
        try:
            ids = [index(i) for i in (ids.tolist() if hasattr(ids, "tolist") else ids)]
        except TypeError:
            raise ValueError(f"token ids must be a flat list of whole numbers, not {ids!r:.60}") from None
        if not ids:
            raise ValueError("there are no token ids to run; give at least one")
        if bad := [i for i in ids if not 0 <= i < self.config.vocab_size]:
            raise ValueError(f"token id {bad[0]} is outside 0..{self.config.vocab_size - 1}, the model's vocabulary; tokenizer and checkpoint do not belong together")
        return ids

    def generate(self, ids, max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0, seed: int | None = None, schedule=None, follow_up=False) -> Iterator[int]:
        """Return an iterator of new ids after a prompt, or after a follow-up to the conversation so far.

        temperature 0 is greedy; top_p keeps the likeliest tokens of that total probability;
        schedule as in `prefill`. Ends at max_new_tokens or before a stop token, which is not
        yielded. Raises ValueError at once for wrong arguments, and later if the engine was used
        otherwise in between.
        """
        check_sampling(max_new_tokens, temperature, top_p, seed)
        ids = self.check_ids(ids)
        if schedule is not None:
            schedule = resolve_schedule(schedule, self.config, self.ckpt.settings)
        random = torch.Generator()
        random.seed() if seed is None else random.manual_seed(seed)

        def stream():
            logits = self.extend(ids) if follow_up else self.prefill(ids, max_new_tokens, schedule)
            for left in reversed(range(max_new_tokens)):
                token = sample(logits, temperature, top_p, random)
                if token in self.ckpt.stop:
                    return
                self.pending, steps = [token], self.steps
                yield token
                if self.steps != steps:
                    raise ValueError("the engine was used while it generated; it holds one conversation, so finish the first or load another")
                if left:
                    logits = self.extend()

        return stream()

    @property
    def stats(self) -> dict:
        """Counters of the conversation so far: `kept` in prompt tokens per stage, bytes, seconds.

        kv_gpu_bytes is what the slabs take, room for new tokens included, and kv_dense_bytes
        what they would take without pruning; CPU bytes are of blocks that are there, without
        the free part of their pools.
        """
        kv, c = self.kv, self.config
        tail = kv.n_prompt - kv.tail_start
        return {
            "prompt_tokens": kv.n_prompt,
            "tokens": kv.length,
            "kept": [stage.n_slots * kv.block_len + tail for stage in kv.stages],
            "swaps": kv.swaps,
            "revived": kv.revived,
            "kv_gpu_bytes": kv.gpu_bytes(),
            "kv_cpu_bytes": kv.cpu_bytes(),
            "aux_cpu_bytes": kv.aux_pool.nbytes,
            "kv_dense_bytes": 2 * c.n_layers * (kv.tail_start + kv.tail_rows) * c.n_kv_heads * c.head_dim * kv.dtype.itemsize,
            "to_cpu_bytes": kv.to_cpu_bytes,
            "to_gpu_bytes": kv.to_gpu_bytes,
            "prefill_s": self.prefill_s,
            "extend_s": self.extend_s,
            "extend_tokens": self.extend_tokens,
        }


def index(i) -> int:
    """Return a whole number as an int; raise TypeError for anything else, a bool too."""
    if isinstance(i, bool):
        raise TypeError
    return operator.index(i)


def check_sampling(max_new_tokens, temperature, top_p, seed) -> None:
    if type(max_new_tokens) is not int or not 1 <= max_new_tokens < 2**31:
        raise ValueError(f"--max-new-tokens {max_new_tokens} must be a whole number of at least 1")
    if type(temperature) not in (int, float) or not (temperature == 0 or 1e-6 <= temperature < float("inf")):
        raise ValueError(f"--temperature {temperature!r} must be 0 (greedy) or a number from 0.000001 up")
    if type(top_p) not in (int, float) or not 0 < top_p <= 1:
        raise ValueError(f"--top-p {top_p!r} is outside 0..1 (0 excluded), the range of a probability")
    if seed is not None and (type(seed) is not int or not 0 <= seed < 2**63):
        raise ValueError(f"--seed {seed!r} is not a whole number within 0..{2**63 - 1}")


def sample(logits: Tensor, temperature: float, top_p: float, random: torch.Generator) -> int:
    """Draw a token id from logits (V,); on the CPU, so that a seed means the same on every device."""
    if temperature == 0:
        return int(logits.argmax())
    probs = torch.softmax(logits.cpu().double() / temperature, dim=-1)
    probs, order = probs.sort(descending=True)
    probs[probs.cumsum(0) - probs >= top_p] = 0  # the likeliest token always stays
    return int(order[torch.multinomial(probs, 1, generator=random)])


def main(argv=None) -> int:
    """Run the command line, which lies in the folder cli; return the exit code."""
    from cli import main  # imports this file in turn

    return main(argv)


if __name__ == "__main__":
    sys.modules["slim"] = sys.modules["__main__"]  # so that cli finds this very module, and it runs once
    sys.exit(main())
