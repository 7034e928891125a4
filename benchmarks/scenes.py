"""What a prediction costs beside the network: memory, time, the joining of instances.

    python benchmarks/scenes.py --data-path sample_data
    python benchmarks/scenes.py --parts memory --sides 2000 10000

memory:   peak memory and time of scenes of growing size, each in a new process, with a network of
          one layer: a real one takes most of the time, and the same memory for every size.
overhead: a scene through UNet and through Mask R-CNN, from file to files, against the bare
          networks on the same windows, in turns.
join:     instances as windows find them, joined, encoded and written as COCO and GeoJSON.
seams:    aircraft that are lost, doubled or cut where windows meet, with a detector that knows the
          truth, and what each way takes beside it. Also sahi and supervision, where installed.
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.lib import slicers, truth
from benchmarks.lib.environment import hardware, provenance
from benchmarks.lib.mosaic import mosaic, one_layer
from benchmarks.lib.readme import README, read_rows, write_part, write_rows
from common.augment import normalise
from common.cli import Parser, UserError, positive, progress, run
from common.io.raster import open_scene
from common.predict import semantic
from common.predict.maps import feature_file
from common.predict.windows import Tiling
from mask import inference as instances
from mask.model import build_model as build_mask
from mask.model import predict
from mask.scenes import merge
from unet.model import build_model as build_unet
from unet.model import probabilities

CPU = torch.device("cpu")
CLASSES = ["ground", "aircraft"]
TILING = Tiling(512, 0.25, 4)
EMPTY = {
    "part": "", "case": "", "seconds": "", "per_mpx": "", "memory_mb": "", "ratio": "",
    "aircraft": "", "found": "", "whole": "", "extra": "",
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    parts: dict[str, Callable[[argparse.Namespace], Iterator[dict[str, Any]]]] = {
        "memory": memory, "overhead": overhead, "join": join, "seams": seams,
    }  # fmt: skip
    rows = read_rows(args.output) if args.output.exists() else []
    for part in args.parts:
        rows = [row for row in rows if row["part"] != part]
        for values in parts[part](args):
            row = EMPTY | {"part": part} | values | hardware(CPU) | provenance(__file__, argv)
            rows.append({key: str(value) for key, value in row.items()})
            print(", ".join(f"{k} {v}" for k, v in row.items() if k in EMPTY and v != ""))
        write_rows(args.output, rows)
    if args.write_readme:
        write_part(README, "scenes", table(rows))


def table(rows: list[dict[str, str]]) -> str:
    """The results in Markdown."""
    heads = {
        "memory": ("scene", {"seconds": "s of CPU", "per_mpx": "per Mpx", "memory_mb": "MB more"}),
        "overhead": ("model", {"seconds": "s of CPU", "ratio": "of the bare network's"}),
        "join": ("detections", {"seconds": "s of CPU"}),
        "seams": (
            "windows joined by, on",
            {"aircraft": "aircraft", "found": "found", "whole": "whole", "extra": "extra"}
            | {"seconds": "s of CPU", "memory_mb": "MB more"},
        ),
    }
    lines: list[str] = []
    for part, (first, columns) in heads.items():
        lines += (
            ["", f"| {first} | {' | '.join(columns.values())} |"]
            if lines
            else [f"| {first} | {' | '.join(columns.values())} |"]
        )
        lines.append("|---|" + "--:|" * len(columns))
        for row in rows:
            if row["part"] == part:
                lines.append(f"| {row['case']} | {' | '.join(row[c] for c in columns)} |")
    return "\n".join(lines)


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


class Timed:
    """A network that adds up the CPU time of its forward passes alone."""

    def __init__(self, model: nn.Module, call: Callable[[nn.Module, Tensor], Any]) -> None:
        self.model, self.call, self.seconds = model, call, 0.0

    @torch.inference_mode()
    def __call__(self, crops: Tensor) -> Any:
        images = normalise(crops).contiguous(memory_format=torch.channels_last)
        since = time.process_time()
        result = self.call(self.model, images)
        self.seconds += time.process_time() - since
        return result


def overhead(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """From file to files, against the networks alone on the same windows."""
    torch.manual_seed(0)
    layout = torch.channels_last
    unet: Any = build_unet("resnet18", 2).eval().to(memory_format=layout)
    rcnn = build_mask("resnet18", 2, proposals=200).eval().to(memory_format=layout)
    # Random weights draw noise: here a hundredth of the ground, and the ten best of each window.
    rcnn.least_score, rcnn.most_detections = 0.0, 10
    cases = {
        "UNet, resnet18": (
            unet,
            probabilities,
            semantic.predict_scene,
            semantic.semantic_parser(""),
        ),
        "Mask R-CNN, resnet18": (rcnn, predict, instances.predict_scene, instances.parser()),
    }
    with TemporaryDirectory() as folder:
        mosaic(args.data_path, Path(folder, "scene.tif"), args.scene)
        with open_scene(Path(folder, "scene.tif")) as scene, torch.inference_mode():
            crop = torch.from_numpy(scene.read(0, 0, 512, 512)[0])[None]
            ground, aircraft = unet(normalise(crop))[0]
            unet.segmentation_head[0].bias[0] += (aircraft - ground).flatten().quantile(0.99)
        for case, (model, call, whole, parser) in cases.items():
            options = parser.parse(["model", "", folder])
            options.window, options.max_detections, options.score_threshold = 512, 100, 0.0
            network = Timed(model, call)
            ratios, times = [], []
            for turn in progress(range(args.rounds + 1), desc=case):
                network.seconds, since = 0.0, time.process_time()
                with open_scene(Path(folder, "scene.tif")) as scene:
                    whole(scene, "out", network, CLASSES, options)
                taken = time.process_time() - since
                if turn:  # the first warms up
                    ratios.append(taken / network.seconds)
                    times.append(taken)
            low, middle, high = np.percentile(ratios, [0, 50, 100])
            yield {
                "case": f"{case}, {args.scene**2 / 1e6:.1f} Mpx",
                "seconds": f"{np.median(times):.1f}",
                "ratio": f"{middle:.3f} ({low:.3f} to {high:.3f})",
            }


def join(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One run each, in seconds of CPU."""
    for count in args.counts:
        side = round(6000 * (count / 10_000) ** 0.5)
        with TemporaryDirectory() as folder:
            path = Path(folder, "scene.tif")
            mosaic(args.data_path, path, side)
            found = truth.as_seen(count, side, TILING.starts(side), TILING.side)
            since = time.process_time()
            with (
                open_scene(path) as scene,
                feature_file(path.with_suffix(".geojson"), scene, CLASSES) as features,
            ):
                merged = merge(found)
                for one in merged:
                    features.add(one)
                    json.dumps(instances.annotate(one, side, side))
            seconds = time.process_time() - since
        case = f"{count:,} of {len(merged):,} aircraft in {side**2 / 1e6:,.0f} Mpx"
        yield {"case": case, "seconds": f"{seconds:.1f}"}


