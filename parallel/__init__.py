"""One model on several GPUs: tensor parallelism under torchrun.

    torchrun --nproc-per-node 4 slim.py --ckpt llama3.3-70b-instruct --prompt file.txt

Each of R ranks has H/R query heads with their KV heads and F/R columns of the FFN, in every layer:
its rows of q, k, v, gate and up, its columns of o and down, its slabs and homes. Each rank adds a
part to the hidden states x (T, C), and the parts are summed (`Model.add`), once after attention and
once after the FFN. So x, and with it every decision, is the same on every rank. The engine and the
cache do not know about ranks: theirs is a model of fewer heads and fewer columns.

- Embedding and head are cut by rows from VOCABULARY_BYTES each: at 2 TB/s a GPU reads 32 MiB in
  17 us, the price of one more call (both assumed). Of Llama 3.3 70B (2 GiB each), 4 ranks save
  3 GiB each and read 1.5 GiB less a token.
- KV heads fewer than ranks are repeated: R must be a multiple of their number, or divide it.
- A rule says how the scores of all heads are found (`prune.Rule.join`). A maximum is exact in any
  order; any other rule gets all heads, and rank 0's scores count. So every choice of blocks is the
  same on every rank, bit for bit.
- aux is cut by columns. Whole on every rank it would take T x C each, for 70B at 128k tokens 2 GiB,
  16 GiB on a host with 8 GPUs, all of it over every GPU's link; cut, it is 2 GiB in all. A block
  that returns is put together in one call for its 64 x C numbers, 1 MiB.
- A saved file holds all heads, so it opens on any number of ranks; on the same number, bit for bit.

A script under torchrun calls `parallel.load` on every rank; with `slim.load` each rank has a whole
engine of its own. Without torchrun nothing here is imported. Shapes as in model.py; R ranks.
"""

import functools
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial

import torch
import torch.distributed as dist
from torch import Tensor

import kvcache
import model
import prune
import slim
from loading.quantised import Matrix
from loading.saved import check_extra
from model import Config
from parallel.ranks import Ranks, print_error
from planning.checkpoint import Checkpoint, dtype_name
from planning.probe import names
from planning.settings import env_number

VOCABULARY_BYTES = 2**25


@functools.cache
def connect() -> Ranks:
    """Connect this process to the other ranks, once."""
    return Ranks()


def main(program) -> int:
    """Run the command line on rank 0, and workers on the other ranks; never returns."""
    try:
        ranks = connect()
        code = ranks.follow(start_worker) if ranks.rank else ranks.lead(program)
    except ValueError as error:
        code = 2
        first = os.environ.get("RANK", "0") == "0"
        if first or not dist.is_torchelastic_launched():  # no other process would print it
            print_error(error)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)  # threads wait for connections, and torch would wait for the threads


def load(*args, n_prompt=1, n_new=0, progress=None, **settings) -> "Engine":
    """Load this rank's part of a checkpoint; every rank calls it alike. See `slim.load`.

    Raises ValueError on every rank if one cannot, if ranks disagree, or without torchrun.
    """
    ckpt = connect().together(lambda: Checkpoint.open(*args, **settings))
    return start(ckpt, n_prompt, n_new, progress)


def start(ckpt: Checkpoint, n_prompt=1, n_new=0, progress=None) -> "Engine":
    """Load this rank's part of a checkpoint that was opened; see `load`."""
    ranks = connect()
    recipe = dict(
        device=ckpt.device.type,
        dtype=dtype_name(ckpt.dtype),
        schedule=ckpt.asked_schedule,
        score=ckpt.asked_rule.name,
        **asdict(ckpt.settings),
    )
    place = str(ckpt.folder.absolute())
    given = (recipe, n_prompt, n_new)
    with ranks.command("start", (place, *given), given):
        return start_together(ranks, lambda: ckpt, n_prompt, n_new, progress)


def start_worker(place: str, recipe: dict, n_prompt: int, n_new: int) -> "Engine":
    return start_together(connect(), lambda: Checkpoint.open(place, **recipe), n_prompt, n_new)


def start_together(ranks: Ranks, opened, n_prompt: int, n_new: int, progress=None) -> "Engine":
    ckpt = ranks.together(opened)
    strengths = ranks.broadcast(ckpt.strengths)[0]  # rank 0's: not every disk has a cache of them
    part = ranks.together(lambda: split(ckpt.with_strengths(strengths), ranks))
    ranks.together(lambda: slim.check_start(part, n_prompt, n_new))
    kinds = partial(KVCache, ranks, part), partial(Model, ranks, part), partial(Engine, ranks)
    engine = ranks.together(lambda: slim.build(part, n_prompt, n_new, progress, *kinds))
    engine.prepare(n_prompt, n_new)
    return engine


