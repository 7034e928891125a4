"""The images of a COCO file as the tiling sees them, and the classes of their outlines."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as rle

from common.cli import UserError
from common.io.images import image_size, read_image
from common.io.tiles import IGNORE
from preprocessing.coco_file import Id, read_coco
from preprocessing.outlines import box_run_lengths, run_lengths
from preprocessing.tiles import MAX_OBJECTS, Labels, Thing, scene_name

CROWD = "with iscrowd 1, regions to ignore (--no-crowds takes each for one object)"
UNREADABLE = "without an outline that can be read (their boxes, if they have any, are ignored)"
NOWHERE = "without a pixel in their image"


@dataclass(frozen=True, slots=True)
class Reading:
    """How a file is to be understood.

    `rename` maps categories to new names. With `crowds`, an outline with iscrowd 1 is a region to
    ignore, otherwise one object. With `as_stored`, outlines are on the stored pixels, otherwise on
    the image as its EXIF orientation shows it.
    """

    rename: Mapping[str, str]
    crowds: bool = True
    as_stored: bool = False


@dataclass(frozen=True, slots=True)
class CocoImage:
    """An image of a COCO dataset, as the tiling sees it.

    `size` is what the file states, None if it states nothing. `categories` maps each category id
    of the file to our number, from 1, and its name.
    """

    path: Path
    stem: str
    size: tuple[int, int] | None
    annotations: list[dict[str, Any]]
    categories: dict[Id, tuple[int, str]]
    reading: Reading

    @property
    def airport(self) -> str:
        """COCO has no airports, so each image counts as its own."""
        return self.stem

    def files(self) -> list[Path]:
        return [self.path]

    def labels(self) -> Labels:
        """Paint the outlines: ignored ones first, then large objects before small ones.

        If an object's outline cannot be read, its box is ignored, because it is not ground either.
        """
        size = image_size(self.path, self.reading.as_stored)
        if self.size not in (None, size):
            raise self._mismatch(size)
        if len(self.annotations) > MAX_OBJECTS:
            raise UserError(
                f"image {str(self.path)!r} has {len(self.annotations)} outlines; at most "
                f"{MAX_OBJECTS} are supported."
            )
        runs: list[dict[str, Any] | None] = []
        ignored: list[str] = []
        for item in self.annotations:
            reason = CROWD if item["iscrowd"] and self.reading.crowds else ""
            try:
                runs.append(run_lengths(item, size))
            except UserError:
                reason = UNREADABLE
                runs.append(box_run_lengths(item, size))
            ignored.append(reason)
        # int, because -area of an unsigned 32-bit number wraps
        area = [int(rle.area(r)) if r else 0 for r in runs]
        ids = np.zeros(size[::-1], np.uint8 if len(runs) < 256 else np.uint16)
        for i in sorted(range(len(runs)), key=lambda i: (not ignored[i], -area[i])):
            if area[i]:
                x, y, w, h = (int(v) for v in rle.toBbox(runs[i]))
                inside = rle.decode(runs[i])[y : y + h, x : x + w].astype(bool)
                ids[y : y + h, x : x + w][inside] = i + 1
        pixels = np.bincount(ids[ids > 0], minlength=len(runs) + 1)[1:].tolist()
        things = [
            Thing(*self.categories[item["category_id"]], n, reason or ("" if a else NOWHERE))
            for item, n, a, reason in zip(self.annotations, pixels, area, ignored, strict=True)
        ]
        return Labels(ids, things)

    def image(self, size: tuple[int, int]) -> np.ndarray:
        return read_image(self.path, cv2.IMREAD_COLOR, size, self.reading.as_stored)

    def _mismatch(self, size: tuple[int, int]) -> UserError:
        assert self.size is not None
        actual, stated = (f"{w}x{h}" for w, h in (size, self.size))
        if image_size(self.path, not self.reading.as_stored) != self.size:
            return UserError(
                f"image {str(self.path)!r} has {actual} pixels, but the annotations state {stated}."
            )
        if self.reading.as_stored:
            return UserError(
                f"image {str(self.path)!r} is stored as {actual} and shown as {stated}, as its "
                "EXIF orientation says; its outlines fit what is shown: leave out --ignore-exif."
            )
        return UserError(
            f"image {str(self.path)!r} is shown as {actual}, as its EXIF orientation says, and "
            f"stored as {stated}; its outlines fit only the stored pixels: add --ignore-exif if "
            "all were drawn on these, or else remove the orientation from this file."
        )


def read_dataset(
    path: Path, folder: Path, reading: Reading, classes: list[str] | None
) -> tuple[dict[str, CocoImage], list[str], Counter[str]]:
    """The images of a COCO file by file name, and the names of its classes.

    Args:
        path: The COCO file.
        folder: The folder that its file names are relative to.
        reading: How it is to be understood.
        classes: Those of the other splits; None for the file's categories in its order.

    Returns:
        Also the numbers of annotations that are left out, by the reason.

    Raises:
        UserError: no such file, not a COCO instance file, an entry that contradicts another, only
            boxes, or a class that is not among `classes`.
    """
    data = read_coco(path)
    annotations = data["annotations"]
    if annotations and not any(a.get("segmentation") for a in annotations):
        raise UserError(
            f"{str(path)!r} has boxes but no outlines, and training needs outlines (polygons or "
            "run lengths); mask/README.md says how boxes are scored against such a file."
        )
    names = _classes(data, path, reading.rename)
    if classes is not None and (extra := [name for name in names if name not in classes]):
        raise UserError(
            f"{str(path)!r} has the class {extra[0]!r} and the other splits have {classes}; add "
            "--rename OLD=NEW, or tile the file with the most classes first, into another folder."
        )
    if classes is not None and names != classes:
        print(f"the classes are those of the other splits: {', '.join(map(repr, classes))}")
    names = classes or names
    number = {name: n for n, name in enumerate(names, start=1)}
    name_of = {c["id"]: reading.rename.get(c["name"], c["name"]) for c in data["categories"]}
    categories = {i: (number[name], name) for i, name in name_of.items() if name in number}
    outlined: dict[Id, list[dict[str, Any]]] = defaultdict(list)
    for item in annotations:
        outlined[item["image_id"]].append(item)
    # Label Studio and labelme write the folder's own name before each file name.
    prefix = folder.resolve().name
    prefix = "" if (folder / prefix).is_dir() else prefix
    images: dict[str, CocoImage] = {}
    paths = {
        entry["file_name"]: _relative(entry["file_name"], path, folder, prefix)
        for entry in data["images"]
    }
    stem_count = Counter(inside.with_suffix("") for inside in paths.values())
    for entry in data["images"]:
        name = entry["file_name"]
        size = (entry["width"], entry["height"]) if entry["width"] else None
        if name in images:  # a merge of two files lists it under two ids
            if size not in (None, images[name].size):
                raise UserError(f"{str(path)!r} states two sizes of the image {name!r}.")
            images[name].annotations.extend(outlined[entry["id"]])
            continue
        inside = paths[name]
        images[name] = CocoImage(
            folder / inside,
            scene_name(inside, whole=stem_count[inside.with_suffix("")] > 1),
            size,
            outlined[entry["id"]],
            categories,
            reading,
        )
    if not images:
        raise UserError(f"{str(path)!r} lists no image.")
    stems = {image.stem.casefold() for image in images.values()}
    if len(stems) < len(images):
        raise UserError(
            f"{str(path)!r} lists images that differ only in case or folder; rename them."
        )
    return images, names, data["left_out"]


def _classes(data: dict[str, Any], path: Path, rename: Mapping[str, str]) -> list[str]:
    """The names of the classes, renamed, in the file's order; categories of one name are one class.

    Two kinds of categories are not classes if they have no annotations: a heading, the
    supercategory of others (Roboflow's exports begin with one), and a background (labelme).
    """
    above: dict[str, Any] = {}  # name → supercategory
    for category in data["categories"]:
        above.setdefault(category["name"], category.get("supercategory"))
    if len(above) < len(data["categories"]):
        print(f"{str(path)!r} has categories of the same name; they are one class")
    if unknown := [name for name in rename if name not in above]:
        raise UserError(
            f"--rename: {unknown[0]!r} is not in {str(path)!r}, which has {list(above)}."
        )
    used = {a["category_id"] for a in data["annotations"]}
    kept = {category["name"] for category in data["categories"] if category["id"] in used}
    headings = [heading for name, heading in above.items() if heading != name]
    headings += [name for name in above if name.strip("_").casefold() == "background"]
    names = [rename.get(n, n) for n in above if n in kept or n not in headings]
    names = list(dict.fromkeys(names))
    if not names:
        raise UserError(f"{str(path)!r} lists no category.")
    if "ground" in names:
        raise UserError(
            f"{str(path)!r} has a category 'ground', which is our name of pixels outside of all "
            "outlines; add --rename ground=NEW."
        )
    if len(names) >= IGNORE:
        raise UserError(
            f"{str(path)!r} has {len(names)} categories and a mask holds at most {IGNORE - 1}; "
            "make one of several with --rename A=NEW B=NEW."
        )
    return names


def _relative(name: str, path: Path, folder: Path, prefix: str) -> PurePosixPath:
    """A file name as a path within `folder`; Windows' separators are accepted.

    Args:
        name: From the COCO file.
        path: The COCO file.
        folder: Of the images.
        prefix: A first folder to leave out.

    Raises:
        UserError: The path leads out of `folder`.
    """
    inside = PurePosixPath(name.replace("\\", "/"))
    if inside.is_absolute() and inside.is_relative_to(folder.resolve()):
        inside = inside.relative_to(folder.resolve())
    parts = inside.parts[len(inside.parts) > 1 and inside.parts[0] == prefix :]
    leads_out = inside.is_absolute() or ".." in parts or re.match(r"[A-Za-z]:", name)
    if not parts or leads_out or not name.isprintable():
        raise UserError(
            f"{str(path)!r} names an image outside the folder of images: {name[:99]!r}; file names "
            f"must be relative to {str(folder)!r}."
        )
    return PurePosixPath(*parts)
