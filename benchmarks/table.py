"""From the results of `run.py`: the tables in the READMEs and the pictures beside them.

    python benchmarks/table.py
    python benchmarks/table.py --results runs/benchmark --print

Reads the newest measurement in `speed_cpu.csv` and in `speed_cuda.csv`. Everything between the
marks in a README is generated.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.lib import plots, quality
from benchmarks.lib.models import MODELS
from benchmarks.lib.readme import README, read_rows, write_part
from benchmarks.lib.results import SHARE, Row, Summary, newest, summaries
from benchmarks.lib.techniques import SHOWN
from common.cli import Parser, UserError, run

RESULTS = ROOT / "benchmarks/results"
SHARE_WORDS = "one DDP process, alone"
KINDS = {"cpu": "CPU", "cuda": "GPU"}
NONE = "**GPU**: not measured yet. `make benchmark-gpu` fills this table on a machine with a GPU."


def models(rows: list[Row]) -> list[str]:
    return [name for name in MODELS if any(row["model"] == name for row in rows)]


def of_model(rows: list[Row], model: str, trained: list[Row] | None = None) -> str:
    """A model's techniques: speed, speed-up, parts of a step, memory, one-off cost, quality."""
    judged = quality.of_model(trained or [], model)
    lines = [
        "| technique | images/s (p10 to p90; n) | speed-up (95 %) | forward / backward / "
        "optimizer / data, ms | memory, MiB | start-up, s | pays off after, steps |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    if judged:
        score = next((row["name"] for row in judged if row["name"]), "score")
        seeds = len({row["round"] for row in judged})
        lines[0] += (
            f" {score} after {judged[0]['max_steps']} steps, {seeds} seeds; loss difference |"
        )
        lines[1] += "--:|"
    for summary in summaries(rows, model):
        if summary.error:
            lines.append(f"| {summary.technique} | failed: {_cell(summary.error)} | | | | | |")
            continue
        low, median, high = summary.speed
        speed = f"{_number(median)} ({_number(low)} to {_number(high)}; {summary.steps})"
        name = SHARE_WORDS if summary.technique == SHARE else summary.technique
        cells = [name, speed, _speedup(summary), _phases(summary)]
        memory = f"{summary.memory:,.0f}"
        if summary.reserved is not None:
            memory += f" ({summary.reserved:,.0f} reserved)"
        cells += [memory, f"{summary.one_off:.1f}", _pays(summary)]
        cells += [quality.cell_of(judged, model, summary.technique)] * bool(judged)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def machine_side(rows: list[Row]) -> str:
    """What a step costs the machine: FLOP, share of the peak, syncs, and DDP's scaling."""
    measured = _by_technique(rows)
    gflop = (
        f"{techniques['plain'].gflop:.1f}"
        if "plain" in techniques and techniques["plain"].gflop
        else ""
        for techniques in measured
    )
    lines = [f"| technique | {' | '.join(models(rows))} |", "|---|" + "--:|" * len(measured)]
    lines.append(f"| GFLOP per image | {' | '.join(gflop)} |")
    for name in dict.fromkeys(name for techniques in measured for name in techniques):
        cells = []
        for summary in (techniques.get(name) for techniques in measured):
            parts = []
            if summary and summary.mfu:
                parts.append(f"{100 * summary.mfu:.0f} %")
            if summary and summary.syncs is not None:
                parts.append(f"{summary.syncs} syncs")
            if summary and summary.efficiency:
                parts.append(f"scaling {100 * summary.efficiency:.0f} %")
            cells.append(", ".join(parts))
        lines.append(f"| {SHARE_WORDS if name == SHARE else name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _by_technique(rows: list[Row]) -> list[dict[str, Summary]]:
    """For each of `models`: technique → summary."""
    return [{s.technique: s for s in summaries(rows, model)} for model in models(rows)]


def overview(rows: list[Row]) -> str:
    """Speed-ups of all models by the most common techniques, one technique per line."""
    measured = _by_technique(rows)
    lines = [f"| technique | {' | '.join(models(rows))} |", "|---|" + "--:|" * len(measured)]
    for name in dict.fromkeys(
        name for techniques in measured for name in techniques if name in SHOWN
    ):
        cells = []
        for summary in (techniques.get(name) for techniques in measured):
            if summary is None:
                cells.append("")
            elif name == "plain" and not summary.error:
                cells.append(f"{_number(summary.speed[1])} images/s")
            else:
                cells.append("failed" if summary.error else _speedup(summary))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ceilings() -> str:
    """Images/s that no training on these GPUs can exceed, from the FLOP that `scale.py` counted."""
    rows = {(r["model"], r["gpu"]): r for r in read_rows(RESULTS / "scale.csv")}
    gpus = list(dict.fromkeys(gpu for _, gpu in rows))
    lines = [f"| model, crops of 512 pixels | GFLOP per image | {' | '.join(gpus)} |"]
    lines.append("|---|--:|" + "--:|" * len(gpus))
    for name in dict.fromkeys(model for model, _ in rows):
        on_gpus = [rows[name, gpu] for gpu in gpus]
        gflop = float(on_gpus[0]["forward_gflop"]) + float(on_gpus[0]["backward_gflop"])
        speeds = (f"{1e3 * float(r['peak_tflops']) / gflop:,.0f}" for r in on_gpus)
        lines.append(f"| {name} | {gflop:,.0f} | {' | '.join(speeds)} |")
    return "\n".join(lines)


def heading(rows: list[Row]) -> str:
    """Where and how these rows were measured, in a sentence or two."""
    r = rows[0]
    where = r["device"] if r["device"] != "cpu" else f"{r['cores']} cores of {r['cpu']}"
    good = [row for row in rows if not row["error"]]
    rounds = len({row["round"] for row in good})
    kept = f"{r['steps']} steps after {r['warmup']} for warm-up, in each of {rounds} rounds"
    if rounds < 6:
        kept += " (with so few, an interval is the range)" if rounds > 1 else " (no interval)"
    plain = [row for row in rows if row["technique"] == "plain"]
    backbones = dict.fromkeys(
        f"{row['model']} on {row['backbone']}" + f" (`{row['flags']}`)" * bool(row["flags"])
        for row in plain
    )
    batch = plain[0]["batch"]
    dirty = " **with uncommitted changes**" if "dirty" in r["commit"] else ""
    gpu = f", driver {r['driver']}, float32 convolutions in {r['float32']}" if r["driver"] else ""
    return (
        f"**{'CPU' if r['device'] == 'cpu' else 'GPU'}**: {where}{gpu}, torch {r['torch']}, commit "
        f"{r['commit']}{dirty}. {', '.join(backbones)}; {batch} crops of {r['crop']} pixels a "
        f"step; {kept}."
    )


def _phases(summary: Summary) -> str:
    ms = summary.ms or {}
    if "backward" not in ms:
        return f"{ms.get('captured', 0):.1f} in all / {ms.get('data', 0):.1f}"
    forward = ms.get("views", 0) + ms["forward"]
    return f"{forward:.1f} / {ms['backward']:.1f} / {ms['optimizer']:.1f} / {ms['data']:.1f}"


def _speedup(summary: Summary) -> str:
    if summary.speedup is None:
        return ""
    median, low, high = summary.speedup
    return f"{median:.2f}" + (f" ({low:.2f} to {high:.2f})" if summary.rounds > 1 else "")


def _pays(summary: Summary) -> str:
    if summary.speedup is None:
        return ""
    if summary.pays_after is None:
        return "never" if summary.speedup[0] <= 1 else "uncertain"
    return f"{summary.pays_after:,.0f}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def results(folder: Path, what: str = "speed") -> dict[str, list[Row]]:
    """Kind of device → its newest rows, for the files that exist."""
    files = {kind: folder / f"{what}_{kind}.csv" for kind in KINDS}
    return {kind: newest(read_rows(path)) for kind, path in files.items() if path.is_file()}


def parts(
    found: dict[str, list[Row]], trained: dict[str, list[Row]]
) -> dict[tuple[Path, str], str]:
    """All generated parts: (README, mark) → Markdown."""
    made: dict[tuple[Path, str], str] = {}
    for model in MODELS:
        blocks = [
            f"{heading([r for r in rows if r['model'] == model])}\n\n"
            f"{of_model(rows, model, trained.get(kind))}"
            for kind, rows in found.items()
            if model in models(rows)
        ]
        picture = plots.shown(MODELS[model].picture, "images per second of each technique")
        shown = [picture] * bool(blocks)
        made[ROOT / model / "README.md", "benchmark"] = _blocks(shown + blocks, found)
    sides = [f"{heading(rows)}\n\n{machine_side(rows)}" for rows in found.values()]
    made[README, "machine"] = _blocks(sides, found)
    made[README, "ceilings"] = ceilings()
    overviews = [f"{heading(rows)}\n\n{overview(rows)}" for rows in found.values()]
    made[ROOT / "README.md", "benchmark"] = _blocks(overviews, found)
    return made


def _blocks(blocks: list[str], found: dict[str, list[Row]]) -> str:
    return "\n\n".join(blocks + ([] if "cuda" in found else [NONE]))


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder with speed_*.csv")
    parser.add_argument("--print", action="store_true", help="print instead of writing READMEs")
    args = parser.parse(argv)
    found = results(args.results)
    written = parts(found, results(args.results, "quality"))
    for readme, name in written:  # before the first is written
        if not readme.is_file() or f"<!-- /{name} -->" not in readme.read_text():
            raise UserError(
                f"{str(readme)!r} has no place for the table; put the lines <!-- {name} --> and "
                f"<!-- /{name} --> into it."
            )
    for (readme, name), text in written.items():
        if args.print:
            print(f"{readme.relative_to(ROOT)}\n{text}\n")
        else:
            write_part(readme, name, text)
    if not args.print:
        for path in plots.draw_all(found, ROOT / "assets"):
            print(f"wrote {path}")


if __name__ == "__main__":
    run(main)
