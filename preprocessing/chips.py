"""Cut a picture of each aircraft that is labelled by four points, and paste masks back.

    python preprocessing/chips.py data -o data/chips --copies 3 --jitter 2
    python unet/train.py --data-path data/chips --crop-size 128 --output-dir runs/chips
    python preprocessing/chips.py data/real_tiles -o data/real_chips
    python unet/label.py runs/chips/model_best.pth data/real_chips
    python preprocessing/chips.py data/real_tiles -o data/real_masks --found data/real_chips

A chip shows one aircraft in the middle, nose up, as large as fits. This is how a network learns
which one is meant, without another input. Chips are tiles, so every train.py takes them.
"""

import argparse
import math
import os
import sys
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import numpy as np
from pycocotools import mask as rle

from common.cli import Parser, UserError, fraction, number, run
from common.io.look import OPTIONS
from common.io.raster import NEUTRAL
from common.io.tiles import (
    FOUND,
    airport_of,
    mask_dtype,
    read_index,
    read_png,
    read_tile,
    tile_paths,
)
from preprocessing.preprocess import SPLITS
from preprocessing.scene_tiles import tile_name
from preprocessing.splits import add_tiling_options, tile_splits
from preprocessing.tiles import ALL, Labels, Source, Thing, ignore_value

SIDE = 128  # of a chip, pixels
MARGIN = 1.3
"""Side of a chip as a multiple of the aircraft's length or span, whichever is larger."""
HALF = 127.5  # of 255: a probability of one half
UNCERTAIN = "whose mask is uncertain (regions to ignore, see --least-iou)"
IGNORED_BEFORE = "ignored before (regions to ignore)"


@dataclass(frozen=True)
class Tile:
    """A tile that an earlier command wrote, as the source of other tiles."""

    folder: Path
    entry: dict[str, Any]
    """Its entry in the COCO file."""
    annotations: tuple[dict[str, Any], ...]

    @property
    def stem(self) -> str:
        return Path(self.entry["file_name"]).stem

    @property
    def airport(self) -> str:
        return airport_of(self.entry) or str(self.entry.get("scene"))

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.entry["width"], self.entry["height"]

    def files(self) -> list[Path]:
        return list(tile_paths(self.folder, self.entry["file_name"]))

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Its image, uint8 [H,W,3], RGB, and its mask [H,W]: 0 ground, 1…N aircraft, or ignore."""
        aircraft = sum(not a["iscrowd"] for a in self.annotations)
        return _decoded(self.folder, self.entry["file_name"], aircraft, self.size)


@dataclass(frozen=True)
class Chip(Tile):
    """A picture of one aircraft of a tile."""

    aircraft: dict[str, Any]
    """Its annotation."""
    side: int
    copy: int = 0
    jitter: float = 0.0
    """Each point is off by up to so many pixels of the tile, both ways."""

    @property
    def stem(self) -> str:
        return chip_name(super().stem, self.aircraft) + f"_copy_{self.copy}" * bool(self.copy)

    @property
    def matrix(self) -> np.ndarray:
        random = np.random.default_rng(zlib.crc32(self.stem.encode()))
        moves = random.uniform(-self.jitter, self.jitter, (4, 2))
        return frame(points_of(self.aircraft) + moves, self.side)

    def labels(self) -> Labels:
        _, ids = self.read()
        square = self.side, self.side
        parts = ids == self.aircraft["instance"], ids != ignore_value(ids.dtype)
        own, known = (warped(part.astype(np.float32), self.matrix, square) >= 0.5 for part in parts)
        thing = Thing(self.aircraft["category_id"], self.aircraft["make"], int(own.sum()))
        valid = None if known.all() else known | own
        look = {"frame": self.matrix.round(4).tolist()}  # --found compares it with the tile's
        return Labels(own.astype(np.uint8), [thing], valid, look)

    def image(self, size: tuple[int, int]) -> np.ndarray:
        return warped(self.read()[0], self.matrix, size, NEUTRAL)[..., ::-1].copy()


@dataclass(frozen=True)
class Pasted(Tile):
    """A tile whose aircraft get the masks that were found in their chips."""

    chips: Path
    side: int
    """Of a chip, pixels."""
    least: float
    """An aircraft whose estimated IoU is lower becomes a region to ignore."""

    def files(self) -> list[Path]:
        return [*super().files(), *(self._found(a) for a in self.annotations if is_labelled(a))]

    def _found(self, a: dict[str, Any]) -> Path:
        return self.chips / FOUND / tile_name(chip_name(self.stem, a), 0)

    def labels(self) -> Labels:
        _, before = self.read()
        valid = before != ignore_value(before.dtype)
        ids = np.zeros(before.shape, np.uint8 if len(self.annotations) < 255 else np.uint16)
        # Of two masks that overlap the surer one is on top; regions to ignore are below all.
        found = sorted((self._thing(a) for a in self.annotations), key=lambda item: item[2])
        for k, (_, mask, _) in enumerate(found, start=1):
            ids[mask] = k
            valid |= mask
        pixels = np.bincount(ids.ravel(), minlength=len(found) + 1)[1:].tolist()
        things = [replace(thing, pixels=n) for (thing, *_), n in zip(found, pixels, strict=True)]
        return Labels(ids, things, None if valid.all() else valid, self.entry.get("look", {}))

    def _thing(self, a: dict[str, Any]) -> tuple[Thing, np.ndarray, float]:
        """An annotation with its new mask, bool [H,W], and the mask's estimated IoU."""
        thing, before = Thing(a["category_id"], a["make"], 0), rle.decode(a["segmentation"]) > 0
        if not is_labelled(a):
            return replace(thing, ignored=IGNORED_BEFORE), before, 0.0
        square, words = (self.side, self.side), ("mask", "cut the chips and label them again")
        found = read_png(self._found(a), cv2.IMREAD_UNCHANGED, square, *words)
        to_chip = cv2.invertAffineTransform(frame(points_of(a), self.side))
        mask = warped(found.astype(np.float32), to_chip, self.size) >= HALF
        quality = expected_iou(found)
        if quality < self.least or not mask.any():
            return replace(thing, ignored=UNCERTAIN), mask | before, 0.0
        points = tuple((x, y) for x, y in points_of(a).tolist())
        return replace(thing, points=points, quality=round(quality, 3)), mask, quality

    def image(self, size: tuple[int, int]) -> np.ndarray:
        return self.read()[0][..., ::-1].copy()


