"""The files a tokenizer comes in, told apart by content and read strictly.

Meta's tiktoken ranks (Llama 3), Mistral's tekken.json and Hugging Face's byte-level BPE tokenizer.json all become
tiktoken ranks; sentencepiece (Llama 2, Mistral 7B) stays what it is. A file that asks for anything else is refused:
a tokenizer that is almost right gives wrong ids silently.
"""

import base64
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import sentencepiece

FILES = "tokenizer.model", "tokenizer.json", "tekken.json", "original/tokenizer.model"
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# SmolLM2 cuts out every digit first, so that nothing, neither " ?" nor the look ahead after white space, sees one.
SMOLLM2_SPLIT = GPT2_SPLIT.replace(r" ?\p{N}+", r"\p{N}").replace(r"(?!\S)", r"(?![^\s\p{N}])")
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace("{1,3}", "")  # digits one by one
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN_SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K_SPLIT = TEKKEN_SPLIT.replace(f"{LOWER}+|", f"{LOWER}+{ENDING}|").replace(
    rf"{LOWER}*|\p{{N}}|", rf"{LOWER}*{ENDING}|\p{{N}}{{1,3}}|"
)  # Phi-4-mini
SPLITS = LLAMA3_SPLIT, QWEN2_SPLIT, TEKKEN_SPLIT, O200K_SPLIT
LLAMA3_RANKS = 128_000  # the special tokens come right after, so a shorter file would shift them
LLAMA3_SPECIAL = {
    0: "begin_of_text",
    1: "end_of_text",
    6: "start_header_id",
    7: "end_header_id",
    8: "eom_id",
    9: "eot_id",
    10: "python_tag",
}
PRINTABLE = [
    *range(33, 127),
    *range(161, 173),
    *range(174, 256),
]  # GPT-2 writes these bytes as themselves
BYTE_OF = dict(
    zip(
        map(chr, [*PRINTABLE, *range(256, 324)]),
        [*PRINTABLE, *sorted({*range(256)} - {*PRINTABLE})],
    )
)
TO_BYTES = dict.fromkeys(range(256), 0x10FFFF) | {
    ord(c): b for c, b in BYTE_OF.items()
}  # others cannot be encoded


@dataclass
class Vocabulary:
    special: dict[str, int]  # tokens that no text gives
    bos_id: int | None
    ranks: dict[bytes, int] = field(
        default_factory=dict
    )  # of a byte-level BPE: its ids, which rise with the merges
    split: str = ""  # the regular expression that cuts text into words
    nfc: bool = False
    added: dict[str, int] = field(
        default_factory=dict
    )  # tokens that are not special: text gives them too
    proto: bytes = b""  # a sentencepiece model instead
    legacy: bool = (
        False  # sentencepiece puts a space after special tokens too, as Llama 2's tokenizer did
    )
    lstrip: set[str] = field(
        default_factory=set
    )  # special tokens that swallow the white space before them
    rstrip: set[str] = field(
        default_factory=set
    )  # and those that swallow the white space after them


def read_vocabulary(folder: Path, settings: dict) -> Vocabulary:
    """Read the tokenizer file of a folder; settings: its tokenizer_config.json.

    Raises FileNotFoundError, or ValueError for an unusable file.
    """
    path = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"{folder}: no tokenizer; looked for {', '.join(FILES)}; copy one of them there"
        )
    v = _parse(folder, path, path.read_bytes(), settings)
    names = v.special | v.added
    if not all(
        isinstance(n, str) and n and type(i) is int and i >= 0 for n, i in names.items()
    ) or v.bos_id not in (
        None,
        *v.special.values(),
    ):
        raise _bad(path, "has an added token without a name or id, or a BOS that is none of them")
    if bad := [i for i in v.ranks.values() if type(i) is not int or not 0 <= i < 2**32]:
        raise _bad(path, f"has the id {bad[0]!r:.60}, which is not a whole number from 0 up")
    if len({*v.ranks.values()}) < len(v.ranks) or len({*names.values()}) < len(names):
        raise _bad(path, "vocabulary gives an id twice")
    return v


