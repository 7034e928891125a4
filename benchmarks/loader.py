"""How fast tiles become batches on one core: PNGs, packed, a bare memory copy, the usual way.

    python preprocessing/preprocess.py sample_data --pack
    python benchmarks/loader.py --data-path sample_data -b 8 --rounds 9

All four are measured in turns (`lib/turns.py`). The page cache is warm after the first round, which
does not count.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional

from benchmarks.lib.environment import measured_on, provenance
from benchmarks.lib.readme import README, add_output, markdown, publish
from benchmarks.lib.results import percentiles
from benchmarks.lib.turns import in_turns
from common.augment import MEAN, STD
from common.cli import Parser, UserError, positive, run
from common.data import Tiles
from common.distributed import Process
from common.io.tiles import INDEX, Packed, Pngs, tile_paths
from common.loader import training_loader


class Usual(Dataset):
    """Pillow, torchvision's `to_tensor` and `normalize` on the CPU; the DataLoader stacks."""

    def __init__(self, tiles: Tiles) -> None:
        self.files = [tile_paths(tiles.folder, image["file_name"]) for image in tiles.images]
        self.mean, self.std = ([v / 255 for v in values] for values in (MEAN, STD))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, mask = (Image.open(path) for path in self.files[index])
        pixels = functional.to_tensor(image.convert("RGB"))
        return functional.normalize(pixels, self.mean, self.std), torch.from_numpy(np.array(mask))


Arm = Callable[[], Iterable]
"""Starts a pass over the tiles, which yields batches: a tuple or list with the images first."""


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse(argv)
    folder = args.data_path / "train"
    if not (folder / INDEX).is_file():
        raise UserError(
            f"there are no packed tiles in {str(folder)!r}; make them with `python "
            f"rareplanes/sample.py -o {args.data_path} -n 24` and `python "
            f"preprocessing/preprocess.py {args.data_path} --pack`."
        )
    if hasattr(os, "sched_setaffinity"):  # not on macOS
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    tiles = Tiles(folder)
    assert isinstance(tiles.stored, Packed)
    tile_bytes = sum(array[0].nbytes for array in tiles.stored.arrays)
    arms = arms_of(tiles, tiles.stored, args.batch_size)
    speeds = in_turns({name: partial(speed, arm) for name, arm in arms.items()}, args.rounds)
    rows: list[dict[str, Any]] = []
    for name, rounds in speeds.items():
        p10, median, p90 = (round(value, 1) for value in percentiles(rounds))
        rate = round(median * tile_bytes / 1e6, 1)
        row = {"arm": name, "samples_per_s": median, "p10": p10, "p90": p90, "MB_per_s": rate}
        rows.append(row | {"rounds": len(rounds)} | provenance(__file__, argv))
    publish(rows, table, README, "loader", args)


def table(rows: list[dict[str, str]]) -> str:
    """The results in Markdown."""
    speed = {row["arm"]: float(row["samples_per_s"]) for row in rows}
    lines = []
    for row in rows:
        name = row["arm"]
        median, p10, p90, rate = (
            f"{float(row[key]):,.0f}" for key in ("samples_per_s", "p10", "p90", "MB_per_s")
        )
        ratio = f"{speed[name] / speed['png']:.1f}"
        lines.append([name, f"{median} ({p10} to {p90})", rate, ratio])
    shown = markdown(["form", "tiles/s (p10 to p90)", "MB/s", "against PNG"], lines)
    longer = speed["copy"] / speed["packed"]
    return (
        f"{measured_on(rows[0])}\n\n{shown}\n\n"
        f"Packed takes {longer:.2f} times as long as the plain copy."
    )


def arms_of(tiles: Tiles, packed: Packed, batch_size: int) -> dict[str, Arm]:
    png = copy(tiles)
    png.stored = Pngs(tiles.images, [len(instances) for instances in tiles.instances])
    process = Process(0, 1, torch.device("cpu"))
    loader = training_loader(tiles, batch_size, 0, process, seed=0)

    def plain_copy() -> Iterator[list[np.ndarray]]:
        """In order, into newly allocated memory, as a loader's batches are."""
        for start in range(0, len(tiles) // batch_size * batch_size, batch_size):
            sources = [array[start : start + batch_size] for array in packed.arrays]
            batch = [np.empty_like(source) for source in sources]
            for target, source in zip(batch, sources, strict=True):
                np.copyto(target, source)
            yield batch

    return {
        "png": lambda: training_loader(png, batch_size, 0, process, seed=0),
        "packed": lambda: loader,
        "copy": plain_copy,
        "usual": lambda: DataLoader(Usual(tiles), batch_sampler=loader.batch_sampler),
    }


def speed(start: Arm) -> float:
    """Tiles per second of a pass."""
    count, since = 0, time.perf_counter()
    for batch in start():
        count += len(batch[0])
    return count / (time.perf_counter() - since)


def _parser() -> Parser:
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data-path", type=Path, default="sample_data", help="folder with a packed train/")
    add("-b", "--batch-size", type=positive, default=8, help="tiles in a batch")
    add("--rounds", type=positive, default=9, help="passes of each, after one for warm-up")
    add_output(parser, "loader", README)
    return parser


if __name__ == "__main__":
    run(main)
