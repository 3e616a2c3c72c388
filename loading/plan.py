"""What is decided before anything is allocated: device, dtype, schedule, rule, and whether the memory is there."""

import contextlib
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

import prune
from kvcache import aux_blocks, last_block_len, stage_layout
from loading.config import read_config, stop_tokens
from loading.find import find_checkpoint
from loading.schedule import auto_schedule, format_schedule, resolve_schedule
from loading.settings import Settings
from loading.weights import check_tensors, fingerprint, open_shards, weight_bytes
from model import DTYPES, Config, rows_at_once


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
        """Find a checkpoint and check it, its tensors and the settings; see `slim.load`."""
        options, rule, device = Settings(**settings), pick_rule(score), pick_device(device)
        folder = find_checkpoint(ckpt)
        config = read_config(folder / "config.json", options.rope_yarn)
        dtype, schedule = pick_dtype(dtype, config, device), resolve_schedule(schedule, config, options.block_len)
        tensors = open_shards(folder)
        check_tensors(folder, config, tensors)
        stop = stop_tokens(folder, config.vocab_size)
        return Checkpoint(folder, config, tensors, stop, device, dtype, schedule, rule, options)

    @property
    def identity(self) -> dict:
        """What a saved conversation depends on: settings, schedule, dtype, rule and weights."""
        return {
            "block_len": self.settings.block_len, "unit_len": self.settings.unit_len, "chunk": self.chunk,
            "window": self.window, "gamma": self.gamma, "schedule": format_schedule(self.schedule),
            "dtype": dtype_name(self.dtype), "score": self.rule.name, "sees": self.rule.sees,
            "every_layer": self.rule.every_layer, "rope_yarn": self.settings.rope_yarn, "weights": self.weights_hash,
        }  # fmt: skip

    @cached_property
    def weights_hash(self) -> str:
        return fingerprint(self.config, self.tensors)

    @property
    def aux_dim(self) -> int:
        return self.config.dim

    @property
    def chunk(self) -> int:
        return self.settings.chunk or (2048 if self.device.type == "cuda" else 1024)

    @property
    def window(self) -> int:
        return self.settings.window or self.rule.window

    @property
    def gamma(self) -> float:
        return self.rule.gamma if self.settings.gamma == -1 else self.settings.gamma


def pick_device(name: str) -> torch.device:
    """Return the torch device for auto, cpu, cuda or cuda:N; raise ValueError if it is unknown or absent."""
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda:0" if cuda else "cpu")
    kind, _, number = str(name).partition(":")
    digits = (number or "0").isascii() and (number or "0").isdigit()
    if kind not in ("cpu", "cuda") or (kind == "cpu" and number) or not digits:
        raise ValueError(f"--device {name!r} is unknown; use auto, cpu, cuda or cuda:N")
    if number and env_number("WORLD_SIZE") > 1 and int(number) != env_number("LOCAL_RANK", 0, 0):
        raise ValueError(f"--device {name!r}: under torchrun each rank takes the GPU of its own; use --device cuda")
    if kind == "cuda" and int(number or 0) >= cuda:
        raise ValueError(
            f"--device {name!r}: this machine has {cuda} CUDA devices that torch can use; try --device cpu"
        )
    return torch.device("cpu" if kind == "cpu" else f"cuda:{number or 0}")


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
    """Say whether this CPU has instructions for bfloat16; without them a prefill takes about six times as long."""
    known = getattr(torch.cpu, "get_capabilities", dict)()  # newer than the oldest torch we run on
    return not known or any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def pick_rule(score) -> prune.Rule:
    """Return the named rule, a Rule unchanged, or a nameless Rule around a function of weights."""
    if isinstance(score, prune.Rule):
        if score.name in prune.RULES and score.score is not prune.RULES[score.name].score:
            raise ValueError(f"a rule of your own cannot have the name of a built-in one, {score.name!r}; rename it")
        return score
    if isinstance(score, str) and score in prune.RULES:
        return prune.RULES[score]
    if callable(score) and not isinstance(score, type):
        return prune.Rule("", score)
    known = ", ".join(prune.RULES)
    raise ValueError(f"--score {score!r:.60} is unknown; use {known}; from Python also a function or a prune.Rule")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def env_number(name: str, default: int = 1, least: int = 1) -> int:
    """Return a variable that torchrun sets, such as WORLD_SIZE, or the default; raise ValueError if it is no number."""
    text = os.environ.get(name) or str(default)
    if not (text.isascii() and text.isdigit() and int(text) >= least):
        raise ValueError(
            f"the environment variable {name} is {text!r}; it must be a whole number of at least {least}, as torchrun "
            "sets it; unset it to run one process"
        )
    return int(text)


# ---- operations -------------------------------------------------------------------------


