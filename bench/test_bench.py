"""The bench of speed on tiny models: what it refuses, what it survives, and what it counts."""

import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers

sys.path.insert(0, str(ROOT := Path(__file__).resolve().parent.parent))
import slim
from bench import common, speed
from planning.checkpoint import Checkpoint

DEMO = f"--ckpt={ROOT / 'demo'}"
USUAL = ["--text=book.txt", "--skip=0", DEMO, "--lengths=9", "--new=2", "--contestants=dense"]
WRONG = {
    "--text=no.txt": "no.txt",
    "--text=bytes.txt": "UTF-8",
    "--text=": "--text",
    "--skip=99999": "99,999",
    "--skip=2490": "--skip",
    "--skip=-1": "-1 must",
    "--ckpt=nope": "no checkpoint 'nope'",
    "--shape=mini": "not allowed",
    "--device=tpu": "'tpu'",
    "--dtype=float8": "'float8'",
    "--gamma=2": "2.0 must",
    "--lengths=a,b": "'a'",
    "--lengths=0": "'0'",
    "--lengths=64,": "''",
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
MEMORY_WRONG = {
    "--lengths=x": "'x'",
    "--lengths=3": "'3'",
    "--lengths=90000": "context",
    "--new=0": "--new 0",
    "--ckpt=nope": "'nope'",
    "--dtype=int8": "'int8'",
}
ALL_WRONG = [([], option, WRONG[option]) for option in WRONG]
ALL_WRONG += [(["--memory"], option, MEMORY_WRONG[option]) for option in MEMORY_WRONG]


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
    monkeypatch.setattr(speed, "ceilings", lambda *_: (1e9, 1e9))


@pytest.mark.parametrize("more, option, named", ALL_WRONG)
def test_bad_input_is_one_line_and_nothing_runs(more, option, named, monkeypatch, capsys):
    """A bench may take hours, so what is wrong is said before the first run."""
    monkeypatch.setattr(speed, "last_line", lambda *_: pytest.fail("a run began"))
    with pytest.raises(SystemExit, match="2"):
        speed.main([*USUAL, *more, option])
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and named in err, err


def test_a_contestant_that_fails_is_a_row_and_the_others_go_on(monkeypatch, capsys):
    """One fails in its second round, and keeps the first; one has none."""
    figures = {"first_s": 1.0, "steps_s": [0.002, 0.002], "peak_bytes": 2**20}
    error = ValueError("no room")
    outcomes = [figures, error, figures, figures, error, figures]
    runs = mock.Mock(side_effect=outcomes)  # another call is an error
    monkeypatch.setattr(speed, "run_one", runs)
    assert speed.main([*USUAL, "--contestants=dense,transformers,auto", "--rounds=3"]) == 1
    assert [call.args[1][0] for call in runs.mock_calls] == list("dtadad")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    rows = [line.split(" | ")[:2] for line in lines]
    assert rows[1] == ["| dense", "1.00"] and rows[2][0] == "| transformers failed: no room"
    assert rows[3] == ["| auto failed after 1 rounds: no room", "1.00"]


@pytest.mark.parametrize(
    "script, reason",
    [
        ("exit 3", "exit code 3"),
        ("kill -9 $$", "signal 9"),
        ("echo {}", "it printed '{}'"),
        ("echo Error: it >&2; echo x >&2; exit 1", "Error: it"),
    ],
)
def test_what_a_program_does_wrong_is_said(script, reason):
    """A program that is not ours may end in any way; its row says how."""
    args = speed.parser().parse_args(["--llama-cpp", f"sh -c '{script}'"])
    with pytest.raises(ValueError, match=reason):
        speed.run_one(args, "llama.cpp", [1], 1)


def test_a_runs_peak_memory_is_its_own(monkeypatch):
    """And not what the process had that started it."""
    monkeypatch.chdir(ROOT)
    big = torch.ones(2**27)  # 512 MiB
    script = "from bench import common; print(common.memory_bytes())"
    found = common.last_line([sys.executable, "-c", script])
    assert 0 < int(found) < big.nbytes


@pytest.mark.parametrize("tied", [False, True])
def test_a_token_reads_the_head_and_one_row_of_another_embedding(folders, tied):
    """The floor of a decoded token, against the engine's own tensors."""
    engine = slim.load(folders[tied], "cpu", "float32", "dense", n_prompt=100, n_new=2)
    engine.prefill([7] * 100, room=2)
    weights = engine.model.weights
    read = [weights.norm, weights.head]
    for layer in weights.layers:
        read += [tensor for tensor in vars(layer).values() if tensor is not None]
    want = sum(tensor.nbytes for tensor in read) + engine.stats["kv_gpu_bytes"]
    want += 0 if tied else weights.embed[0].nbytes
    assert speed.floor_bytes(engine.ckpt, 100, 2) == want


@pytest.mark.parametrize("random", [False, True])
def test_transformers_has_the_same_weights(random, folders):
    """Random weights are drawn twice, once for each; a checkpoint is read twice."""
    ckpt = speed.random_checkpoint("tiny", "cpu", "float32", "dense")
    if not random:
        ckpt = Checkpoint.open(folders[False], "cpu", "float32", "dense")
    theirs = speed.Transformers(ckpt).run([*range(20)])
    ours = speed.slim.start(ckpt).prefill([*range(20)])
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_a_comparison_and_a_table_of_memory_run_to_their_end(folders, capsys):
    """For real, in processes, with random weights and with a checkpoint."""
    options = "--shape=tiny --lengths=20 --new=2 --rounds=1 --dtype=float32 --device=cpu"
    assert speed.main([*options.split(), "--contestants=transformers,dense"]) == 0
    assert capsys.readouterr().out.count("MiB |") == 2
    with mock.patch.object(speed, "RANKINGS", [("auto", "peak")]):
        assert speed.main(["--memory", f"--ckpt={folders[True]}", "--lengths=200"]) == 0
    assert capsys.readouterr().out.count("| 200 | auto, peak |") == len(speed.WORK)
