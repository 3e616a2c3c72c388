"""Text <-> token ids, and conversations by the model's own chat template.

Invariants:
- `encode` adds no BOS and makes no special token out of text; those come from templates and `bos_id` alone.
- `decode(encode(text)) == text`, unless the tokenizer itself normalizes (NFC; U+2581 in sentencepiece)
  or its vocabulary lacks some of the 256 bytes (SmolLM2): those are dropped, as Hugging Face does.
- `stream` never yields part of a UTF-8 character; its pieces add up to the text of all the ids.
- Ids the vocabulary lacks (padding rows of the embedding) decode to nothing, like special tokens.
"""

import codecs
import operator
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from loading.encoders import Encoder, build_encoder, split_at
from loading.template import Template, read_template
from loading.vocabulary import Vocabulary, read_settings, read_vocabulary

# While a template is rendered, CUT marks where its text is cut, and HIDDEN encloses a number that stands for
# special text the user typed. Both are Unicode noncharacters, reserved for internal use.
CUT, HIDDEN = "\ufdd0", "\ufdd1"


def load(folder: Path) -> "Tokenizer":
    """Read the tokenizer of a checkpoint folder. Raises FileNotFoundError, or ValueError for an unusable file."""
    settings = read_settings(folder)
    v = read_vocabulary(folder, settings)
    return Tokenizer(v, build_encoder(v), read_template(folder, settings))


class Tokenizer:
    def __init__(self, v: Vocabulary, encoder: Encoder, template: Template | None = None):
        self.v, self.encoder = v, encoder
        self.special, self.bos_id = v.special, v.bos_id
        self.template = template  # without one, text is continued as it is
        self.system: str | None = (
            None  # opens a conversation, besides what the template itself adds
        )
        self.variables = {}  # for the template, such as {"enable_thinking": False}
        self.dummy_prefix = (
            encoder.inside is not encoder.start
        )  # sentencepiece puts a space before a text
        self.vocab_size: int = 1 + max([*encoder.pieces, *v.special.values()])

    def encode(self, text: str) -> list[int]:
        """Return the ids of text, without BOS. Lone surrogates, which UTF-8 cannot hold, become U+FFFD."""
        return self.encoder.start(_without_surrogates(_str(text)))

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

        begin: it opens the conversation; if False, it follows an answer. end: if False, the turn
        stays open until the ids of `rest` close it. Raises ValueError if the template fails.
        """
        if self.template is None:
            ids = self.encode(_str(user_text) if begin else "\n" + _str(user_text))
            return [self.bos_id, *ids] if begin and self.bos_id is not None else ids
        earlier = (
            []
            if begin
            else [{"role": "user", "content": CUT}, {"role": "assistant", "content": CUT}]
        )
        turn = {"role": "user", "content": self._hide(user_text) + ("" if end else CUT)}
        return self._render([*earlier, turn], cuts=len(earlier) + (not end), part=len(earlier))

    def rest(self, user_text: str) -> list[int]:
        """Return the ids that continue and close a turn left open."""
        if self.template is None:
            return self.encode("\n" + _str(user_text))
        return self._render(
            [{"role": "user", "content": CUT + "\n\n" + self._hide(user_text)}], cuts=1, part=1
        )

    def chat_messages(self, messages: list[dict], **variables) -> list[int]:
        """Return the ids of a whole conversation, {"role": ..., "content": str} each, ready for the next answer.

        variables go to the template. Raises ValueError if it fails, or if there is none.
        """
        if self.template is None:
            raise ValueError("this checkpoint has no chat template; give plain text")
        hidden = [
            {**message, "content": self._hide(message.get("content"))} for message in messages
        ]
        return self._render(hidden, **variables)

    def _render(self, messages, cuts=0, part=0, **variables):
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self._hide(self.system)}, *messages]
        text = self.template.render(messages, **self.variables | variables)
        for m in messages:
            if (
                m is messages[-1]
                and m["role"] == "user"
                or m["role"] == "system"
                and self.system is not None
            ):
                if m["content"].strip() not in text:
                    raise self.template.error(f"it does not write the {m['role']} message as it is")
        parts = text.split(CUT)
        if len(parts) != cuts + 1:
            raise self.template.error(
                "it does not write a message once and as it is, so a turn cannot be continued"
            )
        return self._spell(parts[part], opens=part == 0)

    def _hide(self, text):
        """Replace what the user typed and the tokenizer would take for a special token by numbers."""
        number = {
            name: f"{HIDDEN}{i}{HIDDEN}" for i, name in enumerate([*self.special, CUT, HIDDEN])
        }
        return "".join(number.get(part, part) for part in split_at(_str(text), number))

    def _spell(self, text, opens):
        """Return the ids of rendered text; the numbers are text again once the special tokens are split off."""
        names, ids = dict(enumerate([*self.special, CUT, HIDDEN])), []
        parts = split_at(text, self.special)  # texts at even places, special tokens between them
        for i, part in enumerate(parts):
            if i % 2:
                ids.append(self.special[part])
                continue
            part = part.lstrip() if i and parts[i - 1] in self.v.rstrip else part
            part = part.rstrip() if parts[i + 1 : i + 2] and parts[i + 1] in self.v.lstrip else part
            part = re.sub(
                f"{HIDDEN}(\\d+){HIDDEN}", lambda number: names.get(int(number[1]), ""), part
            )
            starts = self.v.legacy if i else opens
            ids += (self.encoder.start if starts else self.encoder.inside)(
                _without_surrogates(part)
            )
        return ids

    def bytes(self, token: int) -> bytes:
        """Return the bytes of one token, b'' for a special one. Raises TypeError unless it is a whole number."""
        return self.encoder.pieces.get(operator.index(token), b"")


def _without_surrogates(text):
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _str(text):
    if not isinstance(text, str):
        raise ValueError(f"text must be a str, not {text!r:.60}")
    return text
