"""How much memory a run needs, how much there is, and what to change if it is too little."""

import contextlib
import math
import os
from bisect import bisect
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kvcache import aux_blocks, last_block_len, stage_layout
from loading.files import format_bytes
from loading.weights import LEAST_IN_BLOCKS, in_blocks, matrix_shapes
from model import MANY_QUERIES, TILE, rows_at_once
from packed import CHUNK, FEW_ROWS, MANY_ROWS, PIECE, prefers_float32
from planning.checkpoint import Checkpoint
from planning.schedule import format_schedule
from planning.settings import MOST_DRAFTED, env_number

KERNEL_BYTES = 3 * 2**25  # reserved for kernel code, scratch buffers and malloc fragmentation
STEP_ROWS = 1 + MOST_DRAFTED  # of a decode step


@dataclass(frozen=True)
class Plan:
    """Bytes that a run needs: on the device, and on the host for pruned blocks."""

    weights: int
    packing: str  # of the weights
    kv: int
    temporary: int
    largest: str  # the name of the largest temporary
    host: int

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.temporary

    def __str__(self) -> str:
        packing = f" ({self.packing})" if self.packing else ""
        text = (
            f"{format_bytes(self.weights)} weights{packing} + "
            f"{format_bytes(self.kv)} KV + "
            f"{format_bytes(self.temporary)} temporary (for {self.largest}) = "
            f"{format_bytes(self.total)}"
        )
        if self.host:
            text += f", and {format_bytes(self.host)} for pruned blocks"
        return text


def plan(
    ckpt: Checkpoint, n_prompt: int, n_new: int = 0, keep_last: int = 0, homes: int | None = None
) -> Plan:
    """Return what a prompt and n_new more tokens take.

    keep_last: tokens at the prompt's end that are never pruned. homes: those of a saved
    conversation, whose prompt is not run again. Without it, one for every slot; an answer for which
    more blocks return takes more, and is checked as it does (`KVCache.exchange_bytes`).
    """
    config = ckpt.config
    block_len = ckpt.settings.block_len
    item = ckpt.dtype.itemsize
    row = 2 * config.n_kv_heads * config.head_dim * item  # keys and values of a token in a layer
    stages = stage_layout(config.n_layers, n_prompt - keep_last, ckpt.schedule, block_len)
    slots = [n for _, n in stages]
    n_last = last_block_len(n_prompt - keep_last, block_len) + keep_last
    kv_rows = sum(len(layers) * (n * block_len + n_last + n_new) for layers, n in stages)
    planned_homes = sum(len(layers) * n for layers, n in stages[1:])
    host = max(homes or 0, planned_homes) * block_len * row
    host += aux_blocks(slots) * block_len * ckpt.aux_dim * item
    parts = [("kernels", 0)]
    if homes is None:
        parts += temporaries(ckpt, slots, n_last, n_last, first=True)
    if n_new:
        n_rows = min(n_new, STEP_ROWS)
        parts += temporaries(ckpt, slots, n_rows, n_last + n_new, n_logits=n_rows)
    largest, temporary = max(parts, key=lambda part: part[1])
    return Plan(
        weights=ckpt.weight_bytes,
        packing=ckpt.packing,
        kv=kv_rows * row,
        temporary=temporary + KERNEL_BYTES,
        largest=largest,
        host=host,
    )


# ---- temporaries --------------------------------------------------------------------------


def step_bytes(ckpt: Checkpoint, slots: list[int], n_rows: int, n_tail: int, **options) -> int:
    """Return the most that a step's temporaries take at a time; arguments as in `temporaries`."""
    return max(n for _, n in temporaries(ckpt, slots, n_rows, n_tail, **options))


def temporaries(
    ckpt: Checkpoint,
    slots: list[int],
    n_rows: int,
    n_tail: int,
    first: bool = False,
    n_logits: int = 1,
    n_lower: int | None = None,
) -> list[tuple[str, int]]:
    """Return (name, bytes) for each place in a step where its temporaries may be at their most.

    slots: of every stage; n_rows: the step's rows in a tail of n_tail; first: the prompt's step,
    which has a row for every token of a block. A later step may revive as many blocks as fit.
    n_lower: the rows below the first boundary, where those of a text are held there already.
    """
    parts = [("logits", logits_bytes(ckpt, n_rows, n_logits))]
    below = None
    for i, n_slots in enumerate(slots):
        n_revived = 0 if first else min(n_slots, slots[0] - n_slots)
        n_blocks = n_slots if first else n_revived
        work = StageWork(ckpt, n_slots, n_rows, n_tail, n_blocks, n_revived)
        if i == 0 and n_lower is not None:
            work = StageWork(ckpt, n_slots, n_lower, n_tail, 0, 0)
        ranked = i + 1 < len(slots) and ckpt.rule.sees != "keys"
        if below is not None:
            of_held = work.x_bytes if i == 1 and n_lower is not None else 0  # chosen, then joined
            parts.append(("rows at a boundary", work.boundary_bytes(below) + of_held))
            parts.append(("mean keys at a boundary", below.x_bytes + below.mean_key_bytes()))
        rows = work.x_bytes + work.position_bytes()  # all through the stage
        parts.append(("RoPE", work.x_bytes + work.rope_bytes()))
        parts.append(("attention", rows + work.attention_bytes()))
        parts.append(("attention weights", rows + work.weight_bytes(ranked)))
        parts.append(("the feed-forward", rows + work.ffn_bytes()))
        parts.append(("moving blocks", rows + work.move_bytes()))
        below = work
    return parts


