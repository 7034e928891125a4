"""Pictures of predictions: outlines, an image reduced while it arrives, a sheet of regions."""

import heapq
import math
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common.io.pictures import class_colours, colour, legend, mark, save
from common.io.raster import Scene
from common.predict.regions import Region

SIDE, GAP = 160, 6  # of a picture on the sheet, and between two, pixels
LARGEST = 2048  # pixels of the scene that a picture shows, along one side


def outline(image: np.ndarray, regions: list[Region]) -> np.ndarray:
    """Mark each region in the colour of its class, with its score in per cent.

    Scores do not overlap: where there is no room, the region that comes later has none.

    Args:
        image: uint8 [H,W,3], RGB.
        regions: In the pixels of `image`.

    Returns:
        A new uint8 [H,W,3].
    """
    drawn = image.copy()
    for region in regions:
        mark(drawn, region.mask, colour(region.label), region.x, region.y)
    font = ImageFont.load_default(max(10, min(image.shape[:2]) / 110))
    free = np.ones(image.shape[:2], bool)
    picture = Image.fromarray(drawn)
    pen = ImageDraw.Draw(picture)
    for region in regions:
        text = f"{region.score:.0%}"
        width, height = (round(side) + 2 for side in pen.textbbox((0, 0), text, font, "lt")[2:])
        # Beside the largest piece of the mask: the first may belong to a neighbour.
        pieces, _ = cv2.findContours(region.mask.astype(np.uint8), cv2.RETR_EXTERNAL, 2)
        if not pieces:
            continue
        left, top, right, bottom = cv2.boundingRect(max(pieces, key=cv2.contourArea))
        left, top = left + region.x, top + region.y
        right, bottom = left + right, top + bottom
        above, below, beside = top - height - 2, bottom + 2, right + 2
        for x, y in ((left, above), (left, below), (beside, top), (left - width - 2, top)):
            room = free[max(y, 0) : y + height, max(x, 0) : x + width]
            if room.shape == (height, width) and room.all():
                room[:] = False
                pen.text(
                    (x + 1, y + 1), text, "white", font, "lt", stroke_width=1, stroke_fill="black"
                )
                break
    return np.asarray(picture)


def with_legend(picture: np.ndarray, classes: list[str]) -> np.ndarray:
    """The picture with a legend in its lower left corner, if that hides less than a tenth."""
    size = max(11, round(min(picture.shape[:2]) / 90))
    box = legend(class_colours(classes), picture.shape[1], size)
    used = int(np.flatnonzero((box < 255).any((0, 2))).max(initial=0)) + size
    if box[:, :used].size < picture.size / 10:
        picture = picture.copy()
        picture[-len(box) :, :used] = box[:, :used]
    return picture


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

    def write(self, scene: Scene, path: Path, classes: list[str]) -> None:
        """Write the sheet, the highest rank first, at one scale; nothing if there are no regions.

        The scale is that of the largest region, or of one four times as long as the median one.
        """
        best = heapq.nlargest(self.count, self._best, self.rank)
        if not best:
            return
        longest = [max(r.box[2] - r.box[0], r.box[3] - r.box[1]) for r in best]
        largest = min(max(longest), 4 * float(np.median(longest)))
        side = min(max(32, round(1.4 * largest)), LARGEST)
        columns, step = min(len(best), 8), SIDE + GAP
        width = max(columns, 3) * step - GAP
        head = np.vstack([legend(class_colours(classes), width), _scale_bar(scene, side, width)])
        sheet = np.full((-(-len(best) // columns) * step + len(head), width, 3), 255, np.uint8)
        # From the top down, the only way to read a PNG or JPEG.
        for position, region in sorted(enumerate(best), key=lambda item: sum(item[1].box[1::2])):
            y, x = (step * k for k in divmod(position, columns))
            sheet[y : y + SIDE, x : x + SIDE] = _picture(scene, region, side)
        sheet[-len(head) :] = head
        save(sheet, path)


def _scale_bar(scene: Scene, side: int, width: int) -> np.ndarray:
    """A bar of 1, 2 or 5 times a power of ten metres (or pixels): uint8 [H,width,3]."""
    unit, pixel = ("m", scene.gsd) if scene.gsd else ("pixels", 1.0)
    third = side * pixel / 3
    power = 10 ** math.floor(math.log10(third))
    length = max(power * k for k in (1, 2, 5) if power * k <= third)
    strip = legend({f"{length:g} {unit}": "white"}, width).copy()
    strip[-4:-1, GAP : GAP + round(length / pixel * SIDE / side)] = 0
    return strip


def _picture(scene: Scene, region: Region, side: int) -> np.ndarray:
    """A square of the scene, `side` pixels long, around a region: uint8 [SIDE,SIDE,3]."""
    left, top, right, bottom = region.box
    x = max(0, min((left + right - side) // 2, scene.width - side))
    y = max(0, min((top + bottom - side) // 2, scene.height - side))
    pixels, _ = scene.read(x, y, min(side, scene.width), min(side, scene.height))
    square = np.zeros((side, side, 3), np.uint8)
    square[: pixels.shape[0], : pixels.shape[1]] = pixels
    cut = region.mask[max(0, y - top) : y + side - top, max(0, x - left) : x + side - left]
    scale = SIDE / side
    shape = [max(1, round(length * scale)) for length in cut.shape[::-1]]
    mask = cv2.resize(cut.astype(np.uint8), shape, interpolation=cv2.INTER_NEAREST) > 0
    small = cv2.resize(square, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    corner = round((max(left, x) - x) * scale), round((max(top, y) - y) * scale)
    mask = mask[: SIDE - corner[1], : SIDE - corner[0]]
    return outline(small, [Region(region.label, region.score, *corner, mask)])
