"""Plans of invented airports: paved surfaces, paint, buildings and places to park, in metres.

World frame: x to the right, y down, as on the screen. The runway lies on y = 0; taxiway, apron,
terminals and car parks follow below it, a field for small aircraft lies above it.
"""

import zlib
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import numpy as np

GROUND, SOIL, RUNWAY, TAXIWAY, SHOULDER, APRON, SLABS, ROAD, CARPARK = range(9)
REACH = 1500.0  # metres, half the length of a plan
WHITE, YELLOW, RED = (205.0, 208, 208), (70.0, 165, 195), (80.0, 85, 170)

Colour = tuple[float, float, float]  # BGR, 0-255
Points = np.ndarray  # [N,2] metres


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
    """A prism standing on `base`; `group` tells roofs, huts and so on apart in the mask."""

    points: Points
    base: float
    height: float
    colour: Colour
    group: int = 0


class Slot(NamedTuple):
    """A place for an aircraft; `bridge` is where a jet bridge leaves the terminal."""

    x: float
    y: float
    heading: float
    span: float
    bridge: tuple[float, float] | None = None


@dataclass(frozen=True)
class Airport:
    name: str
    biome: str
    segments: tuple[str, ...]  # what lines the apron, from left to right
    ground: Colour
    soil: Colour
    asphalt: Colour
    concrete: Colour
    roof: Colour
    trees: float = 0.0
    weather: tuple[str, ...] = ("Clear", "Clear", "Overcast", "Haze")


AIRPORTS = (
    Airport("Bergen", "Temperate Forest", ("linear", "remote", "piers"), (58, 92, 76), (84, 108, 116), (78, 76, 74), (138, 142, 142), (128, 124, 118), 0.9, ("Clear", "Overcast", "Rain", "Haze")),
    Airport("Tucson", "Temperate Deserts", ("piers", "linear", "remote"), (120, 150, 172), (104, 138, 166), (112, 116, 120), (166, 178, 186), (182, 190, 196), 0.08, ("Clear", "Clear", "Dust")),
    Airport("Manaus", "Tropical Rainforest", ("remote", "linear", "satellite"), (48, 96, 78), (62, 88, 138), (86, 86, 90), (142, 148, 152), (150, 130, 112), 1.4, ("Clear", "Overcast", "Haze")),
    Airport("Tromso", "Tundra", ("linear", "linear", "remote"), (206, 200, 194), (170, 168, 166), (88, 86, 86), (150, 148, 146), (120, 118, 126), 0.3, ("Snow", "Snow", "Overcast", "Clear")),
    Airport("Alicante", "Mediterranean", ("satellite", "piers", "linear"), (88, 128, 138), (96, 132, 156), (94, 96, 98), (156, 162, 164), (150, 160, 176), 0.25, ("Clear", "Clear", "Haze")),
    Airport("Auckland", "Temperate Grassland", ("piers", "satellite", "piers"), (66, 112, 88), (88, 116, 124), (98, 94, 92), (172, 172, 168), (196, 194, 190), 0.35, ("Clear", "Overcast", "Haze")),
    Airport("Almaty", "Steppe", ("remote", "remote", "linear"), (104, 134, 140), (112, 134, 144), (104, 104, 104), (134, 136, 138), (110, 122, 140), 0.15, ("Snow", "Clear", "Haze", "Dust")),
    Airport("Oshawa", "Temperate Forest", ("remote", "linear", "remote"), (72, 104, 92), (92, 118, 128), (66, 64, 64), (122, 124, 126), (98, 96, 120), 0.7, ("Clear", "Snow", "Overcast")),
)  # fmt: skip


@dataclass
class Plan:
    surfaces: list[Surface] = field(default_factory=list)
    ways: list[Stroke] = field(default_factory=list)
    paint: list[Stroke] = field(default_factory=list)
    stains: list[Stroke] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)
    routes: list[Points] = field(default_factory=list)  # centre lines aircraft follow
    cars: list[tuple[float, float, float]] = field(default_factory=list)
    trees: list[tuple[float, float, float]] = field(default_factory=list)


