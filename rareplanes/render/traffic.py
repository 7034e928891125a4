"""Parks aircraft and vehicles, draws them, and lists them as objects of the XML."""

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np

from rareplanes.render import aircraft
from rareplanes.render.aircraft import Drawing
from rareplanes.render.makes import Make, livery, makes
from rareplanes.render.plan import Block, Material, Plan, Slot, box, rotation
from rareplanes.render.scenery import BRIDGES, MAST_LABEL, along
from rareplanes.render.view import SHIFT, Canvas, View, fixed, stroke

SPANS = (25.0, 169.0)  # wing spans that are drawn, pixels
PAVEMENT = (Material.RUNWAY, Material.TAXIWAY, Material.APRON, Material.SLABS)
VEHICLES = {  # persistent name: (length, width, height, colour, categories 1 to 3)
    "Bus": (14.0, 3.0, 3.1, (235, 236, 236), ("GroundSupport", "Vehicle", "Bus")),
    "CargoLoader": (9.5, 3.6, 2.4, (205, 205, 198), ("GroundSupport", "CargoLoader")),
    "FuelTruck": (10.5, 2.6, 3.2, (180, 190, 205), ("GroundSupport", "Vehicle", "FuelTruck")),
    "StairTruck": (7.5, 2.5, 3.0, (215, 220, 220), ("GroundSupport", "Vehicle", "StairTruck")),
}
CAR_COLOURS = (
    *((250, 250, 250), (205, 205, 205), (60, 58, 56), (110, 105, 100), (245, 245, 245)),
    *((50, 50, 150), (140, 80, 40), (40, 40, 42), (170, 190, 200)),
)
Colour = tuple[int, int, int]  # RGB in the mask


@dataclass
class Thing:
    """An object of the XML; its pixels are those of `colour` in the mask."""

    categories: tuple[str, ...]
    name: str
    colour: Colour
    low: np.ndarray  # its pixels lie between this corner (x, y) …
    high: np.ndarray  # … and this one, exclusive
    sockets: np.ndarray | None = None  # [4,2] pixels
    drawing: Drawing | None = None
    bridge: Block | None = None
    extent: tuple[int, ...] = (0, 0, 0, 0)  # xmin, ymin, xmax, ymax, inclusive


def free_colours(rng: np.random.Generator, used: set[Colour]) -> Iterator[Colour]:
    """Mask colours (RGB) for the objects; nothing else in the scene has one of them."""
    while True:
        r, g, b = rng.integers(5, 251, 3).tolist()
        # Nearly grey colours belong to the ground's texture.
        if max(r, g, b) - min(r, g, b) > 12 and (r, g, b) not in used:
            used.add((r, g, b))
            yield r, g, b


def overlap(low: np.ndarray, high: np.ndarray, size: np.ndarray) -> tuple[tuple, tuple]:
    """Slices of the scene and of a patch, from `low` to `high`, where both overlap."""
    a, b = np.clip(low, 0, size).astype(int), np.clip(high, 0, size).astype(int)
    (x0, y0), (x1, y1) = (a - low).astype(int), (b - low).astype(int)
    return (slice(a[1], b[1]), slice(a[0], b[0])), (slice(y0, y1), slice(x0, x1))


