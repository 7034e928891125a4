"""The results of `run.py`: one line per cell and round, and their summary."""

import csv
import random
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.lib import engagement
from benchmarks.lib.matrix import PLAIN
from benchmarks.lib.readme import read_rows, write_rows
from common.run.machine import cpu

Row = dict[str, str]

KEY = ("model", "technique", "round")
SIZES = ("batch", "crop")  # what --sweep varies
CELL = ("flags", "world", "batch", "threads", "backbone", "cache", "error")
ENOUGH = 5  # rounds for an interval: the range of five holds the median in 94 % of all cases
PHASES = ("views", "forward", "backward", "optimizer", "captured", "loop", "data")
MEASURED = (
    *("images", "step_ms", *(f"{phase}_ms" for phase in PHASES)),
    *("memory_mib", "reserved_mib", "start_s", "warmup_s", "syncs"),
    *("clock_mhz", "wall_s"),
    *("tiles", "no_loader_ms", "launch_ms", *engagement.COLUMNS),
)
# What rows of the same measurement have in common.
CONDITIONS = (
    *("device", "driver", "cores", "cudnn", "float32", "cpu", "torch", "commit"),
    *("crop", "warmup", "steps", "data"),
)
COLUMNS = (*KEY, *CELL, *MEASURED, *CONDITIONS, "when", "command")


def file_name(device: torch.device, dry: bool = False) -> str:
    """`speed-<device>-<torch>.csv`: one file for each kind of machine and release of torch."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu()
    slug = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")
    return f"speed-{'dry-run-' * dry}{slug}-{torch.__version__}.csv"


def append(path: Path, row: dict[str, Any], columns: tuple[str, ...] = COLUMNS) -> None:
    """Append a line in one write, so that a killed process leaves only whole lines.

    A file that was written with fewer columns gets the new ones, empty in its old rows.
    """
    line = {key: as_text(row.get(key, "")) for key in columns}
    if not path.exists():
        return write_rows(path, [line])
    if path.open().readline().strip() != ",".join(columns):
        write_rows(path, [{key: old.get(key, "") for key in columns} for old in read_rows(path)])
    with path.open("a", newline="") as file:
        csv.DictWriter(file, columns, lineterminator="\n").writerow(line)


def as_text(value: Any) -> str:
    """As a results file has it."""
    if isinstance(value, list):
        return " ".join(f"{x:.5g}" for x in value)
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def newest(rows: list[Row], varied: tuple[str, ...] = ()) -> list[Row]:
    """The rows measured like the last one; of a cell that was tried twice, the later row.

    Args:
        varied: Columns that differ on purpose, and tell cells apart.
    """
    common = [key for key in CONDITIONS if key not in varied]
    alike = [row for row in rows if all(row[key] == rows[-1][key] for key in common)]
    return list({tuple(row[key] for key in (*KEY, *varied)): row for row in alike}.values())


def median_interval(values: list[float]) -> tuple[float, float, float]:
    """The median and its 95 % bootstrap interval; of fewer than `ENOUGH` values it is the range."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(10_000))
    return statistics.median(values), medians[250], medians[-251]


@dataclass(frozen=True)
class Summary:
    """One model under one technique, over all rounds. None where a value is not known."""

    technique: str
    error: str
    rounds: int = 0
    failed: int = 0  # rounds that are not counted
    steps: int = 0  # timed steps
    speed: float = 0.0  # images/s of a round, median
    of_steps: tuple[float, float] = (0.0, 0.0)  # images/s of single steps: p10, p90
    without_loader: float | None = None  # images/s of a round, median
    speedup: tuple[float, float, float] | None = None  # median of paired ratios, interval or range
    ms: dict[str, float] | None = None  # by phase
    memory: float = 0.0  # MiB
    reserved: float | None = None
    one_off: float = 0.0  # seconds until the first step, and extra time of the warm-up steps
    pays_after: float | None = None  # steps; None unless it is faster (interval above 1)
    device_limited: bool = False  # the CPU issues a step in less time than the GPU needs for it


def machine_of(row: Row) -> str:
    """Where a row was measured: the name of its GPU, or `2 cores of AMD EPYC`."""
    if row["device"] != "cpu":
        return row["device"]
    return f"{row['cores']} core{'s' * (row['cores'] != '1')} of {row['cpu']}"


