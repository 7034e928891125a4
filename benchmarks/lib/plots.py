"""Pictures of the benchmark: a bar for each technique."""

from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot as plt

from benchmarks.lib import sweep, to_quality
from benchmarks.lib.models import MODELS
from benchmarks.lib.results import SHARE, Row, Summary, cores_of, summaries
from benchmarks.lib.techniques import PLAIN
from common.io.files import whole_file

matplotlib.use("Agg")  # pictures are written, not shown
INK = "#222222"
BLUE, GREY, VERMILION = "#0072B2", "#A0A0A0", "#D55E00"  # Okabe and Ito's palette, and a grey
COLOURS = (GREY, BLUE, VERMILION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
# Each picture is drawn for light pages and for dark ones: suffix of its name, ink, paper, grid.
THEMES = (("", INK, "white", "#E5E5E5"), ("_dark", "#E6EDF3", "#0D1117", "#30363D"))


def draw_all(measured: dict[str, dict[str, list[Row]]], folder: Path) -> list[Path]:
    """`<model>_benchmark.png` of each measured model, on the newest GPU or else the newest CPU.

    Also `to-quality.png` of all machines and `sweep.png` of the last one.

    Args:
        measured: `speed`, `to-quality` and `sweep` → machine → its rows.
    """
    machines = in_front(measured["speed"])
    rows = max(machines, key=lambda rows: (rows[-1]["device"] != "cpu", rows[-1]["when"]))
    written = []
    for model in MODELS:
        bars = [s for s in summaries(rows, model) if not s.error and s.technique != SHARE]
        if bars:
            row = next(row for row in rows if row["model"] == model)
            path = folder / f"{MODELS[model].picture}.png"
            written += _write(path, partial(draw, bars, model, row))
    trained = sorted(chain(*measured["to-quality"].values()), key=lambda row: row["when"])
    if trained:
        written += _write(folder / "to-quality.png", partial(draw_to_quality, trained))
    if measured["sweep"]:
        swept = list(measured["sweep"].values())[-1]
        written += _write(folder / "sweep.png", partial(draw_sweep, swept))
    return written


def newest_of_kind(machines: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """Machine → its rows, of each kind the machine measured last.

    The kinds are a processor, a processor whose instructions were limited, and each GPU.
    """
    newest = {}
    for machine, rows in sorted(machines.items(), key=lambda item: item[1][-1]["when"]):
        newest[rows[-1]["device"], " limited to " in rows[-1]["cpu"]] = machine
    return {machine: rows for machine, rows in machines.items() if machine in newest.values()}


def in_front(machines: dict[str, list[Row]]) -> list[list[Row]]:
    """The rows for the front page: the newest of each kind, but no limited processor."""
    return [r for r in newest_of_kind(machines).values() if " limited to " not in r[-1]["cpu"]]


def shown(name: str, description: str) -> str:
    """HTML that shows a picture of `assets` in a folder's README, in the theme of the page."""
    light, dark = (f"../assets/{name}{suffix}.png" for suffix, *_ in THEMES)
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img alt="{description}" src="{light}"></picture>'
    )


def _write(path: Path, figure: Callable[[], Any]) -> list[Path]:
    """Draw a figure once for each theme."""
    written = []
    for suffix, ink, paper, grid in THEMES:
        inks = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")
        papers = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
        colours: Any = (
            dict.fromkeys(inks, ink) | dict.fromkeys(papers, paper) | {"grid.color": grid}
        )
        written.append(path.with_stem(path.stem + suffix))
        with plt.rc_context({"font.size": 10, **colours}), whole_file(written[-1]) as file:
            figure().savefig(file, format="png", dpi=120)
            plt.close()
    return written


def _where(row: Row) -> str:
    return row["device"] if row["device"] != "cpu" else f"CPU, {cores_of(row)}"


def draw(bars: list[Summary], model: str, row: Row) -> Any:
    """The fastest on top; blue is faster than plain (interval above 1), vermilion slower."""
    bars = sorted(bars, key=lambda bar: -bar.speed[1])
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.36 * len(bars)), layout="constrained")
    widest = max(bar.speed[2] for bar in bars)
    for y, bar in enumerate(bars):
        _bar(axes, y, bar, widest)
    plain = [bar.speed[1] for bar in bars if bar.technique == PLAIN]
    for speed in plain:
        axes.axvline(speed, color=plt.rcParams["text.color"], linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(bars)), [bar.technique for bar in bars])
    axes.set(xlim=(0, 1.45 * widest), ylim=(len(bars) - 0.5, -0.5))
    axes.set_xlabel(
        "images per second (bar: median, line: 10th to 90th percentile of steps)\n"
        "dotted: plain; blue: faster than plain, orange: slower, grey: interval includes 1"
    )
    axes.set_title(
        f"Training {model} on {row['backbone']}, crops of {row['crop']} pixels\n"
        f"{_where(row)}, torch {row['torch']}",
        loc="left",
        fontsize=11,
    )
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def _bar(axes: Any, y: int, bar: Summary, widest: float) -> None:
    low, median, high = bar.speed
    colour, label = GREY, f"{median:.3g}"
    if bar.speedup is not None:
        ratio, least, most = bar.speedup
        label += f"   ×{ratio:.2f}"
        if bar.rounds > 1:
            label += f" ({least:.2f} to {most:.2f})"
            colour = BLUE if least > 1 else VERMILION if most < 1 else GREY
    axes.barh(y, median, 0.66, color=colour)
    ink = plt.rcParams["text.color"]
    axes.plot([low, high], [y, y], color=ink, linewidth=1.4, solid_capstyle="butt")
    axes.text(max(high, median) + 0.012 * widest, y, label, va="center")


