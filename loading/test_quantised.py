"""Quantised safetensors: values are those of the packages that write them, or of slow oracles."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import slim
from conftest import draw, edit_json, edit_tensors
from loading import quantised

N, K = 48, 256  # a matrix of the tests
LAST = "model.layers.0.mlp.up_proj."


class File:
    """Stands for the open file of one tensor."""

    def __init__(self, tensor):
        self.tensor = tensor

    def get_tensor(self, name):
        return self.tensor

    def get_slice(self, name):
        return self

    def get_shape(self):
        return list(self.tensor.shape)

    def get_dtype(self):
        names = {torch.float8_e4m3fn: "F8_E4M3", torch.uint8: "U8", torch.int8: "I8"}
        names |= {torch.int32: "I32", torch.int64: "I64", torch.float32: "F32"}
        return (names | {torch.float16: "F16", torch.bfloat16: "BF16"})[self.tensor.dtype]


def gathered(parts, scheme, shape=(N, K)):
    """Return the Matrix that tensors make, named as within their layer."""
    tensors = {f"x.{name}": File(tensor) for name, tensor in parts.items()}
    problems = quantised.gather(tensors, {"x.weight": shape}, scheme)
    assert not problems, problems
    assert list(tensors) == ["x.weight"]
    return tensors["x.weight"].get_tensor("x.weight")


def check(matrix, want, monkeypatch, exact_to=None):
    """Compare all values, some rows at a time, some rows and columns alone, and exact groups."""
    monkeypatch.setattr(quantised, "CHUNK", 7 * want.shape[1])
    same = dict(rtol=0, atol=0)

    def read(part):
        return torch.cat([*part.chunks()]).to(want.dtype)

    torch.testing.assert_close(read(matrix), want, **same)
    pieces = [slice(3, 17), slice(40, 41)]
    found = read(matrix.cut(0, pieces))
    torch.testing.assert_close(found, torch.cat([want[piece] for piece in pieces]), **same)
    columns = slice(128, 256)
    torch.testing.assert_close(read(matrix.cut(1, [columns])), want[:, columns], **same)
    assert matrix.group == (exact_to or 0)
    if not exact_to:
        return
    for part in (matrix, matrix.cut(1, [columns])):
        values = torch.cat([*part.chunks()])
        q, scale, zero = (torch.cat(one) for one in zip(*part.groups()))
        assert q.dtype == torch.uint8 and q.max() < 16
        scale, zero = (one.repeat_interleave(exact_to, 1) for one in (scale, zero))
        torch.testing.assert_close((q.float() - 8) * scale + zero, values, rtol=1e-6, atol=1e-6)


# ---- compressed-tensors -------------------------------------------------------------------

SCHEMES = {  # (num_bits, type, strategy, symmetric, group_size, exact)
    "w4a16": (4, "int", "group", True, 128, 128),
    "w4a16 asymmetric": (4, "int", "group", False, 32, 32),
    "w4a16 of 16": (4, "int", "group", True, 16, 0),
    "w4a16 by row": (4, "int", "channel", True, None, 0),
    "w8a16": (8, "int", "group", True, 64, 0),
    "w8a16 asymmetric by row": (8, "int", "channel", False, None, 0),
    "int8 by row": (8, "int", "channel", True, None, 0),
    "int8 asymmetric": (8, "int", "channel", False, None, 0),
    "int8 of a tensor": (8, "int", "tensor", True, None, 0),
    "fp8 of a tensor": (8, "float", "tensor", True, None, 0),
    "fp8 by row": (8, "float", "channel", True, None, 0),
    "fp8 by tile": (8, "float", "block", True, None, 0),
}


@pytest.mark.parametrize("what", SCHEMES)
def test_compressed_tensors_says_the_same(what, monkeypatch):
    """Its own compressor writes the tensors, and its decompressor says what they mean."""
    package = pytest.importorskip("compressed_tensors", reason="compressed-tensors is missing")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    bits, kind, strategy, symmetric, group, exact = SCHEMES[what]
    packed = "a16" in what
    format = "pack-quantized" if packed else f"{kind}-quantized"
    block = {"block_structure": [16, 128]} if strategy == "block" else {}
    args = QuantizationArgs(
        num_bits=bits, type=kind, strategy=strategy, symmetric=symmetric, group_size=group, **block
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    torch.manual_seed(0)
    n_groups = K // (group or K)
    shapes = {"tensor": (1,), "channel": (N, 1), "group": (N, n_groups), "block": (3, 2)}
    shape = shapes[strategy]
    state = {"weight": torch.randn(N, K).bfloat16()}
    state["weight_scale"] = (torch.rand(shape) / 2 ** (bits - 3) + 0.01).bfloat16()
    state["weight_zero_point"] = torch.zeros(shape, dtype=torch.int8)
    if not symmetric:
        state["weight_zero_point"] = torch.randint(-7, 7, shape, dtype=torch.int8)
    compressor = BaseCompressor.get_value_from_registry(format if packed else "naive-quantized")
    written = compressor.compress(state, scheme)
    want = compressor.decompress(dict(written), scheme)["weight"]
    if strategy != "group":
        written.pop("weight_g_idx", None)
    given = {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": args.model_dump()}},
    }
    if symmetric:
        written.pop("weight_zero_point", None)
    found = quantised.read_scheme(json.loads(json.dumps(given, default=str)), "x")
    check(gathered(written, found), want, monkeypatch, exact)
    assert package.__version__


def test_columns_in_another_order_get_the_scale_of_their_group(monkeypatch):
    """actorder of compressed-tensors: weight_g_idx; such a matrix has no groups that are runs."""
    torch.manual_seed(0)
    q = torch.randint(0, 16, (N, K), dtype=torch.int32)
    g_idx = torch.randint(0, 2, (K,), dtype=torch.int32)
    scale = torch.rand(N, 2).half()
    words = torch.zeros(N, K // 8, dtype=torch.int32)
    for i in range(K):
        words[:, i // 8] |= q[:, i] << 4 * (i % 8)
    want = (q - 8).float() * scale.float()[:, g_idx]
    parts = {"weight_packed": words, "weight_scale": scale, "weight_g_idx": g_idx}
    check(gathered(parts, quantised.Scheme("pack-quantized", 4, 128)), want, monkeypatch)
    g_idx[3] = 2
    with pytest.raises(ValueError, match=r"names a group outside 0\.\.1"):
        gathered(parts, quantised.Scheme("pack-quantized", 4, 128))


# ---- AWQ, GPTQ, nf4: slow oracles ---------------------------------------------------------


@pytest.mark.parametrize("group", [32, 128, -1])
def test_awq_is_read_as_autoawq_writes_it(group, monkeypatch):
    """Eight rows share an int32, in the order 0 2 4 6 1 3 5 7 (awq/utils/packing_utils.py)."""
    torch.manual_seed(0)
    width = group if group > 0 else K
    q = torch.randint(0, 16, (N, K))
    zero = torch.randint(0, 16, (N, K // width))
    scale = torch.rand(N, K // width).half()
    qweight = [[0] * (N // 8) for _ in range(K)]
    qzeros = [[0] * (N // 8) for _ in range(K // width)]
    for words, numbers in ((qweight, q.T), (qzeros, zero.T)):
        for i, row in enumerate(numbers.tolist()):
            for j in range(N // 8):
                for place, which in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                    words[i][j] |= row[8 * j + which] << 4 * place
    parts = {"qweight": int32(qweight), "qzeros": int32(qzeros), "scales": scale.T.contiguous()}
    spread = [one.repeat_interleave(width, 1) for one in (zero, scale.float())]
    want = (q - spread[0]) * spread[1]
    given = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True}
    scheme = quantised.read_scheme(given | {"version": "GEMM"}, "x")
    check(gathered(parts, scheme), want, monkeypatch, max(group, 0))


def int32(words):
    return torch.tensor(words, dtype=torch.int64).to(torch.int32)


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits, group, desc_act", [(4, 128, False), (8, 32, False), (4, 64, True)])
def test_gptq_is_read_as_autogptq_writes_it(version, bits, group, desc_act, monkeypatch):
    """Numbers of one row share an int32; the first version stores zeros less one."""
    torch.manual_seed(0)
    per = 32 // bits
    q = torch.randint(0, 2**bits, (N, K))
    zero = torch.randint(0, 2**bits, (N, K // group))
    zero[0, 0] = 0  # stored as 2**bits - 1 in the first version
    scale = torch.rand(N, K // group).half()
    g_idx = torch.arange(K, dtype=torch.int32) // group
    if desc_act:
        g_idx = g_idx[torch.randperm(K)]
    stored = zero if version == "gptq_v2" else (zero - 1) % 2**bits
    qweight = torch.zeros(K // per, N, dtype=torch.int64)
    qzeros = torch.zeros(K // group, N // per, dtype=torch.int64)
    for i in range(K):
        qweight[i // per] |= q[:, i] << bits * (i % per)
    for i in range(N):
        qzeros[:, i // per] |= stored[i] << bits * (i % per)
    parts = {
        "qweight": qweight.to(torch.int32),
        "qzeros": qzeros.to(torch.int32),
        "scales": scale.T.contiguous(),
        "g_idx": g_idx,
        "bias": torch.zeros(N),  # AutoGPTQ writes one for layers that have none
    }
    want = (q - zero[:, g_idx]) * scale.float()[:, g_idx]
    given = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": desc_act}
    scheme = quantised.read_scheme(given | {"checkpoint_format": version}, "x")
    exact = group if bits == 4 and not desc_act else 0
    check(gathered(parts, scheme), want, monkeypatch, exact)


@pytest.mark.parametrize("nested", [False, True])
def test_nf4_is_read_as_bitsandbytes_writes_it(nested, monkeypatch):
    """A byte's high half comes first; scales are numbers themselves, or looked up as well."""
    torch.manual_seed(0)
    n_blocks = N * K // 64
    levels = torch.randn(16).sort().values
    numbers = torch.randint(0, 16, (N * K,))
    scale = torch.rand(n_blocks)
    parts = {"weight.absmax": scale}
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [N, K]}
    if nested:
        codes = torch.randint(0, 256, (n_blocks,))
        table, outer = torch.randn(256), torch.rand(-(-n_blocks // 256))
        scale = torch.stack([table[c] * outer[i // 256] + 0.25 for i, c in enumerate(codes)])
        parts = {"weight.absmax": codes.to(torch.uint8)}
        parts |= {"weight.nested_absmax": outer, "weight.nested_quant_map": table}
        state |= {"nested_blocksize": 256, "nested_offset": 0.25}
    want = torch.stack([levels[n] * scale[i // 64] for i, n in enumerate(numbers)]).view(N, K)
    parts |= {
        "weight": (numbers[::2] << 4 | numbers[1::2]).to(torch.uint8)[:, None],
        "weight.quant_map": levels,
        "weight.quant_state.bitsandbytes__nf4": torch.tensor([*json.dumps(state).encode()]).byte(),
    }
    given = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    check(gathered(parts, quantised.read_scheme(given, "x")), want, monkeypatch)


# ---- whole checkpoints --------------------------------------------------------------------


def halved(folder, target, method="gptq"):
    """Write a checkpoint whose matrices are in 4 bits, and the same one widened; return both."""
    tensors, plain, stored = load_file(folder / "model.safetensors"), {}, {}
    for name, w in tensors.items():
        plain[name] = stored[name] = w
        if not name.endswith("proj.weight"):
            continue
        del stored[name]
        n, k = w.shape
        scale = (w.view(n, -1, 32).abs().amax(2) / 7).half()
        q = (w / scale.float().repeat_interleave(32, 1)).round().clamp(-8, 7)
        plain[name] = q * scale.float().repeat_interleave(32, 1)
        words = torch.zeros(k // 8, n, dtype=torch.int64)
        for i in range(k):
            words[i // 8] |= (q[:, i].long() + 8) << 4 * (i % 8)
        stem = name.removesuffix("weight")
        stored[stem + "qweight"] = words.to(torch.int32)
        stored[stem + "qzeros"] = torch.full((k // 32, n // 8), 0x77777777, dtype=torch.int32)
        stored[stem + "scales"] = scale.T.contiguous()
    config = json.loads((folder / "config.json").read_text())
    scheme = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    for name, some, given in (("plain", plain, None), ("packed", stored, scheme)):
        (target / name).mkdir()
        (target / name / "config.json").write_text(
            json.dumps(config | {"quantization_config": given})
        )
        save_file(some, target / name / "model.safetensors")
    return target / "packed", target / "plain"


@pytest.mark.parametrize("family", ["llama3-gqa", "qwen2-bias", "phi3"])
def test_a_quantised_checkpoint_says_what_its_values_say(checkpoints, tmp_path, family):
    packed, plain = halved(checkpoints[family][0], tmp_path)
    for dtype in ("float32", "bfloat16"):
        engines = [slim.load(place, "cpu", dtype, weights="full") for place in (packed, plain)]
        got, want = (engine.prefill(draw(50)) for engine in engines)
        assert torch.equal(got, want)


def test_a_scale_of_zero_makes_zeros(checkpoints, tmp_path):
    """No division by it, so no NaN."""
    packed, _ = halved(checkpoints["llama3-gqa"][0], tmp_path)
    edit_tensors(packed, lambda t: t[LAST + "scales"].zero_())
    engine = slim.load(packed, "cpu", "float32", "dense")
    assert not engine.model.weights.layers[0].w_gate_up[64:].any()
    assert engine.prefill(draw(20)).isfinite().all()


SPOILED = {  # what the line must name: what is done to the tensors
    "missing model.layers.0.mlp.up_proj.scales": lambda t: t.pop(LAST + "scales"),
    r"qzeros has shape \(1, 1\), config.json asks for \(1, 8\)": lambda t: t.update(
        {LAST + "qzeros": torch.zeros(1, 1, dtype=torch.int32)}
    ),
    "qweight has dtype I64": lambda t: t.update({LAST + "qweight": t[LAST + "qweight"].long()}),
    "unexpected model.layers.0.mlp.up_proj.bias": lambda t: t.update(
        {LAST + "bias": torch.ones(64)}
    ),
    "missing model.layers.0.mlp.up_proj.weight": lambda t: [
        t.pop(LAST + part) for part in ("scales", "qzeros", "qweight")
    ],
}


@pytest.mark.parametrize("words", SPOILED)
def test_parts_that_do_not_fit_are_named(checkpoints, tmp_path, words):
    packed, _ = halved(checkpoints["llama3-gqa"][0], tmp_path)
    edit_tensors(packed, SPOILED[words])
    with pytest.raises(ValueError, match=words):
        slim.load(packed, "cpu")


def weights(**changes):
    args = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128} | changes
    return {"config_groups": {"group_0": {"weights": args}}}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "pack-quantized"} | weights()
OTHERS = {  # what the line must name: the quantization_config
    "of kind None": {"bits": 4},
    "of kind 'mxfp4'": {"quant_method": "mxfp4"},
    "bits is 3": GPTQ | {"bits": 3},
    "checkpoint_format is 'marlin'": GPTQ | {"checkpoint_format": "marlin"},
    "dynamic": GPTQ | {"dynamic": {"a": {"bits": 8}}},
    "group_size is 0": GPTQ | {"group_size": 0},
    "groups of 24 do not divide its 32 columns": GPTQ | {"group_size": 24},
    "version is 'gemv'": {"quant_method": "awq", "bits": 4, "version": "GEMV"},
    "format is 'nvfp4-pack-quantized'": COMPRESSED | {"format": "nvfp4-pack-quantized"},
    "num_bits is 2": COMPRESSED | weights(num_bits=2),
    "strategy is 'tensor_group'": COMPRESSED | weights(strategy="tensor_group"),
    "transform_config": COMPRESSED | {"transform_config": {"R1": {}}},
    "sparse-24": COMPRESSED | {"sparsity_config": {"format": "sparse-24-bitmask"}},
    "config_groups": COMPRESSED | {"config_groups": None},
    "bnb_4bit_quant_type is 'fp4'": {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "fp4",
    },
    "load_in_4bit is False": {"quant_method": "bitsandbytes", "load_in_4bit": False},
    r"tiles are \[0, 1\]": {"quant_method": "fp8", "weight_block_size": [0, 1]},
}


@pytest.mark.parametrize("words", OTHERS)
def test_another_way_to_quantise_is_refused_by_name(checkpoints, tmp_path, words):
    """With what would work instead; where the matrices do not divide, that is named."""
    packed, _ = halved(checkpoints["llama3-gqa"][0], tmp_path)
    edit_json(packed / "config.json", quantization_config=OTHERS[words])
    with pytest.raises(ValueError, match=words) as raised:
        slim.load(packed, "cpu")
    assert "\n" not in str(raised.value)