def shown_number(value: float) -> str:
    """With three digits, or more if it is large."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def shown_speed(summary: Summary | None) -> str:
    """A cell of a table: images/s of plain, the speed-up of another technique."""
    if summary is None:
        return ""
    if summary.error:
        return "failed"
    if summary.technique == PLAIN:
        return f"{shown_number(summary.speed)} images/s"
    return shown_speedup(summary)


def shown_speedup(summary: Summary) -> str:
    """With its interval if there are several rounds, and how many if some failed."""
    if summary.speedup is None:
        return ""
    median, low, high = summary.speedup
    spread = [f"{low:.2f} to {high:.2f}"] if summary.rounds > 1 else []
    if summary.failed:
        spread.append(f"{summary.rounds} of {summary.rounds + summary.failed} rounds")
    return f"{median:.2f}" + (f" ({'; '.join(spread)})" if spread else "")


def throughput(row: Row, key: str = "step_ms") -> float:
    """Images/s over all steps of a row, which need not take the same time."""
    times = _numbers(row[key])
    return 1e3 * float(row["images"]) * len(times) / sum(times)


def summaries(rows: list[Row], model: str) -> list[Summary]:
    """One for each technique in `newest` rows, in the order they were measured."""
    good: dict[str, dict[str, Row]] = {}  # technique → round → row
    errors: dict[str, list[str]] = {}
    for row in rows:
        if row["model"] == model:
            rounds = good.setdefault(row["technique"], {})
            if row["error"]:
                errors.setdefault(row["technique"], []).append(row["error"])
            else:
                rounds[row["round"]] = row
    return [
        _summary(name, good, len(errors.get(name, ())))
        if good[name]
        else Summary(name, errors[name][-1])
        for name in good
    ]


def _summary(name: str, good: dict[str, dict[str, Row]], failed: int) -> Summary:
    rows = list(good[name].values())
    steps = [1e3 * float(row["images"]) / ms for row in rows for ms in _numbers(row["step_ms"])]
    low, high = np.percentile(steps, [10, 90]).tolist()
    without_loader = [throughput(row, "no_loader_ms") for row in rows if row["no_loader_ms"]]
    ratios = _ratios(good[name], good.get(PLAIN, {}))
    speedup = median_interval(ratios) if ratios and name != PLAIN else None
    one_off, pays_after = _one_off(rows), None
    if speedup and len(ratios) >= ENOUGH and speedup[1] > 1:
        plain = list(good[PLAIN].values())
        period = statistics.median(float(row["images"]) / throughput(row) for row in plain)
        saved = period * (1 - 1 / speedup[0])
        pays_after = max(0.0, one_off - _one_off(plain)) / saved
    return Summary(
        technique=name,
        error="",
        rounds=len(rows),
        failed=failed,
        steps=len(steps),
        speed=statistics.median(map(throughput, rows)),
        of_steps=(low, high),
        without_loader=statistics.median(without_loader) if without_loader else None,
        speedup=speedup,
        ms={p: x for p in PHASES if (x := _median(rows, f"{p}_ms")) is not None},
        memory=_median(rows, "memory_mib") or 0.0,
        reserved=_median(rows, "reserved_mib"),
        one_off=one_off,
        pays_after=pays_after,
        device_limited=_device_limited(rows),
    )


def _device_limited(rows: list[Row]) -> bool:
    """From a GPU's rows; on a CPU launching and computing are one."""
    launch = _median(rows, "launch_ms")
    if launch is None:
        return False
    step = statistics.median(ms for row in rows for ms in _numbers(row["no_loader_ms"]))
    return launch < 0.9 * step


def _ratios(rows: dict[str, Row], base: dict[str, Row]) -> list[float]:
    """Ratios of images/s, round by round."""
    return [throughput(rows[t]) / throughput(base[t]) for t in rows if t in base]


def _one_off(rows: list[Row]) -> float:
    """Of the runs with an empty compiler cache, if there are any.

    The first steps may by chance be faster than the timed ones; that does not count as a gain.
    """
    cold = [row for row in rows if row["cache"] == "cold"] or rows
    return statistics.median(float(r["start_s"]) + max(0.0, float(r["warmup_s"])) for r in cold)


def _median(rows: list[Row], key: str) -> float | None:
    values = [float(row[key]) for row in rows if row[key]]
    return statistics.median(values) if values else None


def _numbers(text: str) -> list[float]:
    return [float(word) for word in text.split()]
