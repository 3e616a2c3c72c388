"""The command line: what it answers, what it refuses, and how it ends."""

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import blockmap
import kvcache
import planning.checkpoint
import planning.memory
import slim
import tokenizer
from cli import fit
from cli import main as cli_main
from cli.options import DEMO, first_tokens, is_of_checkpoint, parse_args
from cli.show import Progress, visible
from cli.talk import Talk, stop_between_tokens
from conftest import (
    HERE,
    LLAMA3_ROPE,
    edit_json,
    edit_tensors,
    make_checkpoint,
    set_free,
    set_lookup_heads,
)
from loading.template import Template
from loading.test_saved import edit_saved
from loading.test_vocabulary import of_bytes
from planning.checkpoint import Checkpoint

K = "model.layers.1.self_attn.k_proj.weight"


def of_kind(folder, architecture, model_type=None, **keys):
    edit_json(folder / "config.json", architectures=[architecture], model_type=model_type, **keys)


def yarn(folder, **keys):
    rope = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
    }
    edit_json(folder / "config.json", rope_parameters=rope | keys)


BROKEN = {  # what is done to a good checkpoint: what the one line must name
    "no config": (lambda d: (d / "config.json").unlink(), "config.json"),
    "config is not JSON": (lambda d: (d / "config.json").write_text("{"), "not JSON"),
    "a shard elsewhere": (
        lambda d: (
            (d / "model.safetensors").rename(d.parent / "other.safetensors"),
            (d / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "../other.safetensors"}}'
            ),
        ),
        "outside its folder",
    ),
    "key missing": (lambda d: edit_json(d / "config.json", rms_norm_eps="remove"), "rms_norm_eps"),
    "key of another type": (
        lambda d: edit_json(d / "config.json", hidden_size="32"),
        "hidden_size",
    ),
    "architecture": (
        lambda d: edit_json(d / "config.json", architectures=["GemmaForCausalLM"]),
        "GemmaForCausalLM",
    ),
    "activation": (lambda d: edit_json(d / "config.json", hidden_act="gelu"), "hidden_act"),
    "rope type": (
        lambda d: edit_json(
            d / "config.json", rope_parameters={"rope_type": "dynamic", "factor": 2.0}
        ),
        "dynamic",
    ),
    "yarn that shrinks": (lambda d: yarn(d, factor=0.5), "at least 1"),
    "yarn without a factor": (lambda d: yarn(d, factor="x"), "factor"),
    "yarn of a context in words": (
        lambda d: yarn(d, original_max_position_embeddings="x"),
        "original_max",
    ),
    "yarn's other keys": (lambda d: yarn(d, log_scale=2.0), "log_scale"),
    "yarn's flag": (lambda d: yarn(d, truncate=1), "truncate"),
    "yarn of no context": (lambda d: yarn(d, original_max_position_embeddings=1), "above 1"),
    "yarn of theta 1": (lambda d: yarn(d, rope_theta=1.0), "above 1"),
    "longrope's list": (
        lambda d: yarn(d, rope_type="longrope", short_factor=[1.0], long_factor=[1.0]),
        "list 4",
    ),
    "recurrent layers": (
        lambda d: of_kind(d, "Qwen3NextForCausalLM", num_experts=512),
        "pruning would break",
    ),
    "recurrent layers by type": (
        lambda d: edit_json(d / "config.json", layer_types=["linear_attention"] * 5),
        "pruning would break",
    ),
    "experts": (lambda d: of_kind(d, "Qwen3MoeForCausalLM"), "mixture of experts"),
    "experts by key": (
        lambda d: edit_json(d / "config.json", num_local_experts=8),
        "mixture of experts",
    ),
    "windows": (lambda d: of_kind(d, "Gemma3ForCausalLM"), "sliding window"),
    "windows by type": (
        lambda d: edit_json(d / "config.json", layer_types=["sliding_attention", "full_attention"]),
        "sliding window",
    ),
    "images": (lambda d: of_kind(d, "Mistral3ForConditionalGeneration"), "more than text"),
    "layers without RoPE": (
        lambda d: of_kind(d, "SmolLM3ForCausalLM", model_type="smollm3", no_rope_layers=[1]),
        "no_rope_layers",
    ),
    "a missing norm": (
        lambda d: of_kind(d, "Qwen3ForCausalLM", model_type="qwen3", head_dim=8),
        "missing model.layers.0.self_attn.q_norm.weight",
    ),
    "a window nobody mentions": (
        lambda d: of_kind(
            d, "MistralForCausalLM", model_type="mistral", max_position_embeddings=8192
        ),
        "sliding_window",
    ),
    "part of a head": (
        lambda d: edit_json(d / "config.json", partial_rotary_factor=0.5),
        "partial_rotary_factor",
    ),
    **{
        f"Granite's {key}": (lambda d, key=key: edit_json(d / "config.json", **{key: 0.5}), key)
        for key in (
            "embedding_multiplier",
            "residual_multiplier",
            "logits_scaling",
            "attention_multiplier",
        )
    },
    "architecture of another type": (
        lambda d: edit_json(d / "config.json", architectures=[[1]]),
        "architecture",
    ),
    "negative": (lambda d: edit_json(d / "config.json", hidden_size=-32), "hidden_size"),
    "boundless": (
        lambda d: edit_json(d / "config.json", num_hidden_layers=10**30),
        "num_hidden_layers",
    ),
    "infinite": (lambda d: edit_json(d / "config.json", rms_norm_eps=float("inf")), "rms_norm_eps"),
    "a zero for nothing": (lambda d: edit_json(d / "config.json", head_dim=0), "head_dim"),
    "theta": (
        lambda d: edit_json(d / "config.json", rope_parameters={"rope_theta": True}),
        "rope_theta",
    ),
    "tied how": (
        lambda d: edit_json(d / "config.json", tie_word_embeddings="no"),
        "tie_word_embeddings",
    ),
    "rope is text": (lambda d: edit_json(d / "config.json", rope_scaling="linear"), "rope_scaling"),
    "rope without type": (
        lambda d: edit_json(d / "config.json", rope_parameters={"factor": 2.0}),
        "type",
    ),
    "rope of two types": (
        lambda d: edit_json(
            d / "config.json", rope_parameters={"rope_type": "default", "mrope_section": [1]}
        ),
        "mrope_section",
    ),
    "rope factor": (
        lambda d: edit_json(
            d / "config.json", rope_parameters={"rope_type": "linear", "factor": -2}
        ),
        "factor",
    ),
    "rope ramp": (
        lambda d: edit_json(
            d / "config.json", rope_parameters={**LLAMA3_ROPE, "high_freq_factor": 0.5}
        ),
        "high_freq_factor",
    ),
    "rope of two minds": (
        lambda d: edit_json(
            d / "config.json",
            rope_parameters={"rope_type": "linear", "type": "llama3", "factor": 2.0},
        ),
        "twice",
    ),
    "theta of two minds": (lambda d: edit_json(d / "config.json", rope_theta=7.0), "twice"),
    "layer types": (lambda d: edit_json(d / "config.json", layer_types=5), "layer_types"),
    "too few layer types": (
        lambda d: edit_json(d / "config.json", layer_types=["full_attention"]),
        "layer_types",
    ),
    "model type": (lambda d: edit_json(d / "config.json", model_type="mistral"), "model_type"),
    "stop token beyond": (
        lambda d: (d / "generation_config.json").write_text('{"eos_token_id": 1000000000}'),
        "eos_token_id",
    ),
    "tokenizer config": (lambda d: (d / "tokenizer_config.json").write_text("[]"), "not an object"),
    "BOS or not": (
        lambda d: (d / "tokenizer_config.json").write_text('{"add_bos_token": "false"}'),
        "add_bos_token",
    ),
    "nested JSON": (lambda d: (d / "config.json").write_text("[" * 100_000), "not JSON"),
    "stop token": (
        lambda d: (d / "generation_config.json").write_text('{"eos_token_id": [[1]]}'),
        "eos_token_id",
    ),
    "weight map": (
        lambda d: (
            (d / "model.safetensors").unlink(),
            (d / "model.safetensors.index.json").write_text('{"weight_map": {"a": ["x"]}}'),
        ),
        "weight_map",
    ),
    "weights not numbers": (
        lambda d: edit_tensors(d, lambda t: t["model.norm.weight"][:1].fill_(torch.inf)),
        "logits are not finite",
    ),
    "rope key": (
        lambda d: edit_json(d / "config.json", rope_parameters={"rope_type": "linear"}),
        "factor",
    ),
    "quantised": (
        lambda d: edit_json(d / "config.json", quantization_config={"bits": 4}),
        "quantization_config",
    ),
    "sliding window": (
        lambda d: edit_json(d / "config.json", sliding_window=1024),
        "sliding_window",
    ),
    "bias": (
        lambda d: edit_json(d / "config.json", attention_bias=True),
        "missing model.layers.0.self_attn.q_proj.bias",
    ),
    "bias or not": (lambda d: edit_json(d / "config.json", attention_bias="no"), "attention_bias"),
    "truncated": (
        lambda d: (d / "model.safetensors").write_bytes(
            (d / "model.safetensors").read_bytes()[:-100]
        ),
        "truncated",
    ),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "model.safetensors"),
    "missing tensor": (lambda d: edit_tensors(d, lambda t: t.pop(K)), f"missing {K}"),
    "unexpected tensor": (
        lambda d: edit_tensors(d, lambda t: t.update(extra=torch.ones(1))),
        "unexpected extra",
    ),
    "shape": (lambda d: edit_tensors(d, lambda t: t.update({K: t[K][:8]})), "(8, 32)"),
    "integer weights": (
        lambda d: edit_tensors(d, lambda t: t.update({K: t[K].to(torch.int8)})),
        "I8",
    ),
    "absent shard": (
        lambda d: (
            (d / "model.safetensors").unlink(),
            (d / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "model-1.safetensors"}}'
            ),
        ),
        "model-1.safetensors",
    ),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "tokenizer"),
    "garbage tokenizer": (
        lambda d: (d / "tokenizer.json").write_bytes(b"\x00\x01garbage"),
        "tokenizer",
    ),
}


