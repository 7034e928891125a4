"""What each speed-up is worth on this machine: every model × every combination of techniques.

    python benchmarks/run.py --quick
    python benchmarks/run.py --models unet --techniques plain amp+channels-last --rounds 7
    python benchmarks/run.py --budget 60 --data-path data

Every cell is a train.py (`lib/timed_train.py`) in a fork of a process that has imported everything
(`lib/launch.py`). A round measures each cell once, so that a drift of the machine affects all. Each
result is written to the CSV at once, also that of a failed cell, and is not measured again: to
continue, start the command again. `table.py` makes tables and pictures of the CSV.
"""

import argparse
import shlex
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from benchmarks import table
from benchmarks.lib import engagement, launch, results, sweep, to_quality
from benchmarks.lib.environment import hardware, provenance
from benchmarks.lib.matrix import Cell, plan
from benchmarks.lib.measure import Mode, measure
from benchmarks.lib.models import MODELS
from benchmarks.lib.readme import RESULTS, read_rows
from benchmarks.lib.results import newest
from common import graphs
from common.cli import Parser, UserError, fraction, loaders, number, positive, run
from common.distributed import pick_device

GRAPHS_FROM = graphs.WARMUP_STEPS + 3  # by this step every captured one is replayed


def main(argv: list[str] | None = None) -> None:
    signal.signal(signal.SIGTERM, _terminated)
    args = _parse(argv)
    device = torch.device(args.device)
    if not (args.data_path / "train").is_dir():
        raise UserError(
            f"there are no tiles in {str(args.data_path)!r}; make some with `python "
            f"rareplanes/sample.py -o {args.data_path} -n 24` and `python "
            f"preprocessing/preprocess.py {args.data_path} -s 512 --pack`, or give --data-path."
        )

    def planned(batch: int) -> tuple[list[Cell], list[str]]:
        chosen = args.models, args.techniques, args.also, device, batch
        cells, left_out = plan(*chosen, args.quick, args.dry_run)
        return [replace(cell, flags=(*args.base, *cell.flags)) for cell in cells], left_out

    cells, left_out = planned(args.batch_size)
    if args.sweep:
        cells, left_out = sweep.cells_of(planned, args.sweep, args.batch_size, args.crop_size)
    captured = any("--cuda-graphs" in cell.flags for cell in cells)
    if captured and args.warmup < GRAPHS_FROM and not args.dry_run:
        raise UserError(
            f"--warmup {args.warmup} ends before a CUDA graph is captured; use {GRAPHS_FROM}, or "
            "leave out cuda-graphs by --techniques."
        )
    conditions = hardware(device) | provenance(__file__, argv)
    conditions |= {"warmup": args.warmup, "steps": args.steps, "crop": args.crop_size}
    conditions |= {"data": args.data_path.name}
    mode, rounds = SWEEP if args.sweep else SPEED, args.rounds
    if args.level is not None:
        mode, rounds = to_quality.MODE, args.seeds
        if device.type == "cpu":  # its seconds are those of one process
            cells = [cell for cell in cells if cell.world == 1]
    path, late = measure(mode, cells, rounds, conditions, args)
    rows = read_rows(path)
    if all(row["error"] for row in newest(rows, results.SIZES if args.sweep else ())):
        raise UserError(f"no cell could be measured; the last one: {rows[-1]['error']}")
    for line in left_out + late:
        print(f"left out: {line}")
    print(mode.show(rows))


def _time(
    cell: Cell, _: int, args: argparse.Namespace, timeout: float
) -> tuple[dict[str, Any], str]:
    script = ["benchmarks/lib/timed_train.py", cell.model, args.warmup, args.steps]
    row = launch.measured(cell, args, script, [], timeout)
    if "step_ms" not in row:  # it failed
        return row, ""
    row["error"] = row["error"] or engagement.missing(row, cell.flags, args.steps)
    return row, f"{1e3 * row['images'] * len(row['step_ms']) / sum(row['step_ms']):.2f} images/s"


def _show(rows: list[results.Row]) -> str:
    rows = newest(rows)
    models = table.by_model(rows)
    return "\n\n".join(f"{model}\n{table.of_model(rows, model)}" for model in models)


