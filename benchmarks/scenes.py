"""What a prediction costs beside the network: memory, time, the joining of instances.

    python benchmarks/scenes.py --data-path sample_data
    python benchmarks/scenes.py --parts memory --sides 2000 10000

reading:  a compressed scene of eight bands with 8 and with 16 bits, in tiles and in strips, as it
          is and resampled, read in the windows of a prediction.
memory:   peak memory and time of scenes of growing size, each in a new process, with a network of
          one layer: what a prediction takes beside a real one.
join:     instances as windows find them, joined, encoded and written as COCO and GeoJSON.
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import rasterio
import torch

from benchmarks.lib.environment import hardware, measured_on, provenance
from benchmarks.lib.mosaic import mosaic, one_layer
from benchmarks.lib.readme import (
    README,
    RESULTS,
    check_clean,
    markdown,
    read_rows,
    write_part,
    write_rows,
)
from benchmarks.lib.turns import in_turns
from common.cli import Parser, UserError, positive, run
from common.io.look import Look
from common.io.raster import open_scene
from common.predict.maps import feature_file
from common.predict.windows import Tiling, strips
from mask.scenes import Instance, annotate, merge

CPU = torch.device("cpu")
CLASSES = ["ground", "aircraft"]
TILING = Tiling(512, 0.25, 4)
LEAST_PIXELS = 16  # of an aircraft that a window shows
EMPTY = dict.fromkeys(("part", "case", "seconds", "per_mpx", "memory_mb", "ratio"), "")
# Part → the head of its table's first column, and its other columns.
TABLES = {
    "reading": (
        "scene of 8 bands, deflate",
        {"per_mpx": "s of CPU per Mpx", "ratio": "of uint8's"},
    ),
    "memory": ("scene", {"seconds": "s of CPU", "per_mpx": "per Mpx", "memory_mb": "MB more"}),
    "join": ("detections", {"seconds": "s of CPU"}),
}


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    rows = read_rows(args.output) if args.output.exists() else []
    for part in args.parts:
        rows = [row for row in rows if row["part"] != part]
        for values in PARTS[part](args):
            row = EMPTY | {"part": part} | values | hardware(CPU) | provenance(__file__, argv)
            rows.append({key: str(value) for key, value in row.items()})
            print(", ".join(f"{k} {v}" for k, v in row.items() if k in EMPTY and v != ""))
        write_rows(args.output, rows)
    if args.write_readme:
        check_clean(rows)
        write_part(README, "scenes", table(rows))


def table(rows: list[dict[str, str]]) -> str:
    """The results in Markdown."""
    blocks: list[str] = []
    measured_last = ""
    for part, (first, columns) in TABLES.items():
        of_part = [row for row in rows if row["part"] == part]
        if not of_part:
            continue
        if measured_on(of_part[0]) != measured_last:
            measured_last = measured_on(of_part[0])
            blocks.append(measured_last)
        lines = [[row["case"], *(row[column] for column in columns)] for row in of_part]
        blocks.append(markdown([first, *columns.values()], lines))
    return "\n\n".join(blocks)


def reading(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Seconds of CPU for each million pixels of the file, with the percentiles of 16 bits."""
    side = args.scene
    with TemporaryDirectory() as folder:
        mosaic(args.data_path, Path(folder, "scene.tif"), side)
        with open_scene(Path(folder, "scene.tif")) as scene:
            place = {"crs": scene.crs, "transform": scene.transform}
            colours = scene.read(0, 0, side, side)[0]
        bands = np.stack([np.roll(colours[..., i % 3], i, 0) for i in range(8)])
        profile: dict[str, Any] = {"driver": "GTiff", "compress": "deflate", "count": 8} | place
        profile |= {"width": side, "height": side, "nodata": 0, "blockxsize": 256}
        for tiled, gsd in product((True, False), (None, 0.5)):
            for dtype in ("uint8", "uint16"):
                values = bands.astype(dtype) * (8 if dtype == "uint16" else 1)
                layout = {"tiled": True, "blockysize": 256} if tiled else {"blockysize": 1}
                path = Path(folder, f"{dtype}.tif")
                with rasterio.open(path, "w", dtype=dtype, **profile | layout) as file:
                    file.write(values)

            def read(dtype: str, folder: str = folder, gsd: float | None = gsd) -> float:
                since = time.process_time()
                with open_scene(Path(folder, f"{dtype}.tif"), Look(gsd=gsd)) as scene:
                    for _ in strips(scene, TILING):
                        pass
                return (time.process_time() - since) / (side**2 / 1e6)

            jobs = {dtype: partial(read, dtype) for dtype in ("uint8", "uint16")}
            measured = in_turns(jobs, args.rounds)
            ratios = np.divide(measured["uint16"], measured["uint8"])
            low, middle, high = np.percentile(ratios, [0, 50, 100])
            for dtype, seconds in measured.items():
                stored = "tiles of 256 pixels" if tiled else "strips of 1 row"
                yield {
                    "case": f"{dtype}, {stored}" + (f", --gsd {gsd}" if gsd else ""),
                    "per_mpx": f"{np.median(seconds):.3f}",
                    "ratio": f"{middle:.2f} ({low:.2f} to {high:.2f})"
                    if dtype == "uint16"
                    else "1",
                }


