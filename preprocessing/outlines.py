"""COCO outlines: polygons and both kinds of run lengths, checked before C code reads them."""

from typing import Any

import numpy as np
from pycocotools import mask as rle

from common.cli import UserError

_FAR = 1 << 17  # pixels; no image is this wide
_LONGEST = 1 << 20  # pixels; a polygon takes 25 bytes or more per pixel of its length


def run_lengths(annotation: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """The outline of an annotation as compressed run lengths, clipped to the (width, height).

    If run lengths do not add up to the image, pycocotools reads beyond the end of its memory. It
    also takes a polygon of two points for a box. So both are checked here first. Parts of a polygon
    with one or two points are left out, as other readers do.

    Raises:
        UserError: The outline is missing or invalid.
    """
    width, height = size
    outline = annotation.get("segmentation")
    if isinstance(outline, list) and outline and not isinstance(outline[0], list):
        outline = [outline]  # VIA writes a single polygon without the outer list
    if isinstance(outline, list):
        outline = [part for part in outline if not isinstance(part, list) or len(part) > 5]
    if isinstance(outline, dict):
        counts = outline.get("counts")
        if isinstance(counts, str):
            counts = _decompress(counts)
        if outline.get("size") == [height, width] and _covers(counts, width * height):
            return rle.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    elif (
        isinstance(outline, list)
        and outline
        and all(map(_is_polygon, outline))
        and sum(map(_length, outline)) < _LONGEST
    ):
        polygons = [rle.frPyObjects([polygon], height, width)[0] for polygon in outline]
        return rle.merge(polygons)
    raise UserError(
        f"annotation {annotation.get('id')!r} has no outline that can be read: 'segmentation' is "
        f"neither polygons of three or more points (and less than {_LONGEST:,} pixels long) nor "
        f"run lengths of {width}x{height} pixels."
    )


def box_run_lengths(annotation: dict[str, Any], size: tuple[int, int]) -> dict[str, Any] | None:
    """The box of an annotation in the form of `run_lengths`; None if it has no valid `bbox`."""
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_near, box)):
        return None
    if box[2] <= 0 or box[3] <= 0:
        return None
    width, height = size
    return rle.frPyObjects(np.array([box], np.float64), height, width)[0]


def _is_near(value: Any) -> bool:
    return isinstance(value, int | float) and -_FAR < value < _FAR


def _is_polygon(points: Any) -> bool:  # those of fewer than three points are left out already
    return isinstance(points, list) and len(points) % 2 == 0 and all(map(_is_near, points))


def _length(points: list[float]) -> float:
    """The sum over a polygon's sides, each by its longer extent, along x or along y."""
    corners = np.reshape(np.array(points, float), (-1, 2))
    return float(np.abs(corners - np.roll(corners, 1, axis=0)).max(1).sum())


def _covers(counts: Any, pixels: int) -> bool:
    return (
        isinstance(counts, list)
        and all(isinstance(n, int) and n >= 0 for n in counts)
        and sum(counts) == pixels
    )


def _decompress(text: str) -> list[int]:
    """Run lengths from COCO's string: numbers in groups of 5 bits, from the fourth on differences.

    Empty if a number has more than 35 bits, so that it covers no image.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if shift > 30:  # no image has so many pixels
            return []
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    return counts
