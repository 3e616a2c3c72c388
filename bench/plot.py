"""Draw what bench/results holds: every JSON of speed.py and quality.py there, into PNGs beside them.

    python bench/plot.py                # or another folder: python bench/plot.py FOLDER

Files of one kind are merged: each model, dtype and machine is a panel of the speed figures,
each task and length one of the quality figures; where two files hold the same cell, the one
later by name counts. Hollow markers and a ~ are for rows that quality.py marks: random blocks do as well there.
"""

import json
import math
import re
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
# Colours of Okabe and Ito, which colour-blind readers tell apart; greys for what needs no model.
BLUE, SKY, GREEN, ORANGE, RED, PINK, GREY, PALE = (
    "#0072B2",
    "#56B4E9",
    "#009E73",
    "#E69F00",
    "#D55E00",
    "#CC79A7",
    "#777777",
    "#AAAAAA",
)
COLOURS = {
    "dense": "#222222",
    "slim": RED,
    "transformers": BLUE,
    "attention mass": BLUE,
    "token attention": SKY,
    "average pool": ORANGE,
    "max pool": PINK,
    "recent blocks": GREY,
    "random blocks": PALE,
    "slim at matmul peak": RED,
    "projections": SKY,
    "attention": BLUE,
    "FFN": GREEN,
    "boundaries and KV": RED,
    "head and rest": PALE,
    "single": BLUE,
    "lookalike": RED,
    "latest": GREEN,
    "two_hop": ORANGE,
    "three_hop": PINK,
    "multi": GREY,
}
STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "xtick.minor.bottom": False,
    "ytick.minor.left": False,
    "savefig.dpi": 160,
    "figure.constrained_layout.use": True,
}

# ---- panels -----------------------------------------------------------------------------


