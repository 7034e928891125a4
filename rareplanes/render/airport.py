"""Lays out a whole airport: runway, taxiways, aprons, terminals, roads, woods and a small field."""

from itertools import pairwise

import numpy as np

from rareplanes.render.buildings import build_lot, gabled, terminal_building
from rareplanes.render.plan import (
    REACH,
    RED,
    WHITE,
    YELLOW,
    Airport,
    Block,
    Colour,
    Material,
    Pair,
    Plan,
    Points,
    Slot,
    bend,
    box,
    line,
    oval,
    rect,
    rotation,
)

# Figures painted on pavement: each has lines through points of a grid, as digits x (0-2) and
# y (0-4).
SHAPES = """
0020240400,1014,002022020424,00202404 0222,000222 2024,200002222404,200004242202,
002024,0020240400 0222,220200202404,000424,0400202202 1224,0024 0420,0004 2024 0222,
0020 1014,1014 0222,1014 011021,021022 041224,0020 0222 0424
"""
GLYPHS = dict(zip("0123456789LRXHT+AV=", map(str.split, SHAPES.split(",")), strict=True))


def plan(airport: Airport, rng: np.random.Generator) -> Plan:
    """A plan in the style of an airport; each scene has another one."""
    p = Plan(airport)
    taxi = rng.uniform(85, 125)
    apron = taxi + rng.uniform(40, 60)
    terminal = apron + rng.uniform(190, 260)
    _runway(p, rng)
    _taxiways(p, rng, taxi, apron)
    _apron(p, rng, apron, terminal, slabs=rng.random() < 0.5)
    _tracks(p, rng, terminal)
    edges = np.linspace(-REACH, REACH, 2 * len(airport.segments) + 1)
    for i, (left, right) in enumerate(pairwise(edges)):
        builder = SEGMENTS[airport.segments[i % len(airport.segments)]]
        builder(p, rng, left + 40, right - 40, terminal)
    _landside(p, rng, terminal + 70)
    _small_field(p, rng)
    return p


def _runway(p: Plan, rng: np.random.Generator) -> None:
    half = rng.uniform(22, 30)
    p.pave(rect(-REACH, -half - 8, REACH, half + 8), Material.SHOULDER)
    p.pave(rect(-REACH, -half, REACH, half), Material.RUNWAY)
    for _ in range(40):
        x, y = rng.uniform(-REACH, REACH), rng.uniform(-half, half)
        patch = box((x, y), rng.uniform(8, 90), rng.uniform(5, 20), 0)
        p.pave(np.clip(patch, -REACH, (REACH, half)), Material.RUNWAY, rng.uniform(0.85, 1.15))
    for x in np.arange(-REACH, REACH, 50):
        p.mark(line((x, 0), (x + 30, 0)), 0.9)
    for y in (-half + 1.5, half - 1.5):
        p.mark(line((-REACH, y), (REACH, y)), 0.9)
    for zone in (-REACH * 0.72, REACH * 0.72):
        inward = -np.sign(zone)
        for y in np.linspace(-half + 4, half - 4, 12):
            if abs(y) > 2:
                p.mark(line((zone, y), (zone + inward * 30, y)), 1.8)
        for distance, count in ((150, 3), (300, 1), (450, 2)):
            for side in (-1, 1):
                for k in range(count):
                    y = side * (8 + 2.6 * k)
                    x = zone + inward * distance
                    p.mark(line((x, y), (x + inward * 23, y)), 6 if count == 1 else 1.8)
        for _ in range(70):
            x = zone + inward * rng.normal(320, 120)
            y = rng.choice((-1, 1)) * rng.normal(4.5, 2.2)
            length = rng.uniform(40, 160)
            drift = rng.normal(0, 1)
            p.stain(line((x, y), (x + length, y + drift)), 0.7, rng.uniform(25, 80))
        number = f"{rng.integers(1, 37):02}" + str(rng.choice(("", "L", "R")))
        for k, name in enumerate(number):
            side = inward * (k - (len(number) - 1) / 2) * 9
            _paint(p, name, (zone + inward * 52, side), (6, 16), inward * np.pi / 2, 1.8)
    p.routes.append(line((-REACH, 0), (REACH, 0)))


def _paint(
    p: Plan, name: str, at: Pair, size: Pair, heading: float, width: float, colour: Colour = WHITE
) -> None:
    """One of GLYPHS, `size` metres wide and high."""
    for text in GLYPHS[name]:
        grid = np.array([list(map(int, text[i : i + 2])) for i in range(0, len(text), 2)])
        p.mark(((grid / (2, 4) - 0.5) * size) @ rotation(heading) + at, width, colour)


