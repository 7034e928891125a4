"""Aircraft as small meshes of coloured quads, drawn from above with their shadows.

Body frame: metres, x forward from the middle of the fuselage, y to the right wing, z up from the
ground. `build` turns a make's numbers into quads, `draw` renders them from above.
"""

from typing import NamedTuple

import cv2
import numpy as np

from rareplanes.render.makes import Engine, Livery, Make

SUPERSAMPLE = 4
SHIFT = 4  # fractional bits of the coordinates handed to OpenCV
AIRFOIL = ((0, 0), (0.07, 0.035), (0.3, 0.05), (0.68, 0.03), (0.7, 0.028), (1, 0))  # chord, height
Part = tuple[np.ndarray, np.ndarray]  # quads [N,4,3] and colours [N,3]


class Mesh(NamedTuple):
    quads: np.ndarray  # [N,4,3] metres, body frame
    colours: np.ndarray  # [N,3] BGR 0-255
    sockets: np.ndarray  # [4,3] nose, right wing, tail, left wing


class Drawing(NamedTuple):
    """An aircraft seen from above, ready to be blended into the scene at (x, y)."""

    x: int
    y: int
    colour: np.ndarray  # [h,w,3] float32 BGR, premultiplied by alpha
    alpha: np.ndarray  # [h,w] float32 0-1
    shadows: np.ndarray  # [N,4,2] quads of the shadow on the ground, in scene pixels
    sockets: np.ndarray  # [4,2] nose, right wing, tail, left wing, in scene pixels


def build(make: Make, paint: Livery) -> Mesh:
    """Quads of fuselage, wings, tail and engines in the body frame."""
    parts = [_fuselage(make, paint), *_wings(make, paint), *_tail(make, paint)]
    for engine in make.engines:
        for side in (1, -1) if engine.y else (1,):
            parts += _engine(make, engine, side, paint)
    quads = np.concatenate([quads for quads, _ in parts])
    colours = np.concatenate([colours for _, colours in parts])
    wing_x = make.length * (0.5 - make.wing_at) - make.sweep - make.tip / 2
    half, z = make.length / 2, _axis(make)
    sockets = [(half, 0, z), (wing_x, make.span / 2, z), (-half, 0, z), (wing_x, -make.span / 2, z)]
    return Mesh(quads, colours, np.array(sockets))


def _axis(make: Make) -> float:
    """Height of the fuselage's centre line."""
    return make.radius + 0.4 + 0.03 * make.length


def _loft(stations: np.ndarray, strips: int = 11, reach: float = 115) -> np.ndarray:
    """Quads [stations-1, strips, 4, 3] of a body of circular sections (x, y, z, radius)."""
    angle = np.radians(np.linspace(-reach, reach, strips + 1))
    x, y, z, r = (column[:, None] for column in stations.T)
    points = np.stack(np.broadcast_arrays(x, y + r * np.sin(angle), z + r * np.cos(angle)), -1)
    return np.stack((points[:-1, :-1], points[:-1, 1:], points[1:, 1:], points[1:, :-1]), 2)


def _fuselage(make: Make, paint: Livery) -> Part:
    t = np.array(
        (0, 0.008, 0.025, 0.045, 0.06, 0.09, 0.14, 0.3, 0.5, 0.64, 0.74, 0.82, 0.9, 0.96, 1)
    )
    nose = np.clip(t / (0.14 if make.length > 12 else 0.25), 0, 1)
    radius = make.radius * np.sqrt(np.maximum(1 - (1 - nose) ** 2, 0.02))
    rear = np.clip((t - 0.66) / 0.34, 0, 1) if make.length > 12 else np.clip((t - 0.4) / 0.6, 0, 1)
    radius *= 1 - 0.9 * rear**1.4
    z = _axis(make) + make.radius * (0.55 * rear**1.4 - 0.25 * (1 - nose) ** 2)
    quads = _loft(np.stack((make.length * (0.5 - t), 0 * t, z, radius), 1))
    colours = np.broadcast_to(paint.body, (*quads.shape[:2], 3)).copy()
    colours[:, (1, -2)] = colours[:, (2, -3)] = paint.stripe
    colours[10:, :] = paint.tail
    colours[3:5, 3:-3] = (62, 52, 46)  # windscreen
    colours[3:5, 5] *= 1.6
    return quads.reshape(-1, 4, 3), colours.reshape(-1, 3)


