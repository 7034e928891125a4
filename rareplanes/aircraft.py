"""Aircraft as small meshes of coloured quads, drawn from above with the shadow they cast.

Body frame: metres, x forward from the middle of the fuselage, y to the right wing, z up from the
ground. A make is a line of numbers; `build` turns it into quads, `draw` looks at them from above.
"""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import cv2
import numpy as np

SUPERSAMPLE = 4
SHIFT = 4  # fractional bits of the coordinates handed to OpenCV
AIRFOIL = ((0, 0), (0.07, 0.035), (0.3, 0.05), (0.68, 0.03), (0.7, 0.028), (1, 0))  # chord, height

# Published dimensions in metres, rounded; names are keys of RarePlanes' table of attributes.
# Along x everything is a fraction of the length behind the nose. Traits: H high wing, T tail on
# top of the fin, W winglets, K trailing edge with a kink, D delta wing, M military paint.
# make kind length span radius | wing at, root, tip, sweep | tail span, fin | traits |
# engines as x,y,z,length,radius[,propeller]: y 0 sits on the centre line, others come in pairs
TABLE = """
Airbus_A320 Transport 37.6 35.8 2 .31 7.2 1.6 8.3 .36 .13 KW .30,5.7,1.9,4.4,1.15
Boeing_737-300 Transport 33.4 28.9 1.9 .33 7 1.6 6.6 .4 .17 K .31,4.9,1.9,4.2,1.05
Boeing_737 Transport 29 28 1.9 .32 6.6 1.6 6.3 .4 .18 K .33,4.8,1.9,5.2,.7
Boeing_757-300 Transport 54.4 38 1.95 .36 8.2 1.7 8.6 .38 .12 K .34,6.5,1.9,5.6,1.4
Tupolev_Tu-204 Transport 46.1 41.8 1.95 .33 8 1.7 9.4 .36 .13 KW .32,6.7,1.9,5.2,1.3
Boeing_767 Transport 54.9 47.6 2.5 .32 9.4 2.2 13 .38 .13 K .31,7.9,2.1,5.6,1.5
Airbus_A300 Transport 53.6 44.8 2.8 .31 10 2.9 10.5 .36 .13 K .30,7.9,2.1,5.6,1.5
Airbus_A330-300 Transport 58.8 60.3 2.8 .31 10.8 2.4 15.4 .33 .12 KW .31,9.4,2.1,6,1.6
Airbus_A-340 Transport 59.4 60.3 2.8 .31 10.8 2.4 15.6 .33 .12 KW .33,9.4,2.1,4.8,1.2 .42,19,2.6,4.8,1.2
Boeing_747 Transport 56.3 59.6 3.2 .24 14 3.2 18.6 .36 .13 K .29,11.7,2.3,5.4,1.35 .42,21,2.9,5.4,1.35
Boeing_707 Transport 44.2 39.9 1.9 .29 8.6 1.9 13.2 .36 .14 K .33,7.6,1.9,4.6,.85 .45,13,2.3,4.6,.85
McDonnellDouglas_MD-11 Transport 61 52 3 .34 10.4 2.2 14 .36 .12 KW .33,8.3,2.1,5.8,1.4 .83,0,8,9.5,1.5
Boeing_727 Transport 40.6 32.9 1.9 .37 7.6 1.8 9 .33 .15 KT .7,3.2,3.4,5,.95 .75,0,5.6,8,.95
Tupolev_154 Transport 48 37.6 1.95 .4 8 1.9 10.5 .36 .14 KT .74,3.4,3.4,5.4,1 .78,0,5.8,8.6,1
Boeing_717-200 Transport 37.8 28.4 1.75 .42 6.2 1.4 6.2 .38 .13 KT .7,3.1,3.4,5.8,1
McDonnellDouglas_DC-9-30 Transport 36.4 28.4 1.75 .41 6.2 1.4 6.2 .38 .13 KT .7,3,3.4,5.6,.85
Fokker_100 Transport 35.5 28.1 1.7 .4 5.8 1.5 4.6 .36 .13 KT .68,3,3.4,5,.95
SudAviation_Caravelle Transport 32 34.3 1.65 .37 6.6 1.7 6.4 .32 .17 K .7,2.7,3.4,5,.8
BAE_146-100 Transport 26.2 26.3 1.8 .35 5.4 1.6 3.4 .42 .2 HT .35,4.2,3.6,2.9,.75 .41,7.6,3.6,2.9,.75
BAE_146-300 Transport 31 26.3 1.8 .37 5.4 1.6 3.4 .42 .17 HT .36,4.2,3.6,2.9,.75 .41,7.6,3.6,2.9,.75
ATR_ATR-72 Transport 27.2 27.1 1.4 .4 2.7 1.6 .5 .28 .2 HT .32,4.05,3.6,5.4,.6,1.95
Dornier_Do-228 Transport 16.6 17 .9 .32 2.2 1.1 .5 .38 .2 H .24,2.4,2.4,3,.45,1.35
Douglas_DC-3 Transport 19.4 29.1 1.2 .24 4.6 1.3 2.9 .28 .15 M .14,2.9,2.1,5,.75,1.75
Bombardier_CRJ-705 Private 32.3 23.2 1.35 .42 5 1.3 5 .36 .14 KTW .7,2.5,2.8,4.2,.8
Embraer_ERJ-135 Private 26.3 20 1.15 .42 4.4 1 4 .36 .16 KT .68,2.1,2.6,3.8,.7
Bombardier_BD-700-GlobalExpress Private 29.5 28.7 1.3 .36 6.2 1.3 7.6 .33 .14 KTW .67,2.4,2.8,4.6,.8
Bombardier_Challenger-300 Private 20.9 19.5 1.15 .38 4.6 1.1 4.2 .36 .16 KTW .64,2.1,2.4,3.6,.7
Bombardier_Challenger-604 Private 20.9 19.6 1.3 .38 4.6 1.2 4.2 .36 .16 KTW .64,2.3,2.5,3.6,.75
Gulfstream_GIII Private 25.3 23.7 1.2 .38 5.6 1.5 6 .36 .16 KTW .65,2.2,2.6,4.4,.8
Dassault_Falcon-900 Private 20.2 19.3 1.2 .36 4.6 1.1 4.6 .4 .16 K .65,2,2.4,3,.6 .7,0,3.4,4.4,.6
Cessna_Citation-CJ4 Private 16.3 15.5 .85 .4 2.9 1.1 1.5 .4 .17 T .63,1.5,1.9,2.6,.5
Bombardier_Learjet Private 14.8 12 .85 .44 2.8 1.3 1.1 .38 .17 T .62,1.4,1.9,2.6,.45
Let_L-200Morova Sport 8.6 12.3 .65 .26 1.9 1 .3 .36 .13 - .16,1.9,1.3,2,.35,1
Cessna_310 Sport 8.2 10.7 .65 .3 1.8 1.1 .25 .46 .16 - .2,1.8,1.3,2.3,.35,1
Cessna_172 Sport 8.3 11 .6 .24 1.7 1.2 .2 .32 .14 H 0,0,1.2,.9,.5,.95
PiperAircraft_PA-28 Sport 7.2 9.2 .6 .3 1.7 1.3 .2 .36 .14 - 0,0,1.1,.9,.5,.95
DeHavillandCanada_DHC-2-Beaver Sport 9.2 14.6 .7 .24 1.6 1.5 .1 .33 .14 H 0,0,1.4,1.1,.6,1.2
Dassault_Mirage-2000 Fighter 14.4 9.2 .75 .3 8.6 .7 7.2 0 .2 DM .86,0,1.6,1.8,.6
Avro_Vulcan Bomber 30.5 33.8 1.5 .2 21 2.6 17 0 .16 DM
Lockheed_C-130 Transport 29.8 40.4 2.15 .36 4.9 2.4 .9 .4 .22 HM .27,5,4.2,6,.65,2 .28,10.2,4.3,6,.65,2
"""  # noqa: E501