WRONG = {  # arguments: what the one line must name
    "--ckpt nowhere": "nowhere",
    "--prompt absent.txt": "absent.txt",
    "--prompt .": "directory",
    "--prompt empty.txt": "empty",
    "--prompt latin1.txt": "UTF-8",
    "--schedule 1-200": "1-200",
    "--schedule 3:512,2:256": "increase",
    "--schedule 2:512,2:256": "increase",
    "--schedule 2:256,3:512": "decrease",
    "--schedule 0:512": "1..4",
    "--schedule 5:512": "1..4",
    "--schedule 2:127": "2 blocks",
    "--schedule 2:1/0": "share of the prompt",
    "--schedule 2:3/2": "0..1",
    "--schedule 2:0.0": "0..1",
    "--schedule 2:nan": "0..1",
    "--schedule 2:1e999999999": "0..1",
    "--schedule 2:1/8,3:1/4": "decrease",
    "--schedule 2:1/4:64,3:1/8:128": "must not keep more",
    "--schedule 2:1/4:-1": "whole number",
    "--schedule 2:1/4:1:1": "form",
    "--schedule 2:1e999:5": "form",
    "--score peek": "peak, paper",
    "--unit-len 7": "does not divide",
    "--unit-len 0": "--unit-len",
    "--block-len -8": "--block-len",
    "--window -1": "--window",
    "--gamma 1.5": "0..1",
    "--gamma nan": "0..1",
    "--temperature -1": "--temperature",
    "--temperature nan": "--temperature",
    "--temperature 1e-320": "--temperature",
    "--seed -1": "--seed",
    "--draft 17": "--draft 17",
    "--dense --schedule 2:512": "--dense",
    "--dense --compare": "--dense",
    "--compare --schedule dense": "--compare",
    "--device cuda:²": "--device",
    "--block-len 1000000000000": "--block-len",
    "--prompt /proc/self/mem": "cannot be read",
    "--ckpt ~nosuchuser/x": "nosuchuser",
    "--rope-yarn 0.5": "--rope-yarn",
    "--system hi": "--system",
    "--no-think": "--no-think",
    "--raw --system hi": "--raw excludes --system",
    "--stop=": "--stop",
    "--rope-yarn nan": "--rope-yarn",
    "--max-new 5": "--max-new",
    "--top-p 0": "--top-p",
    "--max-new-tokens 0": "--max-new-tokens",
    "--max-prompt-tokens 0": "--max-prompt-tokens",
    "--max-prompt-tokens 1 --prompt rare.txt": "--max-prompt-tokens",
    "--device tpu": "tpu",
    "--device cuda:99": "cuda:99",
    "--dtype int8": "int8",
    "--chunk -1": "--chunk",
    "--chunk many": "--chunk",
    "--no-such-flag": "--no-such-flag",
    "--chat --json": "--chat",
    "--compare --chat": "--compare",
    "--compare --ask a --ask b": "--ask",
    "--resume text.txt --ask a": "--prompt",
    "--prompt - --chat": "standard input",
    "--save no/where.slim --ask a": "no/where.slim",
    "--save . --ask a": "--save",
    "--map /dev/null": "--map",
    "--map no/where.html": "no/where.html",
    "--map /proc/x": "--map /proc/x cannot be written: no file can be made in /proc: ",
    "--save /proc/x": "--save /proc/x cannot be written: no file can be made in /proc: ",
    "--map text.txt": "--prompt",
    "--save ckpt/config.json": "would overwrite a file of --ckpt ckpt",
    "--save a --map a": "--save",
}


