"""COCO's average precision of boxes and masks, from predictions to a file anybody can check.

    python mask/coco.py runs/mask/test_predictions.json data/test/instances_tiled.json

scores any COCO results file against a set of tiles: our own again, or those of another program.
"""

import json
import math
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from faster_coco_eval import COCO, COCOeval_faster
from pycocotools import mask as rle
from torch import Tensor

from common.cli import Parser, UserError, run
from common.data import Tiles
from common.distributed import Process
from preprocessing.files import write_atomic

DEFINITION = (
    "AP = precision averaged over recalls 0, 0.01 … 1, IoUs 0.5, 0.55 … 0.95 and the classes that "
    "occur, from the 100 surest detections of each tile and class; ignored fragments do not count"
)

NAMES = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
"""COCO's twelve numbers in its own order; s, m and l: below 32², below 96² and above, in pixels."""

Result = dict[str, Any]


def results(predictions: list[dict[str, Tensor]], tiles: list[int], data: Tiles) -> list[Result]:
    """What COCO's results file says of the predictions for some tiles.

    Args:
        predictions: For each tile, on any device: `boxes` float32 [N,4] as x1, y1, x2, y2 in
            pixels, `labels` int64 [N], the index into `data.classes`, `scores` float32 [N] and
            `masks` bool [N,H,W].
        tiles: Places of these tiles in `data`.
        data: The set.

    Returns:
        For each of their aircraft `image_id` and `category_id` as in `instances_tiled.json`, `bbox`
        [x, y, w, h], `score`, and `segmentation`, the mask as compressed run lengths.
    """
    categories = _category_ids(data.folder / "instances_tiled.json")
    found = []
    for prediction, tile in zip(predictions, tiles, strict=True):
        boxes = prediction["boxes"].float()
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
        # Run lengths go down the columns: turned on the device, which is better at it.
        columns = prediction["masks"].transpose(1, 2).contiguous().view(torch.uint8)
        for label, bbox, score, runs in zip(
            prediction["labels"].tolist(),
            boxes.tolist(),
            prediction["scores"].tolist(),
            rle.encode(columns.cpu().numpy().T),
            strict=True,
        ):
            found.append(
                {
                    "image_id": data.images[tile]["id"],
                    "category_id": categories[label],
                    "bbox": bbox,
                    "score": score,
                    "segmentation": {"size": runs["size"], "counts": runs["counts"].decode()},
                }
            )
    return found


def gather(mine: list[Result], process: Process) -> list[Result]:
    """The results of all processes on rank 0, the same list for any number of them; [] elsewhere.

    They are in order of image, then falling score; a tile that two processes have predicted counts
    as the lower rank has it.

    Args:
        mine: What `results` made of this process's tiles.
        process: This process. Over NCCL its device must be torch's current one, as
            `process_group` sets it.
    """
    shares: list[list[Result]] | None = [mine]
    if process.world_size > 1:
        shares = [[]] * process.world_size if process.is_main else None
        dist.gather_object(mine, shares)
    owner: dict[int, int] = {}
    return sorted(
        (
            result
            for rank, share in enumerate(shares or [])
            for result in share
            if owner.setdefault(result["image_id"], rank) == rank
        ),
        key=_order,
    )


def _order(result: Result) -> tuple:
    """COCO takes equal scores as they come, so that even these need an order of their own."""
    first = result["image_id"], -result["score"], result["category_id"], result["bbox"]
    return (*first, result["segmentation"]["counts"])


def score(results: list[Result], data: Tiles) -> dict[str, float]:
    """COCO's numbers of `results`, those of all the set's tiles, which stay as they are.

    Returns:
        As `evaluate`.
    """
    return evaluate(results, _read(data.folder / "instances_tiled.json"))


def evaluate(results: list[Result], coco: dict[str, Any]) -> dict[str, float]:
    """COCO's numbers (https://cocodataset.org/#detection-eval), equal to pycocotools' `COCOeval`.

    As there, a result has the size of its `bbox` where it has one, for masks too: an unmatched mask
    is charged to the small, medium or large by its box.

    Args:
        results: COCO results, boxes and masks or either; ids must be those of `coco`.
        coco: Content of a COCO file. It is used up: the evaluation leaves notes in it.

    Returns:
        `box_AP` … `box_ARl`, and `mask_AP` … `mask_ARl` unless the results have boxes alone; of
        the masks also `mask_AP.<class>` where there are several classes, and
        `mask_AP.airport.<name>`, AP of an airport's tiles alone, where there are several airports.
        All in 0…1. A number without truth to it, for which COCO says -1, is left out.
    """
    truth = COCO(coco, print_function=_silent)
    found = (
        truth.loadRes([dict(result) for result in results])
        if results
        else COCO({**coco, "annotations": []}, print_function=_silent)
    )
    numbers = _run(truth, found, "bbox")[1]
    numbers = {f"box_{name}": value for name, value in numbers.items()}
    if results and "segmentation" not in results[0]:
        return numbers
    by_class, masks = _run(truth, found, "segm")
    numbers |= {f"mask_{name}": value for name, value in masks.items()}
    if len(by_class) > 1:
        numbers |= {f"mask_AP.{name}": value for name, value in by_class.items() if value >= 0}
    airports = _airports(coco["images"])
    for name in sorted(airports) if len(airports) > 1 else []:
        alone = _run(truth, found, "segm", airports[name])[1]
        numbers |= {f"mask_AP.airport.{name}": alone["AP"]} if "AP" in alone else {}
    return numbers


