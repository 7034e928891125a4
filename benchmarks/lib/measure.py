"""Measures cells in rounds, for each mode of `run.py`, and goes on where it was stopped."""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.lib import launch
from benchmarks.lib.matrix import Cell
from benchmarks.lib.readme import read_rows
from benchmarks.lib.results import CONDITIONS, KEY, SIZES, Row, append, as_text
from common.cli import UserError, progress, say


@dataclass(frozen=True)
class Mode:
    """What is measured of a cell."""

    name: str  # its files are <name>-<device>-<torch>.csv
    settings: tuple[str, ...]  # options of run.py that are columns beside `CONDITIONS`
    columns: tuple[str, ...]
    patience: float  # seconds for a cell
    # Cell, round, options of run.py, seconds it may take → its row, and the result in words.
    train: Callable[[Cell, int, argparse.Namespace, float], tuple[dict[str, Any], str]]
    show: Callable[[list[Row]], str]  # the rows of the file as Markdown


def measure(
    mode: Mode, cells: list[Cell], rounds: int, conditions: dict[str, Any], args: argparse.Namespace
) -> tuple[Path, list[str]]:
    """Add the missing rows to the mode's file; returns it, and what there was no time for.

    A round measures each cell once, but none that failed in an earlier round: for the time to a
    quality that is another seed. The first round leaves out cells for which there is not enough
    time. A later round begins only if all of it should take less time than is left.
    """
    path = args.output.with_name(args.output.name.replace("speed", mode.name))
    conditions |= {name: getattr(args, name) for name in mode.settings}
    finished = _finished(path, conditions, mode)
    began = time.monotonic()
    launch.start_server()
    end = began + 60 * args.budget
    seconds: dict[Cell, float] = {}
    skipped: dict[str, list[str]] = {}
    late: list[str] = []
    todo = list(cells)
    for turn in range(rounds):
        sizes = {c: (str(c.batch), str(c.crop or args.crop_size)) for c in todo}
        missing = [c for c in todo if (c.model, c.technique, str(turn), *sizes[c]) not in finished]
        known = sum(seconds.get(cell, 0.0) for cell in missing)
        if turn and time.monotonic() + known > end:
            late.append(f"rounds {turn + 1} to {rounds}: not enough time")
            break
        # The first round may take only its share of the time, so that some is left for the others.
        limit = end if turn else began + (end - began) / rounds
        for cell in progress(missing, desc=f"round {turn + 1}", unit="cell"):
            alike = [s for c, s in seconds.items() if c.model == cell.model]
            if time.monotonic() + seconds.get(cell, max(alike, default=0.0)) > limit:
                skipped.setdefault(cell.technique, []).append(cell.model)
                todo.remove(cell)
                continue
            left = end - time.monotonic()
            row, result = mode.train(cell, turn, args, min(left, mode.patience))
            if row["error"].startswith("stopped after") and left < mode.patience:
                skipped.setdefault(cell.technique, []).append(cell.model)
                todo.remove(cell)
                continue
            seconds[cell] = row["wall_s"]
            append(path, conditions | row | {"round": turn}, mode.columns)
            if row["error"]:
                result = f"failed: {row['error']}"
                todo.remove(cell)
            say(f"{cell.name}, round {turn + 1}: {result} ({row['wall_s']:.0f} s in all)")
    if not path.is_file():
        raise UserError("no cell was started; give more minutes to --budget.")
    print(f"wrote {path}")
    return path, [f"{t} of {', '.join(m)}: not enough time" for t, m in skipped.items()] + late


def _finished(path: Path, conditions: dict[str, Any], mode: Mode) -> set[tuple[str, ...]]:
    """Model, technique, round, batch and crop of the rows that need not be measured again."""
    same = [key for key in (*CONDITIONS, *mode.settings) if key not in SIZES]
    return {
        tuple(row[key] for key in (*KEY, *SIZES))
        for row in (read_rows(path) if path.is_file() else [])
        if not row["error"] and all(row[key] == as_text(conditions[key]) for key in same)
    }
