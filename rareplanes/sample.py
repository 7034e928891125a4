"""Renders scenes of invented airports in the format of RarePlanes' synthetic half.

    python rareplanes/sample.py -o sample_data -n 80 --seed 0
    python rareplanes/sample.py -o sample_data -n 16 --size 960 540 --workers 4

Each scene is three files, as in the bucket: images/<stem>.png, masks/<stem>_mask.png and
xmls/<stem>.xml under train/ or test/. A run that was cut short goes on where it stopped.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape, quoteattr

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import numpy as np
from tqdm import tqdm

from rareplanes import scenery, traffic
from rareplanes.airport import AIRPORTS, Airport, plan
from rareplanes.errors import UserError, run
from rareplanes.traffic import Thing

RENDERER = 1  # grows whenever a scene's bytes change
SETTINGS = "sample.json"
BONES = ("Nose", "RightWing", "Tail", "LeftWing")


class Scene(NamedTuple):
    """One scene to render: all that its bytes depend on."""

    index: int
    seed: int
    size: tuple[int, int]
    stem: str
    airport: Airport
    split: str


class Picture(NamedTuple):
    image: np.ndarray  # [H,W,3] uint8 BGR
    mask: np.ndarray  # [H,W,3] uint8 BGR
    xml: str


def schedule(count: int, seed: int, size: tuple[int, int], test_fraction: float) -> list[Scene]:
    """Airports in turn; of each airport's scenes a fraction, at least one, are test scenes."""
    scenes = []
    for i in range(count):
        airport = AIRPORTS[i % len(AIRPORTS)]
        mine = -(-(count - i % len(AIRPORTS)) // len(AIRPORTS))
        held = min(max(1, round(mine * test_fraction)), mine - 1) if test_fraction else 0
        if mine == 1 and test_fraction:  # too few for every airport: the last scene is the test
            held = int(i == count - 1 and count > 1)
        turn = i // len(AIRPORTS)
        split = "test" if turn >= mine - held else "train"
        stem = f"{airport.name}_Airport_{turn // 4}_{turn % 4}_{i + 1}"
        scenes.append(Scene(i, seed, size, stem, airport, split))
    return scenes


def render(scene: Scene) -> Picture:
    """Draw one scene. Everything random comes from (seed, index)."""
    rng = np.random.default_rng((scene.seed, scene.index))
    ground = plan(scene.airport)
    view = _camera(scene, rng)
    weather = str(rng.choice(scene.airport.weather))
    labels = scenery.label_colours(scene.airport)
    palette = traffic.Palette(rng, {label[::-1] for label in labels} | {(46, 90, 30), (220, 230, 90)})

    canvas = scenery.lay_ground(view, scene.airport, ground, rng)
    blocks, named = traffic.park_vehicles(view, ground, palette, rng)
    scenery.plant_trees(view, canvas, ground, rng)
    scenery.raise_blocks(view, canvas, blocks, labels)
    for block, thing in named:
        scenery.raise_blocks(view, canvas, [block], [thing.colour[::-1]])
    scenery.raise_blocks(view, canvas, ground.blocks, labels, roof=True)

    area = view.width * view.height / (1920 * 1080)
    wanted = int(np.clip(rng.gamma(1.9, 6.0) * area**0.5, 1, 40))
    aircraft = traffic.park_aircraft(view, ground, canvas, wanted, palette, rng)
    if rng.random() < 0.04:
        aircraft.append(_unseen(view, aircraft, palette))
    traffic.shade_ground(canvas, aircraft)
    image = scenery.weather_ground(view, scene.airport, canvas, weather, rng)
    light = scenery.cast_light(view, canvas, image, rng)
    traffic.lay_aircraft(canvas, image, light, aircraft)
    canvas.image = np.clip(image, 0, 255).astype(np.uint8)
    bridges = [thing.bridge for thing in aircraft if thing.bridge is not None]
    scenery.raise_blocks(view, canvas, bridges, labels)
    traffic.masts(view, canvas, aircraft, rng)
    things = aircraft + [thing for _, thing in named]
    traffic.measure(canvas, things)
    things = [t for t in things if t.area or t.categories[0] == "Airplane"]
    image = scenery.develop(view, canvas.image, weather, rng)
    return Picture(image, canvas.mask, _xml(scene, view, weather, things, rng))


def _camera(scene: Scene, rng: np.random.Generator) -> scenery.View:
    ground = plan(scene.airport)
    small = rng.random() < 0.22  # the field above the runway, not the apron below it
    places = [slot[:2] for slot in ground.slots if abs(slot.x) < 1150 and (slot.y < 0) == small]
    x, y = np.array(places[rng.integers(len(places))]) + rng.normal(0, 60, 2)
    if rng.random() < 0.35:
        y *= rng.uniform(0.2, 0.9)
    tilt, towards = rng.uniform(0, 0.22), rng.uniform(0, 2 * np.pi)
    lean = tilt * np.array((np.cos(towards), np.sin(towards)))
    elevation, azimuth = np.radians(rng.uniform(30, 68)), rng.uniform(0, 2 * np.pi)
    flat = np.cos(elevation)
    sun = np.array((flat * np.cos(azimuth), flat * np.sin(azimuth), np.sin(elevation)))
    ppm, yaw = rng.uniform(2.3, 2.8), rng.uniform(0, 2 * np.pi)
    return scenery.View(*scene.size, ppm, (float(x), float(y)), yaw, lean, sun)


def _unseen(view: scenery.View, others: list[Thing], palette: traffic.Palette) -> Thing:
    """An aircraft just outside the picture: listed, with no pixel."""
    outside = np.array((view.width + 30.0, view.height * 0.4))
    like = others[0] if others else None
    categories = like.categories if like else ("Airplane", "Civil", "Sport", "Cessna", "172")
    name = f"SM_{'_'.join(categories)}_BPC_C_249StaticMeshComponent"
    sockets = outside + np.array(((0, -20), (20, 0), (0, 20), (-20, 0)))
    world = np.zeros((4, 3))
    return Thing(categories, name, palette.take(), outside, outside + 1, sockets, world)


def _xml(scene: Scene, view: scenery.View, weather: str, things: list[Thing], rng: np.random.Generator) -> str:  # noqa: E501
    """The scene's description, element for element as RarePlanes writes it."""
    pitch = -np.degrees(np.arctan2(1, np.hypot(*view.lean)))
    x, y = (100 * v for v in view.centre)
    altitude = 94000.0
    focal = altitude / 100 * view.ppm
    hour = 6 + np.degrees(np.arcsin(view.sun[2])) / 12
    field_of_view = 2 * np.degrees(np.arctan(view.width / 2 / focal))
    lines = [
        '<?xml version="1.0" encoding="UTF-8"?>',
        "<image>",
        '\t<annotation vendor="sample.py" />',
        f"\t<filename>{escape(scene.stem)}.png</filename>",
        f"\t<time_stamp>2020.06.21-{int(hour):02d}.{int(hour % 1 * 60):02d}.00</time_stamp>",
        f"\t<image_resolution>\n\t\t<width>{view.width}</width>\n\t\t<height>{view.height}</height>\n\t</image_resolution>",  # noqa: E501
        f"\t<camera>\n\t\t<location>\n\t\t\t<x>{x:.6f}</x>\n\t\t\t<y>{y:.6f}</y>\n\t\t\t<z>{altitude}</z>\n\t\t</location>",  # noqa: E501
        f"\t\t<rotation>\n\t\t\t<pitch>{pitch:.6f}</pitch>\n\t\t\t<roll>0.0</roll>\n\t\t\t<yaw>{np.degrees(view.yaw):.6f}</yaw>\n\t\t</rotation>",  # noqa: E501
        f"\t\t<intrinsics>\n\t\t\t<f_x>{focal:.6f}</f_x>\n\t\t\t<f_y>{focal:.6f}</f_y>\n\t\t\t<x_0>{view.width / 2}</x_0>\n\t\t\t<y_0>{view.height / 2}</y_0>\n\t\t\t<s>0.0</s>\n\t\t</intrinsics>",  # noqa: E501
        f"\t\t<focal_length>{focal:.1f}</focal_length>\n\t\t<focus_distance>100000.0</focus_distance>\n\t\t<horizontal_field_of_view>{field_of_view:.6f}</horizontal_field_of_view>\n\t</camera>",  # noqa: E501
        f"\t<platform>\n\t\t<center_elevation_angle>{-pitch:.6f}</center_elevation_angle>\n\t\t<altitude>{altitude}</altitude>\n\t</platform>",  # noqa: E501
        f"\t<num_object_mask_objects>{len(things)}</num_object_mask_objects>",
    ]
    for thing in things:
        lines += _object(thing, rng)
    lines.append(f"\t<num_box2D_objects>{len(things)}</num_box2D_objects>")
    lines.append("\t<num_posed_objects>0</num_posed_objects>\n\t<JSON_Variation_Parameters>")
    parameters = {
        "Time of Day": int(hour),
        "GroundSampleDistance": round(100 / view.ppm),
        "OffNadirAngle": round(90 + pitch),
        "CurrentWeather": weather,
        "Primary Biome": scene.airport.biome,
        "bBox2D": True,
        "bObjectMask": True,
    }
    for key, value in parameters.items():
        lines.append(f"\t\t<parameter name={quoteattr(key)} value={quoteattr(str(value))} />")
    lines.append("\t</JSON_Variation_Parameters>\n</image>\n")
    return "\n".join(lines)


def _object(thing: Thing, rng: np.random.Generator) -> list[str]:
    number = rng.bytes(16).hex().upper()
    lines = [f"\t<object id={quoteattr(number)} persistent_id={quoteattr(thing.name)}>"]
    for i, category in enumerate(thing.categories):
        lines.append(f"\t\t<category{i}>{escape(category)}</category{i}>")
    colour = ",".join(map(str, (*thing.colour, 255)))
    lines.append(f"\t\t<object_mask_color_rgba>{colour}</object_mask_color_rgba>")
    if thing.sockets is not None and thing.world is not None:
        lines.append("\t\t<Sockets>")
        for bone, (x, y, z), (u, v) in zip(BONES, thing.world * 100, thing.sockets, strict=True):
            tag = f"Bone_PlaneAnnotation_{bone}"
            lines.append(f"\t\t\t<{tag}>\n\t\t\t\t<world>X={x:.3f} Y={y:.3f} Z={z:.3f}</world>")
            lines.append(f"\t\t\t\t<screen>X={u:.3f} Y={v:.3f}</screen>\n\t\t\t</{tag}>")
        lines.append("\t\t</Sockets>")
    lines.append("\t\t<bndbox2D>")
    for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), thing.extent, strict=True):
        lines.append(f"\t\t\t<{tag}>{value}</{tag}>")
    blur = rng.normal(0, 0.03)
    lines.append("\t\t\t<ratio_visible>0.0</ratio_visible>")
    lines.append(f"\t\t\t<focus_blur>{blur:.6f}</focus_blur>\n\t\t</bndbox2D>\n\t</object>")
    return lines


