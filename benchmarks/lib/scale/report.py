"""The tables and the picture of `scale.py`, from its CSV alone."""

from pathlib import Path
from typing import Any

from matplotlib.patches import Patch

from benchmarks.lib.plots import BLUE, INK, plt
from common.io.files import whole_file

Row = dict[str, str]

VERMILION, SKY = "#D55E00", "#56B4E9"  # BLUE's neighbours in Okabe and Ito's palette
FORWARD, BACKWARD = "#D9D9D9", "#A0A0A0"
TIMELINE = ("fcn-resnet50", "A100")  # its three bandwidths show the three cases
MARKS = {"25": (VERMILION, "o"), "100": (SKY, "s"), "400": (BLUE, "D")}  # by Gbit/s


def tables(rows: list[Row]) -> str:
    """Two tables in Markdown: what each model sends, and what that costs on each GPU."""
    r = rows[0]
    lines = [
        "| model | parameters, M | GFLOP per image, forward + backward | FLOP per parameter "
        "| MB all-reduced | buckets, MB in order | `broadcast_buffers` would add "
        "| SyncBatchNorm would add |",
        "|---|--:|--:|--:|--:|---|--:|--:|",
    ]
    for m in _unique(rows, "model"):
        buckets = [f"{int(size) / 1e6:.1f}" for size in m["bucket_bytes"].split()]
        forward, backward = float(m["forward_gflop"]), float(m["backward_gflop"])
        lines.append(
            f"| {m['model']} | {int(m['parameters']) / 1e6:.1f} "
            f"| {forward:,.0f} + {backward:,.0f} "
            f"| {(forward + backward) * 1e9 / int(m['parameters']):,.0f} "
            f"| {int(m['bytes']) / 1e6:.1f} | {', '.join(buckets)} "
            f"| {m['broadcast_buffers_broadcasts']} broadcasts, "
            f"{int(m['broadcast_buffers_bytes']) / 1e3:.0f} kB "
            f"| {m['sync_bn_collectives']} collectives, {int(m['sync_bn_bytes']) / 1e6:.0f} MB |"
        )
    links = " / ".join(g["gbit_per_s"] for g in _unique(rows, "gbit_per_s"))
    lines += [
        "",
        f"*Computed, not measured*: world size {r['world_size']}, {r['batch_size']} tiles per GPU, "
        f"{_percent(r, 'utilisation')} % of the GPU's bf16 peak (assumed), {r['alpha_us']} µs per "
        f"message (assumed). Cells with three values are for {links} Gbit/s per GPU.",
        "",
        "| GPU | model | step, ms | all-reduces, ms | exposed, ms | scaling efficiency, % "
        "| with bf16 compression, % | hidden from batch | `--grad-accum` for 99 % |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for pair in _unique(rows, "gpu", "model"):
        same = [row for row in rows if (row["gpu"], row["model"]) == (pair["gpu"], pair["model"])]
        cells = [f"{float(pair['step_ms']):.1f}"]
        for key in ("tree_ms", "exposed_ms"):
            cells.append(" / ".join(f"{float(row[key]):.1f}" for row in same))
        for key in ("efficiency", "efficiency_bf16"):
            cells.append(" / ".join(_percent(row, key) for row in same))
        for key in ("hidden_from_batch", "grad_accum_for_99"):
            cells.append(" / ".join(row[key] for row in same))
        lines.append(f"| {pair['gpu']} | {pair['model']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _unique(rows: list[Row], *keys: str) -> list[Row]:
    """The first row of each value of `keys`, sorted by the first key where there are several."""
    first: dict[tuple[str, ...], Row] = {}
    for row in rows:
        first.setdefault(tuple(row[key] for key in keys), row)
    chosen = list(first.values())
    return sorted(chosen, key=lambda row: row[keys[0]]) if len(keys) > 1 else chosen


def draw(rows: list[Row], path: Path) -> None:
    """A step's timeline at each bandwidth, and below it every model's efficiency on each GPU."""
    r = rows[0]
    with plt.rc_context({"text.color": INK, "font.size": 9.5, "legend.frameon": False}):
        figure = plt.figure(figsize=(10, 8), layout="constrained")
        grid = figure.add_gridspec(3, 2, height_ratios=(0.16, 1, 1.05), hspace=0.06)
        head = figure.add_subplot(grid[0, :])
        head.axis("off")
        title = f"What DDP over {r['world_size']} GPUs waits for: computed, not measured"
        head.text(0, 0.9, title, fontsize=14, weight="bold", va="top")
        assumed = (
            f"{r['batch_size']} tiles of 512 pixels per GPU. Assumed: "
            f"{_percent(r, 'utilisation')} % of the bf16 peak, tree all-reduce, "
            f"{r['alpha_us']} µs per message, a link per GPU."
        )
        head.text(0, 0, assumed)
        pair = [row for row in rows if (row["model"], row["gpu"]) == TIMELINE]
        _timeline(figure.add_subplot(grid[1, :]), pair or rows[: len(MARKS)])
        for column, row in enumerate(_unique(rows, "gpu")):
            axes = figure.add_subplot(grid[2, column])
            _efficiency(axes, [other for other in rows if other["gpu"] == row["gpu"]])
            axes.set_title(f"{row['gpu']}: scaling efficiency, %", loc="left", pad=8)
            axes.tick_params(axis="y", labelleft=column == 0)
        with whole_file(path) as file:
            figure.savefig(file, format="png", dpi=120)
    plt.close(figure)


def _timeline(axes: Any, rows: list[Row]) -> None:
    """Two bars for each row: what the GPU computes and, under it, what the network sends."""
    step, backward = float(rows[0]["step_ms"]), float(rows[0]["backward_ms"])
    forward, ends = step - backward, []

    def bar(y: float, left: float, width: float, colour: str) -> None:
        axes.barh(y, width, 0.36, left, color=colour, edgecolor="white", linewidth=0.8)

    for y, row in enumerate(rows):
        bar(y - 0.2, 0, forward, FORWARD)
        bar(y - 0.2, forward, backward, BACKWARD)
        at = 0.0
        for share, ms in zip(row["bucket_ready"].split(), row["bucket_ms"].split(), strict=True):
            at, cost = max(at, forward + float(share) * backward), float(ms)
            hidden = min(cost, max(0.0, step - at))
            bar(y + 0.18, at, hidden, BLUE)
            bar(y + 0.18, at + hidden, cost - hidden, VERMILION)
            at += cost
        ends.append(at)
        label = (
            f"{float(row['exposed_ms']):.1f} ms exposed, {_percent(row, 'efficiency')} % efficient"
        )
        axes.text(at + 0.01 * step, y + 0.18, label, va="center")
    axes.axvline(step, color=INK, linewidth=1, linestyle=":")
    axes.set_yticks(range(len(rows)), [f"{row['gbit_per_s']} Gbit/s" for row in rows])
    axes.set(xlim=(0, 1.36 * max(ends)), ylim=(len(rows) - 0.5, -0.5))
    axes.set_xlabel("ms since the step began")
    title = (
        f"One step of {rows[0]['model']} on {rows[0]['gpu']}s, and the all-reduce of each bucket"
    )
    axes.set_title(title, loc="left", pad=24)
    named = {"forward": FORWARD, "backward": BACKWARD, "all-reduce, hidden": BLUE}
    named["all-reduce, exposed"] = VERMILION
    patches = [Patch(color=colour, label=name) for name, colour in named.items()]
    axes.legend(handles=patches, loc="lower left", bbox_to_anchor=(-0.01, 0.98), ncols=len(named))
    _plain(axes)


def _efficiency(axes: Any, rows: list[Row]) -> None:
    models = [row["model"] for row in _unique(rows, "model")]
    for y, model in enumerate(models):
        points = [100 * float(row["efficiency"]) for row in rows if row["model"] == model]
        axes.plot([min(points), max(points)], [y, y], color=FORWARD, linewidth=3, zorder=1)
    for gbit, (colour, marker) in MARKS.items():
        chosen = [row for row in rows if row["gbit_per_s"] == gbit]
        points = [100 * float(row["efficiency"]) for row in chosen]
        where = [models.index(row["model"]) for row in chosen]
        style = {"edgecolor": "white", "linewidth": 0.8, "zorder": 2, "clip_on": False}
        axes.scatter(points, where, 75, colour, marker, label=f"{gbit} Gbit/s", **style)
    axes.set_yticks(range(len(models)), models)
    axes.set(xlim=(0, 100), ylim=(len(models) - 0.5, -0.5))
    axes.grid(axis="x", color="#E5E5E5")
    axes.set_axisbelow(True)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.09), ncols=3, columnspacing=1.2)
    _plain(axes)


def _percent(row: Row, key: str) -> str:
    """Never rounded up to a whole 100."""
    percent = 100 * float(row[key])
    return f"{percent:.0f}" if percent < 99.5 or percent == 100 else f"{percent:.1f}"


def _plain(axes: Any) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False, colors=INK)