def read_settings(folder: Path) -> dict:
    """Return the tokenizer_config.json of a folder, {} if there is none; raise ValueError for an unusable one."""
    path = folder / "tokenizer_config.json"
    settings = _json(path, path.read_bytes()) if path.is_file() else {}
    if not isinstance(settings.get("add_bos_token"), bool | None):
        raise _bad(
            path,
            f"key 'add_bos_token' is {settings['add_bos_token']!r:.60}",
            "make it true or false",
        )
    return settings


def added_tokens(folder: Path, settings: dict) -> dict[int, dict]:
    """Return what a folder adds to its tokenizer's own vocabulary, {id: {"content": str, ...}}.

    settings: its tokenizer_config.json, which lists them; without that list, added_tokens.json and tokenizer.json do.
    Raises ValueError for a token without a name or an id.
    """
    if listed := settings.get("added_tokens_decoder"):
        sources = {"tokenizer_config.json": {"added_tokens_decoder": listed}}
    else:
        paths = [folder / name for name in ("added_tokens.json", "tokenizer.json")]
        sources = {path.name: _json(path, path.read_bytes()) for path in paths if path.is_file()}
    found = {}
    for name, data in sources.items():
        try:
            if name == "added_tokens.json":
                tokens = [(i, {"content": content}) for content, i in data.items()]
            elif name == "tokenizer.json":
                tokens = [(token["id"], token) for token in data.get("added_tokens") or []]
            else:
                tokens = data["added_tokens_decoder"].items()
            for i, token in tokens:
                if (
                    not token["content"]
                    or not isinstance(token["content"], str)
                    or not str(i).isdecimal()
                ):
                    raise TypeError(f"{token['content']!r} with the id {i!r}")
                found[int(i)] = token
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise _bad(
                folder / name, f"does not list added tokens as Hugging Face does ({error!r:.100})"
            ) from None
    return found


def lost_bytes(ranks: dict[bytes, int]) -> bytes:
    """Return the bytes that a vocabulary lacks."""
    return bytes(b for b in range(256) if bytes([b]) not in ranks)


ONLY = "only byte-level BPE as in Llama 3, Qwen, Mistral Nemo, Phi-4 and SmolLM is supported"


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


def _parse(folder, path, blob, settings):
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\s", blob):
        return _from_tiktoken(path, blob)
    if blob.lstrip()[:1] == b"{":
        try:
            data = _json(path, blob)
            return _from_tekken(path, data) if "vocab" in data else _from_json(path, data)
        except (LookupError, TypeError, AttributeError, OverflowError, UnicodeError) as error:
            raise _bad(
                path, f"not laid out like a tokenizer.json or tekken.json ({error!r:.100})"
            ) from None
    if blob[:1] == b"\n":  # protobuf: field 1, the first of the pieces
        return _from_sentencepiece(folder, path, blob, settings)
    raise _bad(path, f"starts with {blob[:20]!r}, no known tokenizer format")


def _from_sentencepiece(folder, path, blob, settings):
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=blob)
        names = [model.id_to_piece(i) for i in range(model.vocab_size())]
    except (RuntimeError, UnicodeDecodeError):
        raise _bad(path, "sentencepiece cannot parse it") from None
    special = {
        name: i for i, name in enumerate(names) if model.is_control(i) or model.is_unknown(i)
    }
    bos_id = (
        model.bos_id()
        if settings.get("add_bos_token") is not False and model.bos_id() >= 0
        else None
    )
    tokens = added_tokens(folder, settings)
    special |= {token["content"]: i for i, token in tokens.items() if i >= len(names)}
    lstrip, rstrip = (
        {t["content"] for t in tokens.values() if t.get(key)} for key in ("lstrip", "rstrip")
    )
    legacy = settings.get("legacy") is not False
    return Vocabulary(special, bos_id, proto=blob, legacy=legacy, lstrip=lstrip, rstrip=rstrip)


def _from_tiktoken(path, blob):
    try:
        lines = map(bytes.split, blob.splitlines())
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError:
        raise _bad(path, "has a line that is not 'base64 rank'") from None
    if [*ranks.values()] != [*range(LLAMA3_RANKS)]:
        raise _bad(path, f"has {len(ranks)} ranks, not Llama 3's 0 to {LLAMA3_RANKS - 1} in order")
    if lost := lost_bytes(ranks):
        raise _bad(path, f"lacks {len(lost)} of the 256 single bytes")
    reserved = iter(range(256))
    names = [
        LLAMA3_SPECIAL.get(i) or f"reserved_special_token_{next(reserved)}" for i in range(256)
    ]
    special = {f"<|{name}|>": LLAMA3_RANKS + i for i, name in enumerate(names)}
    return Vocabulary(special, LLAMA3_RANKS, ranks, LLAMA3_SPLIT)


