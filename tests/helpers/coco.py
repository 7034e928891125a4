"""Makes small COCO instance datasets, with outlines of every kind."""

import json
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as rle

KINDS = ("polygon", "polygons", "compressed", "uncompressed")


def outline(rng, kind, width, height):
    """A random outline of a kind; polygons may stick out of the image."""
    if kind.startswith("polygon"):
        parts = []
        for _ in range(1 + (kind == "polygons")):
            centre = rng.uniform(0, (width, height))
            points = centre + rng.uniform(-15, 15, (int(rng.integers(3, 8)), 2))
            parts.append(points.round(2).ravel().tolist())
        return parts
    mask = np.zeros((height, width), np.uint8)
    centre = (int(rng.integers(0, width)), int(rng.integers(0, height)))
    cv2.circle(mask, centre, int(rng.integers(3, 14)), 1, -1)
    if kind == "compressed":
        runs = rle.encode(np.asfortranarray(mask))
        return {"size": runs["size"], "counts": runs["counts"].decode()}
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *([0] if flat[0] else []), *edges, flat.size]).tolist()
    return {"size": [height, width], "counts": counts}


def make_coco(root, images=4, seed=0):
    """Images of several sizes and formats, and `instances.json`; returns its content."""
    rng = np.random.default_rng(seed)
    data = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 9, "name": "zebra"}, {"id": 4, "name": "ant"}],
    }
    for i in range(images):
        width, height = (int(v) for v in rng.integers(20, 130, 2))
        name = f"part/{i:03}{('.png', '.jpg')[i % 2]}"
        pixels = cv2.blur(rng.integers(0, 256, (height, width, 3), dtype=np.uint8), (5, 5))
        (root / "images" / "part").mkdir(parents=True, exist_ok=True)
        coded = cv2.imencode(Path(name).suffix, pixels)[1].tobytes()
        (root / "images" / name).write_bytes(coded)
        data["images"].append({"id": 70 - i, "file_name": name, "width": width, "height": height})
        for j in range(int(rng.integers(0, 7)) + i):
            data["annotations"].append(
                {
                    "id": 500 - len(data["annotations"]),
                    "image_id": 70 - i,
                    "category_id": (9, 4)[j % 2],
                    "segmentation": outline(rng, KINDS[j % 4], width, height),
                    "iscrowd": int(j == 2),
                }
            )
    save(root, data)
    return data


def save(root, data):
    (root / "instances.json").write_text(json.dumps(data))


def tile_args(root, out, *more):
    return [str(root / "images"), str(root / "instances.json"), "-o", str(out), "-n", "1", *more]
