"""Draws a plan from above: textured ground, buildings with shadows, weather, and the colour mask."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import cv2
import numpy as np

from rareplanes.aircraft import SHIFT
from rareplanes.airport import (
    APRON,
    CARPARK,
    GROUND,
    ROAD,
    RUNWAY,
    SHOULDER,
    SLABS,
    SOIL,
    TAXIWAY,
    Airport,
    Block,
    Plan,
)

ROOF = 9
TILE = 1024  # texels of a texture, which repeats
# How strongly each material shows the textures: (coarse, middle, fine, slabs).
GRAIN = {
    GROUND: (0.10, 0.10, 0.06, 0),
    SOIL: (0.08, 0.10, 0.06, 0),
    RUNWAY: (0.06, 0.05, 0.03, 0),
    TAXIWAY: (0.06, 0.05, 0.03, 0.01),
    SHOULDER: (0.08, 0.07, 0.04, 0),
    APRON: (0.05, 0.05, 0.025, 0.01),
    SLABS: (0.04, 0.04, 0.02, 0.05),
    ROAD: (0.03, 0.04, 0.02, 0),
    CARPARK: (0.05, 0.06, 0.03, 0),
    ROOF: (0.05, 0.07, 0.02, 0),
}


@dataclass(frozen=True)
class View:
    """A camera over the plan; directions are those of the screen, x right and y down."""

    width: int
    height: int
    ppm: float  # pixels per metre
    centre: tuple[float, float]
    yaw: float
    lean: np.ndarray  # [2] metres a point moves per metre of height
    sun: np.ndarray  # [3] unit vector towards the sun

    def screen(self, points: np.ndarray, z: float = 0.0) -> np.ndarray:
        """World metres [N,2] at height z to pixels [N,2]."""
        c, s = np.cos(self.yaw), np.sin(self.yaw)
        turned = (points - self.centre) @ np.array(((c, s), (-s, c)))
        return (turned + z * self.lean) * self.ppm + (self.width / 2, self.height / 2)

    def shadow(self, points: np.ndarray, z: float) -> np.ndarray:
        """Where the shadow of points at height z falls, in pixels."""
        return self.screen(points) - z * self.ppm * self.sun[:2] / self.sun[2]

    def sees(self, pixels: np.ndarray, margin: float = 0.0) -> bool:
        low, high = pixels.min(0), pixels.max(0)
        size = (self.width + margin, self.height + margin)
        return bool((high >= -margin).all() and (low < size).all())


@dataclass
class Canvas:
    """What is drawn together, so that image and mask agree: all [H,W] or [H,W,3], uint8 BGR."""

    image: np.ndarray
    mask: np.ndarray
    material: np.ndarray
    shadow: np.ndarray
    dirt: np.ndarray


def fixed(pixels: np.ndarray) -> np.ndarray:
    return np.round(pixels * (1 << SHIFT)).astype(np.int32)


@cache
def textures() -> dict[str, np.ndarray]:
    """Repeating float32 textures of mean 0 and deviation 1, the same in every process."""
    rng = np.random.default_rng(7)
    f = np.hypot(np.fft.fftfreq(TILE)[:, None], np.fft.rfftfreq(TILE)[None]) * TILE
    f[0, 0] = np.inf

    def noise(power: float, low: float = 1.0) -> np.ndarray:
        spectrum = np.fft.rfft2(rng.standard_normal((TILE, TILE))) * f**-power * (f >= low)
        field = np.fft.irfft2(spectrum)
        return (field / field.std()).astype(np.float32)

    slabs = rng.normal(0, 0.5, (32, 32)).repeat(32, 0).repeat(32, 1)
    slabs[::32] = slabs[:, ::32] = -2.6
    slabs[1::32] = slabs[:, 1::32] = -1.2
    return {
        "coarse": noise(1.7),
        "middle": noise(1.1, 6),
        "fine": noise(0.35, 30),
        "cloud": noise(1.9),
        "slabs": slabs.astype(np.float32),
        "white": rng.standard_normal((TILE, TILE)).astype(np.float32),
    }


def texture(view: View, name: str, texel: float, shift: Sequence[float] = (0, 0)) -> np.ndarray:
    """A texture fixed to the ground, one texel so many metres wide: [H,W] float32."""
    c, s = np.cos(view.yaw) / view.ppm, np.sin(view.yaw) / view.ppm
    turn = np.array(((c, s), (-s, c)))
    start = np.array(view.centre) + shift - turn @ (view.width / 2, view.height / 2)
    matrix = np.column_stack((turn, start)) / texel
    size = (view.width, view.height)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(textures()[name], matrix, size, flags=flags, borderMode=cv2.BORDER_WRAP)


def visible(view: View, items: Iterable[Any], margin: float = 0.0) -> Iterator[tuple[Any, np.ndarray]]:
    """Those items of a plan whose `points` reach the picture, with their pixels."""
    items = list(items)
    if not items:
        return
    pixels = view.screen(np.concatenate([item.points for item in items]))
    starts = np.cumsum([0] + [len(item.points) for item in items])
    low = np.minimum.reduceat(pixels, starts[:-1])
    high = np.maximum.reduceat(pixels, starts[:-1])
    size = (view.width + margin, view.height + margin)
    for i in np.flatnonzero((high > -margin).all(1) & (low < size).all(1)):
        yield items[i], pixels[starts[i] : starts[i + 1]]


def lay_ground(view: View, airport: Airport, plan: Plan, rng: np.random.Generator) -> Canvas:
    """Pavement, paint and stains, still without texture and light."""
    shape = (view.height, view.width)
    palette = _palette(airport)
    labels = label_colours(airport)
    image = np.full((*shape, 3), palette[GROUND], np.uint8)
    mask = np.full((*shape, 3), labels[GROUND], np.uint8)
    canvas = Canvas(image, mask, *(np.zeros(shape, np.uint8) for _ in range(3)))
    for way, pixels in visible(view, sorted(plan.ways, key=lambda way: (way.material != SOIL, -way.width)), 80):
        width = max(1, round(way.width * view.ppm))
        colour = palette[way.material]
        cv2.polylines(image, [fixed(pixels)], False, colour, width, cv2.LINE_AA, SHIFT)
        cv2.polylines(canvas.material, [fixed(pixels)], False, way.material, width, cv2.LINE_8, SHIFT)
    for surface, pixels in visible(view, plan.surfaces):
        colour = tuple(min(255.0, v * surface.tone) for v in palette[surface.material])
        cv2.fillPoly(image, [fixed(pixels)], colour, cv2.LINE_AA, SHIFT)
        cv2.fillPoly(canvas.material, [fixed(pixels)], surface.material, cv2.LINE_8, SHIFT)
    painted = image.copy()
    for stroke, pixels in visible(view, plan.paint, 20):
        width = max(1, round(stroke.width * view.ppm))
        cv2.polylines(painted, [fixed(pixels)], False, stroke.colour, width, cv2.LINE_AA, SHIFT)
    for stroke, pixels in visible(view, plan.stains, 20):
        width = max(1, round(stroke.width * view.ppm))
        cv2.polylines(canvas.dirt, [fixed(pixels)], False, stroke.colour, width, cv2.LINE_AA, SHIFT)
    fresh = float(rng.uniform(0.35, 0.85))
    wear = np.clip(fresh + 0.25 * texture(view, "middle", 0.5), 0.1, 1)
    cv2.blendLinear(painted, image, wear, 1 - wear, image)
    canvas.image = cv2.GaussianBlur(image, (0, 0), float(rng.uniform(0.5, 1.1)))
    _label_ground(view, plan, canvas, labels)
    return canvas


def _palette(airport: Airport) -> dict[int, tuple[float, float, float]]:
    asphalt, ground = np.array(airport.asphalt), np.array(airport.ground)
    concrete = np.array(airport.concrete)
    colours = {
        GROUND: ground,
        SOIL: np.array(airport.soil),
        RUNWAY: asphalt * 0.95,
        TAXIWAY: asphalt,
        SHOULDER: asphalt * 0.6 + ground * 0.3,
        APRON: concrete * 0.7 + asphalt * 0.3,
        SLABS: concrete,
        ROAD: asphalt * 0.9,
        CARPARK: asphalt * 1.05,
    }
    return {key: tuple(value.tolist()) for key, value in colours.items()}


@cache
def label_colours(airport: Airport) -> list[tuple[int, int, int]]:
    """Colours the mask gives to what is no object, BGR; the textured greys come on top."""
    rng = np.random.default_rng(sum(airport.name.encode()))
    return [tuple(int(v) for v in rng.integers(20, 236, 3)) for _ in range(64)]  # type: ignore[misc]


def _label_ground(view: View, plan: Plan, canvas: Canvas, labels: list[tuple[int, int, int]]) -> None:
    """The mask's ground: flat colours, one textured grey, squares and lines along the taxiways."""
    table = np.zeros((256, 1, 3), np.uint8)
    table[: len(labels), 0] = labels
    canvas.mask = cv2.LUT(cv2.merge([canvas.material] * 3), table)
    grey = np.clip(92 + 11 * texture(view, "middle", 0.4), 40, 160).astype(np.uint8)
    textured = np.isin(canvas.material, (RUNWAY, SHOULDER))
    canvas.mask[textured] = np.stack((grey + 4, grey, grey), -1)[textured]
    for route in plan.routes:
        pixels = view.screen(route)
        if not view.sees(pixels, 40):
            continue
        cv2.polylines(canvas.mask, [fixed(pixels)], False, labels[40], 2, cv2.LINE_8, SHIFT)
        for x, y, heading in along(route, 11.0):
            for side, size, label in ((0, 8, 41), (-17, 2.6, 42), (17, 2.6, 42)):
                c, s = np.cos(heading), np.sin(heading)
                if side and round(x + y) % 3:
                    continue
                corners = np.array(((1, 1), (1, -1), (-1, -1), (-1, 1))) * size / 2 + (0, side)
                square = view.screen(corners @ np.array(((c, s), (-s, c))) + (x, y))
                if view.sees(square):
                    cv2.fillConvexPoly(canvas.mask, fixed(square), labels[label], cv2.LINE_8, SHIFT)


