"""The tokenizer in a GGUF file, as the files that a folder would have.

`gpt2` is byte-level BPE, made into a tokenizer.json; `llama` is sentencepiece, made into its
protobuf. What is checked of those files is checked of these: see `vocabulary.py`.
"""

import struct
from pathlib import Path

from loading.vocabulary import LLAMA3_SPLIT, QWEN2_SPLIT, TEKKEN_SPLIT

UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 2, 3, 4, 5  # types of tokens
DIGITS = {"type": "Digits", "individual_digits": True}


def split_at_matches(pattern: str) -> dict:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


NFC = {"type": "NFC"}
PRE = {  # tokenizer.ggml.pre: normalizer, how text is split, whether a text starts with BOS
    "llama-bpe": (None, split_at_matches(LLAMA3_SPLIT), True),
    "qwen2": (NFC, split_at_matches(QWEN2_SPLIT), False),
    "smollm": (None, DIGITS, False),
    "tekken": (None, split_at_matches(TEKKEN_SPLIT), True),
}
STOPS = {  # names of tokens that end an answer, besides the one that the file calls so
    *("<|im_end|>", "<|endoftext|>"),
    *("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),
}


def make_files(path: Path, facts: dict) -> dict[str, dict | bytes]:
    """Return the tokenizer's files; raise ValueError for a kind that is not known."""
    given = {}
    for key, value in facts.items():
        given[key.removeprefix("tokenizer.ggml.")] = value
    tokens = given.get("tokens")
    kinds = given.get("token_type")
    if not is_texts(tokens) or kinds is None or len(kinds) != len(tokens):
        raise ValueError(f"{path}: no tokenizer, or one whose tokens have no types; take another")
    kinds = list(map(int, kinds))
    model = given.get("model")
    if model == "gpt2":
        files = byte_level(path, given, tokens, kinds)
        settings = {"add_bos_token": given.get("add_bos_token", PRE[given["pre"]][2])}
    elif model == "llama":
        files = {"tokenizer.model": sentencepiece_model(path, given, tokens, kinds)}
        settings = {
            "add_bos_token": given.get("add_bos_token", True),
            "add_prefix_space": given.get("add_space_prefix", True),
            "legacy": True,
            "added_tokens_decoder": listed(tokens, kinds, USER_DEFINED),
        }
    else:
        raise ValueError(
            f"{path}: tokenizer {model!r:.40} is not supported in GGUF, only gpt2 and llama; "
            "take the model in Hugging Face layout"
        )
    if given.get("add_eos_token"):
        settings["add_eos_token"] = True
    for key in ("bos_token", "eos_token"):
        settings[key] = name_of(path, given, f"{key}_id", tokens)
    settings["chat_template"] = facts.get("tokenizer.chat_template")
    files["tokenizer_config.json"] = settings
    files["generation_config.json"] = {"eos_token_id": stops(path, given, tokens, kinds)}
    return files


def is_texts(values) -> bool:
    return isinstance(values, list) and bool(values) and isinstance(values[0], str)


def name_of(path: Path, given: dict, key: str, tokens: list[str]) -> str | None:
    id = given.get(key)
    if id is not None and (type(id) is not int or not 0 <= id < len(tokens)):
        raise ValueError(
            f"{path}: tokenizer.ggml.{key} is {id!r:.40}; the file has {len(tokens):,} tokens"
        )
    return None if id is None else tokens[id]


def stops(path: Path, given: dict, tokens: list[str], kinds: list[int]) -> list[int]:
    """Return the ids that end an answer."""
    found = {id for id, name in enumerate(tokens) if name in STOPS and kinds[id] == CONTROL}
    for key in ("eos_token_id", "eot_token_id", "eom_token_id"):
        if name_of(path, given, key, tokens) is not None:
            found.add(given[key])
    return sorted(found)


def listed(tokens: list[str], kinds: list[int], *wanted: int) -> dict[str, dict]:
    """Return {id: an added token}, as tokenizer_config.json lists them."""
    found = {}
    for id, kind in enumerate(kinds):
        if kind in wanted:
            found[str(id)] = {"content": tokens[id], "special": kind == CONTROL}
    return found


# ---- byte-level BPE -------------------------------------------------------------------------


def byte_level(path: Path, given: dict, tokens: list[str], kinds: list[int]) -> dict:
    """Return {"tokenizer.json": its contents}."""
    if given.get("pre") not in PRE:
        raise ValueError(
            f"{path}: the pre-tokenizer tokenizer.ggml.pre is {given.get('pre')!r:.40}; supported "
            f"are {', '.join(PRE)}; take the model in Hugging Face layout"
        )
    normalizer, split, _ = PRE[given["pre"]]
    vocab = {token: id for id, token in enumerate(tokens) if kinds[id] != UNUSED}
    merges = given.get("merges")
    if len(vocab) != sum(kind != UNUSED for kind in kinds) or not is_texts(merges):
        raise ValueError(f"{path}: a token stands twice, or there are no merges; take another file")
    added = []
    for id, token in listed(tokens, kinds, CONTROL, USER_DEFINED).items():
        added.append({"id": int(id), **token})
    step = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "use_regex": split is DIGITS,
    }
    return {
        "tokenizer.json": {
            "version": "1.0",
            "added_tokens": added,
            "normalizer": normalizer,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, step]},
            "decoder": step,
            "model": {"type": "BPE", "vocab": vocab, "merges": merges},
        }
    }


# ---- sentencepiece --------------------------------------------------------------------------


def sentencepiece_model(path: Path, given: dict, tokens: list[str], kinds: list[int]) -> bytes:
    """Return the protobuf of a BPE model with bytes for what it does not know, such as Llama 2's.

    Numbers of fields: sentencepiece_model.proto of the library.
    """
    scores = given.get("scores")
    if scores is None or len(scores) != len(tokens) or UNKNOWN not in kinds:
        raise ValueError(f"{path}: tokens without scores, or without an unknown one; take another")
    if "precompiled_charsmap" in given:
        raise ValueError(f"{path}: a tokenizer that replaces characters is not supported in GGUF")
    parts = []
    for token, score, kind in zip(tokens, scores, kinds):
        piece = text_field(1, token.encode())
        piece += b"\x15" + struct.pack("<f", score)  # field 2, a float
        piece += number_field(3, kind)
        parts.append(text_field(1, piece))
    trainer = number_field(3, 2)  # BPE
    trainer += number_field(35, 1)  # bytes for what it does not know
    trainer += number_field(40, kinds.index(UNKNOWN))
    for field, key in ((41, "bos_token_id"), (42, "eos_token_id")):
        id = given.get(key)
        name_of(path, given, key, tokens)
        trainer += number_field(field, -1 if id is None else id)
    trainer += number_field(43, -1)  # no padding
    trainer += text_field(45, tokens[kinds.index(UNKNOWN)].encode())
    normalizer = text_field(1, b"identity")
    normalizer += number_field(3, given.get("add_space_prefix", True))
    normalizer += number_field(4, given.get("remove_extra_whitespaces", False))
    normalizer += number_field(5, 1)  # spaces become U+2581
    return b"".join(parts) + text_field(2, trainer) + text_field(3, normalizer)


def varint(number: int) -> bytes:
    """Write a whole number in protobuf's way, seven bits a byte."""
    number &= 2**64 - 1
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    found.append(number)
    return bytes(found)


def number_field(field: int, number: int) -> bytes:
    return varint(field << 3) + varint(int(number))


def text_field(field: int, data: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(data)) + data
