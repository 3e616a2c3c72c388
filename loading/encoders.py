"""Text to ids and back for plain text, on sentencepiece or tiktoken; no special tokens here."""

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

import regex
import sentencepiece
import tiktoken

from loading.vocabulary import Vocabulary, lost_bytes

# The regex engine overflows its stack on a very long run, so it gets text in pieces. All splits
# end a match after a letter or digit that one of these follows, whatever surrounds it: a cut
# there keeps the ids.
PIECE = 400_000
RUN = 25_000
SAFE_CUT = re.compile(r".*[^\W_](?=[ \n、。，])", re.DOTALL)
# A group is set where the run goes on.
RUNS = re.compile(rf"\s{{1,{RUN}}}(?=(\s)?)|\S{{1,{RUN}}}(?=(\S)?)")
# Protobuf merges this into a sentencepiece model: field 3, normalizer; its 3, add_dummy_prefix.
PREFIX = {False: b"\x1a\x02\x18\x00", True: b"\x1a\x02\x18\x01"}


@dataclass(frozen=True)
class Encoder:
    encode: Callable[[str, bool], list[int]]  # text, and whether it starts a text, to ids
    pieces: dict[int, bytes]  # the bytes of each id but the special ones


def build_encoder(vocab: Vocabulary) -> Encoder:
    return _sentencepiece(vocab) if vocab.proto else _bpe(vocab)


def _sentencepiece(vocab: Vocabulary) -> Encoder:
    """Without splitting: sentencepiece takes linear time, even for a run of a megabyte."""
    inside = sentencepiece.SentencePieceProcessor(model_proto=vocab.proto + PREFIX[False])
    start = inside
    if vocab.prefix:
        start = sentencepiece.SentencePieceProcessor(model_proto=vocab.proto + PREFIX[True])
    pieces = {i: name.replace("\u2581", " ").encode() for name, i in vocab.pieces.items()}
    byte_ids = {
        i: bytes([int(name[3:5], 16)]) for name, i in vocab.pieces.items() if start.is_byte(i)
    }
    spelled = _spelled(vocab, start, pieces, {byte: i for i, byte in byte_ids.items()})
    pieces |= byte_ids
    for id in vocab.special.values():
        pieces.pop(id, None)
    for name, id in vocab.added.items():
        pieces[id] = name.encode()

    def encode(text: str, starts: bool) -> list[int]:
        ids = []
        for part in split_at(text, vocab.added, vocab.lstrip, vocab.rstrip):
            if part in vocab.added:
                ids.append(vocab.added[part])
                starts = vocab.legacy
            else:
                found = (start if starts else inside).encode(part)
                ids += found if spelled.keys().isdisjoint(found) else respell(found)
        return ids

    def respell(ids: list[int]) -> list[int]:
        return [other for id in ids for other in spelled.get(id, [id])]

    return Encoder(encode, pieces)


def _spelled(vocab: Vocabulary, model, pieces, byte_ids) -> dict[int, list[int]]:
    """Return {id: ids of its bytes} of pieces that lost their id to a name or became special."""
    spelled = {}
    for name, id in [*vocab.special.items(), *vocab.added.items()]:
        if id not in pieces or model.is_control(id) or model.is_unknown(id):
            continue
        if vocab.added.get(name) == id == vocab.pieces.get(name):
            continue
        ids = [byte_ids.get(bytes([byte])) for byte in pieces[id]]
        spelled[id] = [model.unk_id()] if None in ids else ids
    return spelled


def _bpe(vocab: Vocabulary) -> Encoder:
    bpe = tiktoken.Encoding(
        "bpe", pat_str=vocab.split, mergeable_ranks=vocab.ranks, special_tokens={}
    )
    words = _words(vocab.split)
    lost = lost_bytes(vocab.ranks)

    def merge(text: str) -> list[int]:
        if not lost or text.encode().translate(None, lost) == text.encode():
            return bpe.encode_ordinary(text)
        # Dropped after the split, which they take part in, and before merges, which close the gap.
        # tiktoken panics at a byte it lacks, and what is left need not be UTF-8, so each word goes
        # in by itself and as bytes.
        left = (word.encode().translate(None, lost) for word in words(text))
        return [id for word in left if word for id in bpe._encode_single_piece(word)]

    def encode(text: str, starts: bool) -> list[int]:
        ids = []
        for part in split_at(
            text, vocab.added, vocab.lstrip, vocab.rstrip
        ):  # before NFC, as Hugging Face
            if part in vocab.added:
                ids.append(vocab.added[part])
                continue
            part = unicodedata.normalize("NFC", part) if vocab.nfc else part
            for piece in _pieces(part):
                ids += merge(piece)
        return ids

    pieces = {id: piece for piece, id in vocab.ranks.items()}
    pieces |= {id: token.encode() for token, id in vocab.added.items()}
    return Encoder(encode, pieces)


def _words(split: str) -> Callable[[str], list[str]]:
    """Return a function that splits text as tiktoken does before merging, which it does not expose.

    `regex` may have another Unicode version, so tiktoken classifies each character, and an old one
    replaces it.
    """
    pattern = regex.compile(split)
    single = {bytes([byte]): byte for byte in range(256)}
    classes = []
    for members, stand_in in ((r"\p{L}+", "é"), (r"\p{N}+", "²"), (r"[^\s\p{L}\p{N}]+", "\uffff")):
        finder = tiktoken.Encoding(
            "class", pat_str=members, mergeable_ranks=single, special_tokens={}
        )
        classes.append((finder, stand_in))

    def words(text: str) -> list[str]:
        known = {}
        for finder, stand_in in classes:
            for char in finder.decode(finder.encode_ordinary(text)):
                if char > "\u024f":  # below: ſ, an s to (?i:'s)
                    known[ord(char)] = stand_in
        return [text[slice(*word.span())] for word in pattern.finditer(text.translate(known))]

    return words


def _pieces(text: str):
    """Yield text in pieces the regex engine can take.

    Only runs too long for it are cut where ids may change.
    """
    at = 0
    while at < len(text):
        piece = text[at : at + PIECE]
        if at + PIECE < len(text) and (safe := SAFE_CUT.match(piece)):
            piece = safe[0]
        at += len(piece)
        start = 0
        for run in RUNS.finditer(piece):
            if run.lastindex:
                yield piece[start : run.end()]
                start = run.end()
        yield piece[start:]


def split_at(text: str, tokens, lstrip=(), rstrip=()) -> list[str]:
    """Split text at the tokens, which stay at odd places; the longest wins, as in Hugging Face.

    lstrip, rstrip: tokens that swallow the white space before them, after them.
    """
    if not tokens:
        return [text]
    longest_first = sorted(tokens, key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
    for i in range(1, len(parts), 2):
        if parts[i] in lstrip:
            parts[i - 1] = parts[i - 1].rstrip()
        if parts[i] in rstrip:
            parts[i + 1] = parts[i + 1].lstrip()
    return parts
