"""Batches as Mask R-CNN trains on."""

import torch

from benchmarks.lib.synthetic import noise_tiles
from common.augment import normalise
from mask.targets import instance_targets

CPU = torch.device("cpu")


def batch_of(count, side=96, ignore=True):
    batch = noise_tiles(count, side, CPU)
    if not ignore:
        batch.ids[batch.ids == 255] = 0
    images = normalise(batch.images).contiguous()
    targets = instance_targets(batch)
    for i, target in enumerate(targets):
        target["key"] = torch.tensor(i)
    return images, targets
