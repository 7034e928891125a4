"""Untrusted rasters and GeoJSON: damaged in transit, or forged by somebody who knows the format."""

import copy
import json
import random
import struct
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from helpers.rasters import raster
from torture.contained import contained

from common.cli import UserError
from common.io.look import Look
from common.io.raster import open_scene
from preprocessing.geojson import Block, cut_into_blocks
from preprocessing.own_data import number_classes
from preprocessing.shapes import read_labels

KINDS: list[dict[str, Any]] = [
    {}, {"tiled": True, "blockxsize": 16, "blockysize": 16}, {"compress": "deflate"},
    {"compress": "lzw", "predictor": 2}, {"BIGTIFF": "YES"}, {"compress": "jpeg"},
    {"nodata": 3}, {"interleave": "pixel"}, {"driver": "JP2OpenJPEG"}, {"compress": "zstd"},
]  # fmt: skip
PLACE = {"crs": "EPSG:32631", "transform": (0.5, 0, 448_000, 0, -0.5, 5_411_000)}
VALUES: list[Any] = [
    None, True, -1, 0, 10**9, 10**400, 1e308, float("nan"), float("inf"), "1", [], {}, [[]], [[[]]],
    [0, 0], [[0, 0]] * 4, [[[0, 0], [1e9, 0], [0, 1e9], [0, 0]]], "Polygon", "MultiPolygon",
    {"type": "name", "properties": {"name": "EPSG:0"}}, {"properties": {"name": "/etc/passwd"}},
    {"properties": {"name": "+proj=pipeline"}}, {"properties": {"name": "EPSG:32731"}},
    "\x1b[2J", "x" * 300,
]  # fmt: skip


def hostile_raster(number: int, folder: Path) -> str:
    """A changed raster, or labels that lie on one, is refused in a sentence or read."""
    rng = random.Random(number)
    if rng.random() < 0.3:
        return "labels " + contained(partial(_labels, rng, folder))
    kind = copy.copy(rng.choice(KINDS))
    dtype = "uint8" if "compress" in kind else rng.choice(["uint8", "uint16", "float32"])
    if kind.get("driver"):
        dtype = "uint8"
    values = np.random.default_rng(number).integers(0, 99, (rng.choice([1, 3, 4]), 40, 50))
    (folder / "a.tif").unlink(missing_ok=True)
    path = raster(folder / "a.tif", values.astype(dtype), **kind)
    data = bytearray(path.read_bytes())
    way = rng.choice(["flip", "cut", "number", "number", "zeros"])
    for _ in range(rng.choice([1, 1, 3, 20])):
        at = rng.randrange(min(len(data), rng.choice([400, 400, 1 << 30])))
        if way == "flip":
            data[at] ^= 1 << rng.randrange(8)
        elif way == "zeros":
            data[at : at + 20] = bytes(min(20, len(data) - at))
        elif way == "number":  # an offset, a count or a size that is not there
            value = rng.choice([0, 1, 255, 65_535, 60_000, 1 << 24, (1 << 31) - 1, (1 << 32) - 1])
            data[at : at + 4] = struct.pack("<I", value)[: len(data) - at]
    path.write_bytes(data[: rng.randrange(len(data))] if way == "cut" else data)
    return f"{way} " + contained(partial(_read, path, rng.choice([(), (1,), (3, 2, 1)])))


def _read(path: Path, bands: tuple[int, ...]) -> str:
    try:
        with open_scene(path, Look(bands=bands or None)) as scene:
            # What a window is; memory follows the width that the file states.
            width, height = min(scene.width, 512), min(scene.height, 512)
            for y in {0, scene.height - height}:
                pixels, valid = scene.read(scene.width - width, y, width, height)
                assert pixels.shape == (height, width, 3)
                assert pixels.dtype == np.uint8
                assert valid is None or valid.shape == (height, width)
            _ = scene.metres
    except UserError as error:
        return "refused" if str(error).isprintable() else "!a sentence with control characters"
    return "read"


def _labels(rng: random.Random, folder: Path) -> str:
    scene = folder / "scene.tif"
    if not scene.exists():
        raster(scene, np.zeros((1, 90, 90), np.uint8), **PLACE)
    ring = [[2.29, 48.85], [2.2902, 48.85], [2.2902, 48.8502], [2.29, 48.85]]
    content: dict[str, Any] = {
        "type": "FeatureCollection",
        "features": [
            {"type": "Feature", "properties": {"kind": "a"},
             "geometry": {"type": "Polygon", "coordinates": [ring]}},
            {"type": "Feature", "properties": {"kind": 3},
             "geometry": {"type": "MultiPolygon", "coordinates": [[ring], [ring, ring]]}},
        ],
    }  # fmt: skip
    for _ in range(rng.choice([0, 1, 1, 3])):
        _change(content, rng)
    text = json.dumps(content)
    if rng.random() < 0.2:
        text = text[: rng.randrange(len(text))]
    path = folder / "labels.geojson"
    path.write_text(text)
    try:
        drawn = read_labels(path, rng.choice([None, "kind"]))
        names = sorted({shape.name for shape in drawn.shapes if shape.name})
        classes = number_classes(names, names, path)
        whole = Block(scene, path, None, "a", "a", (0, 0, 0, 0), Look(), classes.of)
        for block in cut_into_blocks(whole, drawn, 64):
            assert block.labels().ids.shape == (90, 90)
    except UserError as error:
        return "refused" if str(error).isprintable() else "!a sentence with control characters"
    return "read"


def _change(content: Any, rng: random.Random) -> None:
    """Put a value where it does not belong."""
    at = content
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        key = rng.choice([*keys, "crs"] if isinstance(at, dict) else keys) if keys else "crs"
        below = at[key] if key in keys else None
        if not isinstance(below, dict | list) or not below or rng.random() < 0.25:
            break
        at = below
    if isinstance(at, dict) or key != "crs":
        at[key] = copy.deepcopy(rng.choice(VALUES))
