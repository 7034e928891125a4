"""Whether a technique trains equally well: the same seeds and steps with and without it.

    python benchmarks/run.py --quality --models unet --techniques plain amp --seeds 3

trains to the end and scores the validation set; `table.py` puts the result beside the speed.
"""

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.lib import launch
from benchmarks.lib.matrix import PLAIN, Cell
from benchmarks.lib.measure import Mode
from benchmarks.lib.results import CELL, CONDITIONS, KEY, Row, newest

SCORES = ("mIoU", "mask_AP")


def _train(
    cell: Cell, seed: int, args: argparse.Namespace, timeout: float
) -> tuple[dict[str, Any], str]:
    options = ["--seed", seed, "--max-steps", args.max_steps, "--eval-freq", args.max_steps]
    script = [f"{cell.model}/train.py"]
    row = launch.measured(cell, args, script, [*options, "--print-freq", 1], timeout)
    row["losses"] = [line["loss"] for line in row["log"] if "loss" in line]
    last = row["log"][-1] if row["log"] else {}
    for name in SCORES:
        if name in last:
            return row | {"name": name, "score": last[name]}, f"{name} {last[name]:.4f}"
    return row, "no score"


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


def show(rows: list[Row]) -> str:
    """The scores and the differences of the newest measurement, a line for each technique."""
    runs = newest(rows)
    pairs = dict.fromkeys((row["model"], row["technique"]) for row in runs)
    return "\n".join(f"{' '.join(pair)}: {cell_of(runs, *pair)}" for pair in pairs)


MEASURED = ("max_steps", "losses", "name", "score", "wall_s")
COLUMNS = (*KEY, *CELL, *MEASURED, *CONDITIONS, "when", "command")
MODE = Mode("quality", ("max_steps",), COLUMNS, 3600.0, _train, show)
