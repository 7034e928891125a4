"""What Mask R-CNN trains on: a random view of each tile and the aircraft in it."""

import argparse
from collections.abc import Callable

from torch import Tensor

from common.augment import random_view
from common.data import Batch
from common.targets import instance_targets

MIN_PIXELS = 16  # a crop cuts some aircraft to slivers that nobody could outline

Targets = list[dict[str, Tensor]]


def training_views(args: argparse.Namespace) -> Callable[[Batch, int], tuple[Tensor, Targets]]:
    """(batch on the device, epoch) → images float32 [B,3,crop,crop] and B targets.

    The targets are those of `instance_targets`, each with a `key` for `mask.model.Sampler`.
    """

    def prepare(batch: Batch, epoch: int) -> tuple[Tensor, Targets]:
        images, view = random_view(batch, args.crop_size, args.seed, epoch, args.scale_jitter)
        targets = instance_targets(view, MIN_PIXELS)
        keys = view.tile + (epoch << 24) + (args.seed << 44)
        for target, key in zip(targets, keys, strict=True):
            target["key"] = key
        return images, targets

    return prepare