def write(scene: Scene, folder: Path) -> str:
    """Render a scene and write its files; the XML comes last and says that it is complete."""
    cv2.setNumThreads(0)
    target = folder / scene.split
    xml = target / "xmls" / f"{scene.stem}.xml"
    if not xml.exists():
        picture = render(scene)
        _save(target / "images" / f"{scene.stem}.png", _png(picture.image))
        _save(target / "masks" / f"{scene.stem}_mask.png", _png(picture.mask))
        _save(xml, picture.xml.encode())
    return scene.stem


def _png(image: np.ndarray) -> bytes:
    rgba = cv2.cvtColor(image, cv2.COLOR_BGR2BGRA)
    return cv2.imencode(".png", rgba, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()


def _save(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def claim(folder: Path, settings: dict[str, object]) -> None:
    """Make the folder ours, or refuse one that holds anything else than a part of this run."""
    record = folder / SETTINGS
    text = json.dumps(settings, indent=1) + "\n"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"The output {str(folder)!r} is a file; give -o a folder.")
    if record.is_file():
        if record.read_text() != text:
            raise UserError(
                f"{str(folder)!r} holds scenes of other settings ({str(record)!r}); "
                "give -o an empty folder or run with the same settings to go on."
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{str(folder)!r} is not empty and not from this script; give -o a new folder.")
    for split in ("train", "test"):
        for part in ("images", "masks", "xmls"):
            (folder / split / part).mkdir(parents=True, exist_ok=True)
    _save(record, text.encode())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output-dir", type=Path, default=Path("sample_data"), help="%(default)s")
    parser.add_argument("-n", "--scenes", type=int, default=40, help="how many (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="%(default)s")
    parser.add_argument("--size", type=int, nargs=2, default=(1920, 1080), metavar=("W", "H"),
                        help="pixels; smaller scenes show less ground (1920 1080)")  # fmt: skip
    parser.add_argument("--test-fraction", type=float, default=0.2, help="%(default)s")
    parser.add_argument("-j", "--workers", type=int, default=1, help="processes (%(default)s)")
    args = parser.parse_args(argv)
    checks = {
        f"--scenes {args.scenes} must be at least 1.": args.scenes >= 1,
        f"--seed {args.seed} must not be negative.": args.seed >= 0,
        f"--size {args.size[0]} {args.size[1]} must be from 128 to 8192.": all(
            128 <= v <= 8192 for v in args.size
        ),
        f"--test-fraction {args.test_fraction} must be from 0 to below 1.": 0 <= args.test_fraction < 1,
        f"--workers {args.workers} must be at least 1.": args.workers >= 1,
    }
    for sentence, fine in checks.items():
        if not fine:
            raise UserError(sentence)
    size = (args.size[0], args.size[1])
    settings = {"renderer": RENDERER, "seed": args.seed, "scenes": args.scenes, "size": size}
    claim(args.output_dir, {**settings, "test_fraction": args.test_fraction})
    scenes = schedule(args.scenes, args.seed, size, args.test_fraction)
    job = partial(write, folder=args.output_dir)
    quiet = not sys.stderr.isatty()
    if args.workers == 1:
        for _ in tqdm(map(job, scenes), total=len(scenes), unit="scene", disable=quiet):
            pass
    else:
        with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
            for _ in tqdm(pool.map(job, scenes), total=len(scenes), unit="scene", disable=quiet):
                pass
    print(f"{len(scenes)} scenes in {str(args.output_dir)!r}")


if __name__ == "__main__":
    run(main)