def park_aircraft(
    view: View, plan: Plan, canvas: Canvas, colours: Iterator[Colour], rng: np.random.Generator
) -> list[Thing]:
    """Up to 40 aircraft on stands, taxiways and runway; none touches another or a roof."""
    area = view.width * view.height / (1920 * 1080)
    wanted = int(np.clip(rng.gamma(2.3, 6.0) * area**0.5, 1, 40))
    size = np.array((view.width, view.height))
    occupied = np.zeros((view.height, view.width), np.uint8)
    things: list[Thing] = []
    paved = np.isin(canvas.material, PAVEMENT)
    for x, y, heading, room, bridge in _candidates(view, plan, rng):
        if len(things) == wanted:
            break
        make = _choose(room, view.ppm, rng)
        if make is None:
            continue
        position = view.screen(np.array(((x, y),)))[0]
        mesh = aircraft.build(make, livery(make, rng, plan.airport.plain))
        gloss, sky = rng.uniform(10, 110), 0.55 if plan.airport.plain else rng.uniform(0.3, 0.6)
        drawing = aircraft.draw(mesh, heading + view.yaw, position, view, gloss, sky)
        low, high = drawing.low, drawing.low + drawing.alpha.shape[::-1]
        inside, patch = overlap(low, high, size)
        alpha = drawing.alpha[patch]
        solid = alpha > 0.5
        if not solid.any():
            continue
        pixel = tuple(np.clip(position, 0, size - 1).astype(int)[::-1])
        if not paved[pixel] and rng.random() < 0.97:
            continue
        hidden = (canvas.material[inside] == Material.ROOF) & solid
        if (occupied[inside] & (alpha > 0.02)).any() or hidden.mean() > 0.1 * solid.mean():
            continue
        _occupy(occupied, drawing)
        name = _name(_categories(make), int(rng.integers(250, 400)))
        thing = Thing(_categories(make), name, next(colours), low, high, drawing.sockets, drawing)
        if bridge is not None and "M" not in make.traits and rng.random() < 0.8:
            door = np.array((make.length * 0.36, -make.radius * rng.uniform(0.1, 1.1)))
            thing.bridge = _bridge(np.array(bridge), door @ rotation(heading) + (x, y))
        things.append(thing)
    return things


def unseen_aircraft(view: View, others: list[Thing], colour: Colour) -> Thing:
    """An aircraft just outside the picture: listed in the XML, with no pixel."""
    outside = np.array((view.width + 30.0, view.height * 0.4))
    cessna = ("Airplane", "Civil", "Sport", "Cessna", "172")
    categories = others[0].categories if others else cessna
    sockets = outside + np.array(((0, -20), (20, 0), (0, 20), (-20, 0)))
    return Thing(categories, _name(categories, 249), colour, outside, outside + 1, sockets)


def _occupy(occupied: np.ndarray, drawing: Drawing, gap: int = 6) -> None:
    """Mark the aircraft's pixels and a gap around them."""
    wide = cv2.copyMakeBorder(drawing.alpha, gap, gap, gap, gap, cv2.BORDER_CONSTANT)
    near = cv2.dilate(wide, np.ones((2 * gap + 1, 2 * gap + 1), np.uint8)) > 0.02
    low = drawing.low - gap
    inside, patch = overlap(low, low + near.shape[::-1], np.array(occupied.shape[::-1]))
    occupied[inside] |= near[patch]


def _candidates(view: View, plan: Plan, rng: np.random.Generator) -> list[Slot]:
    """Positions in random order; the `span` of each is the room for wings, in metres."""
    candidates = []
    for x, y, heading, span, bridge in plan.slots:
        backwards = rng.random() < 0.08
        turned = heading + rng.normal(0, 0.03) + np.pi * backwards
        spot = (x + rng.normal(0, 1), y + rng.normal(0, 1), turned, span)
        candidates.append(Slot(*spot, None if backwards else bridge))
    for route in plan.routes:
        flow = rng.choice((0.0, np.pi))
        for x, y, heading in along(route, 24.0):
            if rng.random() < 0.25:
                turned = heading + flow + rng.normal(0, 0.04)
                candidates.append(Slot(x, y, turned, 18.0 if y < -40 else 62.0))
    for _ in range(6):  # anywhere
        x, y = np.array(view.centre) + rng.uniform(-330, 330, 2)
        candidates.append(Slot(x, y, rng.uniform(0, 6.28), 62.0 if y > -60 else 20.0))
    pixels = view.screen(np.array([candidate[:2] for candidate in candidates]))
    return [candidates[i] for i in rng.permutation(np.flatnonzero(view.sees(pixels, pixels, 60)))]


def _choose(room: float, ppm: float, rng: np.random.Generator) -> Make | None:
    """A make that fits, most often of about the room's size and rarely a military one."""
    fitting = [m for m in makes() if m.span <= room and SPANS[0] < m.span * ppm < SPANS[1]]
    if not fitting:
        return None
    weights = np.array([np.exp(-(((room * 0.8 - m.span) / (0.35 * room)) ** 2)) for m in fitting])
    weights *= [0.3 if "M" in m.traits else 1.0 for m in fitting]
    return fitting[rng.choice(len(fitting), p=weights / weights.sum())]