def _plate(edges: list[tuple[float, float, float, float]], side: int) -> np.ndarray:
    """Quads [len(edges)-1, strips, 4, 3] of a wing given as (y, leading x, chord, z) stations."""
    chord, rise = np.array(AIRFOIL).T
    y, lead, length, z = (column[:, None] for column in np.array(edges).T)
    points = np.stack(
        np.broadcast_arrays(lead - length * chord, side * y + 0 * chord, z + length * rise * 0.8),
        -1,
    )
    return np.stack((points[:-1, :-1], points[:-1, 1:], points[1:, 1:], points[1:, :-1]), 2)


def _wings(make: Make, paint: Livery) -> list[Part]:
    half, lead = make.span / 2, make.length * (0.5 - make.wing_at)
    high = "H" in make.traits
    z = _axis(make) + make.radius * (0.8 if high else -0.45)
    rise = -0.02 if high else 0.07
    kink = 0.36 if "K" in make.traits else 0.0
    trail = lead - make.root
    edges = []
    for part in sorted({0.0, kink, 0.62, 0.94, 1.0}):
        x = lead - make.sweep * part
        outer = (part - kink) / (1 - kink)
        end = trail + (lead - make.sweep - make.tip - trail) * max(outer, 0)
        if part == 1.0:
            x -= 0.25 * make.tip  # a rounded tip
        edges.append((half * part, x, x - end, z + rise * half * part))
    parts = []
    for side in (1, -1):
        quads = _plate(edges, side)
        colours = np.broadcast_to(paint.wing, (*quads.shape[:2], 3)).copy()
        colours[:, 3] *= 0.62  # the gap before flaps and ailerons
        colours[:, 4] *= 0.95
        colours[:, 0] *= 1.06
        colours[-2:, :] = paint.tip
        colours[:-2, 0] = (colours[:-2, 0] + paint.tip) / 2
        parts.append((quads.reshape(-1, 4, 3), colours.reshape(-1, 3)))
        if "W" in make.traits:
            y, x, chord, height = edges[-1]
            top = height + 0.035 * make.span
            corners = [(x, y, height), (x - chord, y, height), (x - 1.5 * chord, y + 0.25, top)]
            corners.append((x - 0.9 * chord, y + 0.25, top))
            quad = np.array(corners)[None] * (1, side, 1)
            parts.append((quad, np.array(paint.tail)[None]))
    return parts


def _tail(make: Make, paint: Livery) -> list[Part]:
    L, h = make.length, make.fin * make.length
    base = _axis(make) + make.radius * 0.5
    back, lean = -0.49 * L, 0.1 * L
    thick = 0.011 * L
    front, top = back + 0.17 * L, base + h
    parts = []
    for side in (1, -1):
        plate = [
            (front, 0, base),
            (back, 0, base),
            (back - lean / 3, 0, top),
            (front - lean, 0, top),
        ]
        shifted = np.array(plate, float) + np.array((0, side * thick / 2, 0))
        parts.append((shifted[None], np.array(paint.tail)[None]))
    crest = [(front - lean, 1, top), (back - lean / 3, 1, top), (back - lean / 3, -1, top)]
    crest.append((front - lean, -1, top))
    slope = [(front, 1, base), (front - lean, 1, top), (front - lean, -1, top), (front, -1, base)]
    for quad in (crest, slope):
        parts.append((np.array(quad, float)[None] * (1, thick / 2, 1), paint.tail[None] * 0.9))
    if not make.tail_span:
        return parts
    half = make.tail_span * make.span / 2
    on_top = "T" in make.traits
    z = top if on_top else base
    chord = (0.09 if on_top else 0.115) * L
    lead = (front - lean * 1.05) if on_top else back + chord * 1.25
    swept = 0.5 * half if make.sweep > 2 else 0.15 * half
    edges = [(0.0, lead, chord, z), (half * 0.9, lead - swept * 0.9, chord * 0.5, z + 0.03 * half)]
    edges.append((half, lead - swept * 1.1, chord * 0.3, z + 0.03 * half))
    for side in (1, -1):
        quads = _plate(edges, side)
        colours = np.broadcast_to(paint.tail, (*quads.shape[:2], 3)).copy()
        colours[:, 3] *= 0.7
        parts.append((quads.reshape(-1, 4, 3), colours.reshape(-1, 3)))
    return parts


