"""Region and outline every aircraft in scenes of any size with a trained Mask R-CNN.

python mask/inference.py runs/mask/model_best.pth data/test/images predictions
python mask/inference.py runs/mask/model_best.pth scene.tif maps --score-threshold 0.7
"""

import argparse
import json
import shutil
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from pycocotools import mask as rle

from common.cli import Parser, fraction, positive, say
from common.cli import run as run_main
from common.io.files import whole_file
from common.io.pictures import Reduced, outline, save
from common.io.raster import Scene, no_valid_pixel
from common.predict.crops import Crops
from common.predict.folder import (
    Default,
    each_scene,
    inference_parser,
    list_images,
    make_output_folder,
)
from common.predict.maps import feature_file
from common.predict.network import load_network
from common.predict.regions import Region
from common.predict.windows import Network, Tiling
from mask.model import NAME, from_checkpoint, from_outputs, predict
from mask.scenes import Detected, detect

MOST_PIXELS = (1 << 32) - 1  # COCO's run lengths are unsigned numbers of 32 bits


def parser() -> Parser:
    """The options of this script."""
    options = inference_parser("Region and outline every aircraft in scenes of any size.")
    add = options.add_argument
    add("--score-threshold", type=fraction, default=0.5, help="drop lower scores")
    add(
        "--max-detections",
        type=positive,
        default=Default(100),
        metavar="N",
        help="of one window; an .onnx file has its own",
    )
    return options


def main(argv: list[str] | None = None) -> None:
    args = parser().parse(argv)
    build = partial(from_checkpoint, most_detections=args.max_detections)
    network, classes = load_network(args, NAME, build, predict, from_outputs)
    paths = list_images(args.image_dir, args.index)
    make_output_folder(args)
    images: list[str] = []
    total = 0
    target = args.prediction_dir / "predictions.json"
    with whole_file(target) as file, TemporaryFile(dir=args.prediction_dir) as annotations:

        def predict_one(scene: Scene, name: str) -> None:
            nonlocal total
            image = {
                "id": len(images) + 1,
                "file_name": scene.path.name,
                "width": scene.width,
                "height": scene.height,
                "overlay": f"{name}_overlay.jpg",
            }
            detected = predict_scene(scene, name, network, classes, args)
            images.append(json.dumps(image))
            for one in detected.instances:
                total += 1
                text = {"id": total, "image_id": image["id"]}
                text |= annotate(one, scene.height, scene.width)
                annotations.write(b",\n" * (total > 1) + json.dumps(text).encode())

        refuse = each_scene(paths, args, predict_one)
        categories = [{"id": i, "name": name} for i, name in enumerate(classes[1:], start=1)]
        file.write(f'{{"images": [{", ".join(images)}], "annotations": ['.encode())
        annotations.seek(0)
        shutil.copyfileobj(annotations, file)
        file.write(f'], "categories": {json.dumps(categories)}}}\n'.encode())
    print(
        f"{total} aircraft in {len(images)} images; overlays, maps and predictions.json in "
        f"{args.prediction_dir}"
    )
    refuse()


def predict_scene(
    scene: Scene, name: str, network: Network, classes: list[str], args: argparse.Namespace
) -> Detected:
    """Region the aircraft of a scene, and write its overlay and its map."""
    picture = Reduced(scene.width, scene.height, args.overlay_size)
    tiling = Tiling(args.window, args.overlap, args.batch_size)
    most = args.max_detections
    detected = detect(scene, network, tiling, args.score_threshold, most, picture)
    if not detected.valid:
        raise no_valid_pixel(scene.path)
    if detected.full:
        say(
            f"{scene.path.name!r}: {detected.full} windows reached --max-detections {most}; with a "
            "higher one, or a smaller --window, there may be more"
        )
    detected.instances = [one for one in detected.instances if one.area >= args.min_area]
    crops = Crops(args.crops, lambda find: find.score)
    with feature_file(args.prediction_dir / f"{name}.geojson", scene, classes) as features:
        for one in detected.instances:
            features.add(one)
            crops.add(one)
    small = [reduced(one, picture.factor) for one in detected.instances]
    save(outline(picture.image(), small), args.prediction_dir / f"{name}_overlay.jpg")
    if args.crops:
        crops.write(scene, args.prediction_dir / f"{name}_crops.jpg")
    return detected


def reduced(one: Region, factor: int) -> tuple[np.ndarray, int, int, int, float]:
    """A mask as `outline` takes it, on a picture that is `factor` times as small."""
    x, y = one.x // factor, one.y // factor
    after = [(-one.box[3]) % factor, (-one.box[2]) % factor]
    mask = np.pad(one.mask, ((one.y % factor, after[0]), (one.x % factor, after[1])))
    height, width = (side // factor for side in mask.shape)
    blocks = mask.reshape(height, factor, width, factor)
    return np.asarray(blocks.any((1, 3))), x, y, one.label, one.score


def annotate(one: Region, height: int, width: int) -> dict[str, Any]:
    """An instance as a COCO annotation, its mask as run lengths of the whole image."""
    x1, y1, x2, y2 = one.box
    annotation = {
        "category_id": one.label,
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": one.area,
        "score": round(one.score, 5),
        "iscrowd": 0,
    }
    if height * width <= MOST_PIXELS:
        counts = {"size": [height, width], "counts": run_lengths(one, height, width)}
        runs = rle.frPyObjects(counts, height, width)
        annotation["segmentation"] = counts | {"counts": runs["counts"].decode()}
    return annotation


def run_lengths(one: Region, height: int, width: int) -> list[int]:
    """COCO's run lengths of a mask in an image, column by column, ground first.

    They are made from the cut mask alone, so that their time does not depend on the image.
    """
    columns = np.pad(one.mask.T.astype(np.int8), ((0, 0), (1, 1)))
    steps = np.diff(columns, axis=1)
    starts, ends = (
        (column + one.x) * height + row + one.y
        for column, row in (np.nonzero(steps == step) for step in (1, -1))
    )
    # A run that reaches the image's bottom goes on at the top of the next column.
    goes_on = np.flatnonzero(starts[1:] == ends[:-1])
    places = np.stack([np.delete(starts, goes_on + 1), np.delete(ends, goes_on)], 1)
    counts = np.diff(places.ravel(), prepend=0, append=height * width).tolist()
    return counts if counts[-1] else counts[:-1]


if __name__ == "__main__":
    run_main(main)
