"""The LLaMA model and its one step, which serves prefill, decode and follow-up.

A step takes new token ids and returns the logits after the last. It goes layer by layer, and chunk by chunk inside a
layer, because a boundary ranks blocks by the queries of the *last* tokens: the usual loop, each chunk through all
layers, could not prune. `x` holds all rows and is updated in place, so the biggest temporary is one chunk's FFN.

A boundary p stands inside layer p-1, after its attention and before its FFN (SlimInfer, arXiv 2508.06447). There rows
leave `x` (pruned) and return to it (revived). Rows are always in ascending position: first those of prompt blocks,
then those of the tail. The first step has rows for every block; a decoded token has one tail row.

Shapes: T rows, S keys, H heads, G KV heads, D head_dim, C dim, F hidden_dim, V vocab,
N prompt blocks, B block_len, w newest tokens that rank the blocks.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import prune
from kvcache import KVCache, Stage

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


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
    tile: tuple[int, int] | None = (
        None  # rows and columns of FP8 weights that share a scale in the checkpoint
    )


@dataclass
class Layer:
    """Weights of one layer; q, k, v are one matrix, so are gate and up."""

    attn_norm: Tensor  # (C,)
    wqkv: Tensor  # (H*D + 2*G*D, C)
    bqkv: Tensor | None  # (H*D + 2*G*D,)
    q_norm: Tensor | None  # (D,)
    k_norm: Tensor | None  # (D,)
    wo: Tensor  # (C, H*D)
    bo: Tensor | None  # (C,)
    ffn_norm: Tensor  # (C,)
    w_gate_up: Tensor  # (2*F, C)
    w_down: Tensor  # (C, F)


@dataclass
class Weights:
    embed: Tensor  # (V, C)
    layers: list[Layer]
    norm: Tensor  # (C,)
    head: Tensor  # (V, C), the embedding itself when tied
    inv_freq: Tensor  # (2, R/2) of RoPE in float32: for short and for long prompts


@dataclass
class Rows:
    """Where the rows of x stand in the text, and their keys in the slabs of one stage."""

    cos: Tensor  # (T, 1, R/2), R dims that RoPE turns
    sin: Tensor
    query_scale: Tensor | None  # (T, 1, 1), by position, if the family has one
    slab_rows: Tensor  # (T,) where their keys go
    key_offset: int  # row i, unless revived, sees the first key_offset + i + 1 keys of the slab
    pos: Tensor  # (T,)
    n_revived: int  # leading rows that are revived: the slab holds later keys than theirs
    key_pos: (
        Tensor | None
    )  # (S,) positions in the slab, for the mask of revived rows; None without them
    scoring: (
        Tensor  # (t,) which of the w newest tokens have a row here; pruning may have removed some
    )


class Model:
    """Weights, KV and the step; `rule` ranks the blocks.

    Three hooks watch a step: `on_chunk(layer, rows, keys)` its progress; `on_scores(layer, scores)` what
    each of the newest tokens (w, N) gives the prompt's blocks so far; `on_select(i, candidates, scores,
    active)` each choice of stage i's blocks before it takes effect, scores (N,) in the candidates' order.
    """

    def __init__(
        self,
        config: Config,
        weights: Weights,
        kv: KVCache,
        rule: prune.Rule,
        unit_len,
        window,
        gamma,
        chunk,
    ):
        self.config, self.weights, self.kv, self.rule = config, weights, kv, rule
        self.unit_len, self.window, self.gamma, self.chunk = unit_len, window, gamma, chunk
        self.wide = torch.promote_types(kv.dtype, torch.float32)  # of scores, RoPE and logits
        self.on_chunk = lambda layer, rows, keys: None
        self.on_scores = lambda layer, scores: None
        self.on_select = lambda stage, candidates, scores, active: None

    @torch.inference_mode()
    def step(self, ids: Tensor, n_logits: int = 1) -> Tensor:
        """Run new token ids (T,) after what the KV holds; return the logits (n_logits, V) after the last ones.

        Prefill when the KV is empty, else decode or follow-up. Mutates the KV; `KVCache.make_room` comes before.
        """
        kv, w, start = self.kv, self.weights, self.kv.length
        end = start + len(ids)
        x = self.embed(ids.to(kv.device))  # (T, C)
        blocks = (
            [] if start else list(kv.stages[0].slots)
        )  # prompt blocks with rows in x, ascending
        shape = (
            min(self.window, len(ids)),
            kv.stages[0].n_slots,
        )  # (w, N): what each newest token gives each block
        scores = torch.full(shape, -torch.inf, dtype=self.wide, device=kv.device)
        for i, stage in enumerate(kv.stages):
            rows = self.locate(stage, blocks, max(start, kv.tail_start), end, len(scores))
            above = kv.stages[i + 1] if i + 1 < len(kv.stages) else None
            for layer in stage.layers:
                queries, weights = self.attention(layer, x, rows)
                at_boundary = above is not None and layer == stage.layers[-1]
                if (
                    above is not None
                    and self.rule.sees == "weights"
                    and (at_boundary or self.rule.every_layer)
                ):
                    self.score_layer(
                        layer, stage, rows, rows.key_offset + len(x), queries, weights, scores
                    )
                    self.on_scores(layer, scores)
                if at_boundary:
                    above.remember(scores if self.rule.sees == "weights" else queries, self.window)
                    x, blocks = self.boundary(i + 1, x, blocks)
                self.ffn(layer, x)
                kv.move()
        kv.length = end
        return self.head(
            F.rms_norm(x[-n_logits:], (self.config.dim,), w.norm, self.config.norm_eps)
        ).to(self.wide)

    def locate(self, stage: Stage, blocks: list[int], first_tail: int, end: int, w: int) -> Rows:
        """Say where the rows of prompt blocks and of tail positions first_tail..end-1 belong in a stage."""
        kv, b = self.kv, self.kv.block_len
        tail = torch.arange(first_tail, end, device=kv.device)
        n_rows, tail_row = (
            len(blocks) * b,
            stage.n_slots * b,
        )  # tail_row: where the tail begins in the slab
        slot = {block: s for s, block in enumerate(stage.slots)}
        pos = torch.cat([kv.block_rows([block * b for block in blocks]), tail])
        slab_rows = torch.cat(
            [kv.block_rows([slot[block] * b for block in blocks]), tail - kv.tail_start + tail_row]
        )
        n_revived = n_rows if kv.length else 0  # in the first step rows and keys are the same
        key_pos = None
        if n_revived:
            tail_pos = torch.arange(kv.tail_start, end, device=kv.device)
            key_pos = torch.cat([kv.block_rows([block * b for block in stage.slots]), tail_pos])
        key_offset = tail_row + first_tail - kv.tail_start - n_rows
        scoring = kv.upload(
            [i for i, p in enumerate(range(end - w, end)) if p >= kv.tail_start or p // b in slot]
        )
        return Rows(*self.rope(pos), slab_rows, key_offset, pos, n_revived, key_pos, scoring)

    def rope(self, pos: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return RoPE's cos and sin (T, 1, R/2) at positions (T,), and the queries' scale (T, 1, 1) if there is one.

        Computed in float32 even for a float64 run, as the reference implementations do.
        """
        scaling = self.config.rope_scaling
        original = scaling.get("original_max_position_embeddings", 0)
        inv_freq = self.weights.inv_freq[int(self.kv.planned > original)]
        angles = pos[:, None, None].float() * inv_freq  # (T, 1, R/2)
        factor = scaling.get("attention_factor", 1.0)
        cos = (angles.cos() * factor).to(self.wide)
        sin = (angles.sin() * factor).to(self.wide)
        if "llama_4_scaling_beta" not in scaling:
            return cos, sin, None
        times = (pos[:, None, None].float() / original).floor()  # (T, 1, 1)
        query_scale = 1 + scaling["llama_4_scaling_beta"] * torch.log(1 + times)
        return cos, sin, query_scale.to(self.wide)

    def attention(self, layer: int, x: Tensor, rows: Rows) -> tuple[Tensor, Tensor | None]:
        """Add attention to x (T, C) in place, appending keys and values.

        Returns the queries (w, H, D) of the newest rows, never of revived ones, and for a single
        new row also its weights (1, H, S), which attention computes anyway.
        """
        c, w, kv = self.config, self.weights.layers[layer], self.kv
        h, g, d = c.n_heads, c.n_kv_heads, c.head_dim
        newest, weights = x.new_empty(0, h, d), None
        kv.wait(layer)
        starts = [
            *range(0, rows.n_revived, self.chunk),
            *range(rows.n_revived, len(x), self.chunk),
            len(x),
        ]
        for a, b in zip(starts, starts[1:]):
            revived = a < rows.n_revived
            qkv = F.linear(F.rms_norm(x[a:b], (c.dim,), w.attn_norm, c.norm_eps), w.wqkv, w.bqkv)
            qk, v = qkv.view(b - a, -1, d).split([h + g, g], dim=1)  # (t, H + G, D), (t, G, D)
            if w.q_norm is not None:
                qk = torch.cat(
                    [
                        F.rms_norm(qk[:, :h], (d,), w.q_norm, c.norm_eps),
                        F.rms_norm(qk[:, h:], (d,), w.k_norm, c.norm_eps),
                    ],
                    dim=1,
                )
            if layer not in c.no_rope:
                qk = rotate(qk, rows.cos[a:b], rows.sin[a:b])
            q, k = qk.split([h, g], dim=1)
            if rows.query_scale is not None:
                q = (q * rows.query_scale[a:b]).to(q.dtype)
            kv.append(layer, rows.slab_rows[a:b], k, v)
            n = len(rows.key_pos) if revived else rows.key_offset + b
            self.on_chunk(layer, b - a, n)
            keys, values = kv.read(layer, n)  # (S, G, D)
            if revived:
                out = masked_attention(
                    q, keys, values, rows.key_pos <= rows.pos[a:b, None]
                )  # (t, S)
            elif b - a == 1:
                out, weights = row_attention(q, keys, values)
            else:
                out = causal_attention(q, keys, values)
            self.add(x[a:b], out, w.wo)  # (t, H*D)
            if w.bo is not None:
                x[a:b].add_(w.bo)
            if not revived:
                newest = torch.cat([newest, q[-self.window :]])[-self.window :]
        return newest, weights if len(x) - rows.n_revived == 1 else None

    def ffn(self, layer: int, x: Tensor) -> None:
        """Add the SwiGLU feed-forward to x (T, C) in place, chunk by chunk."""
        w = self.weights.layers[layer]
        for part in x.split(self.chunk):
            self.add(part, self.ffn_inner(w, part), w.w_down)

    def ffn_inner(self, w: Layer, x: Tensor) -> Tensor:
        """Return the FFN's inner states (t, F) of rows x (t, C)."""
        x = F.rms_norm(x, (self.config.dim,), w.ffn_norm, self.config.norm_eps)
        gate, up = F.linear(x, w.w_gate_up).chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    # ---- what `parallel` overrides: sums over heads and FFN columns, and a cut vocabulary ------

    def embed(self, ids: Tensor) -> Tensor:
        return self.weights.embed[ids]

    def head(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weights.head)

    def add(self, x: Tensor, out: Tensor, w: Tensor) -> None:
        """Add out (t, K) times w (C, K) to x (t, C) in place."""
        x.addmm_(out, w.t())

    # ---- ranking ------------------------------------------------------------------------

    def score_layer(
        self, layer: int, stage: Stage, rows: Rows, n: int, queries: Tensor, weights, scores: Tensor
    ):
        """Let the rule score a layer's newest queries (w, H, D) on n keys; keep the maximum in scores (w, N).

        weights: (1, H, S), if attention made them. Blocks that the stage does not hold keep their score from
        lower layers, unless the rule looks at the boundary's layer alone.
        Raises ValueError for a rule's result of another shape.
        """
        n_slot_rows, t = stage.n_slots * self.kv.block_len, len(rows.scoring)
        keys, _ = self.kv.read(layer, n)  # (S, G, D)
        if not self.rule.every_layer:
            scores.fill_(-torch.inf)
        few = rows_at_once(self.config.n_heads, n)
        for a in range(0, t, few):
            q = queries[len(queries) - t :][a : a + few]
            of_keys = (
                attention_weights(q, keys[: n - t + a + len(q)]) if weights is None else weights
            )
            # keys after the last of these rows have no weight: pad with zeros
            of_slots = F.pad(of_keys, (0, max(0, n_slot_rows - of_keys.shape[-1])))[
                ..., :n_slot_rows
            ]
            of_blocks = of_slots.reshape(
                len(q), -1, stage.n_slots, self.kv.block_len
            )  # (t, H, N, B)
            new, shape = self.rule.score(of_blocks), (len(q), stage.n_slots)
            if not isinstance(new, Tensor) or new.shape != shape or not new.is_floating_point():
                raise ValueError(
                    f"the scoring function returned {new!r:.60}; of weights {tuple(of_blocks.shape)} it must return "
                    f"floating-point scores {shape}, one per query and block"
                )
            where = rows.scoring[a : a + few, None], stage.blocks
            scores[where] = torch.maximum(scores[where], new.to(scores.dtype))
            del (
                of_keys,
                of_slots,
                of_blocks,
            )  # the largest temporaries: gone before the next rows' come

    # ---- a boundary ---------------------------------------------------------------------

    def boundary(self, i: int, x: Tensor, blocks: list[int]) -> tuple[Tensor, list[int]]:
        """Choose stage i's blocks, move rows out of and into x (T, C); return the new x and its prompt blocks."""
        kv, stage, b = self.kv, self.kv.stages[i], self.kv.block_len
        # choose
        active = self.choose(i)
        # rows return: active blocks without keys here; first, so that they need not wait for the copies below
        revived = sorted(active - stage.held - set(blocks))
        returned = kv.restore(stage, revived) if revived else x[:0]
        # rows leave: those of blocks that are not active go to aux
        first_row = {block: j * b for j, block in enumerate(blocks)}
        kv.offload(
            stage, x, {block: row for block, row in first_row.items() if block not in active}
        )
        kept = [block for block in blocks if block in active]
        # KV moves: between slots and homes, while the FFN runs (`KVCache.move`)
        kv.activate(stage, active)
        if len(kept) == len(blocks) and not revived:
            return x, blocks
        first_row |= {block: len(x) + j * b for j, block in enumerate(revived)}
        blocks_above = sorted(kept + revived)
        tail = torch.arange(len(blocks) * b, len(x), device=kv.device)
        order = torch.cat([kv.block_rows([first_row[block] for block in blocks_above]), tail])
        return torch.cat([x, returned])[order] if revived else x[order], blocks_above

    def choose(self, i: int) -> set[int]:
        """Return the blocks to be active in stage i: the new choice, or those active now if the two overlap enough."""
        kv, below, stage = self.kv, self.kv.stages[i - 1], self.kv.stages[i]
        if self.rule.sees == "weights":
            scores = stage.recent.amax(0)[below.blocks]  # (N,)
        else:
            keys = kv.slot_rows(below, below.layers[-1])[0].permute(1, 2, 0, 3)  # (N, B, G, D)
            scores = self.rule.score(stage.recent, keys, below.blocks, self.unit_len)
        new = set(prune.select(scores, below.slots, stage.n_slots))
        last = {kv.tail_start // kv.block_len}  # always active, so it counts in the overlap
        if kv.length and prune.overlap(new | last, set(stage.slots) | last) >= self.gamma:
            new = set(stage.slots)
        self.on_select(i, below.slots, scores, new)
        return new


# ---- rotary position embedding ----------------------------------------------------------


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE in split-half layout to the leading R dims of x (T, heads, D), with cos and sin (T, 1, R/2)."""
    r = 2 * cos.shape[-1]
    a, b = x[..., :r].chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., r:]], dim=-1).to(x.dtype)


# ---- attention: of the newest rows, of one row, of revived rows --------------------------


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend q (t, H, D), the newest t of S positions, to k and v (S, G, D) causally; return (t, H*D)."""
    return (causal_attention_cuda if q.is_cuda else causal_attention_cpu)(q, k, v)


def causal_attention_cuda(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Let the flash or memory-efficient kernel apply its own lower-right mask, so that no mask tensor is made.

    KV heads are the batch and their query heads share the keys as a view, because the
    memory-efficient kernel, which float32 needs, has no grouped-query attention.
    """
    from torch.nn.attention.bias import (
        causal_lower_right,  # here, because a CPU run would wait 1.7 s for it
    )

    return masked_attention(q, k, v, causal_lower_right(len(q), len(k)))


def causal_attention_cpu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend to older keys without a mask and to the rows' own keys causally; join the two by softmax weight.

    One call would need a mask tensor and keys repeated for every head: 1.2 to 3 times slower. The private
    operator is called because the public function does not return the log-sum-exp that the join needs.
    """
    t, s = len(q), len(k)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    q, k, v = by_group(q, k, v)
    out, weight = flash(q, k[:, :, s - t :], v[:, :, s - t :], 0.0, True)
    if s > t:
        older, older_weight = flash(q, k[:, :, : s - t], v[:, :, : s - t])
        wide = (
            older_weight.dtype
        )  # half-precision weights of the join would cost five times the error
        share = torch.sigmoid(older_weight - weight)[..., None]
        out = out.to(wide).lerp(older.to(wide), share).to(q.dtype)
    return out.permute(2, 0, 1, 3).reshape(t, -1)


def row_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attend one newest q (1, H, D) to k and v (S, G, D); return (1, H*D) and the weights (1, H, S).

    Two products and a softmax read keys and values once, as a fused kernel does, and leave
    the weights for ranking the blocks.
    """
    weights = attention_weights(q, k)
    grouped = weights.view(k.shape[1], -1, len(k))  # (G, H/G, S)
    return product(grouped, v.transpose(0, 1)).to(v.dtype).reshape(1, -1), weights


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attend q (t, H, D) to k and v (S, G, D) where mask (t, S) allows it; return (t, H*D)."""
    out = F.scaled_dot_product_attention(*by_group(q, k, v), attn_mask=mask)
    return out.permute(2, 0, 1, 3).reshape(len(q), -1)


def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """Return the causal softmax weights (t, H, S) of q (t, H, D), the newest t of S positions, on k (S, G, D).

    In at least float32. Only for few rows: `rows_at_once` says how many at a time.
    """
    (t, h, d), (s, g, _) = q.shape, k.shape
    q = q.view(t, g, h // g, d).transpose(0, 1).reshape(g, -1, d)  # (G, t*H/G, D)
    logits = product(q, k.permute(1, 2, 0), d**-0.5).view(g, t, -1, s)  # (G, t, H/G, S)
    if t > 1:
        later = torch.ones(t, t, dtype=torch.bool, device=q.device).triu(1)
        logits[..., s - t :].masked_fill_(later[:, None], -torch.inf)
    return logits.softmax(-1).transpose(0, 1).reshape(t, h, s)


def rows_at_once(n_heads: int, n_keys: int) -> int:
    """Return how many rows' weights to compute at a time: as many as fit in 16 MiB, at least one."""
    return max(1, 2**22 // (n_heads * n_keys))


def product(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """Return scale times (G, m, K) times (G, K, n), b in the dtype of the KV, in at least float32."""
    if b.is_cuda and b.dtype.itemsize < 4:
        return (
            torch.bmm(a.to(b.dtype), b, out_dtype=torch.float32) * scale
        )  # no copy of b in float32
    wide = torch.promote_types(
        b.dtype, torch.float32
    )  # on a CPU half precision is slow, and it rounds the logits
    a, b = a.to(wide), b.to(wide)
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=scale)


def by_group(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lay out q (t, H, D) as (G, H/G, t, D), k and v (S, G, D) as (G, H/G, S, D), no key copied."""
    (t, h, d), g = q.shape, k.shape[1]
    k, v = (y.transpose(0, 1)[:, None].expand(-1, h // g, -1, -1) for y in (k, v))
    return q.view(t, g, h // g, d).permute(1, 2, 0, 3), k, v
