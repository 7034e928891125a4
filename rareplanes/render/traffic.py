"""Who is on the airport: aircraft, vehicles, jet bridges and light masts of one scene."""

from dataclasses import dataclass, field

import cv2
import numpy as np

from rareplanes.render import aircraft
from rareplanes.render.aircraft import Drawing
from rareplanes.render.makes import Make, livery, makes
from rareplanes.render.plan import APRON, RUNWAY, SLABS, TAXIWAY, Block, Plan, box
from rareplanes.render.scenery import MAST_LABEL, along
from rareplanes.render.view import ROOF, Canvas, View, fixed

SPANS = (25.0, 170.0)  # pixels between the wing tips that are drawn
VEHICLES = {  # persistent name: (length, width, height, colour, categories 1 to 3)
    "Bus": (14.0, 3.0, 3.1, (235, 236, 236), ("GroundSupport", "Vehicle", "Bus")),
    "CargoLoader": (9.5, 3.6, 2.4, (205, 205, 198), ("GroundSupport", "CargoLoader")),
    "FuelTruck": (10.5, 2.6, 3.2, (180, 190, 205), ("GroundSupport", "Vehicle", "FuelTruck")),
    "StairTruck": (7.5, 2.5, 3.0, (215, 220, 220), ("GroundSupport", "Vehicle", "StairTruck")),
}
CAR_COLOURS = (
    *((225, 225, 225), (200, 200, 200), (60, 58, 56), (110, 105, 100)),
    *((50, 50, 150), (140, 80, 40), (40, 40, 42), (170, 190, 200)),
)


@dataclass
class Thing:
    """An object of the XML; its pixels are those of `colour` in the mask."""

    categories: tuple[str, ...]
    name: str
    colour: tuple[int, int, int]  # RGB
    low: np.ndarray  # where to look for its pixels: corner (x, y) …
    high: np.ndarray  # … and opposite corner, exclusive
    sockets: np.ndarray | None = None  # [4,2] pixels
    world: np.ndarray | None = None  # [4,3] metres
    drawing: Drawing | None = None
    bridge: Block | None = None
    extent: tuple[int, int, int, int] = (0, 0, 0, 0)
    area: int = 0


@dataclass
class Palette:
    """Hands out mask colours that nothing else in the scene has."""

    rng: np.random.Generator
    used: set[tuple[int, int, int]] = field(default_factory=set)

    def take(self) -> tuple[int, int, int]:
        while True:
            r, g, b = (int(v) for v in self.rng.integers(5, 251, 3))
            # Nearly grey colours belong to the ground's texture.
            if max(r, g, b) - min(r, g, b) > 12 and (r, g, b) not in self.used:
                self.used.add((r, g, b))
                return r, g, b


def park_vehicles(
    view: View, plan: Plan, palette: Palette, rng: np.random.Generator
) -> tuple[list[Block], list[tuple[Block, Thing]]]:
    """Cars, carts, containers and boxes without a name, and a few that the XML lists."""
    blocks: list[Block] = []
    near = [slot for slot in plan.slots if view.sees(view.screen(np.array([slot[:2]])), 60)]
    busy = rng.uniform(0.4, 2.6)
    for slot in near:
        for _ in range(rng.poisson(busy * (0.12 if slot.span < 25 else 1.0))):
            a = rng.choice((0.0, 0.5, 1.0, 1.5)) * np.pi + slot.heading + rng.normal(0, 0.1)
            # Beside the stand rather than on it, nearer to the nose than to the tail.
            side = rng.choice((-1, 1)) * slot.span * rng.uniform(0.3, 0.62)
            ahead = slot.span * rng.uniform(-0.5, 0.7)
            c, s = np.cos(slot.heading), np.sin(slot.heading)
            x, y = slot.x + ahead * c - side * s, slot.y + ahead * s + side * c
            carts = slot.span > 25 and rng.random() < 0.3
            blocks += _carts(x, y, a, rng) if carts else [_box(x, y, a, rng)]
    for _ in range(rng.poisson(3)):
        x, y = np.array(view.centre) + rng.uniform(-380, 380, 2)
        blocks.append(_box(x, y, rng.uniform(0, 6.28), rng))
    full = rng.uniform(0.1, 0.9)
    for x, y, heading in plan.cars:
        if abs(x - view.centre[0]) < 450 and rng.random() < full:
            colour = CAR_COLOURS[rng.integers(len(CAR_COLOURS))]
            blocks.append(Block(box((x, y), 4.5, 1.9, heading), 0, 1.4, colour, 50))
    named: list[tuple[Block, Thing]] = []
    for slot in near:
        if rng.random() < 0.16 and len(named) < 6:
            kind = str(rng.choice(list(VEHICLES)))
            length, width, height, colour, categories = VEHICLES[kind]
            at = np.array(slot[:2]) + rng.normal(0, 0.6 * slot.span + 5, 2)
            shape = box(at, length, width, rng.uniform(0, 6.28))
            pixels = np.concatenate((view.screen(shape), view.screen(shape, height)))
            if not view.sees(pixels, -6):
                continue
            name = f"BP_GroundSupport_{kind}_C_{rng.integers(100, 400)}StaticMesh"
            low, high = np.floor(pixels.min(0)) - 2, np.ceil(pixels.max(0)) + 3
            thing = Thing(("Airport", *categories), name, palette.take(), low, high)
            named.append((Block(shape, 0, height, colour, 0), thing))
    return blocks, named


