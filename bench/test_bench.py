"""The speed benches on tiny models: what they refuse, what they survive, and what they count."""

import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers

sys.path.insert(0, str(ROOT := Path(__file__).resolve().parent.parent))
import slim
from bench import compare, memory, speed

COMPARE = f"--text=book.txt --skip=0 --ckpt={ROOT / 'demo'} --lengths=9 --new=2 --contestants=dense".split()
WRONG = {
    "--text=no.txt": "no.txt",
    "--text=bytes.txt": "UTF-8",
    "--text=": "--text",
    "--skip=99999": "99,999",
    "--skip=2490": "--skip",
    "--skip=-1": "-1 must",
    "--ckpt=nope": "no checkpoint 'nope'",
    "--lengths=a,b": "'a'",
    "--lengths=0": "'0'",
    f"--lengths={10**30}": "context",
    "--lengths=9,9": "twice",
    "--rounds=0": "--rounds 0",
    "--threads=0": "--threads 0",
    "--new=x": "invalid int",
    "--contestants=dense,bogus": "'bogus'",
    "--contestants=dense,,auto": "empty",
    "--contestants=auto,auto": "twice",
    "--contestants=llama.cpp": "--llama-cpp",
    "--llama-cpp='": "quotation",
    "--llama-cpp=": "no such program",
    "--llama-cpp=no-such x": "no such program",
}
SPEED_WRONG = {
    "--schedule=bogus": "'bogus'",
    "--device=cuda": "--device cuda",
    "--dtype=float8": "'float8'",
    "--lengths=1": "'1'",
    "--lengths=64,": "''",
    "--lengths=1025": "context",
    "--shape=mini": "not allowed",
    "--out=x": "--out",
}
MEMORY_WRONG = {
    "--lengths=x": "'x'",
    "--lengths=3": "'3'",
    "--lengths=900": "context",
    "--new=0": "--new 0",
    "--ckpt=nope": "'nope'",
    "--dtype=int8": "'int8'",
    "--schedule=x": "unrecognized",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{tied: folder} of random models with a context of 1,024 tokens."""
    torch.manual_seed(0)
    size = dict(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=5,
        num_attention_heads=4,
    )
    made = {tied: str(tmp_path_factory.mktemp("model")) for tied in (False, True)}
    for tied, folder in made.items():
        config = transformers.LlamaConfig(
            **size, max_position_embeddings=1024, tie_word_embeddings=tied
        )
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return made


@pytest.fixture(autouse=True)
def text(tmp_path, monkeypatch):
    (tmp_path / "book.txt").write_text("word " * 500)
    (tmp_path / "bytes.txt").write_bytes(b"\xff" * 9)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "read_rate", lambda: 1e9)


ALL_WRONG = (
    [(compare, o) for o in WRONG]
    + [(speed, o) for o in SPEED_WRONG]
    + [(memory, o) for o in MEMORY_WRONG]
)


@pytest.mark.parametrize("module, option", ALL_WRONG)
def test_bad_input_is_one_line_and_nothing_runs(module, option, folders, monkeypatch, capsys):
    monkeypatch.setattr(module, "last_line", lambda *_: pytest.fail("a run began"))
    usual, said = {
        compare: (COMPARE, WRONG),
        speed: ([f"--ckpt={folders[True]}", "--rss"], SPEED_WRONG),
        memory: ([f"--ckpt={folders[True]}", "--lengths=9"], MEMORY_WRONG),
    }[module]
    with pytest.raises(SystemExit, match="2"):
        module.main([*usual, option])
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and said[option] in err, err


def test_a_contestant_that_fails_is_a_row_and_the_others_go_on(monkeypatch, capsys):
    """One fails in its second round, and keeps the first; one has none."""
    figures = {"first_s": 1.0, "steps_ms": [2.0, 2.0], "peak_bytes": 2**20}
    error = ValueError("no room")
    runs = mock.Mock(
        side_effect=[figures, error, figures, figures, error, figures]
    )  # and another call is an error
    monkeypatch.setattr(compare, "one", runs)
    assert compare.main([*COMPARE, "--contestants=dense,transformers,auto", "--rounds=3"]) == 1
    assert [call.args[1][0] for call in runs.mock_calls] == list("dtadad")
    rows = [
        line.split(" | ")[:2]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("| ")
    ]
    assert rows[1] == ["| dense", "1.00"] and rows[2][0] == "| transformers failed: no room"
    assert rows[3] == ["| auto failed after 1 rounds: no room", "1.00"]


def test_what_a_program_does_wrong_is_said():
    wrong = {"exit 3": "exit code 3", "kill -9 $$": "signal 9", "echo {}": "it printed '{}'"}
    for script, said in {**wrong, "echo Error: it >&2; echo x >&2; exit 1": "Error: it"}.items():
        with pytest.raises(ValueError, match=said):
            compare.one(
                compare.parser().parse_args(["--llama-cpp", f"sh -c '{script}'"]),
                "llama.cpp",
                [1],
                1,
            )


def test_a_runs_peak_memory_is_its_own(monkeypatch):
    """And not what the process had that started it."""
    monkeypatch.chdir(ROOT)
    big = torch.ones(2**27)  # 512 MiB
    found = compare.last_line(
        [sys.executable, "-c", "from bench import compare; print(compare.memory_bytes())"]
    )
    assert 0 < int(found) < big.nbytes


@pytest.mark.parametrize("tied", [False, True])
def test_a_token_reads_the_head_and_one_row_of_another_embedding(folders, tied):
    engine = slim.load(folders[tied], "cpu", "float32", "dense", n_prompt=100, n_new=2)
    engine.prefill([7] * 100, room=2)
    w = engine.model.weights
    read = [
        w.norm,
        w.head,
        *(t for layer in w.layers for t in vars(layer).values() if t is not None),
    ]
    want = (
        sum(t.nbytes for t in read)
        + (0 if tied else w.embed[0].nbytes)
        + engine.stats["kv_gpu_bytes"]
    )
    assert compare.floor_bytes(engine.ckpt, 100, 2) == speed.decode_bytes(engine) == want


def test_speed_keeps_rows_before_a_process_that_fails(folders, capsys):
    run = mock.Mock(side_effect=["1", "1025", ValueError("killed")])
    with mock.patch.object(speed, "last_line", run), pytest.raises(SystemExit, match="2"):
        speed.main([f"--ckpt={folders[True]}", "--rss", "--lengths=200,300"])
    out, err = capsys.readouterr()
    assert "| 200 | 1.00 KiB | 1.00 KiB | 5 |" in out and err.endswith(
        "a prefill of 300 tokens failed: killed\n"
    )
    speed.main(run.mock_calls[0].args[0][2:])  # what such a process does
    assert int(capsys.readouterr().out) > 2**20


def test_speed_of_a_checkpoint_beside_transformers(folders, monkeypatch, capsys):
    """Both have the same weights, and a row shows its floor."""
    monkeypatch.setattr(speed, "peaks", lambda *_: (1e9, 1e9))
    options = f"--ckpt={folders[False]} --lengths=20 --new=2 --rounds=1 --dtype=float32".split()
    engine = slim.start(speed.open_checkpoint(args := speed.parser().parse_args(options)))
    with torch.no_grad():
        want = speed.make_reference(args, engine)(torch.tensor([[*range(20)]])).logits[0, -1]
    torch.testing.assert_close(engine.prefill(range(20)), want, atol=1e-4, rtol=0)
    speed.main(options)
    floor = f" of {1e9 / compare.floor_bytes(engine.ckpt, 20, 2):.1f} ("
    rows = [line for line in capsys.readouterr().out.splitlines() if floor in line]
    assert [row.split(" | ")[1] for row in rows] == [
        "dense",
        "slim, budgets cover the prompt",
        "transformers",
    ]
