"""Text <-> token ids, and conversations by the model's own chat template.

Invariants:
- `encode` adds no BOS and makes no special token out of text; those come from templates and
  `bos_id` alone.
- `decode(encode(text)) == text`, unless the tokenizer itself normalizes (NFC; U+2581 in
  sentencepiece; white space beside an added token) or its vocabulary lacks some of the 256 bytes
  (SmolLM2): those are dropped, as Hugging Face does.
- `stream` never yields part of a UTF-8 character; its pieces add up to the text of all the ids.
- Ids the vocabulary lacks (padding rows of the embedding) decode to nothing, like special tokens.
"""

import codecs
import datetime
import operator
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

from loading.encoders import Encoder, build_encoder, split_at
from loading.template import MARK, Template, read_template
from loading.tokens import read_settings
from loading.vocabulary import Vocabulary, read_vocabulary, template_roles

# While a template is rendered, CUT marks where its text is cut, and HIDDEN encloses a number that
# stands for special text the user typed. Both are Unicode noncharacters, for internal use.
CUT = "\ufdd0"
HIDDEN = "\ufdd1"


def load(folder: Path, rows: int | None = None) -> "Tokenizer":
    """Read the tokenizer of a checkpoint folder; rows: how many ids its model has.

    Raises FileNotFoundError, or ValueError for an unusable file or one of another model.
    """
    settings = read_settings(folder)
    v = read_vocabulary(folder, settings)
    template = read_template(folder, settings, template_roles(folder, settings, v))
    tok = Tokenizer(v, build_encoder(v), template)
    if rows is not None:
        tok.fit(folder, rows)
    return tok


