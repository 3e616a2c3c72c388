"""Will it fit? What prompts of several lengths need, and the longest that fits here."""

from loading.files import format_bytes
from planning.checkpoint import Checkpoint, dtype_name
from planning.memory import Plan, fits, free_bytes, longest_prompt, plan
from planning.schedule import format_schedule
from planning.settings import WEIGHTS, env_number

LENGTHS = (2048, 8192, 32768, 131072)


def describe(ckpt: Checkpoint, n_new: int) -> str:
    """Return a table: what is needed dense and by the schedule, in each kind of weights.

    Raises ValueError under torchrun, where each rank needs its own part.
    """
    if env_number("WORLD_SIZE") > 1:
        raise ValueError("--plan is of one process; start it without torchrun")
    kinds = [kind for kind in WEIGHTS if kind != "auto" or ckpt.packing]
    runs = [ckpt.with_weights(kind) for kind in kinds]
    head = ["tokens", "", *(f"{run.settings.weights}, {dtype_name(run.dtype)}" for run in runs)]
    rows = [head]
    for n in lengths(ckpt):
        for name, row in both_ways(runs):
            cells = [needed(plan(run, n, n_new), run) for run in row]
            rows.append([f"{n:,}", name, *cells])
    for name, row in both_ways(runs):
        rows.append(["longest", name, *(longest(run, n_new) for run in row)])
    return "\n".join([*title(ckpt, n_new), *aligned(rows)])


def lengths(ckpt: Checkpoint) -> list[int]:
    """Return the lengths that the model was trained for."""
    most = min(ckpt.config.max_len, LENGTHS[-1])
    return [n for n in LENGTHS if n < most] + [most]


def both_ways(runs: list[Checkpoint]) -> list[tuple[str, list[Checkpoint]]]:
    ways = [("dense", [run.with_schedule("dense") for run in runs])]
    if runs[0].schedule:
        ways.append(("slim", runs))
    return ways


def needed(need: Plan, run: Checkpoint) -> str:
    """Write what a plan takes; a star if there is no room for it."""
    host = f" + {format_bytes(need.host)}" if need.host else ""
    star = "" if has_room(need, run) else " *"
    return f"{format_bytes(need.total)}{host}{star}"


def has_room(need: Plan, run: Checkpoint) -> bool:
    return fits(run.device, need.total, need.host)


def longest(run: Checkpoint, n_new: int) -> str:
    most = run.config.max_len
    found = longest_prompt(run, n_new, most, lambda need: has_room(need, run))
    return f"{found:,}" if found < most else f"{found:,} (all of its context)"


def title(ckpt: Checkpoint, n_new: int) -> list[str]:
    schedule = format_schedule(ckpt.schedule)
    if ckpt.needs_probe:
        schedule += ", assumed: its heads are measured when it first runs"
    lines = [
        f"{ckpt.folder.name} on {ckpt.device}, {format_bytes(free_bytes(ckpt.device))} free; "
        f"a prompt and {n_new:,} new tokens, schedule {schedule}",
        "on the device + on the host for pruned blocks; *: more than is free",
    ]
    return lines


def aligned(rows: list[list[str]]) -> list[str]:
    """Return rows of cells as lines; the first two columns stand to the left."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        lines.append("  ".join(cells).rstrip())
    return lines
