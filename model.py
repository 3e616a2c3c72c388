"""The LLaMA model and its one step, which serves prefill, decode and follow-up.

A step takes new token ids and returns the logits after the last. It goes layer by layer, and chunk
by chunk inside a layer, because a boundary ranks blocks by the queries of the *last* tokens: the
usual loop, each chunk through all layers, could not prune. `x` holds all rows and is updated in
place, so the biggest temporary is one chunk's FFN.

A boundary p stands inside layer p-1, after its attention and before its FFN (SlimInfer, arXiv
2508.06447). There rows leave `x` (pruned) and return to it (revived). Rows are always in ascending
position: first those of prompt blocks, then those of the tail. The first step has rows for every
block; a decoded token has one tail row.

A text may be read before its question is there: a held step ends at the first boundary, and the
first step that is not held goes on from there, with the rows of all tokens (`KVCache.hold`).

Shapes: T rows, S keys, H heads, G KV heads, D head_dim, C dim, F hidden_dim, V vocab, N prompt
blocks, B block_len, W newest tokens that rank the blocks; t rows of a chunk, w newest tokens that
have a row in a stage.
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

import prune
from kvcache import KVCache, Move, Stage
from packed import (
    PIECE,
    Packed,
    add_product,
    linear,
    opened,
    prefers_float32,
    rows_of,
)

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

# Queries that share keys from which half precision is widened first: measured on two cores with
# AVX512-BF16, where 51 take 0.9 and 192 take 0.7 of the time.
MANY_QUERIES = 48
ROWS_OF_A_TASK = 32  # torch's kernel cuts its work into tasks of a KV head and that many rows
LEAST_PART = 1024  # keys: to join parts that are smaller costs more than their threads save
TILE = 256  # positions; a tile's rows share a local window, so that they are one call
LAST_ROWS = 512  # of the prompt, at least, see everything: they rank the blocks


@dataclass(frozen=True)
class Local:
    """Local attention: what most rows of a prompt see in the layers below the first boundary.

    A tile is TILE positions, from a multiple of TILE on, whatever the chunk. Its rows see the first
    `sinks` positions, the `window` positions before the tile, and the tile up to themselves (the
    A-shape of StreamingLLM, arXiv 2309.17453). At least the last `last` rows, and all later tokens,
    see everything; so do the heads that look things up, which are few.
    """

    window: int  # 0: every row sees everything
    sinks: int
    last: int = LAST_ROWS
    heads: tuple[tuple[int, ...], ...] = ()  # by layer, those that see everything; (): none

    def far_heads(self, layer: int) -> tuple[int, ...]:
        return self.heads[layer] if self.heads else ()

    def n_rows(self, n_prompt: int) -> int:
        """Return how many leading rows of a prompt see no more than this."""
        if self.window == 0:
            return 0
        return max(0, (n_prompt - self.last) // TILE * TILE)

    def window_start(self, position: int) -> int:
        """Return the first position in a row's window; 0 if its sinks reach it, so it sees all."""
        start = position // TILE * TILE - self.window
        return start if start > self.sinks else 0

    def first_windowed(self) -> int:
        """Return the first position whose window does not reach the sinks, a multiple of TILE."""
        return (self.window + self.sinks) // TILE * TILE + TILE


FULL = Local(window=0, sinks=0)


@dataclass(frozen=True)
class Config:
    """Shape and constants of a model."""

    model_type: str  # of the family, as in config.json
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    rope_scaling: dict  # {"rope_type": "default", "linear", "llama3", "yarn" or "longrope", ...}
    rotary_dim: int  # leading dims of a head that RoPE turns
    max_len: int  # trained context
    tied: bool  # the embedding is the LM head too
    dtype: torch.dtype  # of the checkpoint
    # what a family adds to a layer
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False  # an RMSNorm over each head's query and key, before RoPE
    fused: bool = False  # q, k, v are one tensor in the checkpoint, and gate and up another
    no_rope: tuple[int, ...] = ()  # layers without RoPE
    scheme: object = None  # how its matrices are quantised: a loading.quantised.Scheme


@dataclass
class Layer:
    """Weights of one layer; q, k, v are one matrix, so are gate and up."""

    attn_norm: Tensor  # (C,)
    wqkv: Tensor | Packed  # (H*D + 2*G*D, C)
    bqkv: Tensor | None  # (H*D + 2*G*D,)
    q_norm: Tensor | None  # (D,)
    k_norm: Tensor | None  # (D,)
    wo: Tensor | Packed  # (C, H*D)
    bo: Tensor | None  # (C,)
    ffn_norm: Tensor  # (C,)
    w_gate_up: Tensor | Packed  # (2*F, C)
    w_down: Tensor | Packed  # (C, F)


@dataclass
class Weights:
    embed: Tensor | Packed  # (V, C)
    layers: list[Layer]
    norm: Tensor  # (C,)
    head: Tensor | Packed  # (V, C), the embedding itself when tied
    inv_freq: Tensor  # (2, R/2) of RoPE in float32: for short and for long prompts


