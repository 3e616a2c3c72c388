"""All state that outlives a step: keys and values in blocks, pruned rows, active sets.

Every layer owns one *slab* on the device: block-sized *slots* for the active prompt
blocks, then the *tail* (the prompt's last block and every token after it). Layers
between two boundaries form a *stage* and hold the same blocks. A block that leaves its
stage's active set goes *home* to pinned CPU memory, once, since prompt KV never changes;
the hidden states of a block pruned at a boundary wait in *aux*. Copies run on a stream
of their own in layer order; a layer waits for its own event only (paper, section on
asynchronous KV management).

Invariants: a stage's slots are always full; a block with KV in a stage is in a slot, at
home, or both; a block without is in aux of that stage's boundary or of one below it.
On a CPU the same code runs without streams.

Shapes: S slab rows, B block_len, G KV heads, D head_dim, C dim, W window, H heads.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from prune import stage_blocks

COUNTERS = "swaps", "revived", "to_cpu_bytes", "to_gpu_bytes"
TAIL_STEP = 64  # rows a tail grows by: small, so that memory stays what the plan said


class Pool:
    """Equal entries of pinned CPU memory, allocated in pieces because pinning is slow and must be rare."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, pin: bool, piece_mib: float):
        self.shape, self.dtype, self.pin = shape, dtype, pin
        self.entry_bytes = torch.Size(shape).numel() * dtype.itemsize
        self.piece = max(1, int(piece_mib * 2**20) // self.entry_bytes)  # entries a piece
        self.free: list[Tensor] = []
        self.used = 0

    def reserve(self, n: int) -> None:
        """Make n free entries sure, in one piece of at least the usual size."""
        if (missing := n - len(self.free)) > 0:
            memory = torch.empty(max(missing, self.piece), *self.shape, dtype=self.dtype, pin_memory=self.pin)
            self.free.extend(memory.unbind(0))

    def take(self) -> Tensor:
        self.reserve(1)
        self.used += 1
        return self.free.pop()

    def give(self, entry: Tensor) -> None:
        self.used -= 1
        self.free.append(entry)

    @property
    def nbytes(self) -> int:
        return self.used * self.entry_bytes


class CopyLane:
    """The copy stream of a CUDA device; with overlap off, or on a CPU, the compute stream itself."""

    def __init__(self, device: torch.device, overlap: bool):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" and overlap else None
        self.non_blocking = self.stream is not None

    def after_compute(self):
        """Enter the lane: what is copied inside starts after all compute issued so far."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self.stream)  # of None: changes nothing

    def event(self):
        """Mark this point of the lane."""
        return self.stream.record_event() if self.stream is not None else None

    def wait(self, event) -> None:
        """Let compute issued from now on start after an event of the lane."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def keep(self, tensor: Tensor) -> None:
        """Hold the memory of a compute tensor that the lane still reads when its last name is gone."""
        if self.stream is not None:
            tensor.record_stream(self.stream)


@dataclass
class Stage:
    """Layers that share one active set; `slots` lists its blocks by slot, the last prompt block (tail) left out."""

    layers: range
    n_slots: int
    slots: list[int] = field(default_factory=list)  # slot -> block
    blocks: Tensor | None = None  # the same on the device
    held: set[int] = field(default_factory=set)  # blocks whose KV this stage has, in a slot or at home
    home: dict[int, Tensor] = field(default_factory=dict)  # block -> (layers, 2, B, G, D) on the CPU
    aux: dict[int, Tensor] = field(default_factory=dict)  # block -> (B, C) on the CPU, pruned at this stage's boundary
    ring: Tensor | None = None  # (W, H, D) newest queries of the boundary layer


class KVCache:
    """KV of one conversation; `reset` lays it out for a prompt and a schedule {boundary: budget}.

    A boundary whose budget lets all of the stage below through is none: stages get smaller, always.
    """

    def __init__(self, n_layers, n_kv_heads, head_dim, dim, block_len, dtype, device, overlap=True, pool_mib=64.0):
        self.n_layers, self.block_len, self.dtype, self.device = n_layers, block_len, dtype, device
        self.kv_shape, self.dim, self.pool_mib = (n_kv_heads, head_dim), dim, pool_mib
        self.lane = CopyLane(device, overlap)
        self.pin = device.type == "cuda"
        self.aux_pool = Pool((block_len, dim), dtype, self.pin, pool_mib)
        self.home_pools: dict[int, Pool] = {}  # layers of a stage -> pool
        self.stages: list[Stage] = []
        self.slabs: list[Tensor] = []  # per layer (2, S, G, D): keys, values
        self.length = 0  # tokens of the conversation whose KV is complete
        self.zero_counters()

    def zero_counters(self) -> None:
        self.swaps = self.revived = self.to_cpu_bytes = self.to_gpu_bytes = 0

    # ---- a new conversation ---------------------------------------------------------

    def reset(self, n_prompt: int, schedule: dict[int, int], reserve: int = 0) -> None:
        """Drop everything and lay out slabs for a prompt of n_prompt tokens and `reserve` more."""
        if self.pin:
            torch.cuda.synchronize(self.device)  # the lane may still touch the slabs freed here
        for stage in self.stages:
            for entry in stage.aux.values():
                self.aux_pool.give(entry)
            for entry in stage.home.values():
                self.home_pool(stage).give(entry)
        self.schedule = schedule
        sizes = stage_blocks(n_prompt, schedule, self.block_len)
        pruning = {layer: n for layer, n, below in zip(schedule, sizes[1:], sizes) if n < below}  # others would choose all there is
        edges, sizes = [0, *pruning, self.n_layers], [sizes[0], *pruning.values()]
        self.stages = [Stage(range(a, b), n - 1) for a, b, n in zip(edges, edges[1:], sizes)]
        self.activate(self.stages[0], set(range(sizes[0] - 1)))
        self.tail_start = (sizes[0] - 1) * self.block_len
        self.length, self.n_prompt = 0, n_prompt
        self.tail_rows = n_prompt - self.tail_start + reserve
        self.slabs, self.ready = [], [None] * self.n_layers
        self.slabs = [self.new_slab(stage) for stage in self.stages for _ in stage.layers]
        self.zero_counters()
        self.reserve_pools(sizes)

    def new_slab(self, stage: Stage) -> Tensor:
        # zeros, not empty: a masked key still meets a zero weight, and 0 * NaN is NaN
        rows = stage.n_slots * self.block_len + self.tail_rows
        return torch.zeros(2, rows, *self.kv_shape, dtype=self.dtype, device=self.device)

    def reserve_pools(self, sizes: list[int]) -> None:
        """Allocate what the first step sends to the CPU, and a home for every active block, so that no copy waits for pinning."""
        self.aux_pool.reserve(sizes[0] - sizes[-1])
        for stage in self.stages[1:]:
            self.home_pool(stage).reserve(stage.n_slots)

    def home_pool(self, stage: Stage) -> Pool:
        n = len(stage.layers)
        if n not in self.home_pools:
            self.home_pools[n] = Pool((n, 2, self.block_len, *self.kv_shape), self.dtype, self.pin, self.pool_mib)
        return self.home_pools[n]

    def growth_bytes(self, end: int) -> int:
        """Return the memory that `grow_tail` will ask for: longer tails, and one slab that is there twice."""
        rows = end - self.tail_start - self.tail_rows + TAIL_STEP
        return 0 if rows <= TAIL_STEP else self.n_layers * rows * self.slabs[0][:, 0].nbytes + self.slabs[0].nbytes

    def grow_tail(self, end: int) -> None:
        """Make room for the tokens up to position `end` in every layer's tail."""
        if end - self.tail_start <= self.tail_rows:
            return
        self.tail_rows = end - self.tail_start + TAIL_STEP
        for stage in self.stages:
            for layer in stage.layers:
                self.wait(layer)  # the lane may still be filling the slab that is copied here
                old, self.slabs[layer] = self.slabs[layer], self.new_slab(stage)
                self.slabs[layer][:, : old.shape[1]] = old

    # ---- keys and values ------------------------------------------------------------

    def append(self, layer: int, dst: Tensor, k: Tensor, v: Tensor) -> None:
        """Write keys and values (T, G, D) to slab rows dst (T,)."""
        self.slabs[layer][0].index_copy_(0, dst, k)
        self.slabs[layer][1].index_copy_(0, dst, v)

    def read(self, layer: int, n: int) -> tuple[Tensor, Tensor]:
        """Return the first n slab rows of a layer as views (n, G, D): keys, values."""
        return self.slabs[layer][0, :n], self.slabs[layer][1, :n]

    def block_keys(self, stage: int, layer: int) -> Tensor:
        """Return the keys of the stage's slots at `layer` as a view (N, B, G, D), in slot order."""
        n = self.stages[stage].n_slots
        return self.slabs[layer][0, : n * self.block_len].view(n, self.block_len, *self.kv_shape)

    def wait(self, layer: int) -> None:
        """Let compute go on only when the lane is done with this layer's slots.

        Hazards: attention must not read a returning block before it has arrived, and a
        revived row must not be written over a leaving block that has not been read yet.
        """
        self.lane.wait(self.ready[layer])
        self.ready[layer] = None

    # ---- the active set -------------------------------------------------------------

    def activate(self, stage: Stage, active: set[int]) -> None:
        """Make `active` the stage's blocks: leaving blocks go home, known blocks return to the freed slots.

        Blocks without KV in this stage only get a slot; their rows write it on the way up.
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
        last write of every block that leaves: the lane starts after it.
        """
        with self.lane.after_compute():
            for i, layer in enumerate(stage.layers):
                self.copy_layer(stage, i, self.slabs[layer], leaving, returning)
                self.ready[layer] = self.lane.event()
        self.to_cpu_bytes += len(leaving) * self.home_pool(stage).entry_bytes
        self.to_gpu_bytes += len(returning) * self.home_pool(stage).entry_bytes

    def copy_layer(self, stage: Stage, i: int, slab: Tensor, leaving: list, returning: list) -> None:
        """Copy blocks out of and then into the slots of the stage's i-th layer; keys and values are contiguous each."""
        b, quiet = self.block_len, self.lane.non_blocking
        for half in (0, 1):
            for slot, block in leaving:
                stage.home[block][i, half].copy_(slab[half, slot * b : slot * b + b], non_blocking=quiet)
            for slot, block in returning:
                slab[half, slot * b : slot * b + b].copy_(stage.home[block][i, half], non_blocking=quiet)

    # ---- rows that leave and come back ----------------------------------------------

    def stash(self, stage: Stage, rows: dict[int, Tensor]) -> None:
        """Keep the hidden states {block: (B, C)} pruned at this stage's boundary."""
        with self.lane.after_compute():  # the rows are the newest compute
            for block, x in rows.items():
                stage.aux[block] = self.aux_pool.take()
                stage.aux[block].copy_(x, non_blocking=self.lane.non_blocking)
                self.lane.keep(x)
        self.to_cpu_bytes += len(rows) * self.aux_pool.entry_bytes

    def fetch(self, stage: Stage, blocks: list[int]) -> Tensor:
        """Take blocks out of aux: their hidden states (len(blocks) * B, C) on the device, ready to use."""
        x = torch.empty(len(blocks), self.block_len, self.dim, dtype=self.dtype, device=self.device)
        with self.lane.after_compute():  # x may reuse memory that compute has not finished with
            for row, block in zip(x, blocks):
                entry = stage.aux.pop(block)
                row.copy_(entry, non_blocking=self.lane.non_blocking)
                self.aux_pool.give(entry)  # reused by later copies of this same lane only
            arrived = self.lane.event()
        self.lane.wait(arrived)  # the FFN of the boundary layer reads x next
        self.revived += len(blocks)
        self.to_gpu_bytes += len(blocks) * self.aux_pool.entry_bytes
        return x.view(-1, self.dim)

    # ---- going back, and out to a file -------------------------------------------------

    def rewind(self) -> None:
        """Forget all tokens after the prompt; the active blocks stay, and the next queries choose from there."""
        self.length = self.n_prompt
        for stage in self.stages:
            stage.ring = None

    def dump(self) -> tuple[dict, dict[str, Tensor]]:
        """Return all that the conversation needs: a JSON-able layout, and tensors on the CPU by name."""
        if self.pin:
            torch.cuda.synchronize(self.device)  # the lane may still write what is read here
        layout = {key: getattr(self, key) for key in ("n_prompt", "length", *COUNTERS)}
        layout["stages"] = [{"slots": s.slots, "home": list(s.home), "aux": list(s.aux), "ring": s.ring is not None} for s in self.stages]
        tensors = {}
        for i, stage in enumerate(self.stages):
            for layer in stage.layers:
                halves = self.read(layer, stage.n_slots * self.block_len + self.length - self.tail_start)
                tensors |= {f"layer.{layer}.{name}": half.cpu() for name, half in zip(("keys", "values"), halves)}
            tensors |= {f"stage.{i}.home.{block}": entry for block, entry in stage.home.items()}
            tensors |= {f"stage.{i}.aux.{block}": entry for block, entry in stage.aux.items()}
            if stage.ring is not None:
                tensors[f"stage.{i}.ring"] = stage.ring.cpu()
        return layout, tensors

    def restore(self, layout: dict, tensor, schedule: dict[int, int], reserve: int = 0) -> None:
        """Lay out a dumped conversation and fill it from tensor(name)."""
        self.reset(layout["n_prompt"], schedule, layout["length"] - layout["n_prompt"] + reserve)
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
            stage.ring = tensor(f"stage.{i}.ring").to(self.device) if saved["ring"] else None
        for key in ("length", *COUNTERS):
            setattr(self, key, layout[key])

    # ---- places ---------------------------------------------------------------------

    def spread(self, first: list[int]) -> Tensor:
        """Return the block_len places from each first place on, (len(first) * B,), on the device."""
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
