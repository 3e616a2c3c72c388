"""The benches of speed on tiny models: what they refuse, what they survive, what they count."""

import json
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers

sys.path.insert(0, str(ROOT := Path(__file__).resolve().parent.parent))
import loading.weights
import slim
from bench import common, gpu, memory, reading, shapes, speed
from planning.checkpoint import Checkpoint

DEMO = f"--ckpt={ROOT / 'demo'}"
USUAL = ["--text=book.txt", "--skip=0", DEMO, "--lengths=256", "--new=2", "--rounds=1"]
USUAL += ["--out=runs.jsonl", "--contestants=dense"]
WRONG = {
    "--text=no.txt": "no.txt",
    "--text=bytes.txt": "UTF-8",
    "--text=": "--text",
    "--skip=99999": "99,999",
    "--skip=2490": "--skip",
    "--skip=-1": "-1 must",
    "--ckpt=nope": "no checkpoint 'nope'",
    "--dtype=float8": "'float8'",
    "--lengths=a,b": "'a'",
    "--lengths=255": "'255'",
    "--lengths=256,": "''",
    f"--lengths={10**30}": "context",
    "--lengths=300,300": "twice",
    "--rounds=0": "--rounds 0",
    "--rounds=99": "99 rounds",
    "--threads=0": "--threads 0",
    "--new=x": "invalid int",
    "--kinds=free,short": "'short'",
    "--contestants=dense,bogus": "'bogus'",
    "--contestants=dense,,auto": "empty",
    "--contestants=auto,auto": "twice",
    "--gguf=no.gguf": "'no.gguf'",
    "--gguf=book.txt --llama-cpp='": "quotation",
    "--gguf=book.txt --llama-cpp=": "no such program",
    "--gguf=book.txt --llama-cpp=no-such": "no such program",
    "--out=": "--out",
    "--table": "does not exist",
}
MEMORY_WRONG = {
    "--lengths=x": "'x'",
    "--lengths=3": "'3'",
    "--lengths=90000": "context",
    "--new=0": "--new 0",
    "--ckpt=nope": "'nope'",
    "--dtype=int8": "'int8'",
}
ALL_WRONG = [(speed, USUAL, option, WRONG[option]) for option in WRONG]
ALL_WRONG += [(memory, [DEMO], option, MEMORY_WRONG[option]) for option in MEMORY_WRONG]


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
    monkeypatch.setattr(speed, "sum_rate", lambda: 1e9)


@pytest.mark.parametrize("bench, usual, options, named", ALL_WRONG)
def test_bad_input_is_one_line_and_nothing_runs(bench, usual, options, named, monkeypatch, capsys):
    """A bench may take hours, so what is wrong is said before the first run."""
    monkeypatch.setattr(bench, "last_line", lambda *_: pytest.fail("a run began"))
    with pytest.raises(SystemExit, match="2"):
        bench.main([*usual, *options.split()])
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and named in err, err


# ---- the comparison: runs in a file -----------------------------------------------------------

FIGURES = {
    "first_s": 1.0,
    "steps": [[0.5, 1]],
    "answer": [7, 7],
    "peak_bytes": 2**20,
    "floor_bytes": 10**8,
}


def test_a_contestant_that_fails_is_named_and_a_later_call_goes_on(monkeypatch, capsys):
    """A call makes the runs that the file lacks, and none twice; a line that was cut is one."""
    outcomes = [FIGURES, ValueError("no room"), FIGURES, FIGURES]
    runs = mock.Mock(side_effect=outcomes)  # another call is an error
    monkeypatch.setattr(speed, "run_one", runs)
    options = [*USUAL, "--contestants=dense,transformers,auto", "--kinds=free", "--rounds=2"]
    options += ["--text=long.txt"]
    Path("long.txt").write_text("word " * 2000)
    with pytest.raises(StopIteration):  # in the second round, at a run that has no outcome
        speed.main([*options])
    assert [call.args[1][0] for call in runs.mock_calls] == list("dtad") + ["a"]
    assert "transformers failed: no room" in capsys.readouterr().err
    with Path("runs.jsonl").open("a") as file:
        file.write('{"round": 1, "na')
    runs.side_effect = [FIGURES] * 3
    assert speed.main(options) == 0
    out = capsys.readouterr().out
    assert [call.args[1][0] for call in runs.mock_calls[5:]] == list("tta")
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| 256")]
    want = {"dense": "2", "auto": "2", "transformers": "2"}
    assert {row[2]: row[3] for row in rows} == want
    assert rows[0][4:9] == ["1.00", "1.50", "2.0", "2.0", "20%"]
    runs.side_effect = []
    assert speed.main(options) == 0
    assert capsys.readouterr().out == out
    assert speed.main(["--table", "--out=runs.jsonl"]) == 0
    assert capsys.readouterr().out == out


