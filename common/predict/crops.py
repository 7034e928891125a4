"""The contact sheet of the largest regions or surest aircraft, which people look at first."""

import heapq
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from common.io.pictures import save
from common.io.raster import Scene
from common.predict.pictures import outline
from common.predict.regions import Region

SIDE = 160  # of a picture on the sheet, pixels
LARGEST = 2048  # pixels of the scene that a picture shows, along one side


class Crops:
    """Keeps the `count` regions for which `rank` is highest, and writes a sheet of them."""

    def __init__(self, count: int, rank: Callable[[Region], float]) -> None:
        self.count, self.rank = count, rank
        self._best: list[Region] = []

    def add(self, region: Region) -> None:
        self._best.append(region)
        if len(self._best) > 2 * self.count:
            self._best = heapq.nlargest(self.count, self._best, self.rank)

    def write(self, scene: Scene, path: Path) -> None:
        """Write the sheet, the highest rank first; nothing if there are no regions."""
        best = heapq.nlargest(self.count, self._best, self.rank)
        if not best:
            return
        columns = min(len(best), 8)
        sheet = np.full((-(-len(best) // columns) * SIDE, columns * SIDE, 3), 255, np.uint8)
        # From the top down, the only way to read a PNG or JPEG.
        for position, region in sorted(enumerate(best), key=lambda item: item[1].y):
            y, x = (SIDE * k for k in divmod(position, columns))
            sheet[y : y + SIDE, x : x + SIDE] = picture(scene, region)
        save(sheet, path)


def picture(scene: Scene, region: Region) -> np.ndarray:
    """A square of the scene around a region, with its outline and score: uint8 [SIDE,SIDE,3]."""
    left, top, right, bottom = region.box
    side = min(max(32, round(1.4 * max(right - left, bottom - top))), LARGEST)
    x = max(0, min((left + right - side) // 2, scene.width - side))
    y = max(0, min((top + bottom - side) // 2, scene.height - side))
    pixels, _ = scene.read(x, y, min(side, scene.width), min(side, scene.height))
    square = np.zeros((side, side, 3), np.uint8)
    square[: pixels.shape[0], : pixels.shape[1]] = pixels
    scale = SIDE / side
    shape = (max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale)))
    mask = cv2.resize(region.mask.astype(np.uint8), shape, interpolation=cv2.INTER_NEAREST) > 0
    small = cv2.resize(square, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    corner = round((left - x) * scale), round((top - y) * scale)
    return outline(small, [(mask, *corner, region.label, region.score)])
