"""What an answer is made of: pieces of text, thoughts apart, and the log probabilities of tokens.

Log probabilities are the model's own, before temperature and top_p, as OpenAI's are.
"""

import codecs
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from torch import Tensor

OPEN = "<think>"
CLOSE = "</think>"
SLICE = 256  # tokens of a prompt scored at a time: the logits of all would be the largest tensor


class Likely(NamedTuple):
    """A token that could have stood at a place."""

    name: str  # its text; where that is no text, `bytes:` and its bytes, or a special token's name
    data: bytes
    logprob: float | None  # None for the first token of a prompt


class Scored(NamedTuple):
    """A token that stands at a place."""

    token: Likely
    top: list[Likely]  # the likeliest for its place
    offset: int  # of its first character in the text


@dataclass(frozen=True)
class Piece:
    """A part of an answer."""

    text: str
    thought: bool = False
    scored: tuple[Scored, ...] = ()


class Scores:
    """Log probabilities of an answer's tokens; given out with the text that they begin in."""

    def __init__(self, tok, n_top: int):
        self.tok = tok
        self.n_top = n_top
        self.special = {id: name for name, id in tok.special.items()}
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.length = 0  # characters complete so far
        self.shown = 0  # characters given out
        self.waiting: list[Scored] = []

    def add(self, token: int, logits: Tensor | None = None) -> None:
        """Note a token, and the logits (V,) that it was chosen by."""
        top = []
        logprob = None
        if logits is not None:
            logprobs = logits.cpu().double().log_softmax(-1)
            logprob = float(logprobs[token])
            best = logprobs.topk(min(self.n_top, len(logprobs)))
            for value, other in zip(best.values.tolist(), best.indices.tolist()):
                top.append(self.likely(other, value))
        likely = self.likely(token, logprob)
        self.waiting.append(Scored(likely, top, self.move(likely.data)))

    def likely(self, token: int, logprob: float | None) -> Likely:
        data = self.tok.bytes(token)
        try:
            name = self.special.get(token) or data.decode()
        except UnicodeDecodeError:  # part of a character
            name = "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
        return Likely(name, data, logprob)

    def move(self, data: bytes) -> int:
        """Return the character in which a token's bytes begin, and go on behind them."""
        first = self.utf8.decode(data[:1])
        inside = bool(self.utf8.getstate()[0])
        # the first byte completes or continues a character, or ends a broken one and begins another
        offset = self.length + max(0, len(first) + inside - 1)
        self.length += len(first) + len(self.utf8.decode(data[1:]))
        return offset

    def end_prompt(self, text: str) -> tuple[Scored, ...]:
        """Return the tokens of a prompt, whose text this is; a first space may be missing in it."""
        self.length += len(self.utf8.decode(b"", True))
        missing = self.length - len(text)
        prompt = [
            scored._replace(offset=max(0, scored.offset - missing)) for scored in self.waiting
        ]
        self.waiting = []
        self.length = self.shown = len(text)
        return tuple(prompt)

    def follow(self, pieces: Iterable[str]) -> Iterator[str]:
        """Yield the pieces of an answer; the tokens that begin in them may be taken then."""
        for piece in pieces:
            self.shown += len(piece)
            yield piece

    def take(self) -> tuple[Scored, ...]:
        """Return the tokens not given out yet that begin in text that is."""
        taken = tuple(scored for scored in self.waiting if scored.offset < self.shown)
        self.waiting = self.waiting[len(taken) :]
        return taken


def score_prompt(engine, ids: list[int], scores: Scores, room: int, check) -> int:
    """Score all ids by the full model; return how many of them have run: all but the last.

    Most tokens of a pruned prompt have no logits, so nothing is pruned. Replaces the engine's
    conversation. room: tokens to come. check: called between slices.
    """
    n_run = len(ids) - 1
    scores.add(ids[0])
    if n_run:
        scores.add(ids[1], engine.prefill(ids[:1], n_run + room, schedule="dense"))
    for begin in range(1, n_run, SLICE):
        check()
        end = min(begin + SLICE, n_run)
        logits = engine.extend(ids[begin:end], all_logits=True)
        for token, row in zip(ids[begin + 1 : end + 1], logits):
            scores.add(token, row)
    return n_run


def parts(pieces: list[Piece]) -> tuple[str, str]:
    """Return the thought in an answer, and the rest."""
    thought = "".join(piece.text for piece in pieces if piece.thought)
    rest = "".join(piece.text for piece in pieces if not piece.thought)
    return thought, rest


def thoughts_apart(pieces: Iterable[str], inside: bool | None) -> Iterator[tuple[bool, str]]:
    """Yield the text of an answer with whether it is thought, without marks and line ends there.

    inside: the answer begins in a thought; False: it may begin with a thought's mark; None: all of
    it is answer.
    """
    text = ""
    told = {True: 0, False: 0}  # characters
    for piece, final in chain(((piece, False) for piece in pieces), [("", True)]):
        text += piece
        for is_thought, part in zip(told, split(text, inside, final)):
            if len(part) > told[is_thought]:
                yield is_thought, part[told[is_thought] :]
                told[is_thought] = len(part)


def split(text: str, inside: bool | None, final: bool) -> tuple[str, str]:
    """Return the thought and the rest of an answer, as far as they are certain."""
    begun = text.lstrip()
    if inside is False and begun.startswith(OPEN):
        text = begun.removeprefix(OPEN)
    elif inside is False and OPEN.startswith(begun) and not final:
        return "", ""
    elif not inside:
        return "", text
    thought, closed, rest = text.partition(CLOSE)
    thought = thought.lstrip("\n")
    if closed:
        return thought.rstrip("\n"), rest.lstrip("\n")
    mark = "<" + thought.rpartition("<")[2]
    if CLOSE.startswith(mark) and not final:
        thought = thought.removesuffix(mark)
    return thought if final else thought.rstrip("\n"), ""