def _box(x: float, y: float, heading: float, rng: np.random.Generator) -> Block:
    """A truck, tug, container or white box."""
    sizes = ((6, 2.4), (9, 2.6), (3.5, 2), (12, 2.5), (2.4, 2), (4.5, 4))
    length, width = sizes[rng.integers(len(sizes))]
    grey = rng.uniform(60, 245)
    colours = ((grey, grey, grey), (240, 242, 242), (40, 150, 200), (60, 60, 190), (160, 110, 50))
    colour = colours[rng.choice(5, p=(0.35, 0.35, 0.12, 0.08, 0.1))]
    return Block(box((x, y), length, width, heading), 0, rng.uniform(1.2, 3.2), colour, 51)


def _carts(x: float, y: float, heading: float, rng: np.random.Generator) -> list[Block]:
    """A train of baggage carts."""
    blue, green, red = rng.uniform(90, 210) + rng.normal(0, 18, 3)
    step = np.array((np.cos(heading), np.sin(heading))) * 3.6
    places = [(x, y) + step * k for k in range(int(rng.integers(2, 7)))]
    return [Block(box(at, 2.9, 1.7, heading), 0, 1.6, (blue, green, red), 52) for at in places]


def park_aircraft(
    view: View, plan: Plan, canvas: Canvas, wanted: int, palette: Palette, rng: np.random.Generator
) -> list[Thing]:
    """Up to `wanted` aircraft on stands, taxiways and runway; none touches another or a roof."""
    size = np.array((view.width, view.height))
    taken = np.zeros((view.height, view.width), np.uint8)
    things: list[Thing] = []
    paved = np.isin(canvas.material, (RUNWAY, TAXIWAY, APRON, SLABS))
    for x, y, heading, room, bridge in _places(view, plan, rng):
        if len(things) == wanted:
            break
        fitting = [m for m in makes() if _fits(m, room, view.ppm)]
        if not fitting:
            continue
        make = _choose(fitting, room, rng)
        at = view.screen(np.array(((x, y),)))[0]
        mesh = aircraft.build(make, livery(make, rng))
        turn = heading + view.yaw
        gloss = float(rng.uniform(10, 110))
        drawing = aircraft.draw(mesh, turn, at, view.ppm, view.lean, view.sun, gloss)
        low = np.array((drawing.x, drawing.y))
        high = low + drawing.alpha.shape[::-1]
        inside, patch = _overlap(low, high, size)
        alpha = drawing.alpha[patch]
        if alpha.size == 0 or not (alpha > 0.5).any():
            continue
        if not paved[tuple(np.clip(at, 0, size - 1).astype(int)[::-1])] and rng.random() < 0.97:
            continue
        hidden = (canvas.material[inside] == ROOF) & (alpha > 0.5)
        if (taken[inside] & (alpha > 0.02)).any() or hidden.mean() > 0.1 * (alpha > 0.5).mean():
            continue
        _take(taken, drawing)
        thing = Thing(
            _categories(make), _persistent(make, rng), palette.take(), low, high, drawing.sockets
        )
        c, s = np.cos(heading), np.sin(heading)
        thing.world = mesh.sockets @ np.array(((c, s, 0), (-s, c, 0), (0, 0, 1))) + (x, y, 0)
        thing.drawing = drawing
        if bridge is not None and rng.random() < 0.8:
            door = np.array((make.length * 0.36, -make.radius * rng.uniform(0.1, 1.1)))
            end = door @ np.array(((c, s), (-s, c))) + (x, y)
            thing.bridge = _bridge(np.array(bridge), end)
        things.append(thing)
    return things


