"""Renders one scene: its image, its mask, and the part of RarePlanes' XML that is read."""

import xml.etree.ElementTree as ET
from typing import Any, NamedTuple

import numpy as np

from rareplanes.render import scenery, traffic, weather
from rareplanes.render.airport import plan
from rareplanes.render.plan import Airport, Pair, Plan
from rareplanes.render.traffic import Thing, free_colours
from rareplanes.render.view import View

BONES = ("Nose", "RightWing", "Tail", "LeftWing")


class Scene(NamedTuple):
    """One scene to render; its bytes depend on nothing else."""

    number: int
    seed: int
    size: tuple[int, int]
    stem: str
    airport: Airport
    split: str


def render(scene: Scene) -> tuple[np.ndarray, np.ndarray, str]:
    """Draw one scene; everything random is derived from (seed, number).

    Returns:
        Image and mask as [H,W,3] uint8 BGR, and the XML.
    """
    rng = np.random.default_rng((scene.seed, scene.number))
    ground = plan(scene.airport, rng)
    view = _camera(scene.size, ground, rng)
    sky = str(rng.choice(scene.airport.weather))
    labels = scenery.label_colours(scene.airport)
    flat_colours = [*labels, scenery.TREE_LABEL, scenery.MAST_LABEL]
    colours = free_colours(rng, {label[::-1] for label in flat_colours})

    tones = scenery.draw_tones(scene.airport, rng)
    canvas = scenery.lay_ground(view, ground, rng)
    blocks, named = traffic.park_vehicles(view, ground, colours, rng)
    scenery.plant_trees(view, canvas, ground, rng)
    scenery.raise_blocks(view, canvas, blocks, labels)
    for block, thing in named:
        scenery.raise_blocks(view, canvas, [block], [thing.colour[::-1]])
    blocks = ground.blocks + traffic.idle_bridges(view, ground, rng)
    scenery.raise_blocks(view, canvas, scenery.repaint(blocks, tones), labels, roof=True)

    aircraft = traffic.park_aircraft(view, ground, canvas, colours, rng)
    if rng.random() < 0.04:
        aircraft.append(traffic.unseen_aircraft(view, aircraft, next(colours)))
    building_shadow = canvas.shadow.copy()
    traffic.shade_ground(canvas, aircraft)
    image = weather.weather_ground(view, scene.airport, canvas, sky, rng)
    light = weather.cast_light(canvas, image, building_shadow, rng)
    traffic.lay_aircraft(canvas, image, light, aircraft)
    canvas.image = np.clip(image, 0, 255).astype(np.uint8)
    bridges = [thing.bridge for thing in aircraft if thing.bridge is not None]
    scenery.raise_blocks(view, canvas, scenery.repaint(bridges, tones), labels)
    traffic.raise_masts(view, canvas, aircraft, rng)
    things = traffic.measure(canvas, aircraft + [thing for _, thing in named])
    image = weather.develop(view, canvas.image, sky, rng, scene.airport.plain)
    return image, canvas.mask, describe(scene.stem, scene.size, things)


def _camera(size: tuple[int, int], ground: Plan, rng: np.random.Generator) -> View:
    small = rng.random() < 0.22  # the field above the runway, not the apron below it
    targets = [slot[:2] for slot in ground.slots if abs(slot.x) < 1150 and (slot.y < 0) == small]
    x, y = np.array(targets[rng.integers(len(targets))]) + rng.normal(0, 60, 2)
    if rng.random() < 0.35:
        y *= rng.uniform(0.2, 0.9)
    return camera(size, (float(x), float(y)), rng)


def camera(size: tuple[int, int], centre: Pair, rng: np.random.Generator) -> View:
    """A satellite over `centre`, at any heading and time of day."""
    tilt, towards = rng.uniform(0, 0.22), rng.uniform(0, 2 * np.pi)
    lean = tilt * np.array((np.cos(towards), np.sin(towards)))
    elevation, azimuth = np.radians(rng.uniform(30, 68)), rng.uniform(0, 2 * np.pi)
    flat = np.cos(elevation)
    sun = np.array((flat * np.cos(azimuth), flat * np.sin(azimuth), np.sin(elevation)))
    ppm, yaw = rng.uniform(2.3, 2.8), rng.uniform(0, 2 * np.pi)
    return View(*size, ppm, centre, yaw, lean, sun)


def describe(stem: str, size: tuple[int, int], things: list[Thing]) -> str:
    """The scene's XML: of RarePlanes' elements those that `rareplanes/scene.py` reads."""
    root = ET.Element("image")
    resolution = dict(zip(("width", "height"), size, strict=True))
    _grow(root, {"filename": f"{stem}.png", "image_resolution": resolution})
    for thing in things:
        _grow(ET.SubElement(root, "object", persistent_id=thing.name), _object(thing))
    ET.indent(root, "\t")
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, "unicode") + "\n"


def _object(thing: Thing) -> dict[str, Any]:
    tree: dict[str, Any] = {f"category{i}": text for i, text in enumerate(thing.categories)}
    tree["object_mask_color_rgba"] = ",".join(map(str, (*thing.colour, 255)))
    if thing.sockets is not None:
        tree["Sockets"] = {
            f"Bone_PlaneAnnotation_{bone}": {"screen": f"X={x:.3f} Y={y:.3f}"}
            for bone, (x, y) in zip(BONES, thing.sockets, strict=True)
        }
    tree["bndbox2D"] = dict(zip(("xmin", "ymin", "xmax", "ymax"), thing.extent, strict=True))
    return tree


def _grow(parent: ET.Element, tree: dict[str, Any]) -> None:
    """Append nested dicts as elements."""
    for tag, value in tree.items():
        child = ET.SubElement(parent, tag)
        if isinstance(value, dict):
            _grow(child, value)
        else:
            child.text = str(value)