def draw_to_quality(rows: list[Row]) -> Any:
    """Score over seconds of training, a line for each seed.

    A panel for each model, on the machine that measured it last.
    """
    models = to_quality.current(rows)
    names = list(dict.fromkeys(row["technique"] for runs in models.values() for row in runs))
    figure, panels = _panels(len(models), 5)
    for panel, (model, runs) in zip(panels, models.items(), strict=True):
        for row in runs:
            if row["error"]:
                continue
            seconds, scores = ([float(x) for x in row[k].split()] for k in ("at_s", "scores"))
            colour = COLOURS[names.index(row["technique"]) % len(COLOURS)]
            label = row["technique"] if row["round"] == "0" else None
            panel.plot(seconds, scores, color=colour, linewidth=1.3, label=label)
        panel.axhline(float(runs[-1]["level"]), linestyle=":", color=plt.rcParams["text.color"])
        machine = runs[-1]["cpu" if runs[-1]["device"] == "cpu" else "device"]
        panel.set(
            title=f"{model}, {machine}", xlabel="seconds of training", ylabel="validation score"
        )
        _finish(panel)
    return figure


def draw_sweep(rows: list[Row]) -> Any:
    """Speed-up over batch; a panel for each model and crop. Filled: the device is the limit."""
    curves = sweep.curves(rows)
    pairs = list(dict.fromkeys((model, crop) for model, _, crop in curves))
    names = list(dict.fromkeys(technique for _, technique, _ in curves))
    batches = sorted({batch for by_batch in curves.values() for batch in by_batch})
    figure, panels = _panels(len(pairs), 4, sharey=True)
    for panel, pair in zip(panels, pairs, strict=True):
        panel.axhline(1, color=GREY, linewidth=0.8, linestyle=":")
        for (model, technique, crop), by_batch in curves.items():
            points = [(b, s) for b, s in sorted(by_batch.items()) if s.speedup]
            if (model, crop) != pair or not points:
                continue
            colour = COLOURS[names.index(technique) % len(COLOURS)]
            ratios = [summary.speedup[0] for _, summary in points if summary.speedup]
            panel.plot([b for b, _ in points], ratios, color=colour, label=technique)
            for (batch, summary), ratio in zip(points, ratios, strict=True):
                face = colour if summary.device_limited else "none"
                panel.plot(batch, ratio, "o", color=colour, markerfacecolor=face)
        panel.set_xscale("log", base=2)
        panel.set_xticks(batches, batches)
        title = "{}, crops of {}".format(*pair)
        panel.set(title=title, xlabel="batch", ylabel="speed-up")
        _finish(panel)
    return figure


def _panels(count: int, width: float, **options: Any) -> tuple[Any, Any]:
    """A figure and `count` axes side by side, each `width` inches wide."""
    size = (width * count, 3.6)
    figure, axes = plt.subplots(
        1, count, figsize=size, layout="constrained", squeeze=False, **options
    )
    return figure, axes[0]


def _finish(panel: Any) -> None:
    if panel.get_legend_handles_labels()[1]:
        panel.legend(frameon=False, fontsize=8)
    panel.spines[["top", "right"]].set_visible(False)
