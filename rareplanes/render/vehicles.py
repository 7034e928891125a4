"""Cars, trucks, carts, boxes and light masts."""

import cv2
import numpy as np

from rareplanes.render.aircraft import SHIFT
from rareplanes.render.plan import Block, Plan, box
from rareplanes.render.scenery import MAST_LABEL
from rareplanes.render.things import Palette, Thing
from rareplanes.render.view import Canvas, View, fixed

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


def park_vehicles(
    view: View, plan: Plan, palette: Palette, rng: np.random.Generator
) -> tuple[list[Block], list[tuple[Block, Thing]]]:
    """Unnamed cars, carts, containers and boxes, and a few vehicles that the XML lists."""
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
            centre = np.array(slot[:2]) + rng.normal(0, 0.6 * slot.span + 5, 2)
            shape = box(centre, length, width, rng.uniform(0, 6.28))
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
    grey = rng.uniform(45, 150)
    colours = ((grey, grey, grey), (240, 242, 242), (40, 150, 200), (60, 60, 190), (160, 110, 50))
    colour = colours[rng.choice(5, p=(0.62, 0.08, 0.12, 0.08, 0.1))]
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
        cv2.polylines(canvas.image, [fixed(pole)], False, (52, 50, 48), 1, cv2.LINE_AA, SHIFT)
        cv2.polylines(canvas.mask, [fixed(pole)], False, MAST_LABEL, 1, cv2.LINE_8, SHIFT)
        angle = rng.uniform(0, 3.14)
        for row in (-1, 1):
            for k in range(4):
                along_row = np.array((np.cos(angle), np.sin(angle))) * (k - 1.5) * 4
                across = np.array((-np.sin(angle), np.cos(angle))) * row * 2.2
                lamp = box(top + along_row + across, 2.6, 3.0, angle)
                cv2.fillConvexPoly(canvas.image, fixed(lamp), (46, 44, 44), cv2.LINE_AA, SHIFT)
                cv2.fillConvexPoly(canvas.mask, fixed(lamp), MAST_LABEL, cv2.LINE_8, SHIFT)
