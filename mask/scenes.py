"""Instances of a scene of any size: found in overlapping windows, merged if a seam cut them."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
from torch import Tensor

from common.io.pictures import Reduced
from common.predict.regions import Region
from common.predict.windows import Network, Rows, Strip, Tiling, ahead, predicted, strips

SAME = 0.5  # of the smaller mask, where two windows look; above it both are one aircraft
CELL = 256  # pixels; instances are compared with those that share a square of this side

Box = tuple[int, int, int, int]  # x1, y1, x2, y2; the last two are exclusive


@dataclass(frozen=True, eq=False)
class Instance(Region):
    """One aircraft, and the part of the scene that was looked at when it was found."""

    seen: Box


@dataclass
class Detected:
    """What a scene shows.

    Args:
        instances: Best first.
        valid: Whether the scene has a valid pixel.
        full: Number of windows with as many detections as the network reports at most.
    """

    instances: list[Instance]
    valid: bool = False
    full: int = 0


@torch.inference_mode()
def detect(
    scene: Rows,
    network: Network,
    tiling: Tiling,
    threshold: float,
    most: int = 100,
    picture: Reduced | None = None,
) -> Detected:
    """All instances of a whole scene.

    Args:
        network: Its results are dicts as `mask.model.predict` returns them.
        threshold: Detections that score less are left out.
        most: The number of detections that the network reports at most.
        picture: Gets the scene's rows as they are read.
    """

    def shown() -> Iterator[Strip]:
        for strip in strips(scene, tiling):
            if picture is not None:
                picture.add(strip.pixels[-strip.new :])
            yield strip

    detected = Detected([])
    for strip, x, result in predicted(ahead(shown()), scene.width, network, tiling):
        if result is not None:
            found = list(_instances(result, strip, x, tiling.side, threshold))
            detected.valid = True
            detected.full += len(found) >= most
            detected.instances += found
    detected.instances = merge(detected.instances)
    return detected


def _instances(
    found: dict[str, Tensor], strip: Strip, x: int, side: int, threshold: float
) -> Iterator[Instance]:
    kept = found["scores"] >= threshold
    height, width = strip.pixels.shape[:2]
    masks = found["masks"][kept].cpu().numpy()[:, :height, : width - x]
    if strip.valid is not None:
        masks = masks & strip.valid[:, x : x + side]
    labels, scores = found["labels"][kept].tolist(), found["scores"][kept].tolist()
    for mask, label, score in zip(masks, labels, scores, strict=True):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if len(rows) == 0:
            continue
        top, left = int(rows[0]), int(columns[0])
        cut = mask[top : rows[-1] + 1, left : columns[-1] + 1].copy()
        seen = (x, strip.y, x + side, strip.y + side)
        yield Instance(label, score, x + left, strip.y + top, cut, seen)


def merge(found: list[Instance]) -> list[Instance]:
    """Merge the instances that several windows found of one aircraft, best first.

    Boxes are not enough: the box of half an aircraft at a seam overlaps little with the box of the
    whole one. So the masks are compared only in the area that both windows share, where the half is
    all there is. Two instances that one window told apart are never merged: on a crowded apron that
    would make one of two neighbours. If another window shows one instance in the place of both,
    either is wrong, and the one with the lower score is left out.
    """
    group = list(range(len(found)))

    def root(i: int) -> int:
        while group[i] != i:
            group[i] = group[group[i]]
            i = group[i]
        return i

    pairs = (
        (_overlap(found[i], found[j]), i, j)
        for i, j in _overlapping([instance.box for instance in found])
    )
    windows = [{instance.seen} for instance in found]
    wrong: set[int] = set()
    for _, i, j in sorted((pair for pair in pairs if pair[0] > SAME), reverse=True):
        one, other = root(i), root(j)
        if windows[one].isdisjoint(windows[other]):
            group[one] = other
            windows[other] |= windows[one]
        elif one != other and found[i].score != found[j].score:
            wrong.add(min(i, j, key=lambda k: found[k].score))
    whole: dict[int, Instance] = {}
    for i, instance in enumerate(found):
        if i in wrong:
            continue
        key = root(i)
        whole[key] = _union(whole[key], instance) if key in whole else instance
    return sorted(whole.values(), key=lambda instance: -instance.score)


def _overlapping(boxes: list[Box]) -> Iterator[tuple[int, int]]:
    """Each pair of boxes with common pixels; the time is linear in the area at one density."""
    cells: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, (x1, y1, x2, y2) in enumerate(boxes):
        columns = range(x1 // CELL, (x2 - 1) // CELL + 1)
        for cell in product(columns, range(y1 // CELL, (y2 - 1) // CELL + 1)):
            cells[cell].append(i)
    for cell, members in cells.items():
        corners = np.array([boxes[i] for i in members])
        for n, i in enumerate(members[:-1]):
            low = np.maximum(corners[n, :2], corners[n + 1 :, :2])
            high = np.minimum(corners[n, 2:], corners[n + 1 :, 2:])
            # In several cells there may be the same two: the top left of what they share decides.
            together = (low < high).all(1) & (low // CELL == cell).all(1)
            for j in np.flatnonzero(together).tolist():
                yield i, members[n + 1 + j]


def _overlap(a: Instance, b: Instance) -> float:
    """What two masks share, of the smaller one, where both windows looked; 0 for other classes.

    Of the union, as in an IoU, would leave duplicates: of a few pixels at a window's border, half
    are often in another place.
    """
    if a.label != b.label or a.seen == b.seen:
        return 0.0
    around = min(a.x, b.x), min(a.y, b.y), max(a.box[2], b.box[2]), max(a.box[3], b.box[3])
    both_see = _common(_common(a.seen, b.seen), around)
    first, second = _inside(a, both_see), _inside(b, both_see)
    smaller = min(np.count_nonzero(first), np.count_nonzero(second))
    return float(np.count_nonzero(first & second) / smaller) if smaller else 0.0


def _common(a: Box, b: Box) -> Box:
    return max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])


def _inside(instance: Instance, region: Box) -> np.ndarray:
    """The part of an instance's mask that lies in `region`, on a canvas of the region's size."""
    x1, y1, x2, y2 = region
    canvas = np.zeros((max(0, y2 - y1), max(0, x2 - x1)), bool)
    left, top, right, bottom = _common(instance.box, region)
    if right > left and bottom > top:
        canvas[top - y1 : bottom - y1, left - x1 : right - x1] = instance.mask[
            top - instance.y : bottom - instance.y, left - instance.x : right - instance.x
        ]
    return canvas


def _union(a: Instance, b: Instance) -> Instance:
    """Both masks as one, with the higher score."""
    boxes = a.box, b.box
    x, y = min(box[0] for box in boxes), min(box[1] for box in boxes)
    right, bottom = max(box[2] for box in boxes), max(box[3] for box in boxes)
    region = (x, y, right, bottom)
    best = a if a.score >= b.score else b
    return replace(best, x=x, y=y, mask=_inside(a, region) | _inside(b, region))
