"""All of a checkpoint is loaded, from any layout we read, and it is found where it lies."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import loading.find
import loading.weights
import planning.checkpoint
import planning.memory
import slim
from conftest import ATOL, draw, edit_tensors, make_checkpoint
from loading import find
from loading.config import read_config
from loading.find import find_checkpoint
from loading.weights import open_shards, settle_head


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


@pytest.mark.skipif(
    not loading.weights.in_blocks(torch.device("cpu"), torch.bfloat16),
    reason="this CPU multiplies no packed matrices in bfloat16",
)
@pytest.mark.parametrize("family", ["llama3-gqa", "qwen2-bias", "llama3.2-tied"])
def test_packed_matrices_give_what_stored_ones_give(checkpoints, monkeypatch, family):
    """A packed matrix is another type, and takes another call for its bias and for a sum."""
    folder, _ = checkpoints[family]
    stored = slim.load(folder, "cpu", "bfloat16")
    stored_bytes = stored.ckpt.weight_bytes
    monkeypatch.setattr(loading.weights, "LEAST_IN_BLOCKS", 1)
    packed = slim.load(folder, "cpu", "bfloat16")
    for layer in packed.model.weights.layers:
        matrices = layer.wqkv, layer.wo, layer.w_gate_up, layer.w_down
        assert all(matrix.is_mkldnn for matrix in matrices)
    weights = packed.model.weights
    assert weights.head.is_mkldnn and not weights.embed.is_mkldnn
    copied = weights.embed.nbytes if packed.config.tied else 0
    assert packed.ckpt.weight_bytes == stored_bytes + copied
    ids = draw(70)
    wants = stored.prefill(ids[:-8]), stored.extend(ids[-8:-1]), stored.extend(ids[-1:])
    gots = packed.prefill(ids[:-8]), packed.extend(ids[-8:-1]), packed.extend(ids[-1:])
    for got, want in zip(gots, wants):
        atol = ATOL[torch.bfloat16] * want.abs().max().item()
        torch.testing.assert_close(got, want, atol=atol, rtol=0)


def test_fp8_weights_are_read_tile_by_tile(checkpoints, tmp_path):
    """As published for Qwen3: e4m3 with a scale per tile; embedding and norms stay as they are."""
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
        (lambda t: t.update({name: plain[name]}), "F32"),  # whose scale would not be used
    ):
        edit_tensors(tmp_path / "fp8", spoil)
        with pytest.raises(ValueError, match=words):
            slim.load(tmp_path / "fp8", "cpu")


EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TIED = {  # what a file of a model with a tied head holds: (how, whether the head is one of its own)
    "another head": (lambda t: t.update({HEAD: t[EMBED].flip(0)}), True),
    "a head that differs in the last bit": (
        lambda t: t.update(
            {HEAD: torch.cat([t[EMBED][:-1], t[EMBED][-1:].nextafter(t[EMBED][0])])}
        ),
        True,
    ),
    "the same twice": (lambda t: t.update({HEAD: t[EMBED].clone()}), False),
    "the head alone": (lambda t: t.update({HEAD: t.pop(EMBED)}), False),
}


@pytest.mark.parametrize("what", TIED)
def test_a_tied_head_is_compared_and_used_as_transformers_does(checkpoints, tmp_path, what):
    """A head that differs from the embedding was dropped silently: logits were off by 18."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoints["llama3.2-tied"][0], folder)
    change, own = TIED[what]
    edit_tensors(folder, change)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = draw(50)
    with torch.no_grad():
        want = reference(torch.tensor([ids])).logits[0, -1]
    engine = slim.load(folder, "cpu", "float32", "dense")
    torch.testing.assert_close(engine.prefill(ids), want, atol=ATOL[torch.float32], rtol=0)
    assert engine.config.tied is not own
    assert (engine.model.weights.head is engine.model.weights.embed) is not own
    engine.save(tmp_path / "talk.slim")
    slim.load(folder, "cpu", "float32", "dense").resume(tmp_path / "talk.slim")


def resident_file_bytes():
    """Return the memory of this process that is pages of files."""
    status = Path("/proc/self/status").read_text()
    return sum(int(n) for n in re.findall(r"Rss(?:File|Shmem):\s+(\d+)", status)) * 1024


