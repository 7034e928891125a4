"""Trainings with several seeds, for `run.py --quality` and `run.py --to-quality`."""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.lib import launch
from benchmarks.lib.matrix import SHARE, Cell
from benchmarks.lib.results import CELL, CONDITIONS, KEY, append, done
from common.cli import UserError, progress, say

PATIENCE = 3600.0  # seconds for a training


@dataclass(frozen=True)
class Mode:
    """What a training of one cell and seed is for."""

    name: str  # its files are <name>-<device>-<torch>.csv, beside the speeds
    settings: tuple[str, ...]  # columns and options of run.py that rows have to share
    measured: tuple[str, ...]  # further columns
    # Cell, seed, options of run.py, seconds it may take → its row, and that row in words.
    train: Callable[[Cell, int, argparse.Namespace, float], tuple[dict[str, Any], str]]

    @property
    def columns(self) -> tuple[str, ...]:
        columns = *KEY, *CELL, *self.settings, *self.measured, "wall_s"
        return (*columns, *CONDITIONS, "when", "command")


def measure(
    mode: Mode, cells: list[Cell], conditions: dict[str, Any], args: argparse.Namespace
) -> Path:
    """Add the missing rows to the mode's file, which is returned; a row's round is its seed.

    Every seed trains all cells. A seed for which there is not enough time is left out as a whole.
    """
    path = args.output.with_name(args.output.name.replace("speed", mode.name))
    conditions |= {name: getattr(args, name) for name in mode.settings}
    finished = done(path, conditions, (*CONDITIONS, *mode.settings))
    launch.start_server()
    end, took = time.monotonic() + 60 * args.budget, 0.0
    for seed in range(args.seeds):
        began = time.monotonic()
        todo = [
            cell
            for cell in cells
            if cell.technique != SHARE and (cell.model, cell.technique, str(seed)) not in finished
        ]
        if seed and began + took > end:
            say(f"left out: seeds {seed} to {args.seeds - 1}: not enough time")
            break
        for cell in progress(todo, desc=f"seed {seed}", unit="run"):
            timeout = min(PATIENCE, max(1.0, end - time.monotonic()))
            row, shown = mode.train(cell, seed, args, timeout)
            append(path, conditions | row | {"round": seed}, mode.columns)
            say(f"{cell.name}, seed {seed}: {row['error'] or shown}")
        took = max(took, time.monotonic() - began)
    print(f"wrote {path}")
    if not path.is_file():
        raise UserError("no run was started; give more minutes to --budget.")
    return path
