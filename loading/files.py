"""Files read and written with care, and errors and sizes written for people."""

import contextlib
import fcntl
import json
import os
import secrets
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def inside(folder: Path) -> dict[str, dict | bytes]:
    """Return {name: contents} of the files that a GGUF file stands for; {} for a folder."""
    if not folder.is_file():
        return {}
    from loading import gguf_file  # which reads with this module

    return gguf_file.as_folder(folder)


def is_there(path: Path) -> bool:
    """Return whether a file exists, be it inside a GGUF file."""
    return path.is_file() or path.name in inside(path.parent)


def stamp(path) -> tuple:
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def read_json(path: Path) -> dict:
    """Read a JSON object; raise FileNotFoundError or ValueError with the path."""
    held = inside(path.parent).get(path.name)
    if held is not None:
        return held
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


def positive(value, what: str, kind: type, most: float):
    """Return value as `kind`, int or float; raise ValueError unless it is above 0, up to `most`."""
    kinds = int if kind is int else (int, float)
    number = isinstance(value, kinds) and not isinstance(value, bool)
    if not number or not 0 < value <= most:  # NaN too
        raise ValueError(
            f"{what} is {value!r:.60}; it must be a positive {kind.__name__} up to {most:g}"
        )
    return kind(value)


def check_path(path) -> Path:
    """Return the file that a path leads to; raise ValueError if it cannot be written."""
    try:
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_file():
            raise ValueError("it is not a file")
        try_folder(target.parent)
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"{path!s:.200} cannot be written: {error}") from None
    return target


def try_folder(folder: Path) -> None:
    """Raise OSError unless a file can be made in a folder; for root, permissions do not tell."""
    remove_leftovers(folder, ".try")
    try:
        with open_part(folder, ".try", 0o600) as file:
            os.unlink(file.name)
    except OSError as error:
        raise OSError(f"no file can be made in {folder}: {error.strerror or error}") from None


@contextlib.contextmanager
def replace_file(path, private: bool = False) -> Iterator[BinaryIO]:
    """Give an open file; its content replaces `path` at the end, or is deleted on an error.

    private: a new file can be read by its owner only. Raises ValueError if writing fails.
    """
    path = check_path(path)
    name = f".{zlib.crc32(os.fsencode(path.name)):08x}"  # short: names have a limit
    remove_leftovers(path.parent, name)
    try:
        with open_part(path.parent, name, 0o600 if private else 0o666) as file:
            try:
                yield file
                keep_mode(path, file)
                file.flush()
                os.fsync(file.fileno())  # before the name points to it
                os.replace(file.name, path)  # while the file is locked
            finally:
                Path(file.name).unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error}); choose another place") from None


def open_part(folder: Path, name: str, mode: int) -> BinaryIO:
    """Create a temporary file that nobody else writes to, locked until it is closed.

    Its name cannot be guessed and must be new, so a link that somebody put there is never followed.
    """
    while True:
        part = folder / f"{name}-{secrets.token_hex(8)}.part"
        file = open(part, "xb", opener=lambda path, flags: os.open(path, flags, mode))
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if part.exists():  # else another process took it for a leftover before it was locked
            return file
        file.close()


def remove_leftovers(folder: Path, name: str) -> None:
    """Delete the temporary files of processes that were killed: nobody holds their lock."""
    for part in folder.glob(f"{name}*.part"):
        with contextlib.suppress(OSError):  # locked by a living process, or somebody else's
            with open(os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                part.unlink()


def keep_mode(path: Path, file: BinaryIO) -> None:
    """Give a file the mode of the one that it replaces, if that is our own."""
    if path.exists() and path.stat().st_uid == os.geteuid():
        os.fchmod(file.fileno(), path.stat().st_mode & 0o777)


def one_line(error) -> str:
    """Write an error as one line, with control characters (Escape) made harmless for terminals."""
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
