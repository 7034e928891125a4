"""Semantic prediction over a folder of scenes: what every semantic inference.py runs."""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.cli import Parser
from common.io.files import whole_file
from common.io.pictures import Reduced, paint, save
from common.io.raster import Scene, no_valid_pixel
from common.predict.crops import Crops
from common.predict.folder import each_scene, inference_parser, list_images, make_output_folder
from common.predict.maps import feature_file, raster_file
from common.predict.network import load_network
from common.predict.regions import Region, Regions
from common.predict.windows import Band, Network, Tiling, blend


def semantic_parser(description: str) -> Parser:
    """The options that the inference.py of every semantic model has."""
    parser = inference_parser(description)
    add = parser.add_argument
    add("--confidence", action="store_true", help="also write the probability of the class shown")
    add("--tta", action="store_true", help="mean over eight symmetries; takes 8 times as long")
    return parser


def predict_folder(
    args: argparse.Namespace,
    name: str,
    from_checkpoint: Callable[[dict[str, Any]], nn.Module],
    probabilities: Callable[[nn.Module, Tensor], Tensor],
) -> None:
    """Predict every scene: masks, overlays, GeoJSON, and one `predictions.json`.

    Args:
        args: From `semantic_parser`.
        name: The model's `NAME`.
        probabilities: (model, float [B,3,H,W], normalised) → class probabilities [B,C,H,W].
    """
    network, classes = load_network(args, name, from_checkpoint, probabilities, _only)
    images = list_images(args.image_dir, args.index)
    make_output_folder(args)
    target = args.prediction_dir / "predictions.json"
    scenes = total = 0
    with whole_file(target) as file:
        file.write(f'{{"classes": {json.dumps(classes)}, "images": ['.encode())

        def predict_one(scene: Scene, name: str) -> None:
            nonlocal scenes, total
            entry, regions = predict_scene(scene, name, network, classes, args)
            head = json.dumps(entry)[:-1]
            between = "," if scenes else ""
            file.write(f'{between}\n{head}, "regions": [{", ".join(regions)}]}}'.encode())
            scenes, total = scenes + 1, total + len(regions)

        refuse = each_scene(images, args, predict_one)
        file.write(b"\n]}\n")
    print(f"{total} regions in {scenes} images; overlays, masks and JSON in {target.parent}")
    refuse()


def predict_scene(
    scene: Scene, name: str, network: Network, classes: list[str], args: argparse.Namespace
) -> tuple[dict[str, Any], list[str]]:
    """Predict a scene and write its files.

    Returns:
        Its entry in `predictions.json`, and the regions there as JSON, largest first.
    """
    folder: Path = args.prediction_dir
    entry = {
        "image": scene.path.name,
        "width": scene.width,
        "height": scene.height,
        "mask": f"{name}_mask{'.png' if scene.is_picture else '.tif'}",
        "overlay": f"{name}_overlay.jpg",
    }
    small = scene.width, scene.height, args.overlay_size
    picture, painted = Reduced(*small), Reduced(*small, smooth=False)
    crops = Crops(args.crops, lambda find: find.area)
    found: list[tuple[int, str]] = []
    any_valid = False
    with ExitStack() as files:
        write_mask = files.enter_context(raster_file(folder / entry["mask"], scene, "uint8"))
        if args.confidence:
            path = folder / f"{name}_confidence.tif"
            write_confidence = files.enter_context(raster_file(path, scene, "float32"))
        features = files.enter_context(feature_file(folder / f"{name}.geojson", scene, classes))
        regions = Regions(args.min_area)

        def take(finds: Iterator[Region]) -> None:
            for find in finds:
                features.add(find)
                crops.add(find)
                found.append(_described(find, classes))

        tiling = Tiling(args.window, args.overlap, args.batch_size)
        for band in blend(scene, network, tiling):
            mask, confidence = likeliest(band)
            any_valid |= band.valid is None or bool(band.valid.any())
            write_mask(band.y, mask)
            if args.confidence:
                write_confidence(band.y, confidence)
            picture.add(band.pixels)
            painted.add(mask)
            take(regions.add(band.y, mask, confidence))
        take(regions.end())
        if not any_valid:
            raise no_valid_pixel(scene.path)
    save(paint(picture.image(), painted.image()), folder / entry["overlay"])
    if args.crops:
        crops.write(scene, folder / f"{name}_crops.jpg")
    return entry, [text for _, text in sorted(found, key=lambda item: -item[0])]


def likeliest(band: Band) -> tuple[np.ndarray, np.ndarray]:
    """The class ids of a band, uint8 [n,W], and their probabilities, float32; 0 where invalid."""
    best = band.probability[0]
    ids = torch.zeros_like(best, dtype=torch.uint8)
    for label in range(1, len(band.probability)):  # with two classes 4 times as fast as max(0)
        probability = band.probability[label]
        ids = torch.maximum(ids, (probability > best).byte() * label)
        best = torch.maximum(best, probability)
    mask, confidence = ids.cpu().numpy(), best.cpu().numpy()
    if band.valid is not None:
        mask[~band.valid], confidence[~band.valid] = 0, 0
    return mask, confidence


def _only(probability: Tensor, size: int) -> Tensor:
    """The only tensor of an ONNX file."""
    return probability


def _described(find: Region, classes: list[str]) -> tuple[int, str]:
    """The area of a region, and its entry in `predictions.json`."""
    x1, y1, x2, y2 = find.box
    region = {
        "class": classes[find.label],
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": find.area,
        "score": round(find.score, 4),
    }
    return find.area, json.dumps(region)
