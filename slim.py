"""Read a long text with a language model, and answer questions about it.

    python slim.py --ckpt llama3.1-8b --prompt file.txt

`load` checks everything it can before it allocates anything, so a checkpoint is either
wholly loaded or refused with one line that says why. Only safetensors and JSON are read.
An `Engine` holds one conversation: `prefill` starts it, `extend` goes on with it, be it a
decoded token or a follow-up question, and `generate` is the two in a loop.
"""

import argparse
import contextlib
import hashlib
import json
import operator
import os
import shutil
import signal
import sys
import time

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported ends the program and nothing else

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import blockmap
import prune
import tokenizer as tokenizers
from kvcache import KVCache
from model import DTYPES, Config, Layer, Model, Weights, read_json

ALIASES = {
    "llama2-7b": "meta-llama/Llama-2-7b-hf", "llama2-7b-chat": "meta-llama/Llama-2-7b-chat-hf",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B", "llama3-8b-instruct": "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama3.1-8b": "meta-llama/Llama-3.1-8B", "llama3.1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "llama3.2-1b": "meta-llama/Llama-3.2-1B", "llama3.2-1b-instruct": "meta-llama/Llama-3.2-1B-Instruct",
    "llama3.2-3b": "meta-llama/Llama-3.2-3B", "llama3.2-3b-instruct": "meta-llama/Llama-3.2-3B-Instruct",
    "llama3.3-70b-instruct": "meta-llama/Llama-3.3-70B-Instruct", "tinyllama": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B", "qwen2.5-7b-instruct": "Qwen/Qwen2.5-7B-Instruct",
}  # fmt: skip


HERE = Path(__file__).resolve().parent
DEMO = dict(ckpt=str(HERE / "demo"), prompt=str(HERE / "demo" / "document.txt"), ask="question: the lot of vekebu is", schedule="5:2048,6:1024,7:512")


@dataclass(frozen=True)
class Settings:
    """Everything that can be set about a run, with its default; validated when built."""

    block_len: int = 64  # tokens a block
    unit_len: int = 8  # tokens a unit inside a block
    window: int = 4  # newest queries that score
    gamma: float = 0.9  # overlap from which the active set is kept
    chunk: int = 0  # rows computed at a time; 0: 1024 on a CPU, 2048 on a GPU
    overlap: bool = True  # copies on a stream of their own
    pool_mib: float = 64.0  # CPU memory for pruned blocks is taken in pieces of this size

    def __post_init__(self):
        for name, least, most in (("block_len", 1, 2**24), ("unit_len", 1, 2**24), ("window", 1, 2**16), ("chunk", 0, 2**24)):
            if type(value := getattr(self, name)) is not int or not least <= value <= most:
                raise ValueError(f"--{name.replace('_', '-')} is {value!r}; it must be a whole number within {least}..{most}")
        if self.block_len % self.unit_len:
            raise ValueError(f"--unit-len {self.unit_len} does not divide --block-len {self.block_len}; choose a divisor")
        if type(self.gamma) not in (int, float) or not 0 <= self.gamma <= 1:
            raise ValueError(f"--gamma {self.gamma!r} is outside 0..1, the range of an overlap")
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
    return Plan(weights, kv, hidden + pruned + max(attention, chunk * 4 * c.hidden_dim * item))


def check_memory(ckpt: "Checkpoint", n_prompt: int, n_new: int, loaded: int = 0) -> Plan:
    """Return the plan; raise ValueError naming the flag that would make it fit if it does not. `loaded`: bytes in place."""
    need, free = plan(ckpt, n_prompt, n_new), free_bytes(ckpt.device)
    if need.total - loaded <= free:
        return need
    default = prune.default_schedule(ckpt.config.n_layers, ckpt.config.model_type)
    small = {layer: max(2 * ckpt.settings.block_len, 1024 >> i) for i, layer in enumerate(default)}
    ways = {"--chunk 64": replace(ckpt, settings=replace(ckpt.settings, chunk=64))}
    ways |= {f"--schedule {format_schedule(s)}": replace(ckpt, schedule=s) for s in (default, small)}
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


