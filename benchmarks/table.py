"""From the results of `run.py`: the tables in the READMEs and the pictures beside them.

    python benchmarks/table.py
    python benchmarks/table.py --results runs/benchmark --print

    python benchmarks/table.py --results runs/benchmark_gpu --into runs/benchmark_gpu

Reads the newest measurement in each machine's `speed-<device>-<torch>.csv`. Everything between the
marks in a README is generated. A model's README shows the newest machine of each kind.
"""

import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.lib import plots, quality, sweep, to_quality
from benchmarks.lib.models import MODELS
from benchmarks.lib.readme import METHOD, README, RESULTS, markdown, read_rows, write_part
from benchmarks.lib.results import (
    SHARE,
    Row,
    Summary,
    cores_of,
    newest,
    shown_number,
    shown_speed,
    shown_speedup,
    summaries,
)
from benchmarks.lib.techniques import PLAIN, SHOWN
from common.cli import Parser, UserError, run

WHAT = ("speed", "quality", "to-quality", "sweep")  # is measured, each in files of its own
SHARE_NAME = "one DDP process, alone"
NONE = (
    "**GPU**: a first run on an H100 is in `benchmarks/LEDGER.md`; `make benchmark-gpu` fills this "
    "table."
)


def of_model(rows: list[Row], model: str, trained: Sequence[Row] = ()) -> str:
    """A model's techniques: speed, speed-up, parts of a step, memory, one-off cost, quality."""
    judged = quality.of_model(trained, model)
    head = ["technique", "images/s (p10 to p90; n)", "without loader", "speed-up (95 %)"]
    head += ["forward / backward / optimizer / data, ms", "memory, MiB", "start-up, s"]
    head += ["pays off after, steps"]
    if judged:
        score = next((row["name"] for row in judged if row["name"]), "score")
        seeds = len({row["round"] for row in judged})
        head.append(f"{score} after {judged[0]['max_steps']} steps, {seeds} seeds; loss difference")
    lines = []
    for summary in summaries(rows, model):
        if summary.error:
            error = summary.error.replace("|", "\\|")
            lines.append([summary.technique, f"failed: {error}", *[""] * (len(head) - 2)])
            continue
        low, median, high = map(shown_number, summary.speed)
        name = SHARE_NAME if summary.technique == SHARE else summary.technique
        cells = [name, f"{median} ({low} to {high}; {summary.steps})"]
        cells.append(shown_number(summary.without_loader) if summary.without_loader else "")
        cells += [shown_speedup(summary), _phases(summary), _memory(summary)]
        cells += [f"{summary.one_off:.1f}", _pays_after(summary)]
        cells += [quality.cell_of(judged, model, summary.technique)] * bool(judged)
        lines.append(cells)
    return markdown(head, lines)


def _phases(summary: Summary) -> str:
    ms = summary.ms or {}
    if "backward" not in ms:
        return f"{ms.get('captured', 0):.1f} in all / {ms.get('data', 0):.1f}"
    forward = ms.get("views", 0) + ms["forward"]
    return f"{forward:.1f} / {ms['backward']:.1f} / {ms['optimizer']:.1f} / {ms['data']:.1f}"


def _memory(summary: Summary) -> str:
    if summary.reserved is None:
        return f"{summary.memory:,.0f}"
    reserved = f"{summary.reserved:,.0f} reserved"
    if "captured" in (summary.ms or {}):  # to the allocator, the memory of a graph's step is free
        return reserved
    return f"{summary.memory:,.0f} ({reserved})"


def _pays_after(summary: Summary) -> str:
    if summary.speedup is None:
        return ""
    if summary.pays_after is None:
        return "never" if summary.speedup[0] <= 1 else "uncertain"
    return f"{summary.pays_after:,.0f}"


def machine_side(rows: list[Row]) -> str:
    """What a step costs the machine: FLOP, share of the peak, syncs, and DDP's scaling."""
    measured = by_model(rows)
    of_all = [summary for of in measured.values() for summary in of.values()]
    # A step that is faster than the matrix products shows that they do not measure the peak.
    is_peak = all((summary.mfu or 0) <= 1 for summary in of_all)

    def cell(summary: Summary | None) -> str:
        if summary is None:
            return ""
        parts = []
        if summary.mfu and is_peak:
            parts.append(f"{100 * summary.mfu:.0f} %")
        if summary.syncs is not None:
            parts.append(f"{summary.syncs} syncs")
        if summary.efficiency:
            parts.append(f"scaling {100 * summary.efficiency:.0f} %")
        return ", ".join(parts)

    plain = [of.get(PLAIN) for of in measured.values()]
    gflop = [f"{summary.gflop:.1f}" if summary and summary.gflop else "" for summary in plain]
    return _by_technique(measured, cell, (*SHOWN, SHARE), [["GFLOP per image", *gflop]])


def overview(rows: list[Row]) -> str:
    """Speed-ups of all models by the most common techniques, one technique per line."""
    return _by_technique(by_model(rows), shown_speed, SHOWN)


def by_model(rows: list[Row]) -> dict[str, dict[str, Summary]]:
    """Model → technique → summary."""
    measured = {model: {s.technique: s for s in summaries(rows, model)} for model in MODELS}
    return {model: techniques for model, techniques in measured.items() if techniques}


def _by_technique(
    measured: dict[str, dict[str, Summary]],
    cell: Callable[[Summary | None], str],
    techniques: Sequence[str],
    first: Sequence[list[str]] = (),
) -> str:
    """A table with a line for each of `techniques` that some model has, after the lines `first`."""
    names = dict.fromkeys(name for of in measured.values() for name in of if name in techniques)
    lines = [
        [SHARE_NAME if name == SHARE else name, *(cell(of.get(name)) for of in measured.values())]
        for name in names
    ]
    return markdown(["technique", *measured], [*first, *lines])


