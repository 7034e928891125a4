"""Tiles on disk: PNGs for each tile, or a whole split packed into two arrays.

Both forms have `read(indices, images, ids)`, which fills a batch with the tiles at `indices`:
`images` uint8 [B,H,W,3], RGB, and `ids` [B,H,W], whose dtype decides the ignore value: 255 in uint8
and 65535 in wider ones.
"""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from common.cli import UserError
from common.io.images import read_image, read_rgb

IGNORE = 255  # the class id of pixels left out of training and scores
INDEX = "packed.json"
PACKED = ("images_tiled.npy", "masks_tiled.npy", INDEX)
"""Files of a packed split: uint8 [N,S,S,3], uint8 or uint16 [N,S,S], and their source."""


class Pngs:
    """A pair of PNG files for each tile."""

    def __init__(self, folder: Path, images: list[dict], aircraft: list[int]) -> None:
        self.folder, self.aircraft = folder, aircraft
        self.names = [image["file_name"] for image in images]
        self._match_files()

    def read(self, indices: list[int], images: np.ndarray, ids: np.ndarray) -> None:
        for row, i in enumerate(indices):
            read_tile(self.folder, self.names[i], self.aircraft[i], images[row], ids[row])

    def _match_files(self) -> None:
        """Find missing files: one listing per folder; `stat` per tile is slow on a network disk."""
        images = {path.name for path in (self.folder / "images_tiled").glob("*.png")}
        masks = {path.name for path in (self.folder / "masks_tiled").glob("*.png")}
        for name in self.names:
            image, mask = tile_paths(self.folder, name)
            if image.name not in images or mask.name not in masks:
                raise UserError(
                    f"{str(image if image.name not in images else mask)!r} is listed in "
                    "instances_tiled.json but is missing; make the tiles again."
                )


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
        self.folder = folder
        self.index = pack_index(folder, len(images), images[0]["width"], mask_dtype)
        try:
            fits = json.loads((folder / INDEX).read_bytes()) == self.index
        except ValueError:
            fits = False
        if not fits:
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
        square = (self.index["tiles"], self.index["size"], self.index["size"])
        return (
            self._open(PACKED[0], "uint8", (*square, 3)),
            self._open(PACKED[1], self.index["mask_dtype"], square),
        )

    def __getstate__(self) -> dict[str, Any]:
        """A loader process maps the files itself: pickling a mapped array would copy them."""
        return {name: value for name, value in vars(self).items() if name != "arrays"}

    def _open(self, name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
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


def pack_index(folder: Path, tiles: int, size: int, mask_dtype: np.dtype) -> dict[str, Any]:
    """The content of `INDEX`: the arrays' shape and dtype, and the hash of their COCO file."""
    with (folder / "instances_tiled.json").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"tiles": tiles, "size": size, "mask_dtype": mask_dtype.name, "instances_sha256": digest}


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
    size = image.shape[1], image.shape[0]
    image_path, mask_path = tile_paths(folder, name)
    image[...] = read_rgb(image_path, size)
    mask = read_image(mask_path, cv2.IMREAD_UNCHANGED, size)
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