def test_runs_of_another_setup_stay_out_of_the_table(monkeypatch, capsys):
    """A table's runs are of one machine, commit and set of options."""
    monkeypatch.setattr(speed, "run_one", lambda *_: FIGURES)
    for commit in ("first", "second"):
        monkeypatch.setattr(speed, "commit", lambda commit=commit: commit)
        assert speed.main([*USUAL, "--kinds=free"]) == 0
        out = capsys.readouterr().out
        assert f"commit {commit}" in out and out.count("| 256 | free | dense | 1 |") == 1
    assert len(Path("runs.jsonl").read_text().splitlines()) == 2


def test_a_quoting_prompt_ends_with_a_passage_of_itself():
    """And what the answer must repeat follows that passage in the text, and in two copies of it."""
    prompt, passage = speed.make_prompt("quoting", [*range(1200)], 1200, 100, [-1])
    assert len(prompt) == 1200 and len(passage) == 100
    whole = prompt[-32:] + passage
    places = [i for i in range(1200) if prompt[i : i + len(whole)] == whole]
    assert places == [400, 1200 - 33 - 2 * 133 + 1, 1200 - 33 - 133 + 1]


def test_a_quote_that_leaves_words_out_is_still_one():
    """Token by token, all that follows a left out word would be wrong."""
    passage = [*range(20)]
    assert speed.quoted(passage, passage) == 1
    assert speed.quoted(passage[:8] + passage[9:], passage) == 19 / 20
    assert speed.quoted([99, *passage[:10], 99, *passage[10:13]], passage) == 10 / 20


def test_tokens_that_one_step_yields_share_its_time(monkeypatch):
    """Drafted tokens come at once; counted alone they would take no time, and the median lie."""

    class Drafting:
        steps = 0

        def answer(self, ids, n_new):
            for n_tokens, seconds in ((1, 8.0), (3, 6.0), (1, 1.0)):
                self.steps += 1
                clock.now += seconds
                yield from [5] * n_tokens

    clock = mock.Mock(now=0.0)
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock.now)
    found = speed.time_answer(Drafting(), [1], 5)
    assert found == {"answer": [5] * 5, "first_s": 8.0, "steps": [[6.0, 3], [1.0, 1]]}
    assert speed.mean_rate(found["steps"]) == 4 / 7
    assert speed.median_seconds(found["steps"]) == 2.0


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
    """A program that is not ours may end in any way; the reader learns how."""
    args = speed.parser().parse_args(["--llama-cpp", f"sh -c '{script}'"])
    args.files = {"llama.cpp": "model.gguf"}
    with pytest.raises(ValueError, match=reason):
        speed.run_one(args, "llama.cpp", [1])


def test_a_runs_peak_memory_is_its_own(monkeypatch):
    """And not what the process had that started it."""
    monkeypatch.chdir(ROOT)
    big = torch.ones(2**27)  # 512 MiB
    script = "from bench import common; print(common.memory_bytes())"
    found = common.last_line([sys.executable, "-c", script])
    assert 0 < int(found) < big.nbytes


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_token_reads_the_head_and_one_row_of_another_embedding(folders, tied, dtype, monkeypatch):
    """The floor of a decoded token, against the engine's own tensors; a tied head may be a copy."""
    monkeypatch.setattr(loading.weights, "LEAST_IN_BLOCKS", 1)
    engine = slim.load(folders[tied], "cpu", dtype, "dense", n_prompt=100, n_new=2)
    engine.prefill([7] * 100, room=2)
    weights = engine.model.weights
    read = [weights.norm, weights.head]
    for layer in weights.layers:
        read += [tensor for tensor in vars(layer).values() if tensor is not None]
    want = sum(tensor.nbytes for tensor in read) + engine.stats["kv_gpu_bytes"]
    want += 0 if weights.head is weights.embed else weights.embed[0].nbytes
    assert common.floor_bytes(engine.ckpt, 100, 2) == want


@pytest.mark.parametrize("random", [False, True])
def test_transformers_has_the_same_weights(random, folders):
    """Random weights are drawn twice, once for each; a checkpoint is read twice."""
    ckpt = shapes.random_checkpoint("tiny", "cpu", "float32", "dense")
    if not random:
        ckpt = Checkpoint.open(folders[False], "cpu", "float32", "dense")
    theirs = speed.Transformers(ckpt).read([*range(20)])
    ours = slim.start(ckpt).prefill([*range(20)])
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_a_comparison_runs_to_its_end():
    """For real, in processes: both programs answer all tokens, and greedily the same."""
    options = [*USUAL, "--new=9", "--contestants=transformers,dense", "--dtype=float32"]
    assert speed.main(options) == 0
    records = speed.read_records(Path("runs.jsonl"))
    assert [len(record["answer"]) for record in records] == [9] * 4
    assert records[0]["answer"] == records[1]["answer"] and records[0]["floor_bytes"] > 0