@pytest.fixture
def cli(talking, tmp_path, monkeypatch, capfd):
    """Run the command line in a folder with a checkpoint; return (exit code, stdout, stderr)."""
    folder = tmp_path / "ckpt"
    folder.mkdir()
    for file in talking.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("ABBA CAB " * 100)
    (tmp_path / "short.txt").write_text("ABBA CAB")
    (tmp_path / "rare.txt").write_text("\U00013000")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")

    def run(*args, ckpt="ckpt", prompt="text.txt"):
        given = " ".join(args)
        args = [
            *args,
            *([] if "--ckpt" in given or "--resume" in given else ["--ckpt", ckpt]),
            *([] if "--prompt" in given or not prompt else ["--prompt", prompt]),
        ]
        capfd.readouterr()
        try:
            code = cli_main(args)
        except SystemExit as stop:
            code = stop.code
        out, err = capfd.readouterr()
        return code, out, err

    run.folder = folder
    return run


def is_one_line(err, names):
    assert err.count("\n") == 1 and err.startswith("slim: error: "), err
    assert names in err, err


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_checkpoint_is_refused_in_one_line(cli, what):
    """People have broken downloads: the line must name the file or key to look at."""
    damage, names = BROKEN[what]
    damage(cli.folder)
    code, out, err = cli()
    assert (code, out) == (2, "")
    is_one_line(
        err.splitlines(True)[-1] if what == "weights not numbers" else err, names
    )  # only the first step can tell


@pytest.mark.parametrize("args", WRONG)
def test_wrong_arguments_are_refused_in_one_line(cli, args):
    """Whatever is typed, the answer is a line that names the flag, and exit code 2."""
    code, out, err = cli(*args.split())
    assert (code, out) == (2, "")
    is_one_line(err, WRONG[args])


def test_all_that_is_wrong_with_the_tensors_is_listed(cli):
    """One run must show all, not one fault a run."""
    edit_tensors(
        cli.folder, lambda t: (t.pop(K), t.pop("lm_head.weight"), t.update(extra=torch.ones(1)))
    )
    _, _, err = cli()
    assert all(name in err for name in (K, "lm_head.weight", "extra"))


def test_a_model_too_big_is_refused_before_it_is_loaded_with_the_flag_that_helps(cli, monkeypatch):
    """Loading takes minutes; the refusal must come first."""
    monkeypatch.setattr(slim, "load_weights", lambda *_: pytest.fail("weights were loaded"))
    set_free(monkeypatch, planning.memory.KERNEL_BYTES + 2_000_000)
    code, _, err = cli()
    assert code == 2
    is_one_line(err, "it would fit with --")
    set_free(monkeypatch, 3)
    is_one_line(cli()[2], "no flag makes it fit")


def test_a_plan_says_what_fits_and_loads_nothing(cli, monkeypatch):
    """In each kind of weights, dense and pruned, whether or not the heads were measured."""
    monkeypatch.setattr(slim, "load_weights", lambda *_: pytest.fail("weights were loaded"))
    code, out, err = cli("--plan", "--dtype", "bfloat16", prompt=None)
    assert (code, err) == (0, "")
    assert "full, bfloat16" in out and "int8, bfloat16" in out and "int4, bfloat16" in out
    assert "assumed" in out
    lines = [line.split()[:2] for line in out.splitlines()]
    assert ["2,048", "dense"] in lines and ["2,048", "slim"] in lines
    assert "(all of its context)" in out and " *" not in out.split("free\n")[1]
    set_free(monkeypatch, planning.memory.KERNEL_BYTES)
    out = cli("--plan", prompt=None)[1].split("free\n")[1]
    assert " *" in out and "(all of its context)" not in out
    is_one_line(cli("--plan", "--ask", "x", prompt=None)[2], "--plan excludes --ask")