def _take(taken: np.ndarray, drawing: Drawing, gap: int = 6) -> None:
    """Mark the aircraft's pixels and a gap around them."""
    wide = cv2.copyMakeBorder(drawing.alpha, gap, gap, gap, gap, cv2.BORDER_CONSTANT)
    near = cv2.dilate(wide, np.ones((2 * gap + 1, 2 * gap + 1), np.uint8)) > 0.02
    low = np.array((drawing.x, drawing.y)) - gap
    inside, patch = _overlap(low, low + near.shape[::-1], np.array(taken.shape[::-1]))
    taken[inside] |= near[patch]


def _places(
    view: View, plan: Plan, rng: np.random.Generator
) -> list[tuple[float, float, float, float, tuple[float, float] | None]]:
    """Candidates in random order: x, y, heading, room for wings in metres, foot of a bridge."""
    places = []
    for x, y, heading, span, bridge in plan.slots:
        backwards = rng.random() < 0.08
        turned = heading + rng.normal(0, 0.03) + np.pi * backwards
        spot = (x + rng.normal(0, 1), y + rng.normal(0, 1), turned, span)
        places.append((*spot, None if backwards else bridge))
    for route in plan.routes:
        flow = rng.choice((0.0, np.pi))
        for x, y, heading in along(route, 24.0):
            if rng.random() < 0.25:
                room = 18.0 if y < -40 else 62.0
                places.append((x, y, heading + flow + rng.normal(0, 0.04), room, None))
    for _ in range(6):  # anywhere, as a renderer's random seeds are
        x, y = np.array(view.centre) + rng.uniform(-330, 330, 2)
        places.append((x, y, rng.uniform(0, 6.28), 62.0 if y > -60 else 20.0, None))
    pixels = view.screen(np.array([place[:2] for place in places]))
    edge = 60
    seen = ((pixels > -edge) & (pixels < (view.width + edge, view.height + edge))).all(1)
    kept = [places[i] for i in np.flatnonzero(seen)]
    return [kept[i] for i in rng.permutation(len(kept))]


def _fits(make: Make, room: float, ppm: float) -> bool:
    return make.span <= room and SPANS[0] < make.span * ppm < SPANS[1] - 1


def _choose(fitting: list[Make], room: float, rng: np.random.Generator) -> Make:
    """Stands are used by aircraft of about their size; military ones stay rare."""
    weights = np.array([np.exp(-(((room * 0.8 - m.span) / (0.35 * room)) ** 2)) for m in fitting])
    weights *= [0.3 if "M" in m.traits else 1.0 for m in fitting]
    return fitting[rng.choice(len(fitting), p=weights / weights.sum())]


def _categories(make: Make) -> tuple[str, ...]:
    side = "Military" if "M" in make.traits else "Civil"
    variant = ("35-A",) if make.name == "Bombardier_Learjet" and side == "Civil" else ()
    return ("Airplane", side, make.kind, *make.name.split("_", 1), *variant)


def _persistent(make: Make, rng: np.random.Generator) -> str:
    number = rng.integers(250, 400)
    return f"SM_{'_'.join(_categories(make))}_BPC_C_{number}StaticMeshComponent"


