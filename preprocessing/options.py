"""The options that every tiling command shares."""

import argparse
import os

from common.cli import number
from preprocessing.tiles import Settings


def add_tiling_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `settings_from` reads, and those of the run."""
    add = parser.add_argument
    add(
        "-s",
        "--tile-size",
        type=number(int, 16, 4096),
        default=512,
        help="side of a tile, pixels",
    )
    add("-n", "--num-workers", type=number(int, 1, 1024), default=_cores(), help="processes")
    add(
        "--min-visible",
        type=number(float, 0, 1),
        default=0.1,
        help="a tile ignores an aircraft of which it shows a smaller share",
    )
    add(
        "--negatives",
        type=number(float, 0, 1000),
        default=0.1,
        metavar="FRACTION",
        help="tiles without aircraft to keep, as a share of the tiles with aircraft",
    )
    add("--seed", type=int, default=0, help="decides which tiles without aircraft are kept")
    add(
        "--png-level",
        type=number(int, 0, 9),
        default=1,
        help="compression: 0 none, 1 fast, 9 small",
    )
    add(
        "--pack",
        action="store_true",
        help="also write each split as two arrays that load many times as fast; they take about "
        "(3+1)·S² bytes per tile, 1 MB at 512 pixels",
    )
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


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1
