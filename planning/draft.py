"""Drafting by lookup: guess the next tokens from the place where the last ones stood before.

An answer that quotes its text goes on as the text does (prompt lookup decoding). Guessed tokens are
run in one step with the token before them, and those that the model would have written itself are
kept (`Engine.generate`). That pays where enough of them are right, for each row of a step costs a
share of what a step of one row costs. So there is an account, in steps: a draft takes from it what
its rows cost, each right guess saves a step, and each written token adds the slowdown that a text
without anything to quote may have. The account depends on tokens alone, and so do the answers.
"""

from array import array

import numpy as np

from planning.checkpoint import Checkpoint, is_slow
from planning.settings import MOST_DRAFTED

LEAST_MATCH = 3  # tokens
MOST_MATCH = 16  # tokens: longer ones are not told apart
SLOWDOWN = 0.02  # at most, of a step
FIRST_BALANCE = 1.0  # steps: the first draft needs no savings
MOST_BALANCE = 4.0  # steps: what a long quotation saved is not wasted on what follows


def usual_draft(ckpt: Checkpoint) -> int:
    """Return how many tokens to guess at most: none where a CPU only emulates the dtype."""
    return 0 if ckpt.device.type == "cpu" and is_slow(ckpt.dtype) else MOST_DRAFTED


def row_cost(ckpt: Checkpoint) -> float:
    """Return what a further row costs, of a step of one row.

    Measured on two cores with SmolLM2 and 4,096 tokens: 0.09 in bfloat16, 0.1 to 0.2 in float32. A
    GPU reads the weights for one row as for 17.
    """
    if ckpt.device.type != "cpu":
        return 0.02
    return 0.1 if ckpt.dtype.itemsize == 2 else 0.2


class Drafter:
    """The text so far, and the account."""

    def __init__(self, ids: list[int], cost: float):
        self.ids = array("i", ids)
        self.cost = cost
        self.balance = FIRST_BALANCE

    def add(self, token: int, accepted: bool) -> None:
        """Append a token; accepted: it was drafted."""
        self.ids.append(token)
        self.balance = min(MOST_BALANCE, self.balance + accepted + SLOWDOWN)

    def draft(self, most: int) -> list[int]:
        """Return at most `most` tokens that followed the longest match, the newest of several."""
        if most == 0:
            return []
        ids = np.frombuffer(self.ids, dtype=np.int32)
        end, length = longest_match(ids)
        if length < LEAST_MATCH:
            return []
        n = min(2 * length, most, int(self.balance / self.cost))
        self.balance -= n * self.cost
        # a match that ends near the end of the text is a repetition, which is drafted to go on
        return np.resize(ids[end:], n).tolist()


def longest_match(ids: np.ndarray) -> tuple[int, int]:
    """Return where the longest earlier match of the end of ids (n,) ends, and its length.

    The newest one, of at most MOST_MATCH tokens; (n, 0) if there is none. At 100,000 tokens this
    takes 0.1 ms.
    """
    n = len(ids)
    found = n
    length = 0
    ends = np.flatnonzero(ids[:-1] == ids[-1]) + 1  # of matches of length + 1
    while len(ends) and length < MOST_MATCH:
        found = int(ends[-1])
        length += 1
        ends = ends[ends > length]
        ends = ends[ids[ends - length - 1] == ids[n - length - 1]]
    return found, length
