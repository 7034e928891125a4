"""Packs the tiles of a split into two arrays: to read a tile is then a copy, not a decoding."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap

from common.cli import UserError, progress
from common.io.files import write_atomic
from common.io.tiles import INDEX, PACKED, hash_of_index, mask_dtype, read_tile
from preprocessing.workers import Workers

CHUNK = 16
"""Tiles per task: 16 MB at 512 pixels, decoded in a fraction of a second."""

Named = list[tuple[str, int]]
"""The tiles of a split in the order of its COCO file: image name and number of aircraft."""


def pack_splits(pool: Workers, splits: Mapping[Path, Named], size: int) -> None:
    """Write `PACKED` into each split, a folder of PNG tiles with their COCO file.

    Every tile has a fixed place, so the bytes do not depend on which process writes it, or when.

    Raises:
        UserError: The disk has too little room, or a tile cannot be read.
    """
    types = {folder: mask_dtype([n for _, n in tiles]) for folder, tiles in splits.items()}
    needed = sum(len(splits[f]) * size**2 * (3 + dtype.itemsize) for f, dtype in types.items())
    free = min(shutil.disk_usage(folder).free for folder in splits)
    if needed > free:
        raise UserError(
            f"--pack needs {needed:,} bytes in addition to the tiles, and "
            f"{str(next(iter(splits)).parent)!r} has {free:,} free; make room, or leave out --pack."
        )
    tasks = []
    for folder, tiles in splits.items():
        square = (len(tiles), size, size)
        _begin(folder / PACKED[0], np.dtype(np.uint8), (*square, 3))
        _begin(folder / PACKED[1], types[folder], square)
        starts = range(0, len(tiles), CHUNK)
        tasks += [(folder, start, tiles[start : start + CHUNK]) for start in starts]
    outcomes = pool.outcomes(_fill, tasks)
    for _, result in progress(outcomes, total=len(tasks), desc="pack", unit="chunk"):
        if isinstance(result, UserError):
            raise result
    for folder, tiles in splits.items():
        for name in PACKED[:2]:
            with (folder / name).open("rb") as file:
                os.fsync(file.fileno())  # a power cut must not leave an index and empty pages
        index = {"tiles": len(tiles), "size": size, "mask_dtype": types[folder].name}
        index |= {"instances_sha256": hash_of_index(folder)}
        write_atomic(folder / INDEX, (json.dumps(index, indent=1) + "\n").encode())


def _begin(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):  # not on macOS
        # Allocates the blocks now: if the disk were full later, a write to the map would kill us.
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _fill(folder: Path, start: int, tiles: Named) -> None:
    images, masks = (open_memmap(folder / name, mode="r+") for name in PACKED[:2])
    for row, (name, aircraft) in enumerate(tiles, start):
        read_tile(folder, name, aircraft, images[row], masks[row])