def _run(
    truth: COCO, found: COCO, kind: str, images: list[int] | None = None
) -> tuple[dict[str, float], dict[str, float]]:
    """AP of each class, -1 where it does not occur, and those of `NAMES` that are defined."""
    evaluation = COCOeval_faster(truth, found, kind, print_function=_silent)
    if images is not None:
        evaluation.params.imgIds = images
    evaluation.run()
    # [IoU, recall, class, size, number of detections]: all sizes, 100 detections.
    precision = evaluation.eval["precision"][..., 0, -1]
    by_class = {
        truth.cats[category]["name"]: float(precision[..., k].mean())
        for k, category in enumerate(evaluation.params.catIds)
    }
    numbers = zip(NAMES, map(float, evaluation.stats), strict=True)
    return by_class, {name: value for name, value in numbers if value >= 0}


def _airports(images: list[dict[str, Any]]) -> dict[str, list[int]]:
    """Image ids of each airport; of a scene that is its own airport nobody knows the place."""
    airports: dict[str, list[int]] = {}
    for image in images:
        if image.get("airport") != image.get("scene"):
            airports.setdefault(image["airport"], []).append(image["id"])
    return airports


def _silent(*_words: object) -> None:
    pass


def write(results: list[Result], path: Path) -> None:
    """Write a COCO results file, which is either complete or as it was.

    Raises:
        ValueError: A score or box is not a finite number, which JSON cannot say.
    """
    write_atomic(path, json.dumps(results, separators=(",", ":"), allow_nan=False).encode())


@lru_cache(maxsize=8)
def _category_ids(path: Path) -> dict[int, int]:
    """The file's id of each class 1…C, kept as every batch asks for them."""
    ids = sorted(category["id"] for category in _read(path)["categories"])
    return dict(enumerate(ids, start=1))


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"there is no file '{path}'; a test or training run writes it.") from None
    except (ValueError, RecursionError):
        raise UserError(f"'{path}' is not JSON, or cut short; write it again.") from None


def _read_truth(path: Path) -> dict[str, Any]:
    coco = _read(path)
    keys = ("images", "annotations", "categories")
    if not isinstance(coco, dict) or not all(isinstance(coco.get(key), list) for key in keys):
        raise UserError(f"'{path}' is not a COCO file of tiles; name an instances_tiled.json.")
    return coco


def _read_results(path: Path, coco: dict[str, Any]) -> list[Result]:
    """A results file of any origin; what COCO would pass over in silence is refused."""
    found = _read(path)
    if not isinstance(found, list):
        raise UserError(f"'{path}' is not a COCO results file, which is a list of detections.")
    sizes = {image["id"]: [image["height"], image["width"]] for image in coco["images"]}
    categories = {category["id"] for category in coco["categories"]}
    for number, result in enumerate(found, start=1):
        if wrong := _what_is_wrong(result, found[0], sizes, categories):
            raise UserError(
                f"'{path}': detection {number} {wrong}; name the results for these tiles."
            )
    return found


def _what_is_wrong(
    result: Result, first: Result, sizes: dict[int, list[int]], categories: set[int]
) -> str | None:
    shapes = {"bbox", "segmentation"}
    try:
        image, category = result["image_id"], result["category_id"]
        x, y, w, h = result.get("bbox", [0, 0, 0, 0])
        runs = result.get("segmentation", {"size": sizes.get(image), "counts": ""})
        if not all(map(math.isfinite, (result["score"], x, y, w, h))):
            return "has a score or a bbox that is not finite"
        if not isinstance(runs["counts"], str):
            return "has a segmentation that is not compressed run lengths"
        if not shapes & result.keys() or shapes & result.keys() != shapes & first.keys():
            return "has not what all must have, a bbox or a segmentation or both"
        if image not in sizes:
            return f"has the image id {image!r}, which is not in the set"
        if category not in categories:
            return f"has the category id {category!r}, which is not in the set"
        return None if runs["size"] == sizes[image] else "has a mask of another size than its tile"
    except (KeyError, TypeError, ValueError, AttributeError):
        return "lacks or garbles image_id, category_id, score, bbox or segmentation"


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description="Score a COCO results file against a set of tiles.")
    parser.add_argument("predictions", type=Path, help="COCO results file")
    parser.add_argument("truth", type=Path, help="instances_tiled.json of the tiles")
    args = parser.parse(argv)
    coco = _read_truth(args.truth)
    numbers = evaluate(_read_results(args.predictions, coco), coco)
    print(DEFINITION)
    for name, value in numbers.items():
        print(f"{name:<12} {value:.4f}")


if __name__ == "__main__":
    run(main)
