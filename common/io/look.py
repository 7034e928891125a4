"""How a raster becomes RGB of 8 bits: the options, and what the training tiles remember of them."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.cli import UserError, number, positive


def _metres(text: str) -> float:
    """An argument type: 0, or metres of ground per pixel."""
    return number(float, 0.001, 1000)(text) if number(float, 0, 1000)(text) else 0.0


_metres.__name__ = "number"  # argparse: "invalid … value"

# The type of each option's values.
OPTIONS: dict[str, Callable[[str], float]] = {
    "bands": positive,
    "stretch": number(float, 0, 100),
    "range": number(float, -1e30, 1e30),
    "gsd": _metres,
    "trained_gsd": _metres,
}

# Percentiles are those of GRID x GRID squares if a side is longer than SAMPLE pixels.
SAMPLE, GRID = 1024, 32


@dataclass(frozen=True)
class Look:
    """How a raster becomes RGB of 8 bits.

    Args:
        bands: Three bands or one, from 1. None: red, green and blue by their colour interpretation,
            otherwise the first three, or the only one.
        stretch: Percentiles of the whole scene that become 0 and 255, for each band. None: 2 and 98
            for bands of more than 8 bits; 8 bits stay as they are.
        limits: Values that become 0 and 255, instead of `stretch`: two numbers, or two for each
            band.
        gsd: Metres of ground per pixel of the result; None or 0 leaves the pixels as they are.
        trained_gsd: Of the training tiles, if it is known.
        gsd_if_placed: A scene that is not georeferenced keeps its pixels; otherwise it is refused.
        upright: Turn the pixels as the metadata of a picture says, which every viewer does.
    """

    bands: Sequence[int] | None = None
    stretch: Sequence[float] | None = None
    limits: Sequence[Any] | None = None
    gsd: float | None = None
    trained_gsd: float | None = None
    gsd_if_placed: bool = False
    upright: bool = True


AS_IT_IS = Look()


def add_look_options(parser: argparse.ArgumentParser, gsd: bool = True) -> None:
    """Add the options that `look_from` reads; `--gsd` only where `gsd` is true."""
    group = parser.add_argument_group("how a raster becomes a picture")
    add = group.add_argument
    add(
        "--bands",
        type=OPTIONS["bands"],
        nargs="+",
        metavar="BAND",
        help="three bands or one, from 1; default: red, green and blue, or the first three",
    )
    add(
        "--stretch",
        type=OPTIONS["stretch"],
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="percentiles that become black and white; default: 2 98, and none for 8 bits",
    )
    add(
        "--range",
        type=OPTIONS["range"],
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="values that become black and white, instead of --stretch",
    )
    parser.set_defaults(gsd=None)
    if gsd:
        add(
            "--gsd",
            type=OPTIONS["gsd"],
            metavar="METRES",
            help="resample to this ground resolution; 0 leaves the pixels as they are",
        )


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_look_options` that were given, as plain values."""
    return {name: value for name in OPTIONS if (value := getattr(args, name, None)) is not None}


def look_from(args: argparse.Namespace, of_training: dict[str, Any] | None = None) -> Look:
    """How rasters are read.

    Args:
        args: With the values of `add_look_options`.
        of_training: `options_of` the command that made the training tiles. They hold where `args`
            says nothing. They may come from an untrusted file.

    Raises:
        UserError: The options contradict each other.
    """
    wanted = options_of(args)
    gsd_if_placed = "gsd" not in wanted
    if of_training:
        trained = _checked(of_training)
        if "stretch" in wanted or "range" in wanted:
            trained = {k: v for k, v in trained.items() if k not in ("stretch", "range")}
        wanted = trained | wanted
    bands, stretch, limits = (wanted.get(name) for name in ("bands", "stretch", "range"))
    if bands and len(bands) not in (1, 3):
        raise UserError(f"--bands takes three bands or one, not {len(bands)}.")
    for flag, pair in (("--stretch", stretch), ("--range", limits)):
        if pair and not pair[0] < pair[1]:
            raise UserError(f"{flag} {pair[0]:g} {pair[1]:g}: the first must be smaller.")
    if stretch and limits:
        raise UserError("--stretch and --range exclude each other; leave one of them out.")
    gsd, trained_gsd = wanted.get("gsd"), wanted.get("trained_gsd")
    return Look(bands, stretch, limits, gsd, trained_gsd, gsd_if_placed)


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    """The options of the training tiles, with the checks of the command line."""
    checked: dict[str, Any] = {}
    try:
        for name, values in options.items():
            one = OPTIONS[name]
            checked[name] = one(str(values)) if "gsd" in name else [one(str(v)) for v in values]
            if name in ("stretch", "range"):
                _, _ = checked[name]
    except (argparse.ArgumentTypeError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"the model's file holds invalid options of its training tiles ({error!r:.80}); train "
            "or export it again."
        ) from None
    return checked


def sampled_parts(length: int, whole: bool) -> list[tuple[int, int]]:
    """Where the parts whose values are sampled begin along `length` pixels, and how long they are.

    They cover all of it if it is short or `whole`; otherwise they are `GRID` and spread evenly.
    """
    if length <= SAMPLE:
        return [(0, length)]
    side, count = (SAMPLE, -(-length // SAMPLE)) if whole else (SAMPLE // GRID, GRID)
    return [(i * (length - side) // (count - 1), side) for i in range(count)]


def as_limits(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Limits [2,B] as float32, so far apart that 255 divided by the difference is finite."""
    low, high = np.stack([low, high]).clip(-1e30, 1e30).astype(np.float32)
    least = np.maximum(1e-30, np.abs(low) * 1e-6, dtype=np.float32)
    return np.stack([low, np.maximum(high, low + least)])
