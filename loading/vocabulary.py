"""The files a tokenizer comes in, told apart by content and read strictly.

Meta's tiktoken ranks (Llama 3), Mistral's tekken.json and Hugging Face's byte-level BPE
tokenizer.json all become tiktoken ranks; sentencepiece (Llama 2, Mistral 7B) stays what it is. A
file that asks for anything else is refused: a tokenizer that is almost right gives wrong ids.

    tokenizer.json
        done      added_tokens; normalizer: none or NFC; pre_tokenizer: ByteLevel, Digits and
                  ByteLevel, or one of SPLITS and ByteLevel; post_processor: none, ByteLevel or one
                  BOS in front; model: vocab, and merges in the order of the ids
        harmless  version 1.0; truncation and padding, for batches; trim_offsets; decoder: none or
                  ByteLevel; a post_processor's pair; ignore_merges, as every word comes from
                  merges; fuse_unk, and unk_token of a vocabulary that has all bytes
        refused   the rest, and keys that are not known
    tekken.json
        done      config: pattern, default_vocab_size, default_num_special_tokens; vocab: rank,
                  token_bytes; special_tokens: rank, token_str
        harmless  config: version, num_vocab_tokens; vocab: token_str; special_tokens: is_control;
                  keys of pictures and sound
        refused   keys that are not known
    sentencepiece: the library does what the file asks for; white space as a suffix is refused
    tiktoken ranks have no keys; for the files beside them see tokens.py
"""

import base64
import re
from dataclasses import dataclass, field
from pathlib import Path

import sentencepiece

from loading.files import inside, is_there, read_json
from loading.tokens import (
    CONFIG,
    ROLES,
    Added,
    added_tokens,
    bad,
    content,
    is_mark,
    model_ids,
    read_if_there,
    read_settings,
    role_names,
    special_names,
)

FILES = "tokenizer.model", "tokenizer.json", "tekken.json", "original/tokenizer.model"
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# SmolLM2 cuts out every digit first: neither " ?" nor the look ahead after white space sees one.
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
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2 keeps these bytes
OTHERS = sorted({*range(256)} - {*PRINTABLE})
BYTE_OF = {chr(byte): byte for byte in PRINTABLE}
BYTE_OF |= {chr(256 + i): byte for i, byte in enumerate(OTHERS)}
TO_BYTES = dict.fromkeys(range(256), 0x10FFFF)  # a character that latin-1 lacks, so refused
TO_BYTES |= {ord(char): byte for char, byte in BYTE_OF.items()}
ONLY = "only byte-level BPE as in Llama 3, Qwen, Mistral Nemo, Phi-4 and SmolLM is supported"

# Keys of the formats that are known, with the values that are understood.
ANY = object()
JSON_KEYS = dict.fromkeys(
    (
        "truncation",
        "padding",
        "added_tokens",
        "pre_tokenizer",
        "post_processor",
        "decoder",
        "model",
    ),
    ANY,
)
JSON_KEYS |= {"version": ("1.0",), "normalizer": (None, {"type": "NFC"})}
MODEL_KEYS = dict.fromkeys(("unk_token", "fuse_unk", "ignore_merges", "vocab", "merges"), ANY)
MODEL_KEYS |= {
    "type": ("BPE",),
    "dropout": (None, 0),
    "byte_fallback": (None, False),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
}
TEKKEN_KEYS = dict.fromkeys(
    ("config", "vocab", "special_tokens", "type", "version", "multimodal", "image", "audio"), ANY
)
TEKKEN_CONFIG_KEYS = dict.fromkeys(
    ("pattern", "version", "num_vocab_tokens", "default_vocab_size", "default_num_special_tokens"),
    ANY,
)


