"""Packed matrices: products against the formula in float64, and engines against widened ones."""

import math
from dataclasses import fields

import pytest
import torch

import packed
import slim
from conftest import ATOL, DEVICES, draw, make_checkpoint
from loading.weights import in_blocks as can_be_in_blocks
from packed import Packed, linear, pair, prepare, quantise, rows_of, widen
from planning.checkpoint import Checkpoint

SHAPES = [(128, 64), (64, 96), (80, 32), (13, 256), (192, 128)]
BF16 = torch.bfloat16


def drawn(shape, bits: int, group: int = 32) -> tuple[Packed, torch.Tensor]:
    """Return a matrix of random numbers, and its values by the formula in float64."""
    n_rows, n_columns = shape
    if bits == 8:
        q = torch.randint(-127, 128, shape, dtype=torch.int8)
        scale = torch.rand(n_rows).to(BF16)
        return Packed(q, scale), q.double() * scale.double()[:, None]
    q = torch.randint(16, shape, dtype=torch.uint8)
    scale, zero = torch.randn(2, n_rows, n_columns // group).to(BF16)
    values = (q.double().unflatten(1, (-1, group)) - 8) * scale.double()[..., None]
    return Packed(pair(q), scale, zero), (values + zero.double()[..., None]).flatten(1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_products_are_those_of_the_formula(bits, shape, device):
    """The kernels and the order of their numbers are undocumented; few rows and many, any shape."""
    torch.manual_seed(0)
    made, values = drawn(shape, bits)
    w = prepare(made, torch.device(device))
    assert w.shape == shape
    assert torch.equal(widen(w).cpu(), values.to(BF16))
    bias = torch.randn(shape[0]).to(device, BF16)
    for n_rows in (1, 4, 8, 9, 64, 65, 300):
        wide = torch.randn(n_rows, 2 * shape[1]).to(device, BF16)
        for x in (wide[:, : shape[1]], wide[:, ::2]):  # rows apart, numbers apart
            want = x.cpu().double() @ values.T
            atol = 0.02 * want.abs().max().item()  # an output has 8 bits, a widened weight too
            got = linear(x, w).cpu().double()
            torch.testing.assert_close(got, want, atol=atol, rtol=0)
            got = linear(x, w, bias).cpu().double()
            torch.testing.assert_close(got, want + bias.cpu().double(), atol=atol, rtol=0)
            added = torch.zeros(n_rows, shape[0], dtype=BF16, device=device)
            packed.add_product(added, x, w)
            torch.testing.assert_close(added.cpu().double(), want, atol=atol, rtol=0)


@pytest.mark.parametrize("in_blocks", [False, True])
def test_many_rows_are_multiplied_in_float32(in_blocks, monkeypatch):
    """A CPU without matrix units is twice as fast so; the result is rounded once."""
    if in_blocks and not can_be_in_blocks(torch.device("cpu"), BF16):
        pytest.skip("this CPU lays out no matrices in blocks for bfloat16")
    monkeypatch.setattr(packed, "prefers_float32", lambda device, dtype: True)
    monkeypatch.setattr(packed, "PIECE", 1000)  # pieces of 15 rows of the matrix
    torch.manual_seed(0)
    plain = torch.randn(70, 64).to(BF16)
    w = torch.ops.mkldnn._reorder_linear_weight(plain, 1) if in_blocks else plain
    x, bias, before = torch.randn(128, 64).to(BF16), torch.randn(70).to(BF16), torch.randn(128, 70)
    product = x.double() @ plain.double().T
    added = before.to(BF16)
    want = added.double() + product
    packed.add_product(added, x, w)
    once = dict(atol=1e-4, rtol=2**-8)  # half of the last bit
    torch.testing.assert_close(added.double(), want, **once)
    torch.testing.assert_close(linear(x, w, bias).double(), product + bias.double(), **once)


@pytest.mark.parametrize("group", packed.GROUPS)
def test_groups_of_any_size_are_multiplied(group):
    """Files have groups of 32 to 256 columns."""
    torch.manual_seed(0)
    made, values = drawn((128, 512), 4, group)
    w = prepare(made, torch.device("cpu"))
    assert w.group == group and torch.equal(widen(w), values.to(BF16))
    x = torch.randn(3, 512).to(BF16)
    want = x.double() @ values.T
    torch.testing.assert_close(linear(x, w).double(), want, atol=0.02 * want.abs().max(), rtol=0)


@pytest.mark.parametrize("has_layout", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_rows_of_an_embedding_are_those_of_the_widened_one(bits, has_layout):
    """They are picked out of tiles; a wrong place would be another word."""
    torch.manual_seed(0)
    w, _ = drawn((192, 64), bits)
    if has_layout:
        w = prepare(w, torch.device("cpu"))
    ids = torch.tensor([0, 1, 31, 32, 63, 64, 100, 191, 5])
    assert torch.equal(rows_of(w, ids), widen(w)[ids])


@pytest.mark.parametrize("bits, steps", [(8, 127), (4, 7.5)])
def test_each_number_is_quantised_to_the_nearest(bits, steps):
    """Of a row in 8 bits, of a group in 4; zeros, constants and huge numbers included."""
    matrix = torch.randn(700, 64) * torch.logspace(-4, 4, 700)[:, None]
    matrix[0] = 0
    matrix[1] = 3
    matrix[2, 5] = 1e4
    error = (widen(quantise(matrix, bits, BF16)).float() - matrix).abs()
    parts = matrix.unflatten(1, (1, 64) if bits == 8 else (2, 32))
    spread = parts.abs().amax(2) if bits == 8 else (parts.amax(2) - parts.amin(2)) / 2
    step = spread / steps  # a row's error is half a step, the rounding of bfloat16 comes on top
    most = (step / 2 + parts.abs().amax(2) / 128).repeat_interleave(parts.shape[2], 1)
    assert (error <= most).all()


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="groups of 64 do not suit 96 columns"):
        packed.empty(8, 96, 4, BF16, 64)


def test_a_missing_kernel_widens(monkeypatch):
    """torch's products are private: they may go, or come to mean something else."""
    monkeypatch.setattr(packed, "int8_product", lambda x, w: x.new_zeros(len(x), len(w)))
    monkeypatch.setattr(packed, "int4_pack", lambda pairs, layout: torch.zeros_like(pairs))
    packed.has_int8.cache_clear()
    packed.measure_layout.cache_clear()
    try:
        for bits in (8, 4):
            made, values = drawn((128, 64), bits)
            w = prepare(made, torch.device("cpu"))
            assert not w.has_kernel
            x = torch.randn(1, 64).to(BF16)
            want = x.double() @ values.T
            assert (linear(x, w) - want).abs().max() <= 0.02 * want.abs().max()
    finally:
        packed.has_int8.cache_clear()
        packed.measure_layout.cache_clear()


# ---- engines --------------------------------------------------------------------------------


def widened(engine) -> slim.Engine:
    """Return the engine with plain matrices of the same values."""
    weights = engine.model.weights
    for part in (weights, *weights.layers):
        for name, value in vars(part).items():
            if isinstance(value, Packed):
                setattr(part, name, widen(value).contiguous())
    return engine


SMALL = dict(schedule={1: 64, 3: 32}, block_len=8, unit_len=4, chunk=100)


@pytest.mark.parametrize("family", ["llama3-gqa", "qwen2-bias", "phi3", "llama3.2-tied"])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_an_engine_answers_as_one_of_its_widened_weights(kind, family, tmp_path):
    """Prefill in chunks, tokens one by one, a follow-up, biases, a tied head.

    Each is off by ATOL. Dense: where blocks are chosen, the last bit of a score decides.
    """
    make_checkpoint(tmp_path, family)
    options = SMALL | dict(schedule="dense", weights=kind)
    engines = [slim.load(tmp_path, "cpu", "bfloat16", **options) for _ in range(2)]
    assert isinstance(engines[0].model.weights.layers[0].wqkv, Packed)
    assert engines[0].stats["weights"] == ("int8" if kind == "int8" else "int4, groups of 32")
    widened(engines[1])
    ids = draw(500)
    steps = [engine.prefill(ids, room=100) for engine in engines]
    torch.testing.assert_close(*steps, atol=2 * ATOL[BF16], rtol=0)
    for more in ([5], [9], draw(30), [3]):
        torch.testing.assert_close(*[e.extend(more) for e in engines], atol=2 * ATOL[BF16], rtol=0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["full", "int8", "int4"])
def test_weights_take_what_is_planned(kind, tied, tmp_path):
    """The plan decides whether a run may start."""
    make_checkpoint(tmp_path, "llama3.2-tied" if tied else "qwen2-bias")
    engine = slim.load(tmp_path, "cpu", "bfloat16", weights=kind)
    weights = engine.model.weights
    parts = [weights.embed, weights.norm] + ([] if tied else [weights.head])
    for layer in weights.layers:
        values = [getattr(layer, field.name) for field in fields(layer)]
        parts += [value for value in values if value is not None]
    assert sum(part.nbytes for part in parts) == engine.ckpt.weight_bytes


def test_a_saved_text_is_refused_by_other_weights(tmp_path):
    """Its keys and values are those of the weights that read it."""
    make_checkpoint(tmp_path / "model")
    load = dict(device="cpu", dtype="bfloat16", **SMALL)
    engine = slim.load(tmp_path / "model", weights="int8", **load)
    engine.prefill(draw(300))
    engine.save(tmp_path / "talk.slim")
    want = engine.extend([7])
    again = slim.load(tmp_path / "model", weights="int8", **load)
    again.resume(tmp_path / "talk.slim")
    assert torch.equal(again.extend([7]), want)
    with pytest.raises(ValueError, match="--weights int8 where this run has full"):
        slim.load(tmp_path / "model", **load).resume(tmp_path / "talk.slim")


def test_packed_weights_in_float32_are_refused(tmp_path):
    """There they are 3 to 18 times as slow as plain ones."""
    make_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="--weights int4 needs bfloat16"):
        Checkpoint.open(tmp_path, "cpu", "float32", weights="int4")
    with pytest.raises(ValueError, match="--weights 'int3' is unknown"):
        Checkpoint.open(tmp_path, "cpu", "bfloat16", weights="int3")


def test_a_layer_is_widened_once_a_step_and_let_go(tmp_path, monkeypatch):
    """A widened copy for each chunk would cost a prompt a tenth of its time."""
    make_checkpoint(tmp_path)
    engine = slim.load(tmp_path, "cpu", "bfloat16", "dense", weights="int4", chunk=64)
    count = []
    plain = packed.widen
    monkeypatch.setattr(packed, "widen", lambda w: count.append(w) or plain(w))
    engine.prefill(draw(640), room=10)
    assert len(count) == 4 * engine.config.n_layers
    engine.extend([1])
    assert len(count) == 4 * engine.config.n_layers
    assert math.isfinite(engine.extend([2]).sum())
