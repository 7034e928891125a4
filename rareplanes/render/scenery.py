"""Draws a plan from above: pavement, paint, buildings, trees, and the colours of the mask."""

from functools import cache

import cv2
import numpy as np

from rareplanes.render.plan import Airport, Block, Material, Plan
from rareplanes.render.view import SHIFT, Canvas, View, fill, fixed, stroke, texture, visible

Label = tuple[int, int, int]  # a mask colour, BGR
TREE_LABEL, MAST_LABEL = (30, 90, 46), (90, 230, 220)
BRIDGES = 53  # the group of jet bridges
# How the brightness of asphalt, ground, concrete and soil differs between scenes: mean and
# deviation of its logarithm.
TONES = ((-0.05, -0.15, 0.15, 0.15), (0.35, 0.3, 0.2, 0.25))
ROOFS = ((80, 90, 165), (150, 105, 60), (100, 125, 70), (120, 165, 185))  # BGR


def lay_ground(view: View, plan: Plan, rng: np.random.Generator) -> Canvas:
    """Draw pavement, paint and stains, without texture and light."""
    shape = (view.height, view.width)
    palette, labels = _palette(plan.airport, rng), label_colours(plan.airport)
    image = np.full((*shape, 3), palette[Material.GROUND], np.uint8)
    canvas = Canvas(image, np.empty_like(image), *(np.zeros(shape, np.uint8) for _ in range(3)))
    ways = sorted(plan.ways, key=lambda way: (way.material != Material.SOIL, -way.width))
    for way, pixels in visible(view, ways, 80):
        stroke(image, pixels, palette[way.material], way.width * view.ppm, cv2.LINE_AA)
        stroke(canvas.material, pixels, way.material, way.width * view.ppm)
    for surface, pixels in visible(view, plan.surfaces):
        colour = tuple(min(255.0, v * surface.tone) for v in palette[surface.material])
        fill(image, pixels, colour, cv2.LINE_AA)
        fill(canvas.material, pixels, surface.material)
    painted = image.copy()
    for target, strokes in ((painted, plan.paint), (canvas.dirt, plan.stains)):
        for line, pixels in visible(view, strokes, 20):
            stroke(target, pixels, line.colour, line.width * view.ppm, cv2.LINE_AA)
    fresh = float(rng.uniform(0.3, 0.5 if plan.airport.plain else 1.0))
    wear = np.clip(fresh + 0.25 * texture(view, "middle", 0.5, shrink=2), 0.1, 1)
    cv2.blendLinear(painted, image, wear, 1 - wear, image)
    canvas.image = cv2.GaussianBlur(image, (0, 0), float(rng.uniform(0.5, 1.1)))
    _label_ground(view, plan, canvas, labels)
    return canvas


def _palette(airport: Airport, rng: np.random.Generator) -> dict[int, np.ndarray]:
    """Colours of the materials: the airport's, of another age, season and camera in each scene."""
    looks = (airport.asphalt, airport.ground, airport.concrete, airport.soil)
    tones = np.exp(rng.normal(*TONES) * (not airport.plain))
    colours = np.array(looks) * tones[:, None]
    colours *= 1 + rng.normal(0, 0.03) * np.array((-1, 0, 1))
    grey = colours.mean(1, keepdims=True)
    asphalt, ground, concrete, soil = np.minimum(grey + rng.uniform(0.3, 1) * (colours - grey), 245)
    mixed = rng.choice((0, 0, 0.3, 1), 3)[:, None] * (not airport.plain)
    runway, taxiway, apron = mixed * (concrete - asphalt) + asphalt
    return {
        Material.GROUND: ground,
        Material.SOIL: soil,
        Material.RUNWAY: runway * 0.95,
        Material.TAXIWAY: taxiway,
        Material.SHOULDER: taxiway * 0.6 + ground * 0.3,
        Material.APRON: apron * 0.7 + concrete * 0.3,
        Material.SLABS: concrete,
        Material.ROAD: asphalt * 0.9,
        Material.CARPARK: asphalt * 1.05,
        Material.WATER: np.array((70, 62, 38)) * rng.uniform(0.5, 1.4),
    }


def draw_tones(airport: Airport, rng: np.random.Generator) -> dict[int, np.ndarray]:
    """How much brighter than in the plan the blocks of a group are in this scene, [3] BGR."""
    if airport.plain:
        return {}
    tones = {BRIDGES: np.full(3, rng.uniform(0.6, 1.5))}
    for group in range(1, 9):  # of buildings; their roofs are 10 further on
        white, grey = np.full(3, rng.uniform(235, 320)), np.full(3, rng.uniform(55, 200))
        plain, vivid = np.array(airport.roof) * rng.uniform(0.8, 1.2), ROOFS[rng.integers(4)]
        tone = (white, grey, plain, vivid)[rng.choice(4, p=(0.3, 0.2, 0.35, 0.15))]
        tones[group] = tones[group + 10] = np.array(tone) / airport.roof
    return tones


def repaint(blocks: list[Block], tones: dict[int, np.ndarray]) -> list[Block]:
    painted = []
    for block in blocks:
        b, g, r = block.colour * tones.get(block.group, np.ones(3))
        painted.append(block._replace(colour=(b, g, r)))
    return painted


@cache
def label_colours(airport: Airport) -> list[Label]:
    """Mask colours of all that is not an object, without the textured greys."""
    rng = np.random.default_rng(sum(airport.name.encode()))
    return [(int(b), int(g), int(r)) for b, g, r in rng.integers(20, 236, (64, 3))]