def heading(rows: list[Row]) -> str:
    """Where and how these rows were measured, in a sentence or two."""
    r = rows[0]
    where = r["device"] if r["device"] != "cpu" else cores_of(r)
    good = [row for row in rows if not row["error"]]
    rounds = len({row["round"] for row in good})
    kept = f"{r['steps']} steps after {r['warmup']} for warm-up, in each of {rounds} rounds"
    if rounds < 6:
        kept += " (with so few, an interval is the range)" if rounds > 1 else " (no interval)"
    plain = [row for row in rows if row["technique"] == PLAIN]
    backbones = dict.fromkeys(
        f"{row['model']} on {row['backbone']}" + f" (`{row['flags']}`)" * bool(row["flags"])
        for row in plain
    )
    batch = plain[0]["batch"]
    tiles = f" from {plain[0]['tiles']} tiles" * bool(plain[0]["tiles"])
    dirty = " **with uncommitted changes**" if "dirty" in r["commit"] else ""
    gpu = f", driver {r['driver']}, float32 convolutions in {r['float32']}" if r["driver"] else ""
    dry = "**A dry run, with stand-ins: its speeds mean nothing.** " * ("--dry-run" in r["command"])
    return (
        f"{dry}**{'CPU' if r['device'] == 'cpu' else 'GPU'}**: {where}{gpu}, torch {r['torch']}, "
        f"commit {r['commit']}{dirty}. {', '.join(backbones)}; {batch} crops of {r['crop']} pixels "
        f"a step{tiles}; {kept}."
    )


def results(folder: Path, what: str) -> dict[str, list[Row]]:
    """`<device>-<torch>` → the newest rows of its file, processors before GPUs."""
    newest_of = newest if what in ("speed", "quality") else list
    files = sorted(folder.glob(f"{what}-*.csv"))
    machines = {path.stem.removeprefix(f"{what}-"): newest_of(read_rows(path)) for path in files}
    return dict(sorted(machines.items(), key=lambda item: item[1][-1]["device"] != "cpu"))


def side_by_side(machines: dict[str, list[Row]]) -> str:
    """The common techniques on every machine: images/s of plain, speed-ups of the others."""
    measured = {name: by_model(rows) for name, rows in machines.items()}
    lines = []
    for technique, (machine, of) in product(SHOWN, measured.items()):
        cells = [shown_speed(of.get(model, {}).get(technique)) for model in MODELS]
        if any(cells):
            lines.append([technique, f"{machine}, {machines[machine][-1]['commit']}", *cells])
    return markdown(["technique", "on, commit", *MODELS], lines, "llr")


def parts(measured: dict[str, dict[str, list[Row]]]) -> dict[tuple[Path, str], str]:
    """All generated parts: (README, mark) → Markdown.

    Args:
        measured: Each of `WHAT` → the `results` of its files.
    """
    machines = measured["speed"]
    made: dict[tuple[Path, str], str] = {}
    for model in MODELS:
        blocks = [
            f"{heading(of)}\n\n{of_model(rows, model, measured['quality'].get(machine, ()))}"
            for machine, rows in plots.newest_of_kind(machines).items()
            if (of := [row for row in rows if row["model"] == model])
        ]
        picture = plots.shown(MODELS[model].picture, "images per second of each technique")
        shown = [picture] * bool(blocks)
        made[ROOT / model / "README.md", "benchmark"] = _blocks(shown + blocks, machines)
    sides = [f"{heading(rows)}\n\n{machine_side(rows)}" for rows in machines.values()]
    made[METHOD, "machine"] = _blocks(sides, machines)
    for what, tabled in (("to-quality", to_quality.table), ("sweep", sweep.table)):
        blocks = [
            f"**{name}**, commit {rows[-1]['commit']}, `{rows[-1]['command']}`\n\n{tabled(rows)}"
            for name, rows in measured[what].items()
        ]
        blocks += [plots.shown(what, f"the {what} curves")] * bool(blocks)
        made[README, what] = "\n\n".join(blocks) or "Not measured yet."
    made[README, "machines"] = side_by_side(machines)
    overviews = [f"{heading(rows)}\n\n{overview(rows)}" for rows in plots.in_front(machines)]
    made[ROOT / "README.md", "benchmark"] = _blocks(overviews, machines)
    return made


def _blocks(blocks: list[str], machines: dict[str, list[Row]]) -> str:
    gpu = any(rows[-1]["device"] != "cpu" for rows in machines.values())
    return "\n\n".join(blocks + ([] if gpu else [NONE]))


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder with speed-*.csv")
    parser.add_argument("--print", action="store_true", help="print instead of writing READMEs")
    parser.add_argument("--into", type=Path, help="folder for tables.md and pictures, not READMEs")
    args = parser.parse(argv)
    measured = {what: results(args.results, what) for what in WHAT}
    if not measured["speed"]:
        raise UserError(f"there is no speed-*.csv in {str(args.results)!r}; run run.py first.")
    written = parts(measured)
    printed = "\n\n".join(f"{path.relative_to(ROOT)}\n{t}" for (path, _), t in written.items())
    if args.print:
        return print(printed)
    if args.into:
        (args.into / "tables.md").write_text(f"{printed}\n")
    else:
        for (readme, name), text in written.items():
            write_part(readme, name, text)
    for path in plots.draw_all(measured, args.into or ROOT / "assets"):
        print(f"wrote {path}")


if __name__ == "__main__":
    run(main)
