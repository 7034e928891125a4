"""Pictures of the benchmark: a bar for each technique, and what more processes bring."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.lib.results import SHARE, Row, Summary, summaries
from common.io.files import whole_file
from common.run.log import BLUE, INK, plt

GREY, VERMILION = "#A0A0A0", "#D55E00"  # with BLUE of Okabe and Ito's palette
# Each picture is drawn for light pages and for dark ones: suffix of its name, ink, paper, grid.
THEMES = (("", INK, "white", "#E5E5E5"), ("_dark", "#E6EDF3", "#0D1117", "#30363D"))
STYLES = ((BLUE, "o"), (VERMILION, "s"), ("#009E73", "D"), ("#CC79A7", "^"))
NAMES = {"fcn": "fcn", "DeepLabV3": "deeplab", "unet": "unet", "mask": "mask"}


def draw_all(found: dict[str, list[Row]], folder: Path) -> list[Path]:
    """`<model>_benchmark.png` of each model that was measured; from a GPU's rows if there are."""
    rows = found.get("cuda") or found.get("cpu") or []
    written = []
    for model, name in NAMES.items():
        bars = [o for o in summaries(rows, model) if not o.error and o.technique != SHARE]
        if bars:
            row = next(r for r in rows if r["model"] == model)
            written += _write(folder / f"{name}_benchmark.png", partial(draw, bars, model, row))
    efficiencies = {
        model: one.efficiency
        for model in NAMES
        for one in summaries(rows, model)
        if one.technique == "ddp" and one.efficiency
    }
    if efficiencies:
        row = next(row for row in rows if row["technique"] == "ddp" and not row["error"])
        written += _write(folder / "scaling.png", partial(draw_scaling, efficiencies, row))
    return written


def shown(name: str, words: str) -> str:
    """What shows a picture of `assets` in the README of a folder: the one for the page's theme."""
    light, dark = (f"../assets/{name}{suffix}.png" for suffix, *_ in THEMES)
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img alt="{words}" src="{light}"></picture>'
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


def draw_scaling(efficiencies: dict[str, float], row: Row) -> Any:
    """Measured at the world size of `row`; beyond, the loss grows as a ring all-reduce's bytes do.

    N processes send 2(N-1)/N of the gradients each. What `world` of them lost to it, and to
    whatever else they share, is taken in this proportion for more.
    """
    world = int(row["world"])
    sizes = [n for n in (1, 2, 4, 8, 16, 32, 64) if n == 1 or n >= world]
    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    axes.plot(sizes, sizes, color=GREY, linestyle=":", label="ideal")
    for (model, efficiency), style in zip(efficiencies.items(), STYLES, strict=False):
        lost = (1 / efficiency - 1) / ((world - 1) / world)
        modelled = [n / (1 + lost * (n - 1) / n) for n in sizes]
        colour, marker = style
        axes.plot(sizes, modelled, color=colour, linestyle="--", linewidth=1)
        words = f"{model}, {100 * efficiency:.0f} % at {world}"
        measured = [1, world * efficiency]
        axes.plot([1, world], measured, marker, color=colour, markersize=8, label=words)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    ticks = list(map(str, sizes))
    axes.set_xticks(sizes, ticks)
    axes.set_yticks(sizes, ticks)
    each = "a GPU" if row["device"] != "cpu" else f"{row['threads']} of the cores"
    axes.set(xlabel=f"processes, with {each} each", ylabel="speed, of one process")
    title = "marks: measured; dashed: computed from them, not measured"
    axes.set_title(f"DDP on {_where(row)}\n{title}", loc="left", fontsize=11)
    axes.grid()
    axes.legend(frameon=False)
    axes.spines[:].set_visible(False)
    return figure


def _where(row: Row) -> str:
    return row["device"] if row["device"] != "cpu" else f"CPU, {row['cores']} cores of {row['cpu']}"


def draw(bars: list[Summary], model: str, row: Row) -> Any:
    """Blue is surely faster than plain, vermilion surely slower, grey neither."""
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.36 * len(bars)), layout="constrained")
    widest = max(one.speed[2] for one in bars)
    for y, one in enumerate(bars):
        _bar(axes, y, one, widest)
    axes.set_yticks(range(len(bars)), [one.technique for one in bars])
    axes.set(xlim=(0, 1.45 * widest), ylim=(len(bars) - 0.5, -0.5))
    axes.set_xlabel(
        "images per second (bar: median, line: 10th to 90th percentile of steps)\n"
        "blue: surely faster than plain, orange: surely slower"
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


def _bar(axes: Any, y: int, one: Summary, widest: float) -> None:
    low, median, high = one.speed
    colour, words = GREY, f"{median:.3g}"
    if one.speedup is not None:
        ratio, least, most = one.speedup
        words += f"   ×{ratio:.2f}"
        if one.rounds > 1:
            words += f" ({least:.2f} to {most:.2f})"
            colour = BLUE if least > 1 else VERMILION if most < 1 else GREY
    axes.barh(y, median, 0.66, color=colour)
    ink = plt.rcParams["text.color"]
    axes.plot([low, high], [y, y], color=ink, linewidth=1.4, solid_capstyle="butt")
    axes.text(max(high, median) + 0.012 * widest, y, words, va="center")
