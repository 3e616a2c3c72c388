"""Text <-> token ids, and conversations by the model's own chat template.

Invariants:
- `encode` adds no BOS and never makes a special token out of text: only templates and `bos_id` place those.
- `decode(encode(text)) == text`, unless the tokenizer itself normalizes (NFC; U+2581 in sentencepiece)
  or its vocabulary lacks some of the 256 bytes (SmolLM2): those are dropped, as Hugging Face does.
- `stream` never yields part of a UTF-8 character; its pieces add up to the text of all the ids.
- Ids the vocabulary lacks (padding rows of the embedding) decode to nothing, like special tokens.
"""

import codecs
import operator
import re
import unicodedata
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import regex
import sentencepiece
import tiktoken

from loading.template import Template, read_template
from loading.vocabulary import lost_bytes, read_settings, read_vocabulary

# While a template is rendered, these stand for where its text is cut, and around the number of what a user typed
# that the tokenizer would take for a token. Unicode keeps both free for such use.
CUT, HIDDEN = "\ufdd0", "\ufdd1"
# The regex engine overflows its stack on a very long run, so it gets text in pieces. All splits here end a
# match after a letter or digit that one of these follows, whatever surrounds it: a cut there keeps the ids.
PIECE, RUN = 400_000, 25_000
SAFE_CUT = re.compile(r".*[^\W_](?=[ \n、。，])", re.DOTALL)
RUNS = re.compile(rf"\s{{1,{RUN}}}(?=(\s)?)|\S{{1,{RUN}}}(?=(\S)?)")  # a group is set where the run goes on


def load(folder: Path) -> "Tokenizer":
    """Read the tokenizer of a checkpoint folder. Raises FileNotFoundError, or ValueError for an unusable file."""
    settings = read_settings(folder)
    v = read_vocabulary(folder, settings)
    tok = _sentencepiece(v) if v.proto else _bpe(v)
    tok.swallows, tok.template = v.swallows, read_template(folder, settings)
    return tok