def format_schedule(schedule: dict[int, int]) -> str:
    return ",".join(f"{layer}:{budget}" for layer, budget in schedule.items()) or "dense"


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
    schedule: dict[int, int]
    settings: Settings

    @staticmethod
    def open(ckpt, device="auto", dtype="auto", schedule="auto", **settings) -> "Checkpoint":
        """Find a checkpoint and check it, its tensors and the settings; see `load`."""
        options, where, folder = Settings(**settings), pick_device(device), find_checkpoint(ckpt)
        config = Config.read(folder / "config.json")
        kind, budgets = pick_dtype(dtype, config, where), resolve_schedule(schedule, config, options)
        tensors = open_shards(folder)
        check_tensors(folder, config, tensors)
        return Checkpoint(folder, config, tensors, stop_tokens(folder, config.vocab_size), where, kind, budgets, options)

    def identity(self, score) -> dict:
        """Return what a saved conversation depends on: settings, schedule, dtype, score and weights."""
        kept = {name: getattr(self.settings, name) for name in ("block_len", "unit_len", "window", "gamma", "chunk")}
        name = getattr(score, "__qualname__", type(score).__qualname__)
        return kept | {"schedule": format_schedule(self.schedule), "dtype": str(self.dtype).removeprefix("torch."), "score": name, "weights": self.fingerprint}

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

    def engine(self, score=prune.block_scores, reserve=(1, 0), progress=None) -> "Engine":
        """Load the weights, with pinned memory for a prompt and new tokens of `reserve`, and return the Engine."""
        c, s = self.config, self.settings
        if not (isinstance(reserve, tuple) and len(reserve) == 2 and all(type(n) is int for n in reserve) and reserve[0] >= 1 and reserve[1] >= 0):
            raise ValueError(f"reserve is {reserve!r}; it must be (prompt tokens, at least 1; new tokens, at least 0)")
        if not callable(score):
            raise ValueError(f"score is {score!r}; it must be a function like prune.block_scores")
        check_memory(self, *reserve)
        kv = KVCache(c.n_layers, c.n_kv_heads, c.head_dim, c.dim, s.block_len, self.dtype, self.device, s.overlap, s.pool_mib)
        kv.reset(reserve[0], self.schedule, reserve[1])
        weights = load_weights(self.tensors, c, self.device, self.dtype, progress)
        return Engine(self, Model(c, weights, kv, s.unit_len, s.window, s.gamma, self.chunk, score))


def load(ckpt, device="auto", dtype="auto", schedule="auto", score=prune.block_scores, reserve=(1, 0), progress=None, **settings) -> "Engine":
    """Load a checkpoint and return an Engine.

    schedule: "auto" (by depth), "dense", {} or {boundary: token budget}; score: a function
    like prune.block_scores; reserve: (prompt, new) tokens to plan and pin memory for, so
    that the first token does not wait for it; progress(done, total) follows the weights;
    settings: fields of Settings. Raises ValueError or FileNotFoundError, in one line, before
    anything is allocated.
    """
    return Checkpoint.open(ckpt, device, dtype, schedule, **settings).engine(score, reserve, progress)


def pick_dtype(name: str, config: Config, device: torch.device) -> torch.dtype:
    """Return the dtype of a run; auto is the checkpoint's own, but float32 for float16 on a CPU."""
    if not isinstance(name, str) or name != "auto" and name not in DTYPES:
        raise ValueError(f"--dtype {name!r} is unknown; use auto, {', '.join(DTYPES)}")
    dtype = config.dtype if name == "auto" else DTYPES[name]
    if dtype == torch.float64 and device.type == "cuda":
        raise ValueError("--dtype float64 is for exactness tests on a CPU; use float32, bfloat16 or float16 on CUDA")
    return torch.float32 if (name, device.type, dtype) == ("auto", "cpu", torch.float16) else dtype


def resolve_schedule(schedule, config: Config, settings: Settings) -> dict[int, int]:
    """Return {boundary: budget} for "auto", "dense", a string or a dict, checked against the model."""
    if isinstance(schedule, str):
        schedule = prune.parse_schedule(schedule)
    if schedule == "auto":
        schedule = prune.default_schedule(config.n_layers, config.model_type)
    schedule = {} if schedule == "dense" else schedule
    if not isinstance(schedule, dict):
        raise ValueError(f"schedule {schedule!r} must be 'auto', 'dense' or a dict of boundary: token budget")
    prune.check_schedule(schedule, config.n_layers, settings.block_len)
    return schedule


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


SAVED = "slim 1"  # the format of a saved conversation


