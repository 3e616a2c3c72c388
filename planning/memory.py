"""How much memory a run needs, how much this machine has, and what to change when it is too little."""

import contextlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kvcache import aux_blocks, last_block_len, stage_layout
from loading.files import format_bytes
from loading.weights import weight_bytes
from model import rows_at_once
from planning.checkpoint import Checkpoint
from planning.schedule import auto_schedule, format_schedule
from planning.settings import env_number

KERNEL_BYTES = (
    2**26
)  # what kernels take for themselves, code and scratch, and the holes that malloc keeps


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
        total = (
            " + ".join(f"{format_bytes(n)} {name}" for n, name in parts)
            + f" = {format_bytes(self.total)}"
        )
        return total + (f", and {format_bytes(self.host)} for what is pruned" if self.host else "")


def plan(
    ckpt: Checkpoint, n_prompt: int, n_new: int = 0, tail: int = 0, homes: int | None = None
) -> Plan:
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


def step_bytes(
    ckpt: Checkpoint, slots: list[int], n_rows: int, n_tail: int, first=False, n_logits: int = 1
) -> int:
    """Return the most that a step's temporaries take at a time.

    slots: of every stage; n_rows: the step's rows in a tail of n_tail; first: the prompt's step, which has a row
    for every token of a block. A later one is planned to revive as many blocks as can be.
    """
    c, item, block_len = ckpt.config, ckpt.dtype.itemsize, ckpt.settings.block_len
    wide, row = max(4, item), c.dim * item
    product = (
        wide if ckpt.device.type == "cpu" and item < wide else 0
    )  # a CPU multiplies half precision in float32
    last = (
        n_logits * c.vocab_size * (2 * wide if item == wide else item + 2 * wide)
    )  # of the head, wide, a copy
    most, below = last + n_rows * row, 0
    for i, n in enumerate(slots):
        revived = 0 if first or i == 0 else min(n, slots[0] - n) * block_len
        rows, keys = n_rows + (n * block_len if first else revived), n * block_len + n_tail
        x, chunk = rows * row, min(ckpt.chunk, rows)
        places = rows * (c.rotary_dim * wide + 40)  # cos, sin, positions
        places += (
            2 * ckpt.window * c.n_heads * c.head_dim * wide
        )  # newest queries, joined with those before
        making = rows * c.rotary_dim // 2 * 5 * 8  # those in float64
        if i:  # x of both stages and, with revived rows, those and all together; before it, the mean keys of units
            units = slots[i - 1] * block_len // ckpt.settings.unit_len * (ckpt.rule.sees == "keys")
            most = max(most, below + x + (2 * revived * row + below if revived else 0))
            most = max(most, below + units * c.n_kv_heads * c.head_dim * 2 * wide)
        heads = c.n_heads + 2 * c.n_kv_heads
        attention = chunk * (
            row + heads * c.head_dim * (item + 3 * wide)
        )  # q, k, v; turned; output in two parts
        mask = min(chunk, revived) * keys * (1 + item)  # as bool and as numbers
        scored = i + 1 < len(slots) and ckpt.rule.sees == "weights"
        few = min(ckpt.window, rows_at_once(c.n_heads, keys)) if scored else 1
        scores = few * c.n_heads * keys * 3 * wide  # products, softmax, a copy
        scores += keys * c.n_kv_heads * c.head_dim * wide  # keys, widened or laid out anew
        ffn = chunk * (row + max(3 * item, 2 * (item + product)) * c.hidden_dim)
        moving = (
            4 * revived * c.n_kv_heads * c.head_dim * item
        )  # keys and values of a layer: gathered, laid out
        most = max(most, x + making, x + places + max(attention + mask, scores, ffn, moving))
        below = x
    return most


class NoRoom(ValueError):
    """Memory is too small for what is asked."""


def check_memory(
    ckpt: Checkpoint,
    n_prompt: int,
    n_new: int,
    tail: int = 0,
    homes: int | None = None,
    loaded: int = 0,
    held: int = 0,
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
    elif found := [
        flag for flag, way in smaller(ckpt).items() if room(plan(way, n_prompt, n_new, tail))
    ]:
        advice = f"it would fit with {found[0]}"
    else:
        advice = "no flag makes it fit: use a shorter prompt or a smaller model"
    free = format_bytes(free_bytes(ckpt.device))
    raise NoRoom(
        f"not enough memory on {ckpt.device}: {need} for {n_prompt:,} tokens, but {free} free; {advice}"
    )


def smaller(ckpt: Checkpoint) -> dict[str, Checkpoint]:
    """Return flags that make a run smaller, each with the run that it makes."""
    default = auto_schedule(ckpt.config.n_layers)
    small = {layer: max(2 * ckpt.settings.block_len, 1024 >> i) for i, layer in enumerate(default)}
    ways = {"--chunk 64": replace(ckpt, settings=replace(ckpt.settings, chunk=64))}
    ways |= {
        f"--schedule {format_schedule(s)}": replace(ckpt, schedule=s) for s in (default, small)
    }
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
        free = next(
            int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")
        )
    except (OSError, StopIteration):  # not Linux: all there is
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(free, free_in_cgroup()) // env_number(
        "LOCAL_WORLD_SIZE"
    )  # of torchrun: all share it


def free_in_cgroup(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> float:
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
        limit, used = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes")
            if v1
            else ("memory.max", "memory.current")
        )
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