def rect(x0: float, y0: float, x1: float, y1: float) -> Points:
    return np.array(((x0, y0), (x1, y0), (x1, y1), (x0, y1)), float)


def box(x: float, y: float, length: float, width: float, heading: float) -> Points:
    """A rectangle around (x, y), its length along `heading`."""
    c, s = np.cos(heading), np.sin(heading)
    corners = np.array(((1, 1), (1, -1), (-1, -1), (-1, 1))) * (length / 2, width / 2)
    return corners @ np.array(((c, s), (-s, c))) + (x, y)


def bend(start: tuple[float, float], corner: tuple[float, float], end: tuple[float, float]) -> Points:
    """A quadratic Bézier curve."""
    t = np.linspace(0, 1, 12)[:, None]
    return (1 - t) ** 2 * np.array(start) + 2 * t * (1 - t) * np.array(corner) + t**2 * np.array(end)


def line(*points: tuple[float, float]) -> Points:
    return np.array(points, float)


@cache
def plan(airport: Airport) -> Plan:
    """The airport's plan; the same for everyone who asks by its name."""
    rng = np.random.default_rng(zlib.crc32(airport.name.encode()))
    p = Plan()
    taxi = rng.uniform(85, 125)
    apron = taxi + rng.uniform(40, 60)
    terminal = apron + rng.uniform(190, 260)
    _runway(p, rng)
    _taxiways(p, rng, taxi, apron)
    _apron(p, rng, apron, terminal, rng.integers(2))
    _tracks(p, rng, terminal)
    edges = np.linspace(-REACH, REACH, 2 * len(airport.segments) + 1)
    for i, (left, right) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        builder = SEGMENTS[airport.segments[i % len(airport.segments)]]
        builder(p, rng, left + 40, right - 40, apron, terminal, airport)
    _landside(p, rng, terminal + 70, airport)
    _small_field(p, rng, airport)
    return p


def _runway(p: Plan, rng: np.random.Generator) -> None:
    half = rng.uniform(22, 30)
    p.surfaces.append(Surface(rect(-REACH, -half - 8, REACH, half + 8), SHOULDER))
    p.surfaces.append(Surface(rect(-REACH, -half, REACH, half), RUNWAY))
    for _ in range(40):
        x, y = rng.uniform(-REACH, REACH), rng.uniform(-half, half)
        patch = box(x, y, rng.uniform(8, 90), rng.uniform(5, 20), 0)
        p.surfaces.append(Surface(np.clip(patch, -REACH, (REACH, half)), RUNWAY, rng.uniform(0.85, 1.15)))
    for x in np.arange(-REACH, REACH, 50):
        p.paint.append(Stroke(line((x, 0), (x + 30, 0)), 0.9))
    for y in (-half + 1.5, half - 1.5):
        p.paint.append(Stroke(line((-REACH, y), (REACH, y)), 0.9))
    for zone in (-REACH * 0.72, REACH * 0.72):
        inward = -np.sign(zone)
        for y in np.linspace(-half + 4, half - 4, 12):
            if abs(y) > 2:
                p.paint.append(Stroke(line((zone, y), (zone + inward * 30, y)), 1.8))
        for distance, count in ((150, 3), (300, 1), (450, 2)):
            for side in (-1, 1):
                for k in range(count):
                    y = side * (8 + 2.6 * k)
                    x = zone + inward * distance
                    p.paint.append(Stroke(line((x, y), (x + inward * 23, y)), 6 if count == 1 else 1.8))
        for _ in range(70):
            x = zone + inward * rng.normal(320, 120)
            y = rng.choice((-1, 1)) * rng.normal(4.5, 2.2)
            length = rng.uniform(40, 160)
            drift = rng.normal(0, 1)
            p.stains.append(Stroke(line((x, y), (x + length, y + drift)), 0.7, (rng.uniform(25, 80),) * 3))
    p.routes.append(line((-REACH, 0), (REACH, 0)))


