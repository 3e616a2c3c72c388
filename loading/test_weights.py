"""All of a checkpoint is loaded, from any layout we read, and it is found where it lies."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import planning.checkpoint
import planning.memory
import slim
from conftest import draw, edit_tensors, make_checkpoint
from loading.find import find_checkpoint


def test_sharded_half_precision_checkpoints_load_the_same(tiny, tmp_path, monkeypatch):
    model = make_checkpoint(tmp_path / "one", dtype=torch.bfloat16)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = (
        slim.load(tmp_path / name, "cpu", "float32").prefill(draw(50)) for name in ("one", "many")
    )
    assert torch.equal(one, many)
    for fast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(planning.checkpoint, "multiplies_bfloat16", lambda: fast)
        assert slim.load(tmp_path / "one", "cpu").kv.dtype == dtype


def test_fp8_weights_are_read_tile_by_tile(checkpoints, tmp_path):
    """As published for Qwen3: e4m3 with a scale per tile, the embedding and the norms left as they are."""
    folder, _ = checkpoints["qwen3"]
    config, tensors, plain = json.loads((folder / "config.json").read_text()), {}, {}
    for name, w in load_file(folder / "model.safetensors").items():
        tensors[name] = plain[name] = w
        if name.endswith("proj.weight"):
            rows, columns = (-(-n // size) for n, size in zip(w.shape, (24, 20)))
            scale = torch.rand(rows, columns) + 0.5
            spread = scale.repeat_interleave(24, 0)[: len(w)].repeat_interleave(20, 1)[
                :, : w.shape[1]
            ]
            tensors[name] = (w / spread).to(torch.float8_e4m3fn)
            tensors[name + "_scale_inv"], plain[name] = scale, tensors[name].float() * spread
    for name, some in (("fp8", tensors), ("plain", plain)):
        (tmp_path / name).mkdir()
        quantised = (
            {"quant_method": "fp8", "weight_block_size": [24, 20]} if name == "fp8" else None
        )
        (tmp_path / name / "config.json").write_text(
            json.dumps(config | {"quantization_config": quantised})
        )
        save_file(some, tmp_path / name / "model.safetensors")
    got, want = (
        slim.load(tmp_path / name, "cpu", "float32").prefill(draw(50)) for name in ("fp8", "plain")
    )
    assert torch.equal(got, want) and not torch.equal(
        got, slim.load(folder, "cpu").prefill(draw(50))
    )
    name = "model.layers.0.mlp.up_proj.weight"
    for spoil, words in (
        (lambda t: t.pop(name + "_scale_inv"), "F8_E4M3"),
        (lambda t: t.update({name + "_scale_inv": torch.ones(1, 1)}), "_scale_inv has shape"),
        (lambda t: t.update({name: plain[name].to(torch.int8)}), "I8"),
    ):
        edit_tensors(tmp_path / "fp8", spoil)
        with pytest.raises(ValueError, match=words):
            slim.load(tmp_path / "fp8", "cpu")


def test_checkpoints_are_found_by_path_name_id_and_alias(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub = tmp_path / "hub" / "models--meta-llama--Meta-Llama-3.1-8B"
    for folder in (
        tmp_path / "checkpoints" / "a",
        tmp_path / "elsewhere" / "b",
        hub / "snapshots" / "abc",
        hub / "refs",
    ):
        folder.mkdir(parents=True)
    (hub / "refs" / "main").write_text("abc")
    monkeypatch.setenv("SLIM_CHECKPOINTS", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert find_checkpoint(tiny) == tiny
    assert find_checkpoint("a").resolve() == tmp_path / "checkpoints" / "a"
    assert find_checkpoint("b") == tmp_path / "elsewhere" / "b"
    for name in ("llama3.1-8b", "meta-llama/Llama-3.1-8B"):
        assert find_checkpoint(name) == hub / "snapshots" / "abc"
    small = ("smollm2-135m-instruct", "HuggingFaceTB/SmolLM2-135M-Instruct")
    for alias, repo in (("qwen2.5-7b", "Qwen/Qwen2.5-7B"), small):
        with pytest.raises(FileNotFoundError, match=f"hf download {repo}"):
            find_checkpoint(alias)