@dataclass
class Vocabulary:
    special: dict[str, int]  # tokens that no text gives
    bos_id: int | None  # in front of plain text
    ranks: dict[bytes, int] = field(default_factory=dict)  # byte-level BPE: ids, rising with merges
    split: str = ""  # the regular expression that cuts text into words
    nfc: bool = False
    proto: bytes = b""  # a sentencepiece model instead
    pieces: dict[str, int] = field(default_factory=dict)  # its pieces
    prefix: bool = False  # sentencepiece puts a space before a text
    legacy: bool = False  # and after special and added tokens too, as Llama 2's tokenizer did
    added: dict[str, int] = field(default_factory=dict)  # not special: text gives them too
    lstrip: set[str] = field(default_factory=set)  # tokens that swallow white space before them
    rstrip: set[str] = field(default_factory=set)  # tokens that swallow white space after them
    marks: dict[str, int] = field(default_factory=dict)  # entries that no merge makes
    roles: dict[str, int] = field(default_factory=dict)  # bos_token, eos_token by the file itself
    files: dict[int, Path] = field(default_factory=dict)  # which file adds an id

    def id_of(self, name: str) -> int | None:
        """Return the id of a token, wherever in the vocabulary it stands."""
        for ids in (self.special, self.added, self.pieces, self.marks):
            if name in ids:
                return ids[name]
        return self.ranks.get(name.encode())

    def name_of(self, id: int | None) -> str | None:
        """Return the name of a special token."""
        return next((name for name, other in self.special.items() if other == id), None)


def read_vocabulary(folder: Path, settings: dict) -> Vocabulary:
    """Read the tokenizer file of a folder, and the tokens that other files add to it.

    settings: see `read_settings`. Raises FileNotFoundError, or ValueError for an unusable file.
    """
    path = next((folder / name for name in FILES if is_there(folder / name)), None)
    if path is None:
        raise FileNotFoundError(
            f"{folder}: no tokenizer; looked for {', '.join(FILES)}; copy one of them there"
        )
    v, listed = _parse(path, settings)
    _check_ranks(path, v)
    _add(v, added_tokens(folder, settings, path, listed), special_names(settings))
    _set_bos(path, v, settings)
    if v.ranks:
        _check_bpe(path, v, settings)
    return v


def _parse(path: Path, settings: dict) -> tuple[Vocabulary, dict | None]:
    """Return the vocabulary of a file, and what is in the file if it is a tokenizer.json."""
    blob = inside(path.parent).get(path.name)
    if isinstance(blob, dict):
        blob = b"{"  # `read_json` finds it again
    elif blob is None:
        blob = path.read_bytes()
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\s", blob):
        return _from_tiktoken(path, blob), None
    if blob.lstrip()[:1] == b"{":
        data = read_json(path)
        try:
            if "vocab" in data:
                return _from_tekken(path, data), None
            return _from_json(path, data), data
        except (LookupError, TypeError, AttributeError, OverflowError, UnicodeError) as error:
            raise bad(
                path, f"not laid out like a tokenizer.json or tekken.json ({error!r:.100})"
            ) from None
    if blob[:1] == b"\n":  # protobuf: field 1, the first of the pieces
        return _from_sentencepiece(path, blob, settings), None
    raise bad(path, f"starts with {blob[:20]!r}, no known tokenizer format")


def _check_ranks(path, v: Vocabulary):
    for rank in v.ranks.values():
        if type(rank) is not int or not 0 <= rank < 2**32:
            raise bad(path, f"has the id {rank!r:.60}, which is not a whole number from 0 up")
    if len({*v.ranks.values()}) < len(v.ranks):
        raise bad(path, "vocabulary gives an id twice")


def _check_bpe(path, v: Vocabulary, settings: dict):
    """Raise ValueError for what a byte-level BPE cannot do."""
    if v.marks:
        name = min(v.marks)
        raise bad(path, f"{len(v.marks)} entries come from no merge, such as {name!r:.60}", ONLY)
    if settings.get("add_prefix_space"):
        raise bad(path.parent / CONFIG, "add_prefix_space with a byte-level BPE", ONLY)
    if settings.get("fix_mistral_regex") and v.split != TEKKEN_SPLIT:
        raise bad(path, "fix_mistral_regex asks for another split than this", "take a mended file")


# ---- tokens that files add ----------------------------------------------------------------


