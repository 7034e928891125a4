"""What Mask R-CNN trains on: a random view of each tile, and the aircraft in it."""

from collections.abc import Callable

import torch
from torch import Tensor

from common.augment import random_view
from common.data import Batch

MIN_PIXELS = 16  # a crop cuts some aircraft to slivers that cannot be outlined

Targets = list[dict[str, Tensor]]


def training_views(
    crop_size: int, seed: int, scale_jitter: float = 0.0
) -> Callable[[Batch, int], tuple[Tensor, Targets]]:
    """(batch on the device, epoch) → images float32 [B,3,crop,crop] and B targets.

    The targets are those of `instance_targets`, each with a `key` for `mask.rcnn.Sampler`.
    """

    def prepare(batch: Batch, epoch: int) -> tuple[Tensor, Targets]:
        images, view = random_view(batch, crop_size, seed, epoch, scale_jitter)
        targets = instance_targets(view, MIN_PIXELS)
        keys = view.tile + (epoch << 24) + (seed << 44)
        for target, key in zip(targets, keys, strict=True):
            target["key"] = key
        return images, targets

    return prepare


def instance_targets(batch: Batch, min_pixels: int = 1) -> list[dict[str, Tensor]]:
    """What a detection model trains on, for each tile, made on the batch's device.

    Args:
        batch: On any device.
        min_pixels: An aircraft with fewer visible pixels is ignored: a crop cuts some to slivers.

    Returns:
        B dicts: `boxes` float32 [N,4] as x1, y1, x2, y2 around whole pixels (x2 and y2 are
        exclusive, so an aircraft of one pixel has an area of 1), `labels` int64 [N], `masks` uint8
        [N,H,W], and `ignore` bool [H,W], pixels left out of training and scores. N is the number of
        aircraft in view and may be 0. Finding N takes two syncs for any number of tiles.
    """
    ids = batch.ids.long()
    flat = ids.flatten(1)
    pixels = torch.zeros(batch.classes.shape, dtype=torch.long, device=ids.device)
    pixels.scatter_add_(1, flat, torch.ones_like(flat))
    kept = pixels >= min_pixels
    kept[:, 0] = kept[:, -1] = False
    ignore = (~kept.gather(1, flat) & (flat > 0)).view_as(ids)
    tile, number = kept.nonzero().unbind(1)
    counts = kept.sum(1).tolist()
    targets = []
    for tile_ids, hidden, numbers, label in zip(
        ids, ignore, number.split(counts), batch.classes[tile, number].split(counts), strict=True
    ):
        masks = tile_ids[None] == numbers[:, None, None]
        x1, x2 = _extent(masks.any(1))
        y1, y2 = _extent(masks.any(2))
        boxes = torch.stack([x1, y1, x2, y2], 1).float()
        targets.append(
            {"boxes": boxes, "labels": label.long(), "masks": masks.byte(), "ignore": hidden}
        )
    return targets


def _extent(line: Tensor) -> tuple[Tensor, Tensor]:
    """First true position in each row of bool [N,L], and one past the last."""
    line = line.byte()
    return line.argmax(1), line.shape[1] - line.flip(1).argmax(1)
