"""Load a checkpoint, generate, and the command line of Slim.

    python slim.py --ckpt llama3.1-8b --prompt file.txt

`load` checks everything it can before it allocates anything, so a checkpoint is either
wholly loaded or refused with one line that says why. Only safetensors and JSON are read.
An `Engine` holds one conversation: `prefill` starts it, `extend` goes on with it, be it a
decoded token or a follow-up question, and `generate` is the two in a loop.
"""

import argparse
import contextlib
import json
import operator
import os
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
from torch import Tensor

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


class Engine:
    """One conversation with a model. Make it with `load`."""

    def __init__(self, ckpt: Checkpoint, model: Model):
        self.ckpt, self.model, self.config, self.kv = ckpt, model, ckpt.config, model.kv
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
        self.pending, self.prefill_s, self.extend_s, self.extend_tokens = [], 0.0, 0.0, 0
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
        return logits

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

    def generate(self, ids, max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0, seed: int | None = None, schedule=None) -> Iterator[int]:
        """Return an iterator of new ids after a prompt.

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
            logits = self.prefill(ids, max_new_tokens, schedule)
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


def parse_args(argv=None) -> argparse.Namespace:
    d = {f.name: f.default for f in fields(Settings)}
    p = Parser(prog="slim.py", description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    p.add_argument("--ckpt", help="folder, name under checkpoints/, Hugging Face id or alias such as llama3.1-8b; left out: the demo, compared with dense")
    p.add_argument("--prompt", metavar="FILE", help="text to read, UTF-8; - is standard input")
    p.add_argument("--ask", metavar="TEXT", help="a question put after the text")
    p.add_argument("--max-prompt-tokens", type=int, metavar="N", help="read only the first N tokens of the text")
    p.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="length of the answer at most")
    p.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    p.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest tokens of this total probability")
    p.add_argument("--seed", type=int, help="makes sampling repeatable")
    p.add_argument("--schedule", default="auto", help="boundaries and token budgets as in 10:8192,20:4096,30:2048; auto goes by depth")
    p.add_argument("--dense", action="store_true", help="no pruning: an empty schedule")
    p.add_argument("--compare", action="store_true", help="answer twice, dense and pruned, and show both side by side")
    p.add_argument("--block-len", type=int, default=d["block_len"], help="tokens a block")
    p.add_argument("--unit-len", type=int, default=d["unit_len"], help="tokens a unit of a block")
    p.add_argument("--window", type=int, default=d["window"], help="newest queries that score the blocks")
    p.add_argument("--gamma", type=float, default=d["gamma"], help="overlap from which the active blocks are kept")
    p.add_argument("--chunk", type=int, default=d["chunk"], help="rows computed at a time; 0 chooses by device")
    p.add_argument("--no-overlap", action="store_true", help="copy synchronously, on the compute stream")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    p.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16 or float64")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of the answer")
    p.add_argument("--raw", action="store_true", help="plain completion, even by an instruct model")
    p.add_argument("--quiet", action="store_true", help="print the answer alone")
    args = p.parse_args(argv)
    if args.ckpt is None:
        args.ckpt, args.compare = DEMO["ckpt"], not args.dense
        args.schedule = DEMO["schedule"] if args.schedule == "auto" and not args.dense else args.schedule
        if args.prompt is None:
            args.prompt, args.ask = DEMO["prompt"], args.ask or DEMO["ask"]
    return args


def read_prompt(args) -> str:
    """Return the text of --prompt; raise ValueError or OSError if there is none to be read."""
    name = args.prompt
    if args.ask is not None and not args.ask.strip():
        raise ValueError("--ask is empty; put a question, or leave it out")
    if name is None and args.ask is None:
        raise ValueError("there is no prompt; give --prompt FILE, --prompt - for standard input, or --ask TEXT")
    if name is None:
        return ""
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
    """Return the prompt's ids: a chat turn for an instruct model, plain text otherwise or with --raw."""
    if args.max_prompt_tokens is not None:
        if args.max_prompt_tokens < 1:
            raise ValueError(f"--max-prompt-tokens {args.max_prompt_tokens} must be at least 1")
        text = tokenizer.decode(tokenizer.encode(text)[: args.max_prompt_tokens])
    parts = [part for part in (text, args.ask) if part]
    if tokenizer.chat_format and not args.raw:
        return tokenizer.chat("\n\n".join(parts))
    text = "\n".join(parts)  # a plain completion goes on with the line that asks
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return start + tokenizer.encode(text)


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


def summary(r: dict, device) -> str:
    if not r["tokens"]:
        return f"slim: interrupted while reading {r['prompt_tokens']:,} prompt tokens, after {r['ttft_s']:.2f} s"
    kept = " > ".join(f"{n:,}" for n in r["kept"])
    return (
        f"slim: {r['prompt_tokens']:,} prompt tokens, kept per stage {kept}; first token {r['ttft_s']:.2f} s, then {r['decode_tok_s']:.1f} tokens/s\n"
        f"slim: KV {size(r['kv_gpu_bytes'])} on {device} + {size(r['kv_cpu_bytes'])} at home + {size(r['aux_cpu_bytes'])} pruned rows, "
        f"dense {size(r['kv_dense_bytes'])}; {r['swaps']} blocks swapped, {r['revived']} of them revived"
    )