def _add(v: Vocabulary, tokens: dict[int, Added], names: set[str]):
    """Give ids the names that files add; names: those of tokens that are special anyway."""
    own = v.special
    v.special = {name: id for name, id in own.items() if id not in tokens}
    v.marks = {name: id for name, id in v.marks.items() if id not in tokens}
    for name in names & v.marks.keys():
        v.special[name] = v.marks.pop(name)
    words = {id: word for word, id in v.ranks.items()}
    for token in tokens.values():
        word = words.get(token.id, token.content.encode())
        special = token.special or own.get(token.content) == token.id
        if word != token.content.encode() or (special and token.id in words):
            raise bad(
                token.file, f"added token {token.content!r:.60} has the id of the word {word!r:.60}"
            )
        other = v.id_of(token.content)
        renamed = other in tokens and tokens[other].content != token.content
        if other not in (None, token.id) and not renamed:
            raise bad(token.file, f"{token.content!r:.60} has the ids {other} and {token.id}")
        _check_flags(v, token)
        (v.special if special else v.added)[token.content] = token.id
        v.files[token.id] = token.file
        if "lstrip" in token.flags:
            v.lstrip.add(token.content)
        if "rstrip" in token.flags:
            v.rstrip.add(token.content)


def _check_flags(v: Vocabulary, token: Added):
    flags = token.flags & {"single_word", "normalized" if v.nfc else ""}
    if flags:
        raise bad(token.file, f"added token {token.content!r:.60} with {', '.join(flags)}", ONLY)


def _set_bos(path, v: Vocabulary, settings: dict):
    """Set what stands in front of plain text: as named, else as the tokenizer's own file has it."""
    wanted = settings.get("add_bos_token")
    name = role_names(settings).get("bos_token")
    named = v.id_of(name) if name else None
    if wanted is False:
        v.bos_id = None
    elif named is not None and (wanted or v.proto):
        v.bos_id = named
    if v.bos_id not in (None, *v.special.values()):
        raise bad(
            path, f"puts the BOS {v.bos_id} before a text, which is none of its special tokens"
        )


def template_roles(folder: Path, settings: dict, v: Vocabulary) -> dict[str, str]:
    """Return the names of tokens that a template may ask for, such as bos_token.

    Where no tokenizer file names BOS or EOS: the one id of config.json and generation_config.json,
    or what the tokenizer itself calls so.
    """
    roles = role_names(settings)
    for key in ("bos_token", "eos_token"):
        if key in settings:  # also as null
            continue
        ids = set()
        for given in model_ids(folder, f"{key}_id").values():
            ids |= {id for id in given if type(id) is int}
        id = ids.pop() if len(ids) == 1 else v.roles.get(key)
        if name := v.name_of(id):
            roles[key] = name
    return roles


def stop_tokens(folder: Path, rows: int) -> set[int]:
    """Return every id that ends an answer, of all files that name one; rows: ids of the model.

    An id in generation_config.json or config.json, and the eos_token of tokenizer_config.json and
    special_tokens_map.json, which templates put behind a turn. Without any: the tokenizer's own.
    """
    found = set()
    for path, ids in model_ids(folder, "eos_token_id").items():
        if not all(type(id) is int and 0 <= id < rows for id in ids):
            raise ValueError(
                f"{path}: key 'eos_token_id' is {ids!r:.60}; it must be a token id below {rows} or "
                "a list of them"
            )
        found |= set(ids)
    settings = read_if_there(folder / CONFIG)
    names = {content(read_if_there(folder / name).get("eos_token")) for name in (CONFIG, ROLES)}
    names.discard(None)
    ids = {token.content: id for id, token in added_tokens(folder, settings).items()}
    if names <= ids.keys() and (found or names):
        return found | {ids[name] for name in names if ids[name] < rows}
    try:
        v = read_vocabulary(folder, read_settings(folder))
    except (ValueError, FileNotFoundError):  # an error where a text is to become ids
        v = Vocabulary({}, None)
    found |= {ids.get(name, v.id_of(name)) for name in names}
    if found <= {None}:
        found = {v.roles.get("eos_token")}
    return {id for id in found if id is not None and id < rows}


# ---- formats ------------------------------------------------------------------------------


def lost_bytes(ranks: dict[bytes, int]) -> bytes:
    """Return the bytes that a vocabulary lacks."""
    return bytes(b for b in range(256) if bytes([b]) not in ranks)


