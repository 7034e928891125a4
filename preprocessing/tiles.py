"""The tiling itself: where the tiles of a scene are, and what each one shows."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path, PurePath
from typing import Any, Protocol

import numpy as np
from pycocotools import mask as rle

MIN_PIXELS = 25
"""An aircraft with fewer pixels in a tile is ignored: it cannot be recognised."""
ALL = 100.0
"""From this value of `Settings.negatives` on, every tile is kept."""
MAX_NAME = 200  # bytes: leaves room for `_tile_999_mask.png` and the ending of a temporary file
MAX_OBJECTS = (1 << 16) - 2  # of a scene, or of a part that is cut alone

KINDS = ("box", "diamond", "mask")
"""What the labels of a split are. Of the first two the diamonds between the four points of each
aircraft are painted; with `box` only the boxes around them are scored."""
KEYPOINTS = ("nose", "left_wing", "tail", "right_wing")
CUT = "cut by a border (regions to ignore)"

OTHER_DATASET = "category"
"""`Settings.attribute` if the scenes are not RarePlanes': the classes come with their labels."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the tiles of a run depend on, in addition to the scenes."""

    tile_size: int = 512
    min_visible: float = 0.1
    negatives: float = 0.1
    attribute: str | None = None
    """RarePlanes' attribute whose values are the classes, None for one class, or `OTHER_DATASET`"""
    seed: int = 0
    png_level: int = 1
    labels: str = "mask"
    """One of `KINDS`"""


@dataclass(frozen=True, slots=True)
class Thing:
    """One object of a scene."""

    category_id: int
    make: str
    pixels: int
    """Number of its pixels in the scene."""
    ignored: str = ""
    """Why it is ignored everywhere, such as a crowd; empty for an aircraft."""
    points: tuple[tuple[float, float], ...] = ()
    """Where its `KEYPOINTS` are in the scene, pixels from the top left corner; empty if unknown."""
    quality: float | None = None
    """Expected IoU of a mask that a network drew, see `preprocessing.chips`."""


@dataclass(frozen=True, slots=True)
class Labels:
    """What a scene shows where.

    `ids` `[H,W]` uint8 or uint16: 0 ground, k the k-th of `things`. `valid` bool `[H,W]`: the other
    pixels have no data, so they are neither ground nor aircraft; None if all are valid. `look` is
    how the scene became RGB, see `common.io.raster.Scene.record`.
    """

    ids: np.ndarray
    things: list[Thing]
    valid: np.ndarray | None = None
    look: dict[str, Any] = field(default_factory=dict)


def scene_name(path: PurePath, whole: bool) -> str:
    """The start of the names of a scene's tiles: its path, joined by `_`; shortened if long.

    Args:
        path: Of its image, relative to the dataset.
        whole: Keep the suffix, as another image has the same name without it.
    """
    *folders, name = path.parts
    name = "_".join([*folders, name.replace(".", "_") if whole else path.stem])
    if len(name.encode()) <= MAX_NAME:
        return name
    end = "_" + hashlib.sha256(name.encode()).hexdigest()[:12]
    return name.encode()[: MAX_NAME - len(end)].decode(errors="ignore") + end


class Source(Protocol):
    """A scene as the tiling sees it; must be picklable, as it is sent to another process."""

    @property
    def stem(self) -> str: ...
    @property
    def airport(self) -> str: ...
    def files(self) -> list[Path]: ...
    def labels(self) -> Labels: ...
    def image(self, size: tuple[int, int]) -> np.ndarray: ...


