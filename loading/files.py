"""Files read and written with care, and errors and sizes written for people."""

import contextlib
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path


def read_json(path: Path) -> dict:
    """Read a JSON object; raise FileNotFoundError or ValueError with the path."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; a checkpoint is a folder in Hugging Face layout"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def check_path(path) -> Path:
    """Return the file that a path to write to stands for, links followed; raise ValueError if it cannot be written."""
    try:
        target = Path(os.path.realpath(path))
        if target.is_dir() or target.exists() and not target.is_file():
            raise ValueError("it is not a file")
        if not os.access(target.parent, os.W_OK | os.X_OK):
            raise ValueError("its folder does not exist or does not allow writing")
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"{path!s:.200} cannot be written: {error}") from None
    return target


@contextlib.contextmanager
def replace_file(path) -> Iterator[str]:
    """Give a path to write to; what is written there replaces `path` at the end, or is deleted on an error.

    What a killed process left there, the next try writes over. Raises ValueError if writing fails.
    """
    path = check_path(path)
    part = path.with_name(
        f".{zlib.crc32(os.fsencode(path.name)):08x}.part"
    )  # no longer than a name can be
    try:
        yield str(part)
        if path.exists():
            part.chmod(path.stat().st_mode & 0o777)
        with open(part, "rb") as file:
            os.fsync(file.fileno())  # before the name points to it
        os.replace(part, path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error}); choose another place") from None
    finally:
        part.unlink(missing_ok=True)


def one_line(error) -> str:
    """Write an error as one line, with control characters such as Escape escaped for the terminal."""
    text = " ".join(str(error).split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def format_bytes(n: float) -> str:
    """Write a byte count as B, KiB, MiB or GiB."""
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            break
        n /= 1024
    else:
        unit = "GiB"
    return f"{n:.0f} {unit}" if unit == "B" or n >= 100 else f"{n:.2f} {unit}"