def _check_keys(path, where: str, data: dict, known: dict):
    """Raise ValueError for a key that is not known, or a value that is not understood."""
    for key, value in data.items():
        if key not in known:
            raise bad(path, f"{where} has the key {key!r:.60}, which is not known", ONLY)
        if known[key] is not ANY and value not in known[key]:
            raise bad(path, f"{where} {key!r} is {value!r:.200}", ONLY)


def _from_sentencepiece(path, blob, settings) -> Vocabulary:
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=blob)
        pieces = {model.id_to_piece(i): i for i in range(model.vocab_size())}
        spelled = "".join(model.encode("a", out_type=str))
    except (RuntimeError, UnicodeDecodeError):
        raise bad(path, "sentencepiece cannot parse it") from None
    if spelled.endswith("\u2581"):
        raise bad(path, "treats white space as a suffix", "only Llama's sentencepiece is supported")
    special = {}
    marks = {}
    for name, i in pieces.items():
        if model.is_control(i) or model.is_unknown(i):
            special[name] = i
        elif is_mark(name) and not model.is_byte(i):
            marks[name] = i
    roles = {"bos_token": model.bos_id(), "eos_token": model.eos_id()}
    roles = {key: i for key, i in roles.items() if i >= 0}
    prefix = settings.get("add_prefix_space")
    return Vocabulary(
        special,
        roles.get("bos_token"),
        proto=blob,
        pieces=pieces,
        prefix=spelled.startswith("\u2581") if prefix is None else prefix,
        legacy=settings.get("legacy") is not False,
        marks=marks,
        roles=roles,
    )


def _from_tiktoken(path, blob) -> Vocabulary:
    try:
        lines = map(bytes.split, blob.splitlines())
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError:
        raise bad(path, "has a line that is not 'base64 rank'") from None
    if [*ranks.values()] != [*range(LLAMA3_RANKS)]:
        raise bad(path, f"has {len(ranks)} ranks, not Llama 3's 0 to {LLAMA3_RANKS - 1} in order")
    if lost := lost_bytes(ranks):
        raise bad(path, f"lacks {len(lost)} of the 256 single bytes")
    special = {}
    reserved = 0
    for i in range(256):
        name = LLAMA3_SPECIAL.get(i)
        if name is None:
            name = f"reserved_special_token_{reserved}"
            reserved += 1
        special[f"<|{name}|>"] = LLAMA3_RANKS + i
    roles = {"bos_token": LLAMA3_RANKS, "eos_token": LLAMA3_RANKS + 1}
    return Vocabulary(special, LLAMA3_RANKS, ranks, LLAMA3_SPLIT, roles=roles)


def _from_tekken(path, data) -> Vocabulary:
    """Mistral's own file: ids are ranks after the special tokens, as many as the config says."""
    config = data["config"]
    _check_keys(path, "tekken.json", data, TEKKEN_KEYS)
    _check_keys(path, "config", config, TEKKEN_CONFIG_KEYS)
    n_special = config["default_num_special_tokens"]
    if config["pattern"] not in SPLITS:
        raise bad(path, f"pattern {config['pattern']!r:.60}", ONLY)
    if not data.get("special_tokens"):
        raise bad(path, "names no special tokens", "use the tokenizer.json beside it")
    names = {token["rank"]: token["token_str"] for token in data["special_tokens"]}
    special = {names.get(i, f"<SPECIAL_{i}>"): i for i in range(n_special)}
    vocab = data["vocab"][: config["default_vocab_size"] - n_special]
    ranks = {}
    for token in vocab:
        ranks[base64.b64decode(token["token_bytes"])] = n_special + token["rank"]
    if [*ranks.values()] != [*range(n_special, n_special + len(vocab))] or lost_bytes(ranks):
        raise bad(path, "does not list every byte and each rank in order")
    found = {"bos_token": special.get("<s>"), "eos_token": special.get("</s>")}
    roles = {key: i for key, i in found.items() if i is not None}
    return Vocabulary(special, special.get("<s>"), ranks, config["pattern"], roles=roles)