def _categories(make: Make) -> tuple[str, ...]:
    side = "Military" if "M" in make.traits else "Civil"
    variant = ("35-A",) if make.name == "Bombardier_Learjet" and side == "Civil" else ()
    return ("Airplane", side, make.kind, *make.name.split("_", 1), *variant)


def _name(categories: tuple[str, ...], number: int) -> str:
    return f"SM_{'_'.join(categories)}_BPC_C_{number}StaticMeshComponent"


def _bridge(start: np.ndarray, end: np.ndarray) -> Block:
    length = float(np.hypot(*(end - start)))
    heading = float(np.arctan2(*(end - start)[::-1]))
    return Block(box((start + end) / 2, length, 3.2, heading), 3.6, 2.8, (168, 166, 160), BRIDGES)


def idle_bridges(view: View, plan: Plan, rng: np.random.Generator) -> list[Block]:
    """Jet bridges that wait beside the stands for an aircraft."""
    blocks = []
    for _, _, heading, span, start in plan.slots:
        if start is not None and rng.random() < 0.5 and not plan.airport.plain:
            away = heading + np.pi + rng.uniform(-0.5, 0.5)
            ahead = np.array((np.cos(away), np.sin(away)))
            end = start + ahead * rng.uniform(0.25, 0.4) * span
            cab = Block(box(end, 5, 4.4, away), 3.4, 3.2, (150, 150, 146), BRIDGES)
            blocks += [_bridge(np.array(start), end), cab]
    return blocks


def lay_aircraft(canvas: Canvas, image: np.ndarray, light: np.ndarray, things: list[Thing]) -> None:
    """Blend the aircraft into `image` (float32) and label their pixels; roofs stay on top."""
    size = np.array(image.shape[1::-1])
    for thing in things:
        if thing.drawing is None:
            continue
        inside, patch = overlap(thing.low, thing.high, size)
        open_sky = canvas.material[inside] != Material.ROOF
        alpha = thing.drawing.alpha[patch] * open_sky
        colour = thing.drawing.colour[patch] * (open_sky * light[inside])[..., None]
        image[inside] += colour - alpha[..., None] * image[inside]
        canvas.mask[inside][alpha >= 0.5] = thing.colour[::-1]


def shade_ground(canvas: Canvas, things: list[Thing]) -> None:
    for thing in things:
        if thing.drawing is not None:
            for quad in fixed(thing.drawing.shadows):
                cv2.fillConvexPoly(canvas.shadow, quad, 255, cv2.LINE_8, SHIFT)


def park_vehicles(
    view: View, plan: Plan, colours: Iterator[Colour], rng: np.random.Generator
) -> tuple[list[Block], list[tuple[Block, Thing]]]:
    """Unnamed cars, carts, containers and boxes, and a few vehicles that the XML lists."""
    blocks: list[Block] = []
    spots = view.screen(np.array([slot[:2] for slot in plan.slots]))
    near = [plan.slots[i] for i in np.flatnonzero(view.sees(spots, spots, 60))]
    most, white = (2.6, 0.06) if plan.airport.plain else (7, 0.45)
    busy = rng.uniform(0.4, most)
    for slot in near:
        for _ in range(rng.poisson(busy * (0.12 if slot.span < 25 else 1.0))):
            a = rng.choice((0.0, 0.5, 1.0, 1.5)) * np.pi + slot.heading + rng.normal(0, 0.1)
            # Beside the stand rather than on it, nearer to the nose than to the tail.
            side = rng.choice((-1, 1)) * slot.span * rng.uniform(0.3, 0.62)
            ahead = slot.span * rng.uniform(-0.5, 0.7)
            x, y = (ahead, side) @ rotation(slot.heading) + slot[:2]
            carts = slot.span > 25 and rng.random() < 0.3
            blocks += _carts(x, y, a, rng) if carts else [_box(x, y, a, rng, white)]
    for _ in range(rng.poisson(3)):
        x, y = np.array(view.centre) + rng.uniform(-380, 380, 2)
        blocks.append(_box(x, y, rng.uniform(0, 6.28), rng, white))
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
            centre = np.array(slot[:2]) + rng.normal(0, 0.6 * slot.span + 5, 2)
            shape = box(centre, length, width, rng.uniform(0, 6.28))
            pixels = np.concatenate((view.screen(shape), view.screen(shape, height)))
            low, high = pixels.min(0), pixels.max(0)
            if not view.sees(low, high, -6):
                continue
            name = f"BP_GroundSupport_{kind}_C_{rng.integers(100, 400)}StaticMesh"
            low, high = np.floor(low) - 2, np.ceil(high) + 3
            thing = Thing(("Airport", *categories), name, next(colours), low, high)
            named.append((Block(shape, 0, height, colour, 0), thing))
    return blocks, named