def seams(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The same detector and windows for every way of joining, each in a new process."""
    scenes = truth.rendered(args.data_path)
    aprons = [truth.apron(scenes, seed) for seed in range(args.aprons)]
    kinds = {
        "rendered scenes": (scenes, 0.0),
        "crowded aprons": (aprons, 0.0),
        "crowded aprons, one aircraft in ten halved or taken with its neighbour": (aprons, 0.05),
    }
    context = multiprocessing.get_context("spawn")
    for kind, (chosen, errors) in kinds.items():
        for name in slicers.ways(TILING):
            with context.Pool(1) as pool:
                total, seconds, peak = pool.apply(slicers.measure, (name, TILING, chosen, errors))
            cost = {"seconds": f"{seconds:.1f}", "memory_mb": f"{peak:.0f}"}
            yield {"case": f"{name}, {kind}"} | total | cost


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    names = ("memory", "overhead", "join", "seams")
    add = parser.add_argument
    add("--parts", nargs="+", choices=names, default=list(names))
    add("--data-path", type=Path, default=ROOT / "sample_data", help="rendered scenes")
    add("--sides", type=positive, nargs="+", default=[2000, 10_000, 30_000], help="of memory")
    add("--scene", type=positive, default=1500, help="side of overhead's scene, pixels")
    add("--rounds", type=positive, default=3, help="of overhead, after one for warm-up")
    add("--counts", type=positive, nargs="+", default=[10_000, 100_000], help="of join")
    add("--aprons", type=positive, default=6, help="crowded scenes, for seams")
    add("-o", "--output", type=Path, default=ROOT / "benchmarks/results/scenes.csv")
    add("--write-readme", action="store_true", help="also renew the tables in benchmarks/README.md")
    args = parser.parse(argv)
    if not (args.data_path / "train/images").is_dir():
        raise UserError(
            f"there are no scenes in {str(args.data_path)!r}; make some with `python "
            f"rareplanes/sample.py -o {args.data_path} -n 24`."
        )
    return args


if __name__ == "__main__":
    run(main)