@contextlib.contextmanager
def whole_file(path) -> Iterator[str]:
    """Give a path to write to; what is written there takes the place of `path` at the end, or vanishes.

    It lies in a folder of its own, as the library puts temporary files beside it: what is
    left of a killed process goes with the next try.
    """
    path = Path(path)
    folder = path.with_name(f".{path.name}.part")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir()
        yield str(folder / path.name)
        with open(folder / path.name, "rb") as file:
            os.fsync(file.fileno())  # before the name points to it
        os.replace(folder / path.name, path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be written ({error}); choose another place") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read_saved(path) -> tuple[dict, object]:
    """Return the header of a saved conversation and its open file; raise ValueError for anything else."""
    try:
        file = safe_open(path, framework="pt", device="cpu")
        header = json.loads((file.metadata() or {})["slim"])
        if header["format"] == SAVED and isinstance(header["identity"], dict):
            return header, file
        problem = f"its format is {header['format']!r}, not {SAVED!r}"
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
        if type(reserve) is not int or reserve < 0:
            raise ValueError(f"reserve is {reserve!r}; it must be a whole number of tokens, 0 or more")
        if schedule is not None:
            ckpt = replace(ckpt, schedule=resolve_schedule(schedule, self.config, ckpt.settings))
        check_memory(ckpt, len(ids), reserve, loaded=self.model.weights.nbytes + kv.gpu_bytes())
        self.ids, self.pending, self.prefill_s, self.extend_s, self.extend_tokens = [], [], 0.0, 0.0, 0
        started = time.perf_counter()
        self.whole = False
        kv.reset(len(ids), ckpt.schedule, reserve)
        logits = self.run(ids)
        self.prefill_s = time.perf_counter() - started
        return logits

    def extend(self, ids=()) -> Tensor:
        """Append ids, one (a decode step) or many (a follow-up), and return the logits (V,) after them.

        Tokens that `generate` has yielded but not run are run first. Raises ValueError
        before any prefill, after a step that was broken off, for wrong ids, or too little memory.
        """
        ids = self.check_ids([*self.pending, *ids] if self.pending else ids)
        if not self.whole:
            raise ValueError("there is no whole conversation to extend; call prefill first")
        if (need := self.kv.growth_bytes(self.kv.length + len(ids))) > 0 and need > free_bytes(self.kv.device):
            raise ValueError(f"{len(ids):,} more tokens need {size(need)} on {self.kv.device}, more than is free; ask less, or start afresh with a larger reserve")
        started = time.perf_counter()
        logits = self.run(ids)
        self.pending = []
        self.extend_s += time.perf_counter() - started
        self.extend_tokens += len(ids)
        return logits

    def run(self, ids: list[int]) -> Tensor:
        self.whole = False
        self.steps += 1
        logits = self.model.step(torch.tensor(ids)).clone()  # of inference mode no more: callers may write to it
        if not logits.isfinite().all():  # waits for the device too, so the seconds in stats are of finished work
            raise ValueError(f"the logits are not finite numbers: the weights are damaged, or too large for {self.kv.dtype}; try a wider --dtype")
        self.whole = True
        self.ids += ids
        return logits

    def rewind(self) -> None:
        """Go back to the end of the prompt: what came after is forgotten, and nothing has to be read again."""
        if not self.ids or not self.whole:
            raise ValueError("there is no whole conversation to go back in; call prefill first")
        self.kv.rewind()
        self.ids, self.pending = self.ids[: self.kv.n_prompt], []
        self.steps += 1

    # ---- a conversation in a file -----------------------------------------------------

    def save(self, path, extra=None) -> None:
        """Write the conversation to a safetensors file, whole or not at all; `extra` is JSON kept with it.

        Raises ValueError if there is none, and OSError if the file cannot be written.
        """
        if not self.whole:
            raise ValueError("there is no whole conversation to save; call prefill first")
        layout, tensors = self.kv.dump()
        identity = replace(self.ckpt, schedule=self.kv.schedule).identity(self.model.score)
        header = {"format": SAVED, "ckpt": str(self.ckpt.folder.resolve()), "identity": identity, "kv": layout,
                  "ids": self.ids, "pending": self.pending, "prefill_s": self.prefill_s, "extra": extra}  # fmt: skip
        with whole_file(path) as part:
            save_file(tensors, part, {"slim": json.dumps(header)})

    def resume(self, path, reserve: int = 0):
        """Go on with a saved conversation, bit for bit as if it had never stopped; return its `extra`.

        Raises ValueError if the file is damaged, or was saved with other weights or settings;
        what the engine held before is then untouched.
        """
        kv, c, ckpt = self.kv, self.config, self.ckpt
        header, file = read_saved(path)
        check_saved(path, header, ckpt.identity(self.model.score))
        try:
            ids, pending, layout, seconds = header["ids"], header["pending"], header["kv"], float(header["prefill_s"])
            wanted = kv.shapes(layout, ckpt.schedule, c.n_heads)
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            if found != wanted or len(self.check_ids(ids)) != layout["length"] or pending and not self.check_ids(pending):
                raise ValueError("its tensors are not those of its blocks")
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}); read the document again") from None
        check_memory(ckpt, layout["n_prompt"], layout["length"] - layout["n_prompt"] + reserve, loaded=self.model.weights.nbytes + kv.gpu_bytes())
        self.whole = False
        kv.restore(layout, file.get_tensor, ckpt.schedule, reserve)
        self.ids, self.pending, self.prefill_s, self.extend_s, self.extend_tokens = ids, pending, seconds, 0.0, 0
        self.whole, self.steps = True, self.steps + 1
        return header["extra"]

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