def _engine(make: Make, engine: Engine, side: int, paint: Livery) -> list[Part]:
    x = make.length * (0.5 - engine.x)
    t = np.array((0, 0.05, 0.14, 0.6, 0.85, 0.86, 1))
    r = engine.radius * np.array((0.82, 0.97, 1, 1, 0.78, 0.55, 0.3))
    y, z = side * engine.y, engine.z
    quads = _loft(np.stack((x - engine.length * t, y + 0 * t, z + 0 * t, r), 1), 7)
    colours = np.broadcast_to(paint.engine, (*quads.shape[:2], 3)).copy()
    colours[0] = (205, 205, 205)
    colours[-2:] = (78, 80, 84)
    if engine.propeller:
        colours[0] = (60, 60, 60)
    parts = [(quads.reshape(-1, 4, 3), colours.reshape(-1, 3))]
    if engine.y and engine.x > 0.55:  # a stub wing carries engines at the rear
        ahead, aft = x - 0.3 * engine.length, x - 0.8 * engine.length
        corners = ((ahead, y, z), (ahead, 0, z), (aft, 0, z), (aft, y, z))
        parts.append((np.array(corners)[None], paint.wing[None] * 0.8))
    if engine.propeller:
        p = engine.propeller
        blade = [
            (x + 0.1, y - p, z),
            (x + 0.1, y + p, z),
            (x - 0.12, y + p, z),
            (x - 0.12, y - p, z),
        ]
        parts.append((np.array(blade)[None], np.array(((70.0, 70.0, 70.0),))))
    return parts


def draw(
    mesh: Mesh,
    heading: float,
    position: tuple[float, float],
    ppm: float,
    lean: np.ndarray,
    sun: np.ndarray,
    gloss: float = 70.0,
) -> Drawing:
    """Render a mesh from above.

    Args:
        mesh: from `build`.
        heading: radians clockwise on the screen from its x axis.
        position: scene pixels of the ground point below the middle of the fuselage.
        ppm: pixels per metre.
        lean: screen displacement (x, y) of a point per metre of its height.
        sun: unit vector to the sun on the screen, (x, y, up).
        gloss: strength of the highlight.
    """
    c, s = np.cos(heading), np.sin(heading)
    turn = np.array(((c, s, 0), (-s, c, 0), (0, 0, 1)))
    world, sockets = mesh.quads @ turn, mesh.sockets @ turn
    colours = _shade(world, mesh.colours, np.array((*-lean, 1.0)), sun, gloss)
    seen = ppm * (world[..., :2] + world[..., 2:] * lean)
    shadows = ppm * (world[..., :2] - world[..., 2:] * sun[:2] / sun[2]) + position
    low = np.floor(seen.min((0, 1)) + position).astype(int) - 1
    width, height = np.ceil(seen.max((0, 1)) + position).astype(int) + 2 - low
    # fillConvexPoly's pixel centres are integers: the half pixel aligns drawing and mask.
    fine = (seen + position - low + 0.5) * SUPERSAMPLE - 0.5
    canvas = np.zeros((height * SUPERSAMPLE, width * SUPERSAMPLE, 4), np.uint8)
    points = np.round(fine * (1 << SHIFT)).astype(np.int32)
    for i in np.argsort(world[..., 2].mean(1), kind="stable"):
        cv2.fillConvexPoly(canvas, points[i], (*colours[i], 255), cv2.LINE_8, SHIFT)
    small = cv2.resize(canvas, (int(width), int(height)), interpolation=cv2.INTER_AREA).astype(
        np.float32
    )
    spots = ppm * (sockets[:, :2] + sockets[:, 2:] * lean) + position
    return Drawing(int(low[0]), int(low[1]), small[..., :3], small[..., 3] / 255, shadows, spots)


def _shade(
    quads: np.ndarray, colours: np.ndarray, view: np.ndarray, sun: np.ndarray, gloss: float
) -> list[tuple[int, int, int]]:
    """Lambert and Blinn-Phong shading, one colour per quad."""
    normals = np.cross(quads[:, 2] - quads[:, 0], quads[:, 3] - quads[:, 1])
    normals /= np.linalg.norm(normals, axis=1, keepdims=True) + 1e-9
    normals *= np.where(normals @ view < 0, -1, 1)[:, None]
    middle = sun + view / np.linalg.norm(view)
    middle /= np.linalg.norm(middle)
    # The exposure follows the sun: flat surfaces are as bright at dusk as at noon.
    diffuse = np.minimum(0.55 + 0.5 * np.maximum(normals @ sun, 0) / sun[2], 1.25)
    shine = gloss * np.maximum(normals @ middle, 0) ** 24
    lit = np.clip(colours * diffuse[:, None] + shine[:, None], 0, 255).astype(int)
    return [tuple(row) for row in lit.tolist()]
