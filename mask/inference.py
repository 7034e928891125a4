"""Find and outline every aircraft in images of any size with a trained Mask R-CNN.

python mask/inference.py runs/mask/model_best.pth data/test/images predictions
python mask/inference.py runs/mask/model_best.pth photo.jpg predictions --score-threshold 0.7
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from pycocotools import mask as rle

from common.augment import normalise
from common.cli import UserError, fraction
from common.cli import run as run_main
from common.distributed import pick_device
from common.io.files import write_atomic
from common.io.pictures import outline, save
from common.predict.folder import (
    inference_parser,
    list_images,
    make_output_folder,
    readable,
    refuse,
)
from common.run import checkpoint
from mask.model import NAME, from_checkpoint, predict
from mask.scenes import Instance, detect


def main(argv: list[str] | None = None) -> None:
    parser = inference_parser("Find and outline every aircraft in images of any size.")
    parser.add_argument("--score-threshold", type=fraction, default=0.5, help="drop lower scores")
    args = parser.parse(argv)
    device = pick_device(args.device)
    saved = checkpoint.load(args.model, NAME)
    classes = saved["classes"]
    model = checkpoint.rebuild(saved, from_checkpoint).to(device).eval()
    paths = list_images(args.image_dir, args.index)
    make_output_folder(args)
    bad: list[UserError] = []
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (path, name, image) in enumerate(readable(paths, bad), start=1):
        pixels = normalise(torch.from_numpy(image).to(device)[None])[0]
        instances = detect(
            pixels,
            partial(predict, model),
            args.window,
            args.overlap,
            args.batch_size,
            args.score_threshold,
        )
        instances = [i for i in instances if i.mask.sum() >= args.min_area]
        height, width = image.shape[:2]
        overlay = f"{name}_overlay.jpg"
        save(
            outline(image, [(i.mask, i.x, i.y, i.label, i.score) for i in instances]),
            args.prediction_dir / overlay,
        )
        images.append(
            {
                "id": number,
                "file_name": path.name,
                "width": width,
                "height": height,
                "overlay": overlay,
            }
        )
        for instance in instances:
            annotation = annotate(instance, height, width)
            annotations.append({"id": len(annotations) + 1, "image_id": number} | annotation)
    categories = [{"id": i, "name": name} for i, name in enumerate(classes[1:], start=1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    target = args.prediction_dir / "predictions.json"
    write_atomic(target, (json.dumps(content) + "\n").encode())
    print(
        f"{len(annotations)} aircraft in {len(images)} images; overlays and predictions.json in "
        f"{args.prediction_dir}"
    )
    refuse(bad, paths)


def annotate(one: Instance, height: int, width: int) -> dict[str, Any]:
    """An instance as a COCO annotation, its mask as run lengths of the whole image."""
    whole = np.zeros((height, width), np.uint8, order="F")
    x1, y1, x2, y2 = one.box
    whole[y1:y2, x1:x2] = one.mask
    runs = rle.encode(whole)
    return {
        "category_id": one.label,
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": int(one.mask.sum()),
        "score": round(one.score, 5),
        "segmentation": {"size": [height, width], "counts": runs["counts"].decode()},
        "iscrowd": 0,
    }


if __name__ == "__main__":
    run_main(main)