# ---- command line -----------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse prints its usage first; one line is enough
        self.exit(2, f"slim: error: {message}; see python slim.py --help\n")


EXAMPLES = """examples:
  python slim.py --ckpt llama3.1-8b-instruct --prompt book.txt --ask "Who is the narrator?" --ask "What happens in the end?"
  python slim.py --ckpt llama3.1-8b-instruct --prompt book.txt --save book.slim --chat      then: python slim.py --resume book.slim --chat
  python slim.py --ckpt llama3.1-8b-instruct --prompt book.txt --ask "Who is the narrator?" --map book.html
"""


def parse_args(argv=None) -> argparse.Namespace:
    """Read the command line; `given` holds what was written there, without the defaults."""
    d = {f.name: f.default for f in fields(Settings)}
    p = Parser(prog="slim.py", usage="%(prog)s [--ckpt CKPT] [--prompt FILE] [--ask TEXT] [options]", epilog=EXAMPLES, allow_abbrev=False,
               description=__doc__.split("\n")[0] + " Without arguments: the demo, dense and pruned.",
               formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=110))  # fmt: skip
    g = p.add_argument_group("what to read, and what to ask")
    g.add_argument("--ckpt", help="folder, name under checkpoints/, Hugging Face id, or alias such as llama3.1-8b")
    g.add_argument("--prompt", metavar="FILE", help="text to read, UTF-8; - is standard input")
    g.add_argument("--ask", metavar="TEXT", action="append", help="a question put after the text; again for each further one")
    g.add_argument("--chat", action="store_true", help="type questions at a prompt")
    g.add_argument("--save", metavar="FILE", help="keep the text as it was read, before any question")
    g.add_argument("--resume", metavar="FILE", help="go on with a saved text instead of reading one")
    g.add_argument("--max-prompt-tokens", type=int, metavar="N", help="read only the first N tokens of the text")
    g.add_argument("--raw", action="store_true", help="plain completion, even by an instruct model")
    g = p.add_argument_group("the answer")
    g.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="its length at most (%(default)s)")
    g.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (%(default)s)")
    g.add_argument("--top-p", type=float, default=1.0, metavar="P", help="sample from the likeliest tokens of this total probability (%(default)s)")
    g.add_argument("--seed", type=int, metavar="N", help="makes sampling repeatable")
    g = p.add_argument_group("what is shown")
    g.add_argument("--map", metavar="FILE", help="write an HTML page that shows which parts of the text were kept, and when")
    g.add_argument("--compare", action="store_true", help="answer twice, dense and pruned, and show both side by side")
    g.add_argument("--json", action="store_true", help="print one JSON object an answer instead of the text")
    g.add_argument("--quiet", action="store_true", help="print the answer alone")
    g = p.add_argument_group("pruning")
    g.add_argument("--schedule", default="auto", help="boundaries and token budgets as in 10:8192,20:4096,30:2048; auto goes by depth (%(default)s)")
    g.add_argument("--dense", action="store_true", help="no pruning: an empty schedule")
    g.add_argument("--block-len", type=int, default=d["block_len"], metavar="N", help="tokens a block (%(default)s)")
    g.add_argument("--unit-len", type=int, default=d["unit_len"], metavar="N", help="tokens a unit of a block (%(default)s)")
    g.add_argument("--window", type=int, default=d["window"], metavar="N", help="newest queries that score the blocks (%(default)s)")
    g.add_argument("--gamma", type=float, default=d["gamma"], metavar="G", help="overlap from which the active blocks are kept (%(default)s)")
    g = p.add_argument_group("the machine")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    g.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16 or float64 (%(default)s)")
    g.add_argument("--chunk", type=int, default=d["chunk"], metavar="N", help="rows computed at a time; 0 chooses by device (%(default)s)")
    g.add_argument("--no-overlap", action="store_true", help="copy synchronously, on the compute stream")
    defaults = vars(p.parse_args([]))
    given = vars(p.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults))))
    given = {key: value for key, value in given.items() if value is not None}
    args = argparse.Namespace(**defaults | given, given=given)
    args.ask = args.ask or []
    if args.ckpt is None and args.resume is None:
        args.ckpt = DEMO["ckpt"]
        if args.schedule == "auto" and not args.dense:
            args.schedule = DEMO["schedule"]
        if args.prompt is None:
            args.prompt = DEMO["prompt"]
            args.compare |= not (args.dense or args.chat or args.save or len(args.ask) > 1)
            args.ask = args.ask or ([] if args.chat or args.save else [DEMO["ask"]])
    return args


