"""All state that outlives a step: keys and values in blocks, pruned rows, and which blocks are active.

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
    home      a block's keys and values on the CPU, copied there when it first leaves its slot
    aux       the hidden states of blocks pruned at a boundary, on the CPU
    revive    to run a pruned block's rows from aux, because a later token chose it
    rule      what ranks the blocks (prune.py)
    budget    how many tokens of the prompt stay at a boundary
    unit      a part of a block whose mean key the paper's rule looks at

    slab of one layer     | slot 0 | slot 1 | slot 2 |  ...  | tail: last block, new tokens -> |
    holds, in any order   | block 0| block 9| block 4|       | positions from tail_start on    |

One block, from the prompt to its return: block 7 runs through stage 0 and gets keys there. At the first
boundary it is not chosen: its rows leave x for aux (`offload`). Later a token chooses it: its rows come out
of aux (`restore`), run through stage 1 beside the token, and get keys in a freed slot (`activate`). When the
choice changes again, its keys and values go home; from then on they are only copied back (`move`).

A single new token needs no mask, whatever the order of the slots, as RoPE is already inside the keys. Prompt keys
never change, so a block is copied home once and from then on only copied back. Copies run on a CUDA stream of their
own in layer order, and a layer waits for its own copies only (paper, section on asynchronous KV management). Blocks
that leave or return together are one copy a layer. On a CPU the same code runs without streams.

Invariants: a stage's slots are always full; a block with keys in a stage is in a slot, at home, or
both; a block without keys is in aux, at that stage's boundary or at a lower one.

Shapes: S slab rows, B block_len, G KV heads, D head_dim, C dim, w newest tokens, H heads, N prompt blocks.
"""

import mmap
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prune import Budget, stage_blocks

COUNTERS = "swaps", "revived", "to_cpu_bytes", "to_gpu_bytes"
TAIL_GROWTH = 64  # rows a tail grows by: small, so that memory stays what the plan said
PIECE_BYTES = 2**26  # of pinned memory, at least, where a first piece was too small
BLOCKS_PER_COPY = 16  # blocks that leave x at a time: a copy of them is made on the device


def stage_layout(
    n_layers: int, n_prompt: int, schedule: dict[int, Budget], block_len: int
) -> list[tuple[range, int]]:
    """Return (layers, slots) of every stage; a boundary that prunes nothing starts no stage."""
    sizes = stage_blocks(n_prompt, schedule, block_len)
    pruning = {layer: n for layer, n, below in zip(schedule, sizes[1:], sizes) if n < below}
    edges, sizes = [0, *pruning, n_layers], [sizes[0], *pruning.values()]
    return [(range(a, b), n - 1) for a, b, n in zip(edges, edges[1:], sizes)]


def aux_blocks(slots: list[int]) -> int:
    """Return how many blocks a first step sends to aux, and one that then exchanges those of every stage."""
    return slots[0] - slots[-1] + sum(slots[1:-1])