def _bridge(start: np.ndarray, end: np.ndarray) -> Block:
    length = float(np.hypot(*(end - start)))
    heading = float(np.arctan2(*(end - start)[::-1]))
    return Block(box((start + end) / 2, length, 3.2, heading), 3.6, 2.8, (168, 166, 160), 53)


def _overlap(low: np.ndarray, high: np.ndarray, size: np.ndarray) -> tuple[tuple, tuple]:
    """Slices of the scene and of the patch where a patch covers the scene."""
    a = np.clip(low, 0, size).astype(int)
    b = np.clip(high, 0, size).astype(int)
    b = np.maximum(a, b)
    scene = (slice(a[1], b[1]), slice(a[0], b[0]))
    x, y = (a - low).astype(int), (b - low).astype(int)
    return scene, (slice(x[1], y[1]), slice(x[0], y[0]))


def lay_aircraft(canvas: Canvas, image: np.ndarray, light: np.ndarray, things: list[Thing]) -> None:
    """Blend the aircraft into `image` (float32) and label their pixels; roofs stay on top."""
    size = np.array(image.shape[1::-1])
    for thing in things:
        if thing.drawing is None:
            continue
        inside, patch = _overlap(thing.low, thing.high, size)
        open_sky = canvas.material[inside] != ROOF
        alpha = thing.drawing.alpha[patch] * open_sky
        colour = thing.drawing.colour[patch] * (open_sky * light[inside])[..., None]
        image[inside] += colour - alpha[..., None] * image[inside]
        canvas.mask[inside][alpha >= 0.5] = thing.colour[::-1]


def shade_ground(canvas: Canvas, things: list[Thing]) -> None:
    for thing in things:
        if thing.drawing is not None:
            for quad in fixed(thing.drawing.shadows):
                cv2.fillConvexPoly(canvas.shadow, quad, 255, cv2.LINE_8, 4)


def measure(canvas: Canvas, things: list[Thing]) -> None:
    """Fill in area and inclusive extent of each object's pixels; area 0 leaves a point."""
    size = np.array(canvas.mask.shape[1::-1])
    for thing in things:
        inside, _ = _overlap(thing.low, thing.high, size)
        ys, xs = np.nonzero((canvas.mask[inside] == thing.colour[::-1]).all(-1))
        thing.area = len(xs)
        if thing.area:
            left, top = inside[1].start, inside[0].start
            corners = (xs.min() + left, ys.min() + top, xs.max() + left, ys.max() + top)
        else:
            middle = np.clip((thing.low + thing.high) / 2, 0, size - 1).astype(int)
            corners = (*middle, *middle)
        thing.extent = tuple(int(v) for v in corners)  # type: ignore[assignment]


def masts(view: View, canvas: Canvas, things: list[Thing], rng: np.random.Generator) -> None:
    """Lamp posts, some of which stand before an aircraft and cut it in two in the mask."""
    for _ in range(rng.poisson(3)):
        at = rng.uniform((0, 0), (view.width, view.height))
        if things and rng.random() < 0.5:
            other = things[rng.integers(len(things))]
            at = (other.low + other.high) / 2 + rng.normal(0, 12, 2)
        height = rng.uniform(14, 24) * view.ppm
        top = at + view.lean * height
        pole = np.array((at, top))
        cv2.polylines(canvas.image, [fixed(pole)], False, (52, 50, 48), 1, cv2.LINE_AA, 4)
        cv2.polylines(canvas.mask, [fixed(pole)], False, MAST_LABEL, 1, cv2.LINE_8, 4)
        angle = rng.uniform(0, 3.14)
        for row in (-1, 1):
            for k in range(4):
                along_row = np.array((np.cos(angle), np.sin(angle))) * (k - 1.5) * 4
                across = np.array((-np.sin(angle), np.cos(angle))) * row * 2.2
                lamp = box(top + along_row + across, 2.6, 3.0, angle)
                cv2.fillConvexPoly(canvas.image, fixed(lamp), (46, 44, 44), cv2.LINE_AA, 4)
                cv2.fillConvexPoly(canvas.mask, fixed(lamp), MAST_LABEL, cv2.LINE_8, 4)
