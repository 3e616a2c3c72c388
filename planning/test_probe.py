"""A model shows which of its heads look things up; the default rule and schedule go by them."""

import json

import pytest
import torch

import prune
import slim
from conftest import draw
from planning import probe
from planning.schedule import schedule_by_heads


def strengths_of(n_layers: int, n_heads: int, strong: dict) -> torch.Tensor:
    """Return strengths of heads; strong: {(layer, head): strength}."""
    strengths = torch.full((n_layers, n_heads), 0.01)
    for place, strength in strong.items():
        strengths[place] = strength
    return strengths


def test_random_ids_are_always_the_same_and_of_text_alone():
    """Special tokens would be looked at for what they are, not for where they stood."""
    ids = probe.random_ids(1000, lambda token: token % 2 == 0)
    assert ids == probe.random_ids(1000, lambda token: token % 2 == 0)
    assert len(ids) == probe.PROBE_LEN and not any(token % 2 for token in ids)
    assert len(probe.random_ids(64, lambda token: False)) == probe.PROBE_LEN


def test_a_boundary_stands_right_after_the_heads_that_found_enough():
    """The first cut waits for the first heads that look things up, the second for most of them."""
    strong = {(3, 0): 0.5, (3, 2): 0.4, (8, 1): 2.0, (15, 1): 2.6, (20, 0): 0.5}
    strengths = strengths_of(24, 4, strong)
    assert list(schedule_by_heads(strengths)) == [4, 16]
    assert probe.names(probe.lookup_heads(strengths)) == ["3.0", "3.2", "8.1", "15.1", "20.0"]


def test_a_model_without_such_heads_is_ranked_by_all_of_them_as_before(tiny):
    """Random weights look nothing up: there the rule would be noise."""
    assert not any(probe.lookup_heads(strengths_of(24, 4, {(3, 0): 0.5})))
    engine = slim.load(tiny, "cpu", schedule={2: 192})
    assert engine.ckpt.rule == engine.model.rule == prune.RULES["peak"]
    assert engine.stats["lookup_heads"] == []
    by_peak = slim.load(tiny, "cpu", schedule={2: 192}, score="peak")
    assert torch.equal(engine.prefill(draw(640)), by_peak.prefill(draw(640)))


@pytest.fixture
def looking(monkeypatch):
    """Let the probe find heads 1 and 2 of layer 1 in any model of 5 layers; count its runs."""
    runs = []

    def measure(model, ids):
        runs.append(len(ids))
        return strengths_of(5, 4, {(1, 1): 0.9, (1, 2): 0.8, (3, 0): 0.9})

    monkeypatch.setattr(probe, "measure", measure)
    return runs


def test_heads_are_measured_once_for_a_checkpoint_and_kept(tiny, looking, tmp_path, monkeypatch):
    """A start must not wait for what an earlier one has measured; a damaged file is no harm."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = slim.load(tiny, "cpu")
    assert first.ckpt.heads == ["1.1", "1.2", "3.0"] and list(first.ckpt.schedule) == [2, 4]
    assert slim.load(tiny, "cpu").ckpt.rule.heads == ((), (1, 2), (), (0,), ())
    assert looking == [probe.PROBE_LEN]
    (file,) = (tmp_path / "slim").iterdir()
    for text in ("[[1]]", "{", json.dumps([[float("nan")] * 4] * 5)):
        file.write_text(text)
        assert slim.load(tiny, "cpu").ckpt.heads == first.ckpt.heads
    assert len(looking) == 4
    slim.load(tiny, "cpu", "float64")  # another dtype: other roundings, another measurement
    assert len(looking) == 5


def test_only_a_run_that_asks_the_heads_measures_them(tiny, looking, tmp_path, monkeypatch):
    """A dense run, or another rule, has no use for it; a pruned text of a dense engine has."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    slim.load(tiny, "cpu", score="peak")
    engine = slim.load(tiny, "cpu", schedule="dense")
    engine.prefill(draw(640))
    assert looking == []
    engine.prefill(draw(2000), schedule="auto")
    assert looking == [probe.PROBE_LEN] and engine.model.rule.name == "lookup"
    assert list(engine.kv.schedule) == [2, 4]
    engine.prefill(draw(640), schedule={1: 192})  # below any head that looks things up
    assert engine.model.rule.name == "peak"