@lru_cache(maxsize=1)  # the chips of a tile follow each other
def _decoded(
    folder: Path, name: str, aircraft: int, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    shape = size[::-1]
    image, ids = np.empty((*shape, 3), np.uint8), np.empty(shape, mask_dtype([aircraft]))
    read_tile(folder, name, aircraft, image, ids)
    image.flags.writeable = ids.flags.writeable = False
    return image, ids


def chip_name(tile: str, aircraft: dict[str, Any]) -> str:
    """The stem of the chip of an aircraft, from that of its tile."""
    return f"{tile}_aircraft_{aircraft['instance']}"


def is_labelled(annotation: dict[str, Any]) -> bool:
    """Whether an annotation is an aircraft, not a region to ignore, with four points."""
    return not annotation["iscrowd"] and annotation.get("num_keypoints") == 4


def points_of(annotation: dict[str, Any]) -> np.ndarray:
    """Nose, left wing, tail and right wing in pixels of the tile: [4,2]."""
    return np.reshape(annotation["keypoints"], (4, 3))[:, :2]


def frame(points: np.ndarray, side: int) -> np.ndarray:
    """The map from a chip to its tile, as a matrix [2,3] for (column, row, 1), in pixels.

    The axis from tail to nose is the chip's middle column, upwards. The larger of length and span
    takes 1/`MARGIN` of the chip.

    Args:
        points: Nose, left wing, tail, right wing [4,2], pixels of the tile.
        side: Of the chip, pixels.
    """
    nose, left, tail, right = points
    axis = nose - tail
    length = float(np.hypot(*axis))
    up = axis / length if length else np.array([0.0, -1.0])
    aside = np.array([-up[1], up[0]])
    half = max(length / 2, *np.abs((np.stack([left, right]) - tail) @ aside), 1.0)
    linear = 2 * MARGIN * half / side * np.stack([aside, -up], 1)
    return np.column_stack([linear, (nose + tail) / 2 - linear @ [side / 2, side / 2]])


def warped(
    image: np.ndarray, matrix: np.ndarray, size: tuple[int, int], beyond: Sequence[float] = (0,)
) -> np.ndarray:
    """An image [H,W,…] seen through `matrix`, which maps the result's pixels to those of `image`.

    Args:
        image: What cv2.warpAffine takes.
        matrix: [2,3] for (column, row, 1); the corner of an image is at 0, 0.
        size: Width and height of the result. Where it is coarser than `image`, it is drawn finer
            and averaged.
        beyond: The value outside of `image`.
    """
    finer = max(1, math.ceil(math.sqrt(abs(np.linalg.det(matrix[:, :2]))) - 0.01))
    linear = matrix[:, :2] / finer
    # OpenCV's whole numbers are the centres of pixels.
    fine = np.column_stack([linear, matrix[:, 2] + linear.sum(1) / 2 - 0.5])
    how = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, cv2.BORDER_CONSTANT, beyond
    drawn = cv2.warpAffine(image, fine, (size[0] * finer, size[1] * finer), None, *how)
    return cv2.resize(drawn, size, interpolation=cv2.INTER_AREA) if finer > 1 else drawn


def expected_iou(found: np.ndarray) -> float:
    """The IoU of a mask with the truth, as far as the network's probabilities are right.

    The expected intersection divided by the expected union, with the mask where the probability is
    at least a half.

    Args:
        found: Probability of the aircraft, uint8 [H,W], 255 for 1.
    """
    inside = found[found >= HALF].astype(float)
    return float(inside.sum() / max(255 * inside.size + found[found < HALF].sum(), 1))


def tiles_of(folder: Path, coco: dict[str, Any]) -> Iterator[Tile]:
    """The tiles of a split, from its COCO file."""
    of_tile = defaultdict(list)
    for a in coco["annotations"]:
        of_tile[a["image_id"]].append(a)
    for entry in coco["images"]:
        yield Tile(folder, entry, tuple(of_tile[entry["id"]]))


def cut_chips(folder: Path, coco: dict[str, Any], args: argparse.Namespace) -> list[Chip]:
    """The chips of a split.

    Raises:
        UserError: It has no aircraft with four points.
    """
    chips = [
        Chip(folder, tile.entry, tile.annotations, a, args.tile_size, copy, args.jitter)
        for tile in tiles_of(folder, coco)
        for a in filter(is_labelled, tile.annotations)
        for copy in range(args.copies)
    ]
    if not chips:
        raise UserError(
            f"no aircraft in {str(folder)!r} has four points; only preprocess.py and real.py write "
            "them."
        )
    return chips


def pasted_tiles(folder: Path, coco: dict[str, Any], args: argparse.Namespace) -> list[Pasted]:
    """The tiles of a split with the masks that were found in its chips.

    Raises:
        UserError: There are no such chips, or they were cut elsewhere, or nothing was found yet.
    """
    chips = args.found / folder.name
    remedy = (
        f"python preprocessing/chips.py {folder.parent} -o {args.found} (without --jitter), then "
        f"python unet/label.py runs/chips/model_best.pth {args.found}"
    )
    if not (chips / FOUND).is_dir():
        raise UserError(f"there is no {FOUND}/ in {str(chips)!r}; write it with {remedy}.")
    entries = read_index(chips)["images"]
    side, tiles = entries[0]["width"], list(tiles_of(folder, coco))
    frames = {entry["scene"]: entry.get("look", {}).get("frame") for entry in entries}
    for tile in tiles:
        for a in filter(is_labelled, tile.annotations):
            name = chip_name(tile.stem, a)
            skipped = args.skip_bad and name not in frames
            cut = np.array(frames.get(name) or np.inf)
            if not skipped and not np.allclose(cut, frame(points_of(a), side), atol=1e-3):
                raise UserError(
                    f"the chips in {str(chips)!r} do not show the aircraft where {str(folder)!r} "
                    f"has them; cut them again with {remedy}."
                )
    return [
        Pasted(folder, tile.entry, tile.annotations, chips, side, args.least_iou) for tile in tiles
    ]


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse(argv)
    sources: dict[Path, Sequence[Source]] = {}
    indices = {
        split: read_index(args.tiles / split) for split in SPLITS if (args.tiles / split).is_dir()
    }
    if not indices:
        raise UserError(
            f"there is no train/, val/ or test/ in {str(args.tiles)!r}; give the folder that "
            "preprocess.py or real.py wrote."
        )
    for split, coco in indices.items():
        make = pasted_tiles if args.found else cut_chips
        sources[args.output_dir / split] = make(args.tiles / split, coco, args)
    info = coco.get("info", {})
    kind = "mask" if args.found else info.get("labels", "mask")
    if args.found:  # chips have another resolution each
        vars(args).update({k: v for k, v in info.get("look", {}).items() if k in OPTIONS})
        args.tile_size = coco["images"][0]["width"]
    names = [c["name"] for c in sorted(coco["categories"], key=lambda c: c["id"])]
    source = [os.path.relpath(args.tiles, args.output_dir)]
    return tile_splits(sources, names, args, info.get("attribute"), source, labels=kind)


def _parser() -> Parser:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("tiles", type=Path, help="folder with the tiled train/, val/ or test/")
    add("-o", "--output-dir", type=Path, required=True, help="where the splits are written")
    help = "paste the masks that unet/label.py found in these chips, instead of cutting chips"
    add("--found", type=Path, metavar="CHIPS", help=help)
    help = "with --found: ignore an aircraft whose mask is expected to have a lower IoU"
    add("--least-iou", type=fraction, default=0.7, help=help)
    add("--copies", type=number(int, 1, 100), default=1, help="chips of each aircraft")
    help = "each point is off by up to so many pixels, as an annotator's are"
    add("--jitter", type=number(float, 0, 100), default=0.0, metavar="PIXELS", help=help)
    add_tiling_options(parser)
    parser.set_defaults(tile_size=SIDE, negatives=ALL)
    return parser


if __name__ == "__main__":
    run(main)
