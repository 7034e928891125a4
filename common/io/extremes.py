"""The best and the worst of the scored tiles, as pictures in a JSON file (no torch here)."""

import base64
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from common.io.files import write_atomic
from common.io.pictures import paint


class Kept(NamedTuple):
    """A tile that is shown: those with the smallest `order` are."""

    order: tuple[float, ...]
    name: str
    hits: int
    union: int
    row: tuple[np.ndarray, ...]


class Extremes:
    """The worst and the best among the tiles that are offered.

    The worst are those with the most wrong aircraft pixels, because these lower the IoU of the set
    the most. The best are those with the highest IoU.

    Args:
        images: The entries of the set's tiles in its COCO file.
        count: How many of each.
    """

    def __init__(self, images: list[dict[str, Any]], count: int = 3) -> None:
        self.images, self.count, self.offered = images, count, 0
        self.worst: list[Kept] = []
        self.best: list[Kept] = []

    def offer(
        self,
        tiles: list[int],
        pixels: Sequence[Sequence[int]],
        row: Callable[[int], tuple[np.ndarray, ...]],
    ) -> None:
        """Look at the tiles of a batch; one without aircraft in truth and prediction has no IoU.

        Args:
            tiles: Their places in the set.
            pixels: Of each tile two numbers: the aircraft pixels that are predicted as their class,
                and those that are aircraft in truth or prediction.
            row: Place in the batch → what `Sheet.add` takes. Called for a tile that is kept.
        """
        for i, (tile, (hits, union)) in enumerate(zip(tiles, pixels, strict=True)):
            self.offered += 1
            if not union:
                continue
            orders = (hits - union, tile), (-hits / union, -union, tile)
            for kept, order in zip((self.worst, self.best), orders, strict=True):
                if len(kept) < self.count or order < kept[-1].order:
                    kept.append(Kept(order, self.images[tile]["file_name"], hits, union, row(i)))
                    kept.sort(key=lambda one: one.order)
                    del kept[self.count :]

    def write(self, path: Path) -> None:
        """Write the tiles as JSON: `scored`, how many were offered, `worst` and `best`.

        Each tile has `tile`, its name, `iou`, `wrong`, its wrong aircraft pixels, and `pictures`:
        image, truth and prediction, JPEGs of 320 pixels a side as data URIs.
        """
        worst = {one.name for one in self.worst}
        content = {
            "scored": self.offered,
            "worst": [_framed(one) for one in self.worst],
            "best": [_framed(one) for one in self.best if one.name not in worst],
        }
        write_atomic(path, json.dumps(content).encode())


def _framed(kept: Kept, side: int = 320) -> dict[str, Any]:
    image, truth, prediction = kept.row
    pictures = (image, paint(image, truth), paint(image, prediction))
    small = [cv2.resize(p, (side, side), interpolation=cv2.INTER_AREA) for p in pictures]
    return {
        "tile": kept.name,
        "iou": kept.hits / kept.union,
        "wrong": kept.union - kept.hits,
        "pictures": [_data_uri(picture) for picture in small],
    }


def _data_uri(pixels: np.ndarray) -> str:
    jpeg = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])[1]
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.tobytes()).decode()