# ---- a rank's part of a checkpoint --------------------------------------------------------


def span(n: int, rank: int, n_ranks: int) -> slice:
    """Return a rank's part of n things; of KV heads fewer than ranks, the one that it shares."""
    start = n * rank // n_ranks
    stop = n * (rank + 1) // n_ranks
    return slice(start, max(start + 1, stop))


def scaled(part: slice, n: int) -> slice:
    """Return the rows of a part of heads, n rows each."""
    return slice(n * part.start, n * part.stop)


def shifted(part: slice, n: int) -> slice:
    """Return a part of rows that begin after n others in the same tensor."""
    return slice(n + part.start, n + part.stop)


def length(part: slice) -> int:
    return part.stop - part.start


@dataclass(frozen=True)
class Part(Checkpoint):
    """A rank's part of a checkpoint, which looks like the checkpoint of a smaller model."""

    full: Checkpoint  # of all ranks
    q: slice  # of H heads
    kv: slice  # of G KV heads
    hidden: slice  # of F
    vocab: slice  # of V
    columns: slice  # of C, in aux

    @cached_property
    def weights_hash(self) -> str:
        return self.full.weights_hash

    @property
    def aux_dim(self) -> int:
        return length(self.columns)

    def with_schedule(self, schedule) -> "Part":
        """As of a checkpoint; the rule gets the lookup heads that this rank has."""
        part = super().with_schedule(schedule)
        if part.rule.heads is None or part.rule.heads == self.asked_rule.heads:
            return part
        return replace(part, rule=own_heads(part.rule, self.q))

    def check_heads(self, rule: prune.Rule, budgets: dict) -> None:
        """As of the whole model: a rank alone may have no head that ranks."""
        self.full.check_heads(self.full.asked_rule, budgets)

    @property
    def heads(self) -> list[str]:
        own = self.full.asked_rule.heads
        return names(own) if own is not None else super().heads

    def pieces(self, name: str) -> tuple[int, list[slice]]:
        """Return the dimension along which a tensor is cut, and this rank's pieces; [] for all."""
        config = self.full.config
        q = scaled(self.q, config.head_dim)
        kv = scaled(self.kv, config.head_dim)
        n_q = config.n_heads * config.head_dim
        n_kv = config.n_kv_heads * config.head_dim
        columns = {"o": [q], "down": [self.hidden]}
        rows = {
            "q": [q],
            "k": [kv],
            "v": [kv],
            "qkv": [q, shifted(kv, n_q), shifted(kv, n_q + n_kv)],
            "gate": [self.hidden],
            "up": [self.hidden],
            "gate_up": [self.hidden, shifted(self.hidden, config.hidden_dim)],
            "embed_tokens": [self.vocab],
            "lm_head": [self.vocab],
        }
        kind = name.split(".")[-2].removesuffix("_proj")
        if kind in columns and name.endswith("weight"):
            return 1, columns[kind]
        return 0, rows.get(kind, [])


def own_heads(rule: prune.Rule, q: slice) -> prune.Rule:
    """Return a rule for one rank, with its own heads by their numbers there."""
    heads = []
    for found in rule.heads:
        heads.append(tuple(head - q.start for head in found if q.start <= head < q.stop))
    return replace(rule, heads=tuple(heads))


@dataclass
class PartFile:
    """An open file that shows a rank its part alone; it is mapped, so the rest is not read."""

    file: object
    part: Part

    def get_tensor(self, name: str) -> Tensor:
        tensor = self.file.get_tensor(name)
        dim, pieces = self.part.pieces(name)
        if not pieces:
            return tensor
        if isinstance(tensor, Matrix):
            return tensor.cut(dim, pieces)
        parts = [tensor.narrow(dim, piece.start, length(piece)) for piece in pieces]
        return torch.cat(parts, dim) if len(parts) > 1 else parts[0]


