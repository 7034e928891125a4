"""COCO files that another program may have written, checked before the evaluation reads them."""

import math
from pathlib import Path
from typing import Any

from pycocotools import mask as rle

from common.cli import UserError
from common.io.coco import Id, as_id, read_coco, read_json, short
from common.io.outlines import run_lengths

SHAPES = {"bbox", "segmentation"}


def read_truth(path: Path) -> dict[str, Any]:
    """Read a COCO file from any source, and check all that the evaluation reads.

    A missing `bbox` or `area` is computed from the outline. If an annotation has no outline,
    `segmentation` is removed from all of them, and only boxes can be scored.
    """
    coco = read_coco(path)
    sizes = {image["id"]: (image["width"], image["height"]) for image in coco["images"]}
    boxes_only = not all(a.get("segmentation") for a in coco["annotations"])
    for number, a in enumerate(coco["annotations"], start=1):
        if boxes_only:
            a.pop("segmentation", None)
        else:
            runs = run_lengths(a, sizes[a["image_id"]])  # raises if it is invalid
            a["bbox"] = a.get("bbox") or rle.toBbox(runs).tolist()
            a["area"] = a["area"] if "area" in a else int(rle.area(runs))
        try:
            x, y, w, h = a["bbox"]
            a["area"] = a.get("area", w * h)
            fine = all(map(math.isfinite, (a["area"], x, y, w, h)))
        except (KeyError, TypeError, ValueError, OverflowError):
            fine = False
        if not fine:
            raise UserError(
                f"{str(path)!r}: annotation {number} has a missing or invalid area or bbox; write "
                "the file again."
            )
    return coco


def read_results(path: Path, coco: dict[str, Any]) -> list[dict[str, Any]]:
    """Read a results file from any source; refuse what COCO would silently ignore."""
    results = read_json(path)
    if not isinstance(results, list):
        raise UserError(f"{str(path)!r} holds no list of COCO results; name a predictions file.")
    sizes = {image["id"]: [image["height"], image["width"]] for image in coco["images"]}
    for number, result in enumerate(results, start=1):
        try:
            wrong = _what_is_wrong(result, sizes, coco["category_of"])
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
    result: dict[str, Any], sizes: dict[Id, list[int]], category_of: dict[Id, Id]
) -> str | None:
    """What the evaluation could not read; the ids become those of the set."""
    image, category = as_id(result["image_id"]), as_id(result["category_id"])
    if image is None or image not in sizes:
        return f"has the image id {short(result['image_id'])}, which is not in the set"
    if category is None or category not in category_of:
        return f"has the category id {short(result['category_id'])}, which is not in the set"
    result["image_id"], result["category_id"] = image, category_of[category]
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
