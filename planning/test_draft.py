"""Drafting by lookup: where the longest match is, and what is drafted after it."""

import random

import numpy as np

from planning.draft import FIRST_BALANCE, MOST_MATCH, SLOWDOWN, Drafter, longest_match


def slow_match(ids: list[int]) -> tuple[int, int]:
    """Return the end and length of the longest earlier match, the last of several."""
    best = len(ids), 0
    for end in range(1, len(ids)):
        length = 0
        while length < min(end, MOST_MATCH) and ids[end - 1 - length] == ids[-1 - length]:
            length += 1
        if length and length >= best[1]:
            best = end, length
    return best


def test_the_match_is_the_longest_and_newest():
    """Compared with a plain search, on texts that repeat often."""
    for seed in range(2000):
        rng = random.Random(seed)
        ids = [rng.randrange(2 + seed % 3) for _ in range(rng.randrange(1, 50))]
        assert longest_match(np.array(ids, dtype=np.int32)) == slow_match(ids)


def test_a_draft_goes_on_after_the_match_for_twice_its_length():
    """Also where the match is a repetition that reaches the end; never after a short match."""
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    assert Drafter([*text, 1, 2, 3], 0.01).draft(16) == [4, 5, 6, 7, 8, 9]
    assert Drafter([*text, 1, 2, 3], 0.01).draft(2) == [4, 5]
    assert Drafter([*text, 1, 2], 0.01).draft(16) == []
    assert Drafter([0, 8, 9, 8, 9, 8, 9], 0.01).draft(16) == [8, 9, 8, 9, 8, 9, 8, 9]
    assert Drafter([5], 0.01).draft(16) == []


def test_wrong_drafts_cost_no_more_than_the_slowdown():
    """Prose that matches everywhere and never goes on alike: the rows stay within the account."""
    cost = 0.1
    rng = random.Random(0)
    drafter = Drafter([7, 7, 7, 0] * 50 + [7, 7, 7], cost)
    spent = 0.0
    for n in range(500):
        spent += cost * len(drafter.draft(16))
        assert spent <= FIRST_BALANCE + SLOWDOWN * 4 * n + 1e-9
        for token in (rng.randrange(8, 99), 7, 7, 7):
            drafter.add(token, accepted=False)
    assert spent > 10


def test_right_drafts_become_as_long_as_they_may_be():
    """Quoting: from the second draft on, nearly all tokens come from drafts."""
    text = random.Random(1).choices(range(1000), k=300)
    drafter = Drafter([*text, *text[:4]], 0.1)
    at = 4
    lengths = []
    while at < 250:
        draft = drafter.draft(16)
        assert draft == text[at : at + len(draft)]
        for token in draft:
            drafter.add(token, accepted=True)
        drafter.add(text[at + len(draft)], accepted=False)
        at += len(draft) + 1
        lengths.append(len(draft))
    assert lengths[:2] == [8, 16] and set(lengths[2:]) == {16}
