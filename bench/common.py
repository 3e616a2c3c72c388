"""What the benches share: options, tables, and runs in processes of their own."""

import argparse
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

from loading.files import format_bytes, one_line
from loading.weights import copies_head, stored
from packed import matrix_bytes
from planning.checkpoint import Checkpoint
from planning.memory import plan


class Parser(argparse.ArgumentParser):
    """Prints one line for wrong options, and each default in --help."""

    def __init__(self, prog: str):
        super().__init__(prog=prog, formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")


def check_numbers(args, limits: dict[str, tuple[int, int]]) -> None:
    """Raise ValueError unless each named option is within its limits, both included."""
    for name, (least, most) in limits.items():
        value = getattr(args, name)
        if not least <= value <= most:
            raise ValueError(f"--{name} {value} must be within {least}..{most:,}")


def read_lengths(text: str, least: int, most: int, why: str) -> list[int]:
    """Read '4096,8192', different numbers within least..most; why: explains the limit."""
    parts = text.split(",")
    for part in parts:
        digits = part.isascii() and part.isdigit() and len(part) < 16
        if not digits or not least <= int(part) <= most:
            what = f"{part!r:.40} is not a number of tokens within {least}..{most:,}"
            raise ValueError(f"--lengths: {what}, {why}")
        if parts.count(part) > 1:
            raise ValueError(f"--lengths: {part} is there twice")
    return [int(part) for part in parts]


def row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table; without rows its head, so that rows can follow one by one."""
    return "\n".join([row(head), "|---" * len(head) + "|", *map(row, rows)])


def memory_bytes(name: str = "VmHWM") -> int:
    """Return the memory of this process: its peak (VmHWM), or what it has now (VmRSS).

    Not `ru_maxrss`, which starts at the parent's value in a child. Raises OSError without /proc.
    """
    found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    if not found:
        raise OSError(f"/proc/self/status has no {name}, the memory of a process")
    return 1024 * int(found[1])


def hardware(device: torch.device) -> str:
    """Name the GPU and its memory, or the CPU and the cores that this process may use."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        return f"{torch.cuda.get_device_name(device)} ({format_bytes(memory)})"
    try:
        facts = Path("/proc/cpuinfo").read_text()
    except OSError:
        facts = ""
    found = re.search(r"model name\s*: (.+)", facts)
    name = found[1] if found else platform.machine()
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def commit() -> str:
    """Return the short name of the commit that runs, with "+" if Python files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent.parent)]
    try:
        name = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        )
        changes = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py"])
    except OSError:
        return "unknown"
    if name.returncode:
        return "unknown"
    return name.stdout.strip() + ("+" if changes.returncode else "")


def floor_bytes(ckpt: Checkpoint, n_prompt: int, n_new: int) -> int:
    """Return the bytes that a token after the prompt must read: weights, active keys and values.

    Of an embedding that is not also the head, a token reads one row.
    """
    unread = 0
    has_copy = copies_head(ckpt.config, ckpt.device, ckpt.dtype, ckpt.kept_as)
    if has_copy or not ckpt.config.tied:
        (n_rows, n_columns), bits, group = next(stored(ckpt.config, ckpt.kept_as, ckpt.exact))
        unread = matrix_bytes((n_rows - 1, n_columns), bits, group, ckpt.dtype)
    return ckpt.weight_bytes - unread + plan(ckpt, n_prompt, n_new).kv


def last_line(command: list[str], stdin: str = "") -> str:
    """Run a command and return the last line it prints; raise ValueError if it fails."""
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, errors="replace")
    if done.returncode < 0:
        raise ValueError(f"killed by signal {-done.returncode}")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        errors = [line for line in lines if "rror" in line]  # a stack trace may end otherwise
        reason = (errors or lines)[-1]
        reason = reason.partition(".py: error: ")[2] or reason
        raise ValueError(f"{one_line(reason):.300}")
    return (done.stdout.strip().splitlines() or [""])[-1]
