"""Semantic prediction over a folder of images: what every semantic inference.py runs."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from common.augment import normalise
from common.cli import Parser, UserError, number, positive, progress, whole
from common.io.files import write_atomic
from common.io.images import read_rgb
from common.io.pictures import paint, save
from common.predict.windows import Probabilities, blend

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
STRIDE = 32  # a multiple of the stride of every network


def inference_parser(description: str) -> Parser:
    """The options that every inference.py has; the network itself comes from the checkpoint."""
    parser = Parser(description=description)
    add = parser.add_argument
    add("model", type=Path, help="model_best.pth or checkpoint.pth of a training run")
    add("image_dir", type=Path, help="a folder of PNG or JPEG images of any size, or one image")
    add("prediction_dir", type=Path, help="where overlays, masks and predictions.json go")
    add(
        "-i",
        "--index",
        type=whole,
        help="only the image at this place in the sorted folder, from 0",
    )
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("-b", "--batch-size", type=positive, default=4, help="windows per forward pass")
    add(
        "--window",
        type=window,
        default=512,
        help="side of a window, pixels; multiple of 32",
    )
    add(
        "--overlap",
        type=number(float, 0, 0.9),
        default=0.25,
        help="share of a window that its neighbour also covers",
    )
    add(
        "--min-area",
        type=whole,
        default=16,
        help="pixels; smaller regions are left out of the JSON",
    )
    return parser


def window(text: str) -> int:
    """An argument type: the side of a window that every network here accepts."""
    side = int(text)
    if side < STRIDE or side % STRIDE:
        raise argparse.ArgumentTypeError(
            f"{text} is not a multiple of {STRIDE}, the networks' stride; "
            f"use {max(STRIDE, side // STRIDE * STRIDE)}"
        )
    return side


def list_images(path: Path, index: int | None) -> list[Path]:
    """The images of a folder sorted by name, or `path` itself if it is an image.

    Raises:
        UserError: Nothing is there, or `index` is beyond the last one.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"there is no image or folder {str(path)!r}.")
    images = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise UserError(f"{str(path)!r} holds no {', '.join(IMAGE_SUFFIXES)} files.")
    if index is None:
        return images
    if index >= len(images):
        raise UserError(f"--index {index}: {str(path)!r} holds images 0 to {len(images) - 1}.")
    return [images[index]]


@dataclass(frozen=True)
class Region:
    """One connected region of a class: a box [x, y, width, height], its area, its score."""

    class_id: int
    box: tuple[int, int, int, int]
    area: int
    score: float


@torch.inference_mode()
def predict_folder(
    probabilities: Probabilities, classes: list[str], args: argparse.Namespace, device: torch.device
) -> None:
    """Predict every image and write `<name>_overlay.jpg`, `<name>_mask.png`, `predictions.json`.

    Args:
        probabilities: float [B,3,H,W], normalised → class probabilities [B,C,H,W].
        classes: C names, index 0 the ground.
        args: From `inference_parser`.
        device: The device that `probabilities` computes on.
    """
    images = list_images(args.image_dir, args.index)
    make_output_folder(args)
    bad: list[UserError] = []
    report: list[dict[str, Any]] = []
    for path, name, image in readable(images, bad):
        pixels = normalise(torch.from_numpy(image).to(device)[None])[0]
        probability = blend(pixels, probabilities, args.window, args.overlap, args.batch_size)
        confidence, mask = (tensor.cpu().numpy() for tensor in probability.max(0))
        mask = mask.astype(np.uint8)
        save(mask, args.prediction_dir / f"{name}_mask.png")
        save(paint(image, mask), args.prediction_dir / f"{name}_overlay.jpg")
        kept = regions(mask, confidence, args.min_area)
        report.append(
            {
                "image": path.name,
                "width": image.shape[1],
                "height": image.shape[0],
                "mask": f"{name}_mask.png",
                "overlay": f"{name}_overlay.jpg",
                "regions": [
                    {
                        "class": classes[region.class_id],
                        "bbox": list(region.box),
                        "area": region.area,
                        "score": round(region.score, 4),
                    }
                    for region in kept
                ],
            }
        )
    target = args.prediction_dir / "predictions.json"
    content = json.dumps({"classes": classes, "images": report}, indent=1) + "\n"
    write_atomic(target, content.encode())
    count = sum(len(entry["regions"]) for entry in report)
    print(f"{count} regions in {len(report)} images; overlays, masks and JSON in {target.parent}")
    refuse(bad, images)


def make_output_folder(args: argparse.Namespace) -> None:
    """Make `prediction_dir`, which must not be where the images are.

    Raises:
        UserError: It is there; a mask or an overlay could overwrite an image.
    """
    source = args.image_dir if args.image_dir.is_dir() else args.image_dir.parent
    if args.prediction_dir.resolve() == source.resolve():
        raise UserError(
            f"{str(args.prediction_dir)!r} holds the images, and predictions could overwrite them; "
            "name another folder for the predictions."
        )
    args.prediction_dir.mkdir(parents=True, exist_ok=True)


def readable(images: list[Path], bad: list[UserError]) -> Iterator[tuple[Path, str, np.ndarray]]:
    """Each image with the name of its outputs and its pixels; errors of reading go to `bad`."""
    for path, name in progress(output_names(images), desc="predict"):
        try:
            image = read_rgb(path)
        except UserError as error:
            bad.append(error)
            continue
        yield path, name, image


def refuse(bad: list[UserError], images: list[Path]) -> None:
    """Raise the errors of reading, now that everything else is written."""
    if len(images) == 1 and bad:
        raise bad[0]
    if bad:
        raise UserError(
            f"{len(bad)} of {len(images)} images could not be read and are not among the "
            f"predictions: {' '.join(map(str, bad[:3]))}{' …' if len(bad) > 3 else ''}"
        )


def regions(mask: np.ndarray, confidence: np.ndarray, min_area: int) -> list[Region]:
    """The 8-connected regions of each class except the ground, largest first.

    Args:
        mask: uint8 [H,W], class ids.
        confidence: float32 [H,W], probability of that class.
        min_area: In pixels; smaller regions are left out.

    Returns:
        Boxes as [x, y, width, height]; the score is the mean probability over the region. Aircraft
        that touch are one region: telling them apart takes an instance model.
    """
    kept = []
    for class_id in np.unique(mask):
        if class_id == 0:
            continue
        count, labels, stats, _ = cv2.connectedComponentsWithStats(
            (mask == class_id).astype(np.uint8), connectivity=8
        )
        sums = np.bincount(labels.ravel(), weights=confidence.ravel(), minlength=count)
        for label in range(1, count):
            x, y, w, h, area = (int(v) for v in stats[label])
            if area >= min_area:
                kept.append(Region(int(class_id), (x, y, w, h), area, float(sums[label] / area)))
    return sorted(kept, key=lambda region: -region.area)


def output_names(images: list[Path]) -> list[tuple[Path, str]]:
    """Each image with the name of its outputs.

    `a.png` and `a.jpg` in one folder must not overwrite each other's prediction: if two images
    share a stem, all outputs get the whole file name, which is unique.
    """
    distinct = len({path.stem for path in images}) == len(images)
    return [(path, path.stem if distinct else path.name) for path in images]
