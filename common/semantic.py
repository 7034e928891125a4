"""What the semantic models share: targets, loss, predicted classes and scores."""

import argparse
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from common.args import Speedups
from common.augment import normalise, random_view
from common.cli import progress
from common.data import Batch, Tiles
from common.distributed import Process, all_reduce_sum
from common.io.tiles import IGNORE
from common.loader import prefetch
from common.run.report import Scoring, Shown

DEFINITION = (
    "IoU = TP / (TP + FP + FN) from one confusion matrix over all pixels of the set; "
    "a class absent from truth and prediction is left out of the mean"
)
# Weight of an aircraft class's pixels; ground pixels weigh 1 and are about forty times as many.
AIRCRAFT_WEIGHT = 2.0
# Weight of the auxiliary head, which reads the backbone's last but one stage and is not used in
# prediction (Zhao et al. 2017, PSPNet; torchvision's references use 0.5).
AUXILIARY_WEIGHT = 0.5


def training_views(args: argparse.Namespace) -> Callable[[Batch, int], tuple[Tensor, Tensor]]:
    """(batch on the device, epoch) → images float32 [B,3,crop,crop] and targets int64."""

    def views(batch: Batch, epoch: int) -> tuple[Tensor, Tensor]:
        options = args.augment, args.scale_jitter, args.foreground
        images, view = random_view(batch, args.crop_size, args.seed, epoch, *options)
        return images, semantic_target(view)

    return views


def semantic_target(batch: Batch) -> Tensor:
    """The class of every pixel: int64 [B,H,W], `IGNORE` where a pixel does not count."""
    return batch.classes.gather(1, batch.ids.flatten(1).long()).view_as(batch.ids).long()


def segmentation_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy plus Dice (Milletari et al. 2016), both averages over the images.

    Every term is computed for each image alone and averaged over the B images. So the loss of a
    global batch is the mean of its parts' losses, for any number of processes. A mean over the
    valid pixels of each part, as in `F.cross_entropy`, would weight the parts unequally.

    Args:
        logits: [B,C,H,W], of any float type.
        targets: int64 [B,H,W], class ids, `IGNORE` where nothing is learnt.

    Returns:
        A float32 scalar; 0 if every pixel is `IGNORE`.
    """
    logits = logits.float()  # sums over 10^5 pixels exceed the range of 16-bit floats
    valid = targets != IGNORE
    known = torch.where(valid, targets, 0)
    log_p = F.log_softmax(logits, 1)
    weight = torch.where(known > 0, AIRCRAFT_WEIGHT, 1.0) * valid
    cross_entropy = -(log_p.gather(1, known[:, None])[:, 0] * weight).mean()

    # Not `F.one_hot`, which reads the largest id back from the device. `IGNORE` matches no class.
    classes = torch.arange(1, logits.shape[1], device=logits.device)[:, None, None]
    truth = targets[:, None] == classes
    p = log_p[:, 1:].exp() * valid[:, None]
    overlap = (p * truth).sum((2, 3))
    pixels = truth.sum((2, 3))
    total = p.sum((2, 3)) + pixels
    # Only where the class occurs: an empty image has no overlap to gain.
    dice = torch.where(pixels > 0, 1 - (2 * overlap + 1) / (total + 1), 0.0)
    return cross_entropy + dice.mean()


def two_head_loss(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    """The loss of torchvision's segmentation models, whose outputs are `out` and `aux`."""
    auxiliary = segmentation_loss(outputs["aux"], targets)
    return segmentation_loss(outputs["out"], targets) + AUXILIARY_WEIGHT * auxiliary


def main_head(model: Any, images: Tensor) -> Tensor:
    """Logits [B,C,H,W] of the main head of torchvision's segmentation models.

    `model(images)` would also compute the auxiliary head, which prediction does not use.
    """
    coarse = model.classifier(model.backbone(images)["out"])
    return F.interpolate(coarse, size=images.shape[-2:], mode="bilinear", align_corners=False)


def likeliest(logits: Tensor) -> Tensor:
    """[B,C,H,W] → uint8 [B,H,W]."""
    return logits.argmax(1).to(torch.uint8)


def softmax(logits: Tensor) -> Tensor:
    """[B,C,H,W] → float32 that sums to 1 over C."""
    return logits.float().softmax(1)


