"""Cut any COCO instance dataset into the same tiles as RarePlanes, ready for every train.py.

    python preprocessing/coco.py images/ instances.json -o data/mine --split split.json
    python preprocessing/coco.py train/ train.json -o data/mine --as train
    python preprocessing/coco.py valid/ valid.json -o data/mine --as val

The split file names the images of each split: `{"train": ["a.jpg", ...], "val": [...]}`. Without
it all images become one split, `train/` by default. Where objects overlap, the smaller one is on
top.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import Parser, UserError, run
from common.io.look import add_look_options, look_from
from preprocessing.coco_images import Reading, read_dataset
from preprocessing.own_data import Destination, add_own_data_options


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse(argv)
    if not args.images.is_dir():
        raise UserError(
            f"there is no folder of images {str(args.images)!r}; give the folder that the file "
            "names are relative to."
        )
    to = Destination(args, args.images, args.annotations)
    reading = Reading(not args.no_crowds, replace(look_from(args), upright=not args.ignore_exif))
    images, classes, left_out = read_dataset(args.annotations, args.images, reading, to.number)
    files = [file for image in images.values() for file in image.files()]
    if files and not any(file.exists() for file in files):
        deeper = [file.parent for file in args.images.rglob("*") if file.name == files[0].name]
        raise UserError(
            f"none of the {len(files)} images of {str(args.annotations)!r} is in "
            f"{str(args.images)!r}; give the folder that the file names are relative to"
            f"{f', perhaps {str(deeper[0])!r}' if deeper else ''}."
        )
    splits = {
        split: [images[name] for name in names]
        for split, names in to.divide(images, args.annotations).items()
    }
    return to.tile(splits, classes, left_out)


def _parser() -> Parser:
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("images", type=Path, help="folder that the file names are relative to")
    add("annotations", type=Path, help="COCO instance file (polygons or run lengths)")
    help = "treat an outline with iscrowd 1 as one object (CVAT's brush writes such), not as a "
    add("--no-crowds", action="store_true", help=help + "region to ignore")
    help = "the outlines were drawn on the pixels as stored, not as viewers show them"
    add("--ignore-exif", action="store_true", help=help)
    add_own_data_options(parser, "images")
    add_look_options(parser, gsd=False)
    return parser


if __name__ == "__main__":
    run(main)