def _way(p: Plan, points: Points, width: float = 23.0) -> None:
    p.ways.append(Stroke(points, width + 13, material=SHOULDER))
    p.ways.append(Stroke(points, width, material=TAXIWAY))
    p.paint.append(Stroke(points, 0.7, YELLOW))
    p.routes.append(points)


def _taxiways(p: Plan, rng: np.random.Generator, taxi: float, apron: float) -> None:
    _way(p, line((-REACH, taxi), (REACH, taxi)))
    for y in (taxi - 11, taxi + 11):
        p.paint.append(Stroke(line((-REACH, y), (REACH, y)), 0.5, YELLOW))
    step = rng.uniform(190, 280)
    for x in np.arange(-REACH + 60, REACH, step):
        for y0, y1 in ((apron + 20, taxi),):
            _way(p, line((x, y0), (x, y1)))
            r = abs(y1 - y0) * 0.75
            for side in (-1, 1):
                _way(p, bend((x, y0), (x, y1), (x + side * r, y1)))
        if rng.random() < 0.5:
            _way(p, bend((x, taxi), (x + taxi * 0.9, 0.3 * taxi), (x + taxi * 2.2, 0)))
        else:
            _way(p, line((x, taxi), (x, 20)))
            for side in (-1, 1):
                _way(p, bend((x, taxi * 0.45), (x, 0), (x + side * taxi * 0.5, 0)))
            y = taxi * 0.62
            for k in range(4):
                p.paint.append(Stroke(line((x - 11, y + 1.4 * k), (x + 11, y + 1.4 * k)), 0.5, YELLOW))


def _tracks(p: Plan, rng: np.random.Generator, terminal: float) -> None:
    """Perimeter roads, dirt tracks and drains, and bare patches beyond the pavement."""
    for y in (-265.0, terminal + 330):
        wave = np.linspace(-REACH, REACH, 60)
        road = np.stack((wave, y + 14 * np.sin(wave / 170)), 1)
        p.ways.append(Stroke(road, 7, material=ROAD))
    for _ in range(26):
        x = rng.uniform(-REACH, REACH)
        y = rng.choice((rng.uniform(-420, -215), rng.uniform(40, 85), rng.uniform(-75, -40)))
        end = x + rng.uniform(60, 260), y + rng.normal(0, 12 if y > -100 else 60)
        middle = (x + end[0]) / 2, (y + end[1]) / 2 + rng.normal(0, 20)
        p.ways.append(Stroke(bend((x, y), middle, end), rng.uniform(1.2, 4), material=SOIL))
    for _ in range(30):
        x, y = rng.uniform(-REACH, REACH), rng.choice((rng.uniform(-460, -235), rng.uniform(35, 80)))
        end = x + rng.uniform(2, 25), y + rng.normal(0, 6)
        p.ways.append(Stroke(line((x, y), end), rng.uniform(6, 18), material=SOIL))


def _apron(p: Plan, rng: np.random.Generator, top: float, bottom: float, slabs: int) -> None:
    material = SLABS if slabs else APRON
    p.surfaces.append(Surface(rect(-REACH, top, REACH, bottom), material))
    for _ in range(90):
        x, y = rng.uniform(-REACH, REACH), rng.uniform(top, bottom)
        w, h = rng.choice((15, 30, 45, 90)), rng.choice((7.5, 15, 30))
        shape = np.clip(box(x, y, w, h, 0), (-REACH, top), (REACH, bottom))
        p.surfaces.append(Surface(shape, int(rng.choice((material, TAXIWAY))), rng.uniform(0.9, 1.12)))
    for y in (top + 24, top + 75):
        p.paint.append(Stroke(line((-REACH, y), (REACH, y)), 0.7, YELLOW))
        p.routes.append(line((-REACH, y), (REACH, y)))
    for _ in range(160):
        x, y = rng.uniform(-REACH, REACH), rng.uniform(top, bottom)
        r, a = rng.uniform(10, 45), rng.uniform(0, 6.28)
        ends = (x + r * np.cos(a), y + r * np.sin(a)), (x + r * np.cos(a + 2), y + r * np.sin(a + 2))
        p.stains.append(Stroke(bend(ends[0], (x, y), ends[1]), 0.6, (rng.uniform(20, 70),) * 3))
    for _ in range(120):
        x, y = rng.uniform(-REACH, REACH), rng.uniform(top, bottom)
        p.stains.append(Stroke(line((x, y), (x + 0.5, y)), rng.uniform(1, 5), (rng.uniform(30, 120),) * 3))


