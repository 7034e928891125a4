"""Tiles on disk: PNGs for each tile, or a whole split packed into two arrays.

Both forms have `read(indices, images, ids)`, which fills a batch with the tiles at `indices`:
`images` uint8 [B,H,W,3], RGB, and `ids` [B,H,W], whose dtype decides the ignore value: 255 in uint8
and 65535 in wider ones.
"""

import hashlib
import json
import struct
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from common.cli import UserError
from common.io.files import read_file, read_json

IGNORE = 255  # the class id of pixels left out of training and scores
MAX_SIDE = 1 << 15  # of a tile, pixels
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"  # the start of a file; width and height follow
FOUND = "found_tiled"  # the folder of a split into which unet/label.py writes
INDEX = "packed.json"
PACKED = ("images_tiled.npy", "masks_tiled.npy", INDEX)
"""Files of a packed split: uint8 [N,S,S,3], uint8 or uint16 [N,S,S], and their source."""


def read_index(folder: Path) -> dict[str, Any]:
    """The COCO file of a tiled split, with all that `common.data.Tiles` relies on.

    Raises:
        UserError: The file is missing or invalid, or it lists no tiles.
    """
    index = folder / "instances_tiled.json"
    command = (
        f"`python preprocessing/preprocess.py {folder.parent}`, or those of a COCO file with "
        f"`python preprocessing/coco.py IMAGES FILE.json -o {folder.parent} --as {folder.name}`"
    )
    if not folder.is_dir():
        raise UserError(f"there is no folder {str(folder)!r}; make its tiles with {command}.")
    if not index.is_file():
        raise UserError(
            f"{str(folder)!r} holds no tiles ({index.name!r} is missing); make its tiles with "
            f"{command}."
        )
    coco = read_json(index)
    try:
        _check(coco)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = error if isinstance(error, ValueError) else f"invalid entries, {error!r:.80}"
        raise UserError(
            f"{str(index)!r} is not as preprocessing wrote it ({reason}); make the tiles again."
        ) from None
    if not coco["images"]:
        raise UserError(
            f"{str(index)!r} lists no tiles; tile again, with --negatives 100 if no scene shows an "
            "aircraft."
        )
    return coco


def _check(coco: dict[str, Any]) -> None:
    """Check ids, sides, names, and the numbers of the aircraft.

    Raises:
        ValueError: Something is invalid. AttributeError, KeyError, TypeError: It is missing.
    """
    images = {image["id"]: image for image in coco["images"]}
    categories = {category["id"]: category["name"] for category in coco["categories"]}
    sides = [image[side] for image in coco["images"] for side in ("width", "height")]
    if {type(number) for number in (*images, *categories, *sides)} - {int}:
        raise ValueError("ids or sides that are not whole numbers")
    if len(images) < len(coco["images"]) or len(categories) < len(coco["categories"]):
        raise ValueError("an id occurs twice")
    if not all(0 < side <= MAX_SIDE for side in sides):
        raise ValueError(f"a tile's side is not from 1 to {MAX_SIDE}")
    if any("/" in image["file_name"] or "\0" in image["file_name"] for image in images.values()):
        raise ValueError("a tile outside its folder")
    if not all(name.isprintable() and 0 < len(name) <= 100 for name in categories.values()):
        raise ValueError("a category without a name that can be printed")
    if len(set(categories.values())) < len(categories):
        raise ValueError("two categories of one name")
    numbers: dict[int, list[int]] = {image: [] for image in images}
    for annotation in coco["annotations"]:
        if not annotation.get("iscrowd", 0):
            numbers[annotation["image_id"]].append(annotation["instance"])
            categories[annotation["category_id"]]
    if any(sorted(ids) != list(range(1, len(ids) + 1)) for ids in numbers.values()):
        raise ValueError("the aircraft of a tile are not numbered from 1")


class Pngs:
    """A pair of PNG files for each tile; an image's `set` is the folder of its split."""

    def __init__(self, images: list[dict], aircraft: list[int]) -> None:
        self.aircraft = aircraft
        folders = {text: Path(text) for text in {image["set"] for image in images}}
        self.names = [(folders[image["set"]], image["file_name"]) for image in images]
        # One listing per folder: `stat` per tile is slow on a network disk.
        files = {path for f in folders.values() for path in f.glob("*_tiled/*.png")}
        for path in chain.from_iterable(tile_paths(*name) for name in self.names):
            if path not in files:
                raise UserError(
                    f"{str(path)!r} is listed in instances_tiled.json but is missing; make the "
                    "tiles again."
                )

    def read(self, indices: list[int], images: np.ndarray, ids: np.ndarray) -> None:
        for row, i in enumerate(indices):
            read_tile(*self.names[i], self.aircraft[i], images[row], ids[row])


