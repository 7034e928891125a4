"""Aircraft as small meshes of coloured quads, drawn from above with their shadows.

Body frame: metres, x forward from the middle of the fuselage, y to the right wing, z up from the
ground. `build` turns a make's numbers into quads, `draw` renders them from above.
"""

from typing import NamedTuple

import cv2
import numpy as np

from rareplanes.render.makes import Engine, Livery, Make
from rareplanes.render.view import SHIFT, View, fixed

SUPERSAMPLE = 4
AIRFOIL = ((0, 0), (0.07, 0.035), (0.3, 0.05), (0.68, 0.03), (0.7, 0.028), (1, 0))  # chord, height
Part = tuple[np.ndarray, np.ndarray]  # quads [...,4,3] and their colours [...,3]


class Mesh(NamedTuple):
    quads: np.ndarray  # [N,4,3] metres, body frame
    colours: np.ndarray  # [N,3] BGR 0-255
    sockets: np.ndarray  # [4,3] nose, right wing, tail, left wing


class Drawing(NamedTuple):
    """An aircraft seen from above, ready to be blended into the scene."""

    low: np.ndarray  # [2] scene pixels (x, y) of the top left corner, int
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
    quads = np.concatenate([quads.reshape(-1, 4, 3) for quads, _ in parts])
    colours = np.concatenate([colours.reshape(-1, 3) for _, colours in parts])
    wing_x = make.length * (0.5 - make.wing_at) - make.sweep - make.tip / 2
    half, z = make.length / 2, _axis(make)
    sockets = [(half, 0, z), (wing_x, make.span / 2, z), (-half, 0, z), (wing_x, -make.span / 2, z)]
    return Mesh(quads, colours, np.array(sockets))


def _axis(make: Make) -> float:
    """Height of the fuselage's centre line."""
    return make.radius + 0.4 + 0.03 * make.length


def _patches(x: np.ndarray, y: np.ndarray, z: np.ndarray, colour: np.ndarray) -> Part:
    """Quads [n-1,m-1,4,3] of a surface through n x m points, and a colour [n-1,m-1,3] for each."""
    points = np.stack(np.broadcast_arrays(x, y, z), -1)
    quads = np.stack((points[:-1, :-1], points[:-1, 1:], points[1:, 1:], points[1:, :-1]), 2)
    return quads, np.tile(colour, (*quads.shape[:2], 1))


def _loft(
    x: np.ndarray, y: float, z: np.ndarray | float, r: np.ndarray, colour: np.ndarray, strips: int
) -> Part:
    """A body of circular sections with radius r around (x, y, z), open at the bottom."""
    angle = np.radians(np.linspace(-115, 115, strips + 1))
    x, z, r = (np.reshape(column, (-1, 1)) for column in (x, z, r))
    return _patches(x, y + r * np.sin(angle), z + r * np.cos(angle), colour)


def _fuselage(make: Make, paint: Livery) -> Part:
    t = np.array(
        (0, 0.008, 0.025, 0.045, 0.06, 0.09, 0.14, 0.3, 0.5, 0.64, 0.74, 0.82, 0.9, 0.96, 1)
    )
    nose_end, rear_start, rear_part = (0.14, 0.66, 0.34) if make.length > 12 else (0.25, 0.4, 0.6)
    nose = np.clip(t / nose_end, 0, 1)
    rear = np.clip((t - rear_start) / rear_part, 0, 1)
    radius = make.radius * np.sqrt(np.maximum(1 - (1 - nose) ** 2, 0.02)) * (1 - 0.9 * rear**1.4)
    z = _axis(make) + make.radius * (0.55 * rear**1.4 - 0.25 * (1 - nose) ** 2)
    quads, colours = _loft(make.length * (0.5 - t), 0, z, radius, paint.body, 11)
    colours[:, (1, -2)] = colours[:, (2, -3)] = paint.stripe
    colours[10:, :] = paint.tail
    colours[3:5, 3:-3] = (62, 52, 46)  # windscreen
    colours[3:5, 5] *= 1.6
    return quads, colours