def _stand(p: Plan, x: float, y: float, heading: float, span: float, lead: float) -> None:
    """Paint and oil of one stand whose stop lies at (x, y)."""
    c, s = np.cos(heading), np.sin(heading)
    back = (x - c * lead, y - s * lead)
    p.paint.append(Stroke(line((x + c * span * 0.4, y + s * span * 0.4), back), 0.6, YELLOW))
    turn = (back[0] - c * 18 + s * 26, back[1] - s * 18 - c * 26)
    p.paint.append(Stroke(bend(back, (back[0] - c * 18, back[1] - s * 18), turn), 0.5, YELLOW))
    for k in range(4):
        at = box(x + c * span * 0.1 * k, y + s * span * 0.1 * k, 0.6, 4, heading)
        p.paint.append(Stroke(at[[0, 1]], 0.5, WHITE))
    if span > 20:
        outline = box(x, y, span * 1.05, span * 1.08, heading)
        p.paint.append(Stroke(outline[[0, 1, 2, 3, 0]][1:4], 0.5, RED if int(x) % 2 else WHITE))
    p.stains.append(Stroke(line((x, y), (x - c * 4, y - s * 4)), 3.5, (90.0,) * 3))


def _terminal(p: Plan, rng: np.random.Generator, points: Points, airport: Airport, height: float) -> None:
    """A building with a parapet, strips of roof light and machines on its roof."""
    group = int(rng.integers(1, 9))
    tone = rng.uniform(0.85, 1.15)
    colour = tuple(float(v * tone) for v in airport.roof)
    p.blocks.append(Block(points, 0, height, tuple(v * 0.8 for v in colour), group))  # type: ignore[arg-type]
    centre = points.mean(0)
    inner = centre + (points - centre) * 0.96
    p.blocks.append(Block(inner, height, 0.05, colour, group + 10))  # type: ignore[arg-type]
    axis = points[1] - points[0]
    other = points[-1] - points[0]
    if np.linalg.norm(other) > np.linalg.norm(axis):
        axis, other = other, axis
    angle = float(np.arctan2(axis[1], axis[0]))
    for offset in rng.uniform(-0.35, 0.35, rng.integers(1, 4)):
        x, y = centre + other * offset
        strip = box(x, y, float(np.linalg.norm(axis)) * rng.uniform(0.6, 0.9), rng.uniform(0.6, 2.5), angle)
        p.blocks.append(Block(strip, height, 0.4, (95, 90, 86), group + 20))
    for _ in range(int(np.linalg.norm(axis) / 9)):
        x, y = centre + axis * rng.uniform(-0.45, 0.45) + other * rng.uniform(-0.4, 0.4)
        unit = box(x, y, rng.uniform(1.5, 6), rng.uniform(1.5, 4), angle)
        grey = rng.uniform(120, 215)
        p.blocks.append(Block(unit, height, rng.uniform(0.8, 2), (grey, grey, grey * 0.98), group + 30))