def along(route: np.ndarray, step: float) -> np.ndarray:
    """Points every `step` metres of a polyline with their headings: [N,3]."""
    legs = np.diff(route, axis=0)
    lengths = np.hypot(*legs.T)
    at = np.arange(step / 2, lengths.sum(), step)
    ends = np.concatenate(([0], np.cumsum(lengths)))
    leg = np.clip(np.searchsorted(ends, at) - 1, 0, len(legs) - 1)
    part = ((at - ends[leg]) / lengths[leg])[:, None]
    heading = np.arctan2(legs[leg, 1], legs[leg, 0])
    return np.column_stack((route[leg] + part * legs[leg], heading))


def raise_blocks(
    view: View,
    canvas: Canvas,
    blocks: Iterable[Block],
    labels: Sequence[tuple[int, int, int]],
    roof: bool = False,
) -> None:
    """Draw prisms with walls where the view leans, and their shadows; `roof` hides aircraft."""
    for block, foot in visible(view, blocks, 60):
        top_z = block.base + block.height
        foot = foot + block.base * view.lean * view.ppm
        top = view.screen(block.points, top_z)
        colour, label = np.array(block.colour), labels[block.group]
        if block.base == 0:
            _cast(canvas.shadow, foot, view.shadow(block.points, top_z), 255)
        else:
            fall = foot - block.height * view.ppm * view.sun[:2] / view.sun[2]
            _cast(canvas.image, foot, fall, tuple(colour * 0.35))
        walls = []
        for a, b in zip(range(-1, len(foot) - 1), range(len(foot)), strict=True):
            edge = foot[b] - foot[a]
            normal = np.array((edge[1], -edge[0])) / (np.hypot(*edge) + 1e-9)
            normal *= np.sign(normal @ (foot[a] - foot.mean(0))) or 1.0
            light = 0.45 + 0.6 * max(0.0, float(normal @ view.sun[:2]))
            walls.append((np.array((foot[a], foot[b], top[b], top[a])), tuple(colour * light)))
        roofs = [(top, tuple(np.minimum(colour * (0.5 + 0.62 * view.sun[2]), 255)))]
        for shape, shade in (walls if block.height > 0.3 else []) + roofs:
            cv2.fillPoly(canvas.image, [fixed(shape)], shade, cv2.LINE_AA, SHIFT)
            cv2.fillPoly(canvas.mask, [fixed(shape)], label, cv2.LINE_8, SHIFT)
            if roof:
                cv2.fillPoly(canvas.material, [fixed(shape)], ROOF, cv2.LINE_8, SHIFT)