class Engine(NamedTuple):
    x: float
    y: float
    z: float
    length: float
    radius: float
    propeller: float = 0.0


@dataclass(frozen=True)
class Make:
    """One type of aircraft; metres, and fractions of the length along x."""

    name: str
    kind: str
    length: float
    span: float
    radius: float
    wing_at: float
    root: float
    tip: float
    sweep: float
    tail_span: float
    fin: float
    traits: str
    engines: tuple[Engine, ...]


class Livery(NamedTuple):
    """BGR colours of the parts."""

    body: np.ndarray
    wing: np.ndarray
    tail: np.ndarray
    engine: np.ndarray
    stripe: np.ndarray
    tip: np.ndarray


class Mesh(NamedTuple):
    quads: np.ndarray  # [N,4,3] metres, body frame
    colours: np.ndarray  # [N,3] BGR 0-255
    sockets: np.ndarray  # [4,3] nose, right wing, tail, left wing


class Drawing(NamedTuple):
    """An aircraft seen from above, ready to be laid onto the scene at (x, y)."""

    x: int
    y: int
    colour: np.ndarray  # [h,w,3] float32 BGR, premultiplied by alpha
    alpha: np.ndarray  # [h,w] float32 0-1
    shadows: np.ndarray  # [N,4,2] quads of the shadow on the ground, in scene pixels
    sockets: np.ndarray  # [4,2] nose, right wing, tail, left wing, in scene pixels


