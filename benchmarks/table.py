"""From the results of `run.py`: the tables in the READMEs and the pictures beside them.

    python benchmarks/table.py
    python benchmarks/table.py --results runs/benchmark --print

Reads `speed_cpu.csv` and `speed_cuda.csv`, of each the newest measurement. Nothing between the
marks in a README is typed.
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
from common.cli import Parser, run

RESULTS = ROOT / "benchmarks/results"
SHARE_WORDS = "one of DDP's processes, alone"
KINDS = {"cpu": "CPU", "cuda": "GPU"}
NONE = (
    "**GPU**: none of this has been measured on a GPU yet. `make benchmark-gpu` fills this table "
    "on a machine that has one."
)


def models(rows: list[Row]) -> list[str]:
    return [name for name in MODELS if any(row["model"] == name for row in rows)]


def of_model(rows: list[Row], model: str, trained: list[Row] | None = None) -> str:
    """A model's techniques: speed, speed-up, parts of a step, memory, one-off cost, quality."""
    judged = quality.of_model(trained or [], model)
    lines = [
        "| technique | images/s (p10 to p90; n) | speed-up (95 %) | forward / backward / "
        "optimizer / data, ms | memory, MiB | one-off, s | pays after, steps |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    if judged:
        score = next((row["name"] for row in judged if row["name"]), "score")
        seeds = len({row["round"] for row in judged})
        lines[0] += f" {score} after {judged[0]['max_steps']} steps, {seeds} seeds; losses apart |"
        lines[1] += "--:|"
    for one in summaries(rows, model):
        if one.error:
            lines.append(f"| {one.technique} | failed: {_cell(one.error)} | | | | | |")
            continue
        low, median, high = one.speed
        speed = f"{_number(median)} ({_number(low)} to {_number(high)}; {one.steps})"
        name = SHARE_WORDS if one.technique == SHARE else one.technique
        cells = [name, speed, _speedup(one), _phases(one)]
        memory = f"{one.memory:,.0f}"
        if one.reserved is not None:
            memory += f" ({one.reserved:,.0f} reserved)"
        cells += [memory, f"{one.one_off:.1f}", _pays(one)]
        cells += [quality.cell_of(judged, model, one.technique)] * bool(judged)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def machine_side(rows: list[Row]) -> str:
    """What a step asks of the machine: FLOP, share of the peak, syncs, and DDP's scaling."""
    of = _by_technique(rows)
    gflop = (f"{o['plain'].gflop:.1f}" if "plain" in o and o["plain"].gflop else "" for o in of)
    lines = [f"| technique | {' | '.join(models(rows))} |", "|---|" + "--:|" * len(of)]
    lines.append(f"| GFLOP per image | {' | '.join(gflop)} |")
    for name in dict.fromkeys(name for found in of for name in found):
        cells = []
        for one in (found.get(name) for found in of):
            words = []
            if one and one.mfu:
                words.append(f"{100 * one.mfu:.0f} %")
            if one and one.syncs is not None:
                words.append(f"{one.syncs} syncs")
            if one and one.efficiency:
                words.append(f"scaling {100 * one.efficiency:.0f} %")
            cells.append(", ".join(words))
        lines.append(f"| {SHARE_WORDS if name == SHARE else name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _by_technique(rows: list[Row]) -> list[dict[str, Summary]]:
    """Of each of `models`."""
    return [{one.technique: one for one in summaries(rows, model)} for model in models(rows)]


def overview(rows: list[Row]) -> str:
    """Speed-ups of all models by what most people would switch on, a technique a line."""
    of = _by_technique(rows)
    lines = [f"| technique | {' | '.join(models(rows))} |", "|---|" + "--:|" * len(of)]
    for name in dict.fromkeys(name for found in of for name in found if name in SHOWN):
        cells = []
        for one in (found.get(name) for found in of):
            if one is None:
                cells.append("")
            elif name == "plain" and not one.error:
                cells.append(f"{_number(one.speed[1])} images/s")
            else:
                cells.append("failed" if one.error else _speedup(one))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ceilings() -> str:
    """Images/s that no training on these GPUs can exceed, from the FLOP that `scale.py` counted."""
    rows = {(r["model"], r["gpu"]): r for r in read_rows(RESULTS / "scale.csv")}
    gpus = list(dict.fromkeys(gpu for _, gpu in rows))
    lines = [f"| model, crops of 512 pixels | GFLOP per image | {' | '.join(gpus)} |"]
    lines.append("|---|--:|" + "--:|" * len(gpus))
    for name in dict.fromkeys(model for model, _ in rows):
        of = [rows[name, gpu] for gpu in gpus]
        gflop = float(of[0]["forward_gflop"]) + float(of[0]["backward_gflop"])
        speeds = (f"{1e3 * float(r['peak_tflops']) / gflop:,.0f}" for r in of)
        lines.append(f"| {name} | {gflop:,.0f} | {' | '.join(speeds)} |")
    return "\n".join(lines)


def heading(rows: list[Row]) -> str:
    """Where and how these rows were measured, in a sentence or two."""
    r = rows[0]
    where = r["device"] if r["device"] != "cpu" else f"{r['cores']} cores of {r['cpu']}"
    good = [row for row in rows if not row["error"]]
    rounds = len({row["round"] for row in good})
    kept = f"{r['steps']} steps after {r['warmup']}, in each of {rounds} rounds"
    if rounds < 6:
        kept += " (so few that an interval is their range)" if rounds > 1 else " (no interval)"
    plain = [row for row in rows if row["technique"] == "plain"]
    backbones = dict.fromkeys(
        f"{row['model']} on {row['backbone']}" + f" (`{row['flags']}`)" * bool(row["flags"])
        for row in plain
    )
    batch = plain[0]["batch"]
    dirty = "; **the tree had changes**" if "dirty" in r["commit"] else ""
    gpu = f", driver {r['driver']}, float32 convolutions in {r['float32']}" if r["driver"] else ""
    return (
        f"**{'CPU' if r['device'] == 'cpu' else 'GPU'}**: {where}{gpu}, torch {r['torch']}, commit "
        f"{r['commit']}{dirty}. {', '.join(backbones)}; {batch} crops of {r['crop']} pixels a "
        f"step; {kept}."
    )


def _phases(one: Summary) -> str:
    ms = one.ms or {}
    if "backward" not in ms:
        return f"{ms.get('captured', 0):.1f} in all / {ms.get('data', 0):.1f}"
    forward = ms.get("views", 0) + ms["forward"]
    return f"{forward:.1f} / {ms['backward']:.1f} / {ms['optimizer']:.1f} / {ms['data']:.1f}"


def _speedup(one: Summary) -> str:
    if one.speedup is None:
        return ""
    median, low, high = one.speedup
    return f"{median:.2f}" + (f" ({low:.2f} to {high:.2f})" if one.rounds > 1 else "")


def _pays(one: Summary) -> str:
    if one.speedup is None:
        return ""
    if one.pays_after is None:
        return "never" if one.speedup[0] <= 1 else "uncertain"
    return f"{one.pays_after:,.0f}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def results(folder: Path, what: str = "speed") -> dict[str, list[Row]]:
    """Newest rows by kind of device, of those that are there."""
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
    for (readme, name), text in parts(found, results(args.results, "quality")).items():
        if args.print:
            print(f"{readme.relative_to(ROOT)}\n{text}\n")
        else:
            write_part(readme, name, text)
    if not args.print:
        for path in plots.draw_all(found, ROOT / "assets"):
            print(f"wrote {path}")


if __name__ == "__main__":
    run(main)