def test_a_saved_text_finds_the_file_that_read_it(cli):
    """A checkpoint may be a GGUF file, not a folder; and its files are not written over."""
    assert cli("--save", "text.slim", "--max-new-tokens", "2")[0] == 0
    map_ = "--map", "ckpt/config.json"
    err = cli("--resume", "text.slim", "--ask", "AB", *map_, prompt=None)[2]
    is_one_line(err, "would overwrite a file of --ckpt")
    for file, words in (
        ("short.txt", "short.txt is a file, and not GGUF"),
        ("gone", "which is gone"),
    ):
        edit_saved("text.slim", lambda header, _: header.update(ckpt=file), sign=True)
        is_one_line(cli("--resume", "text.slim", "--ask", "AB", prompt=None)[2], words)


def test_what_a_link_of_a_checkpoint_leads_to_is_not_written_over(cli, tmp_path):
    """The local cache keeps links to files of other names; a GGUF file may have several parts."""
    blob = tmp_path / "blob"
    (cli.folder / "config.json").rename(blob)
    (cli.folder / "config.json").symlink_to(blob)
    assert is_of_checkpoint(blob, str(cli.folder))
    parts = [tmp_path / f"m-0000{i}-of-00002.gguf" for i in (1, 2)]
    for part in parts:
        part.write_bytes(b"GGUF")
    assert is_of_checkpoint(parts[1], str(parts[0]))
    assert not is_of_checkpoint(tmp_path / "short.txt", str(parts[0]))


@pytest.mark.parametrize("context, last", [(4096, 4096), (131072, 131072), (262144, 131072)])
def test_a_plans_lengths_end_where_the_model_does(tiny, context, last):
    """Each once, also if a model goes further than the last."""
    ckpt = Checkpoint.open(tiny, "cpu")
    ckpt = replace(ckpt, config=replace(ckpt.config, max_len=context))
    found = fit.lengths(ckpt)
    assert found == sorted(set(found)) and found[-1] == last


def test_packed_weights_are_said(cli):
    """On the line about memory, and in JSON."""
    args = ("--weights", "int8", "--dtype", "bfloat16", "--ask", "A", "--max-new-tokens", "2")
    code, out, err = cli(*args, "--json")
    assert code == 0 and " weights (int8) + " in err
    assert json.loads(out)["weights"] == "int8"


def test_the_command_line_answers_and_says_what_it_did(cli):
    """The answer alone goes to standard output, in either mode."""
    code, out, err = cli("--max-new-tokens", "8", "--schedule", "2:256,3:128")
    assert code == 0 and out.endswith("\n")
    assert "schedule 2:256,3:128" in err and "kept per stage" in err and "weights +" in err
    code, quiet, err = cli("--max-new-tokens", "8", "--schedule", "2:256,3:128", "--quiet")
    assert (code, quiet, err) == (0, out, "")


@pytest.mark.parametrize(
    ("args", "heads", "said"),
    [
        ("", [(0, 1), (1, 2)], "2:256,3:128 by lookup (2 heads), 8"),
        ("", [(1, 3)], "2:256,3:128 by lookup (1 head), 8"),
        ("", [], "by peak (no heads that look things up were found below the first boundary), 8"),
        ("", [(3, 0)], "by peak (no heads that look things up were found below the first bou"),
        ("--score peak", [(0, 1)], "2:256,3:128 by peak, 8"),
        ("--score paper", [(0, 1)], "2:256,3:128 by paper, 8"),
        ("--dense", [(0, 1)], "schedule dense, 8"),
    ],
)
def test_it_says_which_rule_ranks_and_by_how_many_heads(cli, monkeypatch, args, heads, said):
    """`lookup` falls back to `peak` in a model without such heads: that must not go unseen."""
    set_lookup_heads(monkeypatch, *heads)
    schedule = () if args == "--dense" else ("--schedule", "2:256,3:128")
    code, out, err = cli("--json", "--max-new-tokens", "2", *schedule, *args.split())
    assert code == 0 and said in err.splitlines()[0]
    ranking = [f"{layer}.{head}" for layer, head in heads] if "by lookup" in said else []
    assert json.loads(out)["lookup_heads"] == ranking


def test_json_holds_what_the_engine_counted(cli):
    """Programs read these keys."""
    code, out, err = cli("--json", "--max-new-tokens", "8", "--schedule", "2:256,3:128", "--quiet")
    answer = json.loads(out)
    assert code == 0 and err == ""
    assert set(answer) == {
        "text",
        "ids",
        "prompt_tokens",
        "kept",
        "ttft_s",
        "decode_tok_s",
        "kv_gpu_bytes",
        "kv_cpu_bytes",
        "kv_dense_bytes",
        "swaps",
        "revived",
        "drafted",
        "accepted",
        "weights",
        "weight_bytes",
        "lookup_heads",
        "score",
    }
    assert len(answer["ids"]) == 8 and answer["kept"][0] == answer["prompt_tokens"]
    assert answer["text"] == tokenizer.load(cli.folder).decode(answer["ids"])
    assert json.loads(cli("--json", "--max-new-tokens", "8", "--dense", "--quiet")[1])["kept"] == [
        answer["prompt_tokens"]
    ]


