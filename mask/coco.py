"""COCO's average precision of boxes and masks, and the results file that it is computed from."""

import json
from datetime import timedelta
from functools import lru_cache
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from faster_coco_eval import COCO, COCOeval_faster
from pycocotools import mask as rle
from torch import Tensor

from common.data import Tiles
from common.distributed import Process
from common.distributed import gather as gather_tensors
from common.io.files import write_atomic
from common.io.tiles import airport_of, read_index

DEFINITION = (
    "AP = precision averaged over recalls 0, 0.01 … 1, IoUs 0.5, 0.55 … 0.95 and the classes that "
    "occur, from the 100 best-scored detections per tile and class; ignored fragments do not count"
)

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""COCO's twelve numbers in its order; s, m, l: areas up to 32², up to 96² and above, in pixels."""

LABELS: dict[str, str] = {
    f"{kind}_{measure}{size[0]}": f"{kind}_{measure}.size.{size}"
    for kind in ("box", "diamond", "mask")
    for measure in ("AP", "AR")
    for size in ("small", "medium", "large")
}
"""The scores of one size: COCO's name → the name by parts, `mask_APs` → `mask_AP.size.small`."""

Result = dict[str, Any]

_calls = count()  # of `wait_for_main`, the same on all ranks


def results(predictions: list[dict[str, Tensor]], tiles: list[int], data: Tiles) -> list[Result]:
    """The predictions for some tiles as entries of a COCO results file.

    Args:
        predictions: For each tile, on any device: `boxes` float32 [N,4] as x1, y1, x2, y2 in
            pixels, `labels` int64 [N], 1…C of `data.classes`, `scores` float32 [N] and `masks` bool
            [N,H,W].
        tiles: Indices of these tiles in `data`.
        data: The set.

    Returns:
        For each detection `image_id` and `category_id` as in `instances_tiled.json`, `bbox`
        [x, y, w, h], `score`, and `segmentation`, its mask as compressed run lengths.
    """
    categories = _category_ids(data.folder / "instances_tiled.json")
    entries = []
    for prediction, tile in zip(predictions, tiles, strict=True):
        corner, opposite = prediction["boxes"].split(2, 1)
        # Run lengths go down the columns. The device transposes faster than the CPU.
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


def gather(local: list[Result], process: Process) -> list[Result]:
    """The results of all processes on rank 0, in an order that does not depend on their number.

    Other ranks get []. With NCCL the process's device must be torch's current one, as
    `process_group` leaves it.

    Args:
        local: What `results` returned for this process's tiles.
        process: This process.
    """
    shares: list[Any] = [local]
    if process.world_size > 1:
        shares = [None] * process.world_size if process.is_main else []
        dist.gather_object(local, shares or None)
    return sorted(chain.from_iterable(shares), key=_order)


def wait_for_main(process: Process) -> None:
    """Return when all processes have called this; for rank 0 the others wait as long as it takes.

    A collective would end after `--dist-timeout`, and COCO's scores of many tiles may take longer.
    `common.run.heartbeat` still ends the run if rank 0 stops responding.
    """
    if process.world_size > 1:
        # A connection of its own, because threads of torch use the default one.
        store = dist.PrefixStore("scored", dist.distributed_c10d._get_default_store().clone())
        call = str(next(_calls))
        if process.is_main:
            store.set(call, "")
        else:
            store.wait([call], timedelta(days=30))
    gather_tensors(process, torch.zeros(1))


def _order(result: Result) -> tuple:
    """By image, then falling score, then the rest: COCO keeps the order of equal scores."""
    runs = result["segmentation"]
    first = result["image_id"], -result["score"], result["category_id"]
    return *first, str(result["bbox"]), runs["size"], runs["counts"]  # as text: -0.0 is not 0.0


