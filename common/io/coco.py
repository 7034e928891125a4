"""Reads COCO files from any source and checks what later code relies on (no torch here)."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from common.cli import UserError
from common.io.files import read_file

MAX_BYTES = 1 << 31  # in memory a file takes several times its size
MAX_SIDE = 1 << 15
_HUGE = 1 << 53  # up to here every JSON reader reads the same whole number


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: It cannot be read, is larger than `MAX_BYTES`, or is not JSON.
    """
    data = read_file(path, "file", MAX_BYTES)
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise UserError(f"{str(path)!r} is not JSON, or is cut short; write it again.") from None


def read_coco(path: Path) -> dict[str, Any]:
    """The `images`, `annotations` and `categories` of a COCO file, lists of dicts.

    Ids are whole numbers and occur once; sides are 1 to `MAX_SIDE`; an annotation's image and
    category are in the file; names can be printed. Outlines are not checked here, see
    `common.io.outlines`.

    Raises:
        UserError: As `read_json`, or one of these does not hold.
    """
    coco = read_json(path)

    def fail(what: str) -> UserError:
        return UserError(f"{str(path)!r} is not a COCO file: {what}.")

    if not isinstance(coco, dict):
        raise fail("it is not a JSON object")
    for name, check in (("images", _image), ("categories", _category), ("annotations", None)):
        entries = coco.get(name)
        if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            raise fail(f"{name!r} is not a list of objects")
        if check is not None:
            if wrong := _first(entries, check):
                raise fail(f"{name} has an entry whose {wrong} is missing or invalid")
            if len({entry["id"] for entry in entries}) < len(entries):
                raise fail(f"{name} has the same id twice")
    images = {image["id"] for image in coco["images"]}
    categories = {category["id"] for category in coco["categories"]}
    for number, a in enumerate(coco["annotations"], start=1):
        image, category = a.get("image_id"), a.get("category_id")
        if not is_id(image) or image not in images:
            raise fail(f"annotation {number} is in image {short(image)}, which is not listed")
        if not is_id(category) or category not in categories:
            raise fail(f"annotation {number} has category {short(category)}, which is not listed")
        if a.get("iscrowd", 0) not in (0, 1):
            raise fail(f"annotation {number} has an iscrowd that is neither 0 nor 1")
    return coco


def is_id(value: Any) -> bool:
    """Whether a value is a whole number, and not a boolean."""
    return type(value) is int and -_HUGE < value < _HUGE


def short(value: Any) -> str:
    """A value as an error message shows it."""
    return ascii(value) if isinstance(value, int | float | None) else ascii(str(value)[:40])


def _first(
    entries: Iterable[dict[str, Any]], check: Callable[[dict[str, Any]], str | None]
) -> str | None:
    return next(filter(None, map(check, entries)), None)


def _image(entry: dict[str, Any]) -> str | None:
    if not is_id(entry.get("id")):
        return "'id'"
    for side in ("width", "height"):
        if not is_id(entry.get(side)) or not 0 < entry[side] <= MAX_SIDE:
            return f"{side!r}, a whole number up to {MAX_SIDE}"
    return None if isinstance(entry.get("file_name"), str) else "'file_name'"


def _category(entry: dict[str, Any]) -> str | None:
    if not is_id(entry.get("id")):
        return "'id'"
    name = entry.get("name")
    fine = isinstance(name, str) and 0 < len(name) <= 100 and name.isprintable()
    return None if fine else "'name', up to 100 letters that can be printed"
