"""Whether a technique trains equally well: the same seeds and steps with and without it.

    python benchmarks/run.py --quality --models unet --techniques plain amp --seeds 3

trains to the end and scores the validation set; `table.py` puts the result beside the speed.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lib import launch
from benchmarks.lib.matrix import PLAIN, SHARE, Cell
from benchmarks.lib.results import CELL, CONDITIONS, KEY, Row, append, done
from common.cli import progress, say
from common.run.report import read_log

SCORES = ("mIoU", "mask_AP")
MEASURED = ("max_steps", "losses", "name", "score", "wall_s")
COLUMNS = (*KEY, *CELL, *MEASURED, *CONDITIONS, "when", "command")


def measure(cells: list[Cell], conditions: dict[str, Any], args: argparse.Namespace) -> None:
    """Add the missing runs to `quality_*.csv`, beside the speeds; a round is a seed."""
    path = args.output.with_name(args.output.name.replace("speed", "quality"))
    conditions = conditions | {"max_steps": args.max_steps}
    finished = done(path, conditions, (*CONDITIONS, "max_steps"))
    todo = [
        (seed, cell)
        for seed in range(args.seeds)
        for cell in cells
        if cell.technique != SHARE and (cell.model, cell.technique, str(seed)) not in finished
    ]
    for seed, cell in progress(todo, desc="quality", unit="run"):
        began = time.monotonic()
        row = launch.columns(cell, args) | {"round": seed}
        with tempfile.TemporaryDirectory() as folder:
            command = [f"{cell.model}/train.py"]
            command += launch.train_arguments(cell, args, f"{folder}/run")
            command += ["--seed", str(seed), "--max-steps", str(args.max_steps)]
            command += ["--print-freq", "1", "--eval-freq", str(args.max_steps)]
            cache = args.cache / launch.cache_name(cell, args)
            row["error"] = launch.run(cell, command, cache, 3600, args.dry_run)
            log = read_log(Path(folder) / "run/log.jsonl")
        row["losses"] = [line["loss"] for line in log if "loss" in line]
        name = next((name for name in SCORES if log and name in log[-1]), "")
        if name:
            row |= {"name": name, "score": log[-1][name]}
            say(f"{cell.name}, seed {seed}: {name} {row['score']:.4f}")
        row |= {"wall_s": time.monotonic() - began, "when": time.strftime("%Y-%m-%dT%H:%M:%S")}
        append(path, conditions | row, COLUMNS)
    print(f"wrote {path}")


def of_model(rows: Sequence[Row], model: str) -> list[Row]:
    """The rows of a model that were trained for as many steps as the last one."""
    runs = sorted((row for row in rows if row["model"] == model), key=lambda row: row["when"])
    return [row for row in runs if row["max_steps"] == runs[-1]["max_steps"]]


def cell_of(rows: list[Row], model: str, technique: str) -> str:
    """The final scores of all seeds and the difference of the losses from plain's, in words.

    The difference is the mean over the steps of two curves with the same seed, as a share of
    plain's mean loss. For plain it is the difference between seeds, the effect of chance alone.
    """
    good = [r for r in rows if r["model"] == model and not r["error"] and r["losses"]]
    curves = {(r["technique"], r["round"]): np.array(r["losses"].split(), float) for r in good}
    runs = [r for r in good if r["technique"] == technique]
    if not runs:
        return ""
    seeds = [r["round"] for r in runs]
    pairs = [((technique, seed), (PLAIN, seed)) for seed in seeds]
    if technique == PLAIN:
        pairs = [((PLAIN, a), (PLAIN, b)) for a in seeds for b in seeds if a < b]
    distances = [
        float(np.abs(curves[a] - curves[b]).mean() / curves[b].mean())
        for a, b in pairs
        if b in curves and len(curves[a]) == len(curves[b])
    ]
    scores = [float(r["score"]) for r in runs if r["score"]]
    parts = []
    if scores:
        parts.append(f"{statistics.mean(scores):.3f} ({min(scores):.3f} to {max(scores):.3f})")
    if distances:
        parts.append(f"{100 * statistics.mean(distances):.1f} %")
    return "; ".join(parts)
