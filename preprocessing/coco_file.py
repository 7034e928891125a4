"""Reads COCO files from any source and checks what later code relies on."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

from common.cli import UserError
from common.io.files import read_json
from common.io.tiles import MAX_SIDE
from preprocessing.own_data import class_name

_EXACT = 1 << 53  # up to here a floating-point number is one whole number
_NUMBER = re.compile(r"0|-?[1-9][0-9]{0,99}")

Id = int | str


def read_coco(path: Path) -> dict[str, Any]:
    """The `images`, `annotations` and `categories` of a COCO file, lists of dicts.

    The ids of images and categories are as `as_id` gives them and occur once; sides are 1 to
    `MAX_SIDE`, or None where an image lacks them; the names of categories are as `class_name` gives
    them. An annotation whose image or category is not in the file, or whose `iscrowd` is neither 0
    nor 1, is left out; `left_out` counts them by the reason. The ids of annotations and their
    outlines are not checked, see `preprocessing.outlines`.

    Raises:
        UserError: As `read_json`, or one of these does not hold.
    """
    coco = read_json(path)

    def fail(problem: str) -> UserError:
        return UserError(f"{str(path)!r} is not a COCO file: {problem}.")

    if not isinstance(coco, dict):
        raise fail("it is not a JSON object")
    for name in ("images", "categories", "annotations"):
        entries = coco.get(name)
        if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            raise fail(f"{name!r} is not a list of objects")
    ids: dict[str, set[Id]] = {}
    for name, check in (("images", _image), ("categories", _category)):
        for entry in coco[name]:
            entry["id"] = as_id(entry.get("id"))
            if wrong := "'id'" if entry["id"] is None else check(entry):
                raise fail(f"{name} has an entry whose {wrong} is missing or invalid")
        ids[name] = {entry["id"] for entry in coco[name]}
        if len(ids[name]) < len(coco[name]):
            raise fail(f"{name} has the same id twice")
    kept = []
    left_out: Counter[str] = Counter()
    for annotation in coco["annotations"]:
        image, category = as_id(annotation.get("image_id")), as_id(annotation.get("category_id"))
        crowd = annotation.get("iscrowd") or 0
        if image not in ids["images"]:
            left_out["of images that are not listed"] += 1
        elif category not in ids["categories"]:
            left_out["of categories that are not listed"] += 1
        elif crowd not in (0, 1):
            left_out["with an iscrowd that is neither 0 nor 1"] += 1
        else:
            annotation |= {"image_id": image, "category_id": category, "iscrowd": int(crowd)}
            kept.append(annotation)
    return coco | {"annotations": kept, "left_out": left_out}


def as_id(value: Any) -> Id | None:
    """An id in the form in which ids are compared: 7, 7.0 and "7" are one; None for no id."""
    if type(value) is int:
        return value
    if type(value) is float and value.is_integer() and abs(value) < _EXACT:
        return int(value)
    if isinstance(value, str) and 0 < len(value) <= 200:
        return int(value) if _NUMBER.fullmatch(value) else value
    return None


def _image(entry: dict[str, Any]) -> str:
    """What is missing or invalid in an image; empty if nothing is."""
    sides = entry.get("width"), entry.get("height")
    entry["width"], entry["height"] = map(as_id, sides)
    if not any(sides):  # VIA has 0 for a picture that it never showed
        entry["width"] = entry["height"] = None
    elif not all(
        type(entry[side]) is int and 0 < entry[side] <= MAX_SIDE for side in ("width", "height")
    ):
        return f"'width' or 'height', whole numbers up to {MAX_SIDE},"
    return "" if isinstance(entry.get("file_name"), str) else "'file_name'"


def _category(entry: dict[str, Any]) -> str:
    """What is missing or invalid in a category; empty if nothing is."""
    entry["name"] = class_name(entry.get("name"))
    return "" if entry["name"] else "'name', up to 100 letters that can be printed,"
