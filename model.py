"""The LLaMA model, and the one step that is prefill, decode and follow-up alike.

A step takes new token ids and returns the logits after the last. It goes layer by layer,
and chunk by chunk inside a layer, because a boundary scores blocks with the queries of
the *last* token: the usual loop, each chunk through all layers, could not prune. `x`
holds all rows and is updated in place, so the biggest temporary is one chunk's FFN.

A boundary p stands inside layer p-1, after its attention and before its FFN (SlimInfer,
arXiv 2508.06447). There rows leave `x` (pruned) and come back (revived). Rows are always
in ascending position: first the prompt blocks *in flight*, then the rows of the tail.
The first step has every block in flight; a decoded token is one tail row, no more.

Shapes: T rows, S keys, H heads, G KV heads, D head_dim, C dim, F hidden_dim, V vocab, B block_len.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

import prune
from kvcache import KVCache, Stage

# Keys of other families or variants that change the numbers, with the value that leaves them unchanged.
NEUTRAL = {
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False,
    "quantization_config": None, "partial_rotary_factor": 1.0, "rope_interleaved": False,
    "attn_logit_softcapping": None, "final_logit_softcapping": None, "logit_scale": 1.0, "clip_qkv": None,
    "embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0, "attention_multiplier": None,
    "use_qk_norm": False, "pretraining_tp": 1, "no_rope_layers": None, "num_local_experts": None, "num_experts": None,
}  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}


@dataclass(frozen=True)
class Config:
    """Shape and constants of a checkpoint, from its config.json; anything not understood raises ValueError."""

    model_type: str
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    rope_scaling: dict  # {} or {"rope_type": ..., ...}
    max_len: int  # trained context
    tied: bool  # the embedding is the LM head too
    dtype: torch.dtype

    @property
    def qkv_bias(self) -> bool:
        return self.model_type == "qwen2"

    @staticmethod
    def read(path: Path) -> "Config":
        """Read config.json; raise FileNotFoundError, or a ValueError that names the key."""
        return Config.from_dict(read_json(path), path)

    @staticmethod
    def from_dict(c: dict, path) -> "Config":
        def want(key, default=None, kind=int, most=2**20):
            value = default if c.get(key) is None else c[key]
            return positive(value, f"{path}: key {key!r}", kind, most)

        names = c.get("architectures")
        architecture = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else str(names)
        if architecture not in ARCHITECTURES:
            raise ValueError(f"{path}: architecture {architecture!r} is not supported; supported are {', '.join(ARCHITECTURES)}")
        model_type = ARCHITECTURES[architecture]
        if c.get("model_type") not in (model_type, None):
            raise ValueError(f"{path}: key 'model_type' is {c['model_type']!r}, but {architecture} is {model_type!r}")
        rope = rope_keys(c, path)
        for key, value in {**c, **rope}.items():
            if key in NEUTRAL and value not in (NEUTRAL[key], None):
                raise ValueError(f"{path}: key {key!r} is {value!r}; only {NEUTRAL[key]!r} is supported")
        if model_type == "llama" and c.get("sliding_window") is not None:
            raise ValueError(f"{path}: key 'sliding_window' is {c['sliding_window']!r}; only full attention is supported")
        theta = rope.pop("rope_theta", 10000.0)  # Llama 2 files may leave it out
        given = [c[key] for key in ("torch_dtype", "dtype") if c.get(key) is not None]
        name = str(given[0]).removeprefix("torch.") if given else "float32"
        if name not in DTYPES:
            raise ValueError(f"{path}: key 'torch_dtype' is {name!r}; supported are {', '.join(DTYPES)}")
        tied = False if c.get("tie_word_embeddings") is None else c["tie_word_embeddings"]
        if not isinstance(tied, bool):
            raise ValueError(f"{path}: key 'tie_word_embeddings' is {tied!r}; true or false is needed")
        dim, n_heads = want("hidden_size"), want("num_attention_heads")
        config = Config(
            model_type=model_type, dim=dim, n_layers=want("num_hidden_layers", most=1000), n_heads=n_heads,
            n_kv_heads=want("num_key_value_heads", n_heads), head_dim=want("head_dim", max(1, dim // n_heads)),
            hidden_dim=want("intermediate_size"), vocab_size=want("vocab_size", most=2**24),
            norm_eps=want("rms_norm_eps", kind=float, most=1), max_len=want("max_position_embeddings", most=2**40),
            rope_theta=positive(theta, f"{path}: key 'rope_theta'", float, 1e12), rope_scaling=rope, tied=tied, dtype=DTYPES[name],
        )  # fmt: skip
        if n_heads % config.n_kv_heads or config.head_dim % 2:
            raise ValueError(f"{path}: {n_heads} heads over {config.n_kv_heads} KV heads of size {config.head_dim} do not divide evenly")
        if c.get("layer_types") not in (None, ["full_attention"] * config.n_layers):
            raise ValueError(f"{path}: key 'layer_types' is {c['layer_types']!r:.200}; only full attention in every layer is supported")
        inverse_frequencies(config)  # raises for a RoPE type or key that is not understood
        return config


def rope_keys(c: dict, path) -> dict:
    """Gather what a config says of RoPE under its older and newer names; raise ValueError where it contradicts itself."""
    rope = {"rope_theta": c["rope_theta"]} if c.get("rope_theta") is not None else {}
    for key in ("rope_scaling", "rope_parameters"):
        part = {} if c.get(key) is None else c[key]
        if not isinstance(part, dict):
            raise ValueError(f"{path}: key {key!r} is {part!r}, not an object")
        for name, value in part.items():
            name = "rope_type" if name == "type" else name
            if value is not None and rope.setdefault(name, value) != value:
                raise ValueError(f"{path}: {name!r} is given twice, as {rope[name]!r} and as {value!r}; leave one")
    return rope


def positive(value, what: str, kind: type, most: float):
    """Return value as `kind`, int or float; raise ValueError unless it is a number within 0..most, 0 excluded."""
    fits = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool) and 0 < value <= most
    if not fits:  # so also for NaN
        raise ValueError(f"{what} is {value!r}; a positive {kind.__name__} up to {most:g} is needed")
    return kind(value)


def read_json(path: Path) -> dict:
    """Read a JSON object; raise FileNotFoundError or ValueError with the path."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a checkpoint is a folder in Hugging Face layout")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