def test_a_saved_conversation_belongs_to_its_heads(tiny, looking, tmp_path, monkeypatch):
    """Other heads would choose other blocks for the next token."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    engine = slim.load(tiny, "cpu", schedule={2: 192})
    engine.prefill(draw(640))
    engine.save(tmp_path / "talk.slim")
    after = engine.extend([1])
    again = slim.load(tiny, "cpu", schedule={2: 192})
    again.resume(tmp_path / "talk.slim")
    assert torch.equal(again.extend([1]), after)
    with pytest.raises(ValueError, match="heads"):
        slim.load(tiny, "cpu", schedule={2: 192}, score="peak").resume(tmp_path / "talk.slim")


def test_a_dense_conversation_is_the_same_before_the_probe_and_after_it(
    tiny, looking, tmp_path, monkeypatch
):
    """It is ranked by no heads, so an engine that never measured them goes on with it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "before"))
    dense = slim.load(tiny, "cpu", schedule="dense")
    assert looking == []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "after"))
    pruned = slim.load(tiny, "cpu", schedule={2: 192})
    pruned.prefill(draw(640), schedule="dense")
    assert pruned.stats["lookup_heads"] == []
    pruned.save(tmp_path / "talk.slim")
    dense.resume(tmp_path / "talk.slim")
    assert len(dense.ids) == 640
    dense.prefill(draw(640), schedule={2: 192})  # measures the heads now
    assert dense.stats["lookup_heads"] == ["1.1", "1.2"]
    dense.resume(tmp_path / "talk.slim")
    assert dense.stats["lookup_heads"] == []


def test_the_probe_finds_the_heads_of_a_real_model(smollm2_folder, tmp_path, monkeypatch):
    """Those that the first cut of SmolLM2 depends on, in either dtype; the boundaries follow."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    engine = slim.load(smollm2_folder, "cpu", "float32")
    assert {"2.4", "7.7", "8.0", "14.3", "15.6", "18.6"} <= set(engine.ckpt.heads)
    assert list(engine.ckpt.schedule) == [9, 19]


def test_a_rule_with_heads_of_its_own_is_checked(tiny):
    """Heads that the model lacks, or that can rank nothing, must not choose blocks in silence."""
    for heads in ("x", [[0]], ((0, "a"),), ((-1,),)):
        with pytest.raises(ValueError, match="tuple of head numbers a layer"):
            prune.Rule("mine", prune.peak, heads=heads)
    for heads, words in (
        (((0,),) * 4, "heads has 4 layers"),
        (((4,),) * 5, "numbers up to 4; the model has 5 layers of 4 heads"),
        (((), (), (1,), (), ()), "no head is below the first boundary, 2"),
    ):
        with pytest.raises(ValueError, match=words):
            slim.load(
                tiny, "cpu", schedule={2: 192}, score=prune.Rule("mine", prune.peak, heads=heads)
            )


def test_a_lookup_rule_must_return_two_results(tiny):
    """One line says so, where a rule of one's own returns something else."""
    for score in (prune.peak, lambda weights: None, lambda weights: (weights, weights)):
        rule = prune.Rule("mine", score, sees="lookup", heads=((0,),) * 5)
        engine = slim.load(tiny, "cpu", schedule={2: 192}, score=rule)
        with pytest.raises(ValueError, match="must return"):
            engine.prefill(draw(640))


def test_a_process_without_a_home_keeps_nothing_and_runs(tiny, looking, monkeypatch):
    """A container's user may have no home folder; the heads are then measured at each start."""

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(probe.Path, "home", no_home)
    for _ in range(2):
        slim.load(tiny, "cpu")
    assert len(looking) == 2
