"""Results of bench/accuracy.py: read from files, as Markdown tables, and as a plot."""

import json
import math
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from bench import prose
from bench.common import table


class Key(NamedTuple):
    """What a result is of."""

    ckpt: str
    task: str
    n: int  # tokens of the prompt, about
    part: int  # of the book: 0 for choosing, 1 for reporting
    seed: int  # number of the document
    entry: str
    dtype: str  # and how the weights are packed, if they are


Results = dict[Key, dict]


def read(path: Path) -> Results:
    """Return the results of a file, which may not be there yet."""
    if not path.is_file():
        return {}
    lines = path.read_text().splitlines()
    rows = [json.loads(line) for line in lines if line.endswith("}")]  # one may be cut
    return {Key(*(row[name] for name in Key._fields)): row for row in rows}


def read_all(paths: str) -> Results:
    """Return the results of files with commas between."""
    results: Results = {}
    for path in paths.split(","):
        results |= read(Path(path))
    return results


def pairs(results: Results, **wanted) -> list[tuple[dict, dict]]:
    """Return (result, dense result on the same question) of the keys that have all these values."""
    found = []
    for key, result in results.items():
        if all(getattr(key, name) == value for name, value in wanted.items()):
            dense = results.get(key._replace(entry="dense"))
            if dense:
                found.append((result, dense))
    return found


def standard_error(values: list[float]) -> float:
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan


# ---- tables ----------------------------------------------------------------------------------

LEGEND = (
    "{:,} tokens: answer tokens right, % ± standard error of the difference to dense "
    "(whole answers right, %); continuation: perplexity over dense's\n"
)


def tables(results: Results, entries: list[str], part: int) -> list[str]:
    """Return the lines of a Markdown table a length, with a row for each model and entry."""
    lines = []
    found = {key.task for key in results}
    tasks = [*prose.TASKS, *(task for task in prose.MORE_TASKS if task in found)]
    for n in sorted({key.n for key in results if key.part == part}):
        rows = []
        for ckpt, dtype in sorted({(key.ckpt, key.dtype) for key in results}, reverse=True):
            for entry in entries:
                wanted = {"ckpt": ckpt, "dtype": dtype, "n": n, "part": part, "entry": entry}
                rows += table_row(results, tasks, **wanted)
        if rows:
            head = ["model", "", "FLOPs, times fewer", "texts", *tasks]
            lines += ["", LEGEND.format(n), table(head, rows)]
    return lines


def table_row(results: Results, tasks: list[str], **wanted) -> list[list[str]]:
    """Return the row of an entry, or nothing if it has no results."""
    by_task = {task: pairs(results, task=task, **wanted) for task in tasks}
    every = [pair for found in by_task.values() for pair in found]
    if not every:
        return []
    saving = mean(result["flops"] for result, _ in every)
    n_texts = max(len(found) for found in by_task.values())
    cells = [table_cell(task, found) for task, found in by_task.items()]
    return [
        [
            f"{wanted['ckpt']}, {wanted['dtype']}",
            wanted["entry"],
            f"{saving:.2f}",
            str(n_texts),
            *cells,
        ]
    ]


def table_cell(task: str, found: list[tuple[dict, dict]]) -> str:
    if not found:
        return ""
    if task == "continuation":
        gaps = [result["nll"] - dense["nll"] for result, dense in found]
        return f"{math.exp(mean(gaps)):.3f} ± {standard_error(gaps):.3f}"
    right = mean(result["right"] for result, _ in found)
    error = standard_error([result["right"] - dense["right"] for result, dense in found])
    whole = mean(result["whole"] for result, _ in found)
    return f"{100 * right:.1f} ± {100 * error:.1f} ({100 * whole:.0f})"


# ---- plot ------------------------------------------------------------------------------------


class Point(NamedTuple):
    saving: float  # times fewer FLOPs than dense
    gap: float  # answer tokens right, points above dense, mean of the tasks
    error: float  # of the gap
    label: str


