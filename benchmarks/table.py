"""From the results of `run.py`: the tables in the READMEs and the pictures beside them.

    python benchmarks/table.py
    python benchmarks/table.py --results runs/benchmark --print

    python benchmarks/table.py --results runs/benchmark_gpu --into runs/benchmark_gpu

Reads the newest measurement in each machine's `speed-<device>-<torch>.csv`. Everything between the
marks in a README is generated. A model's README shows the newest machine of each kind.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.lib import plots, sweep, to_quality
from benchmarks.lib.models import MODELS
from benchmarks.lib.readme import README, RESULTS, markdown, read_rows, write_part
from benchmarks.lib.results import (
    ENOUGH,
    Row,
    Summary,
    machine_of,
    newest,
    shown_number,
    shown_speed,
    shown_speedup,
    summaries,
)
from benchmarks.lib.techniques import FLAGS, PLAIN, SHOWN
from common.cli import Parser, UserError, run

WHAT = ("speed", "to-quality", "sweep", "equal-time")  # is measured, each in files of its own
NONE = (
    "**GPU**: a first run on an H100 is in `benchmarks/LEDGER.md`; `make benchmark-gpu` fills this "
    "table."
)


def of_model(rows: list[Row], model: str) -> str:
    """A model's techniques: speed, speed-up, parts of a step, memory, one-off cost."""
    measured = summaries(rows, model)
    kind = "95 %" if max((s.rounds for s in measured), default=0) >= ENOUGH else "range"
    head = ["technique", "images/s (p10 to p90; n)", "without loader", f"speed-up ({kind})"]
    head += ["forward / backward / optimizer / data, ms", "memory, MiB", "start-up, s"]
    head += ["pays off after, steps"]
    lines = []
    for summary in measured:
        if summary.error:
            error = summary.error.replace("|", "\\|")
            lines.append([summary.technique, f"failed: {error}", *[""] * (len(head) - 2)])
            continue
        speed, low, high = map(shown_number, (summary.speed, *summary.of_steps))
        cells = [summary.technique, f"{speed} ({low} to {high}; {summary.steps})"]
        cells.append(shown_number(summary.without_loader) if summary.without_loader else "")
        cells += [shown_speedup(summary), _phases(summary), _memory(summary)]
        lines.append([*cells, f"{summary.one_off:.1f}", _pays_after(summary)])
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
    if summary.speedup is None or summary.rounds < ENOUGH:
        return ""
    if summary.pays_after is None:
        return "never" if summary.speedup[0] <= 1 else "uncertain"
    return f"{summary.pays_after:,.0f}"


def overview(rows: list[Row]) -> str:
    """Speed-ups of all models by the most common techniques, one technique per line."""
    measured = by_model(rows)
    names = dict.fromkeys(name for of in measured.values() for name in of if name in SHOWN)
    lines = [[name, *(shown_speed(of.get(name)) for of in measured.values())] for name in names]
    return markdown(["technique", *measured], lines)


def by_model(rows: list[Row]) -> dict[str, dict[str, Summary]]:
    """Model → technique → summary."""
    measured = {model: {s.technique: s for s in summaries(rows, model)} for model in MODELS}
    return {model: techniques for model, techniques in measured.items() if techniques}


def heading(rows: list[Row]) -> str:
    """Where and how these rows were measured, in a sentence or two, and the command."""
    r = rows[0]
    where = machine_of(r)
    plain = [row for row in rows if row["technique"] == PLAIN]
    backbones = dict.fromkeys(
        f"{row['model']} on {row['backbone']}" + f" (`{row['flags']}`)" * bool(row["flags"])
        for row in plain
    )
    batch = plain[0]["batch"]
    tiles = f" from {plain[0]['tiles']} tiles" * bool(plain[0]["tiles"])
    gpu = f", driver {r['driver']}, float32 convolutions in {r['float32']}" if r["driver"] else ""
    dry = "**A dry run, with stand-ins: its speeds mean nothing.** " * ("--dry-run" in r["command"])
    return (
        f"{dry}**{'CPU' if r['device'] == 'cpu' else 'GPU'}**: {where}{gpu}, torch {r['torch']}, "
        f"commit {r['commit']}, `{r['command']}`. {', '.join(backbones)}; {batch} crops of "
        f"{r['crop']} pixels a step{tiles}; {r['steps']} steps after {r['warmup']} for warm-up, in "
        f"each of {rounds_of(rows)}."
    )


def rounds_of(rows: list[Row]) -> str:
    """How many rounds were measured, and what is in brackets then."""
    rounds = len({row["round"] for row in rows if not row["error"]})
    kind = "the 95 % interval" if rounds >= ENOUGH else "the range"
    return f"{rounds} rounds, in brackets {kind}" if rounds > 1 else "1 round"


