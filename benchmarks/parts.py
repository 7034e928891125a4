"""The parts other than training, each against the field's plain way, in turns in one process.

    python benchmarks/parts.py --data-path sample_data
    python benchmarks/parts.py --parts evaluation --rounds 15

preprocessing: a scene's colour mask becomes aircraft ids. Plain: one pixel after the other.
inference:     tiles, and a whole scene in windows, through UNet. Plain: one at a time, in float32,
               contiguous.
evaluation:    COCO's twelve numbers of masks. Plain: pycocotools.
"""

import argparse
import contextlib
import io
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from benchmarks.lib.environment import hardware, provenance, seconds
from benchmarks.lib.readme import README, read_rows, write_part, write_rows
from benchmarks.lib.results import median_interval
from common.args import Speedups, has_native_bf16
from common.augment import normalise
from common.cli import Parser, UserError, positive, progress, run
from common.distributed import pick_device
from common.predict.windows import Tiling, blend
from mask.coco import evaluate
from rareplanes.scene import instance_ids, read_xml, scene_files, scene_stems
from unet.model import build_model, probabilities

Way = Callable[[], Any]
Part = tuple[str, float, Way, Way]  # unit, units per call, our way, the plain way


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    device = pick_device(args.device)
    made: dict[str, Part] = {}
    if "preprocessing" in args.parts:
        made |= _preprocessing(args.data_path)
    if "inference" in args.parts:
        made |= _inference(device, args)
    if "evaluation" in args.parts:
        made |= _evaluation(args.data_path)
    rows = []
    for name, (unit, count, ours, plain) in made.items():
        times: dict[str, list[float]] = {"ours": [], "plain": []}
        for turn in progress(range(args.rounds + 1), desc=name, unit="round"):
            for way, call in (("ours", ours), ("plain", plain)):
                taken = seconds(call, device)
                if turn:  # the first round warms up
                    times[way].append(taken)
        ratios = [b / a for a, b in zip(times["ours"], times["plain"], strict=True)]
        row: dict[str, Any] = {"part": name, "unit": unit, "rounds": args.rounds}
        for way, taken_all in times.items():
            p10, p50, p90 = np.percentile([count / t for t in taken_all], [10, 50, 90])
            row |= {way: f"{p50:.4g}", f"{way}_p10": f"{p10:.4g}", f"{way}_p90": f"{p90:.4g}"}
        ratio = dict(
            zip(("ratio", "ratio_low", "ratio_high"), median_interval(ratios), strict=True)
        )
        row |= {key: f"{value:.4g}" for key, value in ratio.items()}
        rows.append(row | hardware(device) | provenance(__file__, argv))
    write_rows(args.output, rows)
    print(f"wrote {args.output}")
    written = table(read_rows(args.output))
    print(written)
    if args.write_readme:
        write_part(README, "parts", written)


def table(rows: list[dict[str, str]]) -> str:
    """The results in Markdown."""
    lines = ["| part | per second | ours (p10 to p90) | plain | ratio (95 %) |"]
    lines.append("|---|---|--:|--:|--:|")
    for r in rows:
        ratio = (
            f"{float(r['ratio']):.3g} ({float(r['ratio_low']):.3g} to {float(r['ratio_high']):.3g})"
        )
        ways = (f"{r[w]} ({r[f'{w}_p10']} to {r[f'{w}_p90']})" for w in ("ours", "plain"))
        lines.append(f"| {r['part']} | {r['unit']} | {' | '.join(ways)} | {ratio} |")
    return "\n".join(lines)


def _preprocessing(data: Path) -> dict[str, Part]:
    stem = scene_stems(data / "train")[0]
    _, mask, xml = scene_files(data / "train", stem)
    width, height, aircraft = read_xml(xml)
    colours = [plane.colour for plane in aircraft]

    def plain() -> np.ndarray:
        pixels = Image.open(mask).convert("RGB")
        number = {colour: i for i, colour in enumerate(colours, start=1)}
        ids = np.zeros((height, width), np.uint16)
        for y in range(height):
            for x in range(width):
                ids[y, x] = number.get(pixels.getpixel((x, y)), 0)  # type: ignore[arg-type]
        return ids

    def ours() -> np.ndarray:
        return instance_ids(mask, (width, height), colours)

    if not np.array_equal(ours(), plain()):
        raise AssertionError("the two ways give different aircraft ids")
    return {"preprocessing": ("scenes", 1, ours, plain)}


