"""Schedules: their names, their text, their limits, at any depth and length."""

from fractions import Fraction

import pytest

import prune
import slim
from conftest import draw
from planning import schedule as schedules


def test_default_schedules_are_the_papers_and_scale_with_depth():
    assert schedules.paper_schedule(32) == {10: 8192, 20: 4096, 30: 2048}
    assert schedules.paper_schedule(28, "qwen2") == {9: 12288, 18: 6144, 26: 4096}
    assert schedules.paper_schedule(16) == {5: 8192, 10: 4096, 15: 2048}
    assert schedules.paper_schedule(5) == {
        2: 8192,
        3: 4096,
    }  # the third boundary would stand above the last layer
    assert schedules.paper_schedule(1) == {}
    assert schedules.parse_schedule("10:8192,20:4096") == {10: 8192, 20: 4096}


def test_a_schedule_is_the_engines_own(tiny):
    schedule = {2: 192}
    engine = slim.load(tiny, "cpu", schedule=schedule)
    schedule.clear()
    engine.prefill(draw(640))
    assert engine.ckpt.schedule == {2: 192} and len(engine.kv.stages) == 2


def test_shares_are_of_the_prompt_with_a_floor(tiny):
    def blocks(n, schedule):
        return prune.stage_blocks(n, schedule, 64)

    assert blocks(4096, {9: 1 / 4, 19: Fraction(1, 8), 28: 128}) == [64, 16, 8, 2]
    assert blocks(2048, {9: 1 / 16}) == [32, 8]  # never below eight blocks
    assert blocks(1000, {9: 1 / 16}) == [16, 16]  # nothing to gain
    quarter = prune.Share(Fraction(1, 4), least=1024)  # as the default keeps
    assert blocks(2048, {9: quarter}) == [32, 16]
    assert blocks(8192, {9: quarter}) == [128, 32]
    assert prune.stage_blocks(4096, {9: quarter}, 512) == [8, 8]
    assert blocks(4096, {9: 2**-0.5}) == [64, 45]
    parsed = schedules.parse_schedule("5:1/4:1024,9:1/4,19:0.125,28:256")
    assert parsed == {5: quarter, 9: Fraction(1, 4), 19: Fraction(1, 8), 28: 256}
    assert schedules.parse_schedule(schedules.format_schedule(parsed)) == parsed
    for budget in (
        0.9999999,
        1.0,
        2.5,
        -0.5,
        1e-7,
        *map(float, ("nan", "inf", "-inf")),
        Fraction(10**400),
    ):  # readable
        with pytest.raises(ValueError, match="not a share"):
            slim.load(tiny, "cpu", schedule={2: budget})
    engine = slim.load(tiny, "cpu", schedule={1: 1 / 2, 3: 1 / 4})
    assert engine.prefill(draw(2048)) is not None and engine.stats["kept"] == [2048, 1024, 512]


def test_the_default_schedule_prunes_at_any_depth_and_length():
    for n_layers in (5, 16, 28, 30, 32, 80):
        schedule = schedules.auto_schedule(n_layers)
        schedules.check_schedule(schedule, n_layers, 64)
        assert len(schedule) >= 2
        for n in (2048, 100_000):
            assert prune.stage_blocks(n, schedule, 64)[-1] < n // 64 // 2
    assert schedules.auto_schedule(30) == {
        9: Fraction(1, 4),
        19: Fraction(1, 8),
        28: Fraction(1, 16),
    }  # as measured
    assert list(schedules.auto_schedule(32)) == [10, 20, 30]  # as in the paper