def _linear(p: Plan, rng: np.random.Generator, x0: float, x1: float, top: float, bottom: float, airport: Airport) -> None:  # noqa: E501
    _terminal(p, rng, rect(x0, bottom, x1, bottom + rng.uniform(32, 55)), airport, rng.uniform(9, 15))
    x = x0 + 28
    while x < x1 - 25:
        wide = rng.random() < 0.35
        span = 62 if wide else 38
        y = bottom - (38 if wide else 28)
        p.slots.append(Slot(x, y, np.pi / 2, span, (x - span * 0.3, bottom)))
        _stand(p, x, y, np.pi / 2, span, 60)
        x += span + 8


def _piers(p: Plan, rng: np.random.Generator, x0: float, x1: float, top: float, bottom: float, airport: Airport) -> None:  # noqa: E501
    _terminal(p, rng, rect(x0, bottom, x1, bottom + 50), airport, 14)
    for x in np.arange(x0 + 70, x1 - 40, rng.uniform(150, 190)):
        end = bottom - rng.uniform(90, 125)
        _terminal(p, rng, rect(x - 11, end, x + 11, bottom), airport, 9)
        for side in (-1, 1):
            y = end + 14
            while y < bottom - 20:
                span = 36 if rng.random() < 0.75 else 44
                at = x + side * (11 + span * 0.62)
                heading = 0.0 if side < 0 else np.pi
                p.slots.append(Slot(at, y, heading, span, (x + side * 11, y + side * 9)))
                _stand(p, at, y, heading, span, 32)
                y += span + 5


def _satellite(p: Plan, rng: np.random.Generator, x0: float, x1: float, top: float, bottom: float, airport: Airport) -> None:  # noqa: E501
    _terminal(p, rng, rect(x0, bottom + 10, x1, bottom + 45), airport, 12)
    sides = int(rng.choice((6, 8, 12)))
    for x in np.arange(x0 + 110, x1 - 60, 215):
        y, r = bottom - 88, rng.uniform(22, 30)
        angles = np.arange(sides) * 2 * np.pi / sides + np.pi / sides
        ring = np.stack((x + r * np.cos(angles), y + r * np.sin(angles)), 1)
        p.blocks.append(Block(rect(x - 4, y, x + 4, bottom + 12), 0, 5, (150, 150, 148), 5))
        _terminal(p, rng, ring, airport, 10)
        for a in np.arange(6) * np.pi / 3 + np.pi / 6:
            if abs(a - np.pi / 2) < 0.3:
                continue
            away = r + 24
            slot = (x + away * np.cos(a), y + away * np.sin(a), a + np.pi)
            p.slots.append(Slot(*slot, 37, (x + r * np.cos(a + 0.35), y + r * np.sin(a + 0.35))))
            _stand(p, *slot, 36, 26)


def _remote(p: Plan, rng: np.random.Generator, x0: float, x1: float, top: float, bottom: float, airport: Airport) -> None:  # noqa: E501
    heading = rng.choice((np.pi / 2, np.pi / 3, 2 * np.pi / 3, -np.pi / 2))
    for y, span in ((bottom - 40, 46), (bottom - 105, 34)):
        for x in np.arange(x0 + 30, x1 - 20, span + 7):
            p.slots.append(Slot(x, y, heading, span))
            _stand(p, x, y, heading, span, 30)
    for x in np.arange(x0, x1 - 80, rng.uniform(95, 130)):
        hangar = rect(x, bottom + 12, x + 75, bottom + 66)
        _hangar(p, rng, hangar, airport, 16)


def _hangar(p: Plan, rng: np.random.Generator, points: Points, airport: Airport, height: float) -> None:
    """A gabled hall: the two slopes differ in tone."""
    tone, group = rng.uniform(0.7, 1.2), int(rng.integers(1, 9))
    colour = tuple(float(v * tone) for v in airport.roof)
    p.blocks.append(Block(points, 0, height, colour, group))  # type: ignore[arg-type]
    (x0, y0), (x1, y1) = points[0], points[2]
    half = rect(x0, y0, x1, (y0 + y1) / 2)
    p.blocks.append(Block(half, height, 0.05, tuple(v * 0.86 for v in colour), group + 10))  # type: ignore[arg-type]
    for x in np.linspace(x0, x1, 6)[1:-1]:
        p.blocks.append(Block(rect(x - 0.4, y0 + 3, x + 0.4, y1 - 3), height, 0.1, (200, 200, 196), 31))