def layer_flops(c: Config, rows: int, keys: float, ffn_rows: int | None = None) -> float:
    """Return a layer's operations for rows that see `keys` keys on average; ffn_rows: rows of its FFN, if different."""
    projections, ffn = c.dim * (2 * c.n_heads + 2 * c.n_kv_heads) * c.head_dim, 3 * c.dim * c.hidden_dim
    ffn_rows = rows if ffn_rows is None else ffn_rows
    return 2 * rows * projections + 2 * ffn_rows * ffn + 4 * rows * keys * c.n_heads * c.head_dim


def prefill_flops(c: Config, n_prompt: int, schedule: dict, block_len: int = 64) -> float:
    """Return the floating-point operations of a prefill: matrices and causal attention, the head once."""
    sizes = prune.stage_blocks(n_prompt, schedule, block_len)
    rows = [n_prompt - (sizes[0] - n) * block_len for n in sizes]
    alive = [r for a, b, r in zip([0, *schedule], [*schedule, c.n_layers], rows) for _ in range(a, b)]
    ffn_rows = alive[1:] + alive[-1:]  # the FFN below a boundary runs on its survivors
    return sum(layer_flops(c, n, n / 2, m) for n, m in zip(alive, ffn_rows)) + 2 * c.dim * c.vocab_size


# ---- memory -----------------------------------------------------------------------------

KERNEL_BYTES = 2**26  # what kernels take for themselves, code and scratch, and the holes that malloc keeps


@dataclass(frozen=True)
class Plan:
    """Bytes a run needs: on the device weights, KV slabs and the largest temporaries; on the host what is pruned."""

    weights: int
    kv: int
    temporary: int
    host: int

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.temporary

    def __str__(self) -> str:
        parts = ((self.weights, "weights"), (self.kv, "KV"), (self.temporary, "temporary"))
        total = " + ".join(f"{format_bytes(n)} {name}" for n, name in parts) + f" = {format_bytes(self.total)}"
        return total + (f", and {format_bytes(self.host)} for what is pruned" if self.host else "")


def plan(ckpt: Checkpoint, n_prompt: int, n_new: int = 0, tail: int = 0, homes: int | None = None) -> Plan:
    """Return what a prompt of n_prompt tokens, of which the last `tail` are never pruned, and n_new more will take.

    homes: those of a saved conversation, whose prompt is not run again. Without it, one for every slot; an answer
    for which more blocks return takes more, and is checked as it does (`KVCache.swap_bytes`).
    """
    c, item, block_len = ckpt.config, ckpt.dtype.itemsize, ckpt.settings.block_len
    stages = stage_layout(c.n_layers, n_prompt - tail, ckpt.schedule, block_len)
    n_last = last_block_len(n_prompt - tail, block_len) + tail
    row = 2 * c.n_kv_heads * c.head_dim * item
    kv = sum(len(layers) * (slots * block_len + n_last + n_new) for layers, slots in stages) * row
    slots = [n for _, n in stages]
    host = max(homes or 0, sum(len(layers) * n for layers, n in stages[1:])) * block_len * row
    host += aux_blocks(slots) * block_len * ckpt.aux_dim * item
    first = step_bytes(ckpt, slots, n_last, n_last, first=True) if homes is None else 0
    later = step_bytes(ckpt, slots, 1, n_last + n_new) if n_new else 0
    return Plan(weight_bytes(c, ckpt.dtype), kv, max(first, later) + KERNEL_BYTES, host)


def step_bytes(ckpt: Checkpoint, slots: list[int], n_rows: int, n_tail: int, first=False, n_logits: int = 1) -> int:
    """Return the most that a step's temporaries take at a time.

    slots: of every stage; n_rows: the step's rows in a tail of n_tail; first: the prompt's step, which has a row
    for every token of a block. A later one is planned to revive as many blocks as can be.
    """
    c, item, block_len = ckpt.config, ckpt.dtype.itemsize, ckpt.settings.block_len
    wide, row = max(4, item), c.dim * item
    product = wide if ckpt.device.type == "cpu" and item < wide else 0  # a CPU multiplies half precision in float32
    last = n_logits * c.vocab_size * (2 * wide if item == wide else item + 2 * wide)  # of the head, wide, a copy
    most, below = last + n_rows * row, 0
    for i, n in enumerate(slots):
        revived = 0 if first or i == 0 else min(n, slots[0] - n) * block_len
        rows, keys = n_rows + (n * block_len if first else revived), n * block_len + n_tail
        x, chunk = rows * row, min(ckpt.chunk, rows)
        places = rows * (c.rotary_dim * wide + 40)  # cos, sin, positions
        places += 2 * ckpt.window * c.n_heads * c.head_dim * wide  # newest queries, joined with those before
        making = rows * c.rotary_dim // 2 * 5 * 8  # those in float64
        if i:  # x of both stages and, with revived rows, those and all together; before it, the mean keys of units
            units = slots[i - 1] * block_len // ckpt.settings.unit_len * (ckpt.rule.sees == "keys")
            most = max(most, below + x + (2 * revived * row + below if revived else 0))
            most = max(most, below + units * c.n_kv_heads * c.head_dim * 2 * wide)
        heads = c.n_heads + 2 * c.n_kv_heads
        attention = chunk * (row + heads * c.head_dim * (item + 3 * wide))  # q, k, v; turned; output in two parts
        mask = min(chunk, revived) * keys * (1 + item)  # as bool and as numbers
        scored = i + 1 < len(slots) and ckpt.rule.sees == "weights"
        few = min(ckpt.window, rows_at_once(c.n_heads, keys)) if scored else 1
        scores = few * c.n_heads * keys * 3 * wide  # products, softmax, a copy
        scores += keys * c.n_kv_heads * c.head_dim * wide  # keys, widened or laid out anew
        ffn = chunk * (row + max(3 * item, 2 * (item + product)) * c.hidden_dim)
        moving = 4 * revived * c.n_kv_heads * c.head_dim * item  # keys and values of a layer: gathered, laid out
        most = max(most, x + making, x + places + max(attention + mask, scores, ffn, moving))
        below = x
    return most