# ---- rotary position embedding ----------------------------------------------------------


ROPE_KEYS = {"default": [], "linear": ["factor"], "llama3": ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]}


def inverse_frequencies(config: Config) -> Tensor:
    """Return RoPE's inverse frequencies (D/2,) in float64, scaled as the checkpoint's rope type asks.

    Types: default, linear (positions divided by factor) and llama3 (long wavelengths
    divided by factor, short ones kept, a ramp between). Raises ValueError for any other,
    and for a key that is missing, unknown or out of range.
    """
    r = {k: v for k, v in config.rope_scaling.items() if k not in NEUTRAL}
    kind = r.pop("rope_type", None if r else "default")
    if not isinstance(kind, str) or kind not in ROPE_KEYS:
        raise ValueError(f"rope_scaling type {kind!r} is not supported; supported are {', '.join(ROPE_KEYS)}")
    if unknown := set(r) - {"original_max_position_embeddings", *ROPE_KEYS[kind]}:
        raise ValueError(f"rope_scaling key {min(unknown)!r} is not known for type {kind!r}; it may change the numbers")
    v = {key: positive(r.get(key), f"rope_scaling key {key!r}", float, 2**40) for key in ROPE_KEYS[kind]}
    inv = config.rope_theta ** -(torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim)
    if kind != "llama3":
        return inv / v.get("factor", 1.0)
    low, high = v["low_freq_factor"], v["high_freq_factor"]
    if high <= low:
        raise ValueError(f"rope_scaling key 'high_freq_factor' is {high}; it must be above low_freq_factor, {low}")
    turns = v["original_max_position_embeddings"] * inv / (2 * math.pi)  # full turns within the old context
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: kept as it is, 0: divided by factor
    return inv * keep + inv / v["factor"] * (1 - keep)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE in split-half layout to x (T, heads, D), with cos and sin (T, 1, D/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend q (t, H, D), the newest t of S positions, to k and v (S, G, D) causally; return (t, H*D)."""
    (t, h, d), (s, g, _) = q.shape, k.shape
    if q.is_cuda:
        q, k, v = (y.transpose(0, 1)[None] for y in (q, k, v))  # (1, heads, rows, D)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(t, s), enable_gqa=True)
        return out[0].transpose(0, 1).reshape(t, -1)
    # The CPU kernel would want this mask written out and the keys repeated for every head, 1.2 to 3 times
    # slower. So: the keys before these rows without a mask, their own with a square one, joined by softmax weight.
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    q, k, v = by_group(q, k, v)
    out, weight = flash(q, k[:, :, s - t :], v[:, :, s - t :], 0.0, True)
    if s > t:
        past, past_weight = flash(q, k[:, :, : s - t], v[:, :, : s - t])
        out = out.lerp(past, torch.sigmoid(past_weight - weight)[..., None].to(out.dtype))
    return out.permute(2, 0, 1, 3).reshape(t, -1)


def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """Return the causal softmax weights (t, H, S) of q (t, H, D), the newest t of S positions, on k (S, G, D).

    In at least float32. Only for few rows: `look_rows` says how many at a time.
    """
    (t, h, d), (s, g, _) = q.shape, k.shape
    q = q.view(t, g, h // g, d).transpose(0, 1).reshape(g, -1, d)  # (G, t*H/G, D)
    logits = product(q, k.permute(1, 2, 0)).mul_(d**-0.5).view(g, t, -1, s)  # (G, t, H/G, S)
    if t > 1:
        later = torch.ones(t, t, dtype=torch.bool, device=q.device).triu(1)
        logits[..., s - t :].masked_fill_(later[:, None], -torch.inf)
    return logits.softmax(-1).transpose(0, 1).reshape(t, h, s)


def row_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attend one newest q (1, H, D) to k and v (S, G, D); return (1, H*D) and the weights (1, H, S).

    Two products and a softmax read keys and values once, as a fused kernel does, and leave
    the weights for ranking the blocks.
    """
    weights = attention_weights(q, k)
    by_group = weights.view(k.shape[1], -1, len(k))  # (G, H/G, S)
    return product(by_group, v.transpose(0, 1)).to(v.dtype).reshape(1, -1), weights


def product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply (G, m, K) with (G, K, n), b in the dtype of the KV, and return it in at least float32."""
    if b.is_cuda and b.dtype.itemsize < 4:
        return torch.bmm(a.to(b.dtype), b, out_dtype=torch.float32)  # widening b would read and write it once more
    wide = torch.promote_types(b.dtype, torch.float32)  # on a CPU half-precision products are slow, and round the logits
    return a.to(wide) @ b.to(wide)


def look_rows(n_heads: int, n_keys: int) -> int:
    """Return how many rows' weights are made at a time, so that they take some 16 MiB, or what one row takes."""
    return max(1, 2**22 // (n_heads * n_keys))


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attend q (t, H, D), amid k and v (S, G, D), where mask (t, S) is true; return (t, H*D)."""
    out = F.scaled_dot_product_attention(*by_group(q, k, v), attn_mask=mask)
    return out.permute(2, 0, 1, 3).reshape(len(q), -1)


def by_group(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lay out q (t, H, D) as (G, H/G, t, D), k and v (S, G, D) as (G, H/G, S, D), no key copied."""
    (t, h, d), g = q.shape, k.shape[1]
    k, v = (y.transpose(0, 1)[:, None].expand(-1, h // g, -1, -1) for y in (k, v))
    return q.view(t, g, h // g, d).permute(1, 2, 0, 3), k, v


def prefill_flops(c: Config, length: int, schedule: dict, block_len: int = 64) -> float:
    """Return the floating-point operations of a prefill: matrices and causal attention, the head once."""
    sizes = prune.stage_blocks(length, schedule, block_len)
    rows = [length - (sizes[0] - n) * block_len for n in sizes]
    alive = [r for a, b, r in zip([0, *schedule], [*schedule, c.n_layers], rows) for _ in range(a, b)]
    after = alive[1:] + alive[-1:]  # the FFN below a boundary runs on its survivors
    projections, ffn = c.dim * (2 * c.n_heads + 2 * c.n_kv_heads) * c.head_dim, 3 * c.dim * c.hidden_dim
    attention = sum(2 * n * n * c.n_heads * c.head_dim for n in alive)
    return 2 * projections * sum(alive) + 2 * ffn * sum(after) + attention + 2 * c.dim * c.vocab_size


# ---- the model --------------------------------------------------------------------------


@dataclass
class Layer:
    """Weights of one layer; q, k, v are one matrix, so are gate and up."""

    attn_norm: Tensor  # (C,)
    wqkv: Tensor  # (H*D + 2*G*D, C)
    bqkv: Tensor | None  # (H*D + 2*G*D,), Qwen2 only
    wo: Tensor  # (C, H*D)
    ffn_norm: Tensor  # (C,)
    w_gate_up: Tensor  # (2*F, C)
    w_down: Tensor  # (C, F)


@dataclass
class Weights:
    embed: Tensor  # (V, C)
    layers: list[Layer]
    norm: Tensor  # (C,)
    head: Tensor  # (V, C), the embedding itself when tied

    @property
    def nbytes(self) -> int:
        tensors = [self.embed, self.norm] + [t for layer in self.layers for t in vars(layer).values() if t is not None]
        return sum(t.nbytes for t in tensors) + (0 if self.head is self.embed else self.head.nbytes)


@dataclass
class Rows:
    """Where the rows of x stand in the text and in the slabs of one stage."""

    cos: Tensor  # (T, 1, D/2)
    sin: Tensor
    dst: Tensor  # (T,) slab rows their keys go to
    before: int  # slab rows before row 0, were all rows the newest keys
    pos: Tensor  # (T,)
    revived: int  # leading rows that stand amid their keys; the others are the newest keys
    key_pos: Tensor | None  # (S,) only if there are such rows: their mask goes by position


class Model:
    """Weights, KV and the step; `rule` ranks the blocks.

    Three hooks watch a step: `on_chunk(layer, rows, keys)` its progress; `on_look(layer, worth)`
    what the newest queries (w, N) have found in the blocks of the prompt so far; and
    `on_select(stage, candidates, scores, active)` each choice of blocks, before it takes
    effect, scores (N,) in the candidates' order.
    """

    def __init__(self, config: Config, weights: Weights, kv: KVCache, rule: prune.Rule, unit_len, window, gamma, chunk):
        self.config, self.weights, self.kv, self.rule = config, weights, kv, rule
        self.unit_len, self.window, self.gamma, self.chunk = unit_len, window, gamma, chunk
        self.inv_freq = inverse_frequencies(config).to(kv.device)
        self.on_chunk = lambda layer, rows, keys: None
        self.on_look = lambda layer, worth: None
        self.on_select = lambda stage, candidates, scores, active: None

    @torch.inference_mode()
    def step(self, ids: Tensor, n_logits: int = 1) -> Tensor:
        """Run new token ids (T,) after what the KV holds; return the logits (n_logits, V) after the last ones.

        Prefill when the KV is empty, else decode or follow-up. Mutates the KV.
        """
        kv, w, start = self.kv, self.weights, self.kv.length
        kv.grow_tail(start + len(ids))
        x = w.embed[ids.to(kv.device)]  # (T, C)
        flight = [] if start else list(kv.stages[0].slots)  # prompt blocks among the rows, ascending
        end = start + len(ids)
        wide = torch.promote_types(kv.dtype, torch.float32)
        shape = min(self.window, len(ids)), kv.stages[0].n_slots
        worth = torch.full(shape, -torch.inf, dtype=wide, device=kv.device)  # (w, N) of the blocks, to the newest queries
        for i, stage in enumerate(kv.stages):
            rows = self.place(stage, flight, max(start, kv.tail_start), end)
            here = self.newest_here(flight, end, len(worth))
            above = kv.stages[i + 1] if i + 1 < len(kv.stages) else None
            for layer in stage.layers:
                at_boundary = above is not None and layer == stage.layers[-1]
                queries, weights = self.attention(layer, x, rows)
                if above is not None and self.rule.sees == "weights" and (at_boundary or self.rule.every_layer):
                    self.look(layer, stage, rows.before + len(x), queries, weights, worth, here)
                if at_boundary:
                    newest = worth.clone() if self.rule.sees == "weights" else queries
                    above.ring = torch.cat([newest[:0] if above.ring is None else above.ring, newest])[-self.window :]
                    x, flight = self.boundary(i + 1, x, flight)
                self.ffn(layer, x)
        kv.length = end
        last = F.rms_norm(x[-n_logits:], (self.config.dim,), w.norm, self.config.norm_eps)
        logits = F.linear(last, w.head)
        return logits if logits.dtype == torch.float64 else logits.float()

    def place(self, stage: Stage, flight: list[int], start: int, end: int) -> Rows:
        """Say where the rows of the blocks in flight and of tail positions start..end-1 belong in a stage."""
        kv = self.kv
        tail = torch.arange(start, end, device=kv.device)
        b, n_flight, tail_row = kv.block_len, len(flight) * kv.block_len, stage.n_slots * kv.block_len  # tail_row: in the slab
        slot = {block: s for s, block in enumerate(stage.slots)}
        pos = torch.cat([kv.spread([block * b for block in flight]), tail])
        dst = torch.cat([kv.spread([slot[block] * b for block in flight]), tail - kv.tail_start + tail_row])
        revived = n_flight if kv.length else 0  # in the first step rows and keys are the same
        key_pos = None
        if revived:
            key_pos = torch.cat([kv.spread([block * b for block in stage.slots]), torch.arange(kv.tail_start, end, device=kv.device)])
        wide = torch.promote_types(kv.dtype, torch.float32)
        angle = pos[:, None, None] * self.inv_freq  # (T, 1, D/2) in float64: exact at any position
        before = tail_row + start - kv.tail_start - n_flight
        return Rows(angle.cos().to(wide), angle.sin().to(wide), dst, before, pos, revived, key_pos)

    def attention(self, layer: int, x: Tensor, rows: Rows) -> tuple[Tensor, Tensor | None]:
        """Add attention to x (T, C) in place, appending keys and values.

        Returns the queries (w, H, D) of the newest rows, never of revived ones, and for a single
        new row its weights (1, H, S), which come for nothing.
        """
        c, w, kv = self.config, self.weights.layers[layer], self.kv
        h, g, d = c.n_heads, c.n_kv_heads, c.head_dim
        newest, weights = x.new_empty(0, h, d), None
        kv.wait(layer)
        starts = [*range(0, rows.revived, self.chunk), *range(rows.revived, len(x), self.chunk), len(x)]
        for a, b in zip(starts, starts[1:]):
            fresh = a >= rows.revived
            qkv = F.linear(F.rms_norm(x[a:b], (c.dim,), w.attn_norm, c.norm_eps), w.wqkv, w.bqkv)
            q, k, v = qkv.view(b - a, -1, d).split([h, g, g], dim=1)  # (t, H, D), (t, G, D), (t, G, D)
            q, k = rotate(q, rows.cos[a:b], rows.sin[a:b]), rotate(k, rows.cos[a:b], rows.sin[a:b])
            kv.append(layer, rows.dst[a:b], k, v)
            n = rows.before + b if fresh else len(rows.key_pos)
            self.on_chunk(layer, b - a, n)
            keys, values = kv.read(layer, n)  # (S, G, D)
            if not fresh:
                out = masked_attention(q, keys, values, rows.key_pos <= rows.pos[a:b, None])  # (t, S)
            elif b - a == 1:
                out, weights = row_attention(q, keys, values)
            else:
                out = causal_attention(q, keys, values)
            x[a:b].addmm_(out, w.wo.t())  # (t, H*D)
            if fresh:
                newest = torch.cat([newest, q[-self.window :]])[-self.window :]
        return newest, weights if len(x) - rows.revived == 1 else None

    def newest_here(self, flight: list[int], end: int, w: int) -> Tensor:
        """Return which of the newest w tokens have a row in x, as indices (t,); of a short last block, others may be gone."""
        kv = self.kv
        position = range(end - w, end)
        return kv.upload([i for i, p in enumerate(position) if p >= kv.tail_start or p // kv.block_len in flight])

    def look(self, layer: int, stage: Stage, n: int, queries: Tensor, weights: Tensor | None, worth: Tensor, here: Tensor):
        """Let the rule see what a layer's newest queries attend to among n keys; raise their worth (w, N) to it.

        queries: (w, H, D), of which the newest len(here) belong to rows `here` of worth. weights: (1, H, S), if
        attention made them. Raises ValueError for a rule's result of another shape.
        """
        n_rows, t = stage.n_slots * self.kv.block_len, len(here)
        keys, _ = self.kv.read(layer, n)  # (S, G, D)
        if not self.rule.every_layer:
            worth.fill_(-torch.inf)
        step = look_rows(self.config.n_heads, n)
        for part in range(0, t, step):
            q = queries[len(queries) - t :][part : part + step]
            made = attention_weights(q, keys[: n - t + part + len(q)]) if weights is None else weights
            made = made[..., :n_rows].view(len(q), -1, stage.n_slots, self.kv.block_len)  # (t, H, N, B)
            found = self.rule.score(made)
            if not isinstance(found, Tensor) or found.shape != made.shape[::2] or not found.is_floating_point():
                raise ValueError(
                    f"the scoring function returned {found!r:.60}; of weights {tuple(made.shape)} it must return "
                    f"floating-point scores {tuple(made.shape[::2])}, one a query and block"
                )
            place = here[part : part + step, None], stage.blocks
            worth[place] = torch.maximum(worth[place], found.to(worth.dtype))
        self.on_look(layer, worth)

    def ffn(self, layer: int, x: Tensor) -> None:
        """Add the SwiGLU feed-forward to x (T, C) in place, chunk by chunk."""
        c, w = self.config, self.weights.layers[layer]
        for part in x.split(self.chunk):
            gate, up = F.linear(F.rms_norm(part, (c.dim,), w.ffn_norm, c.norm_eps), w.w_gate_up).chunk(2, dim=-1)  # (t, F)
            part.addmm_(F.silu(gate).mul_(up), w.w_down.t())

    # ---- a boundary ---------------------------------------------------------------------

    def boundary(self, i: int, x: Tensor, flight: list[int]) -> tuple[Tensor, list[int]]:
        """Choose stage i's blocks, move rows out of and into x (T, C); return the new x and its blocks in flight."""
        kv, stage, b = self.kv, self.kv.stages[i], self.kv.block_len
        active = self.choose(i)
        kept = [block for block in flight if block in active]
        entering = sorted(active - stage.held - set(flight))  # pruned when the prompt came through, wanted now
        row = {block: j * b for j, block in enumerate(flight)}
        kv.stash(stage, {block: x[row[block] : row[block] + b] for block in flight if block not in active})
        revived = kv.fetch(stage, entering) if entering else None
        kv.activate(stage, active)
        if revived is None and len(kept) == len(flight):
            return x, flight
        row |= {block: len(x) + j * b for j, block in enumerate(entering)}
        flight_above = sorted(kept + entering)
        tail = torch.arange(len(flight) * b, len(x), device=kv.device)
        index = torch.cat([kv.spread([row[block] for block in flight_above]), tail])
        x = x if revived is None else torch.cat([x, revived])
        return x[index], flight_above

    def choose(self, i: int) -> set[int]:
        """Return the blocks to be active in stage i: the selection, or what is active if that overlaps enough."""
        kv, below, stage = self.kv, self.kv.stages[i - 1], self.kv.stages[i]
        if self.rule.sees == "weights":
            scores = stage.ring.amax(0)[below.blocks]  # (N,)
        else:
            keys = kv.block_keys(i - 1, below.layers[-1])  # (N, B, G, D)
            scores = self.rule.score(stage.ring, keys, below.blocks, self.unit_len)
        new = set(prune.select(scores, below.slots, stage.n_slots))
        last = {kv.tail_start // kv.block_len}  # always active, so it counts in the overlap
        if kv.length and prune.overlap(new | last, set(stage.slots) | last) >= self.gamma:
            new = set(stage.slots)
        self.on_select(i, below.slots, scores, new)
        return new
