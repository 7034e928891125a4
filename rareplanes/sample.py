"""Renders scenes of invented airports in the format of RarePlanes' synthetic half.

    python rareplanes/sample.py -o sample_data -n 80 --seed 0
    python rareplanes/sample.py -o sample_data -n 16 --size 960 540 --workers 4
    python rareplanes/sample.py -o ground_data -n 80 --backgrounds my_scenes --gsd 0.5

Each scene is three files, as in the bucket: images/<stem>.png, masks/<stem>_mask.png and
xmls/<stem>.xml under train/ or test/. To continue an interrupted run, run it again.
"""

import json
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import numpy as np

from common.cli import Parser, UserError, number, processes, progress, run, seeds
from common.io.files import sweep, write_atomic
from common.io.look import add_look_options, look_from, options_of
from rareplanes.render import background
from rareplanes.render.background import GroundScene
from rareplanes.render.plan import airports
from rareplanes.render.scene import Scene, render
from rareplanes.scene import scene_files

RENDERER = 2  # to be increased whenever a scene's pixels or labels change
SETTINGS = "sample.json"


def schedule(
    count: int, seed: int, size: tuple[int, int], test_fraction: float, plain: bool = False
) -> list[Scene]:
    """Give scenes to the airports in turn; a fraction of each, at least one, are test scenes."""
    scenes = []
    table = [replace(airport, plain=plain) for airport in airports()]
    for i in range(count):
        turn, row = divmod(i, len(table))
        airport = table[row]
        total = -(-(count - row) // len(table))  # scenes of this airport
        tests = min(max(1, round(total * test_fraction)), total - 1) if test_fraction else 0
        if total == 1 and test_fraction:  # too few for a test scene each: the very last is one
            tests = int(i == count - 1 and count > 1)
        split = "test" if turn >= total - tests else "train"
        stem = f"{airport.name}_Airport_{turn // 4}_{turn % 4}_{i + 1}"
        scenes.append(Scene(i, seed, size, stem, airport, split))
    return scenes


def write(scene: Scene | GroundScene, folder: Path) -> None:
    """Render a scene and write its three files, unless they exist."""
    cv2.setNumThreads(0)
    image, mask, xml = scene_files(folder / scene.split, scene.stem)
    if not (image.exists() and mask.exists() and xml.exists()):
        if isinstance(scene, GroundScene):
            pixels, labels, description = background.render(scene)
        else:
            pixels, labels, description = render(scene)
        write_atomic(image, _png(pixels))
        write_atomic(mask, _png(labels))
        write_atomic(xml, description.encode())


def _png(image: np.ndarray) -> bytes:
    rgba = cv2.cvtColor(image, cv2.COLOR_BGR2BGRA)
    return cv2.imencode(".png", rgba, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()


def claim(folder: Path, settings: dict[str, object], splits: set[str]) -> None:
    """Create the folders of `splits`; refuse a folder with anything but scenes of this run."""
    record = folder / SETTINGS
    text = json.dumps(settings, indent=1) + "\n"
    if record.is_file():
        if record.read_text() != text:
            raise UserError(
                f"{str(folder)!r} holds scenes rendered with other settings ({str(record)!r}); "
                "give -o an empty folder, or continue with the same settings."
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise UserError(
            f"{str(folder)!r} is not empty and was not made by this script; give -o a new folder."
        )
    try:
        for split in splits:
            for part in ("images", "masks", "xmls"):
                (folder / split / part).mkdir(parents=True, exist_ok=True)
                sweep(folder / split / part)
        write_atomic(record, text.encode())
    except OSError as error:
        raise UserError(
            f"cannot write to {str(folder)!r}: {error.strerror}; give -o another folder."
        ) from error


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("-o", "--output-dir", type=Path, default=Path("sample_data"), help="folder to fill")
    add("-n", "--scenes", type=number(int, 1, 10**6), default=40, help="how many")
    add("--seed", type=seeds, default=0, help="of all scenes")
    side = number(int, 128, 8192)
    add("--size", type=side, nargs=2, default=(1920, 1080), metavar=("W", "H"), help="pixels")
    add("--test-fraction", type=number(float, 0, 0.99), default=0.2, help="share of test scenes")
    add("--plain", action="store_true", help="easy scenes: hardly anything but aircraft is bright")
    add("-j", "--workers", type=processes, default=1, help="processes")
    help_ = "images without aircraft to render aircraft on, instead of invented airports"
    add("--backgrounds", type=Path, metavar="FOLDER", help=help_)
    add_look_options(parser, gsd=False)
    help_ = "metres of ground per pixel of the images that are not georeferenced"
    add("--gsd", type=number(float, *background.METRES), metavar="METRES", help=help_)
    args = parser.parse(argv)
    size = tuple(args.size)
    settings = {"renderer": RENDERER, "seed": args.seed, "scenes": args.scenes, "size": size}
    settings |= {"test_fraction": args.test_fraction, "plain": args.plain}
    scenes: list[Scene] | list[GroundScene]
    if args.backgrounds is None:
        if given := options_of(args):
            raise UserError(f"--{min(given)} is about --backgrounds; give that, too.")
        scenes = schedule(args.scenes, args.seed, size, args.test_fraction, args.plain)
    elif args.plain:
        raise UserError("--plain is about invented airports; leave it or --backgrounds out.")
    else:
        look = replace(look_from(args), gsd=None)  # the scene's own resolution is used
        grounds = background.find_grounds(args.backgrounds, args.gsd, look)
        settings |= {"backgrounds": [ground.name for ground in grounds], **options_of(args)}
        scenes = background.schedule(grounds, args.scenes, args.seed, size, args.test_fraction)
    claim(args.output_dir, settings, {scene.split for scene in scenes})
    job = partial(write, folder=args.output_dir)
    bar = partial(progress, total=len(scenes), desc="render", unit="scene")
    if args.workers == 1:
        list(bar(map(job, scenes)))
    else:
        workers = min(args.workers, len(scenes))
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            try:
                list(bar(pool.map(job, scenes)))
            except BrokenProcessPool as error:
                raise UserError(
                    "a worker was killed, perhaps out of memory; finished scenes are kept: "
                    f"run again with fewer than --workers {args.workers}."
                ) from error
    print(f"{len(scenes)} scenes in {str(args.output_dir)!r}")


if __name__ == "__main__":
    run(main)
