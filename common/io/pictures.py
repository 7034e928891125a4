"""Draws masks on images, and sheets of image, truth and prediction."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from common.io.files import whole_file

SIDE = 320  # of a picture in a sheet or on a page, pixels
# Class 0, the ground, is not painted; from class 2 on, Okabe and Ito's colour-blind safe palette.
# Class 1 is a magenta that nothing on an airport has.
COLOURS = "000000 e10098 e69f00 56b4e9 009e73 f0e442 0072b2 d55e00 cc79a7"
PALETTE = [(int(c[:2], 16), int(c[2:4], 16), int(c[4:], 16)) for c in COLOURS.split()]


def colour(class_id: int) -> tuple[int, int, int]:
    """RGB of a class; beyond eight classes the colours repeat."""
    return PALETTE[0 if class_id == 0 else 1 + (class_id - 1) % (len(PALETTE) - 1)]


def paint(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Paint the classes of `mask` on `image`: a tint inside, a solid line around each region.

    Args:
        image: uint8 [H,W,3], RGB.
        mask: uint8 [H,W], class ids; 255 (ignore) is grey.

    Returns:
        A new uint8 [H,W,3].
    """
    painted = image.copy()
    for class_id in np.unique(mask):
        if class_id == 0:
            continue
        region = mask == class_id
        tint = (128, 128, 128) if class_id == 255 else colour(int(class_id))
        painted[region] = (image[region] * 0.5 + np.array(tint) * 0.5).astype(np.uint8)
        outline, _ = cv2.findContours(region.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        width = max(1, round(min(image.shape[:2]) / 500))
        cv2.drawContours(painted, outline, -1, tint, width, cv2.LINE_AA)
    return painted


def triple(image: np.ndarray, truth: np.ndarray, prediction: np.ndarray) -> list[np.ndarray]:
    """The image, and painted with either mask, at `SIDE` pixels a side."""
    pictures = image, paint(image, truth), paint(image, prediction)
    return [cv2.resize(p, (SIDE, SIDE), interpolation=cv2.INTER_AREA) for p in pictures]


class Sheet:
    """A contact sheet of some scored tiles, a row of image, truth and prediction for each.

    The tiles are spread evenly over those that show an aircraft, or over all if none does.

    Args:
        batches: For each batch that will be scored, the indices of its tiles in the set.
        shows_aircraft: Whether the tile at an index shows an aircraft.
        count: The largest number of rows.
    """

    def __init__(
        self, batches: list[list[int]], shows_aircraft: Callable[[int], bool], count: int = 4
    ) -> None:
        tiles = [(n, row) for n, batch in enumerate(batches) for row in range(len(batch))]
        candidates = [(n, row) for n, row in tiles if shows_aircraft(batches[n][row])] or tiles
        count = min(count, len(candidates))
        self._chosen = [candidates[k * len(candidates) // count] for k in range(count)]
        self.rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def chosen(self, number: int) -> list[int]:
        """Which tiles of batch `number` are rows of the sheet."""
        return [row for batch, row in self._chosen if batch == number]

    def add(self, image: np.ndarray, truth: np.ndarray, prediction: np.ndarray) -> None:
        """Append a row: uint8 [H,W,3], RGB, and two masks, uint8 [H,W], as `paint` takes them."""
        self.rows.append((image, truth, prediction))

    def write(self, path: Path, title: str) -> None:
        """Write the sheet; nothing if there are no rows."""
        if not self.rows:
            return
        gap, head = 10, 46
        step = SIDE + gap
        sheet = np.full((head + len(self.rows) * step, gap + 3 * step, 3), 255, np.uint8)
        for r, row in enumerate(self.rows):
            for c, picture in enumerate(triple(*row)):
                y, x = head + r * step, gap + c * step
                sheet[y : y + SIDE, x : x + SIDE] = picture
        font = cv2.FONT_HERSHEY_SIMPLEX
        for c, label in enumerate(("image", "truth", "prediction")):
            corner = gap + c * step, head - 8
            cv2.putText(sheet, label, corner, font, 0.5, (70, 70, 70), 1, cv2.LINE_AA)
        cv2.putText(sheet, title, (gap, 18), font, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
        save(sheet, path)


def save(pixels: np.ndarray, path: Path) -> None:
    """Write a picture completely or not at all; the suffix of `path` chooses the format.

    Args:
        pixels: uint8 [H,W,3] RGB, or [H,W] class ids, which a PNG stores with the palette.
        path: `.png` for data to compute with, `.jpg` (a fifth of the bytes) for a picture to view.
    """
    picture = Image.fromarray(pixels)
    if pixels.ndim == 2:
        picture.putpalette([channel for i in range(256) for channel in colour(i)])
    kind = "JPEG" if path.suffix == ".jpg" else "PNG"
    with whole_file(path) as file:
        picture.save(file, kind, quality=90, compress_level=4)  # each format takes its own option