def test_a_prompt_beyond_the_trained_context_is_a_warning(cli):
    """The answer may be poor, but it is the user's choice."""
    edit_json(cli.folder / "config.json", max_position_embeddings=100)
    code, _, err = cli("--max-new-tokens", "2")
    assert code == 0 and "warning" in err and "100" in err


def test_yarn_stretches_the_context_and_warns_where_it_is_not_needed(cli):
    """And a saved conversation remembers it."""
    edit_json(cli.folder / "config.json", max_position_embeddings=1000)
    long = ["--prompt", "long.txt", "--max-new-tokens", "2"]
    Path("long.txt").write_text("ABBA CAB " * 400)
    assert "beyond the 1,000" in cli(*long)[2]
    plain, (code, stretched, err) = (
        cli(*long, "--json")[1],
        cli(*long, "--rope-yarn", "8", "--json"),
    )
    assert code == 0 and "warning" not in err and stretched != plain
    assert (
        "fit in the 1,000"
        in cli("--prompt", "short.txt", "--max-new-tokens", "2", "--rope-yarn", "8")[2]
    )
    cli(*long, "--rope-yarn", "8", "--save", "text.slim")
    code, _, err = cli(
        "--resume", "text.slim", "--ask", "CAB?", "--max-new-tokens", "2", prompt=None
    )
    assert code == 0 and "warning" not in err
    edit_json(cli.folder / "config.json", rope_parameters={**LLAMA3_ROPE, "rope_theta": 10000.0})
    is_one_line(cli(*long, "--rope-yarn", "8")[2], "scales RoPE itself, by 'llama3'")


def test_the_chat_template_the_system_text_and_stops(cli):
    """What is read differs by what the template makes of it; a broken template is one line."""
    few = ["--ask", "CAB?", "--max-new-tokens", "12", "--quiet"]
    raw = cli(*few)[1]
    system = "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
    template = system + "[{{ messages[-1].content }}]"
    think = "{% if enable_thinking is false %}no{% endif %}"
    edit_json_file(cli.folder / "tokenizer_config.json", chat_template=template + think)
    plain = cli(*few)[1]
    assert cli(*few, "--raw")[1] == raw
    ways = [], ["--system", "ABBA"], ["--no-think"], ["--raw"]
    answers = [json.loads(cli(*few, "--json", *way)[1]) for way in ways]
    assert len({(a["prompt_tokens"], a["text"]) for a in answers}) == 4
    stop = plain[3:6]
    assert (
        cli(*few, "--stop", "never there", "--stop", stop)[1] == plain[: plain.index(stop)] + "\n"
    )
    edit_json_file(
        cli.folder / "tokenizer_config.json", chat_template="{{ raise_exception('one turn only') }}"
    )
    code, out, err = cli(*few)
    assert (code, out) == (2, "")
    is_one_line(err, "one turn only; give the prompt as it is with --raw")
    assert cli(*few, "--raw")[1] == raw


def test_what_a_terminal_would_obey_is_shown_instead(cli):
    """A template, a config and an argument may hold Escape; other languages stay as they are."""
    template = "{{ raise_exception('\x1b[2J\x9b語\u202e') }}"
    edit_json_file(cli.folder / "tokenizer_config.json", chat_template=template)
    is_one_line(cli("--ask", "CAB?")[2], r"\x1b[2J\x9b語\u202e; give")
    is_one_line(cli("--no-such\x1b")[2], r"--no-such\x1b")
    edit_json(cli.folder / "config.json", **{"architectures": ["\x1b"], "model_type": "\x1b"})
    is_one_line(cli()[2], r"\x1b")
    code = "from parallel.ranks import print_error; print_error('\x1b')"
    rank = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True)
    assert rank.stderr == b"slim: error: \\x1b\n"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[-1].content }}",
        "{% for m in messages %}{{ m.content }}{% endfor %}{{ messages[0].content }}",
        "{% if messages[2:] %}{{ raise_exception('one turn') }}{% endif %}"
        "{{ messages[0].content }}",
    ],
)
def test_a_template_of_one_turn_is_refused_before_the_first_of_several_answers(
    cli, source, monkeypatch
):
    """Else the text is read for an hour, and the second question fails."""
    edit_json_file(cli.folder / "tokenizer_config.json", chat_template=source)
    assert cli("--ask", "CAB?", "--max-new-tokens", "1")[0] == 0
    monkeypatch.setattr(slim, "load_weights", lambda *_: pytest.fail("weights were loaded"))
    for more in (["--ask", "CAB?", "--ask", "ABBA?"], ["--chat"]):
        code, out, err = cli(*more, "--max-new-tokens", "1")
        assert (code, out) == (2, "")
        is_one_line(err, "--raw")


def edit_json_file(path, **keys):
    path.write_text(json.dumps(keys))


def popen(cli, *args, **kw):
    command = [sys.executable, str(HERE / "slim.py"), "--ckpt", str(cli.folder), *args]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw
    )


def test_the_streamed_answer_stays_on_a_terminal(cli):
    """The progress line erases itself, and nothing else."""
    program = f"{sys.executable} {HERE / 'slim.py'} --ckpt {cli.folder}"
    command = f"{program} --prompt text.txt --max-new-tokens 30 --chunk 4"
    pid, fd = pty.fork()
    if pid == 0:
        os.execvp("sh", ["sh", "-c", command])
    shown = b""
    while True:
        try:
            shown += os.read(fd, 4096)
        except OSError:  # how a terminal says that the other side has gone
            break
    assert os.waitpid(pid, 0)[1] == 0
    answer = cli("--max-new-tokens", "30", "--chunk", "4", "--quiet")[1].rstrip("\n")
    text = shown.decode(errors="replace").replace("\r\n", "\n")
    assert visible(answer) in text.split("\033[K")[-1] and "reading the prompt" in text