def split(ckpt: Checkpoint, ranks: Ranks) -> Part:
    """Return this rank's part of a checkpoint; raise ValueError if the ranks cannot share it."""
    config = ckpt.config
    check_ranks(config, ranks.n)
    own = partial(span, rank=ranks.rank, n_ranks=ranks.n)
    q = own(config.n_heads)
    kv = own(config.n_kv_heads)
    hidden = own(config.hidden_dim)
    vocab_bytes = config.vocab_size * config.dim * ckpt.dtype.itemsize
    cut = vocab_bytes >= VOCABULARY_BYTES
    vocab = own(config.vocab_size) if cut else slice(0, config.vocab_size)
    smaller = replace(
        config,
        n_heads=length(q),
        n_kv_heads=length(kv),
        hidden_dim=length(hidden),
        vocab_size=length(vocab),
    )
    check_join(ckpt.asked_rule)
    rule = replace(ckpt.asked_rule, score=joined(ckpt.asked_rule, ranks, config.n_kv_heads))
    if rule.heads is not None:
        rule = own_heads(rule, q)
    fields = vars(ckpt) | dict(config=smaller, device=own_device(ckpt.device, ranks.rank))
    fields |= dict(rule=rule, asked_rule=rule, tensors={})
    fields.pop("weights_hash", None)
    columns = own(config.dim)
    part = Part(**fields, full=ckpt, q=q, kv=kv, hidden=hidden, vocab=vocab, columns=columns)
    for name in ckpt.tensors:
        part.tensors[name] = PartFile(ckpt.tensors[name], part)
    part = replace(part, exact=uncut(part))
    return part.with_schedule(ckpt.asked_schedule)


def uncut(part: Part) -> dict[str, int]:
    """Return `Checkpoint.exact` without the tensors whose groups of columns this rank would cut."""
    exact = {}
    for name, group in part.exact.items():
        dim, pieces = part.pieces(name)
        edges = [edge for piece in pieces for edge in (piece.start, piece.stop)]
        if dim == 0 or not any(edge % group for edge in edges):
            exact[name] = group
    return exact


def check_join(rule: prune.Rule) -> None:
    """Raise ValueError for a rule with heads of its own that needs those of all ranks at once.

    A rank without any of a layer's heads would not meet the others.
    """
    if rule.join == "all" and (rule.heads is not None or rule.sees == "lookup"):
        raise ValueError(
            f"rule {rule.name!r:.60} has heads of its own and join 'all'; on several ranks it "
            "needs join='max', a score that is a maximum over heads"
        )


def check_ranks(config: Config, n_ranks: int) -> None:
    """Raise ValueError if a model cannot be cut for n_ranks."""
    heads = config.n_heads
    kv_heads = config.n_kv_heads
    divisors = [n for n in range(1, heads + 1) if heads % n == 0]
    possible = [n for n in divisors if kv_heads % n == 0 or n % kv_heads == 0]
    if n_ranks not in possible:
        raise ValueError(
            f"{n_ranks} ranks cannot share {heads} heads and {kv_heads} KV heads; "
            f"--nproc-per-node can be {', '.join(map(str, possible))}"
        )
    least = min(config.hidden_dim, config.vocab_size, config.dim)
    if n_ranks > least:
        raise ValueError(
            f"{n_ranks} ranks cannot share {least} columns of an FFN, of x or of the vocabulary; "
            "start fewer"
        )


def own_device(device: torch.device, rank: int) -> torch.device:
    """Return the CPU, or this rank's GPU; raise ValueError for another GPU, or if there is none."""
    if device.type != "cuda":
        return device
    number = env_number("LOCAL_RANK", rank, least=0)
    if device.index not in (0, number):
        raise ValueError(
            f"--device '{device}': under torchrun each rank takes the GPU of its own; "
            "use --device cuda"
        )
    n_devices = torch.cuda.device_count()
    if number >= n_devices:
        raise ValueError(f"there are {n_devices} GPUs here; start one rank for each, not more")
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


