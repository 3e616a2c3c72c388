"""A conversation in a file: safetensors with a JSON header and a checksum, replaced as a whole or not at all."""

import json
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError

from loading.files import replace_file
from loading.weights import MappedFile

SAVED = "slim 4"  # the format
KINDS = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def write_saved(path, header: dict, tensors: dict[str, torch.Tensor]) -> None:
    """Write a conversation to a file, completely or not at all; see `replace_file`."""
    text = json.dumps({"format": SAVED, **header})
    with replace_file(path) as part:
        write_tensors(part, tensors, {"slim": text, "crc": checksum(text, sorted(tensors.items()))})


def write_tensors(path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file one tensor at a time; the library would need a copy of them all, and on the CPU."""
    tensors = dict(
        sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    )  # so that each is aligned
    header, end = {"__metadata__": metadata}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        dtype = KINDS[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
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


def read_saved(path) -> tuple[dict, object]:
    """Return the header of a saved conversation and its open file; raise ValueError for anything else."""
    parts = {
        "identity": dict,
        "ids": list,
        "pending": list,
        "kv": dict,
        "extra": dict,
        "prefill_s": (int, float),
    }
    try:
        if not Path(path).is_file():
            raise FileNotFoundError("no such file")
        file = MappedFile(path)
        header = json.loads((file.metadata() or {})["slim"])
        if header["format"] != SAVED:
            raise OSError(f"its format is {header['format']!r:.60}, not {SAVED!r}")
        complete = all(isinstance(header.get(name), kind) for name, kind in parts.items())
        if complete and header["kv"].keys() >= {"n_prompt", "length", "planned", "stages"}:
            return header, file
        problem = "parts are missing"
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        problem = str(error) if isinstance(error, OSError) else "it is truncated, or something else"
    raise ValueError(
        f"{path} is not a conversation saved by Slim: {problem}; write one with --save"
    )


def check_saved(path, header: dict, identity: dict) -> None:
    """Raise ValueError, with a list, if a saved conversation differs from the engine that is to continue it."""
    theirs = header["identity"]
    if wrong := [key for key in identity if theirs.get(key) != identity[key]]:
        shown = ", ".join(
            "other weights"
            if key == "weights"
            else f"{key} {theirs.get(key)!r:.60} where this run has {identity[key]!r}"
            for key in wrong
        )
        raise ValueError(
            f"{path} was saved with {shown}; use the same settings, or read the document again"
        )


def check_contents(path, header: dict, file, n_layers: int, n_stages: int) -> None:
    """Raise ValueError unless a saved conversation is whole: its checksum, every stage, every layer."""
    tensors = ((name, file.get_tensor(name)) for name in sorted(file.keys()))
    if checksum(file.metadata()["slim"], tensors) != file.metadata().get("crc"):
        raise ValueError(f"{path} is damaged; read the document again")
    if len(header["kv"]["stages"]) != n_stages or not {f"layer.{i}" for i in range(n_layers)} <= {
        *file.keys()
    }:
        raise ValueError(f"{path} is incomplete; read the document again")
