"""What stands along an apron: terminals with piers, satellites, bridges, hangars and stands."""

import numpy as np

from rareplanes.render.plan import (
    RED,
    WHITE,
    YELLOW,
    Airport,
    Block,
    Plan,
    Points,
    Slot,
    bend,
    box,
    line,
    rect,
    scaled,
)


def stand(p: Plan, x: float, y: float, heading: float, span: float, lead: float) -> None:
    """Paint and oil stains of one stand; an aircraft stops at (x, y)."""
    c, s = np.cos(heading), np.sin(heading)
    back = (x - c * lead, y - s * lead)
    p.mark(line((x + c * span * 0.4, y + s * span * 0.4), back), 0.6, YELLOW)
    turn = (back[0] - c * 18 + s * 26, back[1] - s * 18 - c * 26)
    p.mark(bend(back, (back[0] - c * 18, back[1] - s * 18), turn), 0.5, YELLOW)
    for k in range(4):
        bar = box((x + c * span * 0.1 * k, y + s * span * 0.1 * k), 0.6, 4, heading)
        p.mark(bar[[0, 1]], 0.5, WHITE)
    if span > 20:
        outline = box((x, y), span * 1.05, span * 1.08, heading)
        p.mark(outline[[0, 1, 2, 3, 0]][1:4], 0.5, RED if int(x) % 2 else WHITE)
    p.stain(line((x, y), (x - c * 4, y - s * 4)), 3.5, 90.0)


def terminal_building(
    p: Plan, rng: np.random.Generator, points: Points, airport: Airport, height: float
) -> None:
    """A building with a parapet, strips of roof light and machines on its roof."""
    group = int(rng.integers(1, 9))
    colour = scaled(airport.roof, rng.uniform(0.7, 1.02))
    p.blocks.append(Block(points, 0, height, scaled(colour, 0.8), group))
    centre = points.mean(0)
    inner = centre + (points - centre) * 0.96
    p.blocks.append(Block(inner, height, 0.05, colour, group + 10))
    axis = points[1] - points[0]
    other = points[-1] - points[0]
    if np.linalg.norm(other) > np.linalg.norm(axis):
        axis, other = other, axis
    angle = float(np.arctan2(axis[1], axis[0]))
    for offset in rng.uniform(-0.35, 0.35, rng.integers(1, 4)):
        x, y = centre + other * offset
        strip = box(
            (x, y),
            float(np.linalg.norm(axis)) * rng.uniform(0.6, 0.9),
            rng.uniform(0.6, 2.5),
            angle,
        )
        p.blocks.append(Block(strip, height, 0.4, (95, 90, 86), group + 20))
    for _ in range(int(np.linalg.norm(axis) / 9)):
        x, y = centre + axis * rng.uniform(-0.45, 0.45) + other * rng.uniform(-0.4, 0.4)
        unit = box((x, y), rng.uniform(1.5, 6), rng.uniform(1.5, 4), angle)
        grey = rng.uniform(85, 150)
        p.blocks.append(
            Block(unit, height, rng.uniform(0.8, 2), (grey, grey, grey * 0.98), group + 30)
        )


def _linear(
    p: Plan, rng: np.random.Generator, x0: float, x1: float, bottom: float, airport: Airport
) -> None:
    terminal_building(
        p, rng, rect(x0, bottom, x1, bottom + rng.uniform(32, 55)), airport, rng.uniform(9, 15)
    )
    x = x0 + 28
    while x < x1 - 25:
        wide = rng.random() < 0.35
        span = 62 if wide else 38
        y = bottom - (38 if wide else 28)
        p.slots.append(Slot(x, y, np.pi / 2, span, (x - span * 0.3, bottom)))
        stand(p, x, y, np.pi / 2, span, 60)
        x += span + 8


def _piers(
    p: Plan, rng: np.random.Generator, x0: float, x1: float, bottom: float, airport: Airport
) -> None:
    terminal_building(p, rng, rect(x0, bottom, x1, bottom + 50), airport, 14)
    for x in np.arange(x0 + 70, x1 - 40, rng.uniform(150, 190)):
        end = bottom - rng.uniform(90, 125)
        terminal_building(p, rng, rect(x - 11, end, x + 11, bottom), airport, 9)
        for side in (-1, 1):
            y = end + 14
            while y < bottom - 20:
                span = 36 if rng.random() < 0.75 else 44
                stand_x = x + side * (11 + span * 0.62)
                heading = 0.0 if side < 0 else np.pi
                p.slots.append(Slot(stand_x, y, heading, span, (x + side * 11, y + side * 9)))
                stand(p, stand_x, y, heading, span, 32)
                y += span + 5


def _satellite(
    p: Plan, rng: np.random.Generator, x0: float, x1: float, bottom: float, airport: Airport
) -> None:
    terminal_building(p, rng, rect(x0, bottom + 10, x1, bottom + 45), airport, 12)
    sides = int(rng.choice((6, 8, 12)))
    for x in np.arange(x0 + 110, x1 - 60, 215):
        y, r = bottom - 88, rng.uniform(22, 30)
        angles = np.arange(sides) * 2 * np.pi / sides + np.pi / sides
        ring = np.stack((x + r * np.cos(angles), y + r * np.sin(angles)), 1)
        p.blocks.append(Block(rect(x - 4, y, x + 4, bottom + 12), 0, 5, (150, 150, 148), 5))
        terminal_building(p, rng, ring, airport, 10)
        for a in np.arange(6) * np.pi / 3 + np.pi / 6:
            if abs(a - np.pi / 2) < 0.3:
                continue
            away = r + 24
            slot = (x + away * np.cos(a), y + away * np.sin(a), a + np.pi)
            p.slots.append(Slot(*slot, 37, (x + r * np.cos(a + 0.35), y + r * np.sin(a + 0.35))))
            stand(p, *slot, 36, 26)


def _remote(
    p: Plan, rng: np.random.Generator, x0: float, x1: float, bottom: float, airport: Airport
) -> None:
    heading = rng.choice((np.pi / 2, np.pi / 3, 2 * np.pi / 3, -np.pi / 2))
    for y, span in ((bottom - 40, 46), (bottom - 105, 34)):
        for x in np.arange(x0 + 30, x1 - 20, span + 7):
            p.slots.append(Slot(x, y, heading, span))
            stand(p, x, y, heading, span, 30)
    for x in np.arange(x0, x1 - 80, rng.uniform(95, 130)):
        hall = rect(x, bottom + 12, x + 75, bottom + 66)
        hangar(p, rng, hall, airport, 16)


def hangar(
    p: Plan, rng: np.random.Generator, points: Points, airport: Airport, height: float
) -> None:
    """A gabled hall: the two slopes differ in tone."""
    colour, group = scaled(airport.roof, rng.uniform(0.65, 1.05)), int(rng.integers(1, 9))
    p.blocks.append(Block(points, 0, height, colour, group))
    (x0, y0), (x1, y1) = points[0], points[2]
    half = rect(x0, y0, x1, (y0 + y1) / 2)
    p.blocks.append(Block(half, height, 0.05, scaled(colour, 0.86), group + 10))
    for x in np.linspace(x0, x1, 6)[1:-1]:
        p.blocks.append(
            Block(rect(x - 0.4, y0 + 3, x + 0.4, y1 - 3), height, 0.1, (200, 200, 196), 31)
        )


SEGMENTS = {"linear": _linear, "piers": _piers, "satellite": _satellite, "remote": _remote}
