"""What Mask R-CNN trains on: a random view of each tile, and the aircraft that it shows."""

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from common.augment import random_view
from common.data import Batch, Tiles
from common.distributed import Process

MIN_PIXELS = 16  # smaller remains of aircraft that a crop cut cannot be outlined
MAX_AIRCRAFT = 100  # per crop


class Targets(NamedTuple):
    """The aircraft of B images, in G slots each; empty slots hold zeros.

    boxes: float32 [B,G,4], x1, y1, x2, y2 around whole pixels; x2 and y2 are exclusive, so an
    aircraft of one pixel has an area of 1. labels: int64 [B,G], 1…C, 0 for an empty slot. ids:
    int16 [B,H,W], 0 ground, k for the aircraft in slot k - 1, -1 for pixels that are ignored.
    key: int64 [B], of the hash that chooses the boxes to train on.
    """

    boxes: Tensor
    labels: Tensor
    ids: Tensor
    key: Tensor


def training_views(args: argparse.Namespace) -> Callable[[Batch, int], tuple[Tensor, Targets]]:
    """(batch on the device, epoch) → images float32 [B,3,crop,crop] and their targets.

    Each target's key is unique to the seed (modulo 2**19), the epoch and the tile.
    """

    def views(batch: Batch, epoch: int) -> tuple[Tensor, Targets]:
        options = args.augment, args.scale_jitter, args.foreground
        images, view = random_view(batch, args.crop_size, args.seed, epoch, *options)
        targets = instance_targets(view, args.max_aircraft, MIN_PIXELS)
        key = view.tile + ((epoch << 24) + (args.seed << 44)) % 2**63  # fits int64
        return images, targets._replace(key=key)

    return views


def instance_targets(
    batch: Batch, max_aircraft: int = MAX_AIRCRAFT, min_pixels: int = 1
) -> Targets:
    """The aircraft in view, in the order of their ids, on the batch's device (never waits for it).

    Args:
        batch: On any device.
        max_aircraft: The number of slots. If more aircraft are in view, the pixels of the smallest
            are ignored.
        min_pixels: An aircraft with fewer visible pixels is ignored, too.
    """
    ids = batch.ids.long()
    flat, count = ids.flatten(1), batch.classes.shape[1]
    pixels = torch.zeros(len(ids), count, dtype=torch.long, device=ids.device)
    pixels.scatter_add_(1, flat, torch.ones_like(flat))
    pixels[:, 0] = pixels[:, -1] = 0
    # Of two aircraft of the same size the one with the lower id is kept.
    number = torch.arange(count, device=ids.device)
    size = torch.where(pixels >= min_pixels, pixels * count + count - number, 0)
    largest = size.topk(min(max_aircraft, count), 1)
    # The slots are in the order of the ids; empty ones come last.
    chosen = torch.where(largest.values > 0, largest.indices, count).sort(1).values
    exists = chosen < count
    chosen = torch.where(exists, chosen, 0)
    slots = torch.arange(1, chosen.shape[1] + 1, device=ids.device) * exists  # from 1
    slot_of_id = torch.zeros_like(pixels).scatter_(1, chosen, slots)
    slot = slot_of_id.gather(1, flat).view_as(ids)
    boxes = torch.stack([*_extents(slot, chosen.shape[1])], 2).float()
    labels = batch.classes.gather(1, chosen).long() * exists
    ignored = (slot == 0) & (ids > 0)
    return Targets(
        boxes * exists[..., None],
        labels,
        torch.where(ignored, -1, slot).to(torch.int16),
        batch.tile,
    )


def _extents(slot: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x1, y1, x2, y2 of the pixels of 1…count in int64 [B,H,W]: int64 [B,count] each."""
    edges = []
    for lines in (slot.mT, slot):  # columns, rows
        length = lines.shape[1]
        occurs = torch.zeros(len(slot), length, count + 1, dtype=torch.uint8, device=slot.device)
        occurs.scatter_(2, lines, 1)
        occurs = occurs[..., 1:]
        edges += [occurs.argmax(1), length - occurs.flip(1).argmax(1)]
    x1, x2, y1, y2 = edges
    return x1, y1, x2, y2


def warn_of_crowds(batches: DataLoader, max_aircraft: int, process: Process) -> None:
    """Warn if tiles show more aircraft than a crop has slots."""
    tiles = batches.dataset
    assert isinstance(tiles, Tiles)
    counts = [len(classes) for classes in tiles.instances]
    crowded = [count for count in counts if count > max_aircraft]
    if crowded:
        process.print(
            f"warning: {len(crowded)} of {len(tiles)} tiles show more than {max_aircraft} "
            f"aircraft (up to {max(crowded)}); in such a crop the smallest are ignored. Raise "
            "--max-aircraft to train on all."
        )
