"""Measures several ways of doing one thing in turns, so that a drift of the machine affects all."""

from collections.abc import Callable, Mapping
from typing import TypeVar

from benchmarks.lib.results import median_interval
from common.cli import progress

T = TypeVar("T")
RATIO = ("ratio", "ratio_low", "ratio_high")  # columns: the median ratio and its interval


def in_turns(
    measure: Mapping[str, Callable[[], T]], rounds: int, label: str = "measure"
) -> dict[str, list[T]]:
    """Name → what its function returned in each round. One more round before them warms up.

    The order alternates from round to round, because a later one finds warmer caches.
    """
    measured: dict[str, list[T]] = {name: [] for name in measure}
    for turn in progress(range(rounds + 1), desc=label, unit="round"):
        for name in list(measure) if turn % 2 else reversed(list(measure)):
            value = measure[name]()
            if turn:
                measured[name].append(value)
    return measured


def ratio_columns(over: list[float], under: list[float]) -> dict[str, str]:
    """The columns `RATIO`: median of the rounds' ratios `over` / `under`, 95 % interval."""
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    return {key: f"{value:.4g}" for key, value in zip(RATIO, median_interval(ratios), strict=True)}


def shown_ratio(row: dict[str, str], digits: int = 2) -> str:
    """The columns `RATIO` of a row as `1.47 (1.46 to 1.49)`."""
    ratio, low, high = (f"{float(row[key]):.{digits}f}" for key in RATIO)
    return f"{ratio} ({low} to {high})"
