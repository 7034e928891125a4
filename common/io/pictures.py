"""Draws masks on images, and sheets of image, truth, prediction and errors."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from common.io.files import whole_file

SIDE, GAP = 320, 8  # of a picture in a sheet or on a page, and between two, pixels
# Class 0, the ground, is not painted; from class 2 on, Okabe and Ito's colour-blind safe palette.
# Class 1 is a magenta that nothing on an airport has.
COLOURS = "000000 e10098 e69f00 56b4e9 009e73 f0e442 0072b2 d55e00 cc79a7"
PALETTE = [ImageColor.getrgb(f"#{code}") for code in COLOURS.split()]
OUTCOMES = {"right": "#3b82f6", "missed": "#ffd60a", "false": "#e43c2e"}


def colour(class_id: int) -> tuple[int, ...]:
    """RGB of a class; beyond eight classes the colours repeat."""
    return PALETTE[class_id and 1 + (class_id - 1) % (len(PALETTE) - 1)]


def class_colours(classes: Sequence[str]) -> dict[str, str]:
    """The legend of a model's classes, without the ground: `#rrggbb`."""
    return {name: "#{:02x}{:02x}{:02x}".format(*colour(i)) for i, name in enumerate(classes) if i}


def legend(names: dict[str, str], width: int, size: int = 13) -> np.ndarray:
    """A square and a name for each colour, on white, in letters of `size` pixels: uint8 [H,W,3]."""
    font, left = ImageFont.load_default(size), size // 2
    strip = Image.new("RGB", (width, 2 * size), "white")
    pen = ImageDraw.Draw(strip)
    for name, tint in names.items():
        pen.rectangle((left, size // 2, left + size, size // 2 + size), tint)
        pen.text((left + 3 * size // 2, size), printable(name), "black", font, "lm")
        left += round(font.getlength(printable(name))) + 5 * size // 2
    return np.asarray(strip)


def printable(name: str) -> str:
    """A name from the data, without what no font can draw."""
    return "".join(c if c.isprintable() else "\ufffd" for c in name)


def paint(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Paint the classes of `mask` on `image`.

    Args:
        image: uint8 [H,W,3], RGB.
        mask: uint8 or uint16 [H,W]. The lower eight bits are the class; 255 (ignore) is grey. The
            upper eight tell regions of a class apart.

    Returns:
        A new uint8 [H,W,3].
    """
    painted = image.copy()
    for value in np.unique(mask[mask > 0]).tolist():
        tint = (128, 128, 128) if value % 256 == 255 else colour(value % 256)
        mark(painted, mask == value, tint)
    return painted


def mark(picture: np.ndarray, region: np.ndarray, tint: Any, x: int = 0, y: int = 0) -> None:
    """Tint a region, bool [h,w] at `x`, `y`, and draw a line around it that hides none of it."""
    part = picture[y : y + region.shape[0], x : x + region.shape[1]]
    part[region] = part[region] * 0.75 + np.array(tint) * 0.25
    around = cv2.dilate(np.pad(region, 1).astype(np.uint8), np.ones((3, 3)))
    lines, _ = cv2.findContours(around, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    width = max(1, round(min(picture.shape[:2]) / 1500))
    cv2.drawContours(picture, lines, -1, tint, width, cv2.LINE_AA, offset=(x - 1, y - 1))


def outcomes(truth: np.ndarray, prediction: np.ndarray) -> list[np.ndarray]:
    """Which pixels of two masks, as `paint` takes them, are right, missed and false: bool [H,W].

    Another class than the true one is false. Ground in both masks and ignored pixels are neither.
    """
    truth, prediction = truth & 255, prediction & 255
    right, counted = (truth == prediction) & (truth > 0), truth != 255
    false = (prediction > 0) & ~right & counted
    return [right & counted, (truth > 0) & (prediction == 0) & counted, false]


def compared(image: np.ndarray, truth: np.ndarray, prediction: np.ndarray) -> list[np.ndarray]:
    """The image, painted with either mask, and what is right in grey, at `SIDE` pixels a side."""
    errors = np.repeat(image.mean(2, keepdims=True) * 0.7, 3, 2).astype(np.uint8)
    for where, tint in zip(outcomes(truth, prediction), OUTCOMES.values(), strict=True):
        errors[where] = errors[where] * 0.3 + np.array(ImageColor.getrgb(tint)) * 0.7
    pictures = image, paint(image, truth), paint(image, prediction), errors
    return [cv2.resize(p, (SIDE, SIDE), interpolation=cv2.INTER_AREA) for p in pictures]


def sheet(rows: dict[str, list[np.ndarray]], title: str, classes: Sequence[str]) -> np.ndarray:
    """A row of `compared` pictures for each caption, under a title and a legend: uint8 [H,W,3]."""
    edge, width = ((0, GAP), (GAP, 0), (0, 0)), 4 * (SIDE + GAP)
    title = f"{title}: image, truth, prediction, errors:"
    parts = [legend({title: "white"} | OUTCOMES, width), legend(class_colours(classes), width)]
    for caption, pictures in rows.items():
        row = [np.pad(picture, edge, constant_values=255) for picture in pictures]
        parts += [legend({caption: "white"}, width), np.hstack(row)]
    return np.vstack(parts)


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