def test_standard_input_is_a_prompt_and_a_closed_pipe_no_traceback(cli):
    """As in `cat book | slim.py --prompt - | head`."""
    process = popen(cli, "--prompt", "-", "--max-new-tokens", "2000", stdin=subprocess.PIPE)
    process.stdin.write("ABBA " * 50)
    process.stdin.close()
    process.stdout.read(1)
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    assert process.wait(60) == 141


def test_ctrl_c_prints_the_summary_and_exits_130(cli):
    """A shell's loop must see that it was interrupted."""
    process = popen(cli, "--prompt", "text.txt", "--max-new-tokens", "4000")
    process.stdout.read(1)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "kept per stage" in err and "Traceback" not in err


def test_ctrl_c_during_the_start_is_one_line(cli, tmp_path):
    """Importing torch takes seconds, in which people notice a wrong path."""
    (tmp_path / "torch.py").write_text("import time\nprint(1, flush=True)\ntime.sleep(60)\n")
    command = [sys.executable, HERE / "slim.py", "--ckpt", cli.folder, "--ask", "AB"]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env=env, text=True, stdout=pipe, stderr=pipe)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "slim: interrupted\n")


def test_further_questions_are_follow_ups(cli):
    """The text is read once; a saved one answers the same, and so do questions that are typed."""
    ask = [
        "--ask",
        "CAB?",
        "--ask",
        "ABBA?",
        "--max-new-tokens",
        "5",
        "--schedule",
        "2:256,3:128",
        "--block-len",
        "32",
    ]
    code, out, err = cli(*ask)
    assert code == 0 and out.count("\n") >= 2 and err.count("a new prefill took") == 1
    code, out, err = cli(*ask, "--save", "text.slim")
    assert code == 0 and err.count("a new prefill took") == 2 and "saved to text.slim" in err
    code, again, err = cli("--resume", "text.slim", *ask[:6], "--map", "map.html", prompt=None)
    assert (code, again) == (
        0,
        out,
    ) and "opened in" in err  # checkpoint and settings come from the file
    assert Path("text.slim").stat().st_mode & 0o777 == 0o600  # it holds the whole text
    assert Path("map.html").stat().st_mode & 0o777 == Path("text.txt").stat().st_mode & 0o777
    chat = "--prompt", "text.txt", "--chat", "--quiet", *ask[4:]
    answers = []
    for given, typed in ((), "CAB?\nABBA?\n/quit\nnever asked"), (ask[:4], "/quit\n"):
        process = popen(cli, *given, *chat, stdin=subprocess.PIPE)
        shown, err = process.communicate(typed, timeout=60)
        assert (process.returncode, err) == (0, "") and shown.count("\n") >= 2
        answers.append(shown)
    assert answers[0] == answers[1]
    lines = [json.loads(line) for line in cli(*ask, "--json")[1].splitlines()]
    assert [len(line["ids"]) for line in lines] == [5, 5]


def test_a_map_of_nothing_is_no_error(cli, tmp_path):
    """A question without a text, then /reset: there is no conversation left to draw."""
    process = popen(
        cli, "--chat", "--map", "map.html", "--max-new-tokens", "2", stdin=subprocess.PIPE
    )
    _, err = process.communicate("CAB?\n/reset\n/quit\n", timeout=60)
    assert process.returncode == 0 and "no map" in err and not (tmp_path / "map.html").exists()


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_first_tokens_are_that_many_and_whole_characters(talking, n):
    """A cut inside a character, or one that tokenizes to more."""
    tok = tokenizer.load(talking)
    for text in ("日本語テキスト", "ABBA CAB", "é" * 9):
        first = first_tokens(text, n, tok)
        assert text.startswith(first) and len(tok.encode(first)) <= n
    assert first_tokens("A", 5, tok) == "A"


def test_main_runs_with_any_stdout_and_on_any_thread(cli, monkeypatch):
    """A notebook's: no file descriptor, no signals."""
    codes, out = [], io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    args = ["--ckpt", "ckpt", "--prompt", "text.txt", "--quiet", "--max-new-tokens", "2", "--json"]
    thread = threading.Thread(target=lambda: codes.append(cli_main(args)))
    thread.start()
    thread.join(60)
    assert codes == [0] and json.loads(out.getvalue())["ids"]


def test_commands_of_the_chat(cli, tmp_path):
    """Each command, and wrong ones between them, cost nothing else."""
    process = popen(
        cli, "--prompt", "text.txt", "--chat", "--max-new-tokens", "4", stdin=subprocess.PIPE
    )
    out, err = process.communicate(
        "/stats\n/map\nCAB?\n/map other.html\n/reset\nCAB?\n/map third.html\n"
        "/map no/where.html\n/map text.txt\n/nonsense\n\n",
        timeout=60,
    )
    assert process.returncode == 0 and "Traceback" not in err
    assert all((tmp_path / name).is_file() for name in ("map.html", "other.html", "third.html"))
    assert all(
        words in err
        for words in (
            "of context in use",
            "not available",
            "are forgotten",
            "no/where.html",
            "would overwrite",
        )
    )
    first, second = out[: len(out) // 2], out[len(out) // 2 :]  # an answer may hold a newline
    assert first == second and first.endswith("\n"), out


def test_a_line_of_the_chat_that_is_no_text_costs_that_line(cli):
    """A stray byte of another encoding, a user that does not exist: the questions go on."""
    env = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}  # as in most locales
    few = ["--prompt", "text.txt", "--chat", "--max-new-tokens", "3", "--quiet"]
    process = popen(cli, *few, stdin=subprocess.PIPE, env=env, errors="surrogateescape")
    lines = "caf\udce9?", "/map ~nosuchuser/map.html", "/map caf\udce9", "/map a\0b", "CAB?"
    out, err = process.communicate("\n".join(lines), timeout=60)
    assert process.returncode == 0 and out
    assert err.count("\n") == 4 and err.count("slim: error: ") == 4, err
    assert err.count("byte 0xe9") == 2 and "nosuchuser" in err


