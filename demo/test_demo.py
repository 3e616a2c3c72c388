"""The demo's scripts: what they need, and that its documents stay the same."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
WITHOUT_MUON = """
import runpy, sys, torch
del torch.optim.Muon
sys.argv = ["train.py", *sys.argv[1:]]
runpy.run_path("train.py", run_name="__main__")
"""


def run(*command):
    return subprocess.run([sys.executable, *command], cwd=HERE, capture_output=True, text=True)


def test_training_names_the_torch_it_needs_and_evaluation_needs_none():
    """requirements.txt allows a torch that has no Muon yet."""
    trained = run("-c", WITHOUT_MUON, "--out", ".", "--state", "no.pt")
    assert trained.returncode == 2 and not trained.stdout
    assert trained.stderr.count("\n") == 1 and "torch 2.9" in trained.stderr
    options = ["--eval", "--eval_lengths=200", "--eval_kinds=single", "--questions=1"]
    evaluated = run("-c", WITHOUT_MUON, "--out", ".", *options)
    assert evaluated.returncode == 0 and "| single |" in evaluated.stdout


def test_the_document_of_the_default_run_is_what_its_script_prints():
    """Anybody can make the data again from a seed; a change of tasks.py must not change it."""
    assert run("tasks.py").stdout == (HERE / "document.txt").read_text()