class Tokenizer:
    """`pieces`: the bytes of each id but the special ones. `plain`: text to ids, whatever the kind."""

    def __init__(self, plain, pieces, special, bos_id, inside=None, legacy=False):
        self.plain, self.pieces, self.legacy = plain, pieces, legacy
        self.inside = inside or plain  # where a text goes on: sentencepiece then puts no space before it
        self.dummy_prefix = inside is not None
        self.special: dict[str, int] = special
        self.swallows: set[str] = set()  # special tokens that white space after them belongs to
        self.bos_id: int | None = bos_id
        self.template: Template | None = None  # without one, text is continued as it is
        self.system: str | None = None  # what a conversation opens with, besides what the template itself says
        self.variables = {}  # for the template, such as {"enable_thinking": False}
        self.vocab_size: int = 1 + max([*pieces, *special.values()])

    def encode(self, text: str) -> list[int]:
        """Return the ids of text, without BOS. Lone surrogates, which UTF-8 cannot hold, become U+FFFD."""
        return self.plain(_whole(_str(text)))

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids that start a text (for ids that continue one: `stream`)."""
        text = b"".join(map(self.bytes, ids)).decode("utf-8", "replace")
        return text[1:] if self.dummy_prefix and text.startswith(" ") else text

    def stream(self, ids: Iterable[int], stops: Iterable[str] = ()) -> Iterator[str]:
        """Yield text as soon as its characters are complete; a leading space stays. Ends before the first of `stops`.

        Text that may be the beginning of a stop is held back until it is not, or until the ids end.
        """
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        held, stops = "", tuple(stops)
        for data, final in chain(((self.bytes(token), False) for token in ids), [(b"", True)]):
            held += utf8.decode(data, final)
            if found := [at for at in map(held.find, stops) if at >= 0]:
                yield from filter(None, [held[: min(found)]])
                return
            begun = [n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])]
            ready = len(held) - (0 if final else max(begun, default=0))
            yield from filter(None, [held[:ready]])
            held = held[ready:]

    def chat(self, user_text: str, begin: bool = True, end: bool = True) -> list[int]:
        """Return the ids of a user's turn, ready for the answer; of plain text, with BOS, if there is no template.

        begin: it opens the conversation; if not, it follows an answer. end: without, the turn
        stays open, and what `rest` returns closes it. Raises ValueError if the template fails.
        """
        if self.template is None:
            ids = self.encode(_str(user_text) if begin else "\n" + _str(user_text))
            return [self.bos_id, *ids] if begin and self.bos_id is not None else ids
        earlier = [] if begin else [_said("user", "?"), _said("assistant", CUT)]
        turn = _said("user", self._hide(user_text) + ("" if end else CUT))
        return self._render([*earlier, turn], cuts=(not begin) + (not end), part=int(not begin))

    def rest(self, user_text: str) -> list[int]:
        """Return the ids that go on with a turn left open, and close it."""
        if self.template is None:
            return self.encode("\n" + _str(user_text))
        return self._render([_said("user", CUT + "\n\n" + self._hide(user_text))], cuts=1, part=1)

    def chat_messages(self, messages: list[dict], **variables) -> list[int]:
        """Return the ids of a whole conversation, {"role": ..., "content": str} each, ready for the next answer.

        variables go to the template. Raises ValueError if it fails, or if there is none.
        """
        if self.template is None:
            raise ValueError("this checkpoint has no chat template; give plain text")
        hidden = [{**message, "content": self._hide(message.get("content"))} for message in messages]
        return self._render(hidden, **variables)

    def _render(self, messages, cuts=0, part=0, **variables):
        if self.system is not None and messages[0]["role"] != "system":
            messages = [_said("system", self._hide(self.system)), *messages]
        text = self.template.render(messages, **self.variables | variables)
        for m in messages:
            if m is messages[-1] and m["role"] == "user" or m["role"] == "system" and self.system is not None:
                if m["content"].strip() not in text:
                    raise self.template.error(f"it does not write the {m['role']} message as it is")
        parts = text.split(CUT)
        if len(parts) != cuts + 1:
            raise self.template.error("it does not write a message once and as it is, so a turn cannot be continued")
        return self._spell(parts[part], opens=part == 0)

    def _hide(self, text):
        """Put numbers in place of what the user typed and the tokenizer would take for a token."""
        number = {name: f"{HIDDEN}{i}{HIDDEN}" for i, name in enumerate([*self.special, CUT, HIDDEN])}
        return "".join(number.get(part, part) for part in _split(_str(text), number))

    def _spell(self, text, opens):
        """Return the ids of rendered text; the numbers are text again once the special tokens are split off."""
        names, ids, before = dict(enumerate([*self.special, CUT, HIDDEN])), [], None
        for i, part in enumerate(_split(text, self.special)):
            if part in self.special:
                ids.append(self.special[part])
            else:
                part = part.lstrip() if before in self.swallows else part
                part = re.sub(f"{HIDDEN}(\\d+){HIDDEN}", lambda number: names.get(int(number[1]), ""), part)
                ids += (self.plain if (self.legacy if i else opens) else self.inside)(_whole(part))
            before = part
        return ids

    def bytes(self, token: int) -> bytes:
        """Return the bytes of one token, b'' for a special one. Raises TypeError for what is no whole number."""
        return self.pieces.get(operator.index(token), b"")


def _said(role, content):
    return {"role": role, "content": content}


def _whole(text):
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _str(text):
    if not isinstance(text, str):
        raise ValueError(f"text must be a str, not {text!r:.60}")
    return text


def _split(text, tokens):
    """Split text at the tokens, which stay in the result; the longest wins, as in Hugging Face."""
    return re.split(f"({'|'.join(map(re.escape, sorted(tokens, key=len, reverse=True)))})", text) if tokens else [text]


def _sentencepiece(v):
    """No splitting here: sentencepiece takes linear time, even for a run of a megabyte."""
    model, inside = sentencepiece.SentencePieceProcessor(model_proto=v.proto), None
    names = {i: model.id_to_piece(i) for i in range(model.vocab_size())}
    pieces = {i: bytes([int(name[3:5], 16)]) if model.is_byte(i) else name.replace("\u2581", " ").encode()
              for i, name in names.items() if name not in v.special}
    if "".join(model.encode("a", out_type=str)).startswith("\u2581"):
        no_prefix = b"\x1a\x02\x18\x00"  # protobuf merges this in: field 3, normalizer; its 3, add_dummy_prefix: false
        inside = sentencepiece.SentencePieceProcessor(model_proto=v.proto + no_prefix).encode
    return Tokenizer(model.encode, pieces, v.special, v.bos_id, inside, v.legacy)


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
        for part in _split(text, v.added):  # as Hugging Face: added tokens first, then NFC
            part_nfc = unicodedata.normalize("NFC", part) if v.nfc else part
            ids += [v.added[part]] if part in v.added else (i for p in _pieces(part_nfc) for i in merge(p))
        return ids

    pieces = {i: piece for piece, i in v.ranks.items()} | {i: token.encode() for token, i in v.added.items()}
    return Tokenizer(plain, pieces, v.special, v.bos_id)


def _words(split):
    """Return a function that splits text just as tiktoken does before it merges, which tiktoken itself does not show.

    `regex` may know another Unicode, so tiktoken tells the class of each character, and one that all know stands in.
    """
    single, pattern = {bytes([b]): b for b in range(256)}, regex.compile(split)
    classes = [(tiktoken.Encoding("class", pat_str=pat, mergeable_ranks=single, special_tokens={}), stand_in)
               for pat, stand_in in ((r"\p{L}+", "é"), (r"\p{N}+", "²"), (r"[^\s\p{L}\p{N}]+", "\uffff"))]

    def words(text):
        known = {ord(c): stand_in for chars, stand_in in classes
                 for c in chars.decode(chars.encode_ordinary(text)) if c > "\u024f"}  # below: ſ, an s to (?i:'s)
        return [text[slice(*word.span())] for word in pattern.finditer(text.translate(known))]

    return words


def _pieces(text):
    """Yield text in pieces the regex engine can take; only runs too long for it are cut where ids may change."""
    at = 0
    while at < len(text):
        piece = text[at:at + PIECE]
        if at + PIECE < len(text) and (safe := SAFE_CUT.match(piece)):
            piece = safe[0]
        start, at = 0, at + len(piece)
        for run in RUNS.finditer(piece):
            if run.lastindex:
                yield piece[start:run.end()]
                start = run.end()
        yield piece[start:]
