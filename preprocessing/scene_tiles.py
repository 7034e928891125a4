"""The files of one scene's tiles.

A scene is cut in two steps: first its labels, which decide which tiles are kept, then its image.
So nothing is decoded twice, and no image is encoded that is not kept. Both steps skip what an
earlier, interrupted run has finished.
"""

import hashlib
import json
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from common.cli import UserError
from common.io.files import write_atomic
from common.io.raster import NEUTRAL
from common.io.tiles import tile_paths
from preprocessing.tiles import Settings, Source, cut, not_shown


def tile_name(stem: str, n: int) -> str:
    """The file name of a tile's image."""
    return f"{stem}_tile_{n}.png"


def record_path(stage: Path, stem: str) -> Path:
    """Path of the record of a scene, during a run."""
    return stage / "records" / f"{stem}.json"


def read_record(stage: Path, stem: str) -> dict[str, Any]:
    """What `write_labels` recorded: width, height, and the tiles as `cut` gives them."""
    return json.loads(record_path(stage, stem).read_bytes())


class Shown(NamedTuple):
    """What a scene's tiles show.

    `positive` has for each tile whether it shows an aircraft; None if it has no valid pixel.
    `things` is the number of objects in the scene; `left_out` counts those that no tile shows, by
    the reason.
    """

    positive: list[bool | None]
    things: int
    left_out: dict[str, int]


def write_labels(source: Source, stage: Path, settings: Settings) -> Shown:
    """Write the masks of all tiles of a scene, then its record.

    The record is the last file written. It holds the settings and the state of the source files,
    and is used only while both are unchanged.
    """
    key = _key(source, settings)
    try:
        record = read_record(stage, source.stem)
    except (FileNotFoundError, ValueError):
        record = {}
    if record.get("key") != key:
        # The old record becomes invalid here, before the first of its files is overwritten.
        record_path(stage, source.stem).unlink(missing_ok=True)
        labels = source.labels()
        height, width = labels.ids.shape
        tiles = []
        for n, (tile, mask) in enumerate(cut(labels, settings)):
            image_path, mask_path = tile_paths(stage, tile_name(source.stem, n))
            image_path.unlink(missing_ok=True)  # from other settings
            png = _encode(mask, settings.png_level) if mask.any() else _ground(settings)
            write_atomic(mask_path, png)
            tiles.append(tile)
        record = {"key": key, "width": width, "height": height, "tiles": tiles}
        record |= {"look": labels.look}
        record |= {"things": len(labels.things), "left_out": not_shown(labels.things, tiles)}
        write_atomic(record_path(stage, source.stem), json.dumps(record).encode())
    positive = [
        None if tile.get("blank") else any(not a["iscrowd"] for a in tile["annotations"])
        for tile in record["tiles"]
    ]
    return Shown(positive, record["things"], record["left_out"])


def write_images(source: Source, stage: Path, settings: Settings, wanted: list[int]) -> None:
    """Write the image of each tile in `wanted` whose file is not there yet."""
    paths = {n: tile_paths(stage, tile_name(source.stem, n))[0] for n in wanted}
    missing = [n for n, path in paths.items() if not path.exists()]
    if not missing:
        return
    size = settings.tile_size
    record = read_record(stage, source.stem)
    image = source.image((record["width"], record["height"]))
    for n in missing:
        tile = record["tiles"][n]
        part = image[tile["y"] : tile["y"] + size, tile["x"] : tile["x"] + size]
        right, bottom = tile["padded"]
        if right or bottom:
            around = (0, bottom, 0, right, cv2.BORDER_CONSTANT)
            part = cv2.copyMakeBorder(part, *around, value=NEUTRAL[::-1])
        write_atomic(paths[n], _encode(part, settings.png_level))


def _encode(pixels: np.ndarray, level: int) -> memoryview:
    return cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, level])[1].data


@lru_cache(maxsize=1)
def _ground(settings: Settings) -> memoryview:
    """The mask of a tile without aircraft: a third of all masks, so it is encoded once."""
    size = settings.tile_size
    return _encode(np.zeros((size, size), np.uint8), settings.png_level)


def _key(source: Source, settings: Settings) -> str:
    """A hash of the settings and of the sizes and times of the scene's files."""
    state = asdict(settings) | {"source": repr(source), "record": 5}
    digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode())
    for path in source.files():
        try:
            stat = path.stat()
        except FileNotFoundError:
            raise UserError(f"{str(path)!r} is missing.") from None
        except OSError as error:  # such as a name that is too long
            raise UserError(f"cannot read {str(path)!r}: {error.strerror}.") from None
        digest.update(f"{stat.st_size} {stat.st_mtime_ns} {path.name}".encode())
    return digest.hexdigest()
