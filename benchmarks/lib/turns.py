"""Measures several ways of doing one thing in turns, so that a drift of the machine affects all."""

from collections.abc import Callable, Mapping
from typing import TypeVar

from common.cli import progress

T = TypeVar("T")


def in_turns(measure: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Name → what its function returned in each round. One more round before them warms up.

    The order alternates from round to round, because a later one finds warmer caches.
    """
    measured: dict[str, list[T]] = {name: [] for name in measure}
    for turn in progress(range(rounds + 1), desc="measure", unit="round"):
        for name in list(measure) if turn % 2 else reversed(list(measure)):
            value = measure[name]()
            if turn:
                measured[name].append(value)
    return measured
