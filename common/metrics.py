"""Semantic scores from one confusion matrix over the whole set."""

import torch
from torch import Tensor

IGNORE = 255  # the class id of pixels that neither train nor count

DEFINITION = (
    "IoU = TP / (TP + FP + FN) from one confusion matrix over all pixels of the set; "
    "a class absent from truth and prediction is left out of the mean"
)


def confusion(predicted: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """Count pixels by (true class, predicted class).

    Args:
        predicted: uint8 or int64 [B,H,W], values below `num_classes`.
        target: int64 [B,H,W], `IGNORE` where a pixel does not count.

    Returns:
        int64 [num_classes, num_classes], rows are the truth.
    """
    cells = num_classes * num_classes
    # Ignored pixels go to one cell too many, cut off again: a boolean mask would have to read its
    # length back from the device.
    cell = torch.where(target == IGNORE, cells, target * num_classes + predicted.long())
    counts = torch.bincount(cell.flatten(), minlength=cells + 1)
    return counts[:cells].view(num_classes, num_classes)


def scores(matrix: Tensor, classes: list[str]) -> dict[str, float]:
    """IoU and Dice per class, their means over the classes that occur, and pixel accuracy.

    Args:
        matrix: int64 [C,C] from `confusion`, summed over batches and processes.
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
    for name, i, d, there in zip(
        classes, iou.tolist(), dice.tolist(), present.tolist(), strict=True
    ):
        if there:
            result[f"IoU.{name}"] = i
            result[f"Dice.{name}"] = d
    return result
