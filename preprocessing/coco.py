"""Cut any COCO instance dataset into the same tiles as RarePlanes, ready for every train.py.

    python preprocessing/coco.py images/ instances.json -o data/mine --split split.json
    python preprocessing/coco.py images/ instances.json -o data/mine -s 256

The split file names the images of each split: `{"train": ["a.jpg", ...], "val": [...]}`. Without
it everything becomes `train/`. Where objects overlap, the smaller one is on top.
"""

import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import numpy as np
from pycocotools import mask as rle

from common.cli import Parser, UserError, run
from common.io.coco import read_coco, read_json
from common.io.images import image_size, read_image
from common.io.outlines import run_lengths
from preprocessing.options import add_tiling_options, settings_from
from preprocessing.splits import tile_splits
from preprocessing.tiles import Labels, Thing

MAX_OBJECTS = (1 << 16) - 2
MAX_STEM = 200  # bytes: leaves room for `_tile_999_mask.png` and the ending of a temporary file


@dataclass(frozen=True, slots=True)
class CocoImage:
    """An image of a COCO dataset, as the tiling sees it."""

    path: Path
    stem: str
    size: tuple[int, int]
    annotations: list[dict[str, Any]]
    categories: dict[int, tuple[int, str]]
    """Category id in the file → our number, from 1, and its name."""

    @property
    def airport(self) -> str:
        """COCO has no airports, so each image counts as its own."""
        return self.stem

    def files(self) -> list[Path]:
        return [self.path]

    def labels(self) -> Labels:
        """Paint the outlines: crowds first, then large objects before small ones."""
        if (actual := image_size(self.path)) != self.size:
            raise UserError(
                f"image {str(self.path)!r} has {actual[0]}x{actual[1]} pixels, but the annotations "
                f"state {self.size[0]}x{self.size[1]}."
            )
        runs = [run_lengths(item, self.size) for item in self.annotations]
        crowd = [bool(item.get("iscrowd", 0)) for item in self.annotations]
        area = [int(rle.area(r)) for r in runs]  # int, as minus an unsigned 32-bit number wraps
        ids = np.zeros(self.size[::-1], np.uint8 if len(runs) < 256 else np.uint16)
        for i in sorted(range(len(runs)), key=lambda i: (not crowd[i], -area[i])):
            x, y, w, h = (int(v) for v in rle.toBbox(runs[i]))
            inside = rle.decode(runs[i])[y : y + h, x : x + w].astype(bool)
            ids[y : y + h, x : x + w][inside] = i + 1
        pixels = np.bincount(ids[ids > 0], minlength=len(runs) + 1)[1:].tolist()
        things = [
            Thing(*self.categories[item["category_id"]], n, c)
            for item, n, c in zip(self.annotations, pixels, crowd, strict=True)
        ]
        return Labels(ids, things)

    def image(self, size: tuple[int, int]) -> np.ndarray:
        return read_image(self.path, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION, size)


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse(argv)
    if not args.images.is_dir():
        raise UserError(
            f"there is no folder of images {str(args.images)!r}; give the folder that the file "
            "names are relative to."
        )
    images, categories = read_dataset(args.annotations, args.images)
    splits = read_split(args.split, images) if args.split else {"train": list(images.values())}
    refuse_leftovers(args.output_dir, set(splits))
    return tile_splits(
        {args.output_dir / name: scenes for name, scenes in splits.items()},
        categories,
        settings_from(args, "category"),
        args.num_workers,
        args.skip_bad,
        args.pack,
    )