PATIENCE = 1200.0  # seconds for a cell; the slowest compile for a few minutes
SPEED = Mode("speed", (), results.COLUMNS, PATIENCE, _time, _show)
SWEEP = replace(SPEED, name="sweep", show=sweep.table)


def _terminated(*_: Any) -> NoReturn:
    sys.exit(143)  # runs the `finally` that ends the cell


def _technique(text: str) -> tuple[str, str]:
    name, equals, flags = text.partition("=")
    if not (name and equals) or "+" in name:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=FLAGS")
    return name, " ".join(shlex.split(flags))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="a first table: one round, few steps, 3 or 5 minutes")
    add("--dry-run", action="store_true", help="in small on the CPU what a GPU would run")
    add("--models", nargs="+", choices=MODELS, default=list(MODELS))
    add("--techniques", nargs="+", default=[], help="such as amp+channels-last; default: all")
    also = "further techniques, as flags of train.py: 'accum=--grad-accum 2'"
    add("--also", nargs="+", type=_technique, default=[], metavar="NAME=FLAGS", help=also)
    base = "flags of train.py for all, plain too: '--amp --channels-last'"
    add("--base", type=shlex.split, default=[], metavar="FLAGS", help=base)
    by_size = "speed-up by batch and crop, into sweep-<device>-<torch>.csv"
    add("--sweep", nargs="+", type=sweep.sizes, metavar="batch=1,2,4|crop=128,256", help=by_size)
    add("--rounds", type=positive, help="times each cell is measured (5; 1 with --quick)")
    add("--warmup", type=number(int, 2), help="steps before those that count (3; 14 on a GPU)")
    add("--steps", type=positive, help="steps that count (8; 50 on a GPU; 3 and 20 with --quick)")
    until = "seconds until the validation IoU of aircraft (mask AP) reaches this"
    add("--to-quality", dest="level", type=fraction, metavar="LEVEL", help=until)
    add("--seeds", type=positive, default=5, help="of --to-quality")
    add("--max-steps", type=positive, default=200, help="of each of its runs")
    add("--eval-steps", type=positive, default=10, help="between validations, to quality")
    add("--budget", type=number(float, 0), metavar="MINUTES", help="leave out cells to end in time")
    add("--data-path", type=Path, default=ROOT / "sample_data", help="folder with a tiled train/")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--crop-size", type=positive, help="pixels (128; 512 on a GPU)")
    tiles = "tiles: of all processes together on a CPU (4), of each GPU (8)"
    add("-b", "--batch-size", type=positive, help=tiles)
    add("--backbone", help="of all --models; default: light ones on a CPU, train.py's on a GPU")
    add("-j", "--workers", type=loaders, help="loader processes (0; 4 on a GPU)")
    add("-o", "--output", type=Path, help="CSV, or folder for speed-<device>-<torch>.csv")
    cache = ROOT / "runs/benchmark/compiled"
    add("--cache", type=Path, default=cache, help="folder of the compiler's cache")
    args = parser.parse(argv)
    if args.dry_run:
        args.device = "cpu"
        launch.rehearse()  # here for the plan; each cell's process does the same
    device = pick_device(args.device)
    args.also = dict(args.also)
    few = args.quick or args.dry_run
    for name, cpu, cuda, dry in (
        ("rounds", 1 if few else 5, 1 if few else 5, 1),
        ("warmup", 2 if few else 3, GRAPHS_FROM, 4),
        ("steps", 3 if few else 8, 20 if few else 50, 2),
        ("budget", 3 if few else float("inf"), 5 if few else float("inf"), 5),
        ("crop_size", 128, 512, 32),
        ("batch_size", 4, 8, 2),
        ("workers", 0, 4, 0),
    ):
        if getattr(args, name) is None:
            setattr(args, name, dry if args.dry_run else cuda if device.type == "cuda" else cpu)
    args.device = str(device)
    folder = args.output or (ROOT / "runs/benchmark" if few else RESULTS)
    if folder.suffix != ".csv":
        args.output = folder / results.file_name(device, args.dry_run)
    return args


if __name__ == "__main__":
    run(main)
