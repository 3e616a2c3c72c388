"""Tests of the engine, on the CPU in a few minutes and on a CUDA device where there is one.

Models are tiny and random, made by `transformers`, so that the checkpoints are the real format.
What pruning computes is held against `Oracle`, a slow float64 program with plain dictionaries that
shares no line with the engine. Goldens of real tokenizers and of a real model need files that are
not part of this repository: $SLIM_TEST_DATA names their folder, and without it those tests say so
and skip. So does the test of SmolLM2 where it is not at hand and, without SLIM_REAL=1, not made.
"""

import dataclasses
import itertools
import json
import math
import os
import random
import re
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn.attention.bias import CausalBias

import kvcache
import model
import planning.checkpoint
import prune
import slim
from cli.options import DEMO
from conftest import (
    ATOL,
    DATA,
    DEVICES,
    FAMILIES,
    HERE,
    MASS,
    SLIM,
    conversation,
    draw,
    edit_json,
    go_on,
    load_three_stages,
    needs_cuda,
    needs_data,
    newest_of_weights,
    set_lookup_heads,
)
from kvcache import HostMemory, KVCache
from planning import schedule as schedules
from planning.settings import LOCAL_WINDOW

# ---- dense: transformers ----------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_dense_logits_are_those_of_transformers(checkpoints, family, device):
    """Every family, at lengths around a block and a chunk: what a checkpoint says is computed."""
    folder, reference = checkpoints[family]
    engine = slim.load(folder, device, dtype="float32", schedule="dense")
    for length in (1, 63, 64, 65, 997):
        ids = draw(length, seed=length)
        with torch.no_grad():
            want = reference(torch.tensor([ids])).logits[0, -1]
        for chunk in (1, 64, 100, length) if length < 100 else (64, 100, length):
            engine.model.chunk = chunk
            got = engine.prefill(ids)
            torch.testing.assert_close(got.cpu(), want, atol=ATOL[torch.float32], rtol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_decode_and_follow_up_continue_the_prefill(checkpoints, device):
    """Positions, masks and the KV go on where the last step ended, for one token as for many."""
    folder, reference = checkpoints["llama3.1-rope"]
    engine = slim.load(folder, device, dtype="float32", schedule={}, chunk=50)
    ids = draw(200)
    at = 100
    engine.prefill(ids[:at])
    for step in (1, 1, 1, 60, 1, 36):
        at += step
        got = engine.extend(ids[at - step : at])
        with torch.no_grad():
            want = reference(torch.tensor([ids[:at]])).logits[0, -1]
        torch.testing.assert_close(got.cpu(), want, atol=ATOL[torch.float32], rtol=0)


def test_greedy_generation_is_that_of_transformers(checkpoints):
    """The loop of steps, and not only each step."""
    folder, reference = checkpoints["qwen2-bias"]
    ids = draw(70)
    want = reference.generate(
        torch.tensor([ids]), max_new_tokens=20, do_sample=False, eos_token_id=None
    )[0, 70:].tolist()
    assert list(slim.load(folder, "cpu").generate(ids, 20)) == want


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_near_float32(checkpoints, dtype, device):
    """Sums and softmax are in float32; kept in half precision, errors would grow with length."""
    folder, reference = checkpoints["llama3-gqa"]
    engine = slim.load(folder, device, dtype=str(dtype)[6:], schedule="dense")
    with torch.no_grad():
        want = reference(torch.tensor([draw(300)])).logits[0, -1]
    for chunk in (64, 299, 300):  # joined from chunks, a row alone, all at once
        engine.model.chunk = chunk
        got = engine.prefill(draw(300))
        assert got.dtype == torch.float32
        torch.testing.assert_close(
            got.cpu(), want, atol=ATOL[dtype] * want.abs().max().item(), rtol=0
        )


@pytest.mark.parametrize("n_rows", [7, 130])  # a CPU attends with many rows in float32
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_newest_rows_is_the_plain_softmax(dtype, n_rows):
    """Both kernels' paths; flat attention is where a join in half precision was wrong by 0.015."""
    torch.manual_seed(0)
    q = (0.01 * torch.randn(n_rows, 6, 64)).to(dtype)
    k = (0.01 * torch.randn(4096, 2, 64)).to(dtype)
    v = torch.randn(4096, 2, 64) + 1
    v[4089:] += 40  # the newest few weigh little and say much
    v = v.to(dtype)
    mask = torch.arange(4096) <= torch.arange(4096 - n_rows, 4096)[:, None]
    logits = torch.einsum("tgrd,sgd->tgrs", q.double().view(n_rows, 2, 3, 64), k.double()) / 8
    weights = logits.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1)
    want = torch.einsum("tgrs,sgd->tgrd", weights, v.double()).flatten(1)
    atol = 1e-5 if dtype == torch.float32 else 9e-3  # near 1 two roundings to bfloat16 are 0.008
    grouped = model.by_group(q, k, v)
    for attend in (model.attend_causally, model.attend_on_cpu, model.attend_on_cuda):
        out = model.by_row(attend(*grouped))
        torch.testing.assert_close(out.double(), want, atol=atol, rtol=0)
    row = model.row_attention(q[-1:], k, v)
    torch.testing.assert_close(row.double(), want[-1:], atol=atol, rtol=0)
    rows = q[-1:].view(2, 1, 3, 64)  # the query heads of a KV head
    for n_parts in (2, 3):  # 4,096 keys are not three equal parts
        row, lse = model.attend_to_parts(rows, *grouped[1:], n_parts)
        torch.testing.assert_close(row.view(1, -1).double(), want[-1:], atol=atol, rtol=0)
        want_lse = logits[-1].logsumexp(-1)
        torch.testing.assert_close(lse.logsumexp(1).double(), want_lse, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        model.attention_weights(q, k).double(), weights.flatten(1, 2), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize(
    "threads, kv_heads, n_keys, want",
    [(2, 3, 4096, 2), (2, 4, 4096, 1), (16, 2, 4096, 4), (2, 3, 2000, 1)],
)
def test_every_thread_gets_as_many_keys_of_few_rows(monkeypatch, threads, kv_heads, n_keys, want):
    """With two KV heads and sixteen threads, fourteen would wait; short parts cost more."""
    made = []

    def to_parts(q, k, v, n_parts):
        made.append(n_parts)
        return torch.zeros_like(q), torch.zeros(q.shape[:3])

    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(model, "attend_to_parts", to_parts)
    k = torch.randn(n_keys + 5, kv_heads, 8)
    model.row_attention(torch.randn(1, 2 * kv_heads, 8), k, k)
    model.causal_attention(torch.randn(5, 2 * kv_heads, 8), k, k)
    model.causal_attention(torch.randn(1100, 2 * kv_heads, 8), k, k)  # enough for all threads
    assert made == ([want, want] if want > 1 else [])


def test_the_gpu_path_gives_the_kernel_grouped_views_and_no_written_mask(monkeypatch):
    """With enable_gqa, float32 falls to the math kernel, which builds all scores."""
    seen = {}

    def kernel(q, k, v, **options):
        seen.update(options, k=k)
        return q

    monkeypatch.setattr(model.F, "scaled_dot_product_attention", kernel)
    k = torch.randn(50, 2, 16)
    model.attend_on_cuda(*model.by_group(torch.randn(20, 8, 16), k, k))
    assert set(seen) == {"attn_mask", "k"}
    assert isinstance(seen["attn_mask"], CausalBias)  # a plain tensor would be a written-out mask
    assert seen["k"].shape == (2, 4, 50, 16)
    assert seen["k"].untyped_storage().data_ptr() == k.data_ptr()


# ---- pruned: the oracle -----------------------------------------------------------------


class Oracle:
    """What a pruned conversation computes, row by row in float64; a dictionary for everything."""

    def __init__(
        self,
        folder,
        schedule,
        block_len,
        unit_len,
        window=4,
        gamma=0.9,
        rule="paper",
        heads=(),
        revive_margin=0.0,
        revive_at_most=None,
        local=None,
    ):
        self.w = {name: t.double() for name, t in load_file(folder / "model.safetensors").items()}
        self.config = config = json.loads((folder / "config.json").read_text())
        self.schedule = schedule
        self.block_len = block_len
        self.unit_len = unit_len
        self.window = window
        self.gamma = gamma
        self.rule = rule  # "paper"; "peak"; "mass": sums of the boundary's layer, mean over heads;
        self.lookup_heads = heads  # "lookup": by these heads of each layer
        self.revive_margin = revive_margin
        self.revive_at_most = revive_at_most
        self.local = local  # (window, sinks, tile, last rows of the prompt that see everything)
        self.H = config["num_attention_heads"]
        self.G = config["num_key_value_heads"]
        self.L = config["num_hidden_layers"]
        self.D = config.get("head_dim") or config["hidden_size"] // self.H
        self.rope = config["rope_parameters"]
        self.R = int(self.D * self.rope.get("partial_rotary_factor", 1))
        turned = config.get("no_rope_layers") or [1] * self.L
        self.no_rope = [layer for layer in range(self.L) if not turned[layer]]
        self.kv = [{} for _ in range(self.L)]  # layer -> position -> (key, value)
        self.active = {}  # boundary -> blocks
        self.aux = {p: {} for p in schedule}  # boundary -> position -> hidden state
        self.newest = {p: [] for p in schedule}  # boundary -> what its newest queries found
        self.n = 0
        self.swaps = 0
        self.revived = 0

    # ---- positions

    def lay_out_rope(self, prompt):
        """Set RoPE's frequencies, in float32 as they are everywhere, and its scale."""
        pairs = torch.arange(self.R // 2, dtype=torch.float32)
        period = self.rope["rope_theta"] ** (2 * pairs / self.R)
        self.inv = 1 / period
        self.sharper = 1.0
        if self.rope["rope_type"] == "longrope":
            old = self.config["original_max_position_embeddings"]
            factors = self.rope["long_factor" if prompt > old else "short_factor"]
            self.inv = 1 / (torch.tensor(factors) * period)
            stretch = self.config["max_position_embeddings"] / old
            self.sharper = math.sqrt(1 + math.log(stretch) / math.log(old))
        if self.rope["rope_type"] == "yarn":
            factor = self.rope["factor"]
            first = max(0, math.floor(self.pair_that_turns(32)))  # beta_fast
            last = min(self.R - 1, math.ceil(self.pair_that_turns(1)))  # beta_slow
            keep = 1 - ((pairs - first) / (last - first)).clamp(0, 1)
            self.inv = 1 / (factor * period) * (1 - keep) + 1 / period * keep
            if "mscale" not in self.rope:  # where it is given, mscale_all_dim is as large
                self.sharper = 0.1 * math.log(factor) + 1

    def pair_that_turns(self, times):
        """Return the pair of dims (not rounded) that turns so often over the trained context."""
        wave = self.rope["original_max_position_embeddings"] / (2 * math.pi * times)
        return self.R * math.log(wave) / math.log(self.rope["rope_theta"]) / 2

    def turn(self, layer, x, position):
        if layer in self.no_rope:
            return x
        x1, x2 = x[:, : self.R].chunk(2, -1)
        angle = position * self.inv  # in float32
        cos = angle.cos() * self.sharper
        sin = angle.sin() * self.sharper
        return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos, x[:, self.R :]], -1)

    def louder(self, position):
        if "llama_4_scaling_beta" not in self.rope:
            return 1.0
        times = torch.tensor(1.0 + position // self.rope["original_max_position_embeddings"])
        return 1 + self.rope["llama_4_scaling_beta"] * times.log()  # in float32

    # ---- a layer

    def norm(self, x, name):
        return x / (x.square().mean() + self.config["rms_norm_eps"]).sqrt() * self.w[name]

    def heads(self, layer, kind, h):
        """Return the heads of q, k or v (kind) of one row h, before RoPE."""
        name = f"model.layers.{layer}.self_attn."
        if name + "qkv_proj.weight" in self.w:
            sizes = [self.H * self.D, self.G * self.D, self.G * self.D]
            y = (self.w[name + "qkv_proj.weight"] @ h).split(sizes)["qkv".index(kind)]
        else:
            y = self.w[f"{name}{kind}_proj.weight"] @ h + self.w.get(f"{name}{kind}_proj.bias", 0)
        y = y.view(-1, self.D)
        norm = f"{name}{kind}_norm.weight"
        return torch.stack([self.norm(row, norm) for row in y]) if norm in self.w else y

    def attend(self, layer, row, query):
        """Return what attention adds to a row; let the rule look at the weights of new rows."""
        keys = [key for key in self.kv[layer] if self.attends(layer, row, key)]
        k = torch.stack([self.kv[layer][key][0] for key in keys])  # (S, G, D)
        v = torch.stack([self.kv[layer][key][1] for key in keys])
        k = k.repeat_interleave(self.H // self.G, 1)  # (S, H, D)
        v = v.repeat_interleave(self.H // self.G, 1)
        scores = torch.einsum("hd,shd->hs", query, k) / math.sqrt(self.D)
        if self.local and self.boundary_below(layer) is None:
            for head in range(self.H):
                if self.rule != "lookup" or head not in self.lookup_heads[layer]:
                    near = [self.is_near(row, key) for key in keys]
                    scores[head, ~torch.tensor(near)] = -math.inf
        weights = scores.softmax(-1)
        if row >= self.start:
            self.look(layer, row, keys, weights)
        out = torch.einsum("hs,shd->hd", weights, v).flatten()
        name = f"model.layers.{layer}.self_attn.o_proj."
        return self.w[name + "weight"] @ out + self.w.get(name + "bias", 0)

    def attends(self, layer, row, key):
        if key > row:
            return False
        p = self.boundary_below(layer)
        return p is None or key >= self.tail or key // self.block_len in self.active[p]

    def is_near(self, row, key):
        """Return whether a row below the first boundary sees a key before it."""
        window, sinks, tile, last = self.local
        if row // tile >= (self.prompt - last) // tile:  # the last tiles, and what comes later
            return True
        return key < sinks or key >= row - row % tile - window

    def ffn(self, layer, h):
        name = f"model.layers.{layer}.mlp."
        if name + "gate_up_proj.weight" in self.w:
            gate, up = self.w[name + "gate_up_proj.weight"].chunk(2)
        else:
            gate = self.w[name + "gate_proj.weight"]
            up = self.w[name + "up_proj.weight"]
        return self.w[name + "down_proj.weight"] @ (F.silu(gate @ h) * (up @ h))

    # ---- what blocks are worth

    def look(self, layer, row, keys, weights):
        """Note what each block is worth to one query, from its weights (H, S) in one layer."""
        worth = self.worth[row]
        if self.rule == "lookup":
            for head in self.lookup_heads[layer]:
                self.look_up(layer, worth, keys, weights[head])
            return
        for j, key in enumerate(keys):
            block = key // self.block_len
            if self.rule == "mass":
                worth[block] = worth.get(block, 0.0) + float(weights[:, j].mean())
            else:
                worth[block] = max(worth.get(block, 0.0), float(weights[:, j].max()))

    def look_up(self, layer, worth, keys, weights):
        """Note the worth of blocks by one head's weights (S,): half weight, half contrast."""
        below = self.boundary_below(layer)
        blocks = set(range(self.last)) if below is None else self.active[below] - {self.last}
        best = dict.fromkeys(blocks, 1e-7)  # of each block
        end = dict.fromkeys(blocks, 1e-7)  # of its last 16 tokens
        for key, weight in zip(keys, weights.tolist()):
            block = key // self.block_len
            if block in blocks:
                best[block] = max(best[block], weight)
                if key % self.block_len >= self.block_len - 16:
                    end[block] = max(end[block], weight)
        ordered = sorted(best[block] for block in blocks - {0})
        usual = math.log(ordered[(len(ordered) - 1) // 2])
        for block in blocks:
            for other, weight in ((block, best[block]), (block + 1, end[block])):
                score = math.log(weight) - usual / 2
                worth[other] = max(worth.get(other, -math.inf), score)

    def paper_score(self, layer, block, query):
        """Return the largest, over units, mean over heads of |query . mean key| (query: (H, D))."""
        best = 0.0
        for start in range(block * self.block_len, (block + 1) * self.block_len, self.unit_len):
            keys = [self.kv[layer][j][0] for j in range(start, start + self.unit_len)]
            mean = sum(keys) / self.unit_len  # (G, D)
            dots = [abs(float(query[h] @ mean[h * self.G // self.H])) for h in range(self.H)]
            best = max(best, sum(dots) / self.H)
        return best

    def rank(self, p, candidates, k):
        """Return the best k of the candidates; the first and the last block always."""
        newest = self.newest[p]
        ends = {0, self.last}
        if self.rule == "paper":
            query = sum(newest) / len(newest)  # (H, D)
            scores = {b: self.paper_score(p - 1, b, query) for b in candidates - ends}
        else:
            lowest = -math.inf
            scores = {b: max(worth.get(b, lowest) for worth in newest) for b in candidates - ends}
        if self.rule == "lookup":
            n_recent = max(1, (k - 1) // 4)  # the newest blocks before the tail
            scores |= {b: math.inf for b in scores if b >= self.last - n_recent}
        ranked = sorted(scores, key=lambda b: (-scores[b], b))
        if self.start:
            held = self.held_back(p, scores, scores[ranked[k - 3]] if k > 2 else math.inf)
            ranked.sort(key=lambda b: b in held)
        return ends | set(ranked[: k - 2])

    def held_back(self, p, scores, last):
        """Return the blocks that would have to be revived, but are not worth it or too many."""
        lacking = [b for b in scores if b * self.block_len not in self.kv[p]]
        lacking.sort(key=lambda b: (-scores[b], b))
        held = {b for b in lacking if scores[b] < last + self.revive_margin}
        if self.revive_at_most is not None:
            n_new = min(self.window, self.n - self.n_drafted - self.start)
            held |= set(lacking[self.revive_at_most * n_new :])
        return held

    # ---- a boundary

    def boundary_below(self, layer):
        return max((p for p in self.schedule if p <= layer), default=None)

    def boundary(self, p, x, queries):
        found = queries
        if self.rule != "paper":
            found = {row: dict(worth) for row, worth in self.worth.items()}
        certain = self.n - self.n_drafted
        newest = max(self.start, certain - self.window)  # older rows only survived, and ask nothing
        asking = [found[row] for row in sorted(found) if newest <= row < certain]
        self.newest[p] = (self.newest[p] + asking)[-self.window :]
        self.late[p] = [found[row] for row in sorted(found) if row >= certain]
        below = self.boundary_below(p - 1)
        candidates = set(range(self.last + 1)) if below is None else self.active[below]
        k = max(2, self.schedule[p] // self.block_len)
        new = set(candidates)
        if len(candidates) > k and self.schedule[p] < self.prompt:
            new = self.rank(p, candidates, k)
        old = self.active.get(p)
        if old is None:
            self.active[p] = new
        elif len(new & old) / len(new) < self.gamma:
            self.active[p] = new
            self.swaps += len(new - old)
        for row in list(x):
            if row < self.tail and row // self.block_len not in self.active[p]:
                self.aux[p][row] = x.pop(row)
        for block in self.active[p] - {self.last}:
            rows = range(block * self.block_len, (block + 1) * self.block_len)
            if rows[0] not in self.kv[p] and rows[0] not in x:
                self.revived += 1
                x |= {row: self.aux[p].pop(row) for row in rows}

    # ---- a step

    def step(self, ids, n_drafted=0):
        """Run new tokens through all layers; return the logits after the last.

        The last n_drafted do not choose blocks, but count for the next step's choice.
        """
        self.start = self.n
        self.n_drafted = n_drafted
        self.late = {}
        if self.start == 0:
            self.prompt = len(ids)
            self.last = (len(ids) - 1) // self.block_len  # block
            self.tail = self.last * self.block_len
            self.lay_out_rope(len(ids))
        self.n += len(ids)
        embed = self.w["model.embed_tokens.weight"]
        x = {self.start + i: embed[token] for i, token in enumerate(ids)}
        self.worth = {row: {} for row in x}  # row -> block -> worth
        for layer in range(self.L):
            name = f"model.layers.{layer}."
            if self.rule == "mass":  # worth in this layer alone; rows that left say nothing
                self.worth = {row: {} for row in self.worth}
            queries = {}
            for row in x:
                h = self.norm(x[row], name + "input_layernorm.weight")
                q, k, v = (self.heads(layer, kind, h) for kind in "qkv")
                queries[row] = self.turn(layer, q, row) * self.louder(row)
                self.kv[layer][row] = self.turn(layer, k, row), v
            for row in x:
                x[row] = x[row] + self.attend(layer, row, queries[row])
            if layer + 1 in self.schedule:
                self.boundary(layer + 1, x, queries)
            for row in x:
                h = self.norm(x[row], name + "post_attention_layernorm.weight")
                x[row] = x[row] + self.ffn(layer, h)
        for p, found in self.late.items():
            self.newest[p] = (self.newest[p] + found)[-self.window :]
        head = self.w.get("lm_head.weight", embed)
        return head @ self.norm(x[self.n - 1], "model.norm.weight")


CASES = [  # schedule, gamma, prompt, least swaps and revivals that make the case worth its time
    ({1: 64, 2: 40, 3: 24}, 0.9, 150, 50, 10),
    ({1: 120, 2: 96, 4: 80}, 0.9, 145, 50, 5),  # enough blocks for gamma to keep a set
    ({2: 64, 4: 40}, 0.5, 160, 10, 5),  # full last block, gaps between boundaries
    ({1: 64, 2: 40, 3: 24}, 1.0, 137, 50, 10),  # last block of one row
]


def compare(oracle, engines, ids, ends):
    """Go on with a conversation, in steps that end at `ends`, on the oracle and on engines."""
    for end in ends:
        part = ids[oracle.n : end]
        first = oracle.n == 0
        want = oracle.step(part)
        for engine in engines:
            got = engine.prefill(part) if first else engine.extend(part)
            torch.testing.assert_close(got, want, atol=1e-10, rtol=0)
    for engine in engines:
        assert engine.stats["swaps"] == oracle.swaps
        assert engine.stats["revived"] == oracle.revived


@pytest.mark.parametrize("rule", ["paper", "peak", MASS], ids=["paper", "peak", "mass"])
@pytest.mark.parametrize("schedule, gamma, prompt, swaps, revived", CASES)
def test_pruned_prefill_decode_and_follow_up_are_those_of_the_oracle(
    tiny, schedule, gamma, prompt, swaps, revived, rule
):
    """The method itself: scores, choices, exchanges, revivals; rows in chunks and all at once."""
    oracle = Oracle(tiny, schedule, 8, 4, gamma=gamma, rule=getattr(rule, "name", rule))
    settings = dict(block_len=8, unit_len=4, window=4, gamma=gamma)
    engines = [
        slim.load(tiny, "cpu", "float64", schedule, rule, chunk=chunk, **settings)
        for chunk in (7, 0)
    ]
    ends = [*range(prompt, prompt + 25), prompt + 34, prompt + 35, prompt + 36]
    compare(oracle, engines, draw(prompt + 36, seed=prompt), ends)
    if rule != "paper":
        swaps, revived = 1, 0  # the other rules change their choice less often
    assert oracle.swaps >= swaps and oracle.revived >= revived


LOOKUP_HEADS = (0, 3), (), (1,), (2, 3), ()  # of each layer


@pytest.mark.parametrize("revive", [(0.0, None), (0.1, 1), (0.2, None)])
@pytest.mark.parametrize("window", [4, 20])  # within the prompt's last block, and beyond it
@pytest.mark.parametrize("schedule, gamma, prompt, swaps, revived", CASES)
def test_lookup_heads_choose_as_the_oracle_does(
    tiny, schedule, gamma, prompt, swaps, revived, window, revive
):
    """The default rule: few heads of few layers, contrast within a row, the next block."""
    revive = dict(zip(("revive_margin", "revive_at_most"), revive))
    rule = dataclasses.replace(prune.RULES["lookup"], heads=LOOKUP_HEADS, **revive)
    oracle = Oracle(tiny, schedule, 8, 4, window, gamma, "lookup", LOOKUP_HEADS, **revive)
    settings = dict(block_len=8, unit_len=4, window=window, gamma=gamma)
    engines = [
        slim.load(tiny, "cpu", "float64", schedule, rule, chunk=chunk, **settings)
        for chunk in (7, 0)
    ]
    ends = [*range(prompt, prompt + 25), prompt + 34, prompt + 35, prompt + 36]
    compare(oracle, engines, draw(prompt + 36, seed=prompt), ends)
    assert oracle.swaps > 0 or gamma < 0.9  # else most choices are near enough to stay


LOCALS = (24, 8), (1, 0), (5, 20), (1000, 8)  # window, sinks
CHUNKS = 1, 7, 64, 300, 4096


@pytest.mark.parametrize("rule", ["peak", "lookup"])
@pytest.mark.parametrize("window, sinks", LOCALS)
def test_local_attention_is_that_of_the_oracle_in_any_chunks(
    tiny, window, sinks, rule, monkeypatch
):
    """What rows of the prompt see is fixed by their positions; lookup heads see everything."""
    tile = 16
    last = 40
    monkeypatch.setattr(model, "TILE", tile)
    monkeypatch.setattr(planning.checkpoint, "LAST_ROWS", last)
    schedule, gamma, prompt, *_ = CASES[2]
    local = (window, sinks, tile, last)
    oracle = Oracle(tiny, schedule, 8, 4, 4, gamma, rule, LOOKUP_HEADS, local=local)
    settings = dict(block_len=8, unit_len=4, window=4, gamma=gamma)
    settings |= dict(local_window=window, sinks=sinks)
    if rule == "lookup":
        every = dict(revive_margin=0.0, revive_at_most=None)
        rule = dataclasses.replace(prune.RULES["lookup"], heads=LOOKUP_HEADS, **every)
    engines = [
        slim.load(tiny, "cpu", "float64", schedule, rule, chunk=chunk, **settings)
        for chunk in CHUNKS
    ]
    compare(oracle, engines, draw(prompt + 20, seed=7), [*range(prompt, prompt + 6), prompt + 20])
    n_local = (prompt - last) // tile * tile
    assert all(engine.stats["local_rows"] == n_local > 100 for engine in engines)
    full = slim.load(tiny, "cpu", "float64", schedule, rule, **settings | dict(local_window=0))
    differs = (full.prefill(draw(prompt)) - engines[0].prefill(draw(prompt))).abs().max() > 1e-3
    assert differs == (window < 1000)  # the longest window reaches back to the beginning


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window, sinks", [(256, 64), (300, 0), (1, 500)])
def test_local_attention_is_a_softmax_over_what_a_row_sees(device, dtype, window, sinks):
    """Tiles that a chunk cuts, sinks that meet the window, rows that see everything at its end."""
    torch.manual_seed(0)
    n, n_local = 2300, 1792
    q = torch.randn(n, 6, 64).to(device, dtype)
    k, v = torch.randn(2, 2, n, 64).to(device, dtype).transpose(1, 2)
    row = torch.arange(n)[:, None]
    key = torch.arange(n)
    near = (key < sinks) | (key >= row // 256 * 256 - window) | (row >= n_local)
    far = torch.tensor([head in (1, 5) for head in range(6)])[:, None, None]
    mask = (near | far) & (key <= row)  # (H, n, n)
    kk, vv = (x.double().cpu().repeat_interleave(3, 1).transpose(0, 1) for x in (k, v))
    qq = q.double().cpu().transpose(0, 1)
    want = F.scaled_dot_product_attention(qq, kk, vv, attn_mask=mask).transpose(0, 1).flatten(1)
    local = model.Local(window, sinks)
    parts = []
    for start, stop in itertools.pairwise((0, 100, 700, 2000, n)):
        part = model.local_attention(q[start:stop], k[:stop], v[:stop], n_local, local, (1, 5))
        parts.append(part)
    atol = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(torch.cat(parts).double().cpu(), want, atol=atol, rtol=0)


def test_where_lookup_heads_made_the_schedule_the_prompt_is_read_locally(tiny, monkeypatch):
    """Nowhere else by itself: nothing is known of other schedules, and `paper` is the paper's."""

    def window(**options):
        return slim.Checkpoint.open(tiny, "cpu", **options).local.window

    set_lookup_heads(monkeypatch, (1, 0), (1, 3))
    assert window() == LOCAL_WINDOW
    for options in (
        *(dict(schedule=schedule) for schedule in ("dense", "paper", {2: 1 / 4})),
        *(dict(score=score) for score in ("paper", "peak", MASS)),
    ):
        assert window(**options) == 0
        assert window(**options, local_window=300) == 300
    assert window(local_window=0) == 0
    engine = slim.load(tiny, "cpu")
    for schedule, n, n_local in ((None, 2000, 1280), (None, 1023, 0), ({2: 1 / 4}, 2000, 0)):
        engine.prefill(draw(n), schedule=schedule)
        assert engine.stats["local_rows"] == n_local
    wide = slim.load(tiny, "cpu", window=900)  # the rows that rank the blocks see everything
    wide.prefill(draw(2000))
    assert wide.stats["local_rows"] == 1024
    set_lookup_heads(monkeypatch)
    assert window() == 0  # the probe found none


DRAFTING = [  # schedule, gamma, rule, window
    ({}, 1.0, "peak", 4),
    ({1: 64, 2: 40, 3: 24}, 0.9, "paper", 4),
    ({1: 64, 2: 40, 3: 24}, 1.0, "peak", 4),
    ({2: 64, 4: 40}, 1.0, "lookup", 20),
    ({1: 64, 3: 32}, 1.0, "peak", 1),
]


@pytest.mark.parametrize("schedule, gamma, rule, window", DRAFTING)
@hypothesis_settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_drafted_tokens_count_once_accepted_and_leave_nothing_if_not(
    tiny, tmp_path_factory, schedule, gamma, rule, window, seed
):
    """The oracle never sees a rejected token, nor lets an accepted one choose in its own step."""
    rng = random.Random(seed)
    heads = LOOKUP_HEADS if rule == "lookup" else ()
    # without a margin, blocks come back in most steps, and a drafted token may bring none
    limits = dict(revive_margin=0.0, revive_at_most=1) if heads else {}
    score = dataclasses.replace(prune.RULES["lookup"], heads=heads, **limits) if heads else rule
    oracle = Oracle(tiny, schedule, 8, 4, window, gamma, rule, heads, **limits)
    settings = dict(block_len=8, unit_len=4, window=window, gamma=gamma, chunk=rng.choice((3, 0)))
    engine = slim.load(tiny, "cpu", "float64", schedule, score, **settings)
    ids = draw(400, seed)
    compare(oracle, [engine], ids, [150])
    for _ in range(12):
        n_certain = rng.choice((1, 1, 1, 2, 7))
        n_accepted = rng.randrange(5)
        certain = ids[oracle.n : oracle.n + n_certain]
        accepted = ids[oracle.n + n_certain :][:n_accepted]
        want = oracle.step(certain + accepted, n_accepted)
        got = engine.extend(certain, draft=accepted + draw(rng.randrange(5), rng.random()))
        for token in accepted:
            engine.pending = rng.choice(([], [token]))  # `generate` has it pending, others do not
            engine.accept()
        got = got[n_accepted] if got.ndim == 2 else got
        torch.testing.assert_close(got, want, atol=1e-10, rtol=0)
        assert engine.ids == ids[: oracle.n] and engine.kv.length == oracle.n
    file = tmp_path_factory.mktemp("drafting") / "talk.slim"
    engine.save(file)
    engine.resume(file)
    compare(oracle, [engine], ids, range(oracle.n + 1, oracle.n + 4))
    assert oracle.swaps > 0 or heads or not schedule  # `lookup` swaps seldom


def test_only_what_was_drafted_is_accepted(tiny):
    """Else ids and keys would differ in number, and a saved conversation could not be resumed."""
    engine = slim.load(tiny, "cpu", schedule="dense")
    engine.prefill(draw(50), room=20)
    engine.extend([5], draft=[7, 8])
    engine.pending = [8]
    with pytest.raises(ValueError, match=r"goes on with \[7\] and \[8\] is pending"):
        engine.accept()
    engine.pending = []
    engine.accept()
    assert engine.ids[-2:] == [5, 7] and engine.kv.length == len(engine.ids) == 52
    for leave in (lambda: engine.rewind(51), lambda: engine.extend([1]), engine.accept):
        leave()
        with pytest.raises(ValueError, match=r"goes on with \[\]"):
            engine.accept()
        engine.extend([5], draft=[7])


OTHERS = "qwen3", "qwen3-bias", "mistral", "ministral3", "smollm3", "phi3", "phi3-longrope", "yarn"
SHAPES = (1, 8, 8), (11, 8, 2), (3, 12, 4)  # window, block_len, unit_len


@pytest.mark.parametrize(
    "family, rule, shape",
    [
        *itertools.product(("llama3-gqa", "llama2-mha", "qwen2-bias"), ("paper", "peak"), SHAPES),
        *((family, "peak", (8, 8, 8)) for family in OTHERS),
    ],
)
def test_other_models_windows_and_blocks_are_those_of_the_oracle_too(
    checkpoints, tmp_path, family, rule, shape
):
    """Grouped heads, biases, norms and positions meet pruning; a resumed conversation goes on."""
    folder = checkpoints[family][0]
    window, block_len, unit_len = shape
    schedule = {1: 8 * block_len, 3: 5 * block_len}
    oracle = Oracle(folder, schedule, block_len, unit_len, window, 1.0, rule)

    def load():
        settings = dict(window=window, block_len=block_len, unit_len=unit_len, gamma=1.0)
        return slim.load(folder, "cpu", "float64", schedule, rule, **settings)

    prompt = 131
    ids = draw(prompt + 30, seed=window)
    engine = load()
    compare(oracle, [engine], ids, range(prompt, prompt + 7))
    engine.save(tmp_path / "talk.slim")
    engine = load()
    engine.resume(tmp_path / "talk.slim")
    compare(oracle, [engine], ids, [*range(prompt + 7, prompt + 12), prompt + 25, prompt + 26])
    assert oracle.swaps > 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "prompt, schedule", [(150, {1: 160, 2: 152, 3: 150}), (144, {2: 10**6, 3: 144}), (3, {1: 16})]
)
def test_budgets_that_cover_the_prompt_give_the_dense_logits_bit_for_bit(
    tiny, device, prompt, schedule, monkeypatch
):
    """A schedule that prunes nothing takes the dense path; nobody pays for what does not happen."""
    monkeypatch.setattr(model, "TILE", 16)
    monkeypatch.setattr(planning.checkpoint, "LAST_ROWS", 8)
    options = dict(block_len=8, unit_len=4)
    slim_ = slim.load(tiny, device, schedule=schedule, local_window=16, **options)
    dense = slim.load(tiny, device, schedule="dense", **options)
    assert torch.equal(conversation(slim_, draw(prompt))[0], conversation(dense, draw(prompt))[0])


@pytest.mark.parametrize("device", DEVICES)
def test_copies_and_memory_change_nothing_and_chunks_only_rounding(tiny, device, monkeypatch):
    """Where and when things are copied, and how rows are cut, must not show in an answer."""

    def talk(**settings):
        return conversation(load_three_stages(tiny, device, **settings), draw(150))

    logits, tokens = talk()
    assert torch.equal(talk(overlap=False)[0], logits)
    monkeypatch.setattr(kvcache, "PIECE_BYTES", 1)  # host memory grows at every swap
    monkeypatch.setattr(kvcache, "BLOCKS_PER_COPY", 1)
    assert torch.equal(talk()[0], logits)
    for chunk in (1, 13, 64, 1000):
        again, same = talk(chunk=chunk)
        assert same == tokens
        torch.testing.assert_close(again, logits, atol=ATOL[torch.float32], rtol=0)


def test_prefill_makes_no_tensor_that_grows_with_the_square_of_the_prompt(tiny):
    """One T x T mask of a 128k prompt would be 16 GiB."""
    engine, t = slim.load(tiny, "cpu", chunk=32, schedule={2: 512}, window=8), 4000
    engine.prefill(draw(64))
    with torch.profiler.profile(profile_memory=True) as profile:
        engine.prefill(draw(t))
    biggest = max(event.self_cpu_memory_usage for event in profile.events())
    assert (
        t * 32 < biggest < t * t / 8
    )  # bytes: a slab, the hidden states, a chunk's mask; one T x T mask is t * t


# ---- ranking ----------------------------------------------------------------------------


def test_selection_keeps_the_sink_and_breaks_ties_to_the_lower_block():
    """Ties are common (zeros, half precision); all ranks and devices must break them alike."""
    scores = torch.tensor([1.0, 5.0, 5.0, 0.0, 5.0])
    assert prune.select(scores, [7, 4, 2, 0, 3], 3) == [0, 2, 3]
    assert prune.select(torch.ones(3000), list(range(3000))[::-1], 1000) == list(range(1000))
    with pytest.raises(ValueError, match="scores"):
        prune.check_scores(scores[:3], 4)
    with pytest.raises(ValueError, match="NaN"):
        prune.check_scores(scores * torch.nan, 5)


def test_few_pruned_blocks_come_back_and_the_best_first():
    """A revived block costs as much as 64 tokens, so a token brings back one that is worth it."""
    scores = torch.tensor([0.0, 0.7, 0.4, 0.9, 0.6])
    lacking = torch.tensor([False, True, True, True, False])

    def chosen(k, n_new=1, **limits):
        rule = prune.Rule("few", len, **limits)
        return prune.select(scores, [0, 1, 2, 3, 4], k, lacking, rule, n_new)

    assert chosen(3) == [0, 1, 3]
    assert chosen(3, revive_at_most=1) == [0, 3, 4]
    assert chosen(3, 2, revive_at_most=1) == [0, 1, 3]
    assert chosen(3, revive_margin=0.1) == [0, 3, 4]  # above 0.7, which would be the last
    assert chosen(4, revive_at_most=1) == [0, 1, 3, 4]  # slots are always full


def test_a_score_is_the_best_units_mean_over_heads():
    """The paper's formula, written out."""
    q, keys = torch.randn(4, 4, 8), torch.randn(6, 16, 2, 8)
    got = prune.paper(q, keys, torch.arange(6), unit_len=4)
    for n in range(6):
        units = [keys[n, u : u + 4].mean(0) for u in range(0, 16, 4)]
        want = max(sum(abs(q.mean(0)[h] @ unit[h // 2]) for h in range(4)) / 4 for unit in units)
        torch.testing.assert_close(got[n], want)


def newest_of_keys(queries, keys, blocks, unit_len):
    return blocks.float()


@pytest.mark.parametrize("score", [newest_of_weights, prune.Rule("", newest_of_keys, sees="keys")])
def test_a_scoring_function_of_ones_own_decides(tiny, score):
    """What the README promises about rules, for weights and for keys."""
    engine = slim.load(tiny, "cpu", schedule={2: 192}, score=score)
    engine.prefill(draw(640))
    assert engine.kv.stages[1].slots == [0, 8]


def test_a_rule_without_a_name_cannot_be_saved_and_one_that_returns_another_shape_is_refused(
    tiny, tmp_path
):
    """A wrong rule is refused in one line, before it silently ranks by something else."""
    engine = slim.load(tiny, "cpu", schedule={2: 192}, score=newest_of_weights)
    engine.prefill(draw(640))
    with pytest.raises(ValueError, match="give it one"):
        engine.save(tmp_path / "talk.slim")
    engine = slim.load(tiny, "cpu", schedule={2: 192}, score=lambda weights: weights.sum())
    with pytest.raises(ValueError, match=r"must return\s+floating-point scores"):
        engine.prefill(draw(640))
    for score in ("peek", 5):
        with pytest.raises(ValueError, match="peak, paper"):
            slim.load(tiny, "cpu", score=score)
    for wrong in (
        dict(sees="values"),
        dict(score=5),
        dict(window=0),
        dict(window=1.5),
        dict(gamma=float("nan")),
        dict(gamma=5),
    ):
        with pytest.raises(ValueError, match="rule 'x'"):
            prune.Rule(**{"name": "x", "score": print} | wrong)
    with pytest.raises(ValueError, match="built-in"):
        slim.load(tiny, "cpu", score=prune.Rule("peak", newest_of_weights))


@pytest.mark.parametrize(
    "n_prompt", [640, 641, 645]
)  # a full last block, and ones shorter than the window
@pytest.mark.parametrize("few, window", [(1, 8), (3, 8), (3, 100), (50, 100)])
def test_weights_made_for_few_rows_at_a_time_choose_the_same(
    tiny, monkeypatch, n_prompt, few, window
):
    """Long prompts rank in parts of 16 MiB; the choice must not depend on the parts."""
    ids, made, settings = (
        draw(n_prompt),
        [],
        dict(schedule={2: 192, 4: 128}, window=window, chunk=3),
    )
    want = slim.load(tiny, "cpu", **settings)
    want_logits, attention_weights = want.prefill(ids), model.attention_weights
    monkeypatch.setattr(model, "rows_at_once", lambda heads, keys: few)
    monkeypatch.setattr(
        model, "attention_weights", lambda q, k: made.append(len(q)) or attention_weights(q, k)
    )
    got = slim.load(tiny, "cpu", **settings)
    torch.testing.assert_close(got.prefill(ids), want_logits, atol=1e-5, rtol=0)
    assert [s.slots for s in got.kv.stages] == [s.slots for s in want.kv.stages] and max(
        made
    ) == few


# ---- generation -------------------------------------------------------------------------


def test_sampling_is_repeatable_and_within_top_p(tiny):
    """A seed means the same answer; a token outside top_p never comes."""
    engine = slim.load(tiny, "cpu")
    draws = [
        list(engine.generate(draw(20), 15, temperature=2.0, top_p=0.9, seed=s)) for s in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]
    logits = torch.log(torch.tensor([0.6, 0.3, 0.1]))
    g = torch.Generator().manual_seed(0)
    assert {slim.sample(logits, 1.0, 0.6, g) for _ in range(50)} == {0}
    assert {slim.sample(logits, 1.0, 0.61, g) for _ in range(50)} == {0, 1}
    assert slim.sample(logits, 0.0, 1.0, g) == 0


STORY = draw(25) * 3  # a text that repeats itself, so that something can be looked up


class Guesses:
    """Drafts of an answer that is known, sometimes right for a while, in place of a lookup."""

    def __init__(self, answer):
        self.n = 0
        self.answer = answer
        self.rng = random.Random(len(answer))

    def add(self, token, accepted):
        self.n += 1

    def draft(self, most):
        right = self.answer[self.n :][: self.rng.randrange(6)]
        return (right + draw(self.rng.randrange(3), self.n))[:most]


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_drafts_change_no_answer(tiny, monkeypatch, temperature):
    """Greedy or sampled, of any length: the same tokens from fewer steps."""
    engine = slim.load(tiny, "cpu", "float64", "dense")
    sampling = dict(temperature=temperature, top_p=0.9, seed=3)
    want = list(engine.generate(STORY, 40, draft=0, **sampling))
    assert engine.stats["drafted"] == 0
    if temperature == 0:
        assert list(engine.generate(STORY, 40, draft=16)) == want
        assert engine.stats["accepted"] > 0
    monkeypatch.setattr(slim, "Drafter", lambda *_: Guesses(want))
    for n, draft in ((40, 1), (40, 3), (40, 16), (40, None), (1, 16), (2, 16), (7, 16), (39, 16)):
        steps = engine.steps
        assert list(engine.generate(STORY, n, draft=draft, **sampling)) == want[:n]
        assert engine.ids == STORY + want[: n - 1] and engine.kv.length == len(engine.ids)
        stats = engine.stats
        assert n < 9 or 0 < stats["accepted"] < stats["drafted"]
        assert engine.steps - steps == n - stats["accepted"]


def test_an_answer_whose_conversation_was_dropped_says_so(tiny):
    """It cannot go on; the line must say why."""
    engine = slim.load(tiny, "cpu")
    answer = engine.generate(draw(50), 5)
    next(answer)
    engine.forget()
    with pytest.raises(ValueError, match="used while it generated"):
        next(answer)


def test_an_answer_that_stops_amid_a_draft_goes_on_from_what_was_said(tiny, tmp_path, monkeypatch):
    """Tokens that were run ahead, and neither said nor kept, must not be in the conversation."""
    engine = slim.load(tiny, "cpu", "float64", "dense")
    want = list(engine.generate(STORY, 20, draft=0))
    monkeypatch.setattr(slim, "Drafter", lambda *_: Guesses(want))
    for n in range(1, 12):
        answer = engine.generate(STORY, 20)
        assert [next(answer) for _ in range(n)] == want[:n]
        engine.save(tmp_path / "talk.slim")
        assert next(answer) == want[n]  # a save changes nothing
        assert engine.ids + engine.pending == STORY + want[: n + 1]
        after = engine.extend([1, 2, 3])
        with pytest.raises(ValueError, match="used while it generated"):
            next(answer)
        engine.rewind(len(STORY))
        torch.testing.assert_close(engine.extend(want[: n + 1] + [1, 2, 3]), after)
        engine.resume(tmp_path / "talk.slim")
        torch.testing.assert_close(engine.extend([want[n], 1, 2, 3]), after)
    for stop in want:
        engine.ckpt.stop.add(stop)
        assert list(engine.generate(STORY, 20)) == want[: want.index(stop)]
        engine.ckpt.stop.clear()


def test_a_follow_up_sees_the_last_generated_token(tiny):
    """The last token is yielded before it is run; a follow-up must not skip it."""
    engine, other = slim.load(tiny, "cpu"), slim.load(tiny, "cpu")
    answer = list(engine.generate(draw(20), 5))
    assert engine.stats["tokens"] == 24  # the fifth is yielded, but not run before it is needed
    other.prefill(draw(20) + answer)
    torch.testing.assert_close(engine.extend([1, 2, 3]), other.extend([1, 2, 3]), atol=1e-4, rtol=0)


def test_generation_ends_before_any_stop_token(tiny, tmp_path):
    """A missed stop token lets an answer run on into the next turn."""
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokens = list(slim.load(tiny, "cpu").generate(draw(20), 10))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [63, tokens[4]]}))
    assert (
        list(slim.load(tmp_path, "cpu").generate(draw(20), 10)) == tokens[: tokens.index(tokens[4])]
    )
    end, other = {"content": "END", "id": 5}, {"content": "other", "id": 6}
    for name, value in ("tokenizer.json", {"added_tokens": [other, end]}), ("x", {}):
        decoder = {"added_tokens_decoder": {"6": other, "5": end}} if name == "x" else {}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "END"} | decoder))
        (tmp_path / name).write_text(json.dumps(value))
        assert slim.load(tmp_path, "cpu").ckpt.stop == {63, tokens[4], 5}  # of all files
        edit_json(tmp_path / "generation_config.json", eos_token_id="remove")
        edit_json(tmp_path / "config.json", eos_token_id=7)
        assert slim.load(tmp_path, "cpu").ckpt.stop == {
            5,
            7,
        }  # the config's, and the one the template ends turns with
        edit_json(tmp_path / "generation_config.json", eos_token_id=[63, tokens[4]])
        edit_json(tmp_path / "config.json", eos_token_id="remove")
        (tmp_path / "tokenizer.json").unlink(missing_ok=True)


def test_a_broken_off_step_is_not_extended(tiny):
    """After Ctrl-C the KV is half written; going on would give wrong logits silently."""
    engine = slim.load(tiny, "cpu")
    with pytest.raises(ValueError, match="prefill"):
        engine.extend([1])
    engine.prefill([1, 2, 3])

    def interrupt(layer, n_rows):
        raise KeyboardInterrupt

    engine.model.on_chunk = interrupt
    with pytest.raises(KeyboardInterrupt):
        engine.extend([1])
    engine.model.on_chunk = lambda *_: None
    with pytest.raises(ValueError, match="prefill"):
        engine.extend([1])
    engine.prefill([1, 2, 3])


def test_going_back_to_the_prompt_forgets_what_came_after(tiny):
    """Bit for bit, with all blocks active: only forgotten tokens could make a difference."""
    engine, other = (
        slim.load(tiny, "cpu", schedule="dense"),
        slim.load(tiny, "cpu", schedule="dense"),
    )
    with pytest.raises(ValueError, match="prefill"):
        engine.rewind()
    engine.prefill(draw(100))
    go_on(engine, draw(30, seed=1))
    engine.rewind()
    other.prefill(draw(100))
    assert torch.equal(go_on(engine, draw(9, seed=2)), go_on(other, draw(9, seed=2)))
    assert engine.ids[:109] == draw(100) + draw(9, seed=2)
    answer = engine.generate([1], 5, follow_up=True)
    next(answer)
    engine.rewind()
    with pytest.raises(ValueError, match="used while it generated"):
        list(answer)
    for wrong in (99.5, "99", True):
        with pytest.raises(ValueError, match="cannot rewind"):
            engine.rewind(wrong)
    assert engine.kv.length == len(engine.ids) == 100


def test_going_back_by_default_keeps_the_whole_prompt(tiny):
    """The end that is never pruned belongs to the prompt too; after going back further, so far."""
    engine = slim.load(tiny, "cpu", schedule={2: 64}, block_len=8, unit_len=4)
    engine.prefill(draw(150), keep_last=50)
    assert engine.stats["prompt_tokens"] == 150 and engine.stats["kept"] == [150, 110]
    engine.extend(draw(9, seed=1))
    engine.rewind()
    assert engine.ids == draw(150)
    engine.rewind(120)
    engine.extend([1])
    engine.rewind()
    assert engine.ids == draw(150)[:120]


def test_room_for_a_long_answer_is_taken_as_it_is_written(tiny, monkeypatch):
    """A client that allows 32,768 tokens and gets a short answer pays for a short one."""
    monkeypatch.setattr(kvcache, "ROOM_AT_ONCE", 70)
    engine = slim.load(tiny, "cpu", schedule="dense")
    want = list(slim.load(tiny, "cpu", schedule="dense").generate(draw(20), 200))
    got = engine.generate(draw(20), 30_000)
    assert [next(got) for _ in want] == want  # the tail grew once on the way
    assert 220 <= engine.kv.tail_rows < 300
    assert engine.kv.planned == 30_020  # LongRoPE's factors follow the answer that was allowed


def test_a_rewound_engine_chooses_by_new_queries_alone(tiny):
    """Queries of forgotten tokens must not choose the blocks of the next question."""
    engine = slim.load(tiny, **SLIM | dict(gamma=1.0, window=8))
    engine.prefill(draw(150))
    go_on(engine, draw(30, seed=1))
    engine.rewind()
    assert all(stage.newest is None for stage in engine.kv.stages) and engine.stats["tokens"] == 150
    other = slim.load(tiny, **SLIM | dict(gamma=1.0, window=8))
    other.prefill(draw(150))
    engine.extend(draw(9, seed=2)), other.extend(draw(9, seed=2))
    # those above see what was chosen below before
    assert set(engine.kv.stages[1].slots) == set(other.kv.stages[1].slots)


def test_only_ids_of_the_vocabulary_are_run(tiny):
    """An id outside the embedding would be a crash on a CPU and garbage on a GPU."""
    engine = slim.load(tiny, "cpu")
    for ids, match in (
        ([1, 64], "64"),
        ([-1], "-1"),
        ([], "no token ids"),
        ("123", "flat list"),
        ([1.0], "flat list"),
        ([True], "flat list"),
        ([[1]], "flat list"),
        (None, "flat list"),
        (torch.ones(2, 1), "flat list"),
    ):
        with pytest.raises(ValueError, match=match):
            engine.prefill(ids)
    assert torch.equal(engine.prefill(torch.tensor([1, 2])), engine.prefill([1, 2]))


@pytest.mark.parametrize("tail", [-5, 1.5, "x"])
def test_a_tail_that_is_no_number_of_tokens_is_refused(tiny, tail):
    """A negative tail would prune what is to be kept."""
    with pytest.raises(ValueError, match="keep_last is"):
        slim.load(tiny, "cpu").prefill(draw(100), keep_last=tail)
    with pytest.raises(ValueError, match="keep_last is"):
        slim.load(tiny, "cpu").generate(
            draw(100), 5, keep_last=tail
        )  # at once, not when the first token is asked for


def test_longrope_counts_the_tail_and_the_answer(checkpoints):
    """Long factors or short: one choice for a conversation, whatever part of it is in the tail."""
    engine = slim.load(checkpoints["phi3-longrope"][0], "cpu", "float32", "dense")
    n = int(engine.config.rope_scaling["original_max_position_embeddings"])
    ids = draw(n + 20)
    whole = engine.prefill(ids)
    torch.testing.assert_close(engine.prefill(ids, keep_last=40), whole)
    engine.prefill(ids[: n - 10], room=30)
    torch.testing.assert_close(engine.extend(ids[n - 10 :]), whole)


def test_two_answers_at_once_from_one_engine_are_refused(tiny):
    """Two generators on one conversation would mix their texts."""
    engine = slim.load(tiny, "cpu")
    one, two = engine.generate(draw(20), 5), engine.generate(draw(30), 5)
    next(one), next(two)
    with pytest.raises(ValueError, match="one conversation"):
        next(one)
    assert next(two) >= 0


def test_arguments_of_other_types_are_refused(tiny):
    """A wrong argument is a ValueError where it is given, not a TypeError deep inside."""
    for wrong in (
        dict(dtype=[]),
        dict(n_prompt=0),
        dict(n_new=True),
        dict(score=5),
        dict(schedule=5),
        dict(gamma="x"),
        dict(chunk=1.5),
        dict(overlap="no"),
        dict(progress=5),
    ):
        with pytest.raises(ValueError):
            slim.load(tiny, **({"device": "cpu"} | wrong))
    engine = slim.load(tiny, "cpu")
    for wrong in (
        dict(ids=[]),
        dict(temperature="1"),
        dict(top_p="x"),
        dict(seed=1.5),
        dict(max_new_tokens=2.5),
        dict(schedule=5),
    ):
        with pytest.raises(ValueError):
            engine.generate(**({"ids": [1], "max_new_tokens": 5} | wrong))
    with pytest.raises(ValueError):
        engine.prefill([1], room=-1)


def test_logits_belong_to_the_caller(tiny):
    """Samplers write -inf into logits; an inference tensor would refuse that."""
    slim.load(tiny, "cpu").prefill([1, 2, 3])[0] = -torch.inf


# ---- real files -------------------------------------------------------------------------


def test_ci_runs_the_test_command_of_the_readme():
    """Who follows the README must see what is checked at every change."""
    command = re.search(r"pip install .*pytest -q.*", (HERE / "README.md").read_text())[0]
    assert command in (HERE / ".ci" / "run").read_text().splitlines()


@pytest.mark.parametrize("section", ["From Python", "Use your own rule"])
def test_what_the_readme_shows_in_python_runs(section, capfd, monkeypatch, tmp_path):
    """Run as it is printed there, on the demo: the question of the default run gets its answer."""
    readme = (HERE / "README.md").read_text()
    code = re.search(rf"## {section}\n.*?```python\n(.*?)```", readme, re.DOTALL)[1]
    (tmp_path / "demo").symlink_to(HERE / "demo")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    document = (HERE / "demo" / "document.txt").read_text().replace("\n", " ")
    fact = DEMO["ask"].removeprefix("question: ") + " "
    answer = document.split(fact)[1][:4]
    assert answer in capfd.readouterr().out


@needs_data
@pytest.mark.parametrize("device", DEVICES)
def test_a_real_model_tells_its_golden_story(device):
    """Real weights and a real tokenizer give the text that other engines gave."""
    engine = slim.load(DATA / "stories260K", device)
    story = engine.tokenizer.decode(engine.generate([engine.tokenizer.bos_id], 200))
    assert story == (DATA / "stories260K" / "golden.txt").read_text()


def test_a_real_model_says_what_transformers_says(smollm2_folder):
    """Ids, greedy tokens and logits of real text; SLIM_LONG=1: 20 prompts up to 4,000 tokens."""
    from bench.speed import place

    where = place(smollm2_folder)
    text = (HERE / "demo" / "document.txt").read_text() + (HERE / "README.md").read_text()
    if smollm2_folder.is_file():
        pytest.importorskip("accelerate", reason="transformers reads GGUF with accelerate")
    engine = slim.load(smollm2_folder, "cpu", "float32", schedule="dense")
    tok = engine.tokenizer
    assert "Paris" in tok.decode(engine.generate(tok.chat("What is the capital of France?"), 40))
    published = None  # transformers splits numbers otherwise than SmolLM2 when it reads GGUF
    if smollm2_folder.is_dir():
        published = transformers.AutoTokenizer.from_pretrained(smollm2_folder)
        published.backend_tokenizer.encode_special_tokens = True  # specials are text, as here
        assert tok.encode(text) == published.backend_tokenizer.encode(text).ids
        published.backend_tokenizer.encode_special_tokens = False

    auto = transformers.AutoModelForCausalLM
    reference = auto.from_pretrained(**where, dtype=torch.float32).eval()
    options = dict(max_new_tokens=20, do_sample=False)
    options |= dict(output_logits=True, return_dict_in_generate=True)
    for n in range(200, 4001, 200) if os.environ.get("SLIM_LONG") == "1" else (60, 200):
        part = (text * 2)[n : 9 * n]
        asked = "Go on with this text: " + tok.decode(tok.encode(part)[: n - 50])
        ids = tok.chat(asked)
        talk = [{"role": "user", "content": asked}]
        if published:
            theirs = published.apply_chat_template(talk, add_generation_prompt=True)
            assert ids == theirs["input_ids"]
        mask = torch.ones(1, len(ids))
        want = reference.generate(torch.tensor([ids]), attention_mask=mask, **options)
        logits = engine.prefill(ids)
        for token, their_logits in zip(want.sequences[0, len(ids) :].tolist(), want.logits):
            torch.testing.assert_close(logits, their_logits[0], atol=1e-3, rtol=0)
            assert int(logits.argmax()) == token, n
            logits = engine.extend([token])


BY_CHANCE = prune.Rule("chance", lambda weights: torch.rand(weights.shape[::2]), window=1)

# ---- blocks ---------------------------------------------------------------------------------


@hypothesis_settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=3, max_size=20),
    st.integers(1, 150),
    st.sampled_from([1, 2**26]),
)
def test_every_block_comes_back_bit_exact_and_none_is_lost(tiny, steps, n_prompt, piece_bytes):
    """A rule chooses by chance; what is held equals what was written, what returns what left."""
    engine = load_three_stages(tiny, score=BY_CHANCE)
    kv, append, offload, restore = engine.kv, KVCache.append, KVCache.offload, KVCache.restore

    def record(kv, layer, slab_rows, keys_values):
        stage = next(stage for stage in kv.stages if layer in stage.layers)
        places = positions_in_slab(kv, stage, kv.tail_start + kv.tail_rows)
        written[layer] |= {places[row]: pair for row, pair in zip(slab_rows.tolist(), keys_values)}
        append(kv, layer, slab_rows, keys_values)

    def leave(kv, stage, x, place):
        hidden[kv.stages.index(stage)] |= {
            block: x[8 * i : 8 * i + 8].clone() for block, i in place.items()
        }
        offload(kv, stage, x, place)

    def come_back(kv, stage, blocks):
        x = restore(kv, stage, blocks)
        assert torch.equal(
            x, torch.cat([hidden[kv.stages.index(stage)].pop(block) for block in blocks])
        )
        return x

    spies = mock.patch.multiple(KVCache, append=record, offload=leave, restore=come_back)
    with spies, mock.patch.object(kvcache, "PIECE_BYTES", piece_bytes):
        for _ in range(2):  # the second conversation takes over the host memory of the first
            written, hidden = [{} for _ in range(engine.config.n_layers)], [{} for _ in range(4)]
            engine.prefill(draw(n_prompt))
            check_store(kv, written, hidden)
            for step in steps:
                engine.extend(draw(step, seed=step))
                check_store(kv, written, hidden)


def check_store(kv, written, hidden):
    for i, stage in enumerate(kv.stages):
        assert len(set(stage.slots)) == len(stage.slots) == stage.n_slots  # no slot held twice

        assert set(stage.aux) == set(hidden[i])
        if i:
            assert (
                stage.has_keys() | set(stage.aux) == kv.stages[i - 1].has_keys()
            )  # pruned, but not lost
        for j, layer in enumerate(stage.layers):
            places = positions_in_slab(kv, stage, kv.length)
            assert torch.equal(
                kv.read(layer, len(places)), torch.stack([written[layer][p] for p in places], 1)
            )
            for block, entry in stage.home.items():
                rows = [
                    written[layer][p] for p in range(block * 8, block * 8 + 8)
                ]  # (2, G, D) each
                assert torch.equal(entry[j], torch.stack(rows, 2))


def positions_in_slab(kv, stage, length):
    in_slots = [block * kv.block_len + i for block in stage.slots for i in range(kv.block_len)]
    return in_slots + list(range(kv.tail_start, length))


@pytest.mark.parametrize("seed", range(3))
def test_no_step_asks_for_host_memory(tiny, tmp_path, seed, monkeypatch):
    """A step that ran out of memory halfway would leave the conversation broken."""
    rng = random.Random(seed)
    schedule = {1: 160, 2: 96, 4: 32}
    engine = slim.load(tiny, "cpu", "float32", schedule, BY_CHANCE, block_len=8, unit_len=4)

    def step(*args, step=engine.model.step):
        with mock.patch.object(
            kvcache, "allocate", side_effect=AssertionError("a step asked for memory")
        ):
            return step(*args)

    monkeypatch.setattr(engine.model, "step", step)
    if seed:
        engine.prefill(draw(700, seed))
    else:
        engine.read(draw(700), keep_last=20)
    for _ in range(30):
        work = rng.choice(["token", "token", "follow-up", "rewind", "resume"])
        if work == "rewind":
            engine.rewind()
        if work == "resume":
            engine.save(tmp_path / "talk.slim")
            engine.resume(tmp_path / "talk.slim")
        engine.extend(draw(20 if work == "follow-up" else 1))
    assert engine.stats["revived"] > 50


def test_the_state_of_a_block_says_where_it_is(tiny):
    """A block is in one of four places between two steps; an exchange shows all of them."""
    sign = 1

    def first_or_last(weights):
        return sign * torch.arange(weights.shape[2]).float().expand(len(weights), -1)

    rule = prune.Rule("", first_or_last, every_layer=False, window=1)
    engine = slim.load(tiny, "cpu", "float32", {1: 48, 3: 24}, rule, block_len=8, unit_len=4)
    engine.prefill(draw(100))
    stage, top = engine.kv.stages[1:]
    assert [stage.state(block) for block in (0, 11, 7)] == ["active", "active", "pruned"]
    assert [top.state(block) for block in (0, 11, 8, 7)] == ["active", "active", "pruned", "below"]
    sign = -1
    engine.extend([1])
    assert [stage.state(block) for block in (0, 11, 1, 7)] == ["active", "home", "active", "pruned"]
    assert [top.state(block) for block in (0, 11, 1, 7)] == ["active", "home", "active", "below"]


# ---- a text that waits for its question ------------------------------------------------------


@pytest.mark.parametrize(
    "score, schedule, chunk, window",
    [
        ("peak", {1: 64, 2: 40, 3: 24}, 7, 0),
        ("peak", {2: 64}, 64, 24),
        ("lookup", {2: 64, 4: 48}, 7, 0),
        ("paper", {1: 64, 3: 32}, 64, 24),
        (MASS, {1: 64, 3: 32}, 7, 0),
    ],
)
@pytest.mark.parametrize(
    "pieces, kept", [([150], 150), ([150, 9, 1], 160), ([150], 143), ([150], 137)]
)
def test_a_text_that_waits_for_its_question_is_read_as_one_prompt_with_it(
    tiny, monkeypatch, score, schedule, chunk, window, pieces, kept
):
    """The question chooses all blocks, none is revived; also after going back, and in pieces."""
    monkeypatch.setattr(model, "TILE", 16)
    monkeypatch.setattr(planning.checkpoint, "LAST_ROWS", 48)
    set_lookup_heads(monkeypatch, (0, 1), (1, 2), (3, 0))

    def load():
        settings = dict(block_len=8, unit_len=4, chunk=chunk, local_window=window)
        return slim.load(tiny, "cpu", "float64", schedule, score, **settings)

    held = load()
    one = load()
    ids = draw(200)
    choices = {held: [], one: []}
    for engine, chosen in choices.items():
        engine.model.on_select = lambda i, candidates, scores, active, chosen=chosen: chosen.append(
            (i, candidates, scores, active)
        )
    held.read(ids[: pieces[0]], keep_last=12)
    for n in pieces[1:]:
        held.read_on(ids[len(held.ids) :][:n])
    held.rewind(kept)
    assert held.ids == ids[:kept] and held.stats["tokens"] == kept and not choices[held]
    assert len(held.stats["kept"]) == 1
    text = held.kv.n_prompt
    got = [held.extend(ids[kept : kept + 5])]
    assert held.stats["revived"] == 0 and held.kv.n_prompt == text
    assert held.kv.local_rows == (96 if window else 0)
    # those rows of a text alone that its tail and LAST_ROWS leave
    monkeypatch.setattr(model.Local, "n_rows", lambda *_: held.kv.local_rows)
    want = [one.prefill(ids[: kept + 5], keep_last=kept + 5 - 138)]
    assert one.kv.tail_start == held.kv.tail_start and one.kv.local_rows == held.kv.local_rows
    for start in (*range(kept + 5, kept + 12), kept + 25):
        new = ids[len(one.ids) : start + 1]
        got.append(held.extend(new))
        want.append(one.extend(new))
    torch.testing.assert_close(torch.stack(got), torch.stack(want), atol=1e-10, rtol=0)
    for (*a, scores_a, active_a), (*b, scores_b, active_b) in zip(*choices.values(), strict=True):
        torch.testing.assert_close(scores_a, scores_b, atol=1e-10, rtol=0)
        assert a == b and active_a == active_b
    assert held.stats["swaps"] == one.stats["swaps"]


def test_a_text_that_waits_goes_on_like_any_conversation(tiny, tmp_path):
    """Saved without a question, it chooses by its own end; read dense, there is nothing to wait."""
    settings = dict(score="peak", chunk=16)
    held, one = (load_three_stages(tiny, **settings) for _ in range(2))
    held.read(draw(150), keep_last=20)
    one.prefill(draw(150), keep_last=20)
    least = held.kv.tail_start + 1
    with pytest.raises(ValueError, match=f"to {least}..150 of them"):
        held.rewind(least - 1)
    size = held.kv.state_bytes()
    held.finish()
    of_newest = sum(stage.newest.nbytes for stage in held.kv.stages[1:])
    tensors = held.kv.state()[1].values()
    assert held.kv.state_bytes() == sum(tensor.nbytes for tensor in tensors) == size + of_newest
    held.read(draw(150), keep_last=20)
    held.save(tmp_path / "talk.slim")
    names = "tokens", "kept", "swaps", "revived", "prompt_tokens"
    assert [held.stats[name] for name in names] == [one.stats[name] for name in names]
    want = go_on(one, [5])
    held.finish()  # nothing is left to do
    torch.testing.assert_close(go_on(held, [5]), want, atol=1e-4, rtol=0)
    other = load_three_stages(tiny, **settings)
    other.resume(tmp_path / "talk.slim")
    torch.testing.assert_close(go_on(other, [5]), want, atol=1e-4, rtol=0)
    held.read(draw(150), keep_last=20)
    held.rewind(least)
    held.finish()
    assert held.stats["kept"][1:] == [57, 33, 17] and held.ids == draw(150)[:least]
    held.read(draw(150), schedule="dense")
    assert len(held.stats["kept"]) == 1 and held.kv.held is None
    with pytest.raises(ValueError, match="no text waits for its question"):
        held.read_on([5])
    held.read(draw(150), keep_last=20)
    assert len(list(held.generate([5], 9, follow_up=True))) == 9
    held.rewind()
    assert held.ids == draw(150)


def test_rows_that_were_read_locally_do_not_rank_for_the_question(tiny, monkeypatch):
    """They would see more than when they were read, and overwrite the keys of the text."""
    monkeypatch.setattr(model, "TILE", 16)
    monkeypatch.setattr(planning.checkpoint, "LAST_ROWS", 48)
    settings = dict(schedule={2: 64}, score="peak", window=64, block_len=8, unit_len=4)
    engine = slim.load(tiny, "cpu", "float64", **settings, local_window=16)
    engine.read(draw(200), keep_last=120)
    n_local = engine.kv.local_rows
    assert n_local > 100
    engine.rewind(n_local + 6)
    before = engine.kv.slabs[0][:, :, :n_local].clone()
    engine.extend([5])
    assert torch.equal(engine.kv.slabs[0][:, :, :n_local], before)
    engine.read(draw(200), keep_last=120)
    engine.rewind(100)  # all that is left was read locally
    engine.finish()
    assert engine.stats["tokens"] == 100 and len(engine.stats["kept"]) == 2


def test_a_text_that_cannot_wait_leaves_the_engine_usable(tiny, monkeypatch):
    """Memory may run out while rows are put aside; the next text is read all the same."""
    engine = load_three_stages(tiny)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "clone", lambda *_: pytest.fail("no memory"))
        with pytest.raises(pytest.fail.Exception, match="no memory"):
            engine.read(draw(150))
    assert engine.stats["tokens"] == 0 and not engine.usable
    with pytest.raises(ValueError, match="no complete conversation to finish"):
        engine.finish()
    engine.read(draw(150))
    rows = engine.kv.held_tail
    assert engine.kv.held_bytes() == engine.stats["held_bytes"] > 0
    assert rows.untyped_storage().nbytes() == rows.nbytes  # not a view of all rows
    engine.extend([5])
    assert engine.stats["held_bytes"] == 0 and engine.kv.held_tail is None


def test_a_held_text_in_float16_is_read(tiny):
    """Its hidden states may be large; their sum may be larger than the dtype holds."""
    engine = slim.load(tiny, "cpu", "float16", schedule={2: 64}, score="peak", block_len=8)
    large = torch.full((1, 32), 60_000.0, dtype=torch.float16)
    engine.model.step = lambda *_: large
    assert engine.run(draw(9)).equal(large)


# ---- copies ---------------------------------------------------------------------------------


def play(folder, device):
    return conversation(load_three_stages(folder, device), draw(150))[0]


def test_every_layer_waits_for_its_copies(tiny, monkeypatch):
    """Without a GPU: a layer's copies are put off until it waits for them, as a stream may do."""
    want = play(tiny, "cpu")
    copy_layer = KVCache.copy_layer
    cache_wait = KVCache.wait
    put_off = {}

    def later(kv, move, i, *args):
        layer = move.stage.layers[i]
        assert layer not in put_off
        put_off[layer] = lambda: copy_layer(kv, move, i, *args)

    def wait(kv, layer):
        put_off.pop(layer, lambda: None)()
        cache_wait(kv, layer)

    monkeypatch.setattr(KVCache, "copy_layer", later)
    monkeypatch.setattr(KVCache, "wait", wait)
    assert torch.equal(play(tiny, "cpu"), want)


def test_blocks_that_move_together_are_one_copy_a_layer_and_direction(tiny):
    """On a GPU a copy costs the host more than the bytes of a block: launches count."""
    engine = slim.load(tiny, "cpu", "float32", {1: 80}, BY_CHANCE, block_len=8, unit_len=4)
    engine.prefill(draw(300))
    stream = kvcache.CopyStream
    above = len(engine.kv.stages[1].layers)
    for i in range(20):
        with (
            mock.patch.object(stream, "to_host", autospec=True, side_effect=stream.to_host) as out,
            mock.patch.object(
                stream, "to_device", autospec=True, side_effect=stream.to_device
            ) as back,
        ):
            engine.extend([1 + i])
        assert out.call_count <= above and back.call_count <= above + 1
    assert engine.kv.swaps > 60 and engine.kv.revived > 5  # several at a time


@needs_cuda
@pytest.mark.parametrize("late", ["copies", "compute"])
def test_results_survive_a_late_stream(tiny, monkeypatch, late):
    """A wait that is missing shows when one stream is far behind the other."""
    want, after, append = play(tiny, "cuda"), kvcache.CopyStream.after, KVCache.append

    def late_copies(lane, event):
        context = after(lane, event)
        with torch.cuda.stream(lane.stream):
            torch.cuda._sleep(20_000_000)  # cycles: some 10 ms
        return context

    def late_compute(kv, *args):
        torch.cuda._sleep(20_000_000)
        append(kv, *args)

    if late == "copies":
        monkeypatch.setattr(kvcache.CopyStream, "after", late_copies)
    else:
        monkeypatch.setattr(KVCache, "append", late_compute)
    assert torch.equal(play(tiny, "cuda"), want)


def test_copies_start_after_the_ffn_that_hides_them(tiny, monkeypatch):
    """Queued before the FFN, the copies would be waited for and not hidden."""
    engine, calls = slim.load(tiny, **SLIM), []
    engine.prefill(draw(200))
    for name in ("attention", "ffn", "activate", "copy_layer"):
        owner = model.Model if hasattr(model.Model, name) else KVCache
        method = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *args, m=method, n=name: calls.append(n) or m(*args)
        )
    select = prune.select
    for sign in (-1, 1):  # blocks are revived, then others come back from home
        monkeypatch.setattr(prune, "select", lambda scores, *args: select(sign * scores, *args))
        engine.extend([1])
    order = [name for i, name in enumerate(calls) if name != calls[i - 1]]
    assert order.count("copy_layer") == 2 * len(engine.kv.stages[1:])
    assert all(
        order[i - 2 : i] == ["activate", "ffn"]
        for i, name in enumerate(order)
        if name == "copy_layer"
    ), order


# ---- host memory ----------------------------------------------------------------------------


def test_host_memory_grows_in_pieces_and_is_used_again(monkeypatch):
    """Pinning takes longer than copying: pieces are large, and kept for the next conversation."""
    monkeypatch.setattr(kvcache, "PIECE_BYTES", 1024)  # 8 entries of 128 bytes
    allocate = kvcache.allocate
    monkeypatch.setattr(kvcache, "allocate", lambda *args, pin: allocate(*args))
    pinned, other = (HostMemory((4, 8), torch.float32, pin) for pin in (True, False))
    for memory in (pinned, other):
        memory.reset(3)
        first = memory.take(2).fill_(1)
        assert memory.missing(1) == 0 and memory.missing(2) == (8 if memory is pinned else 2)
        assert memory.take(2).shape == (2, 4, 8) and first.eq(1).all()
        assert len(memory.piece) == (8 if memory is pinned else 2)
    for n, want in ((8, 8), (5, 8), (16, 16), (5, 16), (4, 16), (40, 40), (5, 5)):
        pinned.reset(n), other.reset(n)
        assert (len(pinned.piece), len(other.piece), pinned.used) == (
            want,
            n,
            0,
        )  # pinning is slow: keep what is there


def test_host_memory_is_used_up_before_more_is_taken(monkeypatch):
    """A step reserves for an exchange of all blocks, and most exchange one."""
    monkeypatch.setattr(kvcache, "PIECE_BYTES", 1024)
    allocate, sizes = kvcache.allocate, []
    monkeypatch.setattr(
        kvcache, "allocate", lambda *args, pin: sizes.append(args[1][0]) or allocate(*args)
    )
    for pin in (True, False):
        memory = HostMemory((4, 8), torch.float32, pin)
        memory.reset(20)
        sizes.clear()
        entries = []
        for i in range(60):
            memory.reserve(20)
            entries += [memory.take(1).fill_(i), memory.take(2).fill_(i)]
        assert sum(sizes) <= 3 * 60 + 20
        assert all(entry.eq(i // 2).all() for i, entry in enumerate(entries))


# ---- how much it takes ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt, gib",
    [(8192, 0.80), (16384, 1.11), (24576, 1.42), (32768, 1.73), (65536, 2.98), (131072, 5.48)],
)
def test_the_kv_of_llama_3_1_8b_takes_what_the_paper_says(prompt, gib):
    """The layout alone, on no device: 32 layers, 8 KV heads of 128, bfloat16; dense 4.00 at 32k."""
    kv = KVCache(32, 8, 128, 4096, 64, torch.bfloat16, torch.device("meta"))
    kv.reset(prompt, schedules.paper_schedule(32))
    assert round(kv.stats()["kv_gpu_bytes"] / 2**30, 2) == pytest.approx(gib, abs=0.0051)


def test_the_kv_of_a_slim_prompt_is_a_fraction_of_the_dense(tiny):
    """The README's figure of memory, counted on a prompt that was read."""
    engine = slim.load(tiny, "cpu", schedule={1: 256, 3: 128})
    engine.prefill(draw(4096))
    per_token = 2 * 2 * 8 * 4
    assert engine.stats["kept"] == [4096, 256, 128]
    assert engine.stats["kv_gpu_bytes"] == (4096 + 2 * 256 + 2 * 128) * per_token
    assert engine.stats["kv_dense_bytes"] == 5 * 4096 * per_token