def read_dataset(path: Path, folder: Path) -> tuple[dict[str, CocoImage], list[str]]:
    """The images of a COCO file by file name, and the names of its categories in its order.

    Raises:
        UserError: no such file, not a COCO instance file, or an entry that contradicts another.
    """
    data = read_coco(path)
    categories = [(category["id"], category["name"]) for category in data["categories"]]
    number = {id_: (i, name) for i, (id_, name) in enumerate(categories, start=1)}
    outlined: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for item in data["annotations"]:
        outlined[item["image_id"]].append(item)
    images: dict[str, CocoImage] = {}
    for entry in data["images"]:
        name, objects = entry["file_name"], outlined[entry["id"]]
        if name in images:
            raise UserError(f"{str(path)!r} lists the image {name!r} twice.")
        if len(objects) > MAX_OBJECTS:
            raise UserError(
                f"{str(path)!r} outlines {len(objects)} objects in {name!r}; at most {MAX_OBJECTS} "
                "are supported."
            )
        size = (entry["width"], entry["height"])
        images[name] = CocoImage(folder / name, _stem(name, path), size, objects, number)
    if not images:
        raise UserError(f"{str(path)!r} lists no image.")
    stems = {image.stem.casefold() for image in images.values()}
    if len(stems) < len(images):
        raise UserError(
            f"{str(path)!r} lists images that differ only in folder, suffix or case; rename them."
        )
    return images, [name for _, name in categories]


def read_split(path: Path, images: dict[str, CocoImage]) -> dict[str, list[CocoImage]]:
    """The images of each split; keys without a list of names count as notes and are skipped.

    Raises:
        UserError: a name is unknown or in two splits, or there is no split.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{str(path)!r} is not a JSON object.")
    split = {
        key: names
        for key, names in content.items()
        if isinstance(names, list) and names and all(isinstance(name, str) for name in names)
    }
    if not split:
        raise UserError(f"{str(path)!r} has no split such as {{'train': ['a.jpg']}}.")
    owner: dict[str, str] = {}
    for key, names in split.items():
        if not re.fullmatch(r"\w[\w-]*", key):
            raise UserError(
                f"{str(path)!r}: a split cannot be called {key!r}; use letters, digits, _ and -."
            )
        for name in names:
            if name not in images:
                raise UserError(f"{str(path)!r}: {name!r} of {key!r} is not in the annotations.")
            if name in owner:
                raise UserError(
                    f"{str(path)!r} names {name!r} twice, in {owner[name]!r} and in {key!r}."
                )
            owner[name] = key
    if left := len(images) - len(owner):
        print(f"{left} images are in no split and are skipped")
    return {key: [images[name] for name in names] for key, names in split.items()}


def refuse_leftovers(output: Path, splits: set[str]) -> None:
    """Refuse other splits of an earlier run: the same images could be in them and in ours."""
    for other in sorted(output.glob("*/instances_tiled.json")):
        if other.parent.name not in splits:
            raise UserError(
                f"{str(other.parent)!r} holds tiles of an earlier run that this one would not "
                "replace; remove that folder, or choose another --output-dir."
            )


def _stem(name: str, path: Path) -> str:
    """The name of an image without suffix, its folders joined by `_`; outside names are refused."""
    parts = PurePosixPath(name).parts
    leads_out = name.startswith("/") or "\\" in name or ".." in parts
    if not parts or leads_out or not name.isprintable():
        raise UserError(
            f"{str(path)!r} names an image outside the folder of images: {name[:99]!r}."
        )
    stem = "_".join(PurePosixPath(*parts).with_suffix("").parts)
    if len(stem.encode()) > MAX_STEM:
        raise UserError(f"{str(path)!r} has an image name of over {MAX_STEM} bytes: {name[:99]!r}.")
    return stem


def _parser() -> Parser:
    parser = Parser(
        description=__doc__.splitlines()[0],
    )
    add = parser.add_argument
    add("images", type=Path, help="folder that the file names are relative to")
    add("annotations", type=Path, help="COCO instance file (polygons or run lengths)")
    add("-o", "--output-dir", type=Path, required=True, help="where the splits are written")
    add("--split", type=Path, help="JSON file that names the images of each split")
    add_tiling_options(parser)
    return parser


if __name__ == "__main__":
    run(main)
