"""COCO's average precision of boxes and masks, and the results file that it is computed from.

    python mask/coco.py runs/mask/test_predictions.json data/test/instances_tiled.json

scores a COCO results file, ours or one of another program, against its tiles.
"""

import json
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

from common.cli import Parser, run
from common.data import Tiles
from common.distributed import Process
from common.io.coco import read_coco
from common.io.files import write_atomic
from common.io.tiles import airport_of
from mask.results_file import read_results, read_truth

DEFINITION = (
    "AP = precision averaged over recalls 0, 0.01 … 1, IoUs 0.5, 0.55 … 0.95 and the classes that "
    "occur, from the 100 best-scored detections per tile and class; ignored fragments do not count"
)

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""COCO's twelve numbers in its order; s, m, l: areas up to 32², up to 96² and above, in pixels."""

Result = dict[str, Any]


def results(predictions: list[dict[str, Tensor]], tiles: list[int], data: Tiles) -> list[Result]:
    """The predictions for some tiles as entries of a COCO results file.

    Args:
        predictions: For each tile, on any device: `boxes` float32 [N,4] as x1, y1, x2, y2 in
            pixels, `labels` int64 [N], 1…C of `data.classes`, `scores` float32 [N] and `masks` bool
            [N,H,W].
        tiles: Places of these tiles in `data`.
        data: The set.

    Returns:
        For each detection `image_id` and `category_id` as in `instances_tiled.json`, `bbox`
        [x, y, w, h], `score`, and `segmentation`, its mask as compressed run lengths.
    """
    categories = _category_ids(data.folder / "instances_tiled.json")
    entries = []
    for prediction, tile in zip(predictions, tiles, strict=True):
        corner, opposite = prediction["boxes"].split(2, 1)
        # Run lengths go down the columns. The device is faster at transposing.
        columns = prediction["masks"].transpose(1, 2).contiguous().view(torch.uint8)
        for label, bbox, score, runs in zip(
            prediction["labels"].tolist(),
            torch.cat([corner, opposite - corner], 1).tolist(),
            prediction["scores"].tolist(),
            rle.encode(columns.cpu().numpy().T),
            strict=True,
        ):
            entries.append(
                {
                    "image_id": data.images[tile]["id"],
                    "category_id": categories[label],
                    "bbox": bbox,
                    "score": score,
                    "segmentation": {"size": runs["size"], "counts": runs["counts"].decode()},
                }
            )
    return entries


def gather(mine: list[Result], process: Process) -> list[Result]:
    """The results of all processes on rank 0, in an order that does not depend on their number.

    Other ranks get []. If several processes have predicted a tile, the lowest rank's results are
    kept. With NCCL the process's device must be torch's current one, as `process_group` leaves it.

    Args:
        mine: What `results` returned for this process's tiles.
        process: This process.
    """
    shares: list[Any] = [mine]
    if process.world_size > 1:
        shares = [None] * process.world_size if process.is_main else []
        dist.gather_object(mine, shares or None)
    owner: dict[int, int] = {}
    kept = [
        result
        for rank, share in enumerate(shares)
        for result in share
        if owner.setdefault(result["image_id"], rank) == rank
    ]
    return sorted(kept, key=_order)


def _order(result: Result) -> tuple:
    """By image, then falling score; COCO keeps the order of equal scores, so ties are broken."""
    runs = result["segmentation"]
    first = result["image_id"], -result["score"], result["category_id"]
    return *first, str(result["bbox"]), runs["size"], runs["counts"]  # as text: -0.0 is not 0.0


def score(results: list[Result], data: Tiles) -> dict[str, float]:
    """COCO's numbers of `results`, which are not changed, over all tiles of `data`.

    Returns:
        As `evaluate`; for a set without aircraft, which has no AP, `false_alarms_per_tile`, the
        detections with a score of 0.5 or more.
    """
    coco = read_coco(data.folder / "instances_tiled.json")
    ids = {image["id"] for image in data.images}  # fewer than the file's after `Tiles.spread`
    coco["images"] = [image for image in coco["images"] if image["id"] in ids]
    coco["annotations"] = [a for a in coco["annotations"] if a["image_id"] in ids]
    alarms = sum(result["score"] >= 0.5 for result in results) / len(ids)
    return evaluate(results, coco) or {"false_alarms_per_tile": alarms}


