"""Pictures of the benchmark: a bar for each technique, and what more processes bring."""

import os
from pathlib import Path
from typing import Any

from benchmarks.rows import SHARE, Row, Summary, summaries
from common.overlay import BLUE, INK, plt

GREY, VERMILION = "#A0A0A0", "#D55E00"  # with BLUE of Okabe and Ito's palette
STYLES = ((BLUE, "o"), (VERMILION, "s"), ("#009E73", "D"), ("#CC79A7", "^"))
NAMES = {"fcn": "fcn", "DeepLabV3": "deeplab", "unet": "unet", "mask": "mask"}


def draw_all(found: dict[str, list[Row]], folder: Path) -> list[Path]:
    """`<model>_benchmark.png` of each model that was measured; from a GPU's rows if there are."""
    rows = found.get("cuda") or found.get("cpu") or []
    written = []
    for model, name in NAMES.items():
        shown = [o for o in summaries(rows, model) if not o.error and o.technique != SHARE]
        if shown:
            written.append(folder / f"{name}_benchmark.png")
            draw(shown, model, [r for r in rows if r["model"] == model], written[-1])
    efficiencies = {
        model: one.efficiency
        for model in NAMES
        for one in summaries(rows, model)
        if one.technique == "ddp" and one.efficiency
    }
    if efficiencies:
        world = max(int(row["world"]) for row in rows)
        written.append(folder / "scaling.png")
        draw_scaling(efficiencies, world, rows, written[-1])
    return written


def draw_scaling(efficiencies: dict[str, float], world: int, rows: list[Row], path: Path) -> None:
    """Measured at `world` processes; beyond, the loss grows as a ring all-reduce's bytes do.

    N processes send 2(N-1)/N of the gradients each. What `world` of them lost to it, and to
    whatever else they share, is taken in this proportion for more.
    """
    sizes = [n for n in (1, 2, 4, 8, 16, 32, 64) if n == 1 or n >= world]
    with plt.rc_context({"text.color": INK, "font.size": 10}):
        figure, axes = plt.subplots(figsize=(7, 5), layout="constrained", facecolor="white")
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
        axes.set(xlabel="processes", ylabel="speed, of one process")
        axes.set_title(
            f"DDP on {_where(rows[0])}\nmarks: measured; dashed: computed from them, not measured",
            loc="left",
            fontsize=11,
        )
        axes.grid(color="#E5E5E5")
        axes.legend(frameon=False)
        axes.spines[:].set_visible(False)
        _save(figure, path)


def _where(row: Row) -> str:
    return row["device"] if row["device"] != "cpu" else f"CPU, {row['cores']} cores of {row['cpu']}"


def _save(figure: Any, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)
    temporary.replace(path)


def draw(shown: list[Summary], model: str, rows: list[Row], path: Path) -> None:
    """Blue is surely faster than plain, vermilion surely slower, grey neither."""
    r = rows[0]
    where = _where(r)
    with plt.rc_context({"text.color": INK, "font.size": 10}):
        figure, axes = plt.subplots(
            figsize=(9, 1.5 + 0.36 * len(shown)), layout="constrained", facecolor="white"
        )
        widest = max(one.speed[2] for one in shown)
        for y, one in enumerate(shown):
            _bar(axes, y, one, widest)
        axes.set_yticks(range(len(shown)), [one.technique for one in shown])
        axes.set(xlim=(0, 1.45 * widest), ylim=(len(shown) - 0.5, -0.5))
        axes.set_xlabel(
            "images per second (bar: median, line: 10th to 90th percentile of steps)\n"
            "blue: surely faster than plain, orange: surely slower"
        )
        axes.set_title(
            f"Training {model} on {r['backbone']}, crops of {r['crop']} pixels\n"
            f"{where}, torch {r['torch']}",
            loc="left",
            fontsize=11,
        )
        axes.grid(axis="x", color="#E5E5E5")
        axes.set_axisbelow(True)
        axes.tick_params(length=0, colors=INK)
        axes.spines[:].set_visible(False)
        _save(figure, path)


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
    axes.plot([low, high], [y, y], color=INK, linewidth=1.4, solid_capstyle="butt")
    axes.text(max(high, median) + 0.012 * widest, y, words, va="center")
