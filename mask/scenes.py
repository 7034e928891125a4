"""Instances of an image of any size: found in overlapping windows, merged if a seam cut them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from common.predict.windows import grid

SAME = 0.5  # IoU in the area that two windows share, above which two masks are one aircraft


@dataclass(frozen=True)
class Instance:
    """One aircraft: its mask cut to its own box, so that memory does not grow with the image."""

    label: int
    score: float
    x: int
    y: int
    mask: np.ndarray  # bool [h,w], its top left pixel is (x, y)
    seen: tuple[int, int, int, int]  # x1, y1, x2, y2 of the window it was found in

    @property
    def box(self) -> tuple[int, int, int, int]:
        """x1, y1, x2, y2; the last two are exclusive."""
        return self.x, self.y, self.x + self.mask.shape[1], self.y + self.mask.shape[0]


@torch.inference_mode()
def detect(
    image: Tensor,
    predict: Callable[[Tensor], list[dict[str, Tensor]]],
    window: int,
    overlap: float,
    batch_size: int,
    threshold: float,
) -> list[Instance]:
    """All instances of a whole image, best first.

    Args:
        image: float [3,H,W], normalised, on the device; any H and W.
        predict: [B,3,window,window] → B dicts as `mask.model.predict` returns them.
        window: Side in pixels, a multiple of 32.
        overlap: Share of a window that its neighbour covers too.
        batch_size: Windows per forward pass.
        threshold: Detections that score less are left out.
    """
    height, width = image.shape[1:]
    image = F.pad(image, (0, max(0, window - width), 0, max(0, window - height)))
    corners = list(grid(image.shape[1], image.shape[2], window, overlap))
    instances: list[Instance] = []
    for start in range(0, len(corners), batch_size):
        part = corners[start : start + batch_size]
        crops = torch.stack([image[:, y : y + window, x : x + window] for y, x in part])
        for (y, x), detections in zip(part, predict(crops), strict=True):
            instances += _instances(detections, x, y, window, threshold, height, width)
    return merge(instances)


def _instances(
    found: dict[str, Tensor], x: int, y: int, window: int, threshold: float, height: int, width: int
) -> Iterator[Instance]:
    kept = found["scores"] >= threshold
    masks = found["masks"][kept].cpu().numpy()[:, : height - y, : width - x]
    labels, scores = found["labels"][kept].tolist(), found["scores"][kept].tolist()
    for mask, label, score in zip(masks, labels, scores, strict=True):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if len(rows) == 0:
            continue
        top, left = int(rows[0]), int(columns[0])
        cut = mask[top : rows[-1] + 1, left : columns[-1] + 1].copy()
        seen = (x, y, x + window, y + window)
        yield Instance(label, score, x + left, y + top, cut, seen)


def merge(found: list[Instance]) -> list[Instance]:
    """Merge the instances that several windows found of one aircraft, best first.

    Boxes are not enough: the box of half an aircraft at a seam overlaps little with the box of the
    whole one. So the masks are compared only in the area that both windows share, where the half is
    all there is.
    """
    group = list(range(len(found)))

    def root(i: int) -> int:
        while group[i] != i:
            group[i] = group[group[i]]
            i = group[i]
        return i

    for i, j in combinations(range(len(found)), 2):
        if found[i].seen != found[j].seen and _same(found[i], found[j]):
            group[root(i)] = root(j)
    whole: dict[int, Instance] = {}
    for i, instance in enumerate(found):
        key = root(i)
        whole[key] = _union(whole[key], instance) if key in whole else instance
    return sorted(whole.values(), key=lambda instance: -instance.score)


def _same(a: Instance, b: Instance) -> bool:
    if a.label != b.label or not _area(_common(a.box, b.box)):
        return False
    both_see = _common(a.seen, b.seen)
    first, second = _inside(a, both_see), _inside(b, both_see)
    shared = np.logical_and(first, second).sum()
    return bool(shared > SAME * np.logical_or(first, second).sum())


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, int, int, int]:
    return max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])


def _area(box: tuple[int, int, int, int]) -> int:
    return max(0, box[2] - box[0]) * max(0, box[3] - box[1])


def _inside(instance: Instance, region: tuple[int, int, int, int]) -> np.ndarray:
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