def test_an_argument_that_is_no_text_is_refused(cli):
    """It was read with another character in its place."""
    for flag in ("--ask", "--stop", "--system"):
        code, _, err = cli(flag, "caf\udce9")
        assert code == 2
        is_one_line(err, f"{flag} cannot be decoded: byte 0xe9 at character 4")


def test_a_terminal_does_not_obey_the_model(cli, monkeypatch):
    """A document can make a model repeat Escape sequences; files and pipes get them as they are."""
    text = "a\x1b]52;c;eA==\x07\tb\r\n\u200d語\x9b"
    assert visible(text) == "a\\x1b]52;c;eA==\\x07\tb\\r\n\u200d語\\x9b"
    monkeypatch.setattr(tokenizer.Tokenizer, "stream", lambda self, ids, stops: [*ids] and [text])
    assert text in cli("--max-new-tokens", "1", "--quiet")[1].replace("\n", "\r\n", 0)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert visible(text) in cli("--max-new-tokens", "1", "--quiet")[1]


def test_a_record_for_the_map_is_kept_only_where_a_map_can_be_asked_for(cli, monkeypatch):
    """It grows with every step of every run."""
    made = []
    recorder = blockmap.Recorder
    monkeypatch.setattr(blockmap, "Recorder", lambda engine: made.append(1) or recorder(engine))
    few = ["--max-new-tokens", "1", "--quiet"]
    cli(*few, "--ask", "CAB?"), cli(*few, "--ask", "CAB?", "--ask", "ABBA?"), cli(*few, "--compare")
    assert not made
    cli(*few, "--map", "map.html"), cli(*few, "--save", "text.slim")
    assert len(made) == 2 and Path("map.html").is_file()


def test_ctrl_c_in_a_chat_stops_the_answer_and_not_the_program(cli):
    """The conversation took an hour to read."""
    process = popen(
        cli, "--prompt", "text.txt", "--chat", "--max-new-tokens", "3000", stdin=subprocess.PIPE
    )
    process.stdin.write("CAB?\n")
    process.stdin.flush()
    process.stdout.read(1)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate("/stats\n", timeout=60)
    assert process.returncode == 0 and "of context in use" in err and "Traceback" not in err


def test_two_ctrl_c_break_off_a_step():
    """A step of a long prompt takes minutes; there must be a way out."""
    with pytest.raises(KeyboardInterrupt), stop_between_tokens(True) as marks:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert marks == [True]
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)


def test_a_chat_keeps_the_turns_of_its_format(tmp_path, monkeypatch, capsys):
    """Text read alone, questions, a refused one, /reset: the ids spell what the format wants."""
    make_checkpoint(tmp_path / "ckpt", vocab=300)
    engine = slim.load(tmp_path / "ckpt", "cpu")
    tok = of_bytes({"<|im_start|>": 256, "<|im_end|>": 257})
    turn = (
        "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>\n{% endfor %}"
    )
    source = turn + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    tok.template, tok.system = Template(tmp_path, source, {}), "You are a helpful assistant."
    talk = Talk(
        engine,
        tok,
        parse_args(["--ckpt", "x", "--prompt", "x", "--chat", "--max-new-tokens", "1"]),
        Progress(True),
        lambda text: None,
    )

    def said():  # without what the random model answered
        parts = (
            bytes(i for i in engine.ids if i < 256).decode(errors="replace").split("assistant\n")
        )
        return [parts[0], *(part[part.index("\nuser") :] for part in parts[1:] if "\nuser" in part)]

    talk.begin(tok.chat("DOC", end=False))
    with monkeypatch.context() as m, pytest.raises(ValueError, match="more tokens need"):
        m.setattr(slim, "fits", lambda *args: False)
        talk.ask("too long " * 100)
    talk.ask("A?")
    talk.ask("B?")
    head = "system\nYou are a helpful assistant.\nuser\nDOC\n\nA?\n"
    assert said() == [head, "\nuser\nB?\n"]
    talk.reset()
    talk.ask("A?")
    assert said() == [head]


def test_a_chat_goes_on_off_the_main_thread_and_after_a_question_without_memory(
    cli, tmp_path, monkeypatch
):
    """Signals work on the main thread only; a refused question costs itself."""
    out, asked, grow = io.StringIO(), [], kvcache.KVCache.make_room

    def make_room(self, end, room=0):
        if end - self.length > 1:
            asked.append(end)
            if len(asked) == 2:  # the second question
                raise MemoryError("no room for 1 MiB of keys and values")
        return grow(self, end, room)

    monkeypatch.setattr(kvcache.KVCache, "make_room", make_room)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err := io.StringIO())
    monkeypatch.setattr(sys, "stdin", io.StringIO("CAB?\nCAB?\nCAB?\n/quit\n"))
    codes, args = [], ["--ckpt", "ckpt", "--prompt", "text.txt", "--chat", "--max-new-tokens", "1"]
    thread = threading.Thread(target=lambda: codes.append(cli_main(args)))
    thread.start()
    thread.join(60)
    assert codes == [0] and err.getvalue().count("no room for") == 1 and len(asked) == 3, (
        err.getvalue()
    )