def joined(rule: prune.Rule, ranks: Ranks, n_kv_heads: int):
    """Return a rule's function for one rank's heads: it gives the same scores on every rank.

    A maximum of weights is left to `Model.join_scores`, which joins those of many layers at once.
    """

    def all_heads(part: Tensor, dim: int, n_heads: int) -> Tensor:
        """Return the heads of all ranks (n_heads along dim), each once."""
        part = part.contiguous()
        parts = [torch.empty_like(part) for _ in range(ranks.n)]
        ranks.meet(lambda part, group: dist.all_gather(parts, part, group), part)
        repeats = max(1, ranks.n // n_heads)  # ranks that share a KV head
        return torch.cat(parts[::repeats], dim)

    def score_maximum(*seen) -> Tensor:
        scores = rule.score(*seen)
        if rule.sees == "weights" or not is_scores(scores):
            return scores
        return ranks.max(scores.contiguous())

    def score_all(seen: Tensor, *rest) -> Tensor:
        seen = all_heads(seen, 1, seen.shape[1] * ranks.n)  # weights (W, H, N, B) or queries
        if rule.sees == "keys":
            keys, *rest = rest
            rest = [all_heads(keys, 2, n_kv_heads), *rest]  # (N, B, G, D)
        scores = rule.score(seen, *rest)
        return ranks.first(scores.contiguous()) if is_scores(scores) else scores

    return score_maximum if rule.join == "max" else score_all


def is_scores(scores) -> bool:
    """Return whether a rule's result can be sent to other ranks; if not, the engine refuses it."""
    return isinstance(scores, Tensor) and scores.is_floating_point()


# ---- model, cache and engine of a rank ----------------------------------------------------


class Model(model.Model):
    """A model of a rank's heads and columns, whose sums are those of all ranks."""

    def __init__(self, ranks: Ranks, part: Part, *args):
        super().__init__(*args)
        self.ranks = ranks
        self.part = part
        self.vocab_size = part.full.config.vocab_size
        self.vocab_is_cut = part.config.vocab_size < self.vocab_size

    def add(self, x: Tensor, out: Tensor, w: Tensor) -> None:
        if self.ranks.rank:
            x.zero_()  # rank 0 alone brings what was there
        super().add(x, out, w)
        self.ranks.sum(x)

    def embed(self, ids: Tensor) -> Tensor:
        if not self.vocab_is_cut:
            return super().embed(ids)
        vocab = self.part.vocab
        own = (ids >= vocab.start) & (ids < vocab.stop)
        x = super().embed((ids - vocab.start).where(own, 0))
        return self.ranks.sum(x.masked_fill_(~own[:, None], 0))

    def head(self, x: Tensor) -> Tensor:
        logits = super().head(x)
        if not self.vocab_is_cut:
            return logits
        return self.ranks.assemble(logits, 1, self.part.vocab, self.vocab_size)

    def join_scores(self, scores: Tensor, at_boundary: bool) -> None:
        """Join the maxima at a boundary; in the prompt's step in every layer, for the map."""
        if self.rule.join == "max" and (at_boundary or self.kv.reading_prompt):
            self.ranks.max(scores)


class KVCache(kvcache.KVCache):
    """Keys and values of a rank's KV heads, and its columns of pruned rows."""

    def __init__(self, ranks: Ranks, part: Part, n_layers, n_kv_heads, head_dim, dim, *args):
        super().__init__(n_layers, n_kv_heads, head_dim, part.aux_dim, *args)
        self.ranks = ranks
        self.part = part
        self.full_config = part.full.config

    def offload(self, stage, x: Tensor, place: dict[int, int]) -> None:
        super().offload(stage, x[:, self.part.columns], place)

    def restore(self, stage, blocks: list[int]) -> Tensor:
        columns = super().restore(stage, blocks)
        return self.ranks.assemble(columns, 1, self.part.columns, self.full_config.dim)

    def cut(self, name: str, n_dims: int) -> tuple[int, slice, int] | None:
        """Return how a saved tensor is cut: dimension, this rank's part, size of the whole."""
        if name.startswith("layer."):  # (2, G, S, D)
            return 1, self.part.kv, self.full_config.n_kv_heads
        if ".home." in name:  # (layers, 2, G, B, D)
            return 2, self.part.kv, self.full_config.n_kv_heads
        if ".aux." in name:  # (B, C)
            return 1, self.part.columns, self.full_config.dim
        if n_dims == 3:  # newest queries (W, H, D)
            return 1, self.part.q, self.full_config.n_heads
        return None  # newest scores (W, N)

    def state(self) -> tuple[dict, dict[str, Tensor]]:
        """Return the state of one rank with all heads and columns; tensors on rank 0 alone."""
        layout, tensors = super().state()
        for name, tensor in tensors.items():
            cut = self.cut(name, tensor.ndim)
            if cut is not None:
                tensor = self.whole(tensor, *cut)
            tensors[name] = tensor if self.ranks.rank == 0 else None
        return layout, tensors

    def whole(self, tensor: Tensor, dim: int, part: slice, n: int) -> Tensor:
        """Return the tensor, n long along dim, of which each rank has a part."""
        n_ranks = self.ranks.n
        first_owner = part.start * n_ranks // n  # ranks that share a KV head all have it
        if n < n_ranks and first_owner < self.ranks.rank:
            tensor = tensor.narrow(dim, 0, 0)
        return self.ranks.assemble(tensor.cpu().contiguous(), dim, part, n)

    def load_state(self, layout: dict, tensor, schedule, room: int = 0) -> None:
        def own(name: str) -> Tensor:
            saved = tensor(name)
            cut = self.cut(name, saved.ndim)
            if cut is None:
                return saved
            dim, part, _ = cut
            return saved.narrow(dim, part.start, length(part))

        super().load_state(layout, own, schedule, room)


def commanded(method, compared=True):
    """Let the workers call the same method; in a script, check that all ranks call it alike.

    compared: the arguments must be the same on every rank; a path may differ where disks do.
    """

    @functools.wraps(method)
    def call(self, *args, **options):
        args = [as_list(value) for value in args]
        options = {key: as_list(value) for key, value in options.items()}
        given = (self.pending, args, options)
        with self.ranks.command(method.__name__, given, given if compared else None):
            return method(self, *args, **options)

    return call


def as_list(value):
    """Return token ids of any kind as a list, which can be sent and compared."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return list(value) if isinstance(value, Iterator) else value


class Engine(slim.Engine):
    """A rank's engine. Every rank makes the same calls with the same arguments, or follows rank 0.

    Where ranks agree:
    - at the start of every call, in a script: on the method and its arguments (`Ranks.command`)
    - prefill, read, read_on, extend, resume: whether all have memory, before anything is given up
    - in a step: x and the vocabulary, by sums; blocks, by maxima or as rank 0 has it (`joined`);
      logits, as rank 0 has them
    - resume: that all have read the file; save: whether rank 0 could write all ranks' parts
    - generate: the seed, where it samples
    """

    def __init__(self, ranks: Ranks, part: Part, model: Model):
        super().__init__(part, model)
        self.ranks = ranks
        self.config = part.full.config

    prefill = commanded(slim.Engine.prefill)
    read = commanded(slim.Engine.read)
    read_on = commanded(slim.Engine.read_on)
    finish = commanded(slim.Engine.finish)
    extend = commanded(slim.Engine.extend)
    accept = commanded(slim.Engine.accept)
    forget = commanded(slim.Engine.forget)
    rewind = commanded(slim.Engine.rewind)

    @partial(commanded, compared=False)
    def resume(self, path, room: int = 0) -> dict:
        extra = super().resume(path, room)
        self.ranks.share_error(None)  # disks differ: the next step begins when all have read it
        return extra

    @partial(commanded, compared=False)
    def save(self, path, extra: dict | None = None) -> None:
        """Write one file of all ranks' parts, by rank 0."""
        self.ranks.together(lambda: check_extra(extra))
        refused = not self.usable or not self.model.rule.name  # by every rank, before it sends
        if not refused:
            self.finish()  # may be a step, which takes all ranks
        write = super().save
        writes = self.ranks.rank == 0 or refused
        self.ranks.together(lambda: write(path, extra) if writes else self.kv.state())

    def measure_heads(self, ids: list[int]) -> Tensor:
        """Return the strengths of all ranks' heads (L, H)."""
        part = self.ckpt
        own = super().measure_heads(ids).to(self.kv.device)
        return self.ranks.assemble(own, 1, part.q, part.full.config.n_heads).cpu()

    def known_strengths(self) -> Tensor | None:
        return self.ranks.broadcast(super().known_strengths())[0]  # not every disk has a cache

    def check_room(self, *args) -> None:
        self.ranks.together(lambda: slim.Engine.check_room(self, *args))

    def check_growth(self, *args, **options) -> None:
        """Ask every rank at every step: some may have to allocate where others need not."""
        self.ranks.together(lambda: slim.Engine.check_growth(self, *args, **options))

    def run(self, *args, **options) -> Tensor:
        """Run a step; return rank 0's logits on every rank that may sample from them."""
        logits = super().run(*args, **options)
        return logits if self.ranks.role else self.ranks.first(logits)

    def generate(
        self, ids, max_new_tokens: int, temperature=0.0, top_p=1.0, seed=None, *args, **options
    ):
        ids = as_list(ids)
        if not self.ranks.role:
            given = (ids, max_new_tokens, temperature, top_p, seed, args, options)
            self.ranks.check_same("generate", given)
            if seed is None and temperature:
                seed = int(self.ranks.first(torch.randint(2**62, (1,), device=self.kv.device)))
        return super().generate(ids, max_new_tokens, temperature, top_p, seed, *args, **options)

    @property
    def stats(self) -> dict:
        """As of one rank; bytes are this rank's own, of `ranks`."""
        return super().stats | {"ranks": self.ranks.n}
