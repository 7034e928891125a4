"""Pictures of predictions: outlines, an image reduced while it arrives, a sheet of regions."""

import heapq
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from common.io.pictures import colour, save
from common.io.raster import Scene
from common.predict.regions import Region

SIDE = 160  # of a picture on the sheet, pixels
LARGEST = 2048  # pixels of the scene that a picture shows, along one side


def outline(image: np.ndarray, regions: list[Region]) -> np.ndarray:
    """Draw the outline and the score of each region in the colour of its class.

    Args:
        image: uint8 [H,W,3], RGB.
        regions: In the pixels of `image`.

    Returns:
        A new uint8 [H,W,3].
    """
    drawn = image.copy()
    width = max(1, round(min(image.shape[:2]) / 500))
    size = max(0.35, min(image.shape[:2]) / 2400)
    for region in regions:
        lines, _ = cv2.findContours(
            np.pad(region.mask, 1).astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE
        )
        if not lines:
            continue
        x, y = region.x - 1, region.y - 1
        line = colour(region.label), width, cv2.LINE_AA
        cv2.drawContours(drawn, lines, -1, *line, offset=(x, y))
        # The score goes to the largest piece of the mask: the first may belong to a neighbour.
        left, top, *_ = cv2.boundingRect(max(lines, key=cv2.contourArea))
        left, top = x + left, max(10, y - 3 + top)
        # The text itself, shifted, makes the dark rim: OpenCV 5 spaces thicker letters wider.
        around = [(dx, dy, (0, 0, 0)) for dx in (-1, 0, 1) for dy in (-1, 0, 1)]
        for dx, dy, ink in [*around, (0, 0, (255, 255, 255))]:
            corner, font = (left + dx, top + dy), cv2.FONT_HERSHEY_SIMPLEX
            text = f"{100 * region.score:.0f}"
            cv2.putText(drawn, text, corner, font, size, ink, 1, cv2.LINE_AA)
    return drawn


class Reduced:
    """An image that arrives in bands of rows, kept so small that its longest side fits `longest`.

    Args:
        width: Of the image, pixels.
        height: Of the image, pixels.
        longest: Side of the result.
        smooth: Average the pixels, as for a photograph; else take one, as for class ids.
    """

    def __init__(self, width: int, height: int, longest: int, smooth: bool = True) -> None:
        self.factor = -(-max(width, height) // longest)
        self._how = cv2.INTER_AREA if smooth else cv2.INTER_NEAREST
        self._waiting: list[np.ndarray] = []  # fewer rows than `factor`
        self._parts: list[np.ndarray] = []

    def add(self, rows: np.ndarray) -> None:
        """Append uint8 [n,W,3] or [n,W]."""
        rows = np.concatenate([*self._waiting, rows])
        whole = len(rows) // self.factor * self.factor
        self._waiting = [rows[whole:].copy()]
        if whole:
            across = -rows.shape[1] % self.factor
            border = ((0, 0), (0, across), (0, 0))[: rows.ndim]
            blocks = np.pad(rows[:whole], border, "edge")
            size = blocks.shape[1] // self.factor, whole // self.factor
            self._parts.append(cv2.resize(blocks, size, interpolation=self._how))

    def image(self) -> np.ndarray:
        """All of it; an incomplete row or column of blocks repeats its last pixels."""
        (last,) = self._waiting
        self.add(np.repeat(last[-1:], -len(last) % self.factor, axis=0))
        return np.concatenate(self._parts)


class Crops:
    """Keeps the `count` regions for which `rank` is highest, and writes a contact sheet of them."""

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
            sheet[y : y + SIDE, x : x + SIDE] = _picture(scene, region)
        save(sheet, path)


def _picture(scene: Scene, region: Region) -> np.ndarray:
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
    return outline(small, [Region(region.label, region.score, *corner, mask)])