def results(folder: Path, what: str, clean: bool = True) -> dict[str, list[Row]]:
    """`<device>-<torch>` → the newest rows of its file, processors before GPUs.

    Args:
        clean: Leave out rows of a working tree with changes: no commit can reproduce them.
    """
    newest_of = newest if what == "speed" else list
    machines = {}
    for path in sorted(folder.glob(f"{what}-*.csv")):
        if rows := [r for r in read_rows(path) if not (clean and "+dirty" in r["commit"])]:
            machines[path.stem.removeprefix(f"{what}-")] = newest_of(rows)
    return dict(sorted(machines.items(), key=lambda item: item[1][-1]["device"] != "cpu"))


def parts(measured: dict[str, dict[str, list[Row]]]) -> dict[tuple[Path, str], str]:
    """All generated parts: (README, mark) → Markdown.

    Args:
        measured: Each of `WHAT` → the `results` of its files.
    """
    machines = measured["speed"]
    made: dict[tuple[Path, str], str] = {}
    for model in MODELS:
        blocks = [
            f"{heading(of)}\n\n{of_model(rows, model)}"
            for rows in plots.newest_of_kind(machines).values()
            if (of := [row for row in rows if row["model"] == model])
        ]
        made[ROOT / model / "README.md", "benchmark"] = _blocks(blocks, machines)
    for what, tabled in (("to-quality", to_quality.table), ("sweep", sweep.table)):
        blocks = [f"{_told(rows)}\n\n{tabled(rows)}" for rows in measured[what].values()]
        blocks += [plots.shown(f"../assets/{what}", f"the {what} curves")] * bool(blocks)
        made[README, what] = "\n\n".join(blocks) or "Not measured yet."
    blocks = [f"{heading(rows)}\n\n{overview(rows)}" for rows in machines.values()]
    made[README, "machines"] = _blocks(blocks, machines)
    made[ROOT / "README.md", "benchmark"] = front(plots.in_front(machines))
    blocks = [equal_time(rows) for rows in measured["equal-time"].values()]
    made[ROOT / "README.md", "equal-time"] = "\n\n".join(blocks) or "Not measured yet."
    return made


def equal_time(rows: list[Row]) -> str:
    """All models' scores after the same time, and a line that says what was measured."""
    r = rows[0]
    return (
        f"{to_quality.last_scores(rows)}\n\n*From random weights on {machine_of(r)}, commit "
        f"{r['commit']}, {r['batch']} crops of {r['crop']} pixels a step, `{r['flags']}`.*"
    )


def front(machines: list[list[Row]]) -> str:
    """A sentence with the largest speed-up, the chart, and a line that says what was measured."""
    if not machines:
        return "Not measured yet."
    rows = plots.newest_rows(machines)
    r = rows[0]
    where = machine_of(r)
    picture = plots.shown(f"assets/{plots.FRONT}", "speed-up of each model by technique")
    measured = by_model(rows).values()
    best = [PLAIN, *(n for n in plots.LADDER if all(n in of for of in measured))][-1]
    ratios = [s[0] for of in measured if best in of and (s := of[best].speedup)]
    flags = " ".join(FLAGS.get(part, "") for part in best.split("+"))
    gain = ""
    if ratios:
        gain = f" On {where} `{flags}` trains the {len(ratios)} models {min(ratios):.2f} to "
        gain += f"{max(ratios):.2f} times as fast as float32."
    return (
        f"Find every aircraft in aerial imagery.{gain}\n\n"
        f"{picture}\n\n*Training speed over plain float32 on {where}: {r['batch']} crops of "
        f"{r['crop']} pixels a step, {rounds_of(rows).replace('in brackets', 'lines:')}, commit "
        f"{r['commit']}.*"
    )


def _told(rows: list[Row]) -> str:
    """Where rows were measured, how, and how often."""
    r = rows[-1]
    where = machine_of(r)
    of_sweep = "" if "level" in r else f"; {rounds_of(rows)}"
    return f"{where}, torch {r['torch']}, commit {r['commit']}, `{r['command']}`{of_sweep}."


def _blocks(blocks: list[str], machines: dict[str, list[Row]]) -> str:
    gpu = any(rows[-1]["device"] != "cpu" for rows in machines.values())
    return "\n\n".join(blocks + ([] if gpu else [NONE]))


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder with speed-*.csv")
    parser.add_argument("--print", action="store_true", help="print instead of writing READMEs")
    parser.add_argument("--into", type=Path, help="folder for tables.md and pictures, not READMEs")
    args = parser.parse(argv)
    clean = not (args.print or args.into)
    measured = {what: results(args.results, what, clean) for what in WHAT}
    if not measured["speed"]:
        raise UserError(
            f"no speed-*.csv in {str(args.results)!r} has rows of a commit; run run.py first."
        )
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