def test_a_conversation_that_outgrows_longropes_short_factors_is_a_warning(tmp_path):
    """One that was long from the start has the long ones."""
    make_checkpoint(tmp_path / "ckpt", "phi3-longrope", vocab=300)
    engine, tok = slim.load(tmp_path / "ckpt", "cpu"), of_bytes({})
    trained = int(engine.config.rope_scaling["original_max_position_embeddings"])
    for n, warnings in ((trained // 2, [0, 1, 0]), (trained + 1, [0, 0, 0])):
        said = []
        args = parse_args(["--ckpt", "x", "--prompt", "x", "--chat", "--max-new-tokens", "1"])
        talk = Talk(engine, tok, args, Progress(True), said.append)
        talk.begin(tok.chat("a" * n))
        counts = [sum("LongRoPE" in line for line in said)]
        for question in ("b" * (trained // 2), "c"):
            said.clear()
            talk.ask(question)
            counts.append(sum("LongRoPE" in line for line in said))
        assert counts == warnings


def test_a_save_of_other_settings_is_refused_before_the_weights_are_loaded(cli, monkeypatch):
    """The header tells; minutes of loading would be lost."""
    cli("--save", "text.slim")
    monkeypatch.setattr(slim, "load_weights", lambda *_: pytest.fail("weights were loaded"))
    code, _, err = cli("--resume", "text.slim", "--ask", "CAB?", "--gamma", "0.5", prompt=None)
    assert code == 2
    is_one_line(err, "gamma 1.0 where this run has 0.5")


def test_a_save_that_another_model_cannot_go_on_with_names_its_own(cli, tmp_path):
    """Its schedule may ask for layers that the other one lacks."""
    cli("--save", "text.slim", "--schedule", "4:256")
    vocab = json.loads((cli.folder / "config.json").read_text())["vocab_size"]
    make_checkpoint(tmp_path / "shallow", layers=3, vocab=vocab)
    (tmp_path / "shallow/tokenizer.json").write_bytes((cli.folder / "tokenizer.json").read_bytes())
    resume = "--resume", "text.slim", "--ask", "CAB?"
    code, _, err = cli(*resume, "--ckpt", "shallow", prompt=None)
    assert code == 2
    is_one_line(err, f"; text.slim was saved with {cli.folder}")
    assert "boundary 4" in err
    assert "was saved with" not in cli(*resume, "--device", "tpu", prompt=None)[2]


def test_a_chats_first_question_chooses_what_to_keep(cli):
    """And says so: what was kept is known after it, and it is a part of reading the text."""
    schedule = "--schedule", "2:256,3:128", "--block-len", "32"
    chat = "--prompt", "text.txt", "--chat", "--max-new-tokens", "3", *schedule
    process = popen(cli, *chat, stdin=subprocess.PIPE)
    _, err = process.communicate("/stats\nCAB?\nABBA?\n/quit\n", timeout=60)
    read, first, second = err.split("slim: first token ")
    assert "the first question chooses the blocks" in read and " > " not in read
    assert "waiting rows" in read and "waiting rows" not in first
    assert first.count(" > ") == 2 and first.count("swapped") == 1
    assert "kept per stage" not in second
    costs = [
        float(re.search(r"a new prefill took ([\d.]+) s", line)[1]) for line in (first, second)
    ]
    reading = float(re.search(r"read in ([\d.]+) s", read)[1])
    assert reading <= costs[0] == costs[1]


def test_a_chat_whose_output_is_full_ends_in_one_line(cli):
    """A full disk or a closed input is no traceback."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this system")
    for command, names in (
        ("--chat >/dev/full", "No space left"),
        ("--json >/dev/full", "No space left"),
        ("--chat <&-", "closed"),
    ):
        program = f"{sys.executable} {HERE / 'slim.py'} --ckpt {cli.folder} --prompt text.txt"
        run = f"printf 'CAB?\\nABBA?\\n' | {program} --max-new-tokens 3 --quiet {command}"
        done = subprocess.run(["bash", "-c", run], capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        is_one_line(done.stderr, names)


def test_colours_are_for_terminals_that_want_them(cli, monkeypatch):
    """A pty for standard error: dim with a colour terminal, plain with NO_COLOR."""
    for extra, dim in (
        ({"TERM": "xterm"}, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False),
        ({"TERM": "dumb"}, False),
    ):
        master, slave = pty.openpty()
        env = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | extra
        command = [
            sys.executable,
            str(HERE / "slim.py"),
            "--ckpt",
            str(cli.folder),
            "--prompt",
            "text.txt",
            "--max-new-tokens",
            "2",
        ]
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=slave, env=env, check=True)
        os.close(slave)
        assert (b"\033[2m" in os.read(master, 100_000)) == dim


def test_the_demo_answers_from_a_pruned_document(capfd, monkeypatch, tmp_path):
    """`python slim.py` finds the number that stands in the text, most of it pruned, anywhere."""
    monkeypatch.chdir(tmp_path)
    assert cli_main(["--json", "--quiet"]) == 0
    both = json.loads(capfd.readouterr().out)
    question = DEMO["ask"].removeprefix("question: ")
    number = (
        (HERE / "demo" / "document.txt").read_text().replace("\n", " ").split(question + " ")[1][:4]
    )
    assert both["dense"]["text"].strip() == both["slim"]["text"].strip() == number
    assert both["slim"]["prompt_tokens"] > 8000
    assert both["slim"]["kept"][-1] < 512


def test_a_start_waits_for_no_import_that_it_does_not_use():
    """torch._dynamo alone takes as long as the rest of torch."""
    slow = "{'torch._dynamo', 'torch.distributed.tensor'}"
    code = f"import slim, cli, sys; print({slow} & {{*sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert run.stdout == "set()\n", run.stderr