class Noise:
    """A scene for `blend`, in memory."""

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        self.pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)

    def read(self, x: int, y: int, width: int, height: int) -> tuple[np.ndarray, None]:
        return self.pixels[y : y + height, x : x + width], None


def _inference(device: torch.device, args: argparse.Namespace) -> dict[str, Part]:
    torch.manual_seed(0)
    model = build_model(args.encoder, 2).to(device).eval()
    dtype = torch.bfloat16 if has_native_bf16(device) else None
    speedups = Speedups(dtype, channels_last=True)
    fast = build_model(args.encoder, 2).to(device).eval()
    fast.load_state_dict(model.state_dict())
    fast = fast.to(memory_format=speedups.layout)
    tiles = torch.rand(args.batch_size, 3, args.window, args.window, device=device)
    scene = Noise(*args.scene)

    @torch.inference_mode()
    def quick(images: Tensor) -> Tensor:
        with speedups.autocast(device):
            return probabilities(fast, images.contiguous(memory_format=speedups.layout))

    @torch.inference_mode()
    def slow(images: Tensor) -> Tensor:
        return torch.cat([probabilities(model, image) for image in images.split(1)])

    def whole(way: Callable[[Tensor], Tensor], batch_size: int) -> Way:
        def network(crops: Tensor) -> Tensor:
            return way(normalise(crops.to(device)).contiguous())

        return lambda: list(blend(scene, network, Tiling(args.window, 0.25, batch_size)))

    return {
        "inference, tiles": ("images", len(tiles), lambda: quick(tiles), lambda: slow(tiles)),
        "inference, scene": ("scenes", 1, whole(quick, args.batch_size), whole(slow, 1)),
    }


def _evaluation(data: Path) -> dict[str, Part]:
    """Scores detections of every aircraft of the training tiles: shifted boxes, random scores."""
    coco = json.loads((data / "train/instances_tiled.json").read_text())
    rng = random.Random(0)
    detections = []
    for a in coco["annotations"]:
        if a["iscrowd"]:
            continue
        box = [v + rng.uniform(-3, 3) for v in a["bbox"]]
        item = {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": box}
        detections.append(item | {"segmentation": a["segmentation"], "score": rng.random()})
    text = json.dumps(coco)

    def plain() -> float:
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO()
            truth.dataset = json.loads(text)
            truth.createIndex()
            results = truth.loadRes([dict(item) for item in detections])
            for kind in ("bbox", "segm"):
                evaluation = COCOeval(truth, results, kind)
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()
        return evaluation.stats[0]

    def ours() -> float:
        return evaluate(detections, json.loads(text))["mask_AP"]

    if abs(ours() - plain()) > 1e-9:
        raise AssertionError("the two ways give different APs")
    return {"evaluation": ("tiles", len(coco["images"]), ours, plain)}


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    names = ("preprocessing", "inference", "evaluation")
    add = parser.add_argument
    add("--parts", nargs="+", choices=names, default=list(names))
    add("--data-path", type=Path, default=ROOT / "sample_data", help="scenes and tiles in train/")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--encoder", default="resnet18", help="of the UNet")
    add("-b", "--batch-size", type=positive, default=4, help="tiles, or windows, at a time")
    add("--window", type=positive, default=256, help="side of a tile or window, pixels")
    add("--scene", type=positive, nargs=2, default=(1080, 1920), help="height and width, pixels")
    add("--rounds", type=positive, default=9, help="of each, after one for warm-up")
    add("-o", "--output", type=Path, default=ROOT / "benchmarks/results/parts.csv")
    add("--write-readme", action="store_true", help="also renew the table in benchmarks/README.md")
    args = parser.parse(argv)
    if not (args.data_path / "train/instances_tiled.json").is_file():
        raise UserError(
            f"there are no tiles in {str(args.data_path / 'train')!r}; make some with `python "
            f"rareplanes/sample.py -o {args.data_path} -n 24` and `python "
            f"preprocessing/preprocess.py {args.data_path}`."
        )
    return args


if __name__ == "__main__":
    run(main)
