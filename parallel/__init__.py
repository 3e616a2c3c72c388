"""One model on several GPUs: tensor parallelism under torchrun. Without torchrun nothing here is imported.

    torchrun --nproc-per-node 4 slim.py --ckpt llama3.3-70b-instruct --prompt file.txt

Each of R ranks has H/R query heads with their KV heads and F/R columns of the FFN, in every layer: its rows of q, k,
v, gate and up, its columns of o and down, its slabs and homes. What a rank adds to the hidden states x (T, C) is a
part, and the parts are summed (`Model.add`), once after attention and once after the FFN, so that x, and with it
every decision, is the same on every rank. The engine above and the cache below do not know: they have a model of fewer
heads and fewer columns.

- Embedding and head are cut by rows from VOCABULARY_BYTES each: at 2 TB/s a GPU reads 32 MiB in 17 us, the price of
  one more call (both assumed). Of Llama 3.3 70B (2 GiB each), 4 ranks save 3 GiB each and read 1.5 GiB less a token.
- KV heads fewer than ranks are repeated: R must be a multiple of their number, or divide it.
- Scores: a rule says how those of a rank's heads are joined (`prune.Rule.heads`). A maximum is exact in any order;
  anything else is decided by rank 0. So is every choice of blocks, bit for bit.
- aux is cut by columns. Replicated it would take T x C on every rank, of 70B at 128k tokens 2 GiB, 16 on a
  host with 8 GPUs, all of it over every GPU's link; cut it is 2 in all. A block that returns is put together in one
  call for its 64 x C numbers, 1 MiB.
- A saved file holds all heads, so it opens on any number of ranks; on the same number, bit for bit.

Shapes as in model.py; R ranks.
"""

import functools
import os
import sys
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial

import torch
import torch.distributed as dist
from torch import Tensor

import kvcache
import model
import prune
import slim
from loading.weights import SCALE
from model import Config
from parallel.ranks import Ranks, print_error
from planning.checkpoint import Checkpoint, dtype_name
from planning.memory import check_memory
from planning.settings import env_number

VOCABULARY_BYTES = 2**25


@functools.cache
def connect() -> Ranks:
    """Return this process among the others, once it has met them."""
    return Ranks()


def main(program) -> int:
    """Run the command line on rank 0, and workers on the others; never returns."""
    try:
        ranks = connect()
        code = ranks.follow(start_worker) if ranks.rank else ranks.lead(program)
    except ValueError as error:
        code = 2
        if (
            os.environ.get("RANK", "0") == "0" or not dist.is_torchelastic_launched()
        ):  # nobody else would say it
            print_error(error)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)  # threads wait for connections, and torch would wait for the threads


def load(
    ckpt,
    device="auto",
    dtype="auto",
    schedule="auto",
    score="peak",
    n_prompt=1,
    n_new=0,
    progress=None,
    **settings,
) -> "Engine":
    """Load this rank's part of a checkpoint; every rank of torchrun calls it alike. See `slim.load`."""
    return start(
        Checkpoint.open(ckpt, device, dtype, schedule, score, **settings), n_prompt, n_new, progress
    )


def start(ckpt: Checkpoint, n_prompt=1, n_new=0, progress=None) -> "Engine":
    """Load this rank's part of a checkpoint; see `slim.start`. Raises ValueError on all ranks if one cannot."""
    ranks = connect()
    recipe = dict(
        ckpt=str(ckpt.folder.resolve()),
        device=ckpt.device.type,
        dtype=dtype_name(ckpt.dtype),
        schedule=ckpt.schedule,
        score=ckpt.rule.name,
        **asdict(ckpt.settings),
    )
    with ranks.command("start", recipe, n_prompt, n_new):
        return start_together(ranks, lambda: ckpt, n_prompt, n_new, progress)


def start_worker(recipe: dict, n_prompt: int, n_new: int) -> "Engine":
    return start_together(connect(), lambda: Checkpoint.open(**recipe), n_prompt, n_new)


def start_together(ranks: Ranks, opened, n_prompt: int, n_new: int, progress=None) -> "Engine":
    part = ranks.together(lambda: split(opened(), ranks))
    ranks.together(lambda: check_memory(part, n_prompt, n_new))
    kinds = partial(KVCache, ranks, part), partial(Model, ranks, part), partial(Engine, ranks)
    return ranks.together(lambda: slim.build(part, n_prompt, n_new, progress, *kinds))


# ---- a rank's part of a checkpoint --------------------------------------------------------


