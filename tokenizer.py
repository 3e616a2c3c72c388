"""Text <-> token ids, and the chat formats.

Three kinds of file, told apart by content: Meta's tiktoken ranks (Llama 3), Hugging Face's byte-level
BPE `tokenizer.json` (Llama 3, Qwen2.5, SmolLM2; turned into tiktoken ranks), sentencepiece (Llama 2).
A file that asks for anything else is refused: a tokenizer that is almost right gives wrong ids silently.
Invariants:
- `encode` adds no BOS and never makes a special token out of text: only `chat` and `bos_id` place those.
- `decode(encode(text)) == text`, unless the tokenizer itself normalizes (NFC; U+2581 in sentencepiece)
  or its vocabulary lacks some of the 256 bytes (SmolLM2): those are dropped, as Hugging Face does.
- `stream` never yields part of a UTF-8 character; its pieces add up to the text of all the ids.
- Ids the vocabulary lacks (padding rows of the embedding) decode to nothing, like special tokens.
"""

import base64
import codecs
import json
import operator
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

import regex
import sentencepiece
import tiktoken

FILES = "tokenizer.model", "tokenizer.json", "original/tokenizer.model"
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# SmolLM2 cuts out every digit first, so that nothing, neither " ?" nor the look ahead after white space, sees one.
SMOLLM2_SPLIT = GPT2_SPLIT.replace(r" ?\p{N}+", r"\p{N}").replace(r"(?!\S)", r"(?![^\s\p{N}])")
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2_SPLIT = LLAMA3_SPLIT.replace("{1,3}", "")  # digits one by one
LLAMA3_RANKS = 128_000  # the special tokens come right after, so a shorter file would shift them
LLAMA3_SPECIAL = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id",
                  8: "eom_id", 9: "eot_id", 10: "python_tag"}
