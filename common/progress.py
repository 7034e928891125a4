"""A bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


class _Lines(tqdm):
    """tqdm for log files: a line of its own at most every ten seconds, and no cursor movements."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.spoke = time.monotonic()
        super().__init__(*args, **kwargs)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if time.monotonic() - self.spoke > 10:
            self.spoke = time.monotonic()
            print(msg or str(self), file=sys.stderr, flush=True)

    def clear(self, nolock: bool = False) -> None:
        pass

    def close(self) -> None:
        self.disable = True


def progress(
    items: Iterable | None = None, *, desc: str, enabled: bool = True, **kwargs: Any
) -> tqdm:
    """`tqdm(items)` that fits where stderr goes."""
    bar = tqdm if sys.stderr.isatty() else _Lines
    return bar(items, desc=desc, disable=not enabled, leave=False, ncols=88, **kwargs)


def say(text: str) -> None:
    """Print a line without tearing the bar."""
    if sys.stderr.isatty():
        tqdm.write(text)
    else:
        print(text, flush=True)