def _from_tekken(path, data):
    """Mistral's own file: ids are ranks after the special tokens, as many as the config says."""
    config, n = data["config"], data["config"]["default_num_special_tokens"]
    if config["pattern"] not in SPLITS:
        raise _bad(path, f"pattern {config['pattern']!r:.60}", ONLY)
    if not data.get("special_tokens"):
        raise _bad(path, "names no special tokens", "use the tokenizer.json beside it")
    special = {f"<SPECIAL_{i}>": i for i in range(n)}
    names = {token["rank"]: token["token_str"] for token in data["special_tokens"]}
    special = {names.get(i, name): i for name, i in special.items()}
    vocab = data["vocab"][: config["default_vocab_size"] - n]
    ranks = {base64.b64decode(token["token_bytes"]): n + token["rank"] for token in vocab}
    if [*ranks.values()] != [*range(n, n + len(vocab))] or lost_bytes(ranks):
        raise _bad(path, "does not list every byte and each rank in order")
    return Vocabulary(special, special.get("<s>"), ranks, config["pattern"])


def _from_json(path, data):
    """Translate a byte-level BPE; what could change ids in a way not known here is refused."""
    model, normalizer, special, added = data["model"], data.get("normalizer"), {}, {}
    odd = {
        key: model[key]
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
        if model.get(key)
    }
    if model.get("byte_fallback") or "Metaspace" in str(data.get("pre_tokenizer")):
        raise _bad(
            path,
            "byte_fallback or Metaspace, so made from sentencepiece",
            "put its tokenizer.model there",
        )
    if model.get("type", "BPE") != "BPE" or odd or normalizer not in (None, {"type": "NFC"}):
        raise _bad(
            path,
            f"model {model.get('type')!s:.60} {odd or ''!s:.60} with normalizer {normalizer!s:.200}",
            ONLY,
        )
    match data.get("pre_tokenizer"):
        case {"type": "ByteLevel", "add_prefix_space": False, **rest} if rest.get(
            "use_regex", True
        ):
            split = GPT2_SPLIT
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, **rest},
            ],
        } if rest.get("use_regex", True):
            split = SMOLLM2_SPLIT
        case {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": split},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        } if split in SPLITS:
            pass
        case other:
            raise _bad(path, f"pre_tokenizer {other!s:.300}", ONLY)
    for token in data.get("added_tokens") or []:
        flags = {key for key in ("lstrip", "rstrip", "single_word", "normalized") if token[key]}
        if not token["special"] and flags - (set() if normalizer else {"normalized"}):
            raise _bad(path, f"added token {token['content']!r:.60} with {', '.join(flags)}", ONLY)
        (special if token["special"] else added)[token["content"]] = token["id"]
    lstrip, rstrip = (
        {t["content"] for t in data.get("added_tokens") or [] if t[key]}
        for key in ("lstrip", "rstrip")
    )
    ranks = _ranks(path, model, special.keys() | added)
    lost = lost_bytes(ranks)
    if lost and (
        model.get("unk_token") is not None
        or len(lost) == 256
        or split in (TEKKEN_SPLIT, O200K_SPLIT)
    ):
        raise _bad(
            path,
            f"lacks {len(lost)} of the 256 single bytes, unk_token {model.get('unk_token')!r:.60}",
            ONLY,
        )
    bos_id = _bos_id(data.get("post_processor"))
    return Vocabulary(
        special, bos_id, ranks, split, normalizer is not None, added, lstrip=lstrip, rstrip=rstrip
    )


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
        raise _bad(
            path,
            f"{len(alone)} vocabulary entries come from no merge, such as {min(alone)!r:.60}",
            ONLY,
        )
    return {name.translate(TO_BYTES).encode("latin-1"): vocab[name] for name in names}


def _bos_id(post):
    match post:
        case {"type": "Sequence", "processors": inner}:
            return next((bos for bos in map(_bos_id, inner) if bos is not None), None)
        case {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": name}}, *_]}:
            return post["special_tokens"][name]["ids"][0]