CHATS = {  # name: (what its chat template shows, a special token it needs, what opens a conversation, what opens a
    #        later turn once the answer before it is closed, what closes a turn of the user's and opens the answer)
    "llama3": (r"<\|start_header_id\|>", "<|start_header_id|>", 
               "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
               "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n",
               "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"),
    "qwen": (r"<\|im_start\|>", "<|im_start|>", "<|im_start|>user\n",
             "<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
    "llama2": (r"\[INST\]", "<s>", "<s>[INST] ", " </s><s>[INST] ", " [/INST]"),
    "zephyr": (r"^(?!.*<\|end\|>).*<\|user\|>", "</s>",  # <|end|>: Phi-3
               "<|user|>\n", "</s>\n<|user|>\n", "</s>\n<|assistant|>\n"),
    None: ("", "", "", "\n", ""),  # plain completion goes on in a new line
}
# The system turn that a template with <|im_start|> writes in by itself, as it stands in one of its strings.
SYSTEM = re.compile(r"""(["'])<\|im_start\|>system(?:\n|\\n)(?P<text>(?:\\.|(?!\1)[^\\])*?)<\|im_end\|>""", re.DOTALL)
# The regex engine overflows its stack on a very long run, so it gets text in pieces. All splits here end a
# match after a letter or digit that one of these follows, whatever surrounds it: a cut there keeps the ids.
PIECE, RUN = 400_000, 25_000
SAFE_CUT = re.compile(r".*[^\W_](?=[ \n、。，])", re.DOTALL)
RUNS = re.compile(rf"\s{{1,{RUN}}}(?=(\s)?)|\S{{1,{RUN}}}(?=(\S)?)")  # a group is set where the run goes on
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2 writes these bytes as themselves
BYTE_OF = dict(zip(map(chr, [*PRINTABLE, *range(256, 324)]), [*PRINTABLE, *sorted({*range(256)} - {*PRINTABLE})]))


def load(folder: Path) -> "Tokenizer":
    """Read the tokenizer of a checkpoint folder. Raises FileNotFoundError, or ValueError for an unusable file."""
    path = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{folder}: no tokenizer; looked for {', '.join(FILES)}; copy one of them there")
    config, jinja = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    settings = _json(config, config.read_bytes()) if config.is_file() else {}
    if not isinstance(settings.get("add_bos_token"), bool | None):
        raise _bad(config, f"key 'add_bos_token' is {settings['add_bos_token']!r}", "make it true or false")
    tok = _parse(path, path.read_bytes(), add_bos=settings.get("add_bos_token") is not False)
    template = _template(settings.get("chat_template") or "")
    template += jinja.read_text("utf-8", "replace") if jinja.is_file() else ""
    fits = (name for name, (mark, token, *_) in CHATS.items()
            if name and re.search(mark, template, re.DOTALL) and token in tok.special)
    tok.chat_format = next(fits, "unknown") if template else None
    if tok.chat_format == "qwen" and (system := SYSTEM.search(template)):
        tok.system = f"<|im_start|>system\n{_unescape(system['text'])}<|im_end|>\n"
    return tok


def _template(value):
    """Return the text of a config's chat template, or of a list of them, the default one first."""
    if isinstance(value, list) and all(isinstance(one, dict) for one in value):
        value = sorted(value, key=lambda one: one.get("name") != "default")
        return "\n".join(str(one.get("template")) for one in value)
    return str(value)


def _unescape(literal):
    return re.sub(r"\\(.)", lambda escape: {"n": "\n", "t": "\t"}.get(escape[1], escape[1]), literal, flags=re.DOTALL)


class Tokenizer:
    """`pieces`: the bytes of each id but the special ones. `plain`: text to ids, whatever the kind."""

    def __init__(self, plain, pieces, special, bos_id, dummy_prefix=False):
        self.plain, self.pieces, self.dummy_prefix = plain, pieces, dummy_prefix
        self.special: dict[str, int] = special
        self.bos_id: int | None = bos_id
        self.chat_format: str | None = None
        self.system = ""  # the turn before the user's first, if this is a chat model that has one
        self.vocab_size: int = 1 + max([*pieces, *special.values()])

    def encode(self, text: str) -> list[int]:
        """Return the ids of text, without BOS. Lone surrogates, which UTF-8 cannot hold, become U+FFFD."""
        return self.plain(_str(text).encode("utf-16", "surrogatepass").decode("utf-16", "replace"))

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids that start a text (for ids that continue one: `stream`)."""
        text = b"".join(map(self.bytes, ids)).decode("utf-8", "replace")
        return text[1:] if self.dummy_prefix and text.startswith(" ") else text

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield text as soon as its characters are complete; a leading space stays."""
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        yield from filter(None, (utf8.decode(self.bytes(token)) for token in ids))
        yield from filter(None, [utf8.decode(b"", final=True)])

    def chat(self, user_text: str, begin: bool = True, end: bool = True) -> list[int]:
        """Return the ids of a user's turn, ready for the answer; of plain text, with BOS, if this is no chat model.

        begin: it opens the conversation; if not, it follows an answer. end: without, the turn
        stays open, and what `rest` returns closes it.
        """
        _, _, first, later, close = self._format()
        head = self._fill(self.system, "{}") if begin and self.chat_format else []  # apart: a "{}" in it stays
        ids = head + self._fill((first if begin else later) + "{}" + (close if end else ""), user_text)
        return ids if not begin or self.bos_id is None or ids[:1] == [self.bos_id] else [self.bos_id, *ids]

    def rest(self, user_text: str) -> list[int]:
        """Return the ids that go on with a turn left open, and close it."""
        return self._fill(("\n\n" if self.chat_format else "\n") + "{}" + self._format()[-1], user_text)

    def _format(self):
        if self.chat_format == "unknown":
            known = ", ".join(filter(None, CHATS))
            raise ValueError(f"chat template is none of {known}; give the prompt as it is with --raw")
        return CHATS[self.chat_format]

    def _fill(self, template, text):
        # The template is split before the text goes in: "<|eot_id|>" typed by a user stays text.
        parts = _split(template, self.special)
        ids = ([self.special[p]] if p in self.special else self.encode(p.replace("{}", _str(text))) for p in parts)
        return [i for part in ids for i in part]

    def bytes(self, token: int) -> bytes:
        """Return the bytes of one token, b'' for a special one. Raises TypeError for what is no whole number."""
        return self.pieces.get(operator.index(token), b"")


def _str(text):
    if not isinstance(text, str):
        raise ValueError(f"text must be a str, not {text!r:.60}")
    return text


def _split(text, tokens):
    """Split text at the tokens, which stay in the result; the longest wins, as in Hugging Face."""
    return re.split(f"({'|'.join(map(re.escape, sorted(tokens, key=len, reverse=True)))})", text) if tokens else [text]


ONLY = "only byte-level BPE as in Llama 3, Qwen2.5 and SmolLM2 is supported"


def _bad(path, what, advice="download the file again"):
    return ValueError(f"{path}: {what}; {advice}")


def _json(path, blob):
    try:
        value = json.loads(blob)
    except (ValueError, RecursionError) as error:
        raise _bad(path, f"not JSON ({error})") from None
    if not isinstance(value, dict):
        raise _bad(path, "not a JSON object")
    return value


def _parse(path, blob, add_bos):
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\s", blob):
        return _from_tiktoken(path, blob)
    if blob.lstrip()[:1] == b"{":
        try:
            return _from_json(path, _json(path, blob))
        except (LookupError, TypeError, AttributeError, OverflowError) as error:
            raise _bad(path, f"not laid out like a tokenizer.json ({error!r})") from None
    if blob[:1] == b"\n":  # protobuf: field 1, the first of the pieces
        return _from_sentencepiece(path, blob, add_bos)
    raise _bad(path, f"starts with {blob[:20]!r}, no known tokenizer format")


def _from_sentencepiece(path, blob, add_bos):
    """No splitting here: sentencepiece takes linear time, even for a run of a megabyte."""
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=blob)
        names = [model.id_to_piece(i) for i in range(model.vocab_size())]
    except (RuntimeError, UnicodeDecodeError):
        raise _bad(path, "sentencepiece cannot parse it") from None
    special = {name: i for i, name in enumerate(names) if model.is_control(i) or model.is_unknown(i)}
    pieces = {i: bytes([int(name[3:5], 16)]) if model.is_byte(i) else name.replace("\u2581", " ").encode()
              for i, name in enumerate(names) if name not in special}
    bos_id = model.bos_id() if add_bos and model.bos_id() >= 0 else None
    dummy_prefix = "".join(model.encode("a", out_type=str)).startswith("\u2581")
    return Tokenizer(model.encode, pieces, special, bos_id, dummy_prefix)