def test_a_table_of_memory_runs_to_its_end(folders, capsys):
    """For real, in processes."""
    with mock.patch.object(memory, "RANKINGS", [("auto", "peak")]):
        memory.main([f"--ckpt={folders[True]}", "--lengths=200"])
    assert capsys.readouterr().out.count("| 200 | auto, peak |") == len(memory.WORK)


# ---- a GPU in one call --------------------------------------------------------------------------


def test_the_dry_run_of_all_that_needs_a_gpu(tmp_path, capsys):
    """Time on a GPU is short, so what can be tried without one must not fail there."""
    assert gpu.main(["--device=cpu", "--tiny", f"--out={tmp_path}"]) == 0
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert not any("error" in record or "skipped" in record for record in records)
    found = {}
    for record in records:
        if "seconds" in record:
            assert record["seconds"] > 0
            found.setdefault(record["part"], []).append(record["who"])
    want = ["dense", "auto", "dense", "auto", "transformers", "transformers"]
    assert found["first token"] == want and len(found["decode"]) == 10
    swaps = [record["swaps"] for record in records if record["part"] == "swaps"]
    assert swaps == [0, 1, 1, 0, 2, 2]
    assert "passed" in records[1]["note"] or "skipped" in records[1]["note"]
    assert capsys.readouterr().out.endswith((tmp_path / "table.md").read_text())


def test_what_fails_or_does_not_fit_the_time_leaves_the_rest(tmp_path, capsys):
    """A part's error must not cost the results of the others."""
    report = gpu.Report(tmp_path, 60)

    def fail(report):
        raise RuntimeError("CUDA error: no such kernel\nand more")

    assert report.attempt("one", 1, fail) is None
    assert report.attempt("two", 61, fail) is None
    assert report.attempt("three", 1, lambda report: 5) == 5
    one, two = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert "no such kernel" in one["error"] and "in fail" in one["traceback"]
    assert two["skipped"].startswith("it needs 61 s") and report.failed()
    assert "one: error: CUDA error" in report.summary()


def test_an_error_between_two_parts_leaves_the_table(tmp_path, monkeypatch):
    """After a broken kernel every call of CUDA fails, also those outside a part."""
    monkeypatch.setattr(gpu, "run", mock.Mock(side_effect=RuntimeError("CUDA error")))
    assert gpu.main(["--device=cpu", "--tiny", f"--out={tmp_path}"]) == 1
    assert "all: error: CUDA error" in (tmp_path / "table.md").read_text()


def test_time_that_is_up_ends_the_call_with_what_there_is(tmp_path):
    """Work that hangs on a device cannot be interrupted; whoever waits gets the table."""
    script = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from bench import gpu
gpu.run = lambda *arguments: time.sleep(60)
sys.exit(gpu.main(["--device=cpu", "--tiny", "--seconds=1", "--out={tmp_path}"]))
"""
    with pytest.raises(ValueError, match="exit code 1"):
        common.last_line([sys.executable, "-c", script])
    assert "the 1 s are up" in (tmp_path / "table.md").read_text()


def test_only_copies_that_end_after_they_are_needed_are_late():
    """The sum of waits, from the moments that a step noted."""
    kv = mock.Mock(device=torch.device("cpu"))
    watch = gpu.Watch(kv)
    watch.begin = 1.0
    watch.needed = {3: 2.0, 4: 3.0, 5: 4.0}
    watch.copied = {3: (1.0, 2.5), 4: (2.5, 2.75)}
    assert watch.late_seconds() == 0.5 and watch.copy_seconds() == 1.75


# ---- what reading costs -------------------------------------------------------------------------


def test_the_ways_of_reading_take_turns_and_differ(tmp_path, capsys):
    """A row for each way and length: dense, full attention below the first boundary, local."""
    (tmp_path / "book.txt").write_text("The grass is green. The sky is blue.\n" * 2000)
    options = [DEMO, f"--text={tmp_path}/book.txt", "--skip=0"]
    options += ["--lengths=1200,2048", "--rounds=2", "--local-window=256", "--dtype=float32"]
    reading.main(options)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[4:]]
    assert [(cells[0], cells[1]) for cells in rows] == [
        (f"| {n}", way) for n in ("1,200", "2,048") for way in ("dense", "full", "local")
    ]
    dense, full, local = (float(cells[4]) for cells in rows[3:])
    assert dense == 1 < full < local
    assert all(float(cells[2]) > 0 for cells in rows)
    reading.main(["--count", "--lengths=131072"])
    counted = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [cells[1] for cells in counted] == ["dense", "full", "local"]
    assert float(counted[0][2]) == 6.3  # PFLOP of Llama-3.1-8B, as others count them


@pytest.mark.parametrize(
    "option", ["--lengths=9", "--rounds=0", "--ckpt=nope", "--text=no.txt", "--text="]
)
def test_a_way_of_reading_that_cannot_be_is_one_line(option, capsys):
    with pytest.raises(SystemExit, match="2"):
        reading.main([DEMO, f"--text={__file__}", "--skip=0", "--lengths=1200", option])
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1, err