def comparison(dense: dict, pruned: dict) -> str:
    """Write two results side by side."""
    rows = [
        ("first token", f"{dense['ttft_s']:.2f} s", f"{pruned['ttft_s']:.2f} s", f"{dense['ttft_s'] / pruned['ttft_s']:.2f}x sooner"),
        ("KV on the device", size(dense["kv_gpu_bytes"]), size(pruned["kv_gpu_bytes"]), f"{pruned['kv_gpu_bytes'] / dense['kv_gpu_bytes']:.0%} of dense"),
        ("prompt tokens kept", f"{dense['prompt_tokens']:,}", " > ".join(f"{n:,}" for n in pruned["kept"]), "per stage"),
        ("answer", *(" ".join(r["text"].split())[:30] for r in (dense, pruned)), "the same" if dense["ids"] == pruned["ids"] else "not the same"),
    ]
    return "\n".join(f"slim: {a:20}{b:>16}{c:>26}   {d}".rstrip() for a, b, c, d in [("", "dense", "slim", ""), *rows])


def main(argv=None) -> int:
    """Run the command line; return the exit code: 0, 2 for bad input, 130 for Ctrl-C, 141 for a closed pipe."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
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


def run(args, progress: Progress) -> int:
    """Check everything, then load, then answer."""
    say = (lambda text: None) if args.quiet else (lambda text: (progress.clear(), print(text, file=sys.stderr, flush=True)))
    if args.dense and (args.schedule != "auto" or args.compare):
        raise ValueError("--dense excludes --schedule and --compare; leave one of them out")
    check_sampling(args.max_new_tokens, args.temperature, args.top_p, args.seed)
    settings = {f.name: getattr(args, f.name) for f in fields(Settings) if hasattr(args, f.name)}
    ckpt = Checkpoint.open(args.ckpt, args.device, args.dtype, "dense" if args.dense else args.schedule, overlap=not args.no_overlap, **settings)
    if args.compare and not ckpt.schedule:
        raise ValueError("--compare has nothing to compare: the schedule is dense; give one with --schedule LAYER:TOKENS")
    c, tokenizer = ckpt.config, tokenizers.load(ckpt.folder)
    if tokenizer.vocab_size > c.vocab_size:
        raise ValueError(f"{ckpt.folder}: the tokenizer has {tokenizer.vocab_size:,} ids, the model {c.vocab_size:,}; they do not belong together")
    ids = build_ids(args, read_prompt(args), tokenizer)
    engine = ckpt.engine(reserve=(len(ids), args.max_new_tokens), progress=progress.loading)
    say(f"slim: {ckpt.folder.name}, {c.n_layers} layers, schedule {format_schedule(ckpt.schedule)}, {len(ids):,} prompt tokens")
    say(f"slim: {ckpt.device}, {str(ckpt.dtype).removeprefix('torch.')}: {plan(ckpt, len(ids), args.max_new_tokens)}, {size(free_bytes(ckpt.device))} more free")
    if len(ids) + args.max_new_tokens > c.max_len:
        say(f"slim: warning: {len(ids):,} prompt + {args.max_new_tokens:,} new tokens are beyond the {c.max_len:,} this model was trained for; expect a poor answer")
    if args.compare:
        engine.prefill(ids[:256])  # the first kernels of a process are slow: neither side shall pay for them
    results = []
    for budgets in [{}, ckpt.schedule] if args.compare else [ckpt.schedule]:
        results.append(answer(engine, tokenizer, args, ids, budgets, progress))
        say(summary(results[-1], ckpt.device))
        if results[-1]["interrupted"]:
            break
    if args.json:
        shown = [public(r) for r in results]
        print(json.dumps(dict(zip(("dense", "slim"), shown)) if args.compare else shown[0]), flush=True)
    elif len(results) == 2:
        say(comparison(*results))
    return 130 if results[-1]["interrupted"] else 0


def public(r: dict) -> dict:
    """Return the part of a result that --json prints."""
    keys = ("text", "ids", "prompt_tokens", "kept", "ttft_s", "decode_tok_s", "kv_gpu_bytes", "kv_cpu_bytes", "kv_dense_bytes", "swaps", "revived")
    return {k: r[k] for k in keys}


def answer(engine: Engine, tokenizer, args, ids: list[int], schedule: dict, progress: Progress) -> dict:
    """Generate and, but for --json, print an answer as it comes; return it with what it took, also after Ctrl-C."""
    out, pieces, times, interrupted = [], [], [time.perf_counter()], False

    def tokens():
        for token in engine.generate(ids, args.max_new_tokens, args.temperature, args.top_p, args.seed, schedule=schedule):
            times.append(time.perf_counter())
            if not out:
                progress.clear()
                engine.model.on_chunk = lambda *_: None
            out.append(token)
            yield token

    progress.follow(engine)
    try:
        for piece in tokenizer.stream(tokens()):
            pieces.append(piece)
            if not args.json:
                print(piece, end="", flush=True)
        if not args.json:
            print(flush=True)
    except KeyboardInterrupt:
        interrupted = True
        if pieces and not args.json:
            print(flush=True)
    first = times[1] if out else time.perf_counter()
    rate = (len(out) - 1) / (times[-1] - first) if len(out) > 1 else 0.0
    return engine.stats | {"text": "".join(pieces), "ids": out, "ttft_s": first - times[0], "decode_tok_s": rate, "interrupted": interrupted}


if __name__ == "__main__":
    sys.exit(main())