def _from_tiktoken(path, blob):
    try:
        lines = map(bytes.split, blob.splitlines())
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError:
        raise _bad(path, "has a line that is not 'base64 rank'") from None
    if [*ranks.values()] != [*range(LLAMA3_RANKS)]:
        raise _bad(path, f"has {len(ranks)} ranks, not Llama 3's 0 to {LLAMA3_RANKS - 1} in order")
    if lost := _lost(ranks):
        raise _bad(path, f"lacks {len(lost)} of the 256 single bytes")
    reserved = iter(range(256))
    names = [LLAMA3_SPECIAL.get(i) or f"reserved_special_token_{next(reserved)}" for i in range(256)]
    special = {f"<|{name}|>": LLAMA3_RANKS + i for i, name in enumerate(names)}
    return _bpe(path, ranks, LLAMA3_SPLIT, special, bos_id=LLAMA3_RANKS)


def _from_json(path, data):
    """Translate a byte-level BPE; what could change ids in a way not known here is refused."""
    model, normalizer, special, added = data["model"], data.get("normalizer"), {}, {}
    odd = {key: model[key] for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(key)}
    if model.get("byte_fallback") or "Metaspace" in str(data.get("pre_tokenizer")):
        raise _bad(path, "byte_fallback or Metaspace, so sentencepiece in disguise", "put its tokenizer.model there")
    if model.get("type", "BPE") != "BPE" or odd or normalizer not in (None, {"type": "NFC"}):
        raise _bad(path, f"model {model.get('type')} {odd or ''} with normalizer {normalizer}", ONLY)
    match data.get("pre_tokenizer"):
        case {"type": "ByteLevel", "add_prefix_space": False, **rest} if rest.get("use_regex", True):
            split = GPT2_SPLIT
        case {"type": "Sequence", "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, **rest}]} if rest.get("use_regex", True):
            split = SMOLLM2_SPLIT
        case {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]
              } if split in (LLAMA3_SPLIT, QWEN2_SPLIT):
            pass
        case other:
            raise _bad(path, f"pre_tokenizer {other}", ONLY)
    for token in data.get("added_tokens") or []:
        flags = {key for key in ("lstrip", "rstrip", "single_word", "normalized") if token[key]}
        if not token["special"] and flags - (set() if normalizer else {"normalized"}):
            raise _bad(path, f"added token {token['content']!r} with {', '.join(flags)}", ONLY)
        (special if token["special"] else added)[token["content"]] = token["id"]
    ranks = _ranks(path, model, special.keys() | added)
    if (lost := _lost(ranks)) and (model.get("unk_token") is not None or len(lost) == 256):
        raise _bad(path, f"lacks {len(lost)} of the 256 single bytes, unk_token {model.get('unk_token')!r}", ONLY)
    return _bpe(path, ranks, split, special, _bos_id(data.get("post_processor")), normalizer is not None, added)


