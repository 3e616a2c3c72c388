"""A model shows which of its heads look things up; the default rule and schedule go by them."""

import json

import pytest
import torch

import planning.checkpoint
import planning.memory
import prune
import slim
from conftest import draw, set_free
from planning import probe
from planning.schedule import auto_schedule, resolve_schedule, schedule_by_heads


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
    assert list(schedule_by_heads(strengths)) == [4]
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
def looking(monkeypatch, tmp_path):
    """Let the probe find heads 1 and 2 of layer 1 in any model of 5 layers; count its runs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # nothing is known yet
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
    assert first.ckpt.heads == ["1.1", "1.2"] and list(first.ckpt.schedule) == [2]
    assert slim.load(tiny, "cpu").ckpt.rule.heads == ((), (1, 2), (), (), ())
    assert looking == [probe.PROBE_LEN]
    (file,) = (tmp_path / "slim").iterdir()
    spoiled = ("[[1]]", "{", *(json.dumps([[x] * 4] * 5) for x in (float("nan"), 10**400, 30, -1)))
    for text in spoiled:
        file.write_text(text)
        assert slim.load(tiny, "cpu").ckpt.heads == first.ckpt.heads
    assert len(looking) == 1 + len(spoiled)
    slim.load(tiny, "cpu", "float64")  # another dtype: other roundings, another measurement
    assert len(looking) == 2 + len(spoiled)


def test_only_a_run_that_asks_the_heads_measures_them(tiny, looking, tmp_path, monkeypatch):
    """A dense run, or another rule, has no use for it; a pruned text of a dense engine has."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    slim.load(tiny, "cpu", score="peak")
    engine = slim.load(tiny, "cpu", schedule="dense")
    engine.prefill(draw(640))
    assert looking == []
    engine.prefill(draw(2000), schedule="auto")
    assert looking == [probe.PROBE_LEN] and engine.model.rule.name == "lookup"
    assert list(engine.kv.schedule) == [2]
    engine.prefill(draw(640), schedule={1: 192})  # below any head that looks things up
    assert engine.model.rule.name == "peak"


def test_a_rule_of_ones_own_is_not_replaced(tiny, looking):
    """Only the default falls back to `peak`; another rule's figures would be those of `peak`."""
    rule = prune.Rule("mine", prune.lookup, sees="lookup")
    engine = slim.load(tiny, "cpu", schedule={2: 192}, score=rule)
    engine.prefill(draw(640))
    with pytest.raises(ValueError, match="rule 'mine' sees lookup heads, and too few"):
        engine.prefill(draw(640), schedule={1: 192})
    assert engine.stats["score"] == "mine"


def test_a_cache_that_cannot_be_written_is_no_secret(tiny, looking, tmp_path, monkeypatch):
    """Every start takes longer then."""
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="lookup heads cannot be kept .*/file.*XDG_CACHE_HOME"):
        slim.load(tiny, "cpu", schedule={2: 192})


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
    with pytest.raises(ValueError, match="saved with score 'lookup' where this run has 'peak';"):
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
    """Those that the first cut of SmolLM2 depends on, in either dtype; the boundary follows."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    engine = slim.load(smollm2_folder, "cpu", "float32")
    assert set(engine.ckpt.heads) == {"2.4", "7.7", "8.0"}
    assert list(engine.ckpt.schedule) == [9]


def test_a_rule_with_heads_of_its_own_is_checked(tiny):
    """Heads that the model lacks, or that can rank nothing, must not choose blocks in silence."""
    for heads in ("x", [[0]], ((0, "a"),), ((-1,),), ((0, 0),), ((2, 1),)):
        with pytest.raises(ValueError, match="tuple of layers, each"):
            prune.Rule("mine", prune.peak, heads=heads)
    for heads, words in (
        (((0,),) * 4, "heads has 4 layers"),
        (((4,),) * 5, "numbers up to 4; the model has 5 layers of 4 heads"),
        (((), (), (1,), (), ()), "no head of layers 0..1 ranks"),
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


def test_few_heads_below_a_boundary_do_not_rank(tiny, looking):
    """One weak head of many would choose all blocks; then all heads do, by peak."""
    strengths = strengths_of(5, 4, {(0, 0): 0.06, (1, 1): 0.9, (1, 2): 0.8})
    assert not probe.can_rank(strengths, 1) and probe.can_rank(strengths, 2)
    assert list(schedule_by_heads(strengths_of(6, 4, {(5, 0): 0.9, (5, 1): 0.9}))) == [2, 4]


def late_schedule(schedule, config, block_len, strengths=None):
    """Return the default's schedule, a deeper one where the heads are known: it needs more."""
    if schedule == "auto":
        return auto_schedule(config.n_layers) if strengths is None else {4: 1 / 2}
    return resolve_schedule(schedule, config, block_len, strengths)


def test_memory_is_checked_for_the_schedule_that_the_heads_ask_for(
    tiny, looking, monkeypatch, tmp_path
):
    """The first start knows the heads only after loading; what does not fit is refused then."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    by_depth = slim.Checkpoint.open(tiny, "cpu")
    assert by_depth.needs_probe
    by_heads = by_depth.with_schedule({4: 1 / 2})
    n = 1_000_000  # far more than the reserve that a plan keeps
    less, more = (planning.memory.plan(ckpt, n) for ckpt in (by_depth, by_heads))
    free = less.total + less.host
    assert more.total + more.host - planning.memory.KERNEL_BYTES > free + 2**20
    monkeypatch.setattr(planning.checkpoint, "resolve_schedule", late_schedule)
    set_free(monkeypatch, free)
    with pytest.raises(ValueError, match="not enough memory"):
        slim.load(tiny, "cpu", n_prompt=n)
    assert len(looking) == 1  # refused after loading, not before


def test_a_refused_prompt_costs_no_conversation_though_the_heads_are_unknown(tiny, looking):
    """The probe drops the conversation, so memory is asked for before it."""
    engine = slim.load(tiny, "cpu", schedule="dense")
    engine.prefill(draw(100))
    with pytest.raises(ValueError, match="not enough memory"):
        engine.prefill(draw(640), room=10**12, schedule={2: 192})
    assert engine.usable and engine.ids == draw(100) and looking == []


def test_the_heads_that_are_shown_rank_something(tiny, looking):
    """A prompt too short for a boundary is ranked by fewer heads, or by none."""
    engine = slim.load(tiny, "cpu")
    engine.prefill(draw(600))
    assert engine.stats["lookup_heads"] == [] and engine.stats["score"] == "lookup"
    engine.prefill(draw(3000))
    assert engine.stats["lookup_heads"] == ["1.1", "1.2"]