def _plate(edges: list[tuple[float, float, float, float]], side: int, colour: np.ndarray) -> Part:
    """A wing given as stations of y, leading x, chord and z; `side` is 1 (right) or -1."""
    along, rise = np.array(AIRFOIL).T
    y, lead, chord, z = (column[:, None] for column in np.array(edges).T)
    return _patches(lead - chord * along, side * y, z + chord * rise * 0.8, colour)


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
    parts: list[Part] = []
    for side in (1, -1):
        quads, colours = _plate(edges, side, paint.wing)
        colours[:, 3] *= 0.62  # the gap before flaps and ailerons
        colours[:, 4] *= 0.95
        colours[:, 0] *= 1.06
        colours[-2:, :] = paint.tip
        colours[:-2, 0] = (colours[:-2, 0] + paint.tip) / 2
        parts.append((quads, colours))
        if "W" in make.traits:
            y, x, chord, height = edges[-1]
            top = height + 0.035 * make.span
            corners = [(x, y, height), (x - chord, y, height), (x - 1.5 * chord, y + 0.25, top)]
            corners.append((x - 0.9 * chord, y + 0.25, top))
            parts.append((np.array(corners) * (1, side, 1), paint.tail))
    return parts


def _tail(make: Make, paint: Livery) -> list[Part]:
    length, base = make.length, _axis(make) + make.radius * 0.5
    back, lean = -0.49 * length, 0.1 * length
    front, top = back + 0.17 * length, base + make.fin * length
    fin = np.array(
        ((front, 0, base), (back, 0, base), (back - lean / 3, 0, top), (front - lean, 0, top))
    )
    right = np.array((0, 0.011 * length / 2, 0))  # half the fin's thickness
    parts: list[Part] = [(fin + right, paint.tail), (fin - right, paint.tail)]
    for a, b in ((3, 2), (0, 3)):  # its top and its front
        rim = np.array((fin[a] + right, fin[b] + right, fin[b] - right, fin[a] - right))
        parts.append((rim, paint.tail * 0.9))
    if not make.tail_span:
        return parts
    half = make.tail_span * make.span / 2
    on_top = "T" in make.traits
    z = top if on_top else base
    chord = (0.09 if on_top else 0.115) * length
    lead = (front - lean * 1.05) if on_top else back + chord * 1.25
    swept = 0.5 * half if make.sweep > 2 else 0.15 * half
    edges = [(0.0, lead, chord, z), (half * 0.9, lead - swept * 0.9, chord * 0.5, z + 0.03 * half)]
    edges.append((half, lead - swept * 1.1, chord * 0.3, z + 0.03 * half))
    for side in (1, -1):
        quads, colours = _plate(edges, side, paint.tail)
        colours[:, 3] *= 0.7
        parts.append((quads, colours))
    return parts


def _engine(make: Make, engine: Engine, side: int, paint: Livery) -> list[Part]:
    x = make.length * (0.5 - engine.x)
    t = np.array((0, 0.05, 0.14, 0.6, 0.85, 0.86, 1))
    r = engine.radius * np.array((0.82, 0.97, 1, 1, 0.78, 0.55, 0.3))
    y, z, blade = side * engine.y, engine.z, engine.propeller
    quads, colours = _loft(x - engine.length * t, y, z, r, paint.engine, 7)
    colours[0] = (60, 60, 60) if blade else (205, 205, 205)
    colours[-2:] = (78, 80, 84)
    parts: list[Part] = [(quads, colours)]
    if engine.y and engine.x > 0.55:  # a stub wing carries engines at the rear
        ahead, aft = x - 0.3 * engine.length, x - 0.8 * engine.length
        stub = ((ahead, y, z), (ahead, 0, z), (aft, 0, z), (aft, y, z))
        parts.append((np.array(stub), paint.wing * 0.8))
    if blade:
        x0, x1, y0, y1 = x + 0.1, x - 0.12, y - blade, y + blade
        disc = ((x0, y0, z), (x0, y1, z), (x1, y1, z), (x1, y0, z))
        parts.append((np.array(disc), np.full(3, 70.0)))
    return parts