def span(n: int, rank: int, ranks: int) -> slice:
    """Return a rank's part of n things; of KV heads fewer than ranks, the one that it shares."""
    start = n * rank // ranks
    return slice(start, max(start + 1, n * (rank + 1) // ranks))


def counts(c: Config) -> list[int]:
    """Return the numbers of ranks that a model's heads can be cut for."""
    h, g = c.n_heads, c.n_kv_heads
    return [n for n in range(1, h + 1) if h % n == 0 and (g % n == 0 or n % g == 0)]


@dataclass(frozen=True)
class Part(Checkpoint):
    """A rank's part of a checkpoint, which looks like one of a smaller model."""

    full: Checkpoint  # of all ranks
    q: slice  # heads
    kv: slice
    hidden: slice  # of F
    vocab: slice  # of V
    columns: slice  # of C, in aux

    @cached_property
    def weights_hash(self) -> str:
        return self.full.weights_hash

    @property
    def aux_dim(self) -> int:
        return self.columns.stop - self.columns.start

    def pieces(self, name: str) -> tuple[int, list[slice]]:
        """Return along which dimension a tensor is cut, and the pieces of it that this rank has."""
        c, f, (q, kv) = (
            self.full.config,
            self.hidden,
            (by(self.full.config.head_dim, s) for s in (self.q, self.kv)),
        )
        n_q, n_kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
        rows = {"q": [q], "k": [kv], "v": [kv], "gate": [f], "up": [f]}
        rows |= {
            "qkv": [q, after(n_q, kv), after(n_q + n_kv, kv)],
            "gate_up": [f, after(c.hidden_dim, f)],
        }
        rows |= {"embed_tokens": [self.vocab], "lm_head": [self.vocab]}
        kind = name.split(".")[-2].removesuffix("_proj")
        if kind in ("o", "down") and name.endswith(("weight", SCALE)):
            return 1, [q if kind == "o" else f]
        return 0, rows.get(kind, [])


def by(n: int, s: slice) -> slice:
    return slice(n * s.start, n * s.stop)


def after(n: int, s: slice) -> slice:
    return slice(n + s.start, n + s.stop)


@dataclass
class PartFile:
    """An open file of which a rank sees its part alone. The file is mapped, so the rest is not read."""

    file: object
    part: Part | None = None

    def get_tensor(self, name: str) -> Tensor:
        tensor = self.file.get_tensor(name)
        dim, pieces = self.part.pieces(name)
        if name.endswith(SCALE):
            tile = self.part.config.tile[dim]
            pieces = [slice(p.start // tile, -(-p.stop // tile)) for p in pieces]
        pieces = [tensor.narrow(dim, p.start, p.stop - p.start) for p in pieces]
        return torch.cat(pieces, dim) if len(pieces) > 1 else (pieces or [tensor])[0]


def split(ckpt: Checkpoint, ranks: Ranks) -> Part:
    """Return this rank's part of a checkpoint; raise ValueError if it cannot be cut for so many."""
    c, device, (r, n) = ckpt.config, ckpt.device, (ranks.rank, ranks.n)
    if n not in counts(c):
        known = ", ".join(map(str, counts(c)))
        raise ValueError(
            f"{n} ranks cannot share {c.n_heads} heads and {c.n_kv_heads} KV heads; --nproc-per-node can be {known}"
        )
    if n > (least := min(c.hidden_dim, c.vocab_size, c.dim)):
        raise ValueError(
            f"{n} ranks cannot share {least} columns of an FFN, of x or of the vocabulary; start fewer"
        )
    if device.type == "cuda":
        local = env_number("LOCAL_RANK", r, least=0)
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"there are {torch.cuda.device_count()} GPUs here; start one rank for each, not more"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    q, kv, hidden = (span(k, r, n) for k in (c.n_heads, c.n_kv_heads, c.hidden_dim))
    large = c.vocab_size * c.dim * ckpt.dtype.itemsize >= VOCABULARY_BYTES
    vocab = span(c.vocab_size, r, n) if large else slice(0, c.vocab_size)
    check_tiles(c, n, (by(c.head_dim, q), by(c.head_dim, kv), hidden))
    local = replace(
        c,
        n_heads=q.stop - q.start,
        n_kv_heads=kv.stop - kv.start,
        hidden_dim=hidden.stop - hidden.start,
        vocab_size=vocab.stop - vocab.start,
    )
    rule = replace(ckpt.rule, score=joined(ckpt.rule, ranks, c.n_kv_heads))
    fields = vars(ckpt) | dict(config=local, device=device, rule=rule, tensors={})
    fields.pop("weights_hash", None)
    part = Part(
        **fields, full=ckpt, q=q, kv=kv, hidden=hidden, vocab=vocab, columns=span(c.dim, r, n)
    )
    part.tensors.update({name: PartFile(ckpt.tensors[name], part) for name in ckpt.tensors})
    return part


def check_tiles(c: Config, n: int, parts: tuple[slice, slice, slice]) -> None:
    """Raise ValueError if a rank's rows of q, of k and v, or of the FFN end inside a tile of FP8 weights."""
    ends = (c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim, c.hidden_dim)
    for part, end, tile in zip(parts, ends, (c.tile, c.tile[:1], c.tile) if c.tile else ()):
        edges = {part.start, part.stop} - (
            set() if c.fused else {end}
        )  # the end is no cut, unless more follows in it
        if wrong := [e for e in sorted(edges) if any(e % size for size in tile)]:
            raise ValueError(
                f"{n} ranks would cut through the FP8 tiles of {c.tile[0]} x {c.tile[1]} weights, at {wrong[0]}; "
                "start fewer"
            )


def joined(rule: prune.Rule, ranks: Ranks, n_kv_heads: int):
    """Return a rule's function, given this rank's heads: the scores of all ranks' heads, the same on every rank.

    Scores of weights that a maximum joins are left to `Model.score_layer`, which joins those of many layers at once.
    """

    def every(x: Tensor, dim: int, n: int) -> Tensor:
        """Return the heads of all ranks (n), each once."""
        parts = [torch.empty_like(x) for _ in range(ranks.n)]
        ranks.meet(lambda x, group: dist.all_gather(parts, x, group), x)
        return torch.cat(parts[:: max(1, ranks.n // n)], dim)

    def score(*seen) -> Tensor:
        if rule.heads == "max" and rule.sees == "weights":
            return rule.score(*seen)
        if rule.heads == "all":
            heads = [(seen[0].contiguous(), seen[0].shape[1] * ranks.n)]
            if rule.sees == "keys":
                heads.append((seen[1].contiguous(), n_kv_heads))
            dims = [1, 2]
            seen = *(every(x, dim, n) for (x, n), dim in zip(heads, dims)), *seen[len(heads) :]
        scores = rule.score(*seen)
        if not isinstance(scores, Tensor) or not scores.is_floating_point():
            return scores  # the engine says what is wrong with it
        scores = scores.contiguous()
        if rule.heads == "max":
            return ranks.max(scores)
        return ranks.first(ranks.sum(scores) / ranks.n if rule.heads == "mean" else scores)

    return score


# ---- model, cache and engine of a rank ----------------------------------------------------


class Model(model.Model):
    """A model of a rank's heads and columns, whose sums are those of all ranks."""

    def __init__(self, ranks: Ranks, part: Part, *args):
        super().__init__(*args)
        self.ranks, self.part, self.vocab_size = ranks, part, part.full.config.vocab_size
        self.vocab_is_cut = part.config.vocab_size < self.vocab_size

    def add(self, x: Tensor, out: Tensor, w: Tensor) -> None:
        if self.ranks.rank:
            x.zero_()  # rank 0 alone brings what was there
        super().add(x, out, w)
        self.ranks.sum(x)

    def embed(self, ids: Tensor) -> Tensor:
        if not self.vocab_is_cut:
            return super().embed(ids)
        own = (ids >= self.part.vocab.start) & (ids < self.part.vocab.stop)
        x = super().embed((ids - self.part.vocab.start).where(own, 0))
        return self.ranks.sum(x.masked_fill_(~own[:, None], 0))

    def head(self, x: Tensor) -> Tensor:
        logits = super().head(x)
        return (
            self.ranks.assemble(logits, 1, self.part.vocab, self.vocab_size)
            if self.vocab_is_cut
            else logits
        )

    def score_layer(
        self, layer: int, stage, rows, n: int, queries: Tensor, weights, scores: Tensor
    ) -> None:
        """Join the maxima where they count: at the boundary, and in the prompt's step also where the map shows them."""
        super().score_layer(layer, stage, rows, n, queries, weights, scores)
        if self.rule.heads == "max" and (self.kv.length == 0 or layer == stage.layers[-1]):
            self.ranks.max(scores)


class KVCache(kvcache.KVCache):
    """Keys and values of a rank's KV heads, and its columns of pruned rows."""

    def __init__(self, ranks: Ranks, part: Part, n_layers, n_kv_heads, head_dim, dim, *args):
        super().__init__(n_layers, n_kv_heads, head_dim, part.aux_dim, *args)
        self.ranks, self.part, self.c = ranks, part, part.full.config

    def offload(self, stage, x: Tensor, first_row: dict[int, int]) -> None:
        super().offload(stage, x[:, self.part.columns], first_row)

    def restore(self, stage, blocks: list[int]) -> Tensor:
        return self.ranks.assemble(super().restore(stage, blocks), 1, self.part.columns, self.c.dim)

    def place(self, name: str, n_dims: int) -> tuple[int, slice, int] | None:
        """Return along which dimension a saved tensor is cut, this rank's part, and the whole; None if it is not."""
        heads = self.part.kv, self.c.n_kv_heads
        if name.startswith("layer."):
            return 1, *heads  # (2, G, S, D)
        if ".home." in name:
            return 2, *heads  # (layers, 2, G, B, D)
        if ".aux." in name:
            return 1, self.part.columns, self.c.dim  # (B, C)
        return (
            (1, self.part.q, self.c.n_heads) if n_dims == 3 else None
        )  # seen: queries (w, H, D), or scores (w, N)

    def state(self) -> tuple[dict, dict[str, Tensor]]:
        """As of one rank, with all heads and columns; on the others than rank 0 without the tensors."""
        layout, tensors = super().state()
        for name, tensor in tensors.items():
            if place := self.place(name, tensor.ndim):
                dim, where, n = place
                again = (
                    where.start * self.ranks.n // n < self.ranks.rank
                )  # a head that the rank before has too
                part = tensor.narrow(dim, 0, 0) if again and n < self.ranks.n else tensor
                tensor = self.ranks.assemble(part.cpu().contiguous(), dim, where, n)
            tensors[name] = tensor if self.ranks.rank == 0 else None
        return layout, tensors

    def load_state(self, layout: dict, tensor, schedule, room: int = 0) -> None:
        def own(name: str) -> Tensor:
            saved = tensor(name)
            place = self.place(name, saved.ndim)
            return (
                saved
                if place is None
                else saved.narrow(place[0], place[1].start, place[1].stop - place[1].start)
            )

        super().load_state(layout, own, schedule, room)


def commanded(method):
    """Let the workers call the same method as the leader."""

    @functools.wraps(method)
    def call(self, *args, **options):
        with self.ranks.command(method.__name__, self.pending, args, options):
            return method(self, *args, **options)

    return call


class Engine(slim.Engine):
    """A rank's engine. Every rank calls the same methods with the same arguments, or follows rank 0.

    Where ranks agree:
    prefill: whether there is memory, before anything is given up (`check_room`); extend: the same (`lacks`).
    Their step: x and the vocabulary, by sums; the blocks, by maxima or rank 0 (`joined`); logits, as rank 0 has them.
    resume: memory, and that all have read the file. save: whether rank 0 could write all ranks' parts.
    generate: the seed, where it samples. forget, rewind and stats: nowhere, they only follow what was agreed.
    """

    def __init__(self, ranks: Ranks, part: Part, model: Model):
        super().__init__(part, model)
        self.ranks, self.config = ranks, part.full.config

    prefill, extend = commanded(slim.Engine.prefill), commanded(slim.Engine.extend)
    forget, rewind = commanded(slim.Engine.forget), commanded(slim.Engine.rewind)

    @commanded
    def resume(self, path, room: int = 0) -> dict:
        extra = super().resume(path, room)
        self.ranks.gather(None)  # disks differ: the next step begins when all have read it
        return extra

    @commanded
    def save(self, path, extra: dict | None = None) -> None:
        """Write one file of all ranks' parts, by rank 0."""
        ready = self.usable and self.model.rule.name
        write = super().save
        self.ranks.together(
            lambda: write(path, extra) if self.ranks.rank == 0 or not ready else self.kv.state()
        )

    def check_room(self, *args) -> None:
        self.ranks.together(lambda: slim.Engine.check_room(self, *args))

    def lacks(self, n_bytes: int, host: int) -> bool:
        """Say whether any rank lacks what it needs: with an uneven FFN not all need the same."""
        return bool(self.ranks.max(torch.tensor(float(super().lacks(n_bytes, host)))))

    def run(self, ids: list[int], n_logits: int = 1) -> Tensor:
        """Run a step; return rank 0's logits on every rank that may sample from them."""
        logits = super().run(ids, n_logits)
        return logits if self.ranks.role else self.ranks.first(logits)

    def generate(
        self, ids, max_new_tokens: int, temperature=0.0, top_p=1.0, seed=None, *args, **options
    ):
        if seed is None and temperature and not self.ranks.role:
            seed = int(self.ranks.first(torch.randint(2**62, (1,), device=self.kv.device)))
        return super().generate(ids, max_new_tokens, temperature, top_p, seed, *args, **options)

    @property
    def stats(self) -> dict:
        """As of one rank; bytes are this rank's own, of `ranks`."""
        return super().stats | {"ranks": self.ranks.n}