@cache
def makes() -> tuple[Make, ...]:
    rows = []
    for line in TABLE.strip().splitlines():
        name, kind, *numbers = line.split()
        engines = tuple(Engine(*map(float, text.split(","))) for text in numbers[10:])
        rows.append(Make(name, kind, *map(float, numbers[:9]), numbers[9], engines))  # type: ignore[arg-type]
    return tuple(rows)


def livery(make: Make, rng: np.random.Generator) -> Livery:
    """Paint: mostly white or light grey with a coloured tail; some wholly coloured, some dark."""
    if "M" in make.traits:
        body = np.array(((118, 116, 112), (84, 98, 92), (140, 136, 130), (128, 160, 176))[rng.integers(4)])
        body = body * rng.uniform(0.8, 1.25)
        return Livery(body, body * 0.97, body, body * 0.8, body * 1.05, body)
    accent = _vivid(rng)
    white = np.array((1, 1, 1)) * rng.uniform(215, 255) - np.array((1, 0.4, 0)) * rng.uniform(0, 14)
    grey = np.array((1, 1, 1)) * rng.uniform(120, 205)
    body = (white, grey, _vivid(rng), np.array((1, 1, 1)) * rng.uniform(45, 100))[
        rng.choice(4, p=(0.62, 0.16, 0.15, 0.07))
    ]
    wing = (np.array((1, 1, 1)) * rng.uniform(165, 235), body)[rng.integers(2)]
    tail = (accent, body)[int(rng.random() < 0.4)]
    engine = (white, wing * 0.9, accent, body)[rng.integers(4)]
    stripe = (body, accent)[int(rng.random() < 0.4)]
    return Livery(body, wing, tail, engine, stripe, (wing, accent)[int(rng.random() < 0.15)])


def _vivid(rng: np.random.Generator) -> np.ndarray:
    """Airlines prefer blues and reds, then yellows and teals."""
    centre, spread = ((108, 9), (0, 6), (20, 8), (92, 10), (60, 60))[
        rng.choice(5, p=(0.38, 0.24, 0.16, 0.12, 0.1))
    ]
    hue = rng.normal(centre, spread) % 180
    hsv = np.uint8([[[hue, rng.uniform(80, 215), rng.uniform(90, 240)]]])
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[0, 0].astype(float)


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


def _fuselage(make: Make, paint: Livery) -> tuple[np.ndarray, np.ndarray]:
    t = np.array((0, 0.008, 0.025, 0.045, 0.06, 0.09, 0.14, 0.3, 0.5, 0.64, 0.74, 0.82, 0.9, 0.96, 1))
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
        np.broadcast_arrays(lead - length * chord, side * y + 0 * chord, z + length * rise * 0.8), -1
    )
    return np.stack((points[:-1, :-1], points[:-1, 1:], points[1:, 1:], points[1:, :-1]), 2)