class Packed:
    """The arrays that `--pack` wrote; their labels were checked when they were packed.

    Args:
        folder: The split, which contains `INDEX`.
        images: The images of its COCO file.
        mask_dtype: The dtype that its COCO file requires.

    Raises:
        UserError: The arrays are missing, cut short or packed from other tiles.
    """

    def __init__(self, folder: Path, images: list[dict], mask_dtype: np.dtype) -> None:
        self.folder, self.mask_dtype = folder, mask_dtype
        self.square = (len(images), images[0]["width"], images[0]["width"])
        try:
            source = json.loads((folder / INDEX).read_bytes())["instances_sha256"]
        except (ValueError, KeyError, TypeError):
            source = None
        if source != hash_of_index(folder):
            raise self._error(INDEX, "does not fit the instances_tiled.json beside it")
        self.arrays  # noqa: B018  opened now, so that damage is found before the training begins

    def read(self, indices: list[int], images: np.ndarray, ids: np.ndarray) -> None:
        for source, target in zip(self.arrays, (images, ids), strict=True):
            if source.dtype == target.dtype:
                # No index is out of bounds. With mode="raise" numpy would copy through a buffer.
                np.take(source, indices, axis=0, out=target, mode="wrap")
            else:
                target[...] = source[indices]

    @cached_property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Images and masks, mapped read-only: pages are read on use and shared by processes."""
        return (
            self._open(PACKED[0], np.dtype(np.uint8), (*self.square, 3)),
            self._open(PACKED[1], self.mask_dtype, self.square),
        )

    def __getstate__(self) -> dict[str, Any]:
        """A loader process maps the files itself: pickling a mapped array would copy them."""
        return {name: value for name, value in vars(self).items() if name != "arrays"}

    def _open(self, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        try:
            array = np.lib.format.open_memmap(self.folder / name, mode="r")
        except FileNotFoundError:
            raise self._error(name, "is not there") from None
        except (OSError, ValueError):
            raise self._error(name, "is cut short or damaged") from None
        if array.shape != shape or array.dtype != dtype:
            raise self._error(name, f"holds {array.dtype} {array.shape}, not {dtype} {shape}")
        return array.view(np.ndarray)  # np.memmap takes several times as long to index

    def _error(self, name: str, what: str) -> UserError:
        return UserError(
            f"{str(self.folder / name)!r} {what}; make the tiles again with --pack, or delete "
            f"{INDEX} to read the PNGs."
        )


def hash_of_index(folder: Path) -> str:
    """The hash of a split's COCO file, by which `INDEX` names the tiles that were packed."""
    with (folder / "instances_tiled.json").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def mask_dtype(aircraft: list[int]) -> np.dtype:
    """Dtype of a set's masks, from the number of aircraft in each tile; its maximum is ignore."""
    return np.dtype(np.uint8 if max(aircraft, default=0) <= 254 else np.uint16)


def airport_of(image: dict[str, Any]) -> str | None:
    """The airport of a tile in a split's COCO file.

    None where it is unknown: `coco.py` makes each image an airport of its own, so that validation
    never shows ground of a training image.
    """
    airport = image.get("airport")
    return None if airport is None or airport == image.get("scene") else str(airport)


def tile_paths(folder: Path, name: str) -> tuple[Path, Path]:
    """Paths of a tile's image and mask, from the image's name."""
    return folder / "images_tiled" / name, folder / "masks_tiled" / f"{Path(name).stem}_mask.png"


def read_tile(folder: Path, name: str, aircraft: int, image: np.ndarray, ids: np.ndarray) -> None:
    """Decode the PNGs of a tile into `image` and `ids`, which have its size.

    Raises:
        UserError: A file is missing, damaged or of another size, or the mask does not fit its
            number of aircraft.
    """
    image_path, mask_path = tile_paths(folder, name)
    words = "tile", "make the tiles again"
    image[...] = read_png(image_path, cv2.IMREAD_COLOR_RGB, ids.shape, *words)
    mask = read_png(mask_path, cv2.IMREAD_UNCHANGED, ids.shape, *words)
    if mask.ndim != 2:
        raise UserError(f"{str(mask_path)!r} has {mask.shape[2]} channels instead of one.")
    # Adding one wraps the ignore value to 0, so that one pass finds the largest id.
    if int((mask + mask.dtype.type(1)).max()) > aircraft + 1:
        raise UserError(
            f"{str(mask_path)!r} holds values above its {aircraft} aircraft; make the tiles again."
        )
    ids[...] = mask
    if ids.itemsize > mask.itemsize:
        ids[mask == np.iinfo(mask.dtype).max] = 65535


def read_png(path: Path, flags: int, shape: tuple[int, ...], kind: str, remedy: str) -> np.ndarray:
    """Decode a PNG that must have this height and width; `flags` are those of `cv2.imdecode`.

    Given bytes, OpenCV refuses a truncated file; given a path, it may return wrong rows. If the
    file is missing, damaged or of another size, a `UserError` calls it `kind` and ends in `remedy`.
    """
    data = read_file(path, kind)
    if len(data) < 24 or not data.startswith(PNG):
        raise UserError(f"{kind} {str(path)!r} is not a PNG; {remedy}.")
    width, height = struct.unpack_from(">II", data, len(PNG))
    if (height, width) != shape:  # compared first, so that a hostile size takes no memory
        raise UserError(
            f"{kind} {str(path)!r} has {width}x{height} pixels, but its labels are for "
            f"{shape[1]}x{shape[0]}; {remedy}."
        )
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        image = None
    if image is None or image.shape[:2] != shape:
        raise UserError(f"{kind} {str(path)!r} is damaged or truncated; {remedy}.")
    return image
