"""Average precision of Mask R-CNN over a split, and a sheet of its predictions."""

from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from common.args import Speedups
from common.augment import normalise
from common.cli import progress
from common.data import Batch, Tiles
from common.distributed import Process
from common.io.tiles import IGNORE
from common.loader import prefetch
from common.run.report import Scoring, Shown
from mask import coco
from mask.model import predict


@torch.inference_mode()
def evaluate(
    model: nn.Module, batches: DataLoader, process: Process, speedups: Speedups, folder: Path
) -> dict[str, float]:
    """COCO's scores of the bare `model` over all tiles; each tile is scored by one process.

    Writes into `folder` the predictions (`<split>_predictions.json`), a picture of some of them
    (`<split>_sheet.jpg`), and the best and the worst tiles (`<split>_tiles.json`).

    Returns:
        On rank 0 what `mask.coco.score` returns; {} on other ranks.
    """
    tiles = batches.dataset
    assert isinstance(tiles, Tiles)
    model.eval()
    results: list[dict] = []
    scored = list(chain(*(batches.batch_sampler or [])))
    shown = Shown(tiles.images, scored, tiles.shows_aircraft)
    delivered = prefetch(batches, process.device)
    bar = progress(delivered, total=len(batches), desc="score", enabled=process.is_main)
    for batch in bar:
        images = normalise(batch.images).contiguous(memory_format=speedups.layout)
        with speedups.autocast(process.device):
            predictions = predict(model, images)
        results += coco.results(predictions, batch.tile.tolist(), tiles)
        if process.is_main:
            row = partial(_row, batch, predictions, tiles.ignore)
            pixels = [_overlap(batch, predictions, tiles.ignore, i) for i in range(len(images))]
            if tiles.labels == "box":  # masks would be compared with diamonds
                pixels = [(0, 0)] * len(images)
            shown.offer(batch.tile.tolist(), pixels, row)
    results = coco.gather(results, process)
    scores: dict[str, float] = {}
    if process.is_main:
        split = tiles.folder.name
        shown.write(folder, split, tiles.classes)
        coco.write(results, folder / f"{split}_predictions.json")
        scores = coco.score(results, tiles)
    coco.wait_for_main(process)
    return scores


def scoring(labels: str) -> Scoring:
    """How a model is scored on labels of a kind, see `Tiles.labels`."""
    kind = labels or "mask"
    drawn = tuple(dict.fromkeys((f"{kind}_AP", f"{kind}_AP50", "box_AP")))
    return Scoring(evaluate, f"{kind}_AP", drawn, coco.DEFINITION, coco.LABELS)


def _row(batch: Batch, predictions: list, ignore: int, i: int) -> tuple[np.ndarray, ...]:
    """Image, truth and prediction of a tile of a batch, as `compared` takes them."""
    ids, classes = batch.ids[i].long(), batch.classes[i].long()
    truth = torch.where(ids == ignore, IGNORE, ids % 256 * 256 + classes[ids])
    masks, labels = (prediction.cpu().numpy() for prediction in _sure(predictions[i]))
    predicted = np.zeros(masks.shape[1:], np.uint16)
    # Where masks overlap, the first is drawn, with the best score.
    for number, (mask, label) in reversed(list(enumerate(zip(masks, labels, strict=True)))):
        predicted[mask] = number % 256 * 256 + label
    return *(t.cpu().numpy() for t in (batch.images[i], truth.to(torch.uint16))), predicted


def _sure(prediction: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The masks that are drawn, those with a score above 0.5: bool [N,H,W], and their classes."""
    sure = prediction["scores"] > 0.5
    return prediction["masks"][sure], prediction["labels"][sure]


def _overlap(batch: Batch, predictions: list, ignore: int, i: int) -> tuple[int, int]:
    """Pixels of aircraft in both truth and prediction, and in either; classes do not matter."""
    counted = batch.ids[i] != ignore
    truth, predicted = (batch.ids[i] > 0) & counted, _sure(predictions[i])[0].any(0) & counted
    return int((truth & predicted).sum()), int((truth | predicted).sum())