def panels(n: int, height=3.0, width=4.8):
    """Return a figure and n axes, two a row."""
    columns = min(n, 2)
    figure, axes = plt.subplots(
        -(-n // columns),
        columns,
        figsize=(width * columns + (1.2 if n == 1 else 0), height * -(-n // columns)),
        squeeze=False,
    )
    for ax in axes.flat[n:]:
        ax.remove()
    return figure, axes.flat[:n]


def lines(ax, curves: dict, xs: list, ticks: list, hollow=(), unit="%") -> None:
    """Draw {name: {x: y}} over places xs with their tick labels, each name at its line's end."""
    for name, curve in curves.items():
        colour, width, marker = (
            COLOURS.get(name, GREY),
            {"slim": 2.2, "slim at matmul peak": 0.7}.get(name, 1.3),
            "_" if "peak" in name else "o",
        )
        ax.plot(
            *zip(*sorted(curve.items())),
            "--" if name in ("dense", "random blocks") else "-",
            color=colour,
            linewidth=width,
            zorder=3 + (name == "slim"),
        )
        for x, y in curve.items():
            ax.plot(
                x,
                y,
                marker,
                markersize=5,
                color=colour,
                markerfacecolor="white" if x in hollow else colour,
                clip_on=False,
                zorder=3 + (name == "slim"),
            )
    pad = 0.05 * (max(xs) - min(xs)) or 0.5
    ax.set(xlim=(min(xs) - pad, max(xs) + pad), xticks=xs, xticklabels=ticks)
    if unit == "%":
        ax.set(ylim=(0, 103), yticks=range(0, 101, 25))
        ax.yaxis.set_major_formatter("{x:.0f}%")
    ends = [(*max(curve.items()), name) for name, curve in curves.items()]
    early = {name: f" at {ticks[xs.index(x)]}" if x < max(xs) else "" for x, _, name in ends}
    label_ends(
        ax, [(x, y, name, f"{name} {f'{y:.0f}' if unit == '%' else seconds(y)}{early[name]}") for x, y, name in ends]
    )


def label_ends(ax, ends: list, gap=0.066) -> None:
    """Write each text right of the axes, level with its line's end (x, y, name, text), moved apart where they would
    touch.
    """
    level = lambda x, y: ax.transAxes.inverted().transform(ax.transData.transform((x, y)))[1]
    places = sorted([level(x, y), name, text] for x, y, name, text in ends)
    for lower, upper in zip(places, places[1:]):
        upper[0] = max(upper[0], lower[0] + gap)
    for upper, lower in zip([[0.98 + gap], *places[::-1]], places[::-1]):  # and back down from the top
        lower[0] = min(lower[0], upper[0] - gap)
    for y, name, text in places:
        ax.text(1.02, y, text, transform=ax.transAxes, va="center", color=COLOURS.get(name, GREY), fontsize=8.5)


def seconds(s: float) -> str:
    return f"{s:.3g} s" if s >= 0.1 else f"{1e3 * s:.3g} ms"


def save(figure, path: Path) -> None:
    figure.savefig(path)
    plt.close(figure)
    print(path)


# ---- speed ------------------------------------------------------------------------------


def draw_speed(files: list, folder: Path) -> None:
    """Time to first token by prompt length, and the prefill by part."""
    groups = defaultdict(dict)  # panel -> {length: (file, result)}
    for f in files:
        where = (
            f["device"]
            if "NVIDIA" in f["device"]
            else f"{f['device']}, {f['threads']} thread{'s' * (f['threads'] > 1)}"
        )
        groups[f"{f.get('ckpt') or f['shape']}, {f['dtype']}, {where}\nschedule {f['schedule']}"] |= {
            int(n): (f, r) for n, r in f["results"].items()
        }
    figure, axes = panels(len(groups), 3.4)
    for ax, (title, group) in zip(axes, groups.items()):
        curves = {
            who: {math.log2(n): r[who]["ttft_s"] for n, (_, r) in group.items() if "ttft_s" in r.get(who, {})}
            for who in ("dense", "transformers", "slim")
        }
        floor = {math.log2(n): flops(f, n) / f["matmul_peak"] for n, (f, _) in group.items()}
        ax.set(yscale="log", title=title, ylabel="time to first token, s", xlabel="prompt tokens")
        curves = {who: curve for who, curve in curves.items() if curve} | {"slim at matmul peak": floor}
        values = [y for curve in curves.values() for y in curve.values()]
        low, high = min(values) / 1.4, max(values) * 1.4
        steps = [m * 10.0**e for e in range(-4, 5) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
        ax.set(ylim=(low, high), yticks=steps, yticklabels=[f"{y:g}" for y in steps])
        ax.minorticks_off()
        lines(ax, curves, [math.log2(n) for n in sorted(group)], [f"{n:,}" for n in sorted(group)], unit="s")
    save(figure, folder / "speed.png")
    whole = lambda r: all("parts_s" in r.get(who, {}) for who in ("dense", "slim"))
    split = {title: {n: r for n, (_, r) in group.items() if whole(r)} for title, group in groups.items()}
    if any(split.values()):
        draw_parts({title: group for title, group in split.items() if group}, folder)


def flops(f: dict, length: int) -> float:
    """Return the operations of slim's prefill; files written before speed.py had --ckpt do not say them."""
    if "flops" in f:
        return f["flops"][str(length)]
    import speed

    config = speed.parse_config(speed.SHAPES[f["shape"]], f["shape"])
    schedule = {} if f["schedule"] == "dense" else speed.resolve_schedule(f["schedule"], config, 64)
    return speed.prefill_flops(config, length, schedule)


def draw_parts(groups: dict, folder: Path) -> None:
    """One bar for dense, its length 100%, and one for slim; parts side by side."""
    figure, axes = panels(len(groups), 1.0 + 0.55 * max(map(len, groups.values())))
    for ax, (title, group) in zip(axes, groups.items()):
        bars = [(n, who) for n in sorted(group) for who in ("dense", "slim")]
        for y, (n, who) in enumerate(bars):
            parts, left, whole = group[n][who]["parts_s"], 0.0, sum(group[n]["dense"]["parts_s"].values()) / 100
            for part, took in parts.items():
                width = took / whole
                ax.barh(
                    y,
                    width,
                    0.78,
                    left,
                    color=COLOURS.get(part, GREY),
                    edgecolor="white",
                    linewidth=0.6,
                    label=part if y == 0 else None,
                )
                if width > 7:
                    colour = "black" if part in ("projections", "head and rest") else "white"
                    ax.text(left + width / 2, y, f"{width:.0f}", ha="center", va="center", color=colour, fontsize=8.5)
                left += width
            ax.text(left + 1, y, seconds(sum(parts.values())), va="center", color="#444444", fontsize=8.5)
        ends = [bar.get_x() + bar.get_width() for bar in ax.patches]
        ax.set(
            title=title,
            yticks=range(len(bars)),
            yticklabels=[f"{n:,} {who}" for n, who in bars],
            xlim=(0, max(ends) + 18),
            xlabel="% of the dense prefill's time",
        )
        ax.grid(visible=False)
        ax.invert_yaxis()
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside upper left",
        ncols=5,
        frameon=False,
        fontsize=9,
        handlelength=1,
        columnspacing=1.2,
    )
    save(figure, folder / "speed-parts.png")


# ---- quality ----------------------------------------------------------------------------


# experiment: (x axis, x as a tick's text, a figure's (panel, curve, x) from its file and its row and column)
TABLES = {
    "main": (
        "budget, as a share of the prompt",
        lambda x: f"1/{2**-x:g}",
        lambda f, r, c: (f"{r['task']}, {r['tokens']}, boundary {f['boundary']}", c, -math.log2(float(r["share"][2:]))),
    ),
    "lengths": (
        "prompt tokens",
        lambda x: f"{2**x:,.0f}",
        lambda f, r, c: ("dense", r["task"], math.log2(int(c.replace(",", "")))),
    ),
    "boundary": (
        "layer of the boundary",
        str,
        lambda f, r, c: (f"{r['task']}, {r['tokens']}, {r['share']}", r["last"], int(c)),
    ),
    "diffusion": (
        "layer at which the fact's own blocks are removed",
        str,
        lambda f, r, c: (r["tokens"], r["task"], int(c)),
    ),
    "depth": (
        "place of the fact in the document",
        lambda x: f"{x:.0%}",
        lambda f, r, c: (f"lookalike, 1/{1 / f['shares'][0]:g}, boundary {f['boundary']}", r["task"], float(c)),
    ),
}


def cells(f: dict):
    """Yield every figure of a table as (panel, curve, x, y in %, whether marked ~)."""
    n = f["questions"] // (4 if f["experiment"] == "depth" else 1)
    about = (
        f", {n} questions"
        + (f", gamma {f['gamma']:g}" if f.get("gamma", 0.9) != 0.9 else "")
        + (f", {f['ckpt']}" if f["ckpt"] != "demo" else "")
    )
    for label, *figures in f["rows"]:
        found = {
            key: re.search(pattern, f"{label}; {f['head'][0]}")
            for key, pattern in (("tokens", r"[\d,]+ tokens"), ("share", r"1/[\d.]+"))
        }
        row = {key: match and match[0] for key, match in found.items()} | {
            "task": label.split(", ")[0],
            "last": label.split(", ")[-1],
        }
        for column, figure in zip(f["head"][1:], figures):
            panel, curve, x = TABLES[f["experiment"]][2](f, row, column)
            yield panel + about, curve, x, 100 * figure, label.endswith("~")


def draw_quality(kind: str, files: list, folder: Path) -> None:
    """Draw one panel a task and length, curves over the table's x; of depth a map, prompt lengths by places."""
    groups, (xlabel, tick, _) = defaultdict(lambda: (defaultdict(dict), set())), TABLES[kind]
    for panel, curve, x, y, blind in (cell for f in files for cell in cells(f)):
        groups[panel][0][curve][x] = y
        (groups[panel][1].add if blind else groups[panel][1].discard)(x)
    figure, axes = panels(
        len(groups), 3.0 if kind != "depth" else 1.4 + 0.4 * max(len(curves) for curves, _ in groups.values())
    )
    for ax, (panel, (curves, hollow)) in zip(axes, groups.items()):
        xs = sorted({x for curve in curves.values() for x in curve})
        (heat_map if kind == "depth" else lines)(ax, curves, xs, [tick(x) + " ~" * (x in hollow) for x in xs], hollow)
        ax.set(title=panel, xlabel=xlabel)
    save(figure, folder / f"quality-{kind}.png")


def heat_map(ax, rows: dict, xs: list, ticks: list, _) -> None:
    rows = dict(sorted(rows.items(), key=lambda item: int(item[0].replace(",", ""))))
    grid = [[row.get(x, math.nan) for x in xs] for row in rows.values()]
    ax.imshow(grid, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    for i, row in enumerate(grid):
        for j, y in enumerate(row):
            ax.text(j, i, f"{y:.0f}", ha="center", va="center", color="black" if y > 55 else "white")
    ax.set(xticks=range(len(xs)), xticklabels=ticks, yticks=range(len(grid)), yticklabels=rows, ylabel="prompt tokens")
    ax.grid(visible=False)


# ---- command line -----------------------------------------------------------------------


def fail(message) -> None:
    print(f"plot: error: {message}", file=sys.stderr)
    sys.exit(2)


def main(folder: Path) -> None:
    kinds = defaultdict(list)
    for path in sorted(folder.glob("*.json")):
        try:
            f = json.loads(path.read_text())
            kinds["speed" if "results" in f else f["experiment"]].append(f)
        except (ValueError, KeyError, TypeError):
            fail(f"{path} is not what speed.py or quality.py write")
    if not kinds:
        fail(f"no JSON in {folder}; bench/speed.py and bench/quality.py write it with --out")
    for kind, files in kinds.items():
        if kind == "speed":
            draw_speed(files, folder)
        elif kind in TABLES:
            draw_quality(kind, files, folder)


if __name__ == "__main__":
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError:
        fail("matplotlib is missing; pip install matplotlib")
    plt.switch_backend("agg")
    plt.rcParams.update(STYLE)
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "bench" / "results")
