"""All state that outlives a step: keys and values in blocks, pruned rows, active blocks, and a saved conversation.

The words of this engine:

    row       one token being computed, a line of the hidden states x; its position is its place in the text
    block     64 consecutive positions of the prompt (block_len)
    tail      the prompt's last block and every token after it; always active, in every layer
    sink      block 0; always active too
    boundary  the place inside a layer, after its attention, where blocks are chosen and rows leave
    stage     the layers from one boundary to the next; they hold the same blocks
    active    the blocks that a stage holds now, one in each of its slots
    slab      a layer's keys and values on the device: slots, then the tail
    slot      room for one block in a slab
    home      where a block's keys and values lie on the CPU once it left its slots
    aux       the hidden states of blocks pruned at a boundary, on the CPU
    revive    to run a pruned block's rows from aux, because a later token chose it
    rule      what ranks the blocks (prune.py)

    slab of one layer     | slot 0 | slot 1 | slot 2 |  ...  | tail: last block, new tokens -> |
    holds, in any order   | block 0| block 9| block 4|       | positions from tail_start on    |

One block, from the prompt to its return: block 7 runs through stage 0 and gets keys there. At the first
boundary it is not chosen: its rows leave x for aux (`offload`). Later a token chooses it: its rows come out
of aux (`restore`), run through stage 1 beside the token, and get keys in a freed slot (`activate`). When the
choice changes again, the slot's content goes home, and from then on it is only copied back (`copy_layer`).

A single new token needs no mask, whatever the order of the slots, as RoPE is already inside the keys.
Prompt keys never change, so a block goes home once and is only read from there. Copies run on a CUDA
stream of their own in layer order, and a layer waits for its own copies only (paper, section on
asynchronous KV management). On a CPU the same code runs without streams.

Invariants: a stage's slots are always full; a block with keys in a stage is in a slot, at home, or
both; a block without is in aux of that stage's boundary or of one below.

Shapes: S slab rows, B block_len, G KV heads, D head_dim, C dim, w newest tokens, H heads, N prompt blocks.
"""

import contextlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prune import Budget, stage_blocks

COUNTERS = "swaps", "revived", "to_cpu_bytes", "to_gpu_bytes"
TAIL_STEP = 64  # rows a tail grows by: small, so that memory stays what the plan said


def stage_layout(n_layers: int, n_prompt: int, schedule: dict[int, Budget], block_len: int) -> list[tuple[range, int]]:
    """Return (layers, slots) of every stage; a boundary whose budget keeps all of the stage below makes none."""
    sizes = stage_blocks(n_prompt, schedule, block_len)
    pruning = {layer: n for layer, n, below in zip(schedule, sizes[1:], sizes) if n < below}
    edges, sizes = [0, *pruning, n_layers], [sizes[0], *pruning.values()]
    return [(range(a, b), n - 1) for a, b, n in zip(edges, edges[1:], sizes)]