def last_block_len(n_prompt: int, block_len: int) -> int:
    """Return how many tokens the prompt's last block has; it begins the tail."""
    return n_prompt - (-(-n_prompt // block_len) - 1) * block_len


def allocate(
    what: str, shape: tuple[int, ...], dtype: torch.dtype, device="cpu", pin: bool = False
) -> Tensor:
    """Return memory for `what`, not written yet; raise MemoryError with the size if there is no room.

    On a CPU it is mapped, so freed memory goes back at once; malloc would keep a hole for every slab that grew.
    """
    n_bytes = torch.Size(shape).numel() * dtype.itemsize
    try:
        if pin or torch.device(device).type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device, pin_memory=pin)
        memory = mmap.mmap(-1, max(n_bytes, 1), access=mmap.ACCESS_COPY)  # private to this process
        return torch.frombuffer(memory, dtype=torch.uint8)[:n_bytes].view(dtype).view(shape)
    except (
        RuntimeError,
        OSError,
        OverflowError,
    ) as error:  # torch has no type of its own for host memory
        raise MemoryError(
            f"no room for {n_bytes >> 20:,} MiB of {what} ({str(error).splitlines()[0]:.100})"
        ) from None


class HostMemory:
    """CPU memory for entries of equal size, allocated in large pieces because pinning, for a GPU, is slow."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, pin: bool):
        self.shape, self.dtype, self.pin = shape, dtype, pin
        self.entry_bytes = torch.Size(shape).numel() * dtype.itemsize
        self.least = (
            PIECE_BYTES // self.entry_bytes if pin else 0
        )  # entries that a further piece has
        self.piece = self.spare = self.new_piece(
            0
        )  # (entries, *shape): the present and, if it is reserved, the next
        self.used = 0  # entries of the piece; older pieces live while entries use them

    def reset(self, n: int) -> None:
        """Forget all entries and make room for n; keep a pinned piece unless it is too small or far too large."""
        self.used, self.spare = 0, self.new_piece(0)
        if not n <= len(self.piece) <= 2 * max(n, self.least) * self.pin:
            self.piece = self.new_piece(0)  # frees the old memory before the new is allocated
            self.piece = self.new_piece(n)

    def take(self, n: int) -> Tensor:
        """Return n entries that lie together (n, *shape)."""
        self.reserve(n)
        if self.used + n > len(self.piece):
            self.piece, self.used, self.spare = self.spare, 0, self.spare[:0]
        self.used += n
        return self.piece[self.used - n : self.used]

    def reserve(self, n: int) -> None:
        """Make sure that n entries can be taken, all at once or part by part."""
        if missing := self.missing(n):
            self.spare = self.new_piece(missing)

    def missing(self, n: int) -> int:
        """Return how many entries `reserve(n)` allocates."""
        return 0 if n <= max(len(self.piece) - self.used, len(self.spare)) else max(n, self.least)

    def new_piece(self, n: int) -> Tensor:
        return allocate("CPU memory for pruned blocks", (n, *self.shape), self.dtype, pin=self.pin)


class CopyStream:
    """The copy stream of a CUDA device; with overlap off, or on a CPU, the compute stream itself."""

    def __init__(self, device: torch.device, overlap: bool):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" and overlap else None

    def mark(self):
        """Return an event at this point of the current stream: that of copies inside `after`, else of compute."""
        return (
            torch.cuda.current_stream(self.device).record_event()
            if self.stream is not None
            else None
        )

    def after(self, event):
        """Enter the copy stream; copies issued inside start after this event of the compute stream."""
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
        """Return entries of pinned memory as one tensor on the device; `sent`: the event after they were written."""
        if sent is not None:
            sent.synchronize()  # usually of an earlier step, so there is no wait
        pin = self.device.type == "cuda"
        together = torch.empty(
            len(entries), *entries[0].shape, dtype=entries[0].dtype, pin_memory=pin
        )
        return torch.stack(entries, out=together).to(
            self.device, non_blocking=self.stream is not None
        )


@dataclass
class Stage:
    """Layers that hold the same blocks; `slots` lists those by slot, without the prompt's last block (tail)."""

    layers: range
    n_slots: int
    slots: list[int] = field(default_factory=list)  # slot -> block
    blocks: Tensor | None = None  # the same on the device
    held: set[int] = field(
        default_factory=set
    )  # blocks whose keys this stage has, in a slot or at home
    home: dict[int, Tensor] = field(
        default_factory=dict
    )  # block -> (layers, 2, G, B, D) on the CPU
    aux: dict[int, Tensor] = field(
        default_factory=dict
    )  # block -> (B, C) on the CPU, pruned at this stage's boundary
    home_sent: object = None  # the event after the newest copy to home
    aux_sent: object = None  # and to aux
    recent: Tensor | None = (
        None  # of the newest tokens at this boundary: scores (w, N), or queries (w, H, D)
    )

    def remember(self, newest: Tensor, window: int) -> None:
        """Add the newest tokens' scores or queries (w, ...) here; keep those of the last `window` tokens."""
        self.recent = torch.cat([newest[:0] if self.recent is None else self.recent, newest])[
            -window:
        ]


class KVCache:
    """Keys and values of one conversation; `reset` lays it out for a prompt and a schedule {boundary: budget}."""

    def __init__(self, n_layers, n_kv_heads, head_dim, dim, block_len, dtype, device, overlap=True):
        self.n_layers, self.block_len, self.dtype, self.device = n_layers, block_len, dtype, device
        self.n_kv_heads, self.head_dim, self.dim = n_kv_heads, head_dim, dim
        self.copies = CopyStream(device, overlap)
        self.pin = device.type == "cuda"
        self.aux_memory = HostMemory((block_len, dim), dtype, self.pin)
        self.home_memory = HostMemory(
            (2, n_kv_heads, block_len, head_dim), dtype, self.pin
        )  # a block in one layer
        self.moves: list = []  # what `activate` decided and `move` has to do
        self.stages: list[Stage] = []
        self.slabs: list[
            Tensor
        ] = []  # per layer (2, G, S, D): keys, values, a head's rows together
        self.copied: list = []  # per layer: the event after its newest copies, or None
        self.schedule: dict[int, Budget] = {}
        self.n_prompt = self.length = (
            0  # tokens of the prompt; of the conversation, whose keys are complete
        )
        self.planned = 0  # tokens of the prompt, its tail and the answer: decides between LongRoPE's factors, once
        self.tail_start = self.tail_rows = (
            0  # first position of the tail; rows that slabs have for it
        )
        self.swaps = self.revived = self.to_cpu_bytes = self.to_gpu_bytes = 0

    # ---- a new conversation ---------------------------------------------------------

    def reset(self, n_prompt: int, schedule: dict[int, Budget], room: int = 0) -> None:
        """Drop everything and lay out slabs for a prompt of n_prompt tokens and `room` more."""
        if self.pin:
            torch.cuda.synchronize(self.device)  # copies may still touch the slabs freed here
        self.schedule = schedule
        layout = stage_layout(self.n_layers, n_prompt, schedule, self.block_len)
        self.stages, self.moves = [Stage(layers, n_slots) for layers, n_slots in layout], []
        n_slots = self.stages[0].n_slots
        self.activate(self.stages[0], set(range(n_slots)))
        self.tail_start, self.tail_rows = (
            n_slots * self.block_len,
            last_block_len(n_prompt, self.block_len) + room,
        )
        self.length, self.n_prompt, self.planned = 0, n_prompt, n_prompt + room
        self.slabs, self.copied = (
            [],
            [None] * self.n_layers,
        )  # frees the old slabs before the new are allocated
        self.slabs = [
            self.new_slab(stage, self.tail_rows) for stage in self.stages for _ in stage.layers
        ]
        for counter in COUNTERS:
            setattr(self, counter, 0)
        # Room for what the first step sends to the CPU, and the first exchange of all: neither waits for pinning.
        self.aux_memory.reset(aux_blocks([n for _, n in layout]))
        self.home_memory.reset(sum(len(stage.layers) * stage.n_slots for stage in self.stages[1:]))

    def new_slab(self, stage: Stage, n_tail: int) -> Tensor:
        # zeros, not empty: a masked key is still multiplied by its zero weight, and 0 * NaN is NaN
        shape = 2, self.n_kv_heads, stage.n_slots * self.block_len + n_tail, self.head_dim
        return allocate(
            "keys and values", shape, self.dtype, self.device
        ).zero_()  # writing takes the memory now

    def growth_bytes(self, end: int) -> int:
        """Return the memory that `make_room` will ask for: longer tails, and one slab twice."""
        rows, row = (
            end - self.tail_start - self.tail_rows,
            self.n_layers * self.slabs[0][:, :, 0].nbytes,
        )
        return (rows + TAIL_GROWTH) * row + self.slabs[0].nbytes if rows > 0 else 0

    def exchange_entries(self) -> list[tuple[HostMemory, int]]:
        """Return how many homes and entries of aux a step takes if it exchanges every block."""
        homes = sum(len(s.layers) * len(set(s.slots) - s.home.keys()) for s in self.stages[1:])
        return [
            (self.home_memory, homes),
            (self.aux_memory, sum(s.n_slots for s in self.stages[1:-1])),
        ]

    def swap_bytes(self) -> int:
        """Return the CPU memory that such a step still takes; what is not pinned is taken when it is first written."""
        return sum(
            (memory.missing(n) if self.pin else n) * memory.entry_bytes
            for memory, n in self.exchange_entries()
        )

    def make_room(self, end: int) -> None:
        """Make room for the tokens up to position `end` in every tail, and for all that their step sends to the CPU."""
        for memory, n in self.exchange_entries():
            memory.reserve(n)
        if end - self.tail_start <= self.tail_rows:
            return
        n_tail = end - self.tail_start + TAIL_GROWTH
        for stage in self.stages:
            for layer in stage.layers:
                self.wait(layer)  # the slab copied here may still be filled
                new, old = self.new_slab(stage, n_tail), self.slabs[layer]
                n = min(
                    old.shape[2], new.shape[2]
                )  # old is the longer one if it grew before memory ran out
                new[:, :, :n] = old[:, :, :n]
                self.slabs[layer] = new
                del old  # before the next slab is allocated
        self.tail_rows = (
            n_tail  # only now: if memory runs out above, the conversation stays as it is
        )

    # ---- keys and values ------------------------------------------------------------

    def append(self, layer: int, slab_rows: Tensor, k: Tensor, v: Tensor) -> None:
        """Write keys and values (T, G, D) to slab rows (T,)."""
        for half, new in zip(self.slabs[layer], (k, v)):
            half.index_copy_(1, slab_rows, new.transpose(0, 1))

    def read(self, layer: int, n: int) -> Tensor:
        """Return the first n slab rows of a layer as a view (2, n, G, D): keys, values."""
        return self.slabs[layer][:, :, :n].transpose(1, 2)

    def slot_rows(self, stage: Stage, layer: int) -> Tensor:
        """Return the slots of a layer as a view (2, G, N, B, D)."""
        return self.slabs[layer][:, :, : stage.n_slots * self.block_len].unflatten(
            2, (-1, self.block_len)
        )

    def wait(self, layer: int) -> None:
        """Make compute wait until the copies of this layer's slots are done.

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
        entering = dict(zip(freed, sorted(active - set(stage.slots))))
        leaving = [(s, stage.slots[s]) for s in entering if stage.slots[s] not in stage.home]
        returning = [(s, block) for s, block in entering.items() if block in stage.home]
        n_layers, n = len(stage.layers), len(leaving)
        homes = self.home_memory.take(n_layers * n).view(n_layers, n, *self.home_memory.shape)
        self.moves.append((stage, leaving, homes, returning, self.copies.mark()))
        stage.home |= {block: homes[:, i] for i, (_, block) in enumerate(leaving)}
        self.fill(stage, [entering.get(s, block) for s, block in enumerate(stage.slots)])
        self.swaps += len(entering)

    def fill(self, stage: Stage, slots: list[int]) -> None:
        stage.slots, stage.blocks = slots, self.upload(slots)
        stage.held |= set(slots)

    def move(self) -> None:
        """Copy what `activate` decided, layer by layer; each layer's event fires when its own copies are done.

        Called once the FFN, which hides the copies, is issued. They start after the compute issued before `activate`,
        so after the last read of every slot that they overwrite and the last write of every block that leaves.
        """
        for stage, leaving, homes, returning, event in self.moves:
            sent = stage.home_sent
            with self.copies.after(event):
                out, into = (self.upload([s for s, _ in pairs]) for pairs in (leaving, returning))
                for i, layer in enumerate(stage.layers):
                    self.move_layer(
                        stage, i, layer, out, homes, into, [b for _, b in returning], sent
                    )
                    self.copied[layer] = stage.home_sent = self.copies.mark()
            self.to_cpu_bytes += homes.nbytes
            self.to_gpu_bytes += len(returning) * len(stage.layers) * self.home_memory.entry_bytes
        self.moves = []

    def move_layer(
        self, stage: Stage, i: int, layer: int, out, homes, into, blocks: list[int], sent
    ) -> None:
        """Copy slots `out` home, then blocks from home to slots `into`, in the stage's i-th layer: one copy each."""
        slots = self.slot_rows(stage, layer)  # (2, G, N, B, D)
        if len(out):
            self.copies.to_host(homes[i], slots[:, :, out].permute(2, 0, 1, 3, 4).contiguous())
        if blocks:
            back = self.copies.to_device(
                [stage.home[block][i] for block in blocks], sent
            )  # (n, 2, G, B, D)
            slots[:, :, into] = back.permute(1, 2, 0, 3, 4)

    # ---- rows that leave and return --------------------------------------------------

    def offload(self, stage: Stage, x: Tensor, first_row: dict[int, int]) -> None:
        """Copy the blocks pruned at this stage's boundary to aux; first_row: where each begins in x (T, C)."""
        event, blocks = self.copies.mark(), list(first_row)  # the rows are the newest compute
        with self.copies.after(event):
            for part in (
                blocks[i : i + BLOCKS_PER_COPY] for i in range(0, len(blocks), BLOCKS_PER_COPY)
            ):
                entries = self.aux_memory.take(len(part))  # (n, B, C)
                self.copies.to_host(
                    entries,
                    x[self.block_rows([first_row[block] for block in part])].view_as(entries),
                )
                stage.aux |= dict(zip(part, entries))
            stage.aux_sent = self.copies.mark()
        if self.copies.stream is not None:
            x.record_stream(self.copies.stream)  # keeps x's memory until the copy has read it
        self.to_cpu_bytes += len(blocks) * self.aux_memory.entry_bytes

    def restore(self, stage: Stage, blocks: list[int]) -> Tensor:
        """Take blocks out of aux: their hidden states (len(blocks) * B, C) on the device, ready to use."""
        x = self.copies.to_device([stage.aux.pop(block) for block in blocks], stage.aux_sent)
        self.revived += len(blocks)
        self.to_gpu_bytes += x.nbytes
        return x.view(-1, self.dim)

    # ---- going back, and out to a file -----------------------------------------------

    def rewind(self, n: int) -> None:
        """Forget all but the first n tokens; the active blocks stay, and the next tokens choose from there."""
        self.length = n
        for stage in self.stages:
            stage.recent = None

    def state(self) -> tuple[dict, dict[str, Tensor]]:
        """Return all that the conversation needs: a JSON-able layout, and tensors by name, views where they lie."""
        if self.pin:
            torch.cuda.synchronize(self.device)  # copies may still write what is read here
        layout = {key: getattr(self, key) for key in ("n_prompt", "length", "planned", *COUNTERS)}
        layout["stages"], tensors = [], {}
        for i, stage in enumerate(self.stages):
            blocks = {"slots": stage.slots, "home": list(stage.home), "aux": list(stage.aux)}
            layout["stages"].append({**blocks, "recent": stage.recent is not None})
            for layer in stage.layers:
                n = stage.n_slots * self.block_len + self.length - self.tail_start
                tensors[f"layer.{layer}"] = self.slabs[layer][:, :, :n]
            tensors |= {f"stage.{i}.home.{block}": entry for block, entry in stage.home.items()}
            tensors |= {f"stage.{i}.aux.{block}": entry for block, entry in stage.aux.items()}
            if stage.recent is not None:
                tensors[f"stage.{i}.recent"] = stage.recent
        return layout, tensors

    @torch.inference_mode()
    def load_state(self, layout: dict, tensor, schedule: dict[int, Budget], room: int = 0) -> None:
        """Lay out a dumped conversation and fill it from tensor(name)."""
        self.reset(layout["n_prompt"], schedule, layout["length"] - layout["n_prompt"] + room)
        for i, (stage, saved) in enumerate(zip(self.stages, layout["stages"])):
            self.fill(stage, saved["slots"])
            stage.held |= set(saved["home"])
            for layer in stage.layers:
                rows = tensor(f"layer.{layer}")
                self.slabs[layer][:, :, : rows.shape[2]] = rows
            for block in saved["home"]:
                stage.home[block] = self.home_memory.take(len(stage.layers)).copy_(
                    tensor(f"stage.{i}.home.{block}")
                )
            for block in saved["aux"]:
                stage.aux[block] = self.aux_memory.take(1)[0].copy_(
                    tensor(f"stage.{i}.aux.{block}")
                )
            stage.recent = (
                tensor(f"stage.{i}.recent").to(self.device, copy=True) if saved["recent"] else None
            )
        for key in ("length", "planned", *COUNTERS):
            setattr(self, key, layout[key])

    # ---- helpers --------------------------------------------------------------------

    def block_rows(self, first: list[int]) -> Tensor:
        """Return first, first + 1, ... of block_len rows for each block: (len(first) * B,) on the device."""
        return (
            self.upload(first)[:, None] + torch.arange(self.block_len, device=self.device)
        ).flatten()

    def upload(self, numbers: list[int]) -> Tensor:
        """Return numbers as a tensor (n,) on the device, without waiting for the copy."""
        return torch.tensor(numbers, dtype=torch.long, pin_memory=self.pin).to(
            self.device, non_blocking=True
        )

    def stats(self) -> dict:
        """Return the conversation's counters: `kept` in prompt tokens per stage, the others in blocks or bytes.

        kv_gpu_bytes: of slabs, room for new tokens included; kv_dense_bytes: without pruning; CPU bytes: in use.
        """
        row = 2 * self.n_layers * self.n_kv_heads * self.head_dim * self.dtype.itemsize
        in_tail = self.n_prompt - self.tail_start
        return {
            "prompt_tokens": self.n_prompt,
            "tokens": self.length,
            "kept": [stage.n_slots * self.block_len + in_tail for stage in self.stages],
            "kv_gpu_bytes": sum(slab.nbytes for slab in self.slabs),
            "kv_cpu_bytes": sum(len(s.home) * len(s.layers) for s in self.stages)
            * self.home_memory.entry_bytes,
            "aux_cpu_bytes": sum(len(s.aux) for s in self.stages) * self.aux_memory.entry_bytes,
            "kv_dense_bytes": (self.tail_start + self.tail_rows) * row,
            **{counter: getattr(self, counter) for counter in COUNTERS},
        }