SHOWN = {  # entries of the set `heads` with the default's cut, and what the plot calls them
    "oracle": "oracle",
    "Slim": "Slim",
    "full attention": "full attention",
    "all heads, peak": "peak, all heads",
    "SnapKV": "SnapKV",
    "recent": "newest blocks",
}
CUTS = {  # with other cuts
    "keep 1/2": "keep 1/2",
    "keep 3/8": "3/8",
    "keep 1/8": "1/8",
    "two cuts": "two cuts",
    "earlier cut": "earlier",
}
RED = "#B03A2E"
BLUE = "#2471A3"
ORANGE = "#CA6F1E"


def points(results: Results, ckpt: str, n: int, labels: dict[str, str]) -> list[Point]:
    """Return the points of the entries that are there, in the order of `labels`."""
    found = []
    for entry, label in labels.items():
        gaps: dict[tuple, list[float]] = {}  # of each text
        savings = []
        for key, result in results.items():
            if (key.ckpt, key.n, key.entry) == (ckpt, n, entry) and key.task != "continuation":
                dense = results[key._replace(entry="dense")]
                gap = 100 * (result["right"] - dense["right"])
                gaps.setdefault((key.part, key.seed), []).append(gap)
                savings.append(result["flops"])
        if gaps:
            means = [mean(gap) for gap in gaps.values()]
            found.append(Point(mean(savings), mean(means), standard_error(means), label))
    return found


def spread(heights: list[float], least: float) -> list[float]:
    """Return falling heights, moved as little as can be, so that neighbours are `least` apart."""
    groups: list[list[float]] = []  # of neighbours that touch; each stands around its own mean
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and bottom(groups[-2], least) - top(groups[-1], least) < least:
            last = groups.pop()
            groups[-1] += last
    return [top(group, least) - i * least for group in groups for i in range(len(group))]


def top(group: list[float], least: float) -> float:
    return mean(group) + least * (len(group) - 1) / 2


def bottom(group: list[float], least: float) -> float:
    return mean(group) - least * (len(group) - 1) / 2


def plot(path: str, results: Results, n: int) -> None:
    """Draw answer tokens right against FLOPs, a panel a model."""
    import matplotlib.pyplot as plt

    plt.rcParams["font.size"] = 15
    models = sorted({key.ckpt for key in results if key.n == n}, reverse=True)
    figure, panels = plt.subplots(
        1, len(models), figsize=(9 * len(models), 7), sharey=True, squeeze=False
    )
    for axes, ckpt in zip(panels[0], models):
        draw_panel(axes, results, ckpt, n)
    panels[0][0].set_ylabel("answer tokens right, points above dense")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def draw_panel(axes, results: Results, ckpt: str, n: int) -> None:
    methods = sorted(points(results, ckpt, n, SHOWN), key=lambda point: -point.gap)
    cuts = points(results, ckpt, n, CUTS)
    axes.axhline(0, color="black", lw=1.5)
    axes.text(4.87, 0.8, "dense", color="black", ha="right")
    heights = spread([point.gap for point in methods], least=4.2)
    for point, height in zip(methods, heights):
        color = RED if point.label.split(",")[0] == "Slim" else BLUE
        draw_point(axes, point, color)
        axes.annotate(
            point.label,
            (point.saving, point.gap),
            (point.saving - 0.25, height),
            color=color,
            ha="right",
            va="center",
            arrowprops={"arrowstyle": "-", "color": color, "lw": 0.8},
        )
    for point in cuts:
        draw_point(axes, point, ORANGE)
        align = {"ha": "center", "va": "top"}
        axes.text(point.saving, point.gap - point.error - 0.8, point.label, color=ORANGE, **align)
    axes.set_title(f"{ckpt}, {n:,} tokens")
    axes.set_xlabel("FLOPs of the first token, times fewer")
    axes.set_xlim(1.45, 4.9)
    axes.set_ylim(top=12)
    axes.grid(color="#E6E6E6")


def draw_point(axes, point: Point, color: str) -> None:
    axes.errorbar(
        point.saving, point.gap, yerr=point.error, fmt="o", ms=8, color=color, elinewidth=1.5
    )