def _cast(target: np.ndarray, foot: np.ndarray, top: np.ndarray, value: Any) -> None:
    """Fill the shadow of a convex prism, the hull of its foot and its top's shadow."""
    hull = cv2.convexHull(np.concatenate((foot, top)).astype(np.float32))[:, 0]
    cv2.fillConvexPoly(target, fixed(hull), value, cv2.LINE_8, SHIFT)


def plant_trees(view: View, canvas: Canvas, plan: Plan, rng: np.random.Generator) -> None:
    """Round crowns: a shadow on the ground, a dark crown, a lit side."""
    trees = np.array(plan.trees).reshape(-1, 3)
    at = view.screen(trees[:, :2])
    size = (view.width + 30, view.height + 30)
    seen = ((at > -30) & (at < size)).all(1)
    colour = np.array((38, 66, 52)) * rng.uniform(0.7, 1.1)
    for (x, y), r in zip(at[seen], trees[seen, 2] * view.ppm, strict=True):
        fall = (x, y) - 1.6 * r * view.sun[:2] / view.sun[2] * 0.6
        cv2.circle(canvas.shadow, tuple(map(int, fall)), int(r), 255, -1)
        tone = colour * rng.uniform(0.75, 1.15)
        for k, light in ((1.0, 0.72), (0.85, 0.9), (0.6, 1.1), (0.3, 1.25)):
            spot = (x, y) + view.sun[:2] * r * (1 - k) * 0.7
            cv2.circle(canvas.image, tuple(map(int, spot)), int(r * k) + 1, tone * light, -1, cv2.LINE_AA)
        cv2.circle(canvas.mask, (int(x), int(y)), int(r), (30, 90, 46), -1)