def memory(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Each size in a new process, so that its peak is its own."""
    context = multiprocessing.get_context("spawn")
    for side in args.sides:
        with TemporaryDirectory() as folder, context.Pool(1) as pool:
            mosaic(args.data_path, Path(folder, "scene.tif"), side)
            seconds, peak = pool.apply(one_layer, (Path(folder),))
        megapixels = side**2 / 1e6
        yield {
            "case": f"{side:,} x {side:,}, {megapixels:,.0f} Mpx",
            "seconds": f"{seconds:.1f}",
            "per_mpx": f"{seconds / megapixels:.3f}",
            "memory_mb": f"{peak:.0f}",
        }


def join(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One run each, in seconds of CPU."""
    for count in args.counts:
        side = round(6000 * (count / 10_000) ** 0.5)
        with TemporaryDirectory() as folder:
            path = Path(folder, "scene.tif")
            mosaic(args.data_path, path, side)
            detections = as_seen(count, side)
            since = time.process_time()
            with (
                open_scene(path) as scene,
                feature_file(path.with_suffix(".geojson"), scene, CLASSES) as features,
            ):
                merged = merge(detections)
                for instance in merged:
                    features.add(instance)
                    json.dumps(annotate(instance, side, side))
            seconds = time.process_time() - since
        case = f"{count:,} of {len(merged):,} aircraft in {side**2 / 1e6:,.0f} Mpx"
        yield {"case": case, "seconds": f"{seconds:.1f}"}


def as_seen(count: int, side: int) -> list[Instance]:
    """`count` detections of aircraft of 20 to 70 pixels in a scene, as windows cut them."""
    rng = np.random.default_rng(0)
    window, starts = TILING.side, TILING.starts(side)

    def overlapping(first: int, end: int) -> list[int]:
        return [start for start in starts if start < end and start + window > first]

    detections: list[Instance] = []
    while len(detections) < count:
        size = int(rng.integers(20, 70))
        left, top = (int(v) for v in rng.integers(0, side - size, 2))
        y, x = np.mgrid[0:size, 0:size] / (size - 1) * 2 - 1
        shape = (np.abs(x) < 0.14) | (np.abs(y + 0.1 + 0.4 * np.abs(x)) < 0.15)
        shape |= (np.abs(y - 0.8) < 0.1) & (np.abs(x) < 0.35)
        for y1, x1 in product(*(overlapping(start, start + size) for start in (top, left))):
            part = shape[max(0, y1 - top) : max(0, y1 + window - top)]
            part = part[:, max(0, x1 - left) : max(0, x1 + window - left)].copy()
            if np.count_nonzero(part) >= LEAST_PIXELS:
                corner = max(x1, left), max(y1, top)
                seen = (x1, y1, x1 + window, y1 + window)
                detections.append(Instance(1, float(rng.random()), *corner, part, seen))
    return detections[:count]


PARTS = {"reading": reading, "memory": memory, "join": join}


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--parts", nargs="+", choices=TABLES, default=list(TABLES))
    add("--data-path", type=Path, default=ROOT / "sample_data", help="rendered scenes")
    add("--sides", type=positive, nargs="+", default=[2000, 10_000, 30_000], help="of memory")
    add("--scene", type=positive, default=1500, help="side of the scene of reading, pixels")
    add("--rounds", type=positive, default=3, help="of reading, after one for warm-up")
    add("--counts", type=positive, nargs="+", default=[10_000, 100_000], help="of join")
    add("-o", "--output", type=Path, default=RESULTS / "scenes.csv")
    add(
        "--write-readme", action="store_true", help="also renew the results in benchmarks/README.md"
    )
    args = parser.parse(argv)
    if not (args.data_path / "train/images").is_dir():
        raise UserError(
            f"there are no scenes in {str(args.data_path)!r}; make some with `python "
            f"rareplanes/sample.py -o {args.data_path} -n 24`."
        )
    return args


if __name__ == "__main__":
    run(main)