def test_comparing_a_tied_head_holds_little_of_the_file(checkpoints, tmp_path):
    """Pages that were read through one mapping count as memory for as long as it lives."""
    matrix = torch.zeros(2**19, 32)  # 64 MiB
    save_file({EMBED: matrix, HEAD: matrix.clone()}, tmp_path / "model.safetensors")
    config = read_config(checkpoints["llama3.2-tied"][0] / "config.json")
    config = dataclasses.replace(config, vocab_size=2**19)
    tensors = open_shards(tmp_path)
    before = resident_file_bytes()
    assert settle_head(config, tensors).tied
    assert resident_file_bytes() - before < 2**25


def test_a_tied_head_of_another_shape_or_dtype_is_no_tied_head(checkpoints, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoints["llama3.2-tied"][0], folder)
    edit_tensors(folder, lambda t: t.update({HEAD: t[EMBED].to(torch.float64)}))
    assert not slim.load(folder, "cpu").config.tied
    for wrong in (torch.ones(3, 4), torch.ones(()), torch.ones(64, 32, 1)):
        edit_tensors(folder, lambda t, wrong=wrong: t.update({HEAD: wrong}))
        with pytest.raises(ValueError, match="lm_head.weight has shape"):
            slim.load(folder, "cpu")


@pytest.mark.parametrize(
    "name",
    ["vision.lm_head.weight", "visual.rotary_emb.inv_freq", "model.layers.0.self_attn.sinks"],
)
def test_no_tensor_is_dropped_for_how_its_name_ends(checkpoints, tmp_path, name):
    """Only what config.json determines is left unread, and that by its whole name."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoints["llama3.2-tied"][0], folder)
    for known in ("model.", "model.layers.0.self_attn."):
        edit_tensors(
            folder, lambda t, k=known: t.update({f"{k}rotary_emb.inv_freq": torch.ones(4)})
        )
    slim.load(folder, "cpu")
    edit_tensors(folder, lambda t: t.update({name: torch.ones(4)}))
    with pytest.raises(ValueError, match=f"unexpected {name}"):
        slim.load(folder, "cpu")


def test_what_would_not_be_applied_is_refused(tiny, tmp_path):
    """One tensor in two files, and an adapter beside the weights."""
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    save_file({HEAD: torch.ones(64, 32)}, folder / "b.safetensors")
    index = {"weight_map": {EMBED: "a.safetensors", HEAD: "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="a.safetensors both hold lm_head.weight"):
        slim.load(folder, "cpu")
    (folder / "a.safetensors").rename(folder / "model.safetensors")
    slim.load(folder, "cpu")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="adapter"):
        slim.load(folder, "cpu")


def test_a_checkpoint_made_under_the_repository_is_found_from_anywhere(tmp_path, monkeypatch):
    """The folder `checkpoints` of the current directory comes first."""
    for folder in ("repository", "here"):
        (tmp_path / folder / "checkpoints" / "made").mkdir(parents=True)
    monkeypatch.setattr(find, "ROOT", tmp_path / "repository")
    monkeypatch.chdir(tmp_path / "here")
    assert find_checkpoint("made").resolve() == tmp_path / "here" / "checkpoints" / "made"
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("made") == tmp_path / "repository" / "checkpoints" / "made"


def test_the_demo_is_found_from_anywhere_after_all_other_places(tmp_path, monkeypatch):
    """`slim.load("demo")` is what a newcomer types first, in whatever folder."""
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("demo") == find.ROOT / "demo"
    monkeypatch.setenv("SLIM_CHECKPOINTS", str(tmp_path / "mine"))
    (tmp_path / "mine" / "demo").mkdir(parents=True)
    assert find_checkpoint("demo") == tmp_path / "mine" / "demo"


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
    monkeypatch.setattr(loading.find, "ROOT", tmp_path)  # this repository may hold one
    small = ("smollm2-135m-instruct", "HuggingFaceTB/SmolLM2-135M-Instruct")
    for alias, repo in (("qwen2.5-7b", "Qwen/Qwen2.5-7B"), small):
        with pytest.raises(FileNotFoundError, match=f"hf download {repo}"):
            find_checkpoint(alias)