def tail_rows(n_prompt: int, block_len: int) -> int:
    """Return the prompt's part of the tail, its last block."""
    return n_prompt - (-(-n_prompt // block_len) - 1) * block_len


def allocate(make, what: str, *shape, **options) -> Tensor:
    """Return make(*shape, **options); raise MemoryError with the size if there is no room."""
    try:
        return make(*shape, **options)
    except RuntimeError as error:  # torch has no type of its own for host memory
        mib = torch.Size(shape).numel() * options["dtype"].itemsize / 2**20
        raise MemoryError(f"no room for {mib:,.0f} MiB of {what} ({str(error).splitlines()[0]:.100})") from None


class Pool:
    """Equal entries of pinned CPU memory, allocated in pieces because pinning is slow and must be rare."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, pin: bool, piece_mib: float):
        self.shape, self.dtype, self.pin = shape, dtype, pin
        self.entry_bytes = torch.Size(shape).numel() * dtype.itemsize
        self.piece = max(1, int(piece_mib * 2**20) // self.entry_bytes)  # entries per piece
        self.free: list[Tensor] = []
        self.used = 0

    def reserve(self, n: int) -> None:
        """Make sure of n free entries, in one piece of at least the usual size."""
        if (missing := n - len(self.free)) > 0:
            n_new = max(missing, self.piece)
            memory = allocate(
                torch.empty, "CPU memory for pruned blocks", n_new, *self.shape, dtype=self.dtype, pin_memory=self.pin
            )
            self.free.extend(memory.unbind(0))

    def take(self) -> Tensor:
        self.reserve(1)
        self.used += 1
        return self.free.pop()

    def give(self, entry: Tensor) -> None:
        self.used -= 1
        self.free.append(entry)

    def renew(self, n: int) -> None:
        """Reserve n entries for a new conversation; give memory back that is far more than it needs."""
        if not self.used and len(self.free) > 2 * max(n, self.piece):
            self.free.clear()
        self.reserve(n)

    @property
    def nbytes(self) -> int:
        return self.used * self.entry_bytes


class CopyStream:
    """The copy stream of a CUDA device; with overlap off, or on a CPU, the compute stream itself."""

    def __init__(self, device: torch.device, overlap: bool):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" and overlap else None
        self.non_blocking = self.stream is not None

    def after_compute(self):
        """Enter the stream: what is copied inside starts after all compute issued so far."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self.stream)  # of None: changes nothing

    def event(self):
        """Mark this point of the stream."""
        return self.stream.record_event() if self.stream is not None else None

    def wait(self, event) -> None:
        """Let compute issued from now on start after an event of the stream."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def keep(self, tensor: Tensor) -> None:
        """Hold the memory of a compute tensor that the stream still reads when its last name is gone."""
        if self.stream is not None:
            tensor.record_stream(self.stream)


@dataclass
class Stage:
    """Layers that hold the same blocks; `slots` lists those by slot, without the prompt's last block (tail)."""

    layers: range
    n_slots: int
    slots: list[int] = field(default_factory=list)  # slot -> block
    blocks: Tensor | None = None  # the same on the device
    held: set[int] = field(default_factory=set)  # blocks whose keys this stage has, in a slot or at home
    home: dict[int, Tensor] = field(default_factory=dict)  # block -> (layers, 2, B, G, D) on the CPU
    aux: dict[int, Tensor] = field(default_factory=dict)  # block -> (B, C) on the CPU, pruned at this stage's boundary
    seen: Tensor | None = None  # of the newest tokens at this boundary: worth (w, N), or queries (w, H, D)

    def remember(self, newest: Tensor, window: int) -> None:
        """Add what the newest tokens brought to this boundary (w, ...), and keep `window` of them."""
        self.seen = torch.cat([newest[:0] if self.seen is None else self.seen, newest])[-window:]


class KVCache:
    """Keys and values of one conversation; `reset` lays it out for a prompt and a schedule {boundary: budget}."""

    def __init__(self, n_layers, n_kv_heads, head_dim, dim, block_len, dtype, device, overlap=True, pool_mib=64.0):
        self.n_layers, self.block_len, self.dtype, self.device = n_layers, block_len, dtype, device
        self.kv_shape, self.dim, self.pool_mib = (n_kv_heads, head_dim), dim, pool_mib
        self.copies = CopyStream(device, overlap)
        self.pin = device.type == "cuda"
        self.aux_pool = Pool((block_len, dim), dtype, self.pin, pool_mib)
        self.home_pools: dict[int, Pool] = {}  # layers of a stage -> pool
        self.stages: list[Stage] = []
        self.slabs: list[Tensor] = []  # per layer (2, S, G, D): keys, values
        self.copied: list = []  # per layer: the event after its newest copies, or None
        self.schedule: dict[int, Budget] = {}
        self.n_prompt = self.length = 0  # tokens of the prompt; of the conversation, whose keys are complete
        self.tail_start = self.tail_rows = 0  # first position of the tail; rows that slabs have for it
        self.swaps = self.revived = self.to_cpu_bytes = self.to_gpu_bytes = 0

    # ---- a new conversation ---------------------------------------------------------

    def reset(self, n_prompt: int, schedule: dict[int, Budget], room: int = 0) -> None:
        """Drop everything and lay out slabs for a prompt of n_prompt tokens and `room` more."""
        if self.pin:
            torch.cuda.synchronize(self.device)  # copies may still touch the slabs freed here
        for stage in self.stages:
            for entry in stage.aux.values():
                self.aux_pool.give(entry)
            for entry in stage.home.values():
                self.home_pool(stage).give(entry)
        self.schedule = schedule
        layout = stage_layout(self.n_layers, n_prompt, schedule, self.block_len)
        self.stages = [Stage(layers, n_slots) for layers, n_slots in layout]
        n_slots = self.stages[0].n_slots
        self.activate(self.stages[0], set(range(n_slots)))
        self.tail_start, self.tail_rows = n_slots * self.block_len, tail_rows(n_prompt, self.block_len) + room
        self.length, self.n_prompt = 0, n_prompt
        self.slabs, self.copied = [], [None] * self.n_layers  # the old slabs go before the new ones come
        self.slabs = [self.new_slab(stage, self.tail_rows) for stage in self.stages for _ in stage.layers]
        for counter in COUNTERS:
            setattr(self, counter, 0)
        # What the first step sends to the CPU, and a home for every slot: no copy shall wait for pinning.
        self.aux_pool.renew(n_slots - self.stages[-1].n_slots)
        lengths = {len(stage.layers) for stage in self.stages[1:]}
        self.home_pools = {n: pool for n, pool in self.home_pools.items() if n in lengths}
        for stage in self.stages[1:]:
            alike = (other.n_slots for other in self.stages[1:] if len(other.layers) == len(stage.layers))
            self.home_pool(stage).renew(sum(alike))

    def new_slab(self, stage: Stage, n_tail: int) -> Tensor:
        # zeros, not empty: a masked key still meets a zero weight, and 0 * NaN is NaN
        shape = 2, stage.n_slots * self.block_len + n_tail, *self.kv_shape
        return allocate(torch.zeros, "keys and values", *shape, dtype=self.dtype, device=self.device)

    def home_pool(self, stage: Stage) -> Pool:
        n = len(stage.layers)
        if n not in self.home_pools:
            self.home_pools[n] = Pool((n, 2, self.block_len, *self.kv_shape), self.dtype, self.pin, self.pool_mib)
        return self.home_pools[n]

    def growth_bytes(self, end: int) -> int:
        """Return the memory that `grow_tail` will ask for: longer tails, and one slab that is there twice."""
        rows = end - self.tail_start - self.tail_rows + TAIL_STEP
        if rows <= TAIL_STEP:
            return 0
        return self.n_layers * rows * self.slabs[0][:, 0].nbytes + self.slabs[0].nbytes

    def grow_tail(self, end: int) -> None:
        """Make room for the tokens up to position `end` in every layer's tail."""
        if end - self.tail_start <= self.tail_rows:
            return
        n_tail = end - self.tail_start + TAIL_STEP
        for stage in self.stages:
            for layer in stage.layers:
                self.wait(layer)  # the slab copied here may still be filled
                old, new = self.slabs[layer], self.new_slab(stage, n_tail)
                new[:, : old.shape[1]] = old
                self.slabs[layer] = new
        self.tail_rows = n_tail  # only now: without memory for all, the conversation stays as it is

    # ---- keys and values ------------------------------------------------------------

    def append(self, layer: int, slab_rows: Tensor, k: Tensor, v: Tensor) -> None:
        """Write keys and values (T, G, D) to slab rows (T,)."""
        self.slabs[layer][0].index_copy_(0, slab_rows, k)
        self.slabs[layer][1].index_copy_(0, slab_rows, v)

    def read(self, layer: int, n: int) -> tuple[Tensor, Tensor]:
        """Return the first n slab rows of a layer as views (n, G, D): keys, values."""
        return self.slabs[layer][0, :n], self.slabs[layer][1, :n]

    def block_keys(self, stage: int, layer: int) -> Tensor:
        """Return the keys of the stage's slots at `layer` as a view (N, B, G, D), in slot order."""
        n = self.stages[stage].n_slots
        return self.slabs[layer][0, : n * self.block_len].view(n, self.block_len, *self.kv_shape)

    def wait(self, layer: int) -> None:
        """Let compute go on only when the copies of this layer's slots are done.

        Hazards: attention must not read a returning block before it has arrived, and a
        revived row must not be written over a leaving block that has not been read yet.
        """
        self.copies.wait(self.copied[layer])
        self.copied[layer] = None

    # ---- active blocks --------------------------------------------------------------

    def activate(self, stage: Stage, active: set[int]) -> None:
        """Make `active` the stage's blocks: leaving blocks go home, known blocks return to the freed slots.

        Blocks without keys in this stage only get a slot; their rows write it on the way up.
        """
        if stage.blocks is None:  # first step: rows write every slot
            self.fill(stage, sorted(active))
        if active == set(stage.slots):
            return
        freed = [s for s, block in enumerate(stage.slots) if block not in active]
        moves = list(zip(freed, sorted(active - set(stage.slots))))  # (slot, block that enters)
        leaving = [(s, stage.slots[s]) for s, _ in moves if stage.slots[s] not in stage.home]
        returning = [(s, block) for s, block in moves if block in stage.home]
        for _, block in leaving:
            stage.home[block] = self.home_pool(stage).take()
        entered = dict(moves)
        self.fill(stage, [entered.get(s, block) for s, block in enumerate(stage.slots)])
        self.swaps += len(moves)
        self.copy_blocks(stage, leaving, returning)

    def fill(self, stage: Stage, slots: list[int]) -> None:
        stage.slots, stage.blocks = slots, self.upload(slots)
        stage.held |= set(slots)

    def copy_blocks(self, stage: Stage, leaving: list, returning: list) -> None:
        """Issue a stage's copies layer by layer; each layer's event fires when its own are done.

        Compute issued so far holds the last read of every slot overwritten here, and the
        last write of every block that leaves: the copies start after it.
        """
        with self.copies.after_compute():
            for i, layer in enumerate(stage.layers):
                self.copy_layer(stage, i, self.slabs[layer], leaving, returning)
                self.copied[layer] = self.copies.event()
        self.to_cpu_bytes += len(leaving) * self.home_pool(stage).entry_bytes
        self.to_gpu_bytes += len(returning) * self.home_pool(stage).entry_bytes

    def copy_layer(self, stage: Stage, i: int, slab: Tensor, leaving: list, returning: list) -> None:
        """Copy blocks out of and then into the slots of the stage's i-th layer; keys and values are contiguous each."""
        b, quiet = self.block_len, self.copies.non_blocking
        for half in (0, 1):
            for slot, block in leaving:
                stage.home[block][i, half].copy_(slab[half, slot * b : slot * b + b], non_blocking=quiet)
            for slot, block in returning:
                slab[half, slot * b : slot * b + b].copy_(stage.home[block][i, half], non_blocking=quiet)

    # ---- rows that leave and return --------------------------------------------------

    def offload(self, stage: Stage, rows: dict[int, Tensor]) -> None:
        """Keep the hidden states {block: (B, C)} pruned at this stage's boundary in aux."""
        with self.copies.after_compute():  # the rows are the newest compute
            for block, x in rows.items():
                stage.aux[block] = self.aux_pool.take()
                stage.aux[block].copy_(x, non_blocking=self.copies.non_blocking)
                self.copies.keep(x)
        self.to_cpu_bytes += len(rows) * self.aux_pool.entry_bytes

    def restore(self, stage: Stage, blocks: list[int]) -> Tensor:
        """Take blocks out of aux: their hidden states (len(blocks) * B, C) on the device, ready to use."""
        x = torch.empty(len(blocks), self.block_len, self.dim, dtype=self.dtype, device=self.device)
        with self.copies.after_compute():  # x may reuse memory that compute has not finished with
            for row, block in zip(x, blocks):
                entry = stage.aux.pop(block)
                row.copy_(entry, non_blocking=self.copies.non_blocking)
                self.aux_pool.give(entry)  # reused by later copies of this same stream only
            arrived = self.copies.event()
        self.copies.wait(arrived)  # the FFN of the boundary's layer reads x next
        self.revived += len(blocks)
        self.to_gpu_bytes += len(blocks) * self.aux_pool.entry_bytes
        return x.view(-1, self.dim)

    # ---- going back, and out to a file -----------------------------------------------

    def rewind(self, n: int) -> None:
        """Forget all but the first n tokens; the active blocks stay, and the next tokens choose from there."""
        self.length = n
        for stage in self.stages:
            stage.seen = None

    def dump(self) -> tuple[dict, dict[str, Tensor]]:
        """Return all that the conversation needs: a JSON-able layout, and tensors on the CPU by name."""
        if self.pin:
            torch.cuda.synchronize(self.device)  # copies may still write what is read here
        layout = {key: getattr(self, key) for key in ("n_prompt", "length", *COUNTERS)}
        layout["stages"] = [
            {"slots": s.slots, "home": list(s.home), "aux": list(s.aux), "seen": s.seen is not None}
            for s in self.stages
        ]  # fmt: skip
        tensors = {}
        for i, stage in enumerate(self.stages):
            for layer in stage.layers:
                halves = self.read(layer, stage.n_slots * self.block_len + self.length - self.tail_start)
                tensors |= {f"layer.{layer}.{name}": half.cpu() for name, half in zip(("keys", "values"), halves)}
            tensors |= {f"stage.{i}.home.{block}": entry for block, entry in stage.home.items()}
            tensors |= {f"stage.{i}.aux.{block}": entry for block, entry in stage.aux.items()}
            if stage.seen is not None:
                tensors[f"stage.{i}.seen"] = stage.seen.cpu()
        return layout, tensors

    def undump(self, layout: dict, tensor, schedule: dict[int, Budget], room: int = 0) -> None:
        """Lay out a dumped conversation and fill it from tensor(name)."""
        self.reset(layout["n_prompt"], schedule, layout["length"] - layout["n_prompt"] + room)
        for i, (stage, saved) in enumerate(zip(self.stages, layout["stages"])):
            self.fill(stage, saved["slots"])
            stage.held |= set(saved["home"])
            for layer in stage.layers:
                for half, name in enumerate(("keys", "values")):
                    rows = tensor(f"layer.{layer}.{name}")
                    self.slabs[layer][half, : len(rows)] = rows
            for name, pool in (("home", self.home_pool(stage)), ("aux", self.aux_pool)):
                for block in saved[name]:
                    getattr(stage, name)[block] = pool.take().copy_(tensor(f"stage.{i}.{name}.{block}"))
            stage.seen = tensor(f"stage.{i}.seen").to(self.device) if saved["seen"] else None
        for key in ("length", *COUNTERS):
            setattr(self, key, layout[key])

    # ---- helpers --------------------------------------------------------------------

    def block_rows(self, first: list[int]) -> Tensor:
        """Return the block_len numbers from each first one on, (len(first) * B,), on the device."""
        if not first:
            return torch.empty(0, dtype=torch.long, device=self.device)
        return (self.upload(first)[:, None] + torch.arange(self.block_len, device=self.device)).flatten()

    def upload(self, numbers: list[int]) -> Tensor:
        """Return whole numbers (n,) on the device, without waiting for it."""
        return torch.tensor(numbers, dtype=torch.long, pin_memory=self.pin).to(self.device, non_blocking=True)

    def gpu_bytes(self) -> int:
        return sum(slab.nbytes for slab in self.slabs)

    def cpu_bytes(self) -> int:
        return sum(pool.nbytes for pool in self.home_pools.values())


# ---- a conversation in a file: safetensors with a JSON header and a checksum ---------------

SAVED = "slim 2"  # the format


def check_path(path) -> Path:
    """Return the file that a path to write to stands for, links followed; raise ValueError if it cannot be written."""
    try:
        target = Path(os.path.realpath(path))
        if target.is_dir() or target.exists() and not target.is_file():
            raise ValueError("it is not a file")
        if not os.access(target.parent, os.W_OK | os.X_OK):
            raise ValueError("its folder does not exist or does not allow writing")
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"{path!s:.200} cannot be written: {error}") from None
    return target


@contextlib.contextmanager
def replace_file(path) -> Iterator[str]:
    """Give a path to write to; what is written there replaces `path` at the end, or is deleted on an error.

    It lies in a folder of its own, because the library puts temporary files beside it; what a
    killed process leaves is removed by the next try. Raises ValueError if writing fails.
    """
    path = check_path(path)
    folder = path.with_name(f".{zlib.crc32(os.fsencode(path.name)):08x}.part")
    part = folder / path.name
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir()
        yield str(part)
        os.umask(mask := os.umask(0))
        part.chmod(path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~mask)  # not the library's 0600
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
    parts = {"identity": dict, "ids": list, "pending": list, "kv": dict, "extra": dict}
    try:
        if not Path(path).is_file():
            raise FileNotFoundError("no such file")
        file = safe_open(path, framework="pt", device="cpu")
        header = json.loads((file.metadata() or {})["slim"])
        if header["format"] != SAVED:
            raise OSError(f"its format is {header['format']!r}, not {SAVED!r}")
        if all(isinstance(header.get(name), kind) for name, kind in parts.items()):
            return header, file
        problem = "parts are missing"
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        problem = str(error) if isinstance(error, OSError) else "it is truncated, or something else"
    raise ValueError(f"{path} is not a conversation saved by Slim: {problem}; write one with --save")


def check_saved(path, header: dict, identity: dict) -> None:
    """Raise ValueError that lists all in which a saved conversation differs from the engine that is to continue it."""
    theirs = header["identity"]
    if wrong := [key for key in identity if theirs.get(key) != identity[key]]:
        shown = ", ".join(
            "other weights" if key == "weights" else f"{key} {theirs.get(key)!r} where this run has {identity[key]!r}"
            for key in wrong
        )
        raise ValueError(f"{path} was saved with {shown}; use the same settings, or read the document again")
