"""Cut any COCO instance dataset into the same tiles as RarePlanes, ready for every train.py.

    python preprocessing/coco.py images/ instances.json -o data/mine --split split.json
    python preprocessing/coco.py train/ train.json -o data/mine --as train
    python preprocessing/coco.py valid/ valid.json -o data/mine --as val

The split file names the images of each split: `{"train": ["a.jpg", ...], "val": [...]}`. Without
it all images become one split, `train/` by default. Where objects overlap, the smaller one is on
top.
"""

import argparse
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import Parser, UserError, run
from common.io.files import read_json
from preprocessing.coco_file import read_coco
from preprocessing.coco_images import CocoImage, Reading, read_dataset
from preprocessing.splits import LeftOut, add_tiling_options, tile_splits
from preprocessing.tiles import OTHER_DATASET

SPLIT_NAME = re.compile(r"\w[\w-]*")


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse(argv)
    if not args.images.is_dir():
        raise UserError(
            f"there is no folder of images {str(args.images)!r}; give the folder that the file "
            "names are relative to."
        )
    if args.split and args.split_name:
        raise UserError("--split names the splits already; leave out --as.")
    wanted: Mapping[str, list[str] | None] = (
        read_split(args.split) if args.split else {args.split_name or "train": None}
    )
    indices = sorted(args.output_dir.glob("*/instances_tiled.json"))
    others = {p.parent: read_coco(p) for p in indices if p.parent.name not in wanted}
    classes = [[c["name"] for c in coco["categories"]] for coco in others.values()]
    reading = Reading(dict(args.rename or ()), not args.no_crowds, args.ignore_exif)
    images, categories, objects_left_out = read_dataset(
        args.annotations, args.images, reading, classes[0] if classes else None
    )
    splits = {
        name: list(images.values()) if files is None else chosen(files, images, args.split)
        for name, files in wanted.items()
    }
    if left := len(images) - sum(map(len, splits.values())):
        print(f"{left} images are in no split and are skipped")
    source = [os.path.relpath(path, args.output_dir) for path in (args.images, args.annotations)]
    refuse_shared(others, splits, source)
    return tile_splits(
        {args.output_dir / name: scenes for name, scenes in splits.items()},
        categories,
        args,
        OTHER_DATASET,
        source=source,
        left_out=LeftOut(Counter({"in no split": left}), objects_left_out),
    )


def read_split(path: Path) -> dict[str, list[str]]:
    """The file names of each split; keys without a list of names count as notes and are skipped.

    Raises:
        UserError: a name is in two splits, or there is no split.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{str(path)!r} is not a JSON object.")
    split: dict[str, list[str]] = {
        key: names
        for key, names in content.items()
        if isinstance(names, list) and names and all(isinstance(name, str) for name in names)
    }
    if not split:
        raise UserError(f"{str(path)!r} has no split such as {{'train': ['a.jpg']}}.")
    owner: dict[str, str] = {}
    for key, names in split.items():
        if not SPLIT_NAME.fullmatch(key):
            raise UserError(
                f"{str(path)!r}: a split cannot be called {key!r}; use letters, digits, _ and -."
            )
        for name in names:
            if name in owner:
                raise UserError(
                    f"{str(path)!r} names {name!r} twice, in {owner[name]!r} and in {key!r}."
                )
            owner[name] = key
    return split


def chosen(names: list[str], images: dict[str, CocoImage], path: Path) -> list[CocoImage]:
    """The images of a split.

    Raises:
        UserError: the file `path` names an unknown one.
    """
    if unknown := [name for name in names if name not in images]:
        raise UserError(f"{str(path)!r}: {unknown[0]!r} is not in the annotations.")
    return [images[name] for name in names]


def refuse_shared(
    others: dict[Path, dict[str, Any]], splits: dict[str, list[CocoImage]], source: list[str]
) -> None:
    """Refuse images that an earlier run has put into another split: scores on them would be wrong.

    Args:
        others: The folders of the splits that are not written now, and their COCO files.
        splits: The images of those that are.
        source: The folder of the images and the annotations, relative to the output.

    Raises:
        UserError: There is such an image.
    """
    stems = {image.stem for images in splits.values() for image in images}
    for folder, coco in others.items():
        before = coco.get("info", {}).get("source", source)
        shared = stems & {image.get("scene") for image in coco["images"]}
        if shared and before[0] == source[0]:
            raise UserError(
                f"{str(folder)!r} holds tiles of an earlier run from the same images, such as "
                f"{min(shared)!r}; remove that folder, or choose another --output-dir."
            )


def _parser() -> Parser:
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("images", type=Path, help="folder that the file names are relative to")
    add("annotations", type=Path, help="COCO instance file (polygons or run lengths)")
    add("-o", "--output-dir", type=Path, required=True, help="where the splits are written")
    add("--split", type=Path, help="JSON file that names the images of each split")
    add(
        "--as",
        dest="split_name",
        type=_split_name,
        metavar="SPLIT",
        help="make one split of the whole file: train (the default), val or test",
    )
    add(
        "--rename",
        action="extend",
        nargs="+",
        type=_renamed,
        metavar="OLD=NEW",
        help="rename categories; those of the same name become one class",
    )
    add(
        "--no-crowds",
        action="store_true",
        help="treat an outline with iscrowd 1 as one object (CVAT's brush writes such), not as a "
        "region to ignore",
    )
    add(
        "--ignore-exif",
        action="store_true",
        help="the outlines were drawn on the pixels as stored, not as viewers show them",
    )
    add_tiling_options(parser)
    return parser


def _renamed(text: str) -> tuple[str, str]:
    old, _, new = text.rpartition("=")
    if not old or not 0 < len(new) <= 100 or not new.isprintable():
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form airplane=aircraft")
    return old, new


def _split_name(text: str) -> str:
    if not SPLIT_NAME.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not made of letters, digits, _ and -")
    return text


if __name__ == "__main__":
    run(main)
