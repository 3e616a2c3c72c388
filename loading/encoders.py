"""Text to ids and back for plain text, on sentencepiece or tiktoken; no special tokens here."""

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

import regex
import sentencepiece
import tiktoken

from loading.vocabulary import Vocabulary, lost_bytes

# The regex engine overflows its stack on a very long run, so it gets text in pieces. All splits here end a
# match after a letter or digit that one of these follows, whatever surrounds it: a cut there keeps the ids.
PIECE, RUN = 400_000, 25_000
SAFE_CUT = re.compile(r".*[^\W_](?=[ \n、。，])", re.DOTALL)
RUNS = re.compile(
    rf"\s{{1,{RUN}}}(?=(\s)?)|\S{{1,{RUN}}}(?=(\S)?)"
)  # a group is set where the run goes on


@dataclass(frozen=True)
class Encoder:
    start: Callable  # text that starts a text to ids
    inside: Callable  # text that goes on; sentencepiece then puts no space before it
    pieces: dict[int, bytes]  # the bytes of each id but the special ones


def build_encoder(v: Vocabulary) -> Encoder:
    return _sentencepiece(v) if v.proto else _bpe(v)


def _sentencepiece(v):
    """Without splitting: sentencepiece takes linear time, even for a run of a megabyte."""
    model, inside = sentencepiece.SentencePieceProcessor(model_proto=v.proto), None
    names = {i: model.id_to_piece(i) for i in range(model.vocab_size())}
    pieces = {
        i: bytes([int(name[3:5], 16)]) if model.is_byte(i) else name.replace("\u2581", " ").encode()
        for i, name in names.items()
        if name not in v.special
    }
    if "".join(model.encode("a", out_type=str)).startswith("\u2581"):
        no_prefix = b"\x1a\x02\x18\x00"  # protobuf merges this in: field 3, normalizer; its 3, add_dummy_prefix: false
        inside = sentencepiece.SentencePieceProcessor(model_proto=v.proto + no_prefix).encode
    return Encoder(model.encode, inside or model.encode, pieces)


def _bpe(v):
    bpe = tiktoken.Encoding("bpe", pat_str=v.split, mergeable_ranks=v.ranks, special_tokens={})
    words, lost = _words(v.split), lost_bytes(v.ranks)

    def merge(text):
        if not lost or text.encode().translate(None, lost) == text.encode():
            return bpe.encode_ordinary(text)
        # Dropped after the split, which they take part in, and before merges, which close the gap. tiktoken panics
        # at a byte it lacks, and what is left need not be UTF-8, so each word goes in by itself and as bytes.
        left = (word.encode().translate(None, lost) for word in words(text))
        return [i for word in left if word for i in bpe._encode_single_piece(word)]

    def plain(text):
        ids = []
        for part in split_at(text, v.added):  # as Hugging Face: added tokens first, then NFC
            part_nfc = unicodedata.normalize("NFC", part) if v.nfc else part
            ids += (
                [v.added[part]]
                if part in v.added
                else (i for p in _pieces(part_nfc) for i in merge(p))
            )
        return ids

    pieces = {i: piece for piece, i in v.ranks.items()} | {
        i: token.encode() for token, i in v.added.items()
    }
    return Encoder(plain, plain, pieces)


def _words(split):
    """Return a function that splits text exactly as tiktoken does before merging; tiktoken does not expose that.

    `regex` may have another Unicode version, so tiktoken classifies each character, and an old one replaces it.
    """
    single, pattern = {bytes([b]): b for b in range(256)}, regex.compile(split)
    classes = [
        (
            tiktoken.Encoding("class", pat_str=pat, mergeable_ranks=single, special_tokens={}),
            stand_in,
        )
        for pat, stand_in in ((r"\p{L}+", "é"), (r"\p{N}+", "²"), (r"[^\s\p{L}\p{N}]+", "\uffff"))
    ]

    def words(text):
        known = {
            ord(c): stand_in
            for chars, stand_in in classes
            for c in chars.decode(chars.encode_ordinary(text))
            if c > "\u024f"
        }  # below: ſ, an s to (?i:'s)
        return [text[slice(*word.span())] for word in pattern.finditer(text.translate(known))]

    return words


def _pieces(text):
    """Yield text in pieces the regex engine can take; only runs too long for it are cut where ids may change."""
    at = 0
    while at < len(text):
        piece = text[at : at + PIECE]
        if at + PIECE < len(text) and (safe := SAFE_CUT.match(piece)):
            piece = safe[0]
        start, at = 0, at + len(piece)
        for run in RUNS.finditer(piece):
            if run.lastindex:
                yield piece[start : run.end()]
                start = run.end()
        yield piece[start:]


def split_at(text, tokens):
    """Split text at the tokens, which stay in the result; the longest wins, as in Hugging Face."""
    return (
        re.split(f"({'|'.join(map(re.escape, sorted(tokens, key=len, reverse=True)))})", text)
        if tokens
        else [text]
    )