def _box(x: float, y: float, heading: float, rng: np.random.Generator, white: float) -> Block:
    """A truck, tug, container or white box."""
    sizes = ((6, 2.4), (9, 2.6), (3.5, 2), (12, 2.5), (2.4, 2), (4.5, 4))
    length, width = sizes[rng.integers(len(sizes))]
    grey = rng.uniform(45, 150 + 160 * white)
    colours = ((grey, grey, grey), (250, 252, 252), (40, 160, 215), (60, 60, 190), (160, 110, 50))
    colour = colours[rng.choice(5, p=(0.7 - white, white, 0.14, 0.06, 0.1))]
    return Block(box((x, y), length, width, heading), 0, rng.uniform(1.2, 3.2), colour, 51)


def _carts(x: float, y: float, heading: float, rng: np.random.Generator) -> list[Block]:
    """A train of baggage carts."""
    blue, green, red = rng.uniform(90, 210) + rng.normal(0, 18, 3)
    step = np.array((np.cos(heading), np.sin(heading))) * 3.6
    carts = [box((x, y) + step * k, 2.9, 1.7, heading) for k in range(int(rng.integers(2, 7)))]
    return [Block(cart, 0, 1.6, (blue, green, red), 52) for cart in carts]


def raise_masts(view: View, canvas: Canvas, things: list[Thing], rng: np.random.Generator) -> None:
    """Draw lamp posts; some are in front of an aircraft and cut it in two in the mask."""
    for _ in range(rng.poisson(3)):
        foot = rng.uniform((0, 0), (view.width, view.height))
        if things and rng.random() < 0.5:
            other = things[rng.integers(len(things))]
            foot = (other.low + other.high) / 2 + rng.normal(0, 12, 2)
        height = rng.uniform(14, 24) * view.ppm
        top = foot + view.lean * height
        pole = np.array((foot, top))
        stroke(canvas.image, pole, (52, 50, 48), 1, cv2.LINE_AA)
        stroke(canvas.mask, pole, MAST_LABEL, 1)
        angle = rng.uniform(0, 3.14)
        for row in (-1, 1):
            for k in range(4):
                offset = np.array(((k - 1.5) * 4, row * 2.2)) @ rotation(angle)
                lamp = box(top + offset, 2.6, 3.0, angle)
                cv2.fillConvexPoly(canvas.image, fixed(lamp), (46, 44, 44), cv2.LINE_AA, SHIFT)
                cv2.fillConvexPoly(canvas.mask, fixed(lamp), MAST_LABEL, cv2.LINE_8, SHIFT)


def measure(canvas: Canvas, things: list[Thing]) -> list[Thing]:
    """Set the extents; return the objects to list: vehicles with pixels, and all aircraft.

    The extent of an aircraft without pixels is a point.
    """
    listed, size = [], np.array(canvas.mask.shape[1::-1])
    for thing in things:
        inside, _ = overlap(thing.low, thing.high, size)
        points = np.argwhere((canvas.mask[inside] == thing.colour[::-1]).all(-1))[:, ::-1]
        if len(points):
            points += (inside[1].start, inside[0].start)
        elif thing.categories[0] == "Airplane":
            points = np.clip((thing.low + thing.high) / 2, 0, size - 1).astype(int)[None]
        else:
            continue
        thing.extent = (*points.min(0).tolist(), *points.max(0).tolist())
        listed.append(thing)
    return listed
