"""Prediction on scenes of any size: overlapping windows, blended so that no seam shows.

A scene is read from the top to the bottom in *strips*: the rows under one row of windows. It is
blended in *bands*: rows that no later window changes. Only a few strips are in memory at a time, so
memory grows with the scene's width and not with its height.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import compress, islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from common.cli import progress
from common.io.raster import NEUTRAL, Scene

T = TypeVar("T")
Network = Callable[[Tensor], Any]
"""uint8 [B,side,side,3] on the CPU → one result for each of the B windows."""


@dataclass(frozen=True)
class Tiling:
    """How windows are laid over a scene.

    Args:
        side: Of a window in pixels, a multiple of the network's stride.
        overlap: Share of a window that its neighbour covers too, 0 to below 1.
        batch_size: Windows per forward pass.
    """

    side: int
    overlap: float
    batch_size: int

    def starts(self, length: int) -> list[int]:
        """Where windows begin along `length` pixels: the fewest, evenly spread."""
        stride = max(1, round(self.side * (1 - self.overlap)))
        room = length - self.side
        steps = -(-room // stride)
        return [round(i * room / steps) for i in range(steps + 1)] if steps > 0 else [0]


@dataclass(frozen=True, eq=False)
class Strip:
    """The rows of a scene under one row of windows, from row `y` on.

    The last `new` of them were not in the strip before.
    """

    y: int
    new: int
    pixels: np.ndarray  # uint8 [n,W,3]
    valid: np.ndarray | None  # bool [n,W]; None: all


@dataclass(frozen=True, eq=False)
class Band:
    """Rows of a scene that no later window changes, from row `y` on."""

    y: int
    probability: Tensor  # float32 [C,n,W]
    pixels: np.ndarray  # uint8 [n,W,3]
    valid: np.ndarray | None  # bool [n,W]; None: all


def strips(scene: Scene, tiling: Tiling) -> Iterator[Strip]:
    """The rows under each row of windows; each pixel is read once."""
    last: Strip | None = None
    for y in progress(tiling.starts(scene.height), desc=scene.path.name[:30], unit="row"):
        height = min(tiling.side, scene.height)
        kept = len(last.pixels) - (y - last.y) if last else 0
        pixels, valid = scene.read(0, y + kept, scene.width, height - kept)
        if last is not None and kept:
            if last.valid is not None or valid is not None:
                parts = [_or_all(last.valid, last.pixels)[-kept:], _or_all(valid, pixels)]
                valid = np.concatenate(parts)
            pixels = np.concatenate([last.pixels[-kept:], pixels])
        last = Strip(y, height - kept, pixels, valid)
        yield last


def _or_all(valid: np.ndarray | None, pixels: np.ndarray) -> np.ndarray:
    return np.ones(pixels.shape[:2], bool) if valid is None else valid


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items; while one is used, a thread makes the next."""
    with ThreadPoolExecutor(1) as thread:
        end: Any = object()
        coming = thread.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, items, end)
            yield item


def filled(crops: Tensor, side: int) -> Tensor:
    """Extend windows uint8 [B,h,w,3] of a scene smaller than `side` by `NEUTRAL`."""
    count, height, width, _ = crops.shape
    if height == width == side:
        return crops
    extended = torch.tensor(NEUTRAL, dtype=torch.uint8).repeat(count, side, side, 1)
    extended[:, :height, :width] = crops
    return extended


def predicted(scene: Scene, network: Network, tiling: Tiling) -> Iterator[tuple[Strip, int, Any]]:
    """Each window's strip, its left edge and the network's result, row by row.

    A window without a valid pixel is not computed; its result is None. A thread reads the next
    strip while the network computes. The next batch is started before the results of this one are
    used, so that a GPU computes meanwhile.
    """
    side, starts = tiling.side, tiling.starts(scene.width)
    windows = ((strip, x) for strip in ahead(strips(scene, tiling)) for x in starts)
    before: list[tuple[Strip, int, Any]] = []
    while batch := list(islice(windows, tiling.batch_size)):
        visible = [s.valid is None or bool(s.valid[:, x : x + side].any()) for s, x in batch]
        crops = [torch.from_numpy(s.pixels[:, x : x + side]) for s, x in compress(batch, visible)]
        results = iter(network(filled(torch.stack(crops), side)) if crops else ())
        done = [
            (strip, x, next(results) if computed else None)
            for (strip, x), computed in zip(batch, visible, strict=True)
        ]
        yield from before
        before = done
    yield from before


@torch.inference_mode()
def blend(scene: Scene, network: Network, tiling: Tiling) -> Iterator[Band]:
    """Class probabilities of a whole scene, blended from those of its windows, from the top down.

    Args:
        network: Its results are [C,side,side]; the part beyond the scene is cut off.

    Yields:
        Bands that cover the scene. Every pixel's probabilities sum to 1; they are 0 where all
        windows around the pixel have no valid one.
    """
    side = tiling.side
    across = _weights(tiling, scene.width)
    down = _weights(tiling, scene.height)
    ramp = _ramp(side)
    hill = ramp[:, None] * ramp
    total: Tensor | None = None  # sum of the weighted results in the current strip
    current: Strip | None = None
    for strip, x, result in predicted(scene, network, tiling):
        if current is not None and strip is not current:
            count = strip.y - current.y
            yield _band(current, count, total, down, across)
            if total is not None:
                total[:, : side - count] = total[:, count:].clone()
                total[:, side - count :] = 0
        current = strip
        if result is None:
            continue
        result = result.float()
        if total is None:
            total = result.new_zeros(len(result), side, scene.width)
            hill = hill.to(result.device)
        height, width = len(strip.pixels), min(side, scene.width - x)
        total[:, :height, x : x + width].addcmul_(result[:, :height, :width], hill[:height, :width])
    assert current is not None
    yield _band(current, len(current.pixels), total, down, across)


def _band(strip: Strip, count: int, total: Tensor | None, down: Tensor, across: Tensor) -> Band:
    """The first `count` rows of a strip, with the sums divided by the sums of the weights."""
    if total is None:
        probability = torch.zeros(1, count, len(across))
    else:
        weights = down[strip.y : strip.y + count, None] * across
        probability = total[:, :count] / weights.to(total.device)
    valid = None if strip.valid is None else strip.valid[:count]
    return Band(strip.y, probability, strip.pixels[:count], valid)


def _ramp(side: int) -> Tensor:
    """Weight by distance to the window's edge: the middle has the most context."""
    ramp = torch.arange(side) + 0.5
    return torch.minimum(ramp, side - ramp) / (side / 2)


def _weights(tiling: Tiling, length: int) -> Tensor:
    """The sum of the windows' weights at each of `length` pixels, along one side."""
    total = torch.zeros(max(length, tiling.side))
    for start in tiling.starts(length):
        total[start : start + tiling.side] += _ramp(tiling.side)
    return total[:length]
