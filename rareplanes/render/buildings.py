"""Buildings, and lots of land beside an airport: car parks, houses, works, yards, harbours."""

import numpy as np

from rareplanes.render.plan import (
    WHITE,
    Block,
    Material,
    Plan,
    Points,
    box,
    line,
    oval,
    rect,
    rotation,
    scaled,
)

# Rows across a roof: period in metres, length along the roof as a share of the period, length
# across as a share of the roof, height, colour (BGR), corners.
ROOF_ROWS = (
    (9, 0.25, 0.98, 0.5, (225, 228, 228), 4),  # ribs
    (16, 0.3, 0.9, 1.2, (120, 122, 120), 4),  # beams
    (7, 0.5, 0.5, 0.3, (100, 92, 84), 4),  # roof lights
    (5, 0.75, 0.8, 0.3, (78, 54, 38), 4),  # solar panels
    (15, 0.9, 0.85, 2.5, (262, 264, 264), 16),  # domes
)
# Buildings with wings, such as a cross, a T, a comb: rectangles of the unit square, united.
WINGS = (
    ((0.4, 0, 0.6, 1), (0, 0.35, 1, 0.6)),
    ((0.43, 0, 0.57, 1), (0, 0.3, 1, 0.48), (0.25, 0.85, 0.75, 1)),
    ((0.4, 0, 0.6, 1), (0, 0, 1, 0.3)),
    ((0, 0, 0.25, 1), (0.75, 0, 1, 1), (0, 0.4, 1, 0.6)),
    ((0, 0, 1, 0.2), (0.1, 0, 0.25, 1), (0.45, 0, 0.6, 1), (0.8, 0, 0.95, 1)),
)
Area = tuple[float, float, float, float]
ASPHALT = (95.0, 95, 95)
PAINTS = ((245, 245, 245), (60, 165, 215), (150, 95, 45), (60, 60, 160), (130, 130, 125))
BOAT = ((0, 0.5), (0.6, 0.5), (1, 0), (0.6, -0.5), (0, -0.5))


def terminal_building(
    p: Plan, rng: np.random.Generator, points: Points, height: float, group: int = 0
) -> None:
    """A building with a parapet, roof lights or rows of things, and machines on its roof."""
    group = group or int(rng.integers(1, 9))
    colour = scaled(p.airport.roof, rng.uniform(0.8, 1.05))
    p.blocks.append(Block(points, 0, height, scaled(colour, 0.8), group))
    centre = points.mean(0)
    inner = centre + (points - centre) * 0.96
    p.blocks.append(Block(inner, height, 0.05, colour, group + 10))
    sides = (points[1] - points[0], points[-1] - points[0])
    axis, other = sorted(sides, key=np.linalg.norm, reverse=True)
    length, angle = float(np.linalg.norm(axis)), float(np.arctan2(axis[1], axis[0]))
    if len(points) == 4 and rng.random() < 0.5 and not p.airport.plain:
        period, share, across, rise, tone, corners = ROOF_ROWS[rng.integers(len(ROOF_ROWS))]
        across *= float(np.linalg.norm(other))
        for t in np.arange(period / 2, length - period / 2, period) / length - 0.5:
            shape = (centre + axis * t, share * period, across, angle)
            row = box(*shape) if corners == 4 else oval(*shape)
            p.blocks.append(Block(row, height, rise, tone, group + 20))
    else:
        for offset in rng.uniform(-0.35, 0.35, rng.integers(1, 4)):
            x, y = centre + other * offset
            strip = box((x, y), length * rng.uniform(0.6, 0.9), rng.uniform(0.6, 2.5), angle)
            p.blocks.append(Block(strip, height, 0.4, (95, 90, 86), group + 20))
    for _ in range(int(length / 9)):
        x, y = centre + axis * rng.uniform(-0.45, 0.45) + other * rng.uniform(-0.4, 0.4)
        unit = box((x, y), rng.uniform(1.5, 6), rng.uniform(1.5, 4), angle)
        grey = rng.uniform(85, 150 if p.airport.plain else 230)
        colour = (grey, grey, grey * 0.98)
        p.blocks.append(Block(unit, height, rng.uniform(0.8, 2), colour, group + 30))


def gabled(
    p: Plan, rng: np.random.Generator, points: Points, height: float, seams: int = 4
) -> None:
    """A house or hall: the two slopes differ in tone."""
    colour, group = scaled(p.airport.roof, rng.uniform(0.75, 1.05)), int(rng.integers(1, 9))
    p.blocks.append(Block(points, 0, height, colour, group))
    a, b, c, d = points
    half = np.array((a, b, (b + c) / 2, (a + d) / 2))
    slope = scaled(colour, rng.choice((0.6, 0.75, 0.86)))
    p.blocks.append(Block(half, height, 0.05, slope, group + 10))
    angle = float(np.arctan2(*(d - a)[::-1]))
    for t in np.linspace(0, 1, seams + 2)[1:-1]:
        seam = box((a + d) / 2 + (b - a) * t, 0.8 * float(np.linalg.norm(d - a)), 0.8, angle)
        p.blocks.append(Block(seam, height, 0.1, (200, 200, 196), 31))


