"""COCO files that another program may have written, checked before the evaluation reads them."""

import math
from pathlib import Path
from typing import Any

from common.cli import UserError
from common.io.coco import is_id, read_coco, read_json, short
from common.io.outlines import run_lengths

SHAPES = {"bbox", "segmentation"}


def read_truth(path: Path) -> dict[str, Any]:
    """Read a COCO file from any source, and check all that the evaluation reads."""
    coco = read_coco(path)
    sizes = {image["id"]: (image["width"], image["height"]) for image in coco["images"]}
    for number, a in enumerate(coco["annotations"], start=1):
        try:
            plain = all(map(math.isfinite, (a["area"], *a["bbox"])))
            fine = plain and len(a["bbox"]) == 4 and is_id(a["id"]) and "iscrowd" in a
        except (KeyError, TypeError, OverflowError):
            fine = False
        if not fine:
            raise UserError(
                f"{str(path)!r}: annotation {number} has a missing or invalid id, area, bbox or "
                "iscrowd; name an instances_tiled.json."
            )
        run_lengths(a, sizes[a["image_id"]])  # raises if it is invalid
    return coco


def read_results(path: Path, coco: dict[str, Any]) -> list[dict[str, Any]]:
    """Read a results file from any source; refuse what COCO would silently ignore."""
    results = read_json(path)
    if not isinstance(results, list):
        raise UserError(f"{str(path)!r} holds no list of COCO results; name a predictions file.")
    sizes = {image["id"]: [image["height"], image["width"]] for image in coco["images"]}
    categories = {category["id"] for category in coco["categories"]}
    for number, result in enumerate(results, start=1):
        try:
            wrong = _what_is_wrong(result, sizes, categories)
        except (KeyError, TypeError, ValueError, OverflowError):
            wrong = "has a missing or invalid image_id, category_id, score, bbox or segmentation"
        if not wrong and SHAPES & result.keys() != SHAPES & results[0].keys():
            wrong = "has a bbox or a segmentation where detection 1 has none, or the reverse"
        if wrong:
            raise UserError(
                f"{str(path)!r}: detection {number} {wrong}; name results for the tiles of this "
                "set."
            )
    return results


def _what_is_wrong(
    result: dict[str, Any], sizes: dict[int, list[int]], categories: set[int]
) -> str | None:
    image, category = result["image_id"], result["category_id"]
    if not is_id(image) or image not in sizes:
        return f"has the image id {short(image)}, which is not in the set"
    if not is_id(category) or category not in categories:
        return f"has the category id {short(category)}, which is not in the set"
    if not SHAPES & result.keys():
        return "has neither bbox nor segmentation"
    x, y, w, h = result.get("bbox", [0, 0, 0, 0])
    if not all(map(math.isfinite, (result["score"], x, y, w, h))):
        return "has a score or a bbox that is not finite"
    if "segmentation" in result and not _is_mask(result["segmentation"], sizes[image]):
        return "has a mask that is not compressed run lengths of its tile's size"
    return None


def _is_mask(runs: Any, size: list[int]) -> bool:
    """Whether run lengths fill their image; if not, C code would read and write out of bounds."""
    if not isinstance(runs["counts"], str):
        return False
    try:
        run_lengths({"segmentation": runs}, (size[1], size[0]))
    except UserError:
        return False
    return True