def _way(p: Plan, points: Points, width: float = 23.0) -> None:
    p.lay(points, width + 13, Material.SHOULDER)
    p.lay(points, width, Material.TAXIWAY)
    p.mark(points, 0.7, YELLOW)
    p.routes.append(points)


def _taxiways(p: Plan, rng: np.random.Generator, taxi: float, apron: float) -> None:
    _way(p, line((-REACH, taxi), (REACH, taxi)))
    for y in (taxi - 11, taxi + 11):
        p.mark(line((-REACH, y), (REACH, y)), 0.5, YELLOW)
    step = rng.uniform(190, 280)
    for x in np.arange(-REACH + 60, REACH, step):
        y = apron + 20
        _way(p, line((x, y), (x, taxi)))
        for side in (-1, 1):
            _way(p, bend((x, y), (x, taxi), (x + side * (y - taxi) * 0.75, taxi)))
        if rng.random() < 0.5:
            _way(p, bend((x, taxi), (x + taxi * 0.9, 0.3 * taxi), (x + taxi * 2.2, 0)))
        else:
            _way(p, line((x, taxi), (x, 20)))
            for side in (-1, 1):
                _way(p, bend((x, taxi * 0.45), (x, 0), (x + side * taxi * 0.5, 0)))
            y = taxi * 0.62
            for k in range(4):
                p.mark(line((x - 11, y + 1.4 * k), (x + 11, y + 1.4 * k)), 0.5, YELLOW)


def _tracks(p: Plan, rng: np.random.Generator, terminal: float) -> None:
    """Perimeter roads, dirt tracks and drains, and bare patches beyond the pavement."""
    for y in (-265.0, terminal + 330):
        wave = np.linspace(-REACH, REACH, 60)
        road = np.stack((wave, y + 14 * np.sin(wave / 170)), 1)
        p.lay(road, 7, Material.ROAD)
    for _ in range(26):
        x = rng.uniform(-REACH, REACH)
        y = rng.choice((rng.uniform(-420, -215), rng.uniform(40, 85), rng.uniform(-75, -40)))
        end = x + rng.uniform(60, 260), y + rng.normal(0, 12 if y > -100 else 60)
        middle = (x + end[0]) / 2, (y + end[1]) / 2 + rng.normal(0, 20)
        p.lay(bend((x, y), middle, end), rng.uniform(1.2, 4), Material.SOIL)
    for _ in range(30):
        x = rng.uniform(-REACH, REACH)
        y = rng.choice((rng.uniform(-460, -235), rng.uniform(35, 80)))
        end = x + rng.uniform(2, 25), y + rng.normal(0, 6)
        p.lay(line((x, y), end), rng.uniform(6, 18), Material.SOIL)


def _apron(p: Plan, rng: np.random.Generator, top: float, bottom: float, slabs: bool) -> None:
    material = Material.SLABS if slabs else Material.APRON
    p.pave(rect(-REACH, top, REACH, bottom), material)
    for _ in range(90):
        x, y = rng.uniform(-REACH, REACH), rng.uniform(top, bottom)
        w, h = rng.choice((15, 30, 45, 90)), rng.choice((7.5, 15, 30))
        spread = 0.06
        if rng.random() < 0.15 and not p.airport.plain:  # a part that was built at another time
            w, h, spread = w * 3, h * 3, 0.25
        shape = np.clip(box((x, y), w, h, 0), (-REACH, top), (REACH, bottom))
        tone = rng.uniform(1 - spread, 1 + spread)
        p.pave(shape, int(rng.choice((material, material, Material.TAXIWAY))), tone)
    for x in np.arange(-REACH, REACH - 200, rng.uniform(180, 500)):  # islands of grass
        if rng.random() < 0.4:
            length, y = rng.uniform(50, 150), top + 49.5
            for width, ground in ((30, Material.SHOULDER), (22, Material.GROUND)):
                p.pave(rect(x, y - width / 2, x + length, y + width / 2), ground)
                for end in (x, x + length):
                    p.pave(oval((end, y), width, width, 0), ground)
    for _ in range(0 if p.airport.plain else 70):
        y = rng.choice((rng.uniform(top, bottom), rng.uniform(-18, 18)))  # or on the runway
        at = (rng.uniform(-REACH, REACH), y)
        name, height = str(rng.choice(list(GLYPHS))), rng.uniform(3, 14)
        size, turn = (height * rng.uniform(0.4, 1), height), rng.integers(4) * np.pi / 2
        colour = (WHITE, YELLOW)[int(rng.random() < 0.4)]
        _paint(p, name, at, size, turn, height * rng.uniform(0.08, 0.2), colour)
        if name == "H" or rng.random() < 0.08:
            ring = oval(at, 1.6 * height, 1.6 * height, 0)
            p.mark(np.concatenate((ring, ring[:1])), 0.9, colour)
    for y in (top + 24, top + 75):
        p.mark(line((-REACH, y), (REACH, y)), 0.7, YELLOW)
        p.routes.append(line((-REACH, y), (REACH, y)))
    for _ in range(160):
        x, y = rng.uniform(-REACH, REACH), rng.uniform(top, bottom)
        r, a = rng.uniform(10, 45), rng.uniform(0, 6.28)
        start = (x + r * np.cos(a), y + r * np.sin(a))
        end = (x + r * np.cos(a + 2), y + r * np.sin(a + 2))
        p.stain(bend(start, (x, y), end), 0.6, rng.uniform(20, 70))
    for _ in range(120):
        x, y = rng.uniform(-REACH, REACH), rng.uniform(top, bottom)
        p.stain(line((x, y), (x + 0.5, y)), rng.uniform(1, 5), rng.uniform(30, 120))


