"""Pictures of the benchmark: speed-ups of all models, curves to a quality, curves by batch."""

from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import pyplot as plt

from benchmarks.lib import sweep, to_quality
from benchmarks.lib.models import MODELS
from benchmarks.lib.results import Row, Summary, summaries
from benchmarks.lib.techniques import PLAIN
from common.io.files import whole_file

matplotlib.use("Agg")  # pictures are written, not shown
INK = "#222222"
BLUE, GREY, VERMILION = "#0072B2", "#A0A0A0", "#D55E00"  # Okabe and Ito's, and a grey
FRONT = "speed-ups"  # the picture of the front page
# Its bars, each over the one before.
LADDER = [PLAIN, "channels-last", "amp", "amp+channels-last", "amp+channels-last+cuda-graphs"]
LADDER.append("amp+channels-last+cuda-graphs+compile")
COLOURS = (GREY, BLUE, VERMILION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
# Each picture is drawn for light pages and for dark ones: suffix of its name, ink, paper, grid.
THEMES = (("", INK, "white", "#E5E5E5"), ("_dark", "#E6EDF3", "#0D1117", "#30363D"))


def draw_all(measured: dict[str, dict[str, list[Row]]], folder: Path) -> list[Path]:
    """`speed-ups.png`, on the newest GPU or else the newest CPU.

    Also `to-quality.png` of all machines and `sweep.png` of the last one.

    Args:
        measured: `speed`, `to-quality` and `sweep` → machine → its rows.
    """
    written = []
    if machines := in_front(measured["speed"]):
        speeds = partial(draw_speedups, newest_rows(machines))
        written += _write(folder / f"{FRONT}.png", speeds)
    trained = sorted(chain(*measured["to-quality"].values()), key=lambda row: row["when"])
    if trained:
        written += _write(folder / "to-quality.png", partial(draw_to_quality, trained))
    if measured["sweep"]:
        swept = list(measured["sweep"].values())[-1]
        written += _write(folder / "sweep.png", partial(draw_sweep, swept))
    return written


def newest_rows(machines: list[list[Row]]) -> list[Row]:
    """Those of the newest GPU, or else of the newest CPU."""
    return max(machines, key=lambda rows: (rows[-1]["device"] != "cpu", rows[-1]["when"]))


def newest_of_kind(machines: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """Machine → its rows, of each kind the machine measured last.

    The kinds are a processor, a processor whose instructions end at AVX2, and each GPU.
    """
    newest = {}
    for machine, rows in sorted(machines.items(), key=lambda item: item[1][-1]["when"]):
        newest[rows[-1]["device"], _ends_at_avx2(rows)] = machine
    return {machine: rows for machine, rows in machines.items() if machine in newest.values()}


def in_front(machines: dict[str, list[Row]]) -> list[list[Row]]:
    """The rows for the front page: the newest of each kind, but no processor of AVX2."""
    return [r for r in newest_of_kind(machines).values() if not _ends_at_avx2(r)]


def _ends_at_avx2(rows: list[Row]) -> bool:
    """Whether `machine.cpu` said so, of a processor without more or limited to it."""
    return rows[-1]["cpu"].endswith(" AVX2")


def shown(path: str, description: str) -> str:
    """HTML that shows a picture, in the theme of the page; `path` is without theme and ending."""
    light, dark = (f"{path}{suffix}.png" for suffix, *_ in THEMES)
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


def draw_speedups(rows: list[Row]) -> Any:
    """A group of bars for each model: the techniques of `LADDER`, with their interval or range."""
    measured = {model: {s.technique: s for s in summaries(rows, model)} for model in MODELS}
    measured = {model: of for model, of in measured.items() if PLAIN in of}
    names = [name for name in LADDER if any(name in of for of in measured.values())]
    figure, axes = plt.subplots(figsize=(9, 3.4), layout="constrained")
    width = 0.84 / max(1, len(names))
    for k, name in enumerate(names):
        colour = COLOURS[k % len(COLOURS)]
        axes.bar(0, 0, color=colour, label=name.replace("+", " + "))
        for x, of in enumerate(measured.values()):
            summary = of.get(name, Summary(name, "not measured"))
            if summary.error:
                continue
            ratio, low, high = summary.speedup or (1.0, 1.0, 1.0)
            left = x + (k - (len(names) - 1) / 2) * width
            axes.bar(left, ratio, 0.92 * width, color=colour)
            if summary.rounds > 1 and name != PLAIN:
                axes.plot(
                    [left, left], [low, high], color=plt.rcParams["text.color"], linewidth=1.2
                )
            label = f"{summary.speed:.3g}/s" if name == PLAIN else f"{ratio:.2f}"
            axes.text(left, max(high, ratio) + 0.03, label, ha="center", fontsize=9)
    axes.set_xticks(range(len(measured)), [MODELS[model].title for model in measured])
    axes.set_ylabel("speed-up over plain")
    axes.legend(
        frameon=False, fontsize=9, ncols=len(names), loc="lower left", bbox_to_anchor=(0, 1)
    )
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def draw_to_quality(rows: list[Row]) -> Any:
    """Score over seconds of training: the median of the seeds, and a band from least to most.

    A panel for each model and its tiles, on the machine that measured it last. A seed that has
    reached the level keeps its last score.
    """
    of_series = to_quality.current(rows)
    names = list(dict.fromkeys(row["technique"] for runs in of_series.values() for row in runs))
    figure, panels = _panels(len(of_series), 5)
    for panel, (series, runs) in zip(panels, of_series.items(), strict=True):
        curves: dict[str, list[list[list[float]]]] = {}
        for row in runs:
            if not row["error"]:
                of_seed = [[float(x) for x in row[k].split()] for k in ("at_s", "scores")]
                curves.setdefault(row["technique"], []).append(of_seed)
        for technique in filter(curves.get, names):  # in the same order in all panels
            seeds = curves[technique]
            until = np.linspace(0, max(seconds[-1] for seconds, _ in seeds), 200)
            scores = [np.interp(until, [0, *s], [0, *found]) for s, found in seeds]
            colour = COLOURS[names.index(technique) % len(COLOURS)]
            low, median, high = np.percentile(scores, [0, 50, 100], axis=0)
            panel.fill_between(until, low, high, color=colour, alpha=0.2, linewidth=0)
            panel.plot(until, median, color=colour, linewidth=1.6, label=technique)
        panel.axhline(float(runs[-1]["level"]), linestyle=":", color=plt.rcParams["text.color"])
        machine = runs[-1]["cpu" if runs[-1]["device"] == "cpu" else "device"]
        panel.set(
            title=f"{series}, {machine}", xlabel="seconds of training", ylabel="validation score"
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
