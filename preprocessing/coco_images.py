"""The images of a COCO file as the tiling sees them, and the classes of their outlines."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from pycocotools import mask as rle

from common.cli import UserError
from common.io.folders import Names, names_in
from common.io.look import AS_IT_IS, Look
from common.io.raster import Scene, open_scene
from preprocessing.coco_file import Id, read_coco
from preprocessing.outlines import box_run_lengths, run_lengths
from preprocessing.own_data import Classes, class_name, scene_names
from preprocessing.tiles import MAX_OBJECTS, Labels, Thing

MAX_PIXELS = 500_000_000  # of an image: its labels and its pixels are in memory, 4 to 5 bytes each
CROWD = "with iscrowd 1, regions to ignore (--no-crowds takes each for one object)"
UNREADABLE = "without an outline that can be read (their boxes, if they have any, are ignored)"
NOWHERE = "without a pixel in their image"
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")  # other white space may be in a name


@dataclass(frozen=True, slots=True)
class Reading:
    """How a file is to be understood.

    With `crowds`, an outline with iscrowd 1 is a region to ignore, otherwise one object. `look` is
    how the images become RGB; unless it is `upright`, outlines are on the stored pixels, otherwise
    on the image as its EXIF orientation shows it.
    """

    crowds: bool = True
    look: Look = AS_IT_IS


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
        with self._open() as scene:
            size, look = (scene.width, scene.height), scene.record()
            if self.size not in (None, size):
                raise self._mismatch(size)
            valid = None if scene.all_valid else scene.read(0, 0, *size)[1]
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
        if valid is not None:
            ids[~valid] = 0
        pixels = np.bincount(ids[ids > 0], minlength=len(runs) + 1)[1:].tolist()
        things = [
            Thing(*self.categories[item["category_id"]], n, reason or ("" if a else NOWHERE))
            for item, n, a, reason in zip(self.annotations, pixels, area, ignored, strict=True)
        ]
        return Labels(ids, things, valid, look)

    def image(self, size: tuple[int, int]) -> np.ndarray:
        """The image as uint8 [H,W,3]: blue, green, red."""
        with self._open() as scene:
            pixels, _ = scene.read(0, 0, *size)
        return np.ascontiguousarray(pixels[:, :, ::-1])

    def _open(self) -> AbstractContextManager[Scene]:
        return open_scene(self.path, self.reading.look, MAX_PIXELS)

    def _mismatch(self, size: tuple[int, int]) -> UserError:
        assert self.size is not None
        actual, stated = (f"{w}x{h}" for w, h in (size, self.size))
        upright = self.reading.look.upright
        with open_scene(self.path, replace(self.reading.look, upright=not upright)) as scene:
            other = scene.width, scene.height
        if other != self.size:
            return UserError(
                f"image {str(self.path)!r} has {actual} pixels, but the annotations state {stated}."
            )
        if not upright:
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
    path: Path, folder: Path, reading: Reading, number: Callable[[list[str], list[str]], Classes]
) -> tuple[dict[str, CocoImage], Classes, Counter[str]]:
    """The images of a COCO file by file name, and its classes.

    Args:
        path: The COCO file.
        folder: The folder that its file names are relative to.
        reading: How it is to be understood.
        number: Numbers its classes, from their names and from those of all its categories.

    Returns:
        Also the numbers of annotations that are left out, by the reason.

    Raises:
        UserError: No such file, not a COCO instance file, an entry that contradicts another, only
            boxes, or `number` raised it.
    """
    data = read_coco(path)
    annotations = data["annotations"]
    if annotations and not any(a.get("segmentation") for a in annotations):
        raise UserError(
            f"{str(path)!r} has boxes but no outlines, and training needs outlines (polygons or "
            "run lengths); mask/README.md says how boxes are scored against such a file."
        )
    classes = number(*_class_names(data, path))
    categories = {
        c["id"]: classes.of[c["name"]] for c in data["categories"] if c["name"] in classes.of
    }
    # An image may be listed under several ids, as in a merge of two files.
    sizes: dict[str, tuple[int, int]] = {}
    name_of: dict[Id, str] = {}
    for entry in data["images"]:
        name = name_of[entry["id"]] = entry["file_name"]
        size = entry["width"], entry["height"]
        if entry["width"] and sizes.setdefault(name, size) != size:
            raise UserError(f"{str(path)!r} states two sizes of the image {name!r}.")
    if not name_of:
        raise UserError(f"{str(path)!r} lists no image.")
    outlined: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for item in annotations:
        outlined[name_of[item["image_id"]]].append(item)
    # Label Studio and labelme write the folder's own name before each file name.
    prefix = folder.resolve().name
    prefix = "" if (folder / prefix).is_dir() else prefix
    listed = cache(names_in)
    inside = {
        name: _relative(name, path, folder, prefix) for name in dict.fromkeys(name_of.values())
    }
    stems = scene_names(inside)
    images = {
        name: CocoImage(
            _on_disk(folder, inside[name], listed),
            stems[name],
            sizes.get(name),
            outlined[name],
            categories,
            reading,
        )
        for name in inside
    }
    return images, classes, data["left_out"]


def _class_names(data: dict[str, Any], path: Path) -> tuple[list[str], list[str]]:
    """The names of the classes, in the file's order, and those of all categories.

    Two kinds of categories are not classes if they have no annotations: a heading, the
    supercategory of others (Roboflow's exports begin with one), and a background (labelme).
    """
    above: dict[str, Any] = {}  # name → supercategory
    for category in data["categories"]:
        above.setdefault(category["name"], class_name(category.get("supercategory")))
    if len(above) < len(data["categories"]):
        print(f"{str(path)!r} has categories of the same name; they are one class")
    used = {a["category_id"] for a in data["annotations"]}
    kept = {category["name"] for category in data["categories"] if category["id"] in used}
    headings = [heading for name, heading in above.items() if heading != name]
    headings += [name for name in above if name.strip("_").casefold() == "background"]
    return [name for name in above if name in kept or name not in headings], list(above)


def _on_disk(folder: Path, inside: PurePosixPath, listed: Callable[[Path], Names]) -> Path:
    """The path of an image, whose name may be on the disk in another Unicode form."""
    if str(inside).isascii():
        return folder / inside
    for part in inside.parts:
        folder /= listed(folder).find(part, folder) or part
    return folder


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
    if not parts or leads_out or CONTROL.search(name):
        raise UserError(
            f"{str(path)!r} names an image outside the folder of images: {name[:99]!r}; file names "
            f"must be relative to {str(folder)!r}."
        )
    return PurePosixPath(*parts)
