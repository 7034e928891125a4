"""The parts of an airport's plan, in metres, and the table of airports.

World frame: x to the right, y down, as on the screen. The runway lies on y = 0; taxiway, apron,
terminals and car parks follow below it, a field for small aircraft lies above it.
"""

from dataclasses import dataclass, field
from enum import IntEnum
from functools import cache
from typing import Any, NamedTuple

import numpy as np

REACH = 1500.0  # metres, half the length of a plan
WHITE, YELLOW, RED = (232.0, 235, 235), (70.0, 175, 210), (80.0, 85, 180)

Colour = tuple[float, float, float]  # BGR, 0-255
Points = np.ndarray  # [N,2] metres
Pair = tuple[float, float]


class Material(IntEnum):
    GROUND, SOIL, RUNWAY, TAXIWAY, SHOULDER, APRON, SLABS, ROAD, CARPARK, WATER = range(10)
    ROOF = 10  # not in a plan: what is above the aircraft


class Surface(NamedTuple):
    points: Points
    material: int
    tone: float = 1.0


class Stroke(NamedTuple):
    """A thick line: paint where `material` is None, else a paved way."""

    points: Points
    width: float
    colour: Colour = WHITE
    material: int | None = None


class Block(NamedTuple):
    """A prism that stands on `base`; `group` separates roofs, huts and so on in the mask."""

    points: Points
    base: float
    height: float
    colour: Colour
    group: int = 0


class Slot(NamedTuple):
    """A parking position of an aircraft; `bridge` is where a jet bridge leaves the terminal."""

    x: float
    y: float
    heading: float
    span: float
    bridge: Pair | None = None


@dataclass(frozen=True)
class Airport:
    name: str
    segments: tuple[str, ...]  # what stands along the apron, from left to right
    weather: tuple[str, ...]  # one is drawn for each scene
    trees: float
    ground: Colour
    soil: Colour
    asphalt: Colour
    concrete: Colour
    roof: Colour
    plain: bool = False  # hardly anything but aircraft is bright


# name, segments of the apron, weather, density of woods, then the colours (RGB) of ground, soil,
# asphalt, concrete and roofs
TABLE = """
Bergen linear,remote,piers Clear,Overcast,Rain,Haze .9 4c5c3a 746c54 4a4c4e 8e8e8a 767c80
Tucson piers,linear,remote Clear,Clear,Dust .08 9a8468 987c5c 64605c 8c867c 8a847c
Manaus remote,linear,satellite Clear,Overcast,Haze 1.4 4e6030 8a583e 565252 86827c 64768a
Tromso linear,linear,remote Snow,Snow,Overcast,Clear .3 a6acb2 969a9c 565658 88898b 726a6c
Alicante satellite,piers,linear Clear,Haze .25 8a8058 9c8460 5a5856 84827c 887a70
Auckland piers,satellite,piers Clear,Overcast,Haze .35 587042 7c7458 56585c 868a8a 82868a
Almaty remote,remote,linear Snow,Clear,Haze,Dust .15 8c8668 908670 686868 8a8886 8c7a6e
Oshawa remote,linear,remote Clear,Snow,Overcast .7 5c6848 80765c 404042 7e7c7a 786062
"""


@cache
def airports() -> tuple[Airport, ...]:
    rows = []
    for row in TABLE.strip().splitlines():
        name, segments, weather, trees, *colours = row.split()
        bgr: Any = [tuple(map(float, bytes.fromhex(colour)[::-1])) for colour in colours]
        lists = (tuple(segments.split(",")), tuple(weather.split(",")))
        rows.append(Airport(name, *lists, float(trees), *bgr))
    return tuple(rows)


@dataclass
class Plan:
    airport: Airport
    surfaces: list[Surface] = field(default_factory=list)
    ways: list[Stroke] = field(default_factory=list)
    paint: list[Stroke] = field(default_factory=list)
    stains: list[Stroke] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)
    routes: list[Points] = field(default_factory=list)  # centre lines aircraft follow
    cars: list[tuple[float, float, float]] = field(default_factory=list)
    trees: list[tuple[float, float, float]] = field(default_factory=list)

    def pave(self, points: Points, material: int, tone: float = 1.0) -> None:
        self.surfaces.append(Surface(points, material, tone))

    def lay(self, points: Points, width: float, material: int) -> None:
        self.ways.append(Stroke(points, width, material=material))

    def mark(self, points: Points, width: float, colour: Colour = WHITE) -> None:
        self.paint.append(Stroke(points, width, colour))

    def stain(self, points: Points, width: float, strength: float) -> None:
        self.stains.append(Stroke(points, width, (strength,) * 3))


def scaled(colour: Colour, light: float) -> Colour:
    b, g, r = colour
    return b * light, g * light, r * light


def rotation(angle: float) -> np.ndarray:
    """The matrix [2,2] that turns points [...,2] clockwise on the screen: `points @ matrix`."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array(((c, s), (-s, c)))


def rect(x0: float, y0: float, x1: float, y1: float) -> Points:
    return np.array(((x0, y0), (x1, y0), (x1, y1), (x0, y1)), float)


def box(centre: Points | Pair, length: float, width: float, heading: float) -> Points:
    """A rectangle around `centre`, its length along `heading`."""
    corners = np.array(((1, 1), (1, -1), (-1, -1), (-1, 1))) * (length / 2, width / 2)
    return corners @ rotation(heading) + np.asarray(centre)


def oval(centre: Points | Pair, length: float, width: float, heading: float) -> Points:
    angle = np.arange(16) * np.pi / 8
    ring = np.stack((np.cos(angle) * length / 2, np.sin(angle) * width / 2), 1)
    return ring @ rotation(heading) + np.asarray(centre)


def bend(start: Pair, corner: Pair, end: Pair) -> Points:
    """A quadratic Bézier curve."""
    a, b, c = np.array((start, corner, end))
    t = np.linspace(0, 1, 12)[:, None]
    return (1 - t) ** 2 * a + 2 * t * (1 - t) * b + t**2 * c


def line(*points: Pair) -> Points:
    return np.array(points, float)
