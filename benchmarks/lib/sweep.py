"""Speed-ups by batch and crop: `run.py --sweep batch=1,2,4,8 crop=128,256,512`."""

import argparse
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from itertools import product

from benchmarks.lib.matrix import Cell
from benchmarks.lib.readme import markdown
from benchmarks.lib.results import PLAIN, SIZES, Row, Summary, newest, shown_speed, summaries
from common.cli import positive

MARK = "●"


def sizes(text: str) -> tuple[str, list[int]]:
    """An argument type: `batch=1,2,4` or `crop=128,256`."""
    name, equals, values = text.partition("=")
    numbers = [int(positive(value)) for value in values.split(",") if value.isdecimal()]
    if name not in SIZES or not equals or not numbers:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form batch=1,2,4 or crop=128,256")
    return name, numbers


def cells_of(
    planned: Callable[[int], tuple[list[Cell], list[str]]],
    wanted: list[tuple[str, list[int]]],
    batch: int,
    crop: int,
) -> tuple[list[Cell], list[str]]:
    """The cells of every combination, and what is left out; DDP's have another batch, so none.

    Args:
        planned: Batch → cells and what is left out, see `matrix.plan`.
        wanted: From the options, `sizes`.
        batch: For all, if it is not swept.
        crop: Likewise, pixels.
    """
    given = {"batch": [batch], "crop": [crop]} | dict(wanted)
    cells: list[Cell] = []
    left_out: list[str] = []
    for one_crop, one_batch in product(given["crop"], given["batch"]):
        of_size, left_out = planned(one_batch)
        cells += [replace(cell, crop=one_crop) for cell in of_size if cell.world == 1]
    return cells, left_out


def curves(rows: list[Row]) -> dict[tuple[str, str, int], dict[int, Summary]]:
    """(model, technique, crop) → batch → summary, of the newest measurement."""
    groups: dict[tuple[str, int, int], list[Row]] = defaultdict(list)
    for row in newest(rows, SIZES):
        groups[row["model"], int(row["crop"]), int(row["batch"])].append(row)
    by_curve: dict[tuple[str, str, int], dict[int, Summary]] = defaultdict(dict)
    for (model, crop, batch), group in groups.items():
        for summary in summaries(group, model):
            by_curve[model, summary.technique, crop][batch] = summary
    return by_curve


def table(rows: list[Row]) -> str:
    """Plain's images/s and the others' speed-ups, a column for each batch."""
    by_curve = curves(rows)
    batches = sorted({batch for by_batch in by_curve.values() for batch in by_batch})
    head = ["model", "crop", "technique", *(f"batch {batch}" for batch in batches)]
    lines = [
        [model, str(crop), technique, *(_cell(by_batch.get(batch)) for batch in batches)]
        for (model, technique, crop), by_batch in sorted(
            by_curve.items(), key=lambda item: (item[0][0], item[0][2], item[0][1] != PLAIN)
        )
    ]
    return markdown(head, lines, "lrlr")


def _cell(summary: Summary | None) -> str:
    mark = f" {MARK}" if summary and summary.device_limited else ""
    return shown_speed(summary) + mark