def _landside(p: Plan, rng: np.random.Generator, y: float) -> None:
    """A road, and lots behind it, behind the small field, and in gaps of the woods."""
    p.lay(line((-REACH, y + 8), (REACH, y + 8)), 14, Material.ROAD)
    for x in np.arange(-REACH, REACH, 9):
        p.mark(line((x, y + 8), (x + 4, y + 8)), 0.5)
    for y0, y1, share in ((y + 22, y + 120, 1.0), (y + 140, y + 240, 0.4), (-390, -285, 0.5)):
        x = -REACH + 20
        while x < REACH - 150:
            width = rng.uniform(90, 190)
            if rng.random() < share:
                build_lot(p, rng, (x, y0, x + width, y1))
            x += width + rng.uniform(10, 40)
    _trees(p, rng, y + 130, y + 320)
    _trees(p, rng, -420, -300)


def _trees(p: Plan, rng: np.random.Generator, y0: float, y1: float) -> None:
    for _ in range(int(90 * p.airport.trees)):
        x, y = rng.uniform(-REACH, REACH), rng.uniform(y0, y1)
        spread = rng.uniform(6, 30)
        for _ in range(int(rng.integers(3, 26))):
            point = rng.normal((x, y), spread)
            if y0 < point[1] < y1:
                p.trees.append((point[0], point[1], rng.uniform(2.2, 5.5)))


def _small_field(p: Plan, rng: np.random.Generator) -> None:
    """Aprons with hangars for small aircraft, and round pads for military ones."""
    _way(p, line((-REACH, -90), (REACH, -90)), 15)
    for x in np.arange(-REACH + 100, REACH - 260, rng.uniform(330, 460)):
        _way(p, line((x, -90), (x, -20)), 15)
        material = int(rng.choice((Material.APRON, Material.SLABS, Material.TAXIWAY)))
        if rng.random() < 0.65:
            p.pave(rect(x - 10, -200, x + 240, -84), material)
            for y, span in ((-128, 20), (-168, 14)):
                heading = rng.choice((np.pi / 2, -np.pi / 2, np.pi / 3))
                for column in np.arange(x, x + 230, span + 3):
                    p.slots.append(Slot(column, y, heading, span))
                    if span > 15:
                        stand(p, column, y, heading, span, 12)
            for left in np.arange(x - 5, x + 205, 36):
                depth = rng.uniform(18, 30)
                gabled(p, rng, rect(left, -212 - depth, left + 30, -212), 8)
        else:
            for pad_x in np.arange(x, x + 260, 65):
                y = -150 - 25 * (int(pad_x) % 2)
                circle = np.linspace(0, 2 * np.pi, 24)
                ring = np.stack((pad_x + 24 * np.cos(circle), y + 24 * np.sin(circle)), 1)
                _way(p, line((pad_x, -90), (pad_x, y)), 12)
                p.pave(ring, material)
                p.slots.append(Slot(pad_x, y, rng.uniform(0, 6.28), 36))