def _label_ground(view: View, plan: Plan, canvas: Canvas, labels: list[Label]) -> None:
    """The mask's ground: flat colours, one textured grey, squares and lines along the taxiways."""
    table = np.zeros((256, 1, 3), np.uint8)
    table[: len(labels), 0] = labels
    canvas.mask = cv2.LUT(cv2.merge([canvas.material] * 3), table)
    grey = np.clip(92 + 11 * texture(view, "middle", 0.4), 40, 160).astype(np.uint8)
    textured = np.isin(canvas.material, (Material.RUNWAY, Material.SHOULDER))
    canvas.mask[textured] = np.stack((grey + 4, grey, grey), -1)[textured]
    for route in plan.routes:
        pixels = view.screen(route)
        if not view.sees(pixels.min(0), pixels.max(0), 40):
            continue
        stroke(canvas.mask, pixels, labels[40], 2)
        nodes = along(route, 11.0)
        for side, size, label, some in ((0, 8, 41, 1), (-17, 2.6, 42, 3), (17, 2.6, 42, 3)):
            for square in _squares(view, nodes[::some], side, size):
                cv2.fillConvexPoly(canvas.mask, fixed(square), labels[label], cv2.LINE_8, SHIFT)


def _squares(view: View, nodes: np.ndarray, side: float, size: float) -> np.ndarray:
    """Visible squares [N,4,2] `side` metres to the right of points (x, y, heading), in pixels."""
    c, s = np.cos(nodes[:, 2]), np.sin(nodes[:, 2])
    turns = np.stack((c, s, -s, c), 1).reshape(-1, 2, 2)
    corners = np.array(((1, 1), (1, -1), (-1, -1), (-1, 1))) * size / 2 + (0, side)
    pixels = view.screen(corners @ turns + nodes[:, None, :2])
    inside = (pixels >= 0) & (pixels < (view.width, view.height))
    return pixels[np.any(np.all(inside, axis=2), axis=1)]


def along(route: np.ndarray, step: float) -> np.ndarray:
    """Points every `step` metres of a polyline with their headings: [N,3]."""
    legs = np.diff(route, axis=0)
    lengths = np.hypot(*legs.T)
    distances = np.arange(step / 2, lengths.sum(), step)
    ends = np.concatenate(([0], np.cumsum(lengths)))
    leg = np.clip(np.searchsorted(ends, distances) - 1, 0, len(legs) - 1)
    part = ((distances - ends[leg]) / lengths[leg])[:, None]
    heading = np.arctan2(legs[leg, 1], legs[leg, 0])
    return np.column_stack((route[leg] + part * legs[leg], heading))


def raise_blocks(
    view: View, canvas: Canvas, blocks: list[Block], labels: list[Label], roof: bool = False
) -> None:
    """Draw prisms with walls and shadows; with `roof` they hide aircraft."""
    for block, foot in visible(view, blocks, 60):
        foot = foot + block.base * view.lean * view.ppm
        top = view.screen(block.points, block.base + block.height)
        colour, label = np.array(block.colour), labels[block.group]
        fall = foot - block.height * view.ppm * view.sun[:2] / view.sun[2]
        hull = cv2.convexHull(np.concatenate((foot, fall)).astype(np.float32))[:, 0]
        if block.base == 0:
            cv2.fillConvexPoly(canvas.shadow, fixed(hull), 255, cv2.LINE_8, SHIFT)
        else:  # on a roof, or a bridge
            dark = tuple(colour * 0.35)
            cv2.fillConvexPoly(canvas.image, fixed(hull), dark, cv2.LINE_8, SHIFT)
        faces = []
        for i in range(len(foot) if block.height > 0.3 else 0):
            edge = foot[i] - foot[i - 1]
            normal = np.array((edge[1], -edge[0])) / (np.hypot(*edge) + 1e-9)
            normal *= np.sign(normal @ (foot[i - 1] - foot.mean(0))) or 1.0
            light = 0.45 + 0.6 * max(0.0, float(normal @ view.sun[:2]))
            wall = np.array((foot[i - 1], foot[i], top[i], top[i - 1]))
            faces.append((wall, tuple(np.minimum(colour * light, 255))))
        faces.append((top, tuple(np.minimum(colour * (0.5 + 0.62 * view.sun[2]), 255))))
        for shape, shade in faces:
            fill(canvas.image, shape, shade, cv2.LINE_AA)
            fill(canvas.mask, shape, label)
            if roof:
                fill(canvas.material, shape, Material.ROOF)


def plant_trees(view: View, canvas: Canvas, plan: Plan, rng: np.random.Generator) -> None:
    """Draw round trees: a shadow on the ground, a dark crown, a lit side."""
    trees = np.array(plan.trees).reshape(-1, 3)
    centres = view.screen(trees[:, :2])
    seen = view.sees(centres, centres, 30)
    colour = np.array((38, 66, 52)) * rng.uniform(0.7, 1.1)
    for (x, y), r in zip(centres[seen], trees[seen, 2] * view.ppm, strict=True):
        fall = (x, y) - 1.6 * r * view.sun[:2] / view.sun[2] * 0.6
        cv2.circle(canvas.shadow, tuple(map(int, fall)), int(r), 255, -1)
        tone = colour * rng.uniform(0.75, 1.15)
        for k, light in ((1.0, 0.72), (0.85, 0.9), (0.6, 1.1), (0.3, 1.25)):
            spot = (x, y) + view.sun[:2] * r * (1 - k) * 0.7
            middle, radius, shade = tuple(map(int, spot)), int(r * k) + 1, tuple(tone * light)
            cv2.circle(canvas.image, middle, radius, shade, -1, cv2.LINE_AA)
        cv2.circle(canvas.mask, (int(x), int(y)), int(r), TREE_LABEL, -1)
        cv2.circle(canvas.material, (int(x), int(y)), int(r) + 1, Material.ROOF, -1)
