"""A detector that knows the truth, and what joining its windows does to the aircraft."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mask.scenes import Instance
from rareplanes.scene import read_scene, scene_stems

LEAST = 16  # pixels of an aircraft that the detector needs
MATCH = 0.5  # IoU from which a prediction is an aircraft


@dataclass(frozen=True)
class Ids:
    """A scene whose every channel is the number of the aircraft there, 0 for the ground."""

    ids: np.ndarray  # uint8 [H,W]

    @property
    def height(self) -> int:
        return self.ids.shape[0]

    @property
    def width(self) -> int:
        return self.ids.shape[1]

    def read(self, x: int, y: int, width: int, height: int) -> tuple[np.ndarray, None]:
        return self.picture()[y : y + height, x : x + width], None

    def picture(self) -> np.ndarray:
        """uint8 [H,W,3]."""
        return np.repeat(self.ids[:, :, None], 3, 2)


def rendered(folder: Path) -> list[Ids]:
    """The scenes that `rareplanes/sample.py` rendered."""
    scenes = []
    for split in ("train", "test"):
        for stem in scene_stems(folder / split):
            scenes.append(Ids(read_scene(folder / split, stem).ids.astype(np.uint8)))
    return scenes


def apron(scenes: list[Ids], seed: int, count: int = 240) -> Ids:
    """Aircraft of many scenes, set so close that they touch their neighbours or lie over them."""
    rng = np.random.default_rng(seed)
    shapes = []
    for scene in scenes:
        height, width = scene.ids.shape
        for number in np.unique(scene.ids[scene.ids > 0]):
            rows, columns = np.nonzero(scene.ids == number)
            box = rows.min(), columns.min(), rows.max() + 1, columns.max() + 1
            if min(box[:2]) > 0 and box[2] < height and box[3] < width and len(rows) > 150:
                shapes.append(scene.ids[box[0] : box[2], box[1] : box[3]] == number)
    ids = np.zeros((1080, 1920), np.uint8)
    number, y = 0, 5
    while number < count and y < 1000:
        x, deepest = 5, 20
        while number < count:
            shape = shapes[rng.integers(len(shapes))]
            height, width = shape.shape
            if x + width >= ids.shape[1] - 5:
                break
            if y + height < ids.shape[0]:
                number, deepest = number + 1, max(deepest, height)
                part = ids[y : y + height, x : x + width]
                part[shape & (part == 0)] = number
            x += int(width * rng.uniform(0.75, 0.95))
        y += int(deepest * 0.85)
    pixels = np.bincount(ids.ravel(), minlength=256)
    return Ids(np.where(pixels[ids] < 100, 0, ids).astype(np.uint8))


class Oracle:
    """Finds every aircraft that a window shows, its mask up to a pixel too far to each side.

    With a probability of `errors` it takes an aircraft for two halves, or for one with a neighbour.
    """

    def __init__(self, scene: Ids, seed: int, errors: float) -> None:
        self.pixels = np.bincount(scene.ids.ravel(), minlength=256)
        self.rng, self.errors = np.random.default_rng(seed), errors
        self.seconds = 0.0  # of CPU, in `find`

    def __call__(self, crops: Tensor) -> list[dict[str, Tensor]]:
        """Windows uint8 [B,h,w,3] → what `mask.model.predict` returns."""
        return [self.find(crop[..., 0].numpy()) for crop in crops]

    def find(self, ids: np.ndarray) -> dict[str, Tensor]:
        """A window uint8 [h,w] → what `mask.model.predict` returns for it."""
        since = time.process_time()
        masks, scores = [], []
        for number in np.unique(ids[ids > 0]):
            for mask in self._pieces(ids, number):
                score = min(1.0, float(mask.sum() / self.pixels[number]))
                down, across = self.rng.integers(0, 3, 2)
                moved = np.pad(mask, 1)[down : down + len(mask), across : across + mask.shape[1]]
                if moved.sum() >= LEAST:
                    masks.append(moved)
                    scores.append(score)
        found = {
            "masks": torch.from_numpy(np.array(masks, bool).reshape(-1, *ids.shape)),
            "scores": torch.tensor(scores),
            "labels": torch.ones(len(masks), dtype=torch.long),
        }
        self.seconds += time.process_time() - since
        return found

    def _pieces(self, ids: np.ndarray, number: int) -> list[np.ndarray]:
        mask = ids == number
        luck = self.rng.random()
        if luck < self.errors:
            middle = int(np.median(np.nonzero(mask)[1]))
            left = mask.copy()
            left[:, middle:] = False
            return [left, mask & ~left]
        if luck < 2 * self.errors:
            rows, columns = np.nonzero(mask)
            around = ids[
                max(0, rows.min() - 2) : rows.max() + 3,
                max(0, columns.min() - 2) : columns.max() + 3,
            ]
            others = np.unique(around[(around > 0) & (around != number)])
            return [mask | (ids == others[0])] if len(others) else [mask]
        return [mask]


def count_errors(scene: Ids, found: list[Any]) -> dict[str, int]:
    """How many aircraft were found, and what else was reported.

    Args:
        found: Have `mask` bool [h,w], `x` and `y`, as `Instance`.
    """
    pixels = np.bincount(scene.ids.ravel(), minlength=256)
    matched: set[int] = set()
    whole = extra = 0
    for one in found:
        height, width = one.mask.shape
        covered = scene.ids[one.y : one.y + height, one.x : one.x + width][one.mask]
        shared = np.bincount(covered, minlength=256)
        shared[0] = 0
        number = int(shared.argmax())
        union = pixels[number] + np.count_nonzero(one.mask) - shared[number]
        iou = shared[number] / max(1, union)
        if number in matched or iou < MATCH:
            extra += 1
            continue
        matched.add(number)
        whole += iou >= 0.8
    aircraft = int(np.count_nonzero(pixels[1:]))
    return {"aircraft": aircraft, "found": len(matched), "whole": int(whole), "extra": extra}


def as_seen(count: int, side: int, starts: list[int], window: int) -> list[Instance]:
    """`count` detections of aircraft of 20 to 70 pixels, as windows cut them."""
    rng = np.random.default_rng(0)
    found: list[Instance] = []
    while len(found) < count:
        size = int(rng.integers(20, 70))
        left, top = (int(v) for v in rng.integers(0, side - size, 2))
        y, x = np.mgrid[0:size, 0:size] / (size - 1) * 2 - 1
        shape = (np.abs(x) < 0.14) | (np.abs(y + 0.1 + 0.4 * np.abs(x)) < 0.15)
        shape |= (np.abs(y - 0.8) < 0.1) & (np.abs(x) < 0.35)
        for y1 in (s for s in starts if s < top + size and s + window > top):
            for x1 in (s for s in starts if s < left + size and s + window > left):
                at = max(x1, left), max(y1, top)
                part = shape[
                    at[1] - top : y1 + window - top, at[0] - left : x1 + window - left
                ].copy()
                if np.count_nonzero(part) >= LEAST:
                    seen = (x1, y1, x1 + window, y1 + window)
                    found.append(Instance(1, float(rng.random()), *at, part, seen))
    return found[:count]
