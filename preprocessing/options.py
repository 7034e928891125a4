"""The options that every tiling command shares."""

import argparse
import os
from collections.abc import Callable

from preprocessing.tiles import Settings


def add_tiling_options(parser: argparse.ArgumentParser) -> None:
    """Add the options from which `settings_from` reads, and those of the run."""
    whole, real = bounded(int), bounded(float)
    add = parser.add_argument
    add("-s", "--tile-size", type=whole(16, 4096), default=512, help="side of a tile in pixels")
    add("-n", "--num-workers", type=whole(1, 1024), default=_cores(), help="processes")
    add(
        "--min-visible",
        type=real(0, 1),
        default=0.1,
        help="an aircraft of which a tile shows a smaller share is ignored there",
    )
    add(
        "--negatives",
        type=real(0, 1000),
        default=0.1,
        metavar="FRACTION",
        help="tiles without aircraft to keep, as a share of those with",
    )
    add("--seed", type=int, default=0, help="decides which tiles without aircraft are kept")
    add("--png-level", type=whole(0, 9), default=1, help="compression: 0 none, 1 fast, 9 small")
    add("--skip-bad", action="store_true", help="leave out scenes that cannot be read")


def settings_from(args: argparse.Namespace, attribute: str | None) -> Settings:
    """The settings of a run."""
    return Settings(
        tile_size=args.tile_size,
        min_visible=args.min_visible,
        negatives=args.negatives,
        attribute=attribute,
        seed=args.seed,
        png_level=args.png_level,
    )


def bounded(kind: type[int] | type[float]) -> Callable[[float, float], Callable[[str], float]]:
    """Argument types that accept numbers of a kind between two bounds."""

    def between(low: float, high: float) -> Callable[[str], float]:
        def parse(text: str) -> float:
            value = kind(text)
            if not low <= value <= high:
                raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
            return value

        parse.__name__ = "number"  # what argparse calls it when `kind` refuses the text
        return parse

    return between


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1