def build_lot(p: Plan, rng: np.random.Generator, area: Area) -> None:
    """Fill a rectangle (x0, y0, x1, y1) of land with rows of one of LOTS."""
    x0, y0, x1, y1 = area
    shares = np.array([lot[1] for lot in (LOTS[:2] if p.airport.plain else LOTS)])
    kind = rng.choice(len(shares), p=shares / shares.sum())
    build, _, material, steps, rows, width = LOTS[kind]
    if material != Material.GROUND:
        p.pave(rect(*area), material, rng.uniform(0.8, 1.3))
    size = rng.uniform()  # of all things of the lot, 0-1
    step, row = np.array(((1 - size), size)) @ np.transpose((steps, rows))
    for y in np.arange(y0 + row / 2, y1 - row / 2 + 1, row):
        edge = line((x0, y + row / 2), (x1, y + row / 2))
        p.mark(edge, width, WHITE if width < 1 else ASPHALT)
        for x in np.arange(x0 + step / 2, x1 - step / 2 + 1, step):
            build(p, rng, x, y, size)


def _car(p: Plan, rng: np.random.Generator, x: float, y: float, size: float) -> None:
    p.cars.append((x, y, np.pi / 2))


def _office(p: Plan, rng: np.random.Generator, x: float, y: float, size: float) -> None:
    parts = WINGS[rng.integers(len(WINGS))] if rng.random() < 0.5 else ((0, 0, 1, 1),)
    group, height, sides = int(rng.integers(1, 9)), rng.uniform(6, 20), rng.uniform(20, 40, 2)
    turn = rotation(rng.choice((0, rng.uniform(0, 3.14))))
    for part in parts:
        points = (rect(*part) - 0.5) * sides @ turn + (x, y)
        terminal_building(p, rng, points, height, group)


def _house(p: Plan, rng: np.random.Generator, x: float, y: float, size: float) -> None:
    spot, turn = rng.normal((x, y), 1.5), rng.choice((0, np.pi / 2)) + rng.normal(0, 0.03)
    gabled(p, rng, box(spot, rng.uniform(8, 14), rng.uniform(7, 10), turn), 5, 0)
    if rng.random() < 0.2:
        p.pave(oval((x + 8, y), 8, 4, turn), Material.WATER, 2.6)
    if rng.random() < 0.3:
        p.trees.append((x + 8, y + rng.normal(0, 4), rng.uniform(2, 4)))


def _tank(p: Plan, rng: np.random.Generator, x: float, y: float, size: float) -> None:
    r, grey = 4 + 12 * size, 250 if size > 0.3 else rng.uniform(120, 255)
    for radius, base, height in ((r, 0, 1 + 0.7 * r), (0.93 * r, 1 + 0.7 * r, 0.05)):
        ring = oval((x, y), 2 * radius, 2 * radius, 0)
        p.blocks.append(Block(ring, base, height, (grey,) * 3, 54))


def _shed(p: Plan, rng: np.random.Generator, x: float, y: float, size: float) -> None:
    gabled(p, rng, box((x, y), rng.uniform(30, 54), rng.uniform(25, 40), 0), 9, 6)


def _trailer(p: Plan, rng: np.random.Generator, x: float, y: float, size: float) -> None:
    if rng.random() < 0.7:  # half of the lots have trailers of one colour
        paint = PAINTS[int(size * 10) if size < 0.5 else rng.integers(5)]
        p.blocks.append(Block(box((x, y), 6 + 6 * size, 2.5, np.pi / 2), 0, 2.9, paint, 51))


def _boat(p: Plan, rng: np.random.Generator, x: float, y: float, size: float) -> None:
    for side in (-1, 1):
        if rng.random() < 0.6:
            hull = np.array(BOAT)[:, ::-1] * (3.6, side * rng.uniform(6, 15)) + (x, y + side * 2)
            p.blocks.append(Block(hull, 0, 1.2, (250, 250, 248), 51))


# Rows of what, share of the lots, pavement, metres between things and between rows for the
# smallest and the largest things, metres of white line or road between rows.
LOTS = (
    (_car, 0.3, Material.CARPARK, (2.9, 2.9), (9, 9), 0.4),
    (_office, 0.2, Material.GROUND, (44, 50), (48, 48), 6),
    (_house, 0.17, Material.GROUND, (15, 22), (23, 26), 6),
    (_tank, 0.1, Material.SOIL, (11, 42), (11, 42), 2),
    (_shed, 0.06, Material.SLABS, (60, 62), (45, 48), 0.4),
    (_trailer, 0.12, Material.CARPARK, (2.8, 3.8), (12, 20), 0.4),
    (_boat, 0.05, Material.WATER, (6, 7), (38, 42), 2),
)
