"""Reads tiles from disk into batches.

Workers decode PNGs (or copy packed tiles) into a uint8 batch `[B,H,W,3]`. It goes to the device as
uint8, a quarter of the bytes of float32. There `augment.py` crops, turns and normalises it.
"""

import copy
import math
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from common.cli import UserError
from common.io.tiles import IGNORE, INDEX, Packed, Pngs, airport_of, mask_dtype, read_index


class Batch(NamedTuple):
    """A tile, or a batch of tiles with a leading dimension B.

    images: uint8 [H,W,3], RGB. ids: [H,W], 0 ground, 1…N aircraft, `Tiles.ignore` ignore (uint8, or
    int32 where a tile of the set holds more than 254 aircraft). classes: uint8 [ignore+1], the
    class of each id. tile: int64, the tile's index in the set.
    """

    images: Tensor
    ids: Tensor
    classes: Tensor
    tile: Tensor

    def to(self, device: torch.device) -> "Batch":
        # Asynchronous only from pinned memory, which the loader provides for CUDA.
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


class Tiles(Dataset):
    """The tiles that `preprocess.py` or `coco.py` wrote into one folder (`data/train`, …).

    Raises:
        UserError: The folder is missing, not tiled or empty, or its files do not agree.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        coco = read_index(self.folder)
        self.images: list[dict] = coco["images"]
        self.look = coco.get("info", {}).get("look")  # see common.io.look.options_of
        names = {category["id"]: category["name"] for category in coco["categories"]}
        self.classes = ["ground", *(names[i] for i in sorted(names))]
        if len(self.classes) > IGNORE:
            raise UserError(
                f"{str(self.folder)!r} has {len(names)} categories and a mask holds at most "
                f"{IGNORE - 1}; tile again with another --attribute (preprocess.py) or with "
                "--rename (coco.py, geojson.py)."
            )
        index = {category: i for i, category in enumerate(sorted(names), start=1)}
        aircraft = [a for a in coco["annotations"] if not a.get("iscrowd", 0)]
        aircraft.sort(key=lambda a: a["instance"])
        of_image: dict[int, list[int]] = {image["id"]: [] for image in self.images}
        for a in aircraft:
            of_image[a["image_id"]].append(index[a["category_id"]])
        # Per tile the classes of its aircraft 1…N, in the order of their ids in the mask.
        self.instances = [of_image[image["id"]] for image in self.images]
        count = [len(classes) for classes in self.instances]
        self._classes = np.zeros((len(self.images), 1 + max(count)), np.uint8)
        for row, classes in zip(self._classes, self.instances, strict=True):
            row[1 : len(classes) + 1] = classes
        dtype = mask_dtype(count)
        self.ignore = int(np.iinfo(dtype).max)
        self.stored: Pngs | Packed = (
            Packed(self.folder, self.images, dtype)
            if (self.folder / INDEX).is_file()
            else Pngs(self.folder, self.images, count)
        )
        self._stored_at: list[int] | range = range(len(self.images))

    def __len__(self) -> int:
        return len(self.images)

    @property
    def size(self) -> int:
        """Side of the smallest tile, in pixels: no crop can be larger."""
        return min(min(image["width"], image["height"]) for image in self.images)

    def shows_aircraft(self, index: int) -> bool:
        return bool(self.instances[index])

    def airports(self) -> tuple[list[str], list[int]]:
        """The known airports, and each tile's index into them; for an unknown one their number."""
        names = [airport_of(image) for image in self.images]
        known = sorted({name for name in names if name is not None})
        index = {name: i for i, name in enumerate(known)} | {None: len(known)}
        return known, [index[name] for name in names]

    def summary(self) -> dict[str, Any]:
        """How much is in the set, as plain values; an aircraft counts in each tile that shows it.

        Returns:
            `folder`, `tiles`, `size` (pixels), `scenes`, `tiles_with_aircraft`, `aircraft` (by
            class), and `airports`, the number of tiles of each known one.
        """
        aircraft = Counter(self.classes[c] for classes in self.instances for c in classes)
        known, airport_of_tile = self.airports()
        tiles_of = Counter(airport_of_tile)
        return {
            "folder": str(self.folder),
            "tiles": len(self),
            "size": self.size,
            "scenes": len({str(image.get("scene")) for image in self.images}),
            "tiles_with_aircraft": sum(map(bool, self.instances)),
            "aircraft": {name: aircraft[name] for name in self.classes[1:]},
            "airports": {name: tiles_of[i] for i, name in enumerate(known)},
        }

    def spread(self, count: int | None) -> "Tiles":
        """A set of `count` of these tiles, spread evenly; all of them for None or a larger count.

        They are numbered again: tile 1 of the result may be tile 10 of this set.
        """
        if count is None or count >= len(self):
            return self
        chosen = [k * len(self) // count for k in range(count)]
        part = copy.copy(self)
        part.images = [self.images[i] for i in chosen]
        part.instances = [self.instances[i] for i in chosen]
        part._classes = self._classes[chosen]
        part._stored_at = [self._stored_at[i] for i in chosen]
        return part

    def __getitem__(self, index: int) -> Batch:
        return Batch(*(tensor[0] for tensor in self.__getitems__([index])))

    def __getitems__(self, indices: list[int]) -> Batch:
        """The batch of these tiles; the DataLoader calls this once instead of once per tile.

        A packed tile is copied once, straight to its place in the batch.
        """
        first, number = self.images[indices[0]], len(indices)
        size = first["height"], first["width"]
        # torch has hardly any operators for uint16.
        ids_dtype = torch.uint8 if self.ignore == 255 else torch.int32
        batch = Batch(
            _empty((number, *size, 3), torch.uint8),
            _empty((number, *size), ids_dtype),
            _empty((number, self.ignore + 1), torch.uint8),
            _empty((number,), torch.int64),
        )
        images, ids, classes, tile = (tensor.numpy() for tensor in batch)
        self.stored.read([self._stored_at[i] for i in indices], images, ids)
        classes.fill(0)
        classes[:, : self._classes.shape[1]] = self._classes[indices]
        classes[:, self.ignore] = IGNORE
        tile[:] = indices
        return batch


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory for a batch; a loader process shares it with its parent, which saves a copy."""
    if get_worker_info() is None:
        # From 4 MB on numpy, unlike torch, asks for huge pages: half of a packed batch's time.
        return torch.from_numpy(np.empty(shape, str(dtype).removeprefix("torch.")))
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)
    return torch.empty(0, dtype=dtype).set_(storage).view(shape)


def training_splits(root: Path) -> tuple[Tiles, Tiles | None]:
    """`root/train` and, where preprocessing could hold out an airport, `root/val`.

    Raises:
        UserError: There are no tiles, or the two have different classes.
    """
    train = Tiles(root / "train")
    if not (root / "val").is_dir():
        return train, None
    val = Tiles(root / "val")
    if val.classes != train.classes:
        raise UserError(
            f"{str(train.folder)!r} has the classes {train.classes[1:]} and {str(val.folder)!r} "
            f"has {val.classes[1:]}; tile both in one run, or with --rename (coco.py, geojson.py)."
        )
    return train, val