def confusion(predicted: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """Count the pixels of each image by (true class, predicted class).

    Args:
        predicted: uint8 or int64 [B,H,W], values below `num_classes`.
        target: int64 [B,H,W], `IGNORE` where a pixel does not count.

    Returns:
        int64 [B,num_classes,num_classes], rows are the truth.
    """
    images, cells = len(target), num_classes * num_classes
    first = torch.arange(images, device=target.device)[:, None, None] * cells
    # Ignored pixels go to an extra cell, which is cut off below. A boolean mask would wait for the
    # device once more than bincount does.
    cell = first + target * num_classes + predicted
    cell = torch.where(target == IGNORE, images * cells, cell)
    counts = torch.bincount(cell.flatten(), minlength=images * cells + 1)
    return counts[:-1].view(images, num_classes, num_classes)


def scores(matrix: Tensor, classes: list[str]) -> dict[str, float]:
    """IoU and Dice per class, their means over the classes that occur, and pixel accuracy.

    Args:
        matrix: int64 [C,C] from `confusion`, summed over images and processes.
        classes: C names, index 0 is the ground.

    Returns:
        `mIoU`, `mDice`, `pixel_accuracy`, `IoU.<class>`, `Dice.<class>`, in 0…1. Empty for an
        empty matrix.
    """
    matrix = matrix.double().cpu()
    if matrix.sum() == 0:
        return {}
    hits = matrix.diagonal()
    union = matrix.sum(0) + matrix.sum(1) - hits
    present = union > 0
    iou = hits / union
    dice = 2 * hits / (union + hits)
    result = {
        "mIoU": iou[present].mean().item(),
        "mDice": dice[present].mean().item(),
        "pixel_accuracy": (hits.sum() / matrix.sum()).item(),
    }
    for i in present.nonzero().flatten().tolist():
        result[f"IoU.{classes[i]}"] = iou[i].item()
        result[f"Dice.{classes[i]}"] = dice[i].item()
    return result


def scoring(predict: Callable[[nn.Module, Tensor], Tensor]) -> Scoring:
    """How a semantic model is scored: (model, images) → class ids is its `predict`."""
    return Scoring(partial(evaluate, predict), "mIoU", ("mIoU", "IoU."), DEFINITION)


@torch.inference_mode()
def evaluate(
    predict: Callable[[nn.Module, Tensor], Tensor],
    model: nn.Module,
    batches: DataLoader,
    process: Process,
    speedups: Speedups,
    folder: Path,
) -> dict[str, float]:
    """Scores of the bare `model` over all tiles, each counted once over all processes.

    Writes into `folder` `<split>_sheet.jpg`, a picture of some of them, and `<split>_tiles.json`,
    the best and the worst. Leaves `model` in evaluation mode.

    Returns:
        On all processes what `scores` gives, and if there are several airports
        `mIoU.airport.<name>` and, without the ground, `IoU.<class>.airport.<name>`.
    """
    tiles = batches.dataset
    assert isinstance(tiles, Tiles)
    model.eval()
    count, device = len(tiles.classes), process.device
    airports, airport_of_tile = tiles.airports()
    airport = torch.tensor(airport_of_tile, device=device)
    # One for each airport, and a last one for tiles of unknown airports.
    matrices = torch.zeros(len(airports) + 1, count, count, dtype=torch.int64, device=device)
    scored = list(chain(*(batches.batch_sampler or [])))
    shown = Shown(tiles.images, scored, tiles.shows_aircraft)
    delivered = prefetch(batches, device)
    bar = progress(delivered, total=len(batches), desc="score", enabled=process.is_main)
    for batch in bar:
        images = normalise(batch.images).contiguous(memory_format=speedups.layout)
        with speedups.autocast(device):
            predicted = predict(model, images)
        target = semantic_target(batch)
        counts = confusion(predicted, target, count)
        matrices.index_add_(0, airport[batch.tile], counts)
        if process.is_main:
            # `confusion` has waited for the device already.
            hits = counts.diagonal(dim1=1, dim2=2)[:, 1:].sum(1)
            union = counts.sum((1, 2)) - counts[:, 0, 0]
            row = partial(_row, batch.images, target, predicted)
            shown.offer(batch.tile.tolist(), torch.stack([hits, union], 1).tolist(), row)
    if process.is_main:
        shown.write(folder, tiles.folder.name, tiles.classes)
    all_reduce_sum(matrices)
    kind = "" if tiles.labels in ("", "mask") else f" ({tiles.labels})"
    classes = ["ground", *(name + kind for name in tiles.classes[1:])]
    result = scores(matrices.sum(0), classes)
    for name, matrix in zip(airports if len(airports) > 1 else [], matrices, strict=False):
        for score, value in scores(matrix, classes).items():
            if score == "mIoU" or score.removeprefix("IoU.") in classes[1:]:
                result[f"{score}.airport.{name}"] = value
    return result


def _row(images: Tensor, targets: Tensor, predicted: Tensor, i: int) -> tuple[np.ndarray, ...]:
    """Image, truth and prediction of a tile of a batch, as `compared` takes them."""
    return tuple(t[i].to(torch.uint8).cpu().numpy() for t in (images, targets, predicted))