def draw(
    mesh: Mesh, heading: float, position: np.ndarray, view: View, gloss: float, sky: float
) -> Drawing:
    """Render a mesh from above.

    Args:
        mesh: from `build`.
        heading: radians clockwise on the screen from its x axis.
        position: [2] scene pixels of the ground point below the middle of the fuselage.
        view: the camera and the sun.
        gloss: strength of the highlight.
        sky: brightness without the sun, which a shadow keeps; with the sun a flat surface has 1.05.
    """
    c, s = np.cos(heading), np.sin(heading)
    turn = np.array(((c, s, 0), (-s, c, 0), (0, 0, 1)))
    world, sockets = mesh.quads @ turn, mesh.sockets @ turn
    colours, in_shadow = _shade(world, mesh.colours, view, gloss, sky)
    seen = view.ppm * (world[..., :2] + world[..., 2:] * view.lean)
    shadows = view.ppm * (world[..., :2] - world[..., 2:] * view.sun[:2] / view.sun[2]) + position
    low = np.floor(seen.min((0, 1)) + position).astype(int) - 1
    width, height = (np.ceil(seen.max((0, 1)) + position).astype(int) + 2 - low).tolist()
    # fillConvexPoly's pixel centres are integers: the half pixel aligns drawing and mask.
    points = fixed((seen + position - low + 0.5) * SUPERSAMPLE - 0.5)
    canvas = np.zeros((height * SUPERSAMPLE, width * SUPERSAMPLE, 4), np.uint8)
    relief = np.zeros((*canvas.shape[:2], 2), np.float32)  # height, brightness in shadow
    heights = world[..., 2].mean(1)
    for i in np.argsort(heights, kind="stable"):
        cv2.fillConvexPoly(canvas, points[i], (*colours[i], 255), cv2.LINE_8, SHIFT)
        cv2.fillConvexPoly(relief, points[i], (heights[i], in_shadow[i]), cv2.LINE_8, SHIFT)
    small = cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32)
    relief = cv2.resize(relief, (width, height), interpolation=cv2.INTER_AREA)
    relief = relief / np.maximum(small[..., 3:] / 255, 1e-3)
    small[..., :3] *= 1 - (_shadowed(relief[..., 0], view) * (1 - relief[..., 1]))[..., None]
    spots = view.ppm * (sockets[:, :2] + sockets[:, 2:] * view.lean) + position
    return Drawing(low, small[..., :3], small[..., 3] / 255, shadows, spots)


def _shadowed(height: np.ndarray, view: View) -> np.ndarray:
    """Where an aircraft is in its own shadow, such as a wing behind the fuselage: [h,w] 0-1.

    From each pixel of a map of heights in metres a ray goes to the sun, in steps of one pixel. The
    pixel is in shadow if the aircraft is higher than the ray somewhere.
    """
    per_metre = view.ppm * (view.sun[:2] / view.sun[2] + view.lean)  # pixels that the ray moves
    rise = 1 / max(float(np.abs(per_metre).max()), 0.5)  # metres that it rises in a step
    size, hidden = height.shape[::-1], np.zeros(height.shape, np.float32)
    for k in range(1, int(height.max() / rise) + 1):
        x, y = per_metre * rise * k
        move = np.array(((1, 0, x), (0, 1, y)), np.float32)
        above = cv2.warpAffine(height, move, size, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
        hidden = np.maximum(hidden, np.clip((above - height - rise * k) / 0.3 - 1, 0, 1))
    return cv2.GaussianBlur(hidden, (0, 0), 0.7)


def _shade(
    quads: np.ndarray, colours: np.ndarray, view: View, gloss: float, sky: float
) -> tuple[list[tuple[int, int, int]], list[float]]:
    """Lambert and Blinn-Phong shading: a colour per quad, and its share that is left in shadow."""
    sun, eye = view.sun, np.array((*-view.lean, 1.0))
    normals = np.cross(quads[:, 2] - quads[:, 0], quads[:, 3] - quads[:, 1])
    normals /= np.linalg.norm(normals, axis=1, keepdims=True) + 1e-9
    normals *= np.where(normals @ eye < 0, -1, 1)[:, None]
    middle = sun + eye / np.linalg.norm(eye)
    middle /= np.linalg.norm(middle)
    # The exposure follows the sun: flat surfaces are as bright at dusk as at noon.
    diffuse = np.minimum(sky + (1.05 - sky) * np.maximum(normals @ sun, 0) / sun[2], 1.25)
    shine = gloss * np.maximum(normals @ middle, 0) ** 24
    lit = np.clip(colours * diffuse[:, None] + shine[:, None], 0, 255).astype(int)
    return [tuple(row) for row in lit.tolist()], (sky / diffuse).tolist()
