"""Detect and outline every aircraft in scenes of any size with a trained Mask R-CNN.

python mask/inference.py runs/mask/model_best.pth data/test/images predictions
python mask/inference.py runs/mask/model_best.pth scene.tif maps --score-threshold 0.7
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from pycocotools import mask as rle

from common.cli import Parser, fraction, positive
from common.cli import run as run_main
from common.io.pictures import save
from common.io.raster import Scene
from common.predict.folder import inference_parser, predicted_scenes
from common.predict.maps import feature_file, wanted
from common.predict.network import load_network
from common.predict.pictures import Crops, Reduced, outline
from common.predict.regions import Region
from common.predict.windows import Network, Tiling
from mask.model import NAME, from_checkpoint, from_outputs, predict
from mask.rcnn import MaskRCNN
from mask.scenes import detect

MOST_PIXELS = (1 << 32) - 1  # COCO's run lengths are unsigned numbers of 32 bits


def parser() -> Parser:
    """The options of this script."""
    options = inference_parser("Detect and outline every aircraft in scenes of any size.")
    add = options.add_argument
    add("--score-threshold", type=fraction, default=0.5, help="drop lower scores")
    add(
        "--max-detections",
        type=positive,
        metavar="N",
        help=f"of one window; default: {MaskRCNN.most_detections}, or the .onnx file's",
    )
    return options


def main(argv: list[str] | None = None) -> None:
    args = parser().parse(argv)
    network, classes = load_network(
        args,
        NAME,
        lambda content: from_checkpoint(content, args.max_detections),
        predict,
        from_outputs,
        max_detections=MaskRCNN.most_detections,
    )
    predict_one = partial(predict_scene, network=network, classes=classes, args=args)
    images: list[dict[str, Any]] = []
    total = 0
    with predicted_scenes(args, predict_one, read_results) as (file, results):
        categories = [{"id": i, "name": name} for i, name in enumerate(classes[1:], start=1)]
        file.write(f'{{"categories": {json.dumps(categories)}, "annotations": ['.encode())
        for entry, annotations in results:
            images.append(entry | {"id": len(images) + 1})
            for annotation in annotations:
                total += 1
                numbered = annotation | {"id": total, "image_id": len(images)}
                file.write(b",\n" * (total > 1) + json.dumps(numbered).encode())
        file.write(f'], "images": {json.dumps(images)}}}\n'.encode())
        print(
            f"{total} aircraft in {len(images)} images; overlays, maps and predictions.json in "
            f"{args.prediction_dir}"
        )


def read_results(content: dict[str, Any]) -> dict[str, tuple[dict[str, Any], list[dict]]]:
    """What `predict_scene` returned for each image of a `predictions.json`."""
    of_image: dict[int, list[dict]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        of_image[annotation["image_id"]].append(annotation)
    return {image["file_name"]: (image, of_image[image["id"]]) for image in content["images"]}


def predict_scene(
    scene: Scene, name: str, network: Network, classes: list[str], args: argparse.Namespace
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Detect the aircraft of a scene, and write its overlay and its map.

    Returns:
        The scene's entry in `predictions.json`, and its annotations there, best first.
    """
    picture = Reduced(scene.width, scene.height, args.overlay_size)
    tiling = Tiling(args.window, args.overlap, args.batch_size)
    most = args.max_detections
    detected = detect(scene, network, tiling, args.score_threshold, most, picture)
    instances = wanted(detected, scene, args)
    entry = {
        "file_name": scene.path.name,
        "width": scene.width,
        "height": scene.height,
        "overlay": f"{name}_overlay.jpg",
    }
    crops = Crops(args.crops, lambda region: region.score)
    with feature_file(args.prediction_dir / f"{name}.geojson", scene, classes) as features:
        for instance in instances:
            features.add(instance)
            crops.add(instance)
        small = [reduced(instance, picture.factor) for instance in instances]
        save(outline(picture.image(), small), args.prediction_dir / entry["overlay"])
        crops.write(scene, args.prediction_dir / f"{name}_crops.jpg")
    return entry, [annotate(instance, scene.height, scene.width) for instance in instances]


def reduced(region: Region, factor: int) -> Region:
    """The same on a picture that is `factor` times as small."""
    below, right = -region.box[3] % factor, -region.box[2] % factor
    mask = np.pad(region.mask, ((region.y % factor, below), (region.x % factor, right)))
    height, width = (side // factor for side in mask.shape)
    small = mask.reshape(height, factor, width, factor).any((1, 3))
    x, y = region.x // factor, region.y // factor
    return Region(region.label, region.score, x, y, np.asarray(small))


def annotate(region: Region, height: int, width: int) -> dict[str, Any]:
    """An instance as a COCO annotation, its mask as run lengths of the whole image."""
    x1, y1, x2, y2 = region.box
    annotation = {
        "category_id": region.label,
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": region.area,
        "score": round(region.score, 5),
        "iscrowd": 0,
    }
    if height * width <= MOST_PIXELS:
        counts = {"size": [height, width], "counts": run_lengths(region, height, width)}
        runs = rle.frPyObjects(counts, height, width)
        annotation["segmentation"] = counts | {"counts": runs["counts"].decode()}
    return annotation


def run_lengths(region: Region, height: int, width: int) -> list[int]:
    """COCO's run lengths of a mask in an image, column by column, ground first.

    They are made from the cut mask alone, so their time does not depend on the image's size.
    """
    columns = np.pad(region.mask.T.astype(np.int8), ((0, 0), (1, 1)))
    steps = np.diff(columns, axis=1)
    starts, ends = (
        (column + region.x) * height + row + region.y
        for column, row in (np.nonzero(steps == step) for step in (1, -1))
    )
    # A run that reaches the image's bottom continues at the top of the next column.
    continued = np.flatnonzero(starts[1:] == ends[:-1])
    edges = np.stack([np.delete(starts, continued + 1), np.delete(ends, continued)], 1)
    counts = np.diff(edges.ravel(), prepend=0, append=height * width).tolist()
    return counts if counts[-1] else counts[:-1]


if __name__ == "__main__":
    run_main(main)