def _wings(make: Make, paint: Livery) -> list[tuple[np.ndarray, np.ndarray]]:
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


def _tail(make: Make, paint: Livery) -> list[tuple[np.ndarray, np.ndarray]]:
    L, h = make.length, make.fin * make.length
    base = _axis(make) + make.radius * 0.5
    back, lean = -0.49 * L, 0.1 * L
    thick = 0.011 * L
    root, tip = 0.17 * L, 0.09 * L
    front, top = back + root, base + h
    parts = []
    for side in (1, -1):
        plate = [(front, 0, base), (back, 0, base), (back - lean / 3, 0, top), (front - lean, 0, top)]
        shifted = np.array(plate, float) + (0, side * thick / 2, 0)
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


def _engine(make: Make, engine: Engine, side: int, paint: Livery) -> list[tuple[np.ndarray, np.ndarray]]:
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
        corners = ((x - 0.3 * engine.length, y, z), (x - 0.3 * engine.length, 0, z))
        corners += ((x - 0.8 * engine.length, 0, z), (x - 0.8 * engine.length, y, z))
        parts.append((np.array(corners)[None], paint.wing[None] * 0.8))
    if engine.propeller:
        p = engine.propeller
        blade = [(x + 0.1, y - p, z), (x + 0.1, y + p, z), (x - 0.12, y + p, z), (x - 0.12, y - p, z)]
        parts.append((np.array(blade)[None], np.array(((70.0, 70.0, 70.0),))))
    return parts


def draw(
    mesh: Mesh,
    heading: float,
    at: tuple[float, float],
    ppm: float,
    lean: np.ndarray,
    sun: np.ndarray,
    gloss: float = 70.0,
) -> Drawing:
    """Look at a mesh from above.

    Args:
        mesh: from `build`.
        heading: radians clockwise on the screen from its x axis.
        at: scene pixels of the ground point below the middle of the fuselage.
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
    shadows = ppm * (world[..., :2] - world[..., 2:] * sun[:2] / sun[2]) + at
    low = np.floor(seen.min((0, 1)) + at).astype(int) - 1
    width, height = np.ceil(seen.max((0, 1)) + at).astype(int) + 2 - low
    # fillConvexPoly's pixel centres are integers: half a pixel keeps drawing and mask together.
    fine = (seen + at - low + 0.5) * SUPERSAMPLE - 0.5
    canvas = np.zeros((height * SUPERSAMPLE, width * SUPERSAMPLE, 4), np.uint8)
    points = np.round(fine * (1 << SHIFT)).astype(np.int32)
    for i in np.argsort(world[..., 2].mean(1), kind="stable"):
        cv2.fillConvexPoly(canvas, points[i], (*colours[i], 255), cv2.LINE_8, SHIFT)
    small = cv2.resize(canvas, (int(width), int(height)), interpolation=cv2.INTER_AREA).astype(np.float32)
    spots = ppm * (sockets[:, :2] + sockets[:, 2:] * lean) + at
    return Drawing(*map(int, low), small[..., :3], small[..., 3] / 255, shadows, spots)


def _shade(
    quads: np.ndarray, colours: np.ndarray, view: np.ndarray, sun: np.ndarray, gloss: float
) -> list[tuple[int, int, int]]:
    """Lambert and Blinn-Phong shading, one colour a quad."""
    normals = np.cross(quads[:, 2] - quads[:, 0], quads[:, 3] - quads[:, 1])
    normals /= np.linalg.norm(normals, axis=1, keepdims=True) + 1e-9
    normals *= np.where(normals @ view < 0, -1, 1)[:, None]
    middle = sun + view / np.linalg.norm(view)
    middle /= np.linalg.norm(middle)
    diffuse = 0.5 + 0.62 * np.maximum(normals @ sun, 0)
    shine = gloss * np.maximum(normals @ middle, 0) ** 24
    lit = np.clip(colours * diffuse[:, None] + shine[:, None], 0, 255).astype(int)
    return [tuple(row) for row in lit.tolist()]
