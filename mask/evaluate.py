"""Average precision of Mask R-CNN over a split, and a sheet of what it found."""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from common import testing
from common.augment import normalise
from common.data import Batch, Tiles, prefetch
from common.distributed import Process
from common.progress import progress
from common.speedups import Speedups
from common.targets import instance_targets
from mask import coco
from mask.model import from_checkpoint, predict


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: DataLoader | None,
    process: Process,
    speedups: Speedups,
    folder: Path,
) -> dict[str, float]:
    """COCO's scores of the bare `model` over all tiles, each seen once over all processes.

    Writes the predictions, `<split>_predictions.json`, into `folder`.

    Returns:
        On rank 0 what `mask.coco.score` gives; elsewhere, and without `batches`, nothing.
    """
    if batches is None:
        return {}
    tiles = batches.dataset
    assert isinstance(tiles, Tiles)
    was_training = model.training
    model.eval()
    mine: list[dict] = []
    bar = progress(total=len(batches), desc="score", enabled=process.is_main)
    for batch in prefetch(batches, process.device):
        images = normalise(batch.images).contiguous(memory_format=speedups.layout)
        with speedups.autocast(process.device):
            found = predict(model, images)
        mine += coco.results(found, batch.tile.tolist(), tiles)
        bar.update()
    bar.close()
    model.train(was_training)
    everything = coco.gather(mine, process)
    if not process.is_main:
        return {}
    coco.write(everything, folder / f"{tiles.folder.name}_predictions.json")
    return coco.score(everything, tiles)


def test(args: argparse.Namespace) -> None:
    """What `--test-only` does. It also writes `<split>_predictions.json`."""

    def score(
        model: nn.Module, batches: DataLoader, process: Process, speedups: Speedups
    ) -> dict[str, float]:
        return evaluate(model, batches, process, speedups, args.resume.parent)

    testing.test(args, "mask", from_checkpoint, score, _drawn, coco.DEFINITION)


def _drawn(model: nn.Module, images: torch.Tensor, tile: Batch) -> tuple[np.ndarray, np.ndarray]:
    """True and predicted instances, each in a colour of its own."""
    (found,) = predict(model, images)
    (truth,) = instance_targets(tile)
    sure = found["masks"][found["scores"] > 0.5].cpu()
    return _numbered(truth["masks"]), _numbered(sure)


def _numbered(masks: torch.Tensor) -> np.ndarray:
    """[N,H,W] → uint8 [H,W], 0 ground, 1…N; where two overlap the first, which scores higher."""
    ids = np.zeros(masks.shape[1:], np.uint8)
    for number, mask in reversed(list(enumerate(masks.numpy().astype(bool), start=1))):
        ids[mask] = number
    return ids