def _landside(p: Plan, rng: np.random.Generator, y: float, airport: Airport) -> None:
    p.ways.append(Stroke(line((-REACH, y + 8), (REACH, y + 8)), 14, material=ROAD))
    for x in np.arange(-REACH, REACH, 9):
        p.paint.append(Stroke(line((x, y + 8), (x + 4, y + 8)), 0.5))
    x = -REACH + 20
    while x < REACH - 150:
        width = rng.uniform(90, 190)
        if rng.random() < 0.55:
            p.surfaces.append(Surface(rect(x, y + 22, x + width, y + 120), CARPARK))
            for row in np.arange(y + 28, y + 116, 9):
                for at in np.arange(x + 5, x + width - 4, 2.9):
                    p.cars.append((at, row, np.pi / 2))
                p.paint.append(Stroke(line((x + 4, row + 3), (x + width - 4, row + 3)), 0.4))
        else:
            for at in np.arange(x + 5, x + width - 30, 44):
                depth = rng.uniform(20, 50)
                _terminal(p, rng, rect(at, y + 30, at + 30, y + 30 + depth), airport, rng.uniform(6, 20))
        x += width + rng.uniform(10, 40)
    _trees(p, rng, airport, y + 130, y + 320)
    _trees(p, rng, airport, -420, -300)


def _trees(p: Plan, rng: np.random.Generator, airport: Airport, y0: float, y1: float) -> None:
    for _ in range(int(90 * airport.trees)):
        x, y = rng.uniform(-REACH, REACH), rng.uniform(y0, y1)
        spread = rng.uniform(6, 30)
        for _ in range(int(rng.integers(3, 26))):
            at = rng.normal((x, y), spread)
            if y0 < at[1] < y1:
                p.trees.append((at[0], at[1], rng.uniform(2.2, 5.5)))


def _small_field(p: Plan, rng: np.random.Generator, airport: Airport) -> None:
    """Aprons with hangars for small aircraft, and round pads for military ones."""
    _way(p, line((-REACH, -90), (REACH, -90)), 15)
    for x in np.arange(-REACH + 100, REACH - 260, rng.uniform(330, 460)):
        _way(p, line((x, -90), (x, -20)), 15)
        material = int(rng.choice((APRON, SLABS, TAXIWAY)))
        if rng.random() < 0.65:
            p.surfaces.append(Surface(rect(x - 10, -200, x + 240, -84), material))
            for y, span in ((-128, 20), (-168, 14)):
                heading = rng.choice((np.pi / 2, -np.pi / 2, np.pi / 3))
                for at in np.arange(x, x + 230, span + 3):
                    p.slots.append(Slot(at, y, heading, span))
                    if span > 15:
                        _stand(p, at, y, heading, span, 12)
            for at in np.arange(x - 5, x + 205, 36):
                depth = rng.uniform(18, 30)
                _hangar(p, rng, rect(at, -212 - depth, at + 30, -212), airport, 8)
        else:
            for at in np.arange(x, x + 260, 65):
                y = -150 - 25 * (int(at) % 2)
                circle = np.linspace(0, 2 * np.pi, 24)
                ring = np.stack((at + 24 * np.cos(circle), y + 24 * np.sin(circle)), 1)
                _way(p, line((at, -90), (at, y)), 12)
                p.surfaces.append(Surface(ring, material))
                p.slots.append(Slot(at, y, rng.uniform(0, 6.28), 36))


SEGMENTS = {"linear": _linear, "piers": _piers, "satellite": _satellite, "remote": _remote}
