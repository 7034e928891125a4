"""Reads tiles from disk into batches.

Workers decode PNGs (or copy packed tiles) into a uint8 batch `[B,H,W,3]`. It goes to the device as
uint8, a quarter of the bytes of float32. There `augment.py` crops, turns and normalises it.
"""

import copy
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from common.cli import UserError
from common.io import tiles as stored
from common.io.tiles import IGNORE, Packed, Pngs


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
    """The tiles in a folder (`data/train`, …) or several; of a single one also packed tiles.

    Their `labels` are box, diamond or mask, and never mixed; '' if no tile shows an aircraft.
    Raises `UserError` if one is missing, not tiled or empty, or files do not agree.
    """

    def __init__(self, *folders: Path) -> None:
        self.folder, self.folders, self.labels = Path(folders[0]), folders, ""
        self.images: list[dict] = []
        # Per tile the classes of its aircraft 1…N, in the order of their ids in the mask.
        self.instances: list[list[int]] = []
        self.drawn: list[float] = []  # `quality` of the masks that preprocessing/chips.py made
        self.look: dict | None = None  # see common.io.look.options_of
        self.classes: list[str] = []
        for folder in folders:
            coco = stored.read_index(folder)
            categories = sorted(coco["categories"], key=lambda category: category["id"])
            classes = ["ground", *(category["name"] for category in categories)]
            if len(classes) > IGNORE:
                raise UserError(
                    f"{str(folder)!r} has {len(categories)} categories and a mask holds at most "
                    f"{IGNORE - 1}; tile again with another --attribute (preprocess.py) or with "
                    "--rename (coco.py, geojson.py)."
                )
            index = {category["id"]: i for i, category in enumerate(categories, start=1)}
            aircraft = [a for a in coco["annotations"] if not a.get("iscrowd", 0)]
            aircraft.sort(key=lambda a: a["instance"])
            self.drawn += [a["quality"] for a in aircraft if "quality" in a]
            of_image: dict[int, list[int]] = {image["id"]: [] for image in coco["images"]}
            for a in aircraft:
                of_image[a["image_id"]].append(index[a["category_id"]])
            labels = coco.get("info", {}).get("labels", "mask") if aircraft else ""
            if self.images:
                check_same(self.folder, self.classes, self.labels, folder, classes, labels)
            self.classes, self.labels = classes, self.labels or labels
            self.images += [image | {"set": str(folder)} for image in coco["images"]]
            self.instances += [of_image[image["id"]] for image in coco["images"]]
            self.look = self.look or coco.get("info", {}).get("look")
        sides = {(image["width"], image["height"]) for image in self.images}
        if len(sides) > 1:
            raise UserError(f"the tiles have several sizes, {sorted(sides)}; use one -s for all.")
        count = [len(classes) for classes in self.instances]
        self._classes = np.zeros((len(self.images), 1 + max(count)), np.uint8)
        for row, of_tile in zip(self._classes, self.instances, strict=True):
            row[1 : len(of_tile) + 1] = of_tile
        dtype = stored.mask_dtype(count)
        self.ignore = int(np.iinfo(dtype).max)
        self.stored: Pngs | Packed = (
            Packed(self.folder, self.images, dtype)
            if len(folders) == 1 and (self.folder / stored.INDEX).is_file()
            else Pngs(self.images, count)
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

    def fingerprint(self) -> str:
        return "+".join(map(stored.hash_of_index, self.folders))

    def airports(self) -> tuple[list[str], list[int]]:
        """The known airports, and each tile's index into them; for an unknown one their number."""
        names = [stored.airport_of(image) for image in self.images]
        known = sorted({name for name in names if name is not None})
        index = {name: i for i, name in enumerate(known)} | {None: len(known)}
        return known, [index[name] for name in names]

    def summary(self) -> dict[str, Any]:
        """How much is in the set; an aircraft counts in each tile that shows it."""
        aircraft = Counter(self.classes[c] for classes in self.instances for c in classes)
        airports = Counter(filter(None, map(stored.airport_of, self.images)))
        return {
            "folder": ", ".join(map(str, self.folders)),
            "tiles": len(self),
            "size": self.size,
            "scenes": len({(image["set"], str(image.get("scene"))) for image in self.images}),
            "tiles_with_aircraft": sum(map(bool, self.instances)),
            "aircraft": {name: aircraft[name] for name in self.classes[1:]},
            "airports": dict(sorted(airports.items())),
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


def training_splits(root: Path, extra: Sequence[str] = ()) -> tuple[Tiles, Tiles | None]:
    """`root/train` with those of `extra`, and, if preprocessing held out an airport, `root/val`."""
    train = Tiles(root / "train", *(Path(folder) / "train" for folder in extra))
    if not train.labels:
        raise UserError(f"no tile in {str(train.folder)!r} shows an aircraft; tile scenes that do.")
    if not (root / "val").is_dir():
        return train, None
    val = Tiles(root / "val")
    check_same(train.folder, train.classes, train.labels, val.folder, val.classes, val.labels)
    if extra and (seen := sorted({*train.airports()[0]} & {*val.airports()[0]})):
        raise UserError(
            f"{str(val.folder)!r} and the training tiles show the airport {seen[0]}, so the score "
            "would be too high; leave that --extra-data out, or tile the scenes in one folder."
        )
    return train, val


def check_same(one: Any, classes: list, labels: str, other: Any, others: list, theirs: str) -> None:
    """Refuse two data sets, or a model and one, of other classes or of another kind of labels."""
    if classes != others or (labels and theirs and labels != theirs):
        raise UserError(
            f"{str(one)!r} has the classes {classes[1:]} and {str(other)!r} has {others[1:]} "
            f"(labels: {labels} and {theirs}); tile both with the same --attribute (preprocess.py) "
            "and --labels (box: boxes alone are scored), or with --rename OLD=NEW (coco.py)."
        )