def _ranks(path, model, added):
    """Return {bytes: id}. Ids can serve as ranks when they rise with the merges, which training sees to."""
    vocab = model["vocab"]
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    if any(len(pair) != 2 for pair in pairs):
        raise _bad(path, "has a merge that is not a pair")
    merged = [vocab[left + right] for left, right in pairs]
    if merged != sorted(merged):
        raise _bad(path, "ids do not rise in merge order, so they cannot serve as ranks", ONLY)
    names = vocab.keys() & BYTE_OF | {left + right for left, right in pairs}
    if alone := {*vocab, *(part for pair in pairs for part in pair)} - names - added:
        raise _bad(path, f"{len(alone)} vocabulary entries come from no merge, such as {min(alone)!r}", ONLY)
    return {bytes(BYTE_OF[char] for char in name): vocab[name] for name in names}


def _bos_id(post):
    match post:
        case {"type": "Sequence", "processors": inner}:
            return next((bos for bos in map(_bos_id, inner) if bos is not None), None)
        case {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": name}}, *_]}:
            return post["special_tokens"][name]["ids"][0]


def _lost(ranks):
    return bytes(b for b in range(256) if bytes([b]) not in ranks)


def _bpe(path, ranks, split, special, bos_id, nfc=False, added=()):
    if len({*ranks.values()}) < len(ranks):
        raise _bad(path, "vocabulary gives an id twice")
    names = special | dict(added)
    if not all(isinstance(n, str) and n and type(i) is int and i >= 0 for n, i in names.items()) \
            or bos_id not in (None, *special.values()):
        raise _bad(path, "has an added token without a name or id, or a BOS that is none of them")
    bpe = tiktoken.Encoding("bpe", pat_str=split, mergeable_ranks=ranks, special_tokens={})
    words, lost = _words(split), _lost(ranks)

    def merge(text):
        if not lost or text.encode().translate(None, lost) == text.encode():
            return bpe.encode_ordinary(text)
        # Dropped after the split, which they take part in, and before merges, which close the gap. tiktoken panics
        # at a byte it lacks, and what is left need not be UTF-8, so each word goes in by itself and as bytes.
        left = (word.encode().translate(None, lost) for word in words(text))
        return [i for word in left if word for i in bpe._encode_single_piece(word)]

    def plain(text):
        ids = []
        for part in _split(text, added):  # as Hugging Face: added tokens first, then NFC
            part_nfc = unicodedata.normalize("NFC", part) if nfc else part
            ids += [added[part]] if part in added else (i for p in _pieces(part_nfc) for i in merge(p))
        return ids

    pieces = {i: piece for piece, i in ranks.items()} | {added[token]: token.encode() for token in added}
    return Tokenizer(plain, pieces, special, bos_id)


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
