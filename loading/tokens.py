"""What the small files beside a tokenizer say of its tokens: added ones, and those with a role.

Each key is done, harmless, or refused by name: one that is ignored may give wrong ids silently.

    tokenizer_config.json
        done      added_tokens_decoder, add_bos_token, legacy, chat_template, bos_token, eos_token
                  and the other names of roles, additional_special_tokens, extra_special_tokens;
                  add_prefix_space of sentencepiece
        refused   those of REFUSED; of a byte-level BPE add_prefix_space, and fix_mistral_regex
                  where the split is not the mended one
        harmless  the rest: padding, truncation, how ids become text, the name of a Python class
    special_tokens_map.json: names of roles, done
    added_tokens.json: names of ids, done; special is what is written like a mark, <...> or [...]
    an added token
        done      content, id, special, lstrip, rstrip
        refused   single_word; normalized where text becomes NFC
        harmless  normalized elsewhere
    config.json, generation_config.json: bos_token_id and eos_token_id, done
"""

from dataclasses import dataclass, replace
from pathlib import Path

from loading.files import is_there, read_json

CONFIG = "tokenizer_config.json"
ROLES = "special_tokens_map.json"
REFUSED = {  # keys of tokenizer_config.json that change ids, with the values that ask for nothing
    "add_eos_token": (False, None),
    "split_special_tokens": (False, None),
    "do_lower_case": (False, None),
    "sp_model_kwargs": ({}, None),
    "auto_map": ({}, None),  # a Python program of the checkpoint's own
}
FLAGS = "add_bos_token", "add_prefix_space", "legacy", "fix_mistral_regex"


@dataclass(frozen=True)
class Added:
    """A token that a file adds to a vocabulary, or a name that it gives to an id there."""

    content: str
    id: int
    special: bool
    file: Path
    flags: frozenset[str] = frozenset()  # of lstrip, rstrip, single_word, normalized


def bad(path: Path, what: str, advice: str = "download the file again") -> ValueError:
    return ValueError(f"{path}: {what}; {advice}")


def read_if_there(path: Path) -> dict:
    return read_json(path) if is_there(path) else {}


def read_settings(folder: Path) -> dict:
    """Return a folder's tokenizer_config.json, with the roles that special_tokens_map.json adds.

    {} if there is neither. Raises ValueError for what is asked for and not done.
    """
    path = folder / CONFIG
    settings = read_if_there(path)
    for key, neutral in REFUSED.items():
        if settings.get(key) not in neutral:
            raise bad(
                path,
                f"key {key!r} is {settings[key]!r:.60}, which is not supported",
                "take it out if the ids stay right without it",
            )
    for key in FLAGS:
        if not isinstance(settings.get(key), bool | None):
            raise bad(path, f"key {key!r} is {settings[key]!r:.60}", "make it true or false")
    roles = read_if_there(folder / ROLES)
    if settings.get("added_tokens_decoder"):  # then transformers does not read the other file
        roles = {key: value for key, value in roles.items() if settings.get(key) is None}
    return {**settings, **roles}


def content(token) -> str | None:
    """Return the name of a token, written as text or as an object; None if it is neither."""
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) and name else None


def is_mark(name: str) -> bool:
    return name[0] + name[-1] in ("<>", "[]")


def role_names(settings: dict) -> dict[str, str]:
    """Return {"bos_token": its name, ...}."""
    names = {key: content(value) for key, value in settings.items() if key.endswith("_token")}
    return {key: name for key, name in names.items() if name}


def special_names(settings: dict) -> set[str]:
    """Return the names of all tokens with a role, or listed as special."""
    names = set(role_names(settings).values())
    for key in ("additional_special_tokens", "extra_special_tokens"):
        listed = settings.get(key) or []
        if isinstance(listed, dict):
            listed = list(listed.values())
        if isinstance(listed, list):
            names |= {content(token) for token in listed}
    return names - {None}


def parse_added(token, id, file: Path) -> Added:
    """Return an added token; raise TypeError or LookupError if it is not one."""
    name = token["content"]
    if not content(name) or not str(id).isdecimal() or isinstance(id, bool):
        raise TypeError(f"an added token without a name or id: {name!r:.60} with the id {id!r:.60}")
    flags = ("lstrip", "rstrip", "single_word", "normalized")
    return Added(
        content=name,
        id=int(id),
        special=bool(token.get("special", is_mark(name))),
        file=file,
        flags=frozenset(flag for flag in flags if token.get(flag)),
    )


def added_tokens(
    folder: Path, settings: dict, main: Path | None = None, tokenizer_json: dict | None = None
) -> dict[int, Added]:
    """Return {id: token} of what a folder adds to its tokenizer's own vocabulary.

    settings: its tokenizer_config.json, which lists them; without that list, added_tokens.json and
    tokenizer.json do. main, tokenizer_json: the file of the vocabulary, and its contents where it
    is a tokenizer.json; it counts in any case. Raises ValueError for a token without a name or id.
    """
    decoder = settings.get("added_tokens_decoder")
    sources = []  # what comes later counts
    if not decoder:
        sources.append((folder / "added_tokens.json", read_if_there(folder / "added_tokens.json")))
    if tokenizer_json is not None:
        sources.append((main, tokenizer_json))
    elif not decoder:
        sources.append((folder / "tokenizer.json", read_if_there(folder / "tokenizer.json")))
    if decoder:
        sources.append((folder / CONFIG, decoder))
    names = special_names(settings)
    found = {}
    for path, listed in sources:
        try:
            tokens = parse_listed(listed, path)
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise bad(
                path, f"does not list added tokens as Hugging Face does ({error!r:.150})"
            ) from None
        if len({token.id for token in tokens}) < len(tokens):
            raise bad(path, "gives an id twice")
        for token in tokens:
            found[token.id] = replace(token, special=token.special or token.content in names)
    return found


def parse_listed(listed: dict, path: Path) -> list[Added]:
    """Return the tokens that a file lists, in one of three ways."""
    if path.name == CONFIG:
        pairs = listed.items()
    elif path.name == "added_tokens.json":
        pairs = [(id, {"content": name}) for name, id in listed.items()]
    else:
        pairs = [(token["id"], token) for token in listed.get("added_tokens") or []]
    return [parse_added(token, id, path) for id, token in pairs]


def model_ids(folder: Path, key: str) -> dict[Path, list]:
    """Return {file: ids} of a key such as eos_token_id: an id, a list of them or null."""
    found = {}
    for name in ("generation_config.json", "config.json"):
        ids = read_if_there(folder / name).get(key)
        ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
        found[folder / name] = ids
    return found