def grid(length: int, tile: int) -> list[int]:
    """Origins of the fewest tiles that cover `length` pixels, spread evenly.

    >>> grid(1920, 512)
    [0, 469, 938, 1408]
    """
    steps = -(-length // tile) - 1
    return [i * (length - tile) // steps for i in range(steps + 1)] if steps > 0 else [0]


def ignore_value(dtype: np.dtype) -> int:
    """The value of pixels that count neither as ground nor as aircraft: 255 or 65535."""
    return int(np.iinfo(dtype).max)


def cut(labels: Labels, settings: Settings) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Cut a scene's labels into tiles, row by row.

    If a tile shows less than `min_visible` of an aircraft's visible pixels, or fewer than
    `MIN_PIXELS`, the aircraft becomes the ignore value and a crowd annotation: it counts neither in
    training nor in a score. So do pixels without data and beyond the scene.

    Yields:
        The tile's entries in the COCO file (`x`, `y`, `padded`, `annotations`; `blank` if it has no
        valid pixel) and its mask, uint8
        (uint16 beyond 254 aircraft) of the tile's size: 0 ground, 1…N aircraft in the scene's
        order, the type's maximum ignore.
    """
    size = settings.tile_size
    ids, things, valid = labels.ids, labels.things, labels.valid
    height, width = ids.shape
    least = [0.0] + [
        math.inf if thing.ignored else max(settings.min_visible * thing.pixels, MIN_PIXELS)
        for thing in things
    ]
    padded = [max(0, size - width), max(0, size - height)]
    for y, x in product(grid(height, size), grid(width, size)):
        part = ids[y : y + size, x : x + size]
        known = None if valid is None else valid[y : y + size, x : x + size]
        if any(padded):
            known = np.ones(part.shape, bool) if known is None else known
            around = ((0, padded[1]), (0, padded[0]))
            part, known = np.pad(part, around), np.pad(known, around)
        mask, annotations = _label(part, things, least)
        for annotation in annotations:
            thing = things[annotation["object"] - 1]
            annotation |= _keypoints(thing.points, x, y, size)
            annotation |= {} if thing.quality is None else {"quality": thing.quality}
        tile = {"x": x, "y": y, "padded": padded, "annotations": annotations}
        if known is not None:
            mask[~known] = ignore_value(mask.dtype)
            tile |= {} if known.any() else {"blank": True}
        yield tile, mask


def _label(
    part: np.ndarray, things: list[Thing], least: list[float]
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    if not part.any():
        return np.zeros(part.shape, np.uint8), []
    count = np.bincount(part[part > 0], minlength=len(things) + 1)
    shown = np.flatnonzero(count).tolist()
    kept = [k for k in shown if count[k] >= least[k]]
    mask = np.zeros(part.shape, np.uint8 if len(kept) < 255 else np.uint16)
    ignore = ignore_value(mask.dtype)
    value = dict.fromkeys(shown, ignore) | {k: i for i, k in enumerate(kept, start=1)}
    # Column-major, as run lengths are: transposed once here instead of once for each aircraft.
    columns = np.ascontiguousarray(part.T)
    annotations = []
    for k in shown:
        runs = rle.encode((columns == k).view(np.uint8).T)
        x, y, w, h = (int(v) for v in rle.toBbox(runs))
        box = (slice(y, y + h), slice(x, x + w))
        mask[box][part[box] == k] = value[k]
        annotations.append(
            {
                "category_id": things[k - 1].category_id,
                "bbox": [x, y, w, h],
                "area": int(count[k]),
                "segmentation": {"size": list(part.shape), "counts": runs["counts"].decode()},
                "iscrowd": int(value[k] == ignore),
                "instance": value[k],
                "object": k,
                "make": things[k - 1].make,
            }
        )
    return mask, annotations


def _keypoints(
    points: tuple[tuple[float, float], ...], x: int, y: int, size: int
) -> dict[str, Any]:
    """The points as COCO's `keypoints` of the tile at x, y; a 2 follows those in it, a 1 others."""
    moved = [(round(px - x, 2), round(py - y, 2)) for px, py in points]
    flags = [1 + (0 <= px <= size and 0 <= py <= size) for px, py in moved]
    flat = [value for (px, py), flag in zip(moved, flags, strict=True) for value in (px, py, flag)]
    return {"keypoints": flat, "num_keypoints": len(points)} if points else {}


def is_cut(points: Iterable[Iterable[float]], size: tuple[int, int]) -> bool:
    """Whether a point (x, y) lies beyond the border of a scene of this (width, height)."""
    return any(not (0 <= x <= size[0] and 0 <= y <= size[1]) for x, y in points)


def not_shown(things: list[Thing], tiles: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Number of things that no tile shows as an aircraft, by the reason.

    Args:
        things: Of a scene.
        tiles: What `cut` yields of all its tiles.
    """
    shown = {a["object"] for tile in tiles for a in tile["annotations"] if not a["iscrowd"]}
    return Counter(_why(thing) for k, thing in enumerate(things, start=1) if k not in shown)


def _why(thing: Thing) -> str:
    if thing.ignored:
        return thing.ignored
    if thing.pixels == 0:
        return "hidden by others"
    if thing.pixels < MIN_PIXELS:
        return f"of fewer than {MIN_PIXELS} pixels"
    return "cut into parts smaller than --min-visible"