def evaluate(results: list[Result], coco: dict[str, Any]) -> dict[str, float]:
    """COCO's numbers (https://cocodataset.org/#detection-eval), equal to pycocotools' `COCOeval`.

    The AP of `COCOeval` can be lower by up to 2**-52, which it adds to TP + FP to avoid a division
    by 0. As there, an unmatched mask counts as small, medium or large by the area of its result's
    `bbox`, if it has one.

    Annotation ids may be of any kind, repeat, or be 0. (`COCOeval` itself confuses repeated ids
    and counts a match with id 0 as no match.)

    Args:
        results: COCO results with boxes, masks or both, about images and categories of `coco`.
        coco: Content of a COCO file; its annotations may be boxes without outlines. Do not use it
            again: the evaluation writes into it.

    Returns:
        `box_AP` … `box_ARl`, and `mask_AP` … `mask_ARl` unless the results or the annotations have
        only boxes. For masks also `mask_AP.<class>` if there are several classes, and
        `mask_AP.airport.<name>`, from the tiles of one airport, if there are several. All in 0…1; a
        number without truth, for which COCO gives -1, is left out.
    """
    results = _numbered(results, coco)
    masks = all("segmentation" in entry for entry in results[:1] + coco["annotations"])
    truth = COCO(coco, print_function=_silent)
    if results:
        detected = truth.loadRes(results)
    else:
        detected = COCO({**coco, "annotations": []}, print_function=_silent)
    numbers = {f"box_{name}": value for name, value in _run(truth, detected, "bbox")[0].items()}
    if masks:
        total, by_class = _run(truth, detected, "segm")
        numbers |= {f"mask_{name}": value for name, value in total.items()}
        if len(by_class) > 1:
            numbers |= {f"mask_AP.{name}": value for name, value in by_class.items()}
        airports = _airports(coco["images"])
        for name in sorted(airports) if len(airports) > 1 else []:
            part, _ = _run(truth, detected, "segm", airports[name])
            numbers[f"mask_AP.airport.{name}"] = part["AP"]
    return {name: value for name, value in numbers.items() if value >= 0}


def _numbered(results: list[Result], coco: dict[str, Any]) -> list[Result]:
    """Number images, categories and annotations from 1; returns new results with these ids.

    Whole numbers keep their order, which decides between detections of equal score.
    """
    image, category = (
        {entry["id"]: n for n, entry in enumerate(_in_order(coco[name]), start=1)}
        for name in ("images", "categories")
    )
    for name, number in (("images", image), ("categories", category)):
        coco[name] = [entry | {"id": number[entry["id"]]} for entry in coco[name]]

    def new_ids(entry: Result) -> Result:
        ids = {"image_id": image[entry["image_id"]], "category_id": category[entry["category_id"]]}
        return entry | ids

    coco["annotations"] = [new_ids(a) | {"id": n} for n, a in enumerate(coco["annotations"], 1)]
    return [new_ids(result) for result in results]


def _in_order(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By their ids, or as they are if some of these are texts."""
    texts = any(isinstance(entry["id"], str) for entry in entries)
    return entries if texts else sorted(entries, key=lambda entry: entry["id"])


def _run(
    truth: COCO, detected: COCO, kind: str, images: list[int] | None = None
) -> tuple[dict[str, float], dict[str, float]]:
    """`NAMES` and AP by class, from all images or some; -1 if there is no truth."""
    evaluation = COCOeval_faster(truth, detected, kind, print_function=_silent)
    evaluation.params.imgIds = images or evaluation.params.imgIds
    evaluation.run()
    # [IoU, recall, class, size, number of detections]: any size, 100 detections.
    by_class = evaluation.eval["precision"][..., 0, -1].mean((0, 1)).tolist()
    classes = [truth.cats[category]["name"] for category in evaluation.params.catIds]
    numbers = dict(zip(NAMES, map(float, evaluation.stats), strict=True))
    return numbers, dict(zip(classes, by_class, strict=True))


def _airports(images: list[dict[str, Any]]) -> dict[str, list[int]]:
    """Image ids of each known airport."""
    airports: dict[str, list[int]] = {}
    for image in images:
        if (name := airport_of(image)) is not None:
            airports.setdefault(name, []).append(image["id"])
    return airports


def _silent(*_words: object) -> None:
    pass


def write(results: list[Result], path: Path) -> None:
    """Write a COCO results file; whatever happens, `path` is either the old or the new file.

    Raises:
        ValueError: A score or a box is not finite, which JSON cannot express.
    """
    write_atomic(path, json.dumps(results, separators=(",", ":"), allow_nan=False).encode())


@lru_cache(maxsize=8)
def _category_ids(path: Path) -> dict[int, int]:
    """The file's id of each class 1…C, cached because every batch needs them."""
    ids = sorted(category["id"] for category in read_coco(path)["categories"])
    return dict(enumerate(ids, start=1))


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description="Score a COCO results file against a set of tiles.")
    parser.add_argument("predictions", type=Path, help="COCO results file")
    parser.add_argument("truth", type=Path, help="instances_tiled.json of the tiles")
    args = parser.parse(argv)
    coco = read_truth(args.truth)
    found = read_results(args.predictions, coco)
    if len(coco["categories"]) < len(coco["category_of"]):
        print(f"{str(args.truth)!r} has two categories of the same name: they are one class")
    if not all("segmentation" in a for a in coco["annotations"]):
        print(f"{str(args.truth)!r} has annotations without an outline: only boxes are scored")
    if not coco["annotations"]:
        print(f"{str(args.truth)!r} has no annotation, so all {len(found)} detections are wrong")
    numbers = evaluate(found, coco)
    print(DEFINITION)
    for name, value in numbers.items():
        print(f"{name} {value:.4f}")


if __name__ == "__main__":
    run(main)
