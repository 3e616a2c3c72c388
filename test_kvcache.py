"""Tests of the KV store: no block is lost, copies wait and are hidden, host memory is reused."""

import random
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import kvcache
import model
import prune
import slim
from conftest import SLIM, conversation, draw, load_three_stages, needs_cuda
from kvcache import HostMemory, KVCache
from planning import schedule as schedules

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

    def record(kv, layer, slab_rows, k, v):
        stage = next(stage for stage in kv.stages if layer in stage.layers)
        places = positions_in_slab(kv, stage, kv.tail_start + kv.tail_rows)
        written[layer] |= {
            places[row]: pair for row, pair in zip(slab_rows.tolist(), torch.stack([k, v], 1))
        }
        append(kv, layer, slab_rows, k, v)

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
    engine.prefill(draw(700, seed))
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
        monkeypatch.setattr(
            prune, "select", lambda scores, blocks, k: select(sign * scores, blocks, k)
        )
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
