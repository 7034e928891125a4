"""Untrusted COCO files: entries of the wrong type, invalid numbers, names outside the folder."""

import copy
import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as rle
from torture.contained import contained

from common.cli import UserError
from common.data import Tiles
from preprocessing.coco_images import Reading, read_dataset
from preprocessing.own_data import number_classes

SIDE = 40
NAMES = [
    "../x.png", "/etc/passwd", "a/../../x.png", "..\\x.png", "C:\\x.png", "..%2fx.png", "a\0.png",
    "\x1b[2J.png", "a\n.png", "\u202egnp.exe", "\ud800.png", "", ".", "..", "/", "a/", "./x.png",
    "~", "x" * 300, "\N{PILE OF POO}" * 70, "-o.png", "$(touch x).png", "|x", "nul", " ", "\u00a0",
    "a\u0301.png",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, -1, 0, 1, 10**9, 10**18, 10**400, 1e308, float("nan"), float("inf"), 0.5, "1", [],
    {}, [[]], [[0, 0, 1e9, 0, 0, 1e9]], [[float("nan")] * 6],
    {"size": [10**9, 10**9], "counts": [10**18]},
    {"size": [SIDE, SIDE], "counts": [0] * 1000}, {"size": [SIDE, SIDE], "counts": "o" * 500},
    {"size": [SIDE, SIDE], "counts": "0" * 500}, *NAMES,
]  # fmt: skip


def hostile_coco(number: int, folder: Path) -> str:
    """A changed file is used for tiling and training within its bounds, or refused."""
    rng = random.Random(number)
    (folder / "images").mkdir(exist_ok=True)
    cv2.imwrite(str(folder / "images" / "a.png"), np.zeros((SIDE, SIDE, 3), np.uint8))
    truth = make(rng)
    for _ in range(rng.randrange(1, 4)):
        change(truth, rng)
    (folder / "truth.json").write_text(json.dumps(truth))
    (folder / "instances_tiled.json").write_text(json.dumps(truth))
    outcomes = [contained(partial(f, folder)) for f in (_tile, _train)]
    return "read" if "read" in outcomes else "refused"


def make(rng: random.Random) -> dict:
    truth: dict[str, Any] = {
        "images": [{"id": 7, "file_name": "a.png", "width": SIDE, "height": SIDE}],
        "categories": [{"id": 4, "name": "ant"}, {"id": 9, "name": "bee"}],
        "annotations": [],
    }
    for n in range(1, 4):
        mask = np.zeros((SIDE, SIDE), np.uint8, order="F")
        mask[5 * n : 5 * n + 12, 3:30] = 1
        runs = rle.encode(mask)
        outline: Any = {"size": runs["size"], "counts": runs["counts"].decode()}
        if n == 2:
            outline = [[3, 10, 30, 10, 30, 22, 3, 22]]
        item = {"image_id": 7, "category_id": rng.choice([4, 9]), "bbox": [3, 5 * n, 27, 12]}
        more = {"id": n, "area": 324, "iscrowd": 0, "instance": n, "segmentation": outline}
        truth["annotations"].append(item | more)
    return truth


def change(data: Any, rng: random.Random) -> None:
    """Replace, remove or repeat one entry somewhere in `data`."""
    at = data
    while True:
        if not isinstance(at, dict | list) or not at:
            return
        key = rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
        if not isinstance(at[key], dict | list) or rng.random() < 0.2:
            break
        at = at[key]
    kind = rng.randrange(8)
    if kind == 0:
        del at[key]
    elif kind == 1 and isinstance(at, list):
        at += [at[key]] * rng.randrange(1, 50)
    else:
        at[key] = copy.deepcopy(rng.choice(NAMES if key == "file_name" else VALUES))


def _sentence(error: UserError) -> str:
    fine = str(error).isprintable() and len(str(error)) < 1000
    return "refused" if fine else f"!{str(error)[:2000]!r}"


def _tile(folder: Path) -> str:
    root = folder / "images"
    try:
        number = partial(number_classes, path=folder / "truth.json")
        images, *_ = read_dataset(folder / "truth.json", root, Reading(), number)
    except UserError as error:
        return _sentence(error)
    for image in images.values():
        assert image.path.resolve().is_relative_to(root.resolve())
        assert "/" not in image.stem
        try:
            labels = image.labels()
        except UserError as error:
            return _sentence(error)
        assert labels.ids.max() <= len(labels.things)
    return "read"


def _train(folder: Path) -> str:
    for part in ("images_tiled", "masks_tiled"):
        (folder / part).mkdir(exist_ok=True)
    (folder / "images_tiled" / "a.png").touch()
    (folder / "masks_tiled" / "a_mask.png").touch()
    try:
        tiles = Tiles(folder)
    except UserError as error:
        return _sentence(error)
    assert len(tiles.classes) >= 1
    return "read"