def check_args(args) -> None:
    """Raise ValueError for arguments that do not go together."""
    check_sampling(args.max_new_tokens, args.temperature, args.top_p, args.seed)
    for first, others in (("dense", ("schedule", "compare")), ("compare", ("chat", "save", "resume")), ("resume", ("prompt", "save", "max_prompt_tokens")), ("chat", ("json", "compare"))):
        if clash := [name for name in others if first in args.given and name in args.given]:
            raise ValueError(f"--{first} excludes --{clash[0].replace('_', '-')}; leave one of them out")
    if args.compare and len(args.ask) > 1:
        raise ValueError(f"--compare takes one --ask, not {len(args.ask)}; ask one, or leave --compare out")
    if any(not question.strip() for question in args.ask):
        raise ValueError("--ask is empty; put a question, or leave it out")
    if args.resume and not (args.ask or args.chat):
        raise ValueError("--resume has nothing to do; give --ask TEXT or --chat")
    for flag, path in (("save", args.save), ("map", args.map)):  # better now than after an hour of reading
        if path is not None and (not path or Path(path).is_dir() or not os.access(Path(path).absolute().parent, os.W_OK)):
            raise ValueError(f"--{flag} {path!r} cannot be written; give a file in a folder that exists")


def read_prompt(args) -> str:
    """Return the text of --prompt, "" without one; raise ValueError if it cannot be read, or nothing is asked either."""
    name = args.prompt
    if name is None and not args.ask and not args.chat:
        raise ValueError("there is no prompt; give --prompt FILE, --prompt - for standard input, or --ask TEXT")
    if name is None and args.save:
        raise ValueError("--save keeps a text that was read; give one with --prompt FILE")
    if name is None:
        return ""
    if name == "-" and args.chat:
        raise ValueError("--prompt - and --chat both want standard input; put the text in a file")
    if name == "-" and sys.stdin is None:
        raise ValueError("--prompt - is standard input, and that is closed; give a text file")
    if name != "-" and (not name or Path(name).is_dir()):
        raise ValueError(f"--prompt {name!r} is a directory; give a text file")
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise ValueError(f"--prompt {name} cannot be read ({error}); give a text file, or - for standard input") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt {name} is not UTF-8: byte {data[error.start]:#04x} at offset {error.start}; convert it first") from None
    if not text.strip():
        raise ValueError(f"--prompt {name} is empty; there is nothing to read")
    return text


def build_ids(args, text: str, tokenizer) -> list[int]:
    """Return the ids to begin with: the text and the first question, or the text alone if it is read before anything is asked."""
    if args.max_prompt_tokens is not None:
        if args.max_prompt_tokens < 1:
            raise ValueError(f"--max-prompt-tokens {args.max_prompt_tokens} must be at least 1")
        text = tokenizer.decode(tokenizer.encode(text)[: args.max_prompt_tokens])
    if text and (args.chat or args.save):
        return tokenizer.chat(text, end=False)
    parts = [part for part in (text, args.ask.pop(0) if args.ask else "") if part]
    return tokenizer.chat(("\n\n" if tokenizer.chat_format else "\n").join(parts)) if parts else []


class Progress:
    """One line on a terminal's stderr that overwrites itself; silent anywhere else."""

    def __init__(self, quiet: bool):
        self.on = sys.stderr.isatty() and not quiet
        self.up, self.when = False, 0.0  # whether a line stands there now, and since when

    def show(self, text: str) -> None:
        if self.on and time.perf_counter() - self.when > 0.1:
            self.up, self.when = True, time.perf_counter()
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self.up:
            self.up = False
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def loading(self, done: int, total: int) -> None:
        self.show(f"loading weights {100 * done // total}%")

    def follow(self, engine: Engine) -> None:
        """Watch a prefill: layer, tokens alive, and the time left by the work that is left."""
        c, kv = engine.config, engine.kv
        started, done = time.perf_counter(), 0

        def cost(rows: int, keys: float) -> float:
            linear = c.dim * (2 * c.n_heads + 2 * c.n_kv_heads) * c.head_dim + 3 * c.dim * c.hidden_dim
            return 2 * rows * linear + 4 * rows * keys * c.n_heads * c.head_dim

        def on_chunk(layer: int, rows: int, keys: int) -> None:
            nonlocal done
            alive = [stage.n_slots * kv.block_len + kv.n_prompt - kv.tail_start for stage in kv.stages for _ in stage.layers]
            total = sum(cost(n, n / 2) for n in alive)
            spent = time.perf_counter() - started
            left = f"{spent * (total - done) / done:.0f} s left" if done else ""
            self.show(f"reading the prompt: layer {layer + 1}/{c.n_layers}, {alive[layer]:,} of {kv.n_prompt:,} tokens alive  {left}")
            done += cost(rows, keys - rows / 2)

        if self.on:
            engine.model.on_chunk = on_chunk

    def done(self, engine: Engine) -> None:
        engine.model.on_chunk = lambda *_: None
        self.clear()


def summary(stats: dict, device) -> str:
    """Say what a conversation keeps, and where."""
    kept = " > ".join(f"{n:,}" for n in stats["kept"])
    return (
        f"slim: {stats['prompt_tokens']:,} prompt tokens, kept per stage {kept}; {stats['swaps']:,} blocks swapped, {stats['revived']:,} of them revived\n"
        f"slim: KV {size(stats['kv_gpu_bytes'])} on {device} + {size(stats['kv_cpu_bytes'])} at home + {size(stats['aux_cpu_bytes'])} pruned rows, "
        f"dense {size(stats['kv_dense_bytes'])}"
    )


def timing(r: dict) -> str:
    """Say how long an answer took and, of a follow-up, what it would have taken to read all again."""
    if not r["ids"]:
        return f"slim: {'interrupted while reading' if r['interrupted'] else 'an empty answer after'} {r['n_new']:,} tokens, {r['ttft_s']:.2f} s"
    speed = f"slim: first token {r['ttft_s']:.2f} s, then {r['decode_tok_s']:.1f} tokens/s"
    if not r["follow_up"]:
        return speed
    return speed + f"; a new prefill took {r['prefill_s']:.2f} s, {r['prefill_s'] / r['ttft_s']:.0f}x as long; {r['swaps_here']} blocks swapped, {r['revived_here']} of them revived"


def comparison(dense: dict, pruned: dict) -> str:
    """Write two results side by side."""
    rows = [
        ("first token", f"{dense['ttft_s']:.2f} s", f"{pruned['ttft_s']:.2f} s", f"{dense['ttft_s'] / pruned['ttft_s']:.2f}x sooner"),
        ("KV on the device", size(dense["kv_gpu_bytes"]), size(pruned["kv_gpu_bytes"]), f"{pruned['kv_gpu_bytes'] / dense['kv_gpu_bytes']:.0%} of dense"),
        ("prompt tokens kept", f"{dense['prompt_tokens']:,}", " > ".join(f"{n:,}" for n in pruned["kept"]), "per stage"),
        ("answer", *(" ".join(r["text"].split())[:30] for r in (dense, pruned)), "the same" if dense["ids"] == pruned["ids"] else "not the same"),
    ]
    return "\n".join(f"slim: {a:20}{b:>16}{c:>26}   {d}".rstrip() for a, b, c, d in [("", "dense", "slim", ""), *rows])


def public(r: dict) -> dict:
    """Return the part of a result that --json prints."""
    keys = ("text", "ids", "prompt_tokens", "kept", "ttft_s", "decode_tok_s", "kv_gpu_bytes", "kv_cpu_bytes", "kv_dense_bytes", "swaps", "revived")
    return {k: r[k] for k in keys}


def main(argv=None) -> int:
    """Run the command line; return the exit code: 0, 2 for bad input, 130 for Ctrl-C, 141 for a closed pipe."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through every `finally`, so that nothing half-written stays
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w"))
        getattr(sys, name).reconfigure(errors="replace")  # a terminal that lacks a character shows another
    args = parse_args(argv)
    progress = Progress(args.quiet)
    try:
        return run(args, progress)
    except BrokenPipeError:  # the reader has seen enough, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, torch.cuda.OutOfMemoryError) as error:
        with contextlib.suppress(OSError):  # standard error may be what cannot be written
            progress.clear()
            print(f"slim: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        progress.clear()
        print("slim: interrupted before the first step", file=sys.stderr)
        return 130


def status(args, progress: Progress):
    """Return what prints a line of ours to standard error: dim on a terminal that has colours, so that the answer stands out."""
    plain = not sys.stderr.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"

    def say(text: str) -> None:
        progress.clear()
        print(text if plain else f"\033[2m{text}\033[0m", file=sys.stderr, flush=True)

    return (lambda text: None) if args.quiet else say


def run(args, progress: Progress) -> int:
    """Check everything, then load, then read, then answer."""
    say = status(args, progress)
    check_args(args)
    header = adopt(args) if args.resume else None
    settings = {f.name: getattr(args, f.name) for f in fields(Settings) if hasattr(args, f.name)}
    ckpt = Checkpoint.open(args.ckpt, args.device, args.dtype, "dense" if args.dense else args.schedule, overlap=not args.no_overlap, **settings)
    if args.compare and not ckpt.schedule:
        raise ValueError("--compare has nothing to compare: the schedule is dense; give one with --schedule LAYER:TOKENS")
    c, tokenizer = ckpt.config, tokenizers.load(ckpt.folder)
    if tokenizer.vocab_size > c.vocab_size:
        raise ValueError(f"{ckpt.folder}: the tokenizer has {tokenizer.vocab_size:,} ids, the model {c.vocab_size:,}; they do not belong together")
    if args.raw:
        tokenizer.chat_format = None
    if header:
        check_saved(args.resume, header, ckpt.identity(prune.block_scores))
    ids = [] if header else build_ids(args, read_prompt(args), tokenizer)
    n_prompt = max(1, len(header["ids"]) if header else len(ids))
    engine = ckpt.engine(reserve=(n_prompt, args.max_new_tokens), progress=progress.loading)
    say(f"slim: {ckpt.folder.name}, {c.n_layers} layers, schedule {format_schedule(ckpt.schedule)}, {n_prompt:,} prompt tokens")
    say(f"slim: {ckpt.device}, {str(ckpt.dtype).removeprefix('torch.')}: {plan(ckpt, n_prompt, args.max_new_tokens)}, {size(free_bytes(ckpt.device))} more free")
    talk = Talk(engine, tokenizer, args, progress, say)
    if args.compare:
        talk.compare(ids)
    else:
        talk.begin(ids)
    for question in args.ask:
        if not talk.interrupted:
            talk.ask(question)
    if args.chat:
        chat(talk)
    if args.map and engine.whole:
        say(f"slim: map {talk.draw(args.map)}")
    return 130 if talk.interrupted and not args.chat else 0


def adopt(args) -> dict:
    """Take from a saved conversation what the command line leaves open; return the file's header."""
    header, _ = read_saved(args.resume)
    saved = header["identity"] | {"ckpt": header.get("ckpt")}
    for name in ("ckpt", "dtype", "schedule", "block_len", "unit_len", "window", "gamma", "chunk"):
        if name not in args.given and not (name == "schedule" and args.dense):
            setattr(args, name, saved.get(name))
    return header


class Talk:
    """Questions put to one document, by --ask or at the prompt of --chat, and what is said about each."""

    def __init__(self, engine: Engine, tokenizer, args, progress: Progress, say):
        self.engine, self.tokenizer, self.args, self.progress, self.say = engine, tokenizer, args, progress, say
        self.interrupted = False
        self.open = False  # the text was read, and its turn waits for a question
        self.recorder = blockmap.Recorder(engine)

    def begin(self, ids: list[int]) -> None:
        """Open the saved text, or read the text alone, or answer the first question about it."""
        engine, args = self.engine, self.args
        if args.resume:
            started = time.perf_counter()
            extra = engine.resume(args.resume, args.max_new_tokens) or {}
            self.open, record = extra.get("open") is True, extra.get("map")
            self.recorder.record = record if isinstance(record, dict) and {"stages", "steps"} <= set(record) else {}
            self.say(f"slim: {args.resume} opened in {time.perf_counter() - started:.2f} s; reading the text took {engine.prefill_s:.2f} s")
        elif ids and (args.chat or args.save):
            self.read(ids)
        elif ids:
            self.report(self.answer(ids))

    def read(self, ids: list[int]) -> None:
        """Read the text before anything is asked, and save it if that is wanted."""
        engine, path = self.engine, self.args.save
        self.warn(len(ids))
        self.progress.follow(engine)
        engine.prefill(ids, self.args.max_new_tokens)
        self.progress.done(engine)
        self.open = True
        self.say(f"slim: read in {engine.prefill_s:.2f} s\n{summary(engine.stats, engine.kv.device)}")
        if path:
            engine.save(path, {"open": True, "map": self.recorder.record})
            self.say(f"slim: saved to {path}, {size(Path(path).stat().st_size)}; go on with --resume {path}")

    def ask(self, question: str) -> None:
        """Answer one more question."""
        tok, first = self.tokenizer, not self.engine.ids
        ids = tok.rest(question) if self.open else tok.chat(question, begin=first)
        self.open = False
        self.report(self.answer(ids, follow_up=not first))

    def compare(self, ids: list[int]) -> None:
        """Answer twice, dense and pruned."""
        self.engine.prefill(ids[:256])  # the first kernels of a process are slow: neither side shall pay for them
        results = {}
        for name, budgets in (("dense", {}), ("slim", self.engine.ckpt.schedule)):
            results[name] = r = self.answer(ids, budgets)
            self.say(timing(r) + "\n" + summary(r, self.engine.kv.device))
            if self.interrupted:
                return
        self.say(comparison(results["dense"], results["slim"]))
        if self.args.json:
            print(json.dumps({name: public(r) for name, r in results.items()}), flush=True)

    def report(self, r: dict) -> None:
        if self.args.json:
            print(json.dumps(public(r)), flush=True)
        self.say(timing(r) if r["follow_up"] else timing(r) + "\n" + summary(r, self.engine.kv.device))

    def warn(self, n_new: int) -> None:
        """Say so if what comes goes beyond the context that the model was trained for."""
        n, new, most = len(self.engine.ids) + n_new, self.args.max_new_tokens, self.engine.config.max_len
        if n + new > most:
            self.say(f"slim: warning: {n:,} prompt + {new:,} new tokens are beyond the {most:,} this model was trained for; expect a poor answer")

    def answer(self, ids: list[int], schedule=None, follow_up=False) -> dict:
        """Generate and, but for --json, print an answer as it comes; return it with what it took, also after Ctrl-C."""
        engine, args, text = self.engine, self.args, not self.args.json
        if not follow_up:
            engine.ids = []
        self.warn(len(ids))
        out, pieces, times = [], [], [time.perf_counter()]
        before = engine.stats if follow_up else {"swaps": 0, "revived": 0}

        def tokens(stopped):
            for token in engine.generate(ids, args.max_new_tokens, args.temperature, args.top_p, args.seed, schedule, follow_up):
                times.append(time.perf_counter())
                self.progress.done(engine)
                out.append(token)
                yield token
                if stopped:
                    raise KeyboardInterrupt

        self.interrupted = False
        if not follow_up:
            self.progress.follow(engine)
        try:
            with stop_between_tokens(args.chat) as stopped:
                for piece in self.tokenizer.stream(tokens(stopped)):
                    pieces.append(piece)
                    if text:
                        print(piece, end="", flush=True)
        except KeyboardInterrupt:
            self.interrupted = True
        self.progress.done(engine)
        if text and (pieces or not self.interrupted):
            print(flush=True)
        first = times[1] if out else time.perf_counter()
        rate = (len(out) - 1) / (times[-1] - first) if len(out) > 1 else 0.0
        r = engine.stats | {"text": "".join(pieces), "ids": out, "ttft_s": first - times[0], "decode_tok_s": rate, "n_new": len(ids)}
        return r | {"interrupted": self.interrupted, "follow_up": follow_up} | {f"{key}_here": r[key] - before[key] for key in ("swaps", "revived")}

    def draw(self, path: str) -> str:
        """Write the map of the conversation; return where."""
        blockmap.write(path, self.engine, self.recorder, self.engine.ids + self.engine.pending)
        return path


@contextlib.contextmanager
def stop_between_tokens(on: bool):
    """Let Ctrl-C set a mark instead of breaking off a step, which would lose the conversation; a second one does break off."""
    marks = []

    def mark(*_):
        if marks:
            raise KeyboardInterrupt
        marks.append(True)

    usual = signal.signal(signal.SIGINT, mark) if on else None
    try:
        yield marks
    finally:
        if on:
            signal.signal(signal.SIGINT, usual)


def chat(talk: Talk) -> None:
    """Read questions and commands until /quit or the end of the input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() its history and editing
    engine, start = talk.engine, talk.open
    talk.say("slim: ask away; /stats, /map [FILE], /reset, /quit; Ctrl-C stops an answer")
    while engine.whole or not engine.ids:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
            if line == "/quit":
                return
            elif line == "/stats":
                talk.say(summary(engine.stats, engine.kv.device) + f"\nslim: {len(engine.ids):,} of {engine.config.max_len:,} tokens of context in use")
            elif line.split(" ")[0] == "/map":
                talk.say(f"slim: map {talk.draw(line[4:].strip() or talk.args.map or 'map.html')}")
            elif line == "/reset":
                engine.rewind()
                talk.recorder.restart()
                talk.open = start
                talk.say("slim: all questions are forgotten, the text is not")
            elif line.startswith("/"):
                talk.say(f"slim: {line.split(' ')[0]} is no command; there are /stats, /map [FILE], /reset and /quit")
            elif line:
                talk.ask(line)
        except EOFError:
            return print(file=sys.stderr)
        except KeyboardInterrupt:
            print(file=sys.stderr)  # an empty line, and another try
        except (ValueError, OSError) as error:
            talk.say(f"slim: error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    sys.exit(main())