@dataclass
class Rows:
    """Where the rows of x stand in the text, and their keys in the slabs of one stage."""

    stage: Stage
    pos: Tensor  # (T,)
    cos: Tensor  # (T, 1, R), R dims that RoPE turns
    sin: Tensor
    query_scale: Tensor | None  # (T, 1, 1), by position, if the family has one
    slab_rows: Tensor  # (T,) where their keys go
    keys_before: int  # row i, unless revived, sees the first keys_before + i + 1 keys of the slab
    n_revived: int  # leading rows that are revived: the slab holds later keys than theirs
    in_order: Tensor | None  # slots up to the last revived block's, in the order of their blocks
    places: list[int]  # where the revived blocks are among these
    newest: Tensor  # which of the W newest tokens have a row here; pruning may have removed some
    n_local: int  # leading rows whose attention is local; only below the first boundary


class Model:
    """Weights, KV and the step; `rule` ranks the blocks.

    Hooks watch a step:
    - on_chunk(layer, n_rows): its progress, before each chunk of a layer
    - on_queries(layer, queries): the newest queries (w, H, D) of each layer
    - on_scores(layer, scores): what the newest tokens give the prompt's blocks so far, (W, N)
    - on_select(i, candidates, scores, active): each choice of stage i's blocks, before it takes
      effect, with scores (N,) in the candidates' order
    - on_accept(): a drafted token that becomes part of the conversation
    """

    def __init__(
        self,
        config: Config,
        weights: Weights,
        kv: KVCache,
        rule: prune.Rule,
        unit_len: int,
        window: int,
        gamma: float,
        chunk: int,
        local: Local,
    ):
        self.config = config
        self.weights = weights
        self.kv = kv
        self.rule = rule
        self.unit_len = unit_len
        self.window = window
        self.gamma = gamma
        self.chunk = chunk
        self.local = local
        self.wide = torch.promote_types(kv.dtype, torch.float32)  # of scores, RoPE and logits
        self.on_chunk = lambda layer, n_rows: None
        self.on_queries = lambda layer, queries: None
        self.on_scores = lambda layer, scores: None
        self.on_select = lambda stage, candidates, scores, active: None
        self.on_accept = lambda: None

    @torch.inference_mode()
    def step(
        self,
        ids: Tensor,
        n_logits: int = 1,
        n_drafted: int = 0,
        n_again: int = 0,
        hold: bool = False,
    ) -> Tensor:
        """Run new token ids (T,) after what the KV has; return the last logits (n_logits, V).

        Prefill when the KV is empty, else decode or follow-up. Mutates the KV; `KVCache.make_room`
        comes before. The last n_drafted ids are guesses: they choose no blocks, and are no part of
        the conversation until `accept` takes them, one by one. hold: end at the first boundary,
        choose no blocks, return the last hidden state (1, C) instead. The first n_again ids are
        held already, and run again because they are among the tokens that rank the blocks.
        """
        kv = self.kv
        start = kv.n_tokens - n_again
        end = start + len(ids)
        first_tail = start
        blocks = []  # with rows in x, ascending
        if start == 0:
            first_tail = kv.tail_start
            blocks = list(kv.stages[0].slots)
        x = self.embed(ids.to(kv.device))  # (T, C)
        n_newest = min(self.window + n_drafted, len(ids))
        ranking = RANKINGS[self.rule.sees](self, n_newest, n_drafted)
        for i, stage in enumerate(kv.stages):
            rows = self.locate(stage, blocks, first_tail, end, n_newest)
            kv.local_rows += rows.n_local
            below_top = i + 1 < len(kv.stages)
            for layer in stage.layers:
                queries = self.attention(layer, x, rows)
                self.on_queries(layer, queries)
                if below_top and not hold:
                    ranking.see(layer, stage, rows, queries)
                move = None
                if below_top and layer == stage.layers[-1]:
                    if hold:
                        kv.hold(x)
                        return x[-1:]
                    if kv.held is not None:
                        x, blocks, move = self.first_boundary(x[n_again:], ranking)
                        first_tail = kv.tail_start  # the text's own tail joins the new rows
                    else:
                        x, blocks, move = self.boundary(i + 1, x, blocks, ranking)
                self.ffn(layer, x)
                if move is not None:
                    kv.copy(move)  # after the FFN, which hides the copies
        kv.length = end - n_drafted
        x = F.rms_norm(x[-n_logits:], (self.config.dim,), self.weights.norm, self.config.norm_eps)
        return self.head(x).to(self.wide)  # (n_logits, V)

    @torch.inference_mode()
    def accept(self) -> None:
        """Make the first drafted token of the last step part of the conversation."""
        self.kv.accept(self.window)
        self.on_accept()

    def locate(
        self, stage: Stage, blocks: list[int], first_tail: int, end: int, n_newest: int
    ) -> Rows:
        """Say where rows stand: those of prompt blocks, then of positions first_tail..end-1.

        slab      | slots, in any order | tail: tail_start ..  first_tail .. end-1 |
        slab row    0                     tail_row             the first new row
        """
        kv = self.kv
        slot_of = {block: slot for slot, block in enumerate(stage.slots)}
        tail = torch.arange(first_tail, end, device=kv.device)  # positions
        tail_row = stage.n_slots * kv.block_len
        in_slots = kv.block_rows([slot_of[block] for block in blocks])
        pos = torch.cat([kv.block_rows(blocks), tail])  # a block's rows are its positions
        cos, sin, query_scale = self.rope(pos)

        n_block_rows = len(blocks) * kv.block_len
        n_revived = 0 if kv.reading_prompt else n_block_rows
        in_order = None
        places = []
        if n_revived:
            up_to_last = sorted(block for block in stage.slots if block <= blocks[-1])
            in_order = kv.upload([slot_of[block] for block in up_to_last])
            places = [up_to_last.index(block) for block in blocks]

        def has_row(position: int) -> bool:
            return position >= kv.tail_start or position // kv.block_len in slot_of

        # The first tail row sees all slots and the tail up to itself. In the prompt's step the rows
        # of blocks stand before it in x and in the slab alike, so this is 0.
        keys_before = tail_row + first_tail - kv.tail_start - n_block_rows
        newest = [i for i in range(n_newest) if has_row(end - n_newest + i)]
        return Rows(
            stage=stage,
            pos=pos,
            cos=cos,
            sin=sin,
            query_scale=query_scale,
            slab_rows=torch.cat([in_slots, tail - kv.tail_start + tail_row]),
            keys_before=keys_before,
            n_revived=n_revived,
            in_order=in_order,
            places=places,
            newest=kv.upload(newest),
            n_local=self.local_rows(stage),
        )

    def local_rows(self, stage: Stage) -> int:
        """Return how many leading rows have local attention: of a prompt that is being pruned."""
        kv = self.kv
        is_first_of_several = stage is kv.stages[0] and len(kv.stages) > 1
        if kv.n_tokens == 0 and is_first_of_several:
            return self.local.n_rows(kv.n_prompt)
        return 0

    def rope(self, pos: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return cos and sin (T, 1, R) for `rotate` and the queries' scale (T, 1, 1), if any.

        Computed in float32 even for a float64 run, as the reference implementations do.
        """
        scaling = self.config.rope_scaling
        original = scaling.get("original_max_position_embeddings", 0)
        inv_freq = self.weights.inv_freq[int(self.kv.planned > original)]
        angles = pos[:, None, None].float() * inv_freq  # (T, 1, R/2)
        factor = scaling.get("attention_factor", 1.0)
        cos = (angles.cos() * factor).to(self.wide)
        sin = (angles.sin() * factor).to(self.wide)
        cos = torch.cat([cos, cos], dim=-1)
        sin = torch.cat([-sin, sin], dim=-1)
        if "llama_4_scaling_beta" not in scaling:
            return cos, sin, None
        times = (pos[:, None, None].float() / original).floor()  # (T, 1, 1)
        query_scale = 1 + scaling["llama_4_scaling_beta"] * torch.log(1 + times)
        return cos, sin, query_scale.to(self.wide)

    def attention(self, layer: int, x: Tensor, rows: Rows) -> Tensor:
        """Add attention to x (T, C) in place, chunk by chunk, appending keys and values.

        Returns the queries (w, H, D) of the newest tokens that have a row here.
        """
        self.kv.wait(layer)
        parts = list(chunks(rows.n_revived, len(x), self.chunk))
        w = self.opened_once(self.weights.layers[layer], len(x), len(parts), "wqkv", "wo")
        n_newest = len(rows.newest)
        newest = x.new_empty(0, self.config.n_heads, self.config.head_dim)
        for start, stop, revived in parts:
            q = self.attend(layer, w, x, rows, start, stop, revived)
            if not revived:
                newest = torch.cat([newest, q[-n_newest:]])[-n_newest:]
        return newest

    def attend(
        self, layer: int, w: Layer, x: Tensor, rows: Rows, start: int, stop: int, revived: bool
    ) -> Tensor:
        """Add attention to rows start..stop-1 of x in place; return their queries (t, H, D)."""
        part = x[start:stop]  # (t, C)
        q, kv = self.project(layer, w, part, rows, start, stop)
        self.kv.append(layer, rows.slab_rows[start:stop], kv)
        self.on_chunk(layer, stop - start)
        if revived:
            out = self.attend_revived(layer, q, rows, start)
        else:
            out = self.attend_in_slab(layer, q, rows, start)
        self.add(part, out, w.wo)
        if w.bo is not None:
            part.add_(w.bo)
        return q

    def attend_in_slab(self, layer: int, q: Tensor, rows: Rows, start: int) -> Tensor:
        """Attend q (t, H, D), from row `start` on, to the slab up to themselves: (t, H*D)."""
        stop = start + len(q)
        keys, values = self.kv.read(layer, rows.keys_before + stop)  # (S, G, D)
        if start < rows.n_local:  # here a row's place in x and in the slab is its position
            heads = self.local.far_heads(layer)
            return local_attention(q, keys, values, rows.n_local, self.local, heads)
        if len(q) == 1:
            return row_attention(q, keys, values)
        return causal_attention(q, keys, values)

    def attend_revived(self, layer: int, q: Tensor, rows: Rows, start: int) -> Tensor:
        """Attend q (t, H, D) of revived rows, from row `start` on, to all up to themselves.

        Slots hold blocks in any order. In the order of their blocks, what a block's rows see is a
        run of keys that ends with their own. Returns (t, H*D).
        """
        dtype = q.dtype
        block_len = self.kv.block_len
        stop = start + len(q)
        last = rows.places[(stop - 1) // block_len]
        keys, values = self.kv.gather(layer, rows.stage, rows.in_order[: last + 1])  # (S, G, D)
        # a block's rows are few, but keys are widened once for all blocks
        if prefers_float32(q.device.type, dtype):
            q, keys, values = q.float(), keys.float(), values.float()
        out = []
        for i, place in enumerate(rows.places):
            first_row = max(start, i * block_len)
            end_row = min(stop, (i + 1) * block_len)
            if first_row < end_row:
                n_keys = place * block_len + end_row - i * block_len
                own = q[first_row - start : end_row - start]
                out.append(causal_attention(own, keys[:n_keys], values[:n_keys]))
        return torch.cat(out).to(dtype)

    def project(
        self, layer: int, w: Layer, x: Tensor, rows: Rows, start: int, stop: int
    ) -> tuple[Tensor, Tensor]:
        """Return q (t, H, D), and keys and values (t, 2, G, D), of rows x (t, C), start..stop-1."""
        c = self.config
        qkv = linear(F.rms_norm(x, (c.dim,), w.attn_norm, c.norm_eps), w.wqkv, w.bqkv)
        qkv = qkv.view(len(x), -1, c.head_dim)  # (t, H + 2G, D)
        q = qkv[:, : c.n_heads]
        kv = qkv[:, c.n_heads :].unflatten(1, (2, c.n_kv_heads))
        if w.q_norm is not None:
            k = kv[:, 0]
            q.copy_(F.rms_norm(q, (c.head_dim,), w.q_norm, c.norm_eps))
            k.copy_(F.rms_norm(k, (c.head_dim,), w.k_norm, c.norm_eps))
        if layer not in c.no_rope:
            rotate(qkv[:, : c.n_heads + c.n_kv_heads], rows.cos[start:stop], rows.sin[start:stop])
        if rows.query_scale is not None:
            q = (q * rows.query_scale[start:stop]).to(q.dtype)
        return q, kv

    def opened_once(self, w: Layer, n_rows: int, n_chunks: int, *matrices: str) -> Layer:
        """Return a layer whose matrices of these names are opened for all chunks of n_rows.

        For a single chunk, the product opens its matrix itself.
        """
        if n_chunks == 1:
            return w
        once = {name: opened(getattr(w, name), n_rows, self.chunk) for name in matrices}
        return replace(w, **once)

    def ffn(self, layer: int, x: Tensor) -> None:
        """Add the SwiGLU feed-forward to x (T, C) in place, chunk by chunk."""
        parts = x.split(self.chunk)
        w = self.opened_once(self.weights.layers[layer], len(x), len(parts), "w_gate_up", "w_down")
        for part in parts:
            self.add(part, self.ffn_inner(w, part), w.w_down)

    def ffn_inner(self, w: Layer, x: Tensor) -> Tensor:
        """Return the FFN's inner states (t, F) of rows x (t, C)."""
        x = F.rms_norm(x, (self.config.dim,), w.ffn_norm, self.config.norm_eps)
        gate, up = linear(x, w.w_gate_up).chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    # ---- what `parallel` overrides: sums over heads and FFN columns, and a cut vocabulary ------

    def embed(self, ids: Tensor) -> Tensor:
        return rows_of(self.weights.embed, ids)

    def head(self, x: Tensor) -> Tensor:
        return linear(x, self.weights.head)

    def add(self, x: Tensor, out: Tensor, w: Tensor | Packed) -> None:
        """Add out (t, K) times w (C, K) to x (t, C) in place."""
        add_product(x, out, w)

    def join_scores(self, scores: Tensor, at_boundary: bool) -> None:
        """Make scores (W, N+1) the maximum over all ranks' heads; one rank has it already."""

    # ---- a boundary ---------------------------------------------------------------------

    def first_boundary(
        self, x: Tensor, ranking: "Ranking"
    ) -> tuple[Tensor, list[int], Move | None]:
        """Choose blocks for a text that waited; returns as `boundary`, new rows x (T, C) last.

        The text's rows are pruned before the others join them, so that they are in memory once.
        """
        kv = self.kv
        kept, blocks, move = self.boundary(1, kv.held, list(kv.stages[0].slots), ranking)
        x = torch.cat([kept, kv.held_tail, x])
        kv.held = None
        kv.held_tail = None
        return x, blocks, move

    def boundary(
        self, upper: int, x: Tensor, blocks: list[int], ranking: "Ranking"
    ) -> tuple[Tensor, list[int], Move | None]:
        """Choose the blocks of the stage above, `upper`; move rows out of and into x (T, C).

        Returns the new x, its prompt blocks, and the copies of keys and values to do later.
        """
        kv = self.kv
        stage = kv.stages[upper]
        active = self.choose(upper, ranking)

        # rows return: active blocks without keys here. First, so they need not wait for copies
        revived = sorted(active - stage.has_keys() - set(blocks))
        returned = kv.restore(stage, revived) if revived else x[:0]

        # rows leave: those of blocks that are not active go to aux
        pruned = {block: j for j, block in enumerate(blocks) if block not in active}
        kv.offload(stage, x, pruned)
        move = kv.activate(stage, active)
        if not pruned and not revived:
            return x, blocks, move

        # x has the rows of all of `together`, then of the tail
        together = revived + blocks
        place = {block: j for j, block in enumerate(together)}
        blocks = sorted(block for block in together if block not in pruned)
        if revived:
            x = torch.cat([returned, x])
        tail = torch.arange(len(together) * kv.block_len, len(x), device=kv.device)
        order = torch.cat([kv.block_rows([place[block] for block in blocks]), tail])
        return x[order], blocks, move

    def choose(self, upper: int, ranking: "Ranking") -> set[int]:
        """Return the blocks to be active in stage `upper`.

        The new choice, or those active now if the two overlap enough (gamma).
        """
        kv = self.kv
        below = kv.stages[upper - 1]
        stage = kv.stages[upper]
        scores = prune.check_scores(ranking.rank(below, stage), len(below.slots))
        n_blocks = kv.tail_start // kv.block_len
        oldest = n_blocks - prune.recent_blocks(self.rule, stage.n_slots)  # of those that stay
        scores = scores.masked_fill(torch.tensor(below.slots) >= oldest, torch.inf)
        lacking = None
        if not kv.reading_prompt:
            has_keys = stage.has_keys()
            lacking = torch.tensor([block not in has_keys for block in below.slots])
        n_new = ranking.n_newest
        new = set(prune.select(scores, below.slots, stage.n_slots, lacking, self.rule, n_new))
        last = {n_blocks}  # always active, so it counts in the overlap
        active = set(stage.slots)
        if active and prune.overlap(new | last, active | last) >= self.gamma:
            new = active
        self.on_select(upper, below.slots, scores, new)
        return new


# ---- ranking ----------------------------------------------------------------------------


class Ranking:
    """What the prompt's blocks are worth to the newest tokens of one step.

    The step shows it every layer below the last boundary (`see`), and each boundary asks it for the
    scores of its candidates (`rank`). A stage keeps what earlier tokens left (`Stage.remember`).
    """

    def __init__(self, model: Model, n_newest: int, n_drafted: int):
        self.model = model
        self.rule = model.rule
        self.n_newest = n_newest - n_drafted  # that choose
        self.n_drafted = n_drafted  # that do not count yet

    def see(self, layer: int, stage: Stage, rows: Rows, queries: Tensor) -> None:
        """Look at a layer: its newest queries (w, H, D)."""
        raise NotImplementedError

    def rank(self, below: Stage, stage: Stage) -> Tensor:
        """Return the scores (N,) of the blocks active below, for a stage's boundary."""
        raise NotImplementedError


class WeightRanking(Ranking):
    """The maximum over layers of what a rule makes of the newest tokens' attention weights.

    A block that a stage does not hold keeps its score from lower layers.
    """

    def __init__(self, model: Model, n_newest: int, n_drafted: int):
        super().__init__(model, n_newest, n_drafted)
        n_blocks = model.kv.stages[0].n_slots
        shape = n_newest, n_blocks + 1  # column N: what the last finds for the next, never read
        self.padded = torch.full(shape, -torch.inf, dtype=model.wide, device=model.kv.device)
        self.scores = self.padded[:, :n_blocks]  # (W, N)

    def see(self, layer: int, stage: Stage, rows: Rows, queries: Tensor) -> None:
        """Let the rule score what it is given; raise ValueError for a result of another shape."""
        at_boundary = layer == stage.layers[-1]
        if not self.rule.every_layer:
            if not at_boundary:
                return
            self.padded.fill_(-torch.inf)
        heads = range(queries.shape[1]) if self.rule.heads is None else self.rule.heads[layer]
        if len(heads):
            parts = self.block_weights(layer, stage, rows, queries, heads)
            for newest, of_blocks in parts:
                self.score(newest, stage.blocks, of_blocks)
        self.model.join_scores(self.padded, at_boundary)
        self.model.on_scores(layer, self.scores)

    def score(self, newest: Tensor, blocks: Tensor, of_blocks: Tensor) -> None:
        """Let the rule score blocks (N,) by the weights (t, H, N, B) of some newest tokens (t,)."""
        self.keep_maximum(newest, blocks, check_scores(self.rule.score(of_blocks), of_blocks))

    def keep_maximum(self, newest: Tensor, blocks: Tensor, scores: Tensor) -> None:
        where = newest[:, None], blocks
        self.padded[where] = torch.maximum(self.padded[where], scores.to(self.padded.dtype))

    def block_weights(self, layer: int, stage: Stage, rows: Rows, queries: Tensor, heads):
        """Yield few of the newest tokens (t,) at a time, and their weights (t, heads, N, B)."""
        kv = self.model.kv
        n_keys = rows.keys_before + len(rows.pos)
        n_in_slots = stage.n_slots * kv.block_len
        keys, _ = kv.read(layer, n_keys)  # (S, G, D)
        few = rows_at_once(len(heads), n_keys)
        for start in range(0, len(queries), few):
            part = queries[start : start + few]
            seen = n_keys - len(queries) + start + len(part)  # keys up to the last of these rows
            of_keys = weights_of_heads(part, keys[:seen], heads)  # (t, heads, seen)
            # a slot that holds none of these keys has no weight: pad with zeros
            of_slots = F.pad(of_keys, (0, max(0, n_in_slots - seen)))[..., :n_in_slots]
            shape = len(part), -1, stage.n_slots, kv.block_len
            yield rows.newest[start : start + few], of_slots.reshape(shape)
            del of_keys, of_slots  # the largest temporaries: gone before the next rows' come

    def rank(self, below: Stage, stage: Stage) -> Tensor:
        stage.remember(self.scores, self.model.window, self.n_drafted)
        return stage.newest.amax(0)[below.blocks]


class LookupRanking(WeightRanking):
    """As `WeightRanking`, by the lookup heads alone, with what they find for the next block."""

    def score(self, newest: Tensor, blocks: Tensor, of_blocks: Tensor) -> None:
        results = self.rule.score(of_blocks)
        if not isinstance(results, tuple) or len(results) != 2:
            raise ValueError(
                f"rule {self.rule.name!r:.60} returned {describe(results)}; a rule that sees "
                "'lookup' must return two tensors of scores"
            )
        own, of_next = results
        self.keep_maximum(newest, blocks, check_scores(own, of_blocks))
        self.keep_maximum(newest, blocks + 1, check_scores(of_next, of_blocks))


class KeyRanking(Ranking):
    """What a rule makes of the newest queries and the candidates' keys in the boundary's layer."""

    def see(self, layer: int, stage: Stage, rows: Rows, queries: Tensor) -> None:
        self.queries = queries

    def rank(self, below: Stage, stage: Stage) -> Tensor:
        stage.remember(self.queries, self.model.window, self.n_drafted)
        keys, _ = self.model.kv.slot_rows(below, below.layers[-1])  # (G, N, B, D)
        keys = keys.permute(1, 2, 0, 3)  # (N, B, G, D)
        return self.rule.score(stage.newest, keys, below.blocks, self.model.unit_len)


RANKINGS = {
    "weights": WeightRanking,
    "lookup": LookupRanking,
    "keys": KeyRanking,
}  # by what a rule sees


def describe(value) -> str:
    """Say in a line what a rule returned."""
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    return f"{value!r:.60}"


def check_scores(scores, weights: Tensor) -> Tensor:
    """Return a rule's scores; raise ValueError unless there is one for each query and block."""
    shape = weights.shape[0], weights.shape[2]
    is_tensor = isinstance(scores, Tensor)
    if not is_tensor or scores.shape != shape or not scores.is_floating_point():
        raise ValueError(
            f"the scoring function returned {describe(scores)}; of weights {tuple(weights.shape)} "
            f"it must return floating-point scores {shape}, one per query and block"
        )
    return scores


def chunks(n_revived: int, n_rows: int, chunk: int):
    """Yield (start, stop, revived) of at most `chunk` rows; revived rows come by themselves."""
    for start in range(0, n_revived, chunk):
        yield start, min(start + chunk, n_revived), True
    for start in range(n_revived, n_rows, chunk):
        yield start, min(start + chunk, n_rows), False


# ---- rotary position embedding ----------------------------------------------------------


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Apply RoPE in split-half layout to the leading R dims of x (T, heads, D), in place.

    cos and sin: (T, 1, R), the sines of the first half negative.
    """
    n_dims = cos.shape[-1]
    part = x[..., :n_dims]
    before = part.to(cos.dtype)
    swapped = before.roll(n_dims // 2, -1)
    part.copy_(before.mul(cos).addcmul_(swapped, sin))


# ---- attention: of rows near or far, of a run of newest rows, of one row ------------------
#
# Functions named *_attention take q (t, H, D) and keys (S, G, D); those named attend_* take them as
# the kernels do, (n, m, t, D) and (n, 1, S, D): n KV heads or tiles, m query heads of a KV head.


def local_attention(
    q: Tensor, k: Tensor, v: Tensor, n_local: int, local: Local, far_heads=()
) -> Tensor:
    """Attend q (t, H, D), the newest t of S positions, to k and v (S, G, D) as `local` says.

    Rows from position n_local on, a multiple of TILE, see everything, and so do far_heads. Returns
    (t, H*D).
    """
    n_older = len(k) - len(q)
    out = q.new_empty(q.shape)
    for start, stop, n_tiles in runs(n_older, len(k), n_local, local):
        rows = slice(start - n_older, stop - n_older)
        if n_tiles:
            tile_attention(out[rows], q[rows], k, v, start, n_tiles, local)
        else:
            out[rows] = causal_attention(q[rows], k[:stop], v[:stop]).view_as(q[rows])
    group = q.shape[1] // k.shape[1]
    for head in far_heads:
        one = slice(head, head + 1)
        its = slice(head // group, head // group + 1)  # KV head
        out[:, one] = causal_attention(q[:, one], k[:, its], v[:, its]).view(len(q), 1, -1)
    return out.flatten(1)


def runs(start: int, stop: int, n_local: int, local: Local):
    """Cut positions start..stop-1 into runs (begin, end, n_tiles), each of them one call.

    n_tiles: equal tiles, or the part of one, whose rows see a window; 0: rows that see everything,
    at the prompt's beginning and from n_local on.
    """
    windowed = min(local.first_windowed(), n_local)
    # whole tiles: from position first to last
    first = min(math.ceil(max(start, windowed) / TILE) * TILE, n_local)
    last = max(first, min(stop, n_local) // TILE * TILE)
    cuts = (start, windowed, first, last, n_local, stop)
    for begin, end in pairwise(sorted({min(max(cut, start), stop) for cut in cuts})):
        is_local = windowed <= begin < n_local
        yield begin, end, math.ceil((end - begin) / TILE) if is_local else 0


def tile_attention(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, start: int, n_tiles: int, local: Local
) -> None:
    """Attend q (t, H, D), the rows of n_tiles equal tiles from position `start` on, into out.

    What a tile sees is put together, as causal attention to the end of it is the same as to a run
    of keys. The tiles of a KV head are one call's batch. Their window must not reach the sinks.
    """
    group = q.shape[1] // k.shape[1]
    for kv_head in range(k.shape[1]):
        heads = slice(kv_head * group, (kv_head + 1) * group)
        own = q[:, heads].unflatten(0, (n_tiles, -1)).transpose(1, 2)  # (n_tiles, H/G, t, D)
        n_rows = own.shape[2]
        seen_k = seen_by_tiles(k[:, kv_head], start, n_tiles, n_rows, local)
        seen_v = seen_by_tiles(v[:, kv_head], start, n_tiles, n_rows, local)
        attended = attend_causally(own, seen_k, seen_v)
        out[:, heads].unflatten(0, (n_tiles, -1)).copy_(attended.transpose(1, 2))


def seen_by_tiles(x: Tensor, start: int, n_tiles: int, n_rows: int, local: Local) -> Tensor:
    """Copy what each tile sees of a KV head's keys or values x (S, D): (n_tiles, 1, seen, D)."""
    first = local.window_start(start)
    n_near = start + n_rows - first
    near = x[first : first + (n_tiles - 1) * TILE + n_near].unfold(0, n_near, TILE)
    near = near.transpose(1, 2)  # (n_tiles, n_near, D)
    sinks = x[: local.sinks].expand(n_tiles, -1, -1)
    return torch.cat([sinks, near], dim=1)[:, None]


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend q (t, H, D), the newest t of S positions, causally to k and v (S, G, D): (t, H*D)."""
    return by_row(attend_causally(*by_group(q, k, v)))


def attend_causally(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend q (n, m, t, D), the newest t of S positions, causally to k and v (n, 1, S, D).

    Returns (n, m, t, D), of m query heads that share a KV head.
    """
    if q.is_cuda:
        return attend_on_cuda(q, k, v)
    n_sharing = q.shape[1] * q.shape[2]
    if n_sharing >= MANY_QUERIES and prefers_float32(q.device.type, q.dtype):
        return attend_in_float32(q, k, v)
    return attend_on_cpu(q, k, v)


def attend_on_cuda(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Let the flash or memory-efficient kernel apply its own lower-right mask: no mask tensor.

    KV heads are the batch and their query heads share the keys as a view, because the
    memory-efficient kernel, which float32 needs, has no grouped-query attention.
    """
    # imported here, because a CPU run would wait 1.7 s for it
    from torch.nn.attention.bias import causal_lower_right

    mask = causal_lower_right(q.shape[2], k.shape[2])
    return F.scaled_dot_product_attention(q, *shared(q, k, v), attn_mask=mask)


def attend_on_cpu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend to older keys without a mask and to the rows' own keys causally; join the two.

    One call would need a mask tensor and keys repeated for every head: 1.2 to 3 times slower. The
    private operator is called because the public function does not return the log-sum-exp that the
    join needs.
    """
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    n_older = k.shape[2] - q.shape[2]
    own_k, own_v = shared(q, k[:, :, n_older:], v[:, :, n_older:])
    out, own_lse = flash(q, own_k, own_v, 0.0, is_causal=True)
    if n_older:
        # without a mask, the heads of a KV head are rows of one call: few rows read keys once
        rows = q.flatten(1, 2)[:, None]  # (n, 1, m*t, D)
        older, older_lse = attend_to_all(rows, k[:, :, :n_older], v[:, :, :n_older])
        older = older.view_as(out)
        older_lse = older_lse.logsumexp(1).view_as(own_lse)
        share = torch.sigmoid(older_lse - own_lse)[..., None]  # of the weight that older keys get
        wide = share.dtype  # joined in half precision, the error would be five times as large
        out = out.to(wide).lerp(older.to(wide), share).to(q.dtype)
    return out


def attend_in_float32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend as `attend_on_cpu`, some KV heads widened at a time: 1.1 to 1.5 times as fast."""
    out = torch.empty_like(q)
    few = max(1, PIECE // k[0].numel())
    parts = (tensor.split(few) for tensor in (out, q, k, v))
    for part, *qkv in zip(*parts):
        part.copy_(attend_on_cpu(*(tensor.float() for tensor in qkv)))
    return out


def row_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend one newest q (1, H, D) to all of k and v (S, G, D): (1, H*D).

    The query heads of a KV head are the kernel's rows, so that they read its keys once.
    """
    _, n_kv_heads, head_dim = k.shape
    rows = q.view(n_kv_heads, 1, -1, head_dim)
    k = k.transpose(0, 1)[:, None]  # (G, 1, S, D)
    v = v.transpose(0, 1)[:, None]
    if q.is_cuda:
        out = F.scaled_dot_product_attention(rows, k, v)
    else:
        out, _ = attend_to_all(rows, k, v)
    return out.to(q.dtype).view(1, -1)


def attend_to_all(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attend q (n, 1, R, D) to all of k and v (n, 1, S, D) on a CPU.

    Returns (n, 1, R, D), perhaps in float32, and the log-sum-exp (n, p, R) of the logits of each of
    p parts. Few rows are few tasks, so keys are cut until every thread gets as many.
    """
    n_threads = torch.get_num_threads()
    n_tasks = len(q) * math.ceil(q.shape[2] / ROWS_OF_A_TASK)
    n_parts = min(n_threads // math.gcd(n_threads, n_tasks), k.shape[2] // LEAST_PART)
    if n_parts > 1 and n_tasks < 4 * n_threads:
        return attend_to_parts(q, k, v, n_parts)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)


def attend_to_parts(q: Tensor, k: Tensor, v: Tensor, n_parts: int) -> tuple[Tensor, Tensor]:
    """Attend as `attend_to_all`, to equal parts of the keys and what is left; join the results."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    n_equal = k.shape[2] // n_parts * n_parts
    k_parts = k[:, 0, :n_equal].unflatten(1, (n_parts, -1))  # (n, n_parts, S/n_parts, D)
    v_parts = v[:, 0, :n_equal].unflatten(1, (n_parts, -1))
    out, lse = flash(q.expand(-1, n_parts, -1, -1), k_parts, v_parts)
    if n_equal < k.shape[2]:
        rest, rest_lse = flash(q, k[:, :, n_equal:], v[:, :, n_equal:])
        out = torch.cat([out, rest], 1)
        lse = torch.cat([lse, rest_lse], 1)
    share = lse.softmax(1)[..., None]  # of the weight that a part's keys get
    return (out * share).sum(1, keepdim=True), lse


def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """Return causal softmax weights (t, H, S) of q (t, H, D), the newest t of S, on k (S, G, D).

    In at least float32. Only for few rows: `rows_at_once` says how many at a time.
    """
    n_rows, n_heads, head_dim = q.shape
    n_keys, n_kv_heads, _ = k.shape
    grouped = q.view(n_rows, n_kv_heads, -1, head_dim).transpose(0, 1)  # (G, t, H/G, D)
    grouped = grouped.reshape(n_kv_heads, -1, head_dim)  # (G, t*H/G, D)
    logits = product(grouped, k.permute(1, 2, 0), head_dim**-0.5)  # (G, t*H/G, S)
    logits = logits.view(n_kv_heads, n_rows, -1, n_keys)  # (G, t, H/G, S)
    if n_rows > 1:
        later = torch.ones(n_rows, n_rows, dtype=torch.bool, device=q.device).triu(1)
        logits[..., n_keys - n_rows :].masked_fill_(later[:, None], -torch.inf)
    return logits.softmax(-1).transpose(0, 1).reshape(n_rows, n_heads, n_keys)


def weights_of_heads(q: Tensor, k: Tensor, heads) -> Tensor:
    """Return `attention_weights` (t, heads, S) of some heads alone."""
    n_heads = q.shape[1]
    if len(heads) == n_heads:
        return attention_weights(q, k)
    group = n_heads // k.shape[1]
    parts = []
    for head in heads:
        kv_head = head // group
        parts.append(attention_weights(q[:, head : head + 1], k[:, kv_head : kv_head + 1]))
    return torch.cat(parts, 1)


def rows_at_once(n_heads: int, n_keys: int) -> int:
    """Return how many rows' weights to compute at a time: those of 16 MiB, at least one row's."""
    return max(1, 2**22 // (n_heads * n_keys))


def product(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """Return scale times (G, m, K) times (G, K, n), b in the KV's dtype, in at least float32."""
    if b.is_cuda and b.dtype.itemsize < 4:  # no copy of b in float32
        return torch.bmm(a.to(b.dtype), b, out_dtype=torch.float32) * scale
    # on a CPU half precision is slow, and it rounds the logits
    wide = torch.promote_types(b.dtype, torch.float32)
    unused = a.new_empty(1, 1, 1, dtype=wide)
    return torch.baddbmm(unused, a.to(wide), b.to(wide), beta=0, alpha=scale)


def by_group(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lay out q (t, H, D) as (G, H/G, t, D), k and v (S, G, D) as (G, 1, S, D), as views."""
    q = q.unflatten(1, (k.shape[1], -1)).permute(1, 2, 0, 3)
    return q, k.transpose(0, 1)[:, None], v.transpose(0, 1)[:, None]


def by_row(out: Tensor) -> Tensor:
    """Lay out (G, H/G, t, D) as (t, H*D)."""
    return out.permute(2, 0, 1, 3).reshape(out.shape[2], -1)


def shared(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Let query heads (n, m, t, D) share keys and values (n, 1, S, D): (n, m, S, D), as views."""
    return k.expand(-1, q.shape[1], -1, -1), v.expand(-1, q.shape[1], -1, -1)
