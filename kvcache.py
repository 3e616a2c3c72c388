"""All state that outlives a step: keys and values in blocks, pruned rows, active blocks.

The words of this engine:

    row       one token being computed, a line of the hidden states x; its position is its place
              in the text
    block     64 consecutive positions of the prompt (block_len)
    unit      a part of a block whose mean key the paper's rule looks at
    tail      the prompt's last block and every token after it; always active, in every layer
    sink      block 0; always active too
    boundary  the place inside a layer, after its attention, where blocks are chosen and rows leave
    schedule  {boundary: budget}: how many tokens of the prompt stay from each boundary on
    stage     the layers from one boundary to the next; they hold the same blocks
    active    the blocks that a stage holds now, one in each of its slots
    slab      a layer's keys and values on the device: slots, then the tail
    slot      room for one block in a slab
    home      a block's keys and values on the CPU, copied there when it first leaves its slot
    aux       the hidden states of blocks pruned at a boundary, on the CPU
    revive    to run a pruned block's rows from aux, because a later token chose it
    move      the copies between slots and homes that follow a choice
    rule      what blocks are worth to the newest tokens (prune.py)
    window    how many of the newest tokens rank the blocks
    lookup head  one that looks back at an earlier place of a token (planning/probe.py)
    local     attention of a prompt's row, below the first boundary, to the first tokens and those
              just before its tile, 256 positions (`model.Local`)
    draft     tokens that are guessed, and run in one step to see whether they are right
    held      of a text that waits for its question: its rows stand at the first boundary, stages
              above have no blocks yet, and all of it still counts as the prompt being read

    slab of one layer     | slot 0 | slot 1 | slot 2 |  ...  | tail: last block, new tokens -> |
    holds, in any order   | block 0| block 9| block 4|       | positions from tail_start on    |

The life of a block in one stage. `Stage.state` tells its state between two steps; running and
riding exist only inside one:

    state     rows in x  slot  home   aux            how it gets there
    running   yes        yes   -      -              the prompt's step, or a revival: keys are made
    active    -          yes   maybe  -              the step that ran it is over
    home      -          -     yes    -              another block took its slot (`activate`)
    pruned    -          -     -      here           not chosen at this stage's boundary (`offload`)
    riding    yes        -     -      -              revived below, on its way up (`restore`)
    below     -          -     -      lower stage    pruned at a lower boundary

A single new token needs no mask, whatever the order of the slots, as RoPE is already inside the
keys. Revived rows see a copy of the slots in the order of their blocks, and need none either.
Prompt keys never change, so a block is copied home once and from then on only copied back. Copies
run on a CUDA stream of their own in layer order, and a layer waits for its own copies only (paper,
section on asynchronous KV management). Blocks that leave or return together are one copy a layer.
On a CPU the same code runs without streams.

Invariants: a stage's slots are always full, unless rows are held; a block with keys in a stage is
in a slot, at home, or both; a block without keys is in aux, at that stage's boundary or at a lower
one.

Shapes: S slab rows, B block_len, G KV heads, D head_dim, C dim, W newest tokens, H heads,
N prompt blocks.
"""

import mmap
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prune import Budget, stage_blocks

COUNTERS = "local_rows", "swaps", "revived", "to_cpu_bytes", "to_gpu_bytes"
TAIL_GROWTH = 64  # rows a tail grows by at least: few, so that memory stays what was planned
ROOM_AT_ONCE = 1024  # rows, of the room for an answer, that are taken before they are needed
PIECE_BYTES = 2**26  # of pinned memory, at least, where a first piece was too small
BLOCKS_PER_COPY = 16  # blocks that leave x at a time: a copy of them is made on the device


def stage_layout(
    n_layers: int, n_prompt: int, schedule: dict[int, Budget], block_len: int
) -> list[tuple[range, int]]:
    """Return (layers, slots) of every stage; a boundary that prunes nothing starts no stage.

    The prompt's last block is in the tail, so it takes no slot.
    """
    sizes = stage_blocks(n_prompt, schedule, block_len)
    layout = []
    begin = 0
    size = sizes[0]
    for boundary, smaller in zip(schedule, sizes[1:]):
        if smaller < size:
            layout.append((range(begin, boundary), size - 1))
            begin = boundary
            size = smaller
    layout.append((range(begin, n_layers), size - 1))
    return layout