def logits_bytes(ckpt: Checkpoint, n_rows: int, n_logits: int) -> int:
    """Return the bytes of the logits: of the head, in float32, and a copy; and of the last x.

    For many logits the head is made plain, and multiplied a piece at a time.
    """
    item = ckpt.dtype.itemsize
    wide = max(4, item)
    a_logit = 2 * wide if item == wide else item + 2 * wide
    head = 0
    in_float32 = n_logits >= MANY_ROWS and prefers_float32(ckpt.device.type, ckpt.dtype)
    is_packed = ckpt.kept_as != "full" and n_logits > FEW_ROWS[8]
    if is_packed or in_float32 and in_blocks(ckpt.device, ckpt.dtype):
        head = ckpt.config.vocab_size * ckpt.config.dim * item
    if in_float32:
        head += wide_product(n_logits, ckpt.config.vocab_size, ckpt.config.dim)
    return head + n_logits * ckpt.config.vocab_size * a_logit + n_rows * ckpt.config.dim * item


def wide_product(n_rows: int, n_out: int, n_columns: int) -> int:
    """Return the bytes of rows in float32, a piece of a matrix (n_out, n_columns), and products."""
    piece = min(n_out, max(1, PIECE // n_columns))
    return 4 * (n_rows * (n_columns + piece) + piece * n_columns)


class StageWork:
    """The temporaries of a step in one stage, in bytes: its rows of x, and what its layers make."""

    def __init__(self, ckpt: Checkpoint, n_slots, n_rows, n_tail, n_blocks, n_revived):
        """n_rows: in the tail; n_blocks: with rows in x, of which n_revived are revived."""
        self.ckpt = ckpt
        self.config = ckpt.config
        self.item = ckpt.dtype.itemsize
        self.wide = max(4, self.item)  # scores and the like are in float32 at least
        block_len = ckpt.settings.block_len
        self.slot_rows = n_slots * block_len
        self.keys = self.slot_rows + n_tail
        self.rows = n_rows + n_blocks * block_len
        self.revived = n_revived * block_len
        self.chunk = min(ckpt.chunk, self.rows)
        self.row = self.config.dim * self.item
        self.x_bytes = self.rows * self.row

    def boundary_bytes(self, below: "StageWork") -> int:
        """x of both stages; with revived rows, those and all together too."""
        joined = 2 * self.revived * self.row + below.x_bytes if self.revived else 0
        return below.x_bytes + self.x_bytes + joined

    def mean_key_bytes(self) -> int:
        """The mean keys of units, for a rule that sees keys."""
        if self.ckpt.rule.sees != "keys":
            return 0
        units = self.slot_rows // self.ckpt.settings.unit_len
        return units * self.config.n_kv_heads * self.config.head_dim * 2 * self.wide

    def position_bytes(self) -> int:
        """cos, sin and positions of every row; newest queries, joined with those before."""
        c = self.config
        queries = 2 * self.ckpt.window * c.n_heads * c.head_dim * self.wide
        return self.rows * (2 * c.rotary_dim * self.wide + 56) + queries

    def rope_bytes(self) -> int:
        """Angles, and cos and sin on their way to the dtype of a run."""
        return self.rows * self.config.rotary_dim // 2 * 7 * self.wide

    def attention_bytes(self) -> int:
        """q, k, v; turned; what they attend to, and the output, in parts."""
        c = self.config
        heads = c.n_heads + 2 * c.n_kv_heads
        states = self.row + heads * c.head_dim * self.item
        lasting = self.plain_bytes("wqkv", "wo") + self.chunk * states
        turned = self.chunk * heads * c.head_dim * 3 * self.wide
        turning = turned + self.product_bytes("wqkv", "wo")
        return lasting + max(turning, self.attended_bytes(), self.revived_bytes())

    def revived_bytes(self) -> int:
        """Of revived rows: keys and values in order; queries, parts of a block, the result."""
        if not self.revived:
            return 0
        c = self.config
        item = self.item
        if prefers_float32(self.ckpt.device.type, self.ckpt.dtype):
            item += self.wide
        keys = 2 * self.slot_rows * c.n_kv_heads * c.head_dim
        return (keys + 5 * self.chunk * c.n_heads * c.head_dim) * item

    def tile_keys(self) -> int:
        """Return how many keys of a KV head a chunk's tiles see; planned everywhere, being few."""
        local = self.ckpt.local
        if not local.window:
            return 0
        n_tiles = math.ceil(self.chunk / TILE)
        return n_tiles * min(self.keys, local.sinks + local.window + TILE)

    def in_float32(self, n_rows: int) -> bool:
        """Return whether that many rows, a chunk at a time, are multiplied in float32."""
        many = min(n_rows, self.chunk) >= MANY_ROWS
        return many and prefers_float32(self.ckpt.device.type, self.ckpt.dtype)

    def attended_bytes(self) -> int:
        """Of newest rows: what `attend_on_cpu` makes, of some KV heads at a time, and results.

        That is the queries, row by row; what they take from their own keys, from older ones, and
        from both; and all but the queries in float32, where half precision is not widened before.
        Tiles' keys and values are put together, and all keys are widened for float32.
        """
        c = self.config
        group = c.n_heads // c.n_kv_heads
        n_rows = min(self.chunk, self.rows - self.revived)
        at_once = c.n_kv_heads
        tile_keys = self.tile_keys()
        item = 3 * self.item + 3 * self.wide if self.item < self.wide else 5 * self.item
        widened = 0
        share_keys = group * n_rows
        if share_keys >= MANY_QUERIES and prefers_float32(self.ckpt.device.type, self.ckpt.dtype):
            at_once = min(at_once, max(1, PIECE // (self.keys * c.head_dim)))
            item = 5 * self.wide
            widened = 2 * max(at_once * self.keys, tile_keys) * c.head_dim * self.wide
        parts = at_once * group * n_rows * c.head_dim * item
        results = 3 * c.n_heads * n_rows * c.head_dim * self.item
        return parts + results + 2 * tile_keys * c.head_dim * self.item + widened

    def plain_bytes(self, *names: str) -> int:
        """Matrices of a layer, made plain for many rows."""
        shapes = matrix_shapes(self.config)
        sizes = [math.prod(shapes[name]) for name in names]
        if self.ckpt.kept_as != "full":
            if self.rows <= min(FEW_ROWS.values()):
                return 0
            return sum(sizes) * self.item + 8 * CHUNK  # and numbers on their way
        if self.in_float32(self.rows) and in_blocks(self.ckpt.device, self.ckpt.dtype):
            return sum(size for size in sizes if size >= LEAST_IN_BLOCKS) * self.item
        return 0

    def product_bytes(self, *names: str) -> int:
        """Of a product in float32: a chunk, a piece of the matrix, and the result."""
        if not self.in_float32(self.rows):
            return 0
        shapes = matrix_shapes(self.config)
        return max(wide_product(self.chunk, *shapes[name]) for name in names)

    def weight_bytes(self, ranked: bool) -> int:
        """Products, softmax and a copy, of the rows that rank blocks; keys widened."""
        if not ranked:
            return 0
        c = self.config
        keys = self.keys * c.n_kv_heads * c.head_dim * self.wide
        heads = self.ckpt.rule.heads
        n_heads = c.n_heads if heads is None else max(1, *(len(found) for found in heads))
        rows = min(self.ckpt.window, rows_at_once(n_heads, self.keys))
        return rows * n_heads * self.keys * 3 * self.wide + keys

    def ffn_bytes(self) -> int:
        """Gate, up and their product; of few rows, a CPU's product of half precision is wide."""
        widened = self.ckpt.device.type == "cpu" and self.item < self.wide
        product = self.item + (self.wide if widened and not self.in_float32(self.rows) else 0)
        states = self.row + max(3 * self.item, 2 * product) * self.config.hidden_dim
        names = "w_gate_up", "w_down"
        return self.plain_bytes(*names) + self.product_bytes(*names) + self.chunk * states

    def move_bytes(self) -> int:
        """Keys and values of the blocks that move in a layer: gathered, and laid out."""
        return 4 * self.revived * self.config.n_kv_heads * self.config.head_dim * self.item


# ---- what fits ----------------------------------------------------------------------------


class NoRoom(ValueError):
    """Memory is too small for what is asked."""


def check_memory(
    ckpt: Checkpoint,
    n_prompt: int,
    n_new: int,
    keep_last: int = 0,
    homes: int | None = None,
    loaded: int = 0,
    pruned: int = 0,
) -> Plan:
    """Return the plan; raise NoRoom if it does not fit.

    The error names a flag that helps, if one does, and the longest prompt that fits without it.
    loaded: bytes already on the device; pruned: bytes already taken by pruned blocks; the other
    arguments are those of `plan`.
    """

    def has_room(need: Plan) -> bool:
        return fits(ckpt.device, need.total - loaded, need.host - pruned)

    need = plan(ckpt, n_prompt, n_new, keep_last, homes)
    if has_room(need):
        return need
    advice = "no flag makes it fit: use a shorter prompt or a smaller model"
    if homes is not None:
        advice = (
            "this conversation cannot go on with other settings: free memory, "
            "or read the document again"
        )
    else:
        for flag, way in smaller(ckpt).items():
            if has_room(plan(way, n_prompt, n_new, keep_last)):
                advice = f"it would fit with {flag}"
                break
        longest = longest_prompt(ckpt, n_new, n_prompt - 1, has_room, keep_last)
        if longest:
            advice += f"; as it is, a prompt of at most {longest:,} tokens fits"
    free = format_bytes(free_bytes(ckpt.device))
    raise NoRoom(
        f"not enough memory on {ckpt.device}: {need} for {n_prompt:,} tokens, but {free} free; "
        f"{advice}"
    )


def longest_prompt(ckpt: Checkpoint, n_new: int, most: int, has_room, keep_last: int = 0) -> int:
    """Return the most tokens, up to `most`, of a prompt for whose plan there is room; 0: none."""

    def is_too_long(n: int) -> bool:
        return not has_room(plan(ckpt, n, n_new, min(keep_last, n - 1)))

    return bisect(range(1, most + 1), False, key=is_too_long)


def smaller(ckpt: Checkpoint) -> dict[str, Checkpoint]:
    """Return flags that make a run smaller, each with its Checkpoint."""
    ways = {"--chunk 64": replace(ckpt, settings=replace(ckpt.settings, chunk=64))}
    default = ckpt.with_schedule("auto").schedule
    least = 2 * ckpt.settings.block_len
    small = {layer: max(least, 1024 >> i) for i, layer in enumerate(default)}
    for schedule in (default, small):
        flag = f"--schedule {format_schedule(schedule)}"
        ways[flag] = replace(ckpt, schedule=schedule)
    flag = "" if ckpt.dtype == torch.bfloat16 else "--dtype bfloat16"
    if ckpt.dtype.itemsize > 2:
        ways[flag] = replace(ckpt, dtype=torch.bfloat16)
    if not ckpt.packing:
        for kind in ("int8", "int4"):
            ways[f"{flag} --weights {kind}".strip()] = ckpt.with_weights(kind)
    return ways


def fits(device: torch.device, n_bytes: int, host: int) -> bool:
    """Return whether n_bytes are free on the device, and `host` bytes on the CPU."""
    if device.type == "cpu":
        return n_bytes + host <= free_bytes(device)
    return n_bytes <= free_bytes(device) and host <= free_bytes(torch.device("cpu"))


# ---- what this machine has ----------------------------------------------------------------


def free_bytes(device: torch.device) -> int:
    """Return the bytes a device can still give; what torch holds unused counts as free."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free = min(available_bytes(), free_in_cgroup())
    return free // env_number("LOCAL_WORLD_SIZE")  # all processes of torchrun share it


def available_bytes() -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # not Linux: all there is


def free_in_cgroup(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> float:
    """Return the bytes that a container's or slice's limits leave, infinity without limits."""
    free = float("inf")
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return free
    for line in lines:
        _, kind, path = line.split(":", 2)
        if not kind:
            top = root
            names = ("memory.max", "memory.current")
        elif "memory" in kind.split(","):  # the older version
            top = root / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        folder = top / path.strip("/")
        for group in (folder, *folder.parents):
            free = min(free, free_in_group(group, *names))
            if group == top:
                break
    return free


def free_in_group(folder: Path, limit: str, used: str) -> float:
    """Return what one group's limit leaves; the kernel can free its file cache."""
    try:
        left = int((folder / limit).read_text()) - int((folder / used).read_text())
    except (OSError, ValueError):  # no limit here: no file, or "max"
        return float("inf")
    with contextlib.suppress(OSError, ValueError):
        lines = (folder / "memory.stat").read_text().splitlines()
        numbers = dict(line.split() for line in lines)
        left += int(numbers.get("total_inactive_file", numbers.get("inactive_file", 0)))
    return left