def _from_json(path, data) -> Vocabulary:
    """Translate a byte-level BPE; what could change ids in a way not known here is refused."""
    model = data["model"]
    if model.get("byte_fallback") or "Metaspace" in str(data.get("pre_tokenizer")):
        raise bad(
            path,
            "byte_fallback or Metaspace, so made from sentencepiece",
            "put its tokenizer.model there",
        )
    _check_keys(path, "tokenizer.json", data, JSON_KEYS)
    _check_keys(path, "model", model, MODEL_KEYS)
    if data.get("decoder") and data["decoder"]["type"] != "ByteLevel":
        raise bad(path, f"decoder {data['decoder']!r:.200}", ONLY)
    split = _split_of(data.get("pre_tokenizer"))
    if split is None:
        raise bad(path, f"pre_tokenizer {data.get('pre_tokenizer')!r:.300}", ONLY)
    ranks, marks = _ranks(path, model)
    _check_bytes(path, ranks, split, model.get("unk_token"))
    bos = _bos_of(path, data.get("post_processor"))
    if len(bos) > 1:
        raise bad(path, f"post_processor puts the ids {bos} before a text", ONLY)
    return Vocabulary(
        special={},
        bos_id=bos[0] if bos else None,
        ranks=ranks,
        split=split,
        nfc=data.get("normalizer") is not None,
        marks=marks,
        roles={"bos_token": bos[0]} if bos else {},
    )


def _split_of(pre_tokenizer) -> str | None:
    """Return the split that a pre_tokenizer is, None for one that is not known."""
    if pre_tokenizer is None:
        return None
    sequence = pre_tokenizer["type"] == "Sequence"
    steps = []
    for given in pre_tokenizer["pretokenizers"] if sequence else [pre_tokenizer]:
        step = {key: value for key, value in given.items() if key != "trim_offsets"}
        if step["type"] == "ByteLevel":
            step.setdefault("use_regex", True)
        steps.append(step)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    if steps == [byte_level]:
        return GPT2_SPLIT
    if steps == [{"type": "Digits", "individual_digits": True}, byte_level]:
        return SMOLLM2_SPLIT
    byte_level["use_regex"] = False
    for split in SPLITS:
        cut = {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated"}
        if steps == [cut | {"invert": False}, byte_level]:
            return split
    return None


def _check_bytes(path, ranks, split, unk_token):
    lost = lost_bytes(ranks)
    done = len(lost) < 256 and unk_token is None and split not in (TEKKEN_SPLIT, O200K_SPLIT)
    if lost and not done:
        what = f"lacks {len(lost)} of the 256 single bytes, unk_token {unk_token!r:.60}"
        raise bad(path, what, ONLY)


def _ranks(path, model) -> tuple[dict[bytes, int], dict[str, int]]:
    """Return {bytes: id}, and the entries that no merge makes.

    Ids can serve as ranks when they rise with the merges, which training sees to.
    """
    vocab = model["vocab"]
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    if any(len(pair) != 2 for pair in pairs):
        raise bad(path, "has a merge that is not a pair")
    merged = [vocab[left + right] for left, right in pairs]
    if merged != sorted(merged):
        raise bad(path, "ids do not rise in merge order, so they cannot serve as ranks", ONLY)
    names = vocab.keys() & BYTE_OF | {left + right for left, right in pairs}
    for pair in pairs:
        if not names.issuperset(pair):
            raise bad(path, f"has the merge {pair!r:.80}, a part of which comes from no merge")
    ranks = {name.translate(TO_BYTES).encode("latin-1"): vocab[name] for name in names}
    return ranks, {name: id for name, id in vocab.items() if name not in names}


def _bos_of(path, post) -> list[int]:
    """Return the ids that a post_processor puts before a text; raise ValueError if it does more."""
    kind = None if post is None else post["type"]
    if kind in (None, "ByteLevel"):
        return []
    if kind == "Sequence":
        return [id for inner in post["processors"] for id in _bos_of(path, inner)]
    if kind == "TemplateProcessing":
        match post["single"]:
            case [{"Sequence": {"id": "A"}}]:
                return []
            case [{"SpecialToken": {"id": name}}, {"Sequence": {"id": "A"}}]:
                ids = post["special_tokens"][name]["ids"]
                if len(ids) == 1:
                    return ids
    raise bad(path, f"post_processor {post!r:.300}", ONLY)