class NoRoom(ValueError):
    """Memory is too small for what is asked."""


def check_memory(
    ckpt: Checkpoint, n_prompt: int, n_new: int, tail: int = 0, homes: int | None = None, loaded: int = 0, held: int = 0
) -> Plan:
    """Return the plan; raise NoRoom if it does not fit, naming a flag that helps if one does.

    loaded, held: bytes that are there already, on the device and of what is pruned; the others as in `plan`.
    """

    def room(need: Plan) -> bool:
        return fits(ckpt.device, need.total - loaded, need.host - held)

    need = plan(ckpt, n_prompt, n_new, tail, homes)
    if room(need):
        return need
    if homes is not None:
        advice = "this conversation cannot go on with other settings: free memory, or read the document again"
    elif found := [flag for flag, way in smaller(ckpt).items() if room(plan(way, n_prompt, n_new, tail))]:
        advice = f"it would fit with {found[0]}"
    else:
        advice = "no flag makes it fit: use a shorter prompt or a smaller model"
    free = format_bytes(free_bytes(ckpt.device))
    raise NoRoom(f"not enough memory on {ckpt.device}: {need} for {n_prompt:,} tokens, but {free} free; {advice}")


def smaller(ckpt: Checkpoint) -> dict[str, Checkpoint]:
    """Return flags that make a run smaller, each with the run that it makes."""
    default = auto_schedule(ckpt.config.n_layers)
    small = {layer: max(2 * ckpt.settings.block_len, 1024 >> i) for i, layer in enumerate(default)}
    ways = {"--chunk 64": replace(ckpt, settings=replace(ckpt.settings, chunk=64))}
    ways |= {f"--schedule {format_schedule(s)}": replace(ckpt, schedule=s) for s in (default, small)}
    if ckpt.dtype.itemsize > 2:
        ways["--dtype bfloat16"] = replace(ckpt, dtype=torch.bfloat16)
    return ways


def fits(device: torch.device, n_bytes: int, host: int) -> bool:
    """Say whether n_bytes are free on the device, and `host` bytes on the CPU."""
    if device.type == "cpu":
        return n_bytes + host <= free_bytes(device)
    return n_bytes <= free_bytes(device) and host <= free_bytes(torch.device("cpu"))


def free_bytes(device: torch.device) -> int:
    """Return the memory a device can still give, in bytes; what torch holds but does not use counts as free."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux: all there is
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(free, free_in_cgroup()) // env_number("LOCAL_WORLD_SIZE")  # of torchrun: all share it


def free_in_cgroup(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """Return the bytes that a container's or slice's limits leave, infinity without limits."""
    free = float("inf")
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return free
    for _, kind, path in lines:
        v1 = "memory" in kind.split(",")
        if not v1 and kind:
            continue
        top = root / "memory" if v1 else root
        limit, used = ("memory.limit_in_bytes", "memory.usage_in_bytes") if v1 else ("memory.max", "memory.current")
        folder = top / path.strip("/")
        for place in (folder, *folder.parents):
            with contextlib.suppress(OSError, ValueError):  # no limit here: no file, or "max"
                left = int((place / limit).read_text()) - int((place / used).read_text())
                free = min(free, left + file_cache(place / "memory.stat"))
            if place == top:
                break
    return free


def file_cache(stat: Path) -> int:
    """Return the bytes of a group's file cache that the kernel can free; 0 if unknown."""
    try:
        numbers = dict(line.split() for line in stat.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(numbers.get("total_inactive_file", numbers.get("inactive_file", 0)))


def one_line(error) -> str:
    """Write an error as one line, with control characters such as Escape escaped for the terminal."""
    text = " ".join(str(error).split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def format_bytes(n: float) -> str:
    """Write a byte count as B, KiB, MiB or GiB."""
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            break
        n /= 1024
    else:
        unit = "GiB"
    return f"{n:.0f} {unit}" if unit == "B" or n >= 100 else f"{n:.2f} {unit}"