def stand(p: Plan, x: float, y: float, heading: float, span: float, lead: float) -> None:
    """Paint and oil stains of one stand; an aircraft stops at (x, y)."""
    c, s = np.cos(heading), np.sin(heading)
    back = (x - c * lead, y - s * lead)
    corner = (back[0] - c * 18, back[1] - s * 18)
    p.mark(line((x + c * span * 0.4, y + s * span * 0.4), back), 0.6, YELLOW)
    p.mark(bend(back, corner, (corner[0] + s * 26, corner[1] - c * 26)), 0.5, YELLOW)
    for k in range(4):
        bar = box((x + c * span * 0.1 * k, y + s * span * 0.1 * k), 0.6, 4, heading)
        p.mark(bar[:2], 0.5, WHITE)
    if span > 20:
        outline = box((x, y), span * 1.05, span * 1.08, heading)
        p.mark(outline[1:], 0.5, RED if int(x) % 2 else WHITE)
    p.mark(line(corner, (corner[0] + 3, corner[1])), 2.5, YELLOW)
    p.stain(line((x, y), (x - c * 4, y - s * 4)), 3.5, 90.0)


def _linear(p: Plan, rng: np.random.Generator, x0: float, x1: float, bottom: float) -> None:
    hall = rect(x0, bottom, x1, bottom + rng.uniform(32, 55))
    terminal_building(p, rng, hall, rng.uniform(9, 15))
    x = x0 + 28
    while x < x1 - 25:
        wide = rng.random() < 0.35
        span = 62 if wide else 38
        y = bottom - (38 if wide else 28)
        p.slots.append(Slot(x, y, np.pi / 2, span, (x - span * 0.3, bottom)))
        stand(p, x, y, np.pi / 2, span, 60)
        x += span + 8


def _piers(p: Plan, rng: np.random.Generator, x0: float, x1: float, bottom: float) -> None:
    terminal_building(p, rng, rect(x0, bottom, x1, bottom + 50), 14)
    for x in np.arange(x0 + 70, x1 - 40, rng.uniform(150, 190)):
        end = bottom - rng.uniform(90, 125)
        terminal_building(p, rng, rect(x - 11, end, x + 11, bottom), 9)
        if rng.random() < 0.4:  # a round hall at the end
            terminal_building(p, rng, oval((x, end), 34, 34, 0), 11)
        for side in (-1, 1):
            y = end + 14
            while y < bottom - 20:
                span = 36 if rng.random() < 0.75 else 44
                stand_x = x + side * (11 + span * 0.62)
                heading = 0.0 if side < 0 else np.pi
                p.slots.append(Slot(stand_x, y, heading, span, (x + side * 11, y + side * 9)))
                stand(p, stand_x, y, heading, span, 32)
                y += span + 5


def _satellite(p: Plan, rng: np.random.Generator, x0: float, x1: float, bottom: float) -> None:
    terminal_building(p, rng, rect(x0, bottom + 10, x1, bottom + 45), 12)
    sides = int(rng.choice((6, 8, 12)))
    for x in np.arange(x0 + 110, x1 - 60, 215):
        y, r = bottom - 88, rng.uniform(22, 30)
        angles = np.arange(sides) * 2 * np.pi / sides + np.pi / sides
        ring = np.stack((x + r * np.cos(angles), y + r * np.sin(angles)), 1)
        p.blocks.append(Block(rect(x - 4, y, x + 4, bottom + 12), 0, 5, (150, 150, 148), 5))
        terminal_building(p, rng, ring, 10)
        for a in np.arange(6) * np.pi / 3 + np.pi / 6:
            if abs(a - np.pi / 2) < 0.3:
                continue
            away = r + 24
            slot = (x + away * np.cos(a), y + away * np.sin(a), a + np.pi)
            p.slots.append(Slot(*slot, 37, (x + r * np.cos(a + 0.35), y + r * np.sin(a + 0.35))))
            stand(p, *slot, 36, 26)


def _remote(p: Plan, rng: np.random.Generator, x0: float, x1: float, bottom: float) -> None:
    heading = rng.choice((np.pi / 2, np.pi / 3, 2 * np.pi / 3, -np.pi / 2))
    for y, span in ((bottom - 40, 46), (bottom - 105, 34)):
        for x in np.arange(x0 + 30, x1 - 20, span + 7):
            p.slots.append(Slot(x, y, heading, span))
            stand(p, x, y, heading, span, 30)
    for x in np.arange(x0, x1 - 80, rng.uniform(95, 130)):
        gabled(p, rng, rect(x, bottom + 12, x + 75, bottom + 66), 16)


SEGMENTS = {"linear": _linear, "piers": _piers, "satellite": _satellite, "remote": _remote}
