"""Reads COCO files from any source and checks what later code relies on."""

import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from common.cli import UserError
from common.io.files import read_json

MAX_SIDE = 1 << 15
_EXACT = 1 << 53  # up to here a floating-point number is one whole number
_NUMBER = re.compile(r"0|-?[1-9][0-9]{0,99}")

Id = int | str


def read_coco(path: Path, lenient: bool = False) -> dict[str, Any]:
    """The `images`, `annotations` and `categories` of a COCO file, lists of dicts.

    The ids of images and categories are as `as_id` gives them and occur once; sides are 1 to
    `MAX_SIDE`; an annotation's image and category are in the file, and its `iscrowd` is 0 or 1;
    names can be printed. Categories of the same name are one, see `merge_classes`. The ids of
    annotations and their outlines are not checked, see `common.io.outlines`.

    Args:
        path: The file.
        lenient: Leave out annotations for which this does not hold; `left_out` counts them by the
            reason. An image may lack `width` and `height`, which are None then.

    Raises:
        UserError: As `read_json`, or one of these does not hold.
    """
    coco = read_json(path)

    def fail(what: str) -> UserError:
        return UserError(f"{str(path)!r} is not a COCO file: {what}.")

    if not isinstance(coco, dict):
        raise fail("it is not a JSON object")
    for name in ("images", "categories", "annotations"):
        entries = coco.get(name)
        if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            raise fail(f"{name!r} is not a list of objects")
    check_image = partial(_image, needs_size=not lenient)
    for name, check in (("images", check_image), ("categories", _category)):
        if wrong := next(filter(None, map(check, coco[name])), None):
            raise fail(f"{name} has an entry whose {wrong} is missing or invalid")
        if len({entry["id"] for entry in coco[name]}) < len(coco[name]):
            raise fail(f"{name} has the same id twice")
    images = {image["id"] for image in coco["images"]}
    categories = {category["id"] for category in coco["categories"]}
    kept = []
    left_out: Counter[str] = Counter()
    for number, annotation in enumerate(coco["annotations"], start=1):
        image, category = as_id(annotation.get("image_id")), as_id(annotation.get("category_id"))
        crowd = annotation.get("iscrowd") or 0
        if image is None or image not in images:
            why = "of images that are not listed"
            what = f"is in image {short(annotation.get('image_id'))}, which is not listed"
        elif category is None or category not in categories:
            why = "of categories that are not listed"
            what = f"has category {short(annotation.get('category_id'))}, which is not listed"
        elif crowd not in (0, 1):
            why = "with an iscrowd that is neither 0 nor 1"
            what = "has an iscrowd that is neither 0 nor 1"
        else:
            annotation |= {"image_id": image, "category_id": category, "iscrowd": int(crowd)}
            kept.append(annotation)
            continue
        if not lenient:
            raise fail(f"annotation {number} {what}")
        left_out[why] += 1
    coco["annotations"], coco["left_out"] = kept, left_out
    coco["category_of"] = {category: category for category in categories}
    merge_classes(coco)
    return coco


def merge_classes(coco: dict[str, Any]) -> None:
    """Make one category of those with the same name, the first of them.

    `category_of` has the remaining category of every id that the file lists.
    """
    first: dict[str, Id] = {}
    same = {c["id"]: first.setdefault(c["name"], c["id"]) for c in coco["categories"]}
    coco["categories"] = [c for c in coco["categories"] if same[c["id"]] == c["id"]]
    coco["category_of"] = {old: same[new] for old, new in coco["category_of"].items()}
    for annotation in coco["annotations"]:
        annotation["category_id"] = same[annotation["category_id"]]


def as_id(value: Any) -> Id | None:
    """An id in the form in which ids are compared: 7, 7.0 and "7" are one; None for no id."""
    if type(value) is int:
        return value
    if type(value) is float and value.is_integer() and abs(value) < _EXACT:
        return int(value)
    if isinstance(value, str) and 0 < len(value) <= 200:
        return int(value) if _NUMBER.fullmatch(value) else value
    return None


def is_id(value: Any) -> bool:
    """Whether a value is a whole number, and not a boolean."""
    return type(value) is int


def short(value: Any) -> str:
    """A value as an error message shows it."""
    return ascii(value)[:40] if isinstance(value, int | float | None) else ascii(str(value)[:40])


def _image(entry: dict[str, Any], needs_size: bool) -> str | None:
    entry["id"] = as_id(entry.get("id"))
    if entry["id"] is None:
        return "'id'"
    sides = entry.get("width"), entry.get("height")
    entry["width"], entry["height"] = map(as_id, sides)
    if not any(sides) and not needs_size:  # VIA has 0 for a picture that it never showed
        entry["width"] = entry["height"] = None
    else:
        for side in ("width", "height"):
            if not is_id(entry[side]) or not 0 < entry[side] <= MAX_SIDE:
                return f"{side!r}, a whole number up to {MAX_SIDE},"
    return None if isinstance(entry.get("file_name"), str) else "'file_name'"


def _category(entry: dict[str, Any]) -> str | None:
    entry["id"] = as_id(entry.get("id"))
    if entry["id"] is None:
        return "'id'"
    name = entry.get("name")
    fine = isinstance(name, str) and 0 < len(name) <= 100 and name.isprintable()
    return None if fine else "'name', up to 100 letters that can be printed,"
