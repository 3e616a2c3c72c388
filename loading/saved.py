"""A conversation in a file: safetensors with a JSON header and a checksum."""

import json
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError

from loading.files import replace_file
from loading.weights import MappedFile

SAVED = "slim 5"  # the format; RoPE of 4 was in float64
PARTS = {
    "identity": dict,
    "ids": list,
    "pending": list,
    "kv": dict,
    "extra": dict,
    "prefill_s": (int, float),
}
KINDS = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


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
            raise OSError("no such file")
        file = MappedFile(path)
        header = json.loads((file.metadata() or {})["slim"])
        if header["format"] != SAVED:
            raise OSError(f"its format is {header['format']!r:.60}, not {SAVED!r}")
    except OSError as error:
        problem = str(error)
    except (SafetensorError, ValueError, KeyError, TypeError):
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
    return header["kv"].keys() >= {"n_prompt", "length", "planned", "stages"}


def check_saved(path, header: dict, identity: dict) -> None:
    """Raise ValueError that lists how a saved conversation differs from this engine."""
    theirs = header["identity"]
    wrong = []
    for key, ours in identity.items():
        if theirs.get(key) == ours:
            continue
        if key == "weights":
            wrong.append("other weights")
        else:
            wrong.append(f"{key} {theirs.get(key)!r:.60} where this run has {ours!r}")
    if wrong:
        raise ValueError(
            f"{path} was saved with {', '.join(wrong)}; "
            "use the same settings, or read the document again"
        )


def check_contents(path, header: dict, file: MappedFile, n_layers: int, n_stages: int) -> None:
    """Raise ValueError unless checksum, stages and layers of a saved conversation are right."""
    names = sorted(file.keys())
    tensors = ((name, file.get_tensor(name)) for name in names)  # one at a time in memory
    if checksum(file.metadata()["slim"], tensors) != file.metadata().get("crc"):
        raise ValueError(f"{path} is damaged; read the document again")
    layers = {f"layer.{i}" for i in range(n_layers)}
    if len(header["kv"]["stages"]) != n_stages or not layers <= set(names):
        raise ValueError(f"{path} is incomplete; read the document again")
