"""How the values of a raster become RGB of 8 bits, and the options that say so (no torch here)."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from common.cli import UserError, number, positive


@dataclass(frozen=True)
class Look:
    """How a raster becomes RGB of 8 bits.

    Args:
        bands: Three bands or one, from 1. None: red, green and blue by their colour interpretation,
            otherwise the first three, or the only one.
        stretch: Percentiles of the whole scene that become 0 and 255, for each band. None: 2 and 98
            for bands of more than 8 bits; 8 bits stay as they are.
        limits: Values that become 0 and 255, instead of `stretch`.
        gsd: Metres of ground that a pixel shall show; None leaves the pixels as they are.
    """

    bands: Sequence[int] | None = None
    stretch: Sequence[float] | None = None
    limits: Sequence[float] | None = None
    gsd: float | None = None


def add_look_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `look_from` reads."""
    group = parser.add_argument_group("how a raster becomes a picture")
    add = group.add_argument
    add(
        "--bands",
        type=positive,
        nargs="+",
        metavar="BAND",
        help="three bands or one, from 1; default: red, green and blue, or the first three",
    )
    add(
        "--stretch",
        type=number(float, 0, 100),
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="percentiles that become black and white; default: 2 98, and none for 8 bits",
    )
    add(
        "--range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="values that become black and white, instead of --stretch",
    )
    add(
        "--gsd",
        type=number(float, 0.001, 1000),
        metavar="METRES",
        help="resample to this ground resolution, that of the training",
    )


def look_from(args: argparse.Namespace) -> Look:
    """How rasters are read.

    Raises:
        UserError: The options contradict each other.
    """
    if args.bands and len(args.bands) not in (1, 3):
        raise UserError(f"--bands takes three bands or one, not {len(args.bands)}.")
    for flag, limits in (("--stretch", args.stretch), ("--range", args.range)):
        if limits and not limits[0] < limits[1]:
            raise UserError(f"{flag} {limits[0]:g} {limits[1]:g}: the first must be the lower one.")
    if args.stretch and args.range:
        raise UserError("--stretch and --range exclude each other; leave one of them out.")
    return Look(args.bands, args.stretch, args.range, args.gsd)
