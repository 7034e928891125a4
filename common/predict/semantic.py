"""Semantic prediction over a folder of scenes: what every semantic inference.py runs.

A scene is predicted and written in bands of rows, from the top down: see `common.predict.windows`.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.io.pictures import paint, save
from common.io.raster import Scene, no_valid_pixel
from common.io.tiles import IGNORE
from common.predict.folder import predicted_scenes
from common.predict.maps import (
    LEAST_PIXELS,
    Features,
    feature_file,
    ground_steps,
    raster_file,
    wanted,
)
from common.predict.network import load_network
from common.predict.pictures import Crops, Reduced, with_legend
from common.predict.regions import Region, Regions
from common.predict.windows import Band, Network, Tiling, blend


def predict_folder(
    args: argparse.Namespace,
    name: str,
    from_checkpoint: Callable[[dict[str, Any]], nn.Module],
    probabilities: Callable[[nn.Module, Tensor], Tensor],
) -> None:
    """Predict every scene: masks, overlays, GeoJSON, and one `predictions.json`.

    Args:
        args: From `common.predict.folder.semantic_parser`.
        name: The model's `NAME`.
        probabilities: (model, float [B,3,H,W], normalised) → class probabilities [B,C,H,W].
    """
    network, classes = load_network(
        args, name, from_checkpoint, probabilities, lambda probability, size: probability
    )
    if args.tta:
        network = symmetric(network)
    predict = partial(predict_scene, network=network, classes=classes, args=args)
    scenes = total = 0
    with predicted_scenes(args, predict, read_results) as (file, results):
        file.write(f'{{"classes": {json.dumps(classes)}, "images": ['.encode())
        for entry, regions in results:
            head = json.dumps(entry)[:-1]
            between = "," if scenes else ""
            file.write(f'{between}\n{head}, "regions": [{", ".join(regions)}]}}'.encode())
            scenes, total = scenes + 1, total + len(regions)
        file.write(b"\n]}\n")
        folder = args.prediction_dir
        print(f"{total} regions in {scenes} images; overlays, masks and JSON in {folder}")


def read_results(content: dict[str, Any]) -> dict[str, tuple[dict[str, Any], list[str]]]:
    """What `predict_scene` returned for each image of a `predictions.json`."""
    return {
        image["image"]: (image, [json.dumps(region) for region in image.pop("regions")])
        for image in content["images"]
    }


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
    crops = Crops(args.crops, lambda region: region.area)
    described: list[tuple[int, str]] = []
    any_valid = False
    with feature_file(folder / f"{name}.geojson", scene, classes) as features:
        with ExitStack() as files:
            model = args.model.name
            path = folder / entry["mask"]
            write_mask = files.enter_context(raster_file(path, scene, model, classes))
            if args.confidence:
                path = folder / f"{name}_confidence.tif"
                write_confidence = files.enter_context(raster_file(path, scene, model))
            middle = Region(1, 1, scene.width // 2, scene.height // 2, np.ones((1, 1), bool))
            pixel = math.sqrt(abs(np.linalg.det(ground_steps(scene, [middle])[0])))  # its side
            least = LEAST_PIXELS if args.min_area is None else 1
            regions = Regions(least, args.join / pixel)
            tiling = Tiling(args.window, args.overlap, args.batch_size)
            for band in blend(scene, network, tiling):
                mask, confidence = likeliest(band)
                any_valid |= band.valid is None or bool(band.valid.any())
                write_mask(
                    band.y, mask if band.valid is None else np.where(band.valid, mask, IGNORE)
                )
                if args.confidence:
                    write_confidence(band.y, confidence)
                picture.add(band.pixels)
                painted.add(mask)
                ended = regions.add(band.y, mask, confidence)
                described += _add(wanted(ended, scene, args), features, crops, classes)
            ended = regions.end()
            described += _add(wanted(ended, scene, args), features, crops, classes)
            if not any_valid:
                raise no_valid_pixel(scene.path)
        overlay = paint(picture.image(), painted.image())
        save(with_legend(overlay, classes), folder / entry["overlay"])
        crops.write(scene, folder / f"{name}_crops.jpg", classes)
    return entry, [text for _, text in sorted(described, key=lambda item: -item[0])]


def _add(
    regions: Iterable[Region], features: Features, crops: Crops, classes: list[str]
) -> list[tuple[int, str]]:
    """Add regions to map and sheet; the area of each, and its entry in `predictions.json`."""
    described = []
    for region in regions:
        features.add(region)
        crops.add(region)
        x1, y1, x2, y2 = region.box
        entry = {
            "class": classes[region.label],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "area": region.area,
            "score": round(region.score, 4),
        }
        described.append((region.area, json.dumps(entry)))
    return described


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


def symmetric(network: Network) -> Network:
    """The mean of `network` over the eight symmetries of a window: 8 times the work."""

    def mean(windows: Tensor) -> Tensor:
        total: Tensor | float = 0.0
        for turns in range(4):
            for mirrored in (False, True):
                turned = windows.rot90(turns, (1, 2))
                result = network(turned.flip(2) if mirrored else turned)
                result = result.flip(3) if mirrored else result
                total = total + result.rot90(-turns, (2, 3))
        return total / 8  # type: ignore[return-value]

    return mean