class Tokenizer:
    def __init__(self, v: Vocabulary, encoder: Encoder, template: Template | None = None):
        self.v = v
        self.encoder = encoder
        self.special = v.special
        self.bos_id = v.bos_id
        self.template = template  # without one, text is continued as it is
        self.system: str | None = None  # opens a conversation, besides the template's own text
        self.variables = {}  # for the template, such as {"enable_thinking": False}
        self.date = datetime.date.today()  # for templates that write it; stays what it is
        self.vocab_size: int = 1 + max([*encoder.pieces, *v.special.values()])
        self.without_row: dict[int, str] = {}  # tokens that the model lacks, as `fit` finds
        self.hidden = [*self.special, CUT, HIDDEN, MARK]  # names that stay text in what users type

    def fit(self, folder: Path, rows: int) -> None:
        """Raise ValueError unless a model of so many rows knows all ids of text.

        Added tokens beyond them may never be used, as <pad>; `encode` and a template refuse them.
        """
        for id, piece in self.encoder.pieces.items():
            if id >= rows and id not in self.v.files:
                raise ValueError(
                    f"{folder}: the tokenizer has the id {id} for {piece!r:.60}, the model has "
                    f"{rows:,}; they do not belong together"
                )
        names = {**self.v.special, **self.v.added}
        for name, id in names.items():
            if id >= rows:
                file = self.v.files.get(id, folder)
                self.without_row[id] = (
                    f"token {name!r:.60} of {file} has the id {id}, the model {rows:,} ids"
                )
        self.vocab_size = min(self.vocab_size, rows)

    def encode(self, text: str, after: Sequence[int] = ()) -> list[int]:
        """Return the ids of text, without BOS; after: the ids that it follows.

        Where a text was cut does not show: sentencepiece puts a space only before one that starts.
        Lone surrogates, which UTF-8 cannot hold, become U+FFFD.
        """
        starts = len(after) == 0 or self._ends_before_space(after[-1])
        if len(after) and after[-1] in map(self.special.get, self.v.rstrip):
            text = _str(text).lstrip()
        return self._encode(_str(text), starts)

    def _ends_before_space(self, last: int) -> bool:
        if last == self.bos_id:
            return True
        return self.v.legacy and last in {*self.special.values(), *self.v.added.values()}

    def _encode(self, text: str, starts: bool) -> list[int]:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return self._with_rows(self.encoder.encode(text, starts))

    def _with_rows(self, ids: list[int]) -> list[int]:
        for id in self.without_row.keys() & ids:
            raise ValueError(f"{self.without_row[id]}; leave the token out")
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids that start a text (for ids that continue one: `stream`)."""
        text = b"".join(map(self.bytes, ids)).decode("utf-8", "replace")
        return text[1:] if self.v.prefix and text.startswith(" ") else text

    def stream(self, ids: Iterable[int], stops: Iterable[str] = ()) -> Iterator[str]:
        """Yield text as soon as its characters are complete; a leading space stays.

        Ends before the first of `stops`; text that may be the beginning of one is held back until
        it is not, or until the ids end.
        """
        stops = tuple(stops)
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        held = ""
        for data, final in chain(((self.bytes(token), False) for token in ids), [(b"", True)]):
            held += utf8.decode(data, final)
            found = [at for at in map(held.find, stops) if at >= 0]
            if found:
                yield from filter(None, [held[: min(found)]])
                return
            begun = [n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])]
            ready = len(held) - (0 if final else max(begun, default=0))
            yield from filter(None, [held[:ready]])
            held = held[ready:]

    def chat(self, user_text: str, begin: bool = True, end: bool = True) -> list[int]:
        """Return the ids of a user's turn, ready for the answer.

        Without a template: of plain text, with BOS if it begins. begin: the turn opens the
        conversation; if False, it follows an answer. end: if False, the turn stays open until the
        ids of `rest` close it. Raises ValueError if the template fails.
        """
        if self.template is None and not begin:
            return self.rest(user_text)
        if self.template is None:
            bos = [] if self.bos_id is None else [self.bos_id]
            return bos + self.encode(user_text, after=bos)
        earlier = []
        if not begin:
            earlier = [{"role": role, "content": CUT} for role in ("user", "assistant")]
        turn = {"role": "user", "content": self._hide(user_text) + ("" if end else CUT)}
        return self._render([*earlier, turn], cuts=len(earlier) + (not end), part=len(earlier))

    def rest(self, user_text: str) -> list[int]:
        """Return the ids that continue and close a turn left open."""
        if self.template is None:
            return self._encode("\n" + _str(user_text), starts=False)
        turn = {"role": "user", "content": f"{CUT}\n\n{self._hide(user_text)}"}
        return self._render([turn], cuts=1, part=1)

    def chat_messages(
        self, messages: list[dict], date: datetime.date | None = None, **variables
    ) -> list[int]:
        """Return the ids of a whole conversation, ready for the next answer.

        messages: {"role": ..., "content": str} each, and more if the template writes it; date: of
        this conversation, instead of the tokenizer's; variables go to the template. Raises
        ValueError if it fails, if it leaves a message or its tool calls out, or if there is none.
        """
        if self.template is None:
            raise ValueError("this checkpoint has no chat template; give plain text")
        hidden = []
        for message in messages:
            _str(message.get("content"))
            hidden.append(self._hide_in(message))
        return self._render(hidden, date=date, **variables)

    def _render(
        self,
        messages: list[dict],
        cuts: int = 0,
        part: int = 0,
        date: datetime.date | None = None,
        **variables,
    ) -> list[int]:
        """Return the ids of one part of a conversation; CUT in the messages divides the parts."""
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self._hide(self.system)}, *messages]
        text, dropped = self.template.render_checked(
            messages, date or self.date, {**self.variables, **variables}
        )
        if dropped:
            message = messages[dropped[0]]
            role = self._show(str(message.get("role")))
            calls = " with its tool calls" if message.get("tool_calls") else ""
            raise self.template.error(f"it does not write the {role:.60} message{calls}")
        parts = text.split(CUT)
        if len(parts) != cuts + 1:
            raise self.template.error(
                "it does not write a message once and as it is, so a turn cannot be continued"
            )
        return self._spell(self._split(parts[part]), starts=part == 0)

    def _hide(self, text: str) -> str:
        """Put numbers in place of what the tokenizer would take for a special token."""
        number = {name: f"{HIDDEN}{i}{HIDDEN}" for i, name in enumerate(self.hidden)}
        return "".join(number.get(part, part) for part in split_at(_str(text), number))

    def _hide_in(self, value):
        """Apply `_hide` to all text in a value of JSON, such as a message with calls of tools."""
        if isinstance(value, dict):
            return {self._hide(key): self._hide_in(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._hide_in(item) for item in value]
        return self._hide(value) if isinstance(value, str) else value

    def _show(self, text: str) -> str:
        """Turn the numbers of `_hide` into text again."""
        names = dict(enumerate(self.hidden))
        return re.sub(f"{HIDDEN}(\\d+){HIDDEN}", lambda found: names.get(int(found[1]), ""), text)

    def _split(self, text: str) -> list[tuple[bool, str]]:
        """Split rendered text into (True, special token) and (False, text between them)."""
        parts = split_at(text, self.special, self.v.lstrip, self.v.rstrip)
        pieces = []
        for part in parts:
            is_special = part in self.special
            pieces.append((is_special, part if is_special else self._show(part)))
        return pieces

    def _spell(self, pieces: list[tuple[bool, str]], starts: bool) -> list[int]:
        """Return the ids of split text; starts: whether it starts a text."""
        ids = []
        for is_special, text in pieces:
            if is_special:
                ids.append(self.special[text])
                starts = self.v.legacy
            else:
                ids += self._encode(text, starts)
        return self._with_rows(ids)

    def bytes(self, token: int) -> bytes:
        """Return the bytes of one token, b'' for a special one; raise TypeError for no number."""
        return self.encoder.pieces.get(operator.index(token), b"")


def _str(text) -> str:
    if not isinstance(text, str):
        raise ValueError(f"text must be a str, not {text!r:.60}")
    return text
