"""A conversation in a file: safetensors with a JSON header and a checksum."""

import json
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError

from kvcache import COUNTERS, stage_layout
from loading.files import replace_file
from loading.weights import MappedFile
from model import Config

SAVED = "slim 9"  # the format; in 8, `auto` kept less of prompts below 4,096 tokens
PARTS = {
    "identity": dict,
    "ids": list,
    "pending": list,
    "kv": dict,
    "extra": dict,
    "prefill_s": (int, float),
}
OF_SCORE = (  # what follows from the rule, if nothing else is asked for
    "sees heads every_layer recent revive_margin revive_at_most window gamma local_window"
).split()
NUMBERS = ("n_prompt", "n_prunable", "length", "planned", *COUNTERS)  # of the KV
KINDS = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def check_extra(extra) -> None:
    """Raise ValueError unless this is None or a dict that JSON can hold."""
    try:
        if not isinstance(extra, dict | None):
            raise TypeError(f"it is a {type(extra).__name__}")
        json.dumps(extra)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"extra is {extra!r:.60}; it must be a dict of JSON: {error}") from None


def write_saved(path, header: dict, tensors: dict[str, torch.Tensor]) -> None:
    """Write a conversation to a file that only its owner can read, completely or not at all."""
    text = json.dumps({"format": SAVED, **header})
    metadata = {"slim": text, "crc": checksum(text, sorted(tensors.items()))}
    with replace_file(path, private=True) as file:
        write_tensors(file, tensors, metadata)


def write_tensors(file, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write safetensors tensor by tensor; the library would need a copy of them all on the CPU."""
    by_size = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)  # aligns each
    header = {"__metadata__": metadata}
    end = 0
    for name, tensor in by_size:
        start = end
        end += tensor.nbytes
        header[name] = {
            "dtype": KINDS[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for _, tensor in by_size:
        file.write(raw(tensor))


def raw(tensor: torch.Tensor):
    """Return a tensor's bytes, on the CPU."""
    return tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy()


def checksum(header: str, tensors) -> str:
    """Return the CRC of a header and of pairs (name, tensor), dtypes and shapes included."""
    crc = zlib.crc32(header.encode())
    for name, tensor in tensors:
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(raw(tensor), crc)
    return f"{crc:08x}"


def read_saved(path) -> tuple[dict, MappedFile]:
    """Return a saved conversation's header and open file; raise ValueError for anything else."""
    try:
        if not Path(path).is_file():
            raise OSError("it is a folder" if Path(path).is_dir() else "no such file")
        file = MappedFile(path)
        header = json.loads((file.metadata() or {})["slim"])
        if header["format"] != SAVED:
            raise OSError(f"its format is {header['format']!r:.60}, not {SAVED!r}")
    except OSError as error:
        problem = str(error)
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError):
        problem = "it is truncated, or something else"
    else:
        if is_complete(header):
            return header, file
        problem = "parts are missing"
    raise ValueError(
        f"{path} is not a conversation saved by Slim: {problem}; write one with --save"
    )


def is_complete(header: dict) -> bool:
    """Return whether a header has all that `Engine.resume` reads."""
    for name, kind in PARTS.items():
        if not isinstance(header.get(name), kind):
            return False
    kv = header["kv"]
    return isinstance(kv.get("stages"), list) and all(type(kv.get(name)) is int for name in NUMBERS)


def check_saved(path, header: dict, identity: dict) -> None:
    """Raise ValueError that lists how a saved conversation differs from this engine."""
    theirs = header["identity"]
    if theirs.get("weights") != identity["weights"]:
        raise ValueError(
            f"{path} was saved with other weights, of {header.get('ckpt')!s:.200}; give them with "
            "--ckpt, or read the document again"
        )
    wrong = []
    for key, ours in identity.items():
        if theirs.get(key) == ours:
            continue
        if key in OF_SCORE and theirs.get("score") != identity["score"]:
            continue  # they follow from the rule
        if key == "kept_as":
            kinds = [str(kind).replace("file", "auto") for kind in (theirs.get(key), ours)]
            wrong.append(f"--weights {kinds[0]:.60} where this run has {kinds[1]}")
        else:
            wrong.append(f"{key} {theirs.get(key)!r:.60} where this run has {ours!r}")
    if wrong:
        raise ValueError(
            f"{path} was saved with {', '.join(wrong)}; "
            "use the same settings, or read the document again"
        )