def aux_blocks(slots: list[int]) -> int:
    """Return how many blocks a first step sends to aux, and one that then exchanges all."""
    return slots[0] - slots[-1] + sum(slots[1:-1])


def last_block_len(n_prompt: int, block_len: int) -> int:
    """Return how many tokens the prompt's last block has; it begins the tail."""
    return n_prompt - (-(-n_prompt // block_len) - 1) * block_len


def allocate(
    what: str, shape: tuple[int, ...], dtype: torch.dtype, device="cpu", pin: bool = False
) -> Tensor:
    """Return memory for `what`, not written yet; raise MemoryError with the size if it is too much.

    On a CPU it is mapped, so freed memory goes back at once; malloc would keep a hole for every
    slab that grew.
    """
    n_bytes = torch.Size(shape).numel() * dtype.itemsize
    try:
        if pin or torch.device(device).type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device, pin_memory=pin)
        memory = mmap.mmap(-1, max(n_bytes, 1), access=mmap.ACCESS_COPY)  # private to this process
        return torch.frombuffer(memory, dtype=torch.uint8)[:n_bytes].view(dtype).view(shape)
    except (RuntimeError, OSError, OverflowError) as error:  # torch has no type for host memory
        reason = str(error).splitlines()[0][:100]
        raise MemoryError(f"no room for {n_bytes >> 20:,} MiB of {what} ({reason})") from None


class HostMemory:
    """CPU memory for entries of equal size, in large pieces because pinning, for a GPU, is slow."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, pin: bool):
        self.shape = shape
        self.dtype = dtype
        self.pin = pin
        self.entry_bytes = torch.Size(shape).numel() * dtype.itemsize
        self.least = PIECE_BYTES // self.entry_bytes if pin else 0  # entries of a further piece
        self.piece = self.new_piece(0)  # (entries, *shape), in use
        self.spare = self.new_piece(0)  # reserved: the next one
        self.used = 0  # entries of the piece; older pieces live while entries use them

    def forget(self) -> None:
        """Forget all entries; memory that is not pinned goes back."""
        self.used = 0
        self.spare = self.new_piece(0)
        if not self.pin:
            self.piece = self.new_piece(0)

    def reset(self, n: int) -> None:
        """Forget all entries and make room for n; keep a pinned piece that is about the size."""
        self.forget()
        too_small = len(self.piece) < n
        too_large = len(self.piece) > 2 * max(n, self.least)
        if too_small or too_large:
            self.piece = self.new_piece(0)  # frees the old memory before the new is allocated
            self.piece = self.new_piece(n)

    def take(self, n: int) -> Tensor:
        """Return n entries that lie together (n, *shape)."""
        self.reserve(n)
        if self.used + n > len(self.piece):
            self.piece = self.spare
            self.spare = self.spare[:0]
            self.used = 0
        self.used += n
        return self.piece[self.used - n : self.used]

    def reserve(self, n: int) -> None:
        """Make sure that n entries can be taken, all at once or part by part."""
        missing = self.missing(n)
        if missing:
            self.spare = self.new_piece(missing)

    def missing(self, n: int) -> int:
        """Return how many entries `reserve(n)` allocates."""
        free = max(len(self.piece) - self.used, len(self.spare))
        if n <= free:
            return 0
        return max(n, self.least)

    def new_piece(self, n: int) -> Tensor:
        shape = n, *self.shape
        return allocate("CPU memory for pruned blocks", shape, self.dtype, pin=self.pin)


class CopyStream:
    """The copy stream of a CUDA device; the compute stream with overlap off, or on a CPU."""

    def __init__(self, device: torch.device, overlap: bool):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" and overlap else None

    def mark(self):
        """Return an event at this point of the current stream: the copy stream inside `after`."""
        if self.stream is None:
            return None
        return torch.cuda.current_stream(self.device).record_event()

    def after(self, event):
        """Enter the copy stream; copies issued inside start after this event of the compute."""
        if self.stream is not None:
            self.stream.wait_event(event)
        return torch.cuda.stream(self.stream)  # without a copy stream this changes nothing

    def wait(self, event) -> None:
        """Make compute that is issued from now on start after this event of the copy stream."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def to_host(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source, non_blocking=self.stream is not None)

    def to_device(self, entries: list[Tensor], sent) -> Tensor:
        """Return entries of CPU memory as one tensor on the device, once they are written (`sent`).

        sent: the event after the copy that wrote them, or None.
        """
        if sent is not None:
            sent.synchronize()  # usually of an earlier step, so there is no wait
        shape = len(entries), *entries[0].shape
        together = torch.empty(shape, dtype=entries[0].dtype, pin_memory=self.device.type == "cuda")
        torch.stack(entries, out=together)
        return together.to(self.device, non_blocking=self.stream is not None)


@dataclass
class Stage:
    """Layers that hold the same blocks."""

    layers: range
    n_slots: int
    slots: list[int] = field(default_factory=list)  # slot -> block
    blocks: Tensor | None = None  # the same on the device
    home: dict[int, Tensor] = field(default_factory=dict)  # block -> (layers, 2, G, B, D), CPU
    aux: dict[int, Tensor] = field(default_factory=dict)  # block -> (B, C), CPU, pruned here
    home_sent: object = None  # the event after the newest copy to home
    aux_sent: object = None  # and to aux
    newest: Tensor | None = None  # of the newest tokens: scores (W, N), or queries (W, H, D)
    drafted: Tensor | None = None  # the same of drafted tokens, which do not count yet

    def has_keys(self) -> set[int]:
        """Return the blocks whose keys this stage has, in a slot or at home."""
        return self.home.keys() | set(self.slots)

    def state(self, block: int) -> str:
        """Return where a block is between two steps: "active", "home", "pruned" or "below"."""
        if block in self.slots:
            return "active"
        if block in self.home:
            return "home"
        return "pruned" if block in self.aux else "below"

    def remember(self, newest: Tensor, window: int, n_drafted: int = 0) -> None:
        """Add the newest tokens' scores or queries; keep those of the last `window` tokens.

        Those of the last n_drafted tokens are kept apart.
        """
        n_certain = len(newest) - n_drafted
        before = newest[:0] if self.newest is None else self.newest
        # copies: the ranking goes on changing its own
        self.newest = torch.cat([before, newest[:n_certain]])[-window:]
        self.drafted = newest[n_certain:].clone()


@dataclass(frozen=True)
class Move:
    """The copies that a choice asks for: `KVCache.activate` decides, `KVCache.copy` does them."""

    stage: Stage
    out_slots: list[int]  # slots whose blocks go home
    homes: Tensor  # (layers, len(out_slots), 2, G, B, D) on the CPU: where they go
    in_slots: list[int]  # freed slots to which known blocks return
    in_blocks: list[int]  # those blocks, in the slots' order
    decided: object  # the event after the compute issued before the choice


class KVCache:
    """Keys and values of one conversation; `reset` lays it out for a prompt and a schedule."""

    def __init__(self, n_layers, n_kv_heads, head_dim, dim, block_len, dtype, device, overlap=True):
        self.n_layers = n_layers
        self.n_kv_heads = n_kv_heads
        self.head_dim = head_dim
        self.dim = dim
        self.block_len = block_len
        self.dtype = dtype
        self.device = device
        self.pin = device.type == "cuda"
        self.copies = CopyStream(device, overlap)
        self.aux_memory = HostMemory((block_len, dim), dtype, self.pin)
        home_shape = 2, n_kv_heads, block_len, head_dim  # a block in one layer
        self.home_memory = HostMemory(home_shape, dtype, self.pin)
        self.stages: list[Stage] = []
        self.slabs: list[Tensor] = []  # per layer (2, G, S, D): a head's rows lie together
        self.copied: list = []  # per layer: the event after its newest copies, or None
        self.schedule: dict[int, Budget] = {}
        self.n_prompt = 0  # tokens of the prompt
        self.n_prunable = 0  # of which these may be pruned, and all after them are tail
        self.length = 0  # tokens of the conversation whose keys are complete
        self.planned = 0  # tokens of prompt and answer: decides between LongRoPE's factors, once
        self.tail_start = 0  # first position of the tail
        self.tail_rows = 0  # rows that slabs have for it
        self.held: Tensor | None = None  # (N*B, C), rows of all blocks at the first boundary
        self.held_tail: Tensor | None = None  # (T, C), and those of the tail
        for counter in COUNTERS:
            setattr(self, counter, 0)

    @property
    def reading_prompt(self) -> bool:
        """Whether the next step, or the one under way, is the prompt's own, or a part of it."""
        return self.length == 0

    @property
    def n_tokens(self) -> int:
        """Tokens of the conversation, held ones included."""
        if self.held is None:
            return self.length
        return self.tail_start + len(self.held_tail)

    @property
    def shortest(self) -> int:
        """The fewest tokens that `rewind` can keep; of those held, one has to choose blocks."""
        return max(1, self.tail_start + (self.held is not None))

    # ---- a new conversation ---------------------------------------------------------

    def reset(
        self, n_prompt: int, schedule: dict[int, Budget], room: int = 0, keep_last: int = 0
    ) -> None:
        """Drop everything and lay out slabs for a prompt, and for `room` tokens after it.

        keep_last: tokens at the prompt's end that belong to the tail, so that none is pruned.
        """
        if self.pin:
            torch.cuda.synchronize(self.device)  # copies may still touch the slabs freed here
        # The old conversation's memory goes first: there may not be enough for both.
        self.stages = []
        self.slabs = []
        self.held = None
        self.held_tail = None
        self.aux_memory.forget()
        self.home_memory.forget()

        self.schedule = schedule
        self.n_prompt = n_prompt
        self.n_prunable = n_prompt - keep_last
        self.length = 0
        self.planned = n_prompt + room
        layout = stage_layout(self.n_layers, self.n_prunable, schedule, self.block_len)
        self.stages = [Stage(layers, n_slots) for layers, n_slots in layout]
        self.fill(self.stages[0], list(range(self.stages[0].n_slots)))
        self.tail_start = self.stages[0].n_slots * self.block_len
        self.tail_rows = n_prompt - self.tail_start + min(room, ROOM_AT_ONCE)
        self.copied = [None] * self.n_layers
        for stage in self.stages:
            self.slabs += [self.new_slab(stage, self.tail_rows) for _ in stage.layers]
        for counter in COUNTERS:
            setattr(self, counter, 0)
        # Room for what the first step sends to the CPU, and for the first exchange of all blocks:
        # neither waits for pinning.
        self.aux_memory.reset(aux_blocks([n_slots for _, n_slots in layout]))
        self.home_memory.reset(sum(len(stage.layers) * stage.n_slots for stage in self.stages[1:]))

    def new_slab(self, stage: Stage, n_tail: int) -> Tensor:
        shape = 2, self.n_kv_heads, stage.n_slots * self.block_len + n_tail, self.head_dim
        slab = allocate("keys and values", shape, self.dtype, self.device)
        return slab.zero_()  # writing takes the memory now

    def growth_bytes(self, end: int) -> int:
        """Return the memory that tails up to position `end` still take, and one slab twice."""
        missing_rows = end - self.tail_start - self.tail_rows
        if missing_rows <= 0:
            return 0
        row_bytes = self.n_layers * self.slabs[0][:, :, 0].nbytes
        return (missing_rows + TAIL_GROWTH) * row_bytes + self.slabs[0].nbytes

    def exchange_entries(self) -> list[tuple[HostMemory, int]]:
        """Return how many homes and entries of aux a step takes if it exchanges every block."""
        homes = 0
        for stage in self.stages[1:]:
            homes += len(stage.layers) * len(set(stage.slots) - stage.home.keys())
        aux = sum(stage.n_slots for stage in self.stages[1:-1])
        if self.held is not None:  # the first choice is still to come
            aux += self.stages[0].n_slots - self.stages[-1].n_slots
        return [(self.home_memory, homes), (self.aux_memory, aux)]

    def exchange_allocates(self) -> bool:
        """Say whether such a step has to ask for CPU memory."""
        return any(memory.missing(n) for memory, n in self.exchange_entries())

    def exchange_bytes(self) -> int:
        """Return the CPU memory such a step still takes; memory not pinned is taken by writing."""
        n_bytes = 0
        for memory, n in self.exchange_entries():
            n_bytes += (memory.missing(n) if self.pin else n) * memory.entry_bytes
        return n_bytes

    def make_room(self, end: int, room: int = 0) -> None:
        """Make room for tokens up to position `end`, and for what their step sends to the CPU.

        room: tokens to come after these; where tails grow, they grow for many of them.
        """
        for memory, n in self.exchange_entries():
            memory.reserve(n)
        if end - self.tail_start <= self.tail_rows:
            return
        n_tail = end - self.tail_start + max(TAIL_GROWTH, min(room, ROOM_AT_ONCE))
        for stage in self.stages:
            for layer in stage.layers:
                self.wait(layer)  # the slab copied here may still be filled
                self.slabs[layer] = self.longer_slab(stage, n_tail, self.slabs[layer])
        self.tail_rows = n_tail  # only now: if memory runs out above, the conversation stays

    def longer_slab(self, stage: Stage, n_tail: int, old: Tensor) -> Tensor:
        new = self.new_slab(stage, n_tail)
        # old is the longer one if it grew before memory ran out
        n = min(old.shape[2], new.shape[2])
        new[:, :, :n] = old[:, :, :n]
        return new

    # ---- keys and values ------------------------------------------------------------

    def append(self, layer: int, slab_rows: Tensor, kv: Tensor) -> None:
        """Write keys and values (T, 2, G, D) to slab rows (T,)."""
        self.slabs[layer].index_copy_(2, slab_rows, kv.permute(1, 2, 0, 3))

    def read(self, layer: int, n: int) -> Tensor:
        """Return the first n slab rows of a layer as a view (2, n, G, D): keys, values."""
        return self.slabs[layer][:, :, :n].transpose(1, 2)

    def gather(self, layer: int, stage: Stage, slots: Tensor) -> Tensor:
        """Copy some slots (n,) of a layer, in their order: (2, n*B, G, D): keys, values."""
        return self.slot_rows(stage, layer)[:, :, slots].flatten(2, 3).transpose(1, 2)

    def slot_rows(self, stage: Stage, layer: int) -> Tensor:
        """Return the slots of a layer as a view (2, G, N, B, D)."""
        in_slots = self.slabs[layer][:, :, : stage.n_slots * self.block_len]
        return in_slots.unflatten(2, (-1, self.block_len))

    def wait(self, layer: int) -> None:
        """Make compute wait until the copies of this layer's slots are done.

        Hazards: attention must not read a returning block before it has arrived, and a
        revived row must not be written over a leaving block that has not been read yet.
        """
        self.copies.wait(self.copied[layer])
        self.copied[layer] = None

    # ---- active blocks --------------------------------------------------------------

    def activate(self, stage: Stage, active: set[int]) -> Move | None:
        """Make `active` the stage's blocks; return the copies that this asks for, if any.

        Blocks that leave go home unless they are there; blocks at home return to the freed slots.
        A block without keys in this stage only gets a slot: its rows write it on the way up.
        """
        if not stage.slots:  # the prompt's step: rows write every slot
            self.fill(stage, sorted(active))
        if active == set(stage.slots):
            return None
        freed = [slot for slot, block in enumerate(stage.slots) if block not in active]
        entering = dict(zip(freed, sorted(active - set(stage.slots))))  # slot -> block
        out_slots = [slot for slot in entering if stage.slots[slot] not in stage.home]
        in_slots = [slot for slot, block in entering.items() if block in stage.home]
        in_blocks = [entering[slot] for slot in in_slots]

        n_layers = len(stage.layers)
        homes = self.home_memory.take(n_layers * len(out_slots))
        homes = homes.view(n_layers, len(out_slots), *self.home_memory.shape)
        move = Move(stage, out_slots, homes, in_slots, in_blocks, decided=self.copies.mark())
        for i, slot in enumerate(out_slots):
            stage.home[stage.slots[slot]] = homes[:, i]
        self.fill(stage, [entering.get(slot, block) for slot, block in enumerate(stage.slots)])
        self.swaps += len(entering)
        return move

    def fill(self, stage: Stage, blocks: list[int]) -> None:
        stage.slots = blocks
        stage.blocks = self.upload(blocks)

    def copy(self, move: Move) -> None:
        """Do a move layer by layer; each layer's event fires when its own copies are done.

        Called once the FFN, which hides the copies, is issued. They start after the compute issued
        before the choice, so after the last read of every slot that they overwrite and the last
        write of every block that leaves.
        """
        stage = move.stage
        sent = stage.home_sent  # blocks that return were sent before this move
        with self.copies.after(move.decided):
            out_slots = self.upload(move.out_slots)
            in_slots = self.upload(move.in_slots)
            for i, layer in enumerate(stage.layers):
                self.copy_layer(move, i, out_slots, in_slots, sent)
                self.copied[layer] = stage.home_sent = self.copies.mark()
        self.to_cpu_bytes += move.homes.nbytes
        n_returned = len(move.in_blocks) * len(stage.layers)
        self.to_gpu_bytes += n_returned * self.home_memory.entry_bytes

    def copy_layer(self, move: Move, i: int, out_slots: Tensor, in_slots: Tensor, sent) -> None:
        """Do a move in its stage's i-th layer: one copy home, then one copy back."""
        slots = self.slot_rows(move.stage, move.stage.layers[i])  # (2, G, N, B, D)
        if move.out_slots:
            leaving = slots[:, :, out_slots].permute(2, 0, 1, 3, 4)  # (n, 2, G, B, D)
            self.copies.to_host(move.homes[i], leaving.contiguous())
        if move.in_blocks:
            entries = [move.stage.home[block][i] for block in move.in_blocks]
            returning = self.copies.to_device(entries, sent)  # (n, 2, G, B, D)
            slots[:, :, in_slots] = returning.permute(1, 2, 0, 3, 4)

    # ---- rows that wait, leave and return ---------------------------------------------

    def hold(self, x: Tensor) -> None:
        """Keep rows x (T, C) at the first boundary until a step chooses blocks."""
        if self.held is None:
            self.held_tail = x[self.tail_start :].clone()  # a view would keep all of x
            self.held = x[: self.tail_start]  # last: there may be no memory for the copy
        else:
            self.held_tail = torch.cat([self.held_tail, x])

    def held_bytes(self) -> int:
        """Return the memory of the rows that wait; they may be views of more."""
        if self.held is None:
            return 0
        return sum(x.untyped_storage().nbytes() for x in (self.held, self.held_tail))

    def offload(self, stage: Stage, x: Tensor, place: dict[int, int]) -> None:
        """Copy the blocks pruned at this stage's boundary to aux.

        place: block -> its place among the blocks that x (T, C) begins with.
        """
        decided = self.copies.mark()  # the rows are the newest compute
        blocks = list(place)
        with self.copies.after(decided):
            for start in range(0, len(blocks), BLOCKS_PER_COPY):
                part = blocks[start : start + BLOCKS_PER_COPY]
                entries = self.aux_memory.take(len(part))  # (n, B, C)
                rows = self.block_rows([place[block] for block in part])
                self.copies.to_host(entries, x[rows].view_as(entries))
                stage.aux |= dict(zip(part, entries))
            stage.aux_sent = self.copies.mark()
        if self.copies.stream is not None:
            x.record_stream(self.copies.stream)  # keeps x's memory until the copy has read it
        self.to_cpu_bytes += len(blocks) * self.aux_memory.entry_bytes

    def restore(self, stage: Stage, blocks: list[int]) -> Tensor:
        """Take blocks out of aux: their hidden states (len(blocks) * B, C) on the device."""
        x = self.copies.to_device([stage.aux.pop(block) for block in blocks], stage.aux_sent)
        self.revived += len(blocks)
        self.to_gpu_bytes += x.nbytes
        return x.view(-1, self.dim)

    # ---- drafted tokens, going back, and out to a file ---------------------------------

    def accept(self, window: int) -> None:
        """Count the first drafted token as one of the conversation; its keys are in the slabs.

        Drafted tokens that are never accepted leave nothing: the next step writes over their keys.
        """
        self.length += 1
        for stage in self.stages[1:]:
            stage.remember(stage.drafted, window, len(stage.drafted) - 1)

    def rewind(self, n: int) -> None:
        """Forget all but the first n tokens; the active blocks stay, and the next tokens choose."""
        if self.held is None:
            self.length = n
        else:
            self.held_tail = self.held_tail[: n - self.tail_start]
        self.n_prompt = min(self.n_prompt, n)
        for stage in self.stages:
            stage.newest = None

    def state(self) -> tuple[dict, dict[str, Tensor]]:
        """Return all that the conversation needs: a JSON-able layout, and named tensors (views)."""
        if self.pin:
            torch.cuda.synchronize(self.device)  # copies may still write what is read here
        keys = "n_prompt", "n_prunable", "length", "planned", *COUNTERS
        layout = {key: getattr(self, key) for key in keys}
        layout["stages"] = []
        tensors = {}
        for i, stage in enumerate(self.stages):
            blocks = {"slots": stage.slots, "home": list(stage.home), "aux": list(stage.aux)}
            layout["stages"].append({**blocks, "newest": stage.newest is not None})
            for layer in stage.layers:
                n_rows = stage.n_slots * self.block_len + self.length - self.tail_start
                tensors[f"layer.{layer}"] = self.slabs[layer][:, :, :n_rows]
            for kind, entries in (("home", stage.home), ("aux", stage.aux)):
                for block, entry in entries.items():
                    tensors[f"stage.{i}.{kind}.{block}"] = entry
            if stage.newest is not None:
                tensors[f"stage.{i}.newest"] = stage.newest
        return layout, tensors

    def state_bytes(self) -> int:
        """Return the bytes of the tensors of `state`; of a held text, once it has chosen blocks."""
        stats = self.stats()
        n_bytes = stats["kv_cpu_bytes"] + stats["aux_cpu_bytes"]
        if self.held is not None:
            n_pruned = self.stages[0].n_slots - self.stages[-1].n_slots
            n_bytes = n_pruned * self.aux_memory.entry_bytes
        n_tail = self.n_tokens - self.tail_start
        row_bytes = self.slabs[0][:, :, 0].nbytes
        for stage in self.stages:
            n_bytes += len(stage.layers) * (stage.n_slots * self.block_len + n_tail) * row_bytes
            n_bytes += 0 if stage.newest is None else stage.newest.nbytes
        return n_bytes

    @torch.inference_mode()
    def load_state(self, layout: dict, tensor, schedule: dict[int, Budget], room: int = 0) -> None:
        """Lay out a dumped conversation and fill it from tensor(name)."""
        n_prunable = layout["n_prunable"]
        length = layout["length"]
        self.reset(length, schedule, room, keep_last=length - n_prunable)
        for i, (stage, saved) in enumerate(zip(self.stages, layout["stages"])):
            self.fill(stage, saved["slots"])
            for layer in stage.layers:
                rows = tensor(f"layer.{layer}")
                self.slabs[layer][:, :, : rows.shape[2]] = rows
            for block in saved["home"]:
                home = self.home_memory.take(len(stage.layers))
                stage.home[block] = home.copy_(tensor(f"stage.{i}.home.{block}"))
            for block in saved["aux"]:
                entry = self.aux_memory.take(1)[0]
                stage.aux[block] = entry.copy_(tensor(f"stage.{i}.aux.{block}"))
            if saved["newest"]:
                stage.newest = tensor(f"stage.{i}.newest").to(self.device, copy=True)
        for key in ("n_prompt", "length", "planned", *COUNTERS):
            setattr(self, key, layout[key])

    # ---- helpers --------------------------------------------------------------------

    def chosen_stages(self) -> list[Stage]:
        """Return the stages that have blocks."""
        return self.stages if self.held is None else self.stages[:1]

    def block_rows(self, numbers: list[int]) -> Tensor:
        """Return all rows of the blocks (or slots) with these numbers: (len(numbers) * B,)."""
        first = self.upload(numbers)[:, None] * self.block_len
        return (first + torch.arange(self.block_len, device=self.device)).flatten()

    def upload(self, numbers: list[int]) -> Tensor:
        """Return numbers as a tensor (n,) on the device, without waiting for the copy."""
        on_cpu = torch.tensor(numbers, dtype=torch.long, pin_memory=self.pin)
        return on_cpu.to(self.device, non_blocking=True)

    def stats(self) -> dict:
        """Return the conversation's counters: `kept` in prompt tokens per stage, others by name.

        kv_gpu_bytes: of slabs, with room for new tokens; kv_dense_bytes: without pruning; CPU
        bytes: in use.
        """
        row_bytes = 2 * self.n_layers * self.n_kv_heads * self.head_dim * self.dtype.itemsize
        in_tail = self.n_prompt - self.tail_start
        homes = sum(len(stage.home) * len(stage.layers) for stage in self.stages)
        aux = sum(len(stage.aux) for stage in self.stages)
        return {
            "prompt_tokens": self.n_prompt,
            "tokens": self.n_tokens,
            "kept": [stage.n_slots * self.block_len + in_tail for stage in self.chosen_stages()],
            "kv_gpu_bytes": sum(slab.nbytes for slab in self.slabs),
            "kv_cpu_bytes": homes * self.home_memory.entry_bytes,
            "aux_cpu_bytes": aux * self.aux_memory.entry_bytes,
            "held_bytes": self.held_bytes(),
            "kv_dense_bytes": (self.tail_start + self.tail_rows) * row_bytes,
            **{counter: getattr(self, counter) for counter in COUNTERS},
        }