def score(results: list[Result], data: Tiles) -> dict[str, float]:
    """COCO's numbers of `results`, which are not changed, over all tiles of `data`.

    Returns:
        As `evaluate`. A set without aircraft has no AP; then `false_alarms_per_tile`, the number of
        detections with a score of at least 0.5.
    """
    coco = read_index(data.folder)
    ids = {image["id"] for image in data.images}  # fewer than the file's after `Tiles.spread`
    coco["images"] = [image for image in coco["images"] if image["id"] in ids]
    coco["annotations"] = [a for a in coco["annotations"] if a["image_id"] in ids]
    alarms = sum(result["score"] >= 0.5 for result in results) / len(ids)
    return evaluate(results, coco) or {"false_alarms_per_tile": alarms}


def evaluate(results: list[Result], coco: dict[str, Any]) -> dict[str, float]:
    """COCO's numbers (https://cocodataset.org/#detection-eval), equal to pycocotools' `COCOeval`.

    The AP of `COCOeval` can be lower by up to 2**-52, which it adds to TP + FP to avoid a division
    by 0. As there, an unmatched mask is small, medium or large by the area of its result's `bbox`.

    Args:
        results: COCO results with boxes and masks, about images and categories of `coco`.
        coco: Content of a COCO file; annotations have unique ids from 1. Do not use it again: the
            evaluation writes into it.

    Returns:
        `box_AP` … `box_ARl` and `mask_AP` … `mask_ARl`; `mask_AP.<class>` if there are several
        classes; and `mask_AP.airport.<name>`, from the tiles of one airport, if there are several.
        Where `info.labels` is `diamond` or `box`, that is the name in place of `mask`.
        All are in 0…1; a number without truth, for which COCO gives -1, is left out.
    """
    kind = coco.get("info", {}).get("labels", "mask")
    scored = "bbox" if kind == "box" else "segm"
    truth = COCO(coco, print_function=_silent)
    if results:
        detected = truth.loadRes([dict(result) for result in results])
    else:
        detected = COCO({**coco, "annotations": []}, print_function=_silent)
    boxes, _ = _run(truth, detected, "bbox")
    main, by_class = _run(truth, detected, scored)
    numbers = {f"box_{name}": value for name, value in boxes.items()}
    numbers |= {f"{kind}_{name}": value for name, value in main.items()}
    if len(by_class) > 1:
        numbers |= {f"{kind}_AP.{name}": value for name, value in by_class.items()}
    airports: dict[str, list[int]] = {}
    for image in coco["images"]:
        if (name := airport_of(image)) is not None:
            airports.setdefault(name, []).append(image["id"])
    for name in sorted(airports) if len(airports) > 1 else []:
        part, _ = _run(truth, detected, scored, airports[name])
        numbers[f"{kind}_AP.airport.{name}"] = part["AP"]
    return {name: value for name, value in numbers.items() if value >= 0}


def _run(
    truth: COCO, detected: COCO, kind: str, images: list[int] | None = None
) -> tuple[dict[str, float], dict[str, float]]:
    """The numbers of `NAMES`, and AP by class, over all images or some; -1 without truth."""
    evaluation = COCOeval_faster(truth, detected, kind, print_function=_silent)
    evaluation.params.imgIds = images or evaluation.params.imgIds
    evaluation.run()
    # [IoU, recall, class, size, number of detections]: all sizes, 100 detections.
    by_class = evaluation.eval["precision"][..., 0, -1].mean((0, 1)).tolist()
    classes = [truth.cats[category]["name"] for category in evaluation.params.catIds]
    numbers = dict(zip(NAMES, map(float, evaluation.stats), strict=True))
    return numbers, dict(zip(classes, by_class, strict=True))


def _silent(*_words: object) -> None:
    pass


def write(results: list[Result], path: Path) -> None:
    """Write a COCO results file; if that fails, the old file stays.

    Raises:
        ValueError: A score or a box is not finite, which JSON cannot express.
    """
    write_atomic(path, json.dumps(results, separators=(",", ":"), allow_nan=False).encode())


@lru_cache(maxsize=8)
def _category_ids(path: Path) -> dict[int, int]:
    """The file's category id of each class 1…C, cached because every batch needs them."""
    ids = sorted(category["id"] for category in read_index(path.parent)["categories"])
    return dict(enumerate(ids, start=1))