def weather_ground(view: View, airport: Airport, canvas: Canvas, weather: str, rng: np.random.Generator) -> np.ndarray:  # noqa: E501
    """Texture, stains and snow on the ground: [H,W,3] float32."""
    amount = np.zeros((4, 256), np.float32)
    for material, strength in GRAIN.items():
        amount[:, material] = strength
    shift = rng.uniform(-400, 400, 2)  # each scene has weathered a little differently
    coarse = texture(view, "coarse", 0.7, shift)
    middle = texture(view, "middle", 0.3)
    factor = 1 - canvas.dirt * np.float32(rng.uniform(0.5, 1.3) / 255)
    for k, field in enumerate((coarse, middle, texture(view, "fine", 0.36), texture(view, "slabs", 0.234))):
        factor += cv2.LUT(canvas.material, amount[k]) * field
    image = canvas.image * factor[..., None]
    tint = np.zeros((256, 1), np.float32)
    tint[GROUND] = 1
    patch = np.clip(coarse * 0.35 + 0.3 * middle + rng.uniform(-0.3, 0.4), 0, 1)
    patch *= cv2.LUT(canvas.material, tint)
    image += patch[..., None] * (np.array(airport.soil, np.float32) - image)
    if weather == "Snow":
        flaky = texture(view, "coarse", 0.25, rng.uniform(-400, 400, 2)) + 0.35 * middle
        cover = np.clip((flaky - rng.uniform(-0.2, 1.2)) * rng.uniform(0.6, 2), 0, rng.uniform(0.6, 0.95))
        white = np.float32(rng.uniform(195, 235)) * (1 + 0.04 * middle)
        image += cover[..., None] * (white[..., None] - image)
    return image


def cast_light(view: View, canvas: Canvas, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Lay the shadows onto the ground; returns the light [H,W] that is left of the sun."""
    canvas.shadow[canvas.material == ROOF] = 0
    soft = cv2.GaussianBlur(canvas.shadow, (0, 0), float(rng.uniform(0.7, 1.8)))
    light = 1 - soft * np.float32(rng.uniform(0.45, 0.72) / 255)
    image *= light[..., None] ** np.array((0.88, 0.97, 1.0), np.float32)  # shadows are bluish
    return light


def develop(view: View, image: np.ndarray, weather: str, rng: np.random.Generator) -> np.ndarray:
    """Clouds and their shadows, haze, the colour of the light, blur and the sensor's noise."""
    image = image.astype(np.float32)
    if rng.random() < (0.6 if weather == "Overcast" else 0.25):
        cloud = texture(view, "cloud", float(rng.uniform(0.4, 1.2)), rng.uniform(-500, 500, 2))
        image *= 1 - np.clip(cloud - rng.uniform(0, 0.8), 0, 1)[..., None] * rng.uniform(0.15, 0.4)
        if rng.random() < 0.5:
            veil = texture(view, "cloud", float(rng.uniform(0.3, 0.8)), rng.uniform(-500, 500, 2))
            veil = np.clip(veil - rng.uniform(0.3, 1.2), 0, 1)[..., None] * rng.uniform(0.2, 0.5)
            image += veil * (232 - image)
    dense = rng.uniform(0.12, 0.4) if weather in ("Haze", "Dust", "Rain", "Snow") else rng.uniform(0, 0.15)
    warm = rng.normal(0, 6) - (20 if weather == "Dust" else 0)
    haze = np.array((rng.uniform(150, 205),) * 3) + (warm, 0, -warm)
    elevation = view.sun[2]
    gain = np.array((0.82 + 0.18 * elevation, 0.92 + 0.08 * elevation, 1.04 - 0.04 * elevation))
    gain *= rng.uniform(0.9, 1.3) * (1 + rng.normal(0, 0.02, 3))
    image *= (gain * (1 - dense)).astype(np.float32)
    image += (haze * dense).astype(np.float32)
    if rng.random() < 0.5:
        image = cv2.GaussianBlur(image, (0, 0), float(rng.uniform(0.3, 0.8)))
    y, x = rng.integers(0, TILE, 2)
    tile = np.roll(textures()["white"], (y, x), (0, 1)) * np.float32(rng.uniform(0.4, 2.2))
    reps = (-(-view.height // TILE), -(-view.width // TILE))
    image += np.tile(tile, reps)[: view.height, : view.width, None]
    return np.clip(image, 0, 255).astype(np.uint8)
