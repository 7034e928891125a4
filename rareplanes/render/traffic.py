"""Parks aircraft on stands, taxiways and runway, and draws them into image and mask."""

import cv2
import numpy as np

from rareplanes.render import aircraft
from rareplanes.render.aircraft import SHIFT, Drawing
from rareplanes.render.makes import Make, livery, makes
from rareplanes.render.plan import Block, Material, Plan, box
from rareplanes.render.scenery import along
from rareplanes.render.things import Palette, Thing, overlap
from rareplanes.render.view import Canvas, View, fixed

SPANS = (25.0, 170.0)  # wing spans that are drawn, pixels


def park_aircraft(
    view: View, plan: Plan, canvas: Canvas, wanted: int, palette: Palette, rng: np.random.Generator
) -> list[Thing]:
    """Up to `wanted` aircraft on stands, taxiways and runway; none touches another or a roof."""
    size = np.array((view.width, view.height))
    occupied = np.zeros((view.height, view.width), np.uint8)
    things: list[Thing] = []
    pavement = (Material.RUNWAY, Material.TAXIWAY, Material.APRON, Material.SLABS)
    paved = np.isin(canvas.material, pavement)
    for x, y, heading, room, bridge in _candidates(view, plan, rng):
        if len(things) == wanted:
            break
        fitting = [m for m in makes() if _fits(m, room, view.ppm)]
        if not fitting:
            continue
        make = _choose(fitting, room, rng)
        position = view.screen(np.array(((x, y),)))[0]
        mesh = aircraft.build(make, livery(make, rng))
        turn = heading + view.yaw
        gloss = float(rng.uniform(10, 110))
        drawing = aircraft.draw(mesh, turn, position, view.ppm, view.lean, view.sun, gloss)
        low = np.array((drawing.x, drawing.y))
        high = low + drawing.alpha.shape[::-1]
        inside, patch = overlap(low, high, size)
        alpha = drawing.alpha[patch]
        if alpha.size == 0 or not (alpha > 0.5).any():
            continue
        pixel = tuple(np.clip(position, 0, size - 1).astype(int)[::-1])
        if not paved[pixel] and rng.random() < 0.97:
            continue
        hidden = (canvas.material[inside] == Material.ROOF) & (alpha > 0.5)
        if (occupied[inside] & (alpha > 0.02)).any() or hidden.mean() > 0.1 * (alpha > 0.5).mean():
            continue
        _occupy(occupied, drawing)
        thing = Thing(
            _categories(make), _persistent(make, rng), palette.take(), low, high, drawing.sockets
        )
        thing.drawing = drawing
        if bridge is not None and "M" not in make.traits and rng.random() < 0.8:
            door = np.array((make.length * 0.36, -make.radius * rng.uniform(0.1, 1.1)))
            c, s = np.cos(heading), np.sin(heading)
            end = door @ np.array(((c, s), (-s, c))) + (x, y)
            thing.bridge = _bridge(np.array(bridge), end)
        things.append(thing)
    return things


def _occupy(occupied: np.ndarray, drawing: Drawing, gap: int = 6) -> None:
    """Mark the aircraft's pixels and a gap around them."""
    wide = cv2.copyMakeBorder(drawing.alpha, gap, gap, gap, gap, cv2.BORDER_CONSTANT)
    near = cv2.dilate(wide, np.ones((2 * gap + 1, 2 * gap + 1), np.uint8)) > 0.02
    low = np.array((drawing.x, drawing.y)) - gap
    inside, patch = overlap(low, low + near.shape[::-1], np.array(occupied.shape[::-1]))
    occupied[inside] |= near[patch]


def _candidates(
    view: View, plan: Plan, rng: np.random.Generator
) -> list[tuple[float, float, float, float, tuple[float, float] | None]]:
    """Candidates in random order: x, y, heading, room for wings in metres, foot of a bridge."""
    candidates = []
    for x, y, heading, span, bridge in plan.slots:
        backwards = rng.random() < 0.08
        turned = heading + rng.normal(0, 0.03) + np.pi * backwards
        spot = (x + rng.normal(0, 1), y + rng.normal(0, 1), turned, span)
        candidates.append((*spot, None if backwards else bridge))
    for route in plan.routes:
        flow = rng.choice((0.0, np.pi))
        for x, y, heading in along(route, 24.0):
            if rng.random() < 0.25:
                room = 18.0 if y < -40 else 62.0
                candidates.append((x, y, heading + flow + rng.normal(0, 0.04), room, None))
    for _ in range(6):  # anywhere
        x, y = np.array(view.centre) + rng.uniform(-330, 330, 2)
        candidates.append((x, y, rng.uniform(0, 6.28), 62.0 if y > -60 else 20.0, None))
    pixels = view.screen(np.array([candidate[:2] for candidate in candidates]))
    edge = 60
    seen = ((pixels > -edge) & (pixels < (view.width + edge, view.height + edge))).all(1)
    kept = [candidates[i] for i in np.flatnonzero(seen)]
    return [kept[i] for i in rng.permutation(len(kept))]


def _fits(make: Make, room: float, ppm: float) -> bool:
    return make.span <= room and SPANS[0] < make.span * ppm < SPANS[1] - 1


def _choose(fitting: list[Make], room: float, rng: np.random.Generator) -> Make:
    """Prefer aircraft of about the stand's size; military ones are rare."""
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