def check_contents(path, header: dict, file: MappedFile, config: Config, run) -> None:
    """Raise ValueError unless a saved conversation is undamaged and complete.

    config: of the whole model. run: the Checkpoint that goes on with it.
    """
    names = sorted(file.keys())
    tensors = ((name, file.get_tensor(name)) for name in names)  # one at a time in memory
    if checksum(file.metadata()["slim"], tensors) != file.metadata().get("crc"):
        raise ValueError(f"{path} is damaged; read the document again")
    problem = find_problem(header, file, config, run)
    if problem:
        raise ValueError(f"{path} is incomplete or wrong ({problem}); read the document again")


def find_problem(header: dict, file: MappedFile, config: Config, run) -> str:
    """Return what is wrong with the lengths, blocks and tensors of a conversation, or nothing."""
    kv = header["kv"]
    block_len = run.settings.block_len
    if min(kv[name] for name in NUMBERS) < 0:
        return "negative numbers"
    if kv["length"] != len(header["ids"]):
        return "length"
    if not 1 <= kv["n_prunable"] <= kv["length"] + block_len:
        return "n_prunable"
    layout = stage_layout(config.n_layers, kv["n_prunable"], run.schedule, block_len)
    slots = [n_slots for _, n_slots in layout]
    if not max(1, slots[0] * block_len) <= kv["n_prompt"] <= kv["length"]:
        return "n_prompt"
    if len(kv["stages"]) != len(layout) or not holds_every_block(kv["stages"], slots):
        return "stages"
    needed = tensor_kinds(kv, layout, config, run)
    if needed.keys() != set(file.keys()):
        return f"tensor {min(needed.keys() ^ set(file.keys()))!r:.60}"
    for name, (dtype, shape) in needed.items():
        part = file.get_slice(name)
        found = part.get_shape()
        if name.endswith(".newest") and found[:1] and 1 <= found[0] <= shape[0]:
            shape = found[:1] + shape[1:]  # there may be fewer tokens than the window has
        if found != shape or part.get_dtype() != KINDS[dtype]:
            return f"tensor {name!r}"
    return ""


def holds_every_block(stages: list, slots: list[int]) -> bool:
    """Return whether every block is where it may be: see the table of states in kvcache.py."""
    below = set(range(slots[0]))  # blocks whose keys the stage below has
    for stage, n_slots in zip(stages, slots):
        if not isinstance(stage, dict) or type(stage.get("newest")) is not bool:
            return False
        if not all(are_blocks(stage.get(place), slots[0]) for place in ("slots", "home", "aux")):
            return False
        keys = {*stage["slots"], *stage["home"]}
        if len(stage["slots"]) != n_slots or not keys <= below or set(stage["aux"]) != below - keys:
            return False
        below = keys
    return True


def are_blocks(value, n_blocks: int) -> bool:
    """Return whether this is a list of numbers of blocks, each once."""
    if not isinstance(value, list):
        return False
    if not all(type(number) is int and 0 <= number < n_blocks for number in value):
        return False
    return len(set(value)) == len(value)


def tensor_kinds(kv: dict, layout: list, config: Config, run) -> dict[str, tuple]:
    """Return {name: (dtype, shape)} of the tensors that `KVCache.state` gives."""
    block_len = run.settings.block_len
    n_blocks = layout[0][1]
    n_tail = kv["length"] - n_blocks * block_len
    block = [2, config.n_kv_heads, block_len, config.head_dim]
    newest = (torch.promote_types(run.dtype, torch.float32), [run.window, n_blocks])  # scores
    if run.rule.sees == "keys":
        newest = (run.dtype, [run.window, config.n_heads, config.head_dim])  # queries
    kinds = {}
    for i, ((layers, n_slots), stage) in enumerate(zip(layout, kv["stages"])):
        slab = [2, config.n_kv_heads, n_slots * block_len + n_tail, config.head_dim]
        kinds |= {f"layer.{layer}": (run.dtype, slab) for layer in layers}
        for number in stage["home"]:
            kinds[f"stage.{i}.home.{number}"] = (run.dtype, [len(layers), *block])
        for number in stage["aux"]:
            kinds[f"stage.{i}.aux.{number}"] = (run.dtype, [block_len, config.dim])
        if stage["newest"]:
            kinds[f"stage.{i}.newest"] = newest
    return kinds
