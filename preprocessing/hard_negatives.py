"""Cut what a model wrongly found in scenes without aircraft into tiles, to go on training with.

    python unet/inference.py runs/a/model_best.pth empty_scenes/ found/
    python preprocessing/hard_negatives.py found/predictions.json empty_scenes/ -o data/hard
    python unet/train.py --data-path data --extra-data data/hard --output-dir runs/b \
        --init-from runs/a/model_best.pth

The scenes must show no aircraft: everything in the tiles counts as ground.
"""

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import Parser, UserError, run
from common.io.files import read_json
from common.io.folders import rasters_in
from common.io.look import Look, add_look_options, look_from
from common.io.raster import open_scene
from preprocessing.geojson import Block
from preprocessing.own_data import Destination, add_own_data_options, scene_names
from preprocessing.tiles import ALL

Box = tuple[float, float, float, float]  # x, y, width, height in pixels


class Found(NamedTuple):
    """What was found in a scene, as it was read: its size, and the boxes, largest area first."""

    width: int
    height: int
    boxes: list[Box]


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("predictions", type=Path, help="predictions.json, which inference.py wrote")
    add("scenes", type=Path, help="the folder of scenes that was predicted, or the only scene")
    add_own_data_options(parser, "scenes")
    add_look_options(parser)
    parser.set_defaults(negatives=ALL)
    args = parser.parse(argv)
    look = look_from(args)
    to = Destination(args, args.scenes, args.predictions)
    names, found = read_predictions(args.predictions)
    classes = to.number(names, names)
    paths = {path.name: path for path in rasters_in(args.scenes)}
    if missing := sorted(set(found) - set(paths)):
        raise UserError(
            f"{str(args.predictions)!r} has predictions of {missing[0]!r}, which is not in "
            f"{str(args.scenes)!r}; name the folder that inference.py read."
        )
    wrong = {name: scene for name, scene in found.items() if scene.boxes}
    if not wrong:
        print(f"nothing was found in {len(found)} scenes, so there is nothing to learn from")
        return 0
    stems = scene_names({name: PurePath(name) for name in wrong})
    splits = {}
    for split, chosen in to.divide(wrong, args.predictions).items():
        splits[split] = [
            Block(paths[name], args.predictions, None, f"{stems[name]}_y{y}_x{x}", stems[name],
                  (x, y, width, height), exact, classes.of)
            for name in chosen
            for exact in [exact_look(paths[name], look, wrong[name])]
            for x, y, width, height in windows(wrong[name], args.tile_size)
        ]  # fmt: skip
    return to.tile(splits, classes, Counter())


def read_predictions(path: Path) -> tuple[list[str], dict[str, Found]]:
    """The classes without the ground, and what was found in each scene, by its file name.

    Raises:
        UserError: It is no `predictions.json`.
    """
    content = read_json(path)
    try:
        if "annotations" in content:  # Mask R-CNN's
            of_image: dict[Any, list[dict]] = {image["id"]: [] for image in content["images"]}
            for annotation in content["annotations"]:
                of_image[annotation["image_id"]].append(annotation)
            scenes = [(i["file_name"], i, of_image[i["id"]]) for i in content["images"]]
            names = [category["name"] for category in content["categories"]]
        else:
            scenes = [(i["image"], i, i["regions"]) for i in content["images"]]
            names = content["classes"][1:]
        found = {}
        for name, image, regions in scenes:
            ordered = sorted(regions, key=lambda region: -region["area"])
            boxes: list[Box] = [(*map(float, region["bbox"]),) for region in ordered]  # type: ignore[misc]
            found[str(name)] = Found(int(image["width"]), int(image["height"]), boxes)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{str(path)!r} is not a predictions.json of an inference.py ({error!r:.80})."
        ) from None
    return names, found


def exact_look(path: Path, look: Look, found: Found) -> Look:
    """`look` with the bands and limits of the whole scene, so that no tile needs all of it.

    Raises:
        UserError: The scene cannot be read, or was read with another ground resolution.
    """
    with open_scene(path, look) as scene:
        if (scene.width, scene.height) != (found.width, found.height):
            raise UserError(
                f"{str(path)!r} was predicted as {found.width}x{found.height} pixels and is read "
                f"as {scene.width}x{scene.height}; give the options that inference.py had, --gsd "
                "among them."
            )
        limits = None if scene.limits is None else scene.limits.tolist()
        return replace(look, bands=scene.bands, stretch=None, limits=limits)


def windows(found: Found, tile: int) -> list[tuple[int, int, int, int]]:
    """x, y, width and height of tiles around what was found, as few as show the middle of each."""
    width, height = min(tile, found.width), min(tile, found.height)
    chosen: list[tuple[int, int, int, int]] = []
    for x, y, w, h in found.boxes:
        middle_x, middle_y = x + w / 2, y + h / 2
        if not any(
            0 <= middle_x - x0 < width and 0 <= middle_y - y0 < height for x0, y0, *_ in chosen
        ):
            left = min(max(round(middle_x - width / 2), 0), found.width - width)
            top = min(max(round(middle_y - height / 2), 0), found.height - height)
            chosen.append((left, top, width, height))
    return chosen


if __name__ == "__main__":
    run(main)
