"""Average precision of Mask R-CNN over a split, and a sheet of its predictions."""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from common.augment import normalise
from common.cli import progress
from common.data import Tiles
from common.distributed import Process
from common.io.pictures import Sheet
from common.io.tiles import IGNORE
from common.loader import prefetch
from common.predict import score
from common.speedups import Speedups
from mask import coco
from mask.model import NAME, from_checkpoint, predict


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: DataLoader,
    process: Process,
    speedups: Speedups,
    folder: Path,
) -> dict[str, float]:
    """COCO's scores of the bare `model` over all tiles, each seen once over all processes.

    Writes the predictions, `<split>_predictions.json`, and a picture of some of them,
    `<split>_sheet.jpg`, into `folder`.

    Returns:
        On rank 0 what `mask.coco.score` returns; {} on other ranks.
    """
    tiles = batches.dataset
    assert isinstance(tiles, Tiles)
    model.eval()
    own: list[dict] = []
    sheet = Sheet(list(batches.batch_sampler or []), tiles.shows_aircraft)
    bar = progress(total=len(batches), desc="score", enabled=process.is_main)
    for number, batch in enumerate(prefetch(batches, process.device)):
        images = normalise(batch.images).contiguous(memory_format=speedups.layout)
        with speedups.autocast(process.device):
            predictions = predict(model, images)
        own += coco.results(predictions, batch.tile.tolist(), tiles)
        for i in sheet.chosen(number) if process.is_main else []:
            truth = torch.where(batch.ids[i] == tiles.ignore, 0, batch.ids[i] % IGNORE)
            shown = predictions[i]["masks"][predictions[i]["scores"] > 0.5]
            image, truth = batch.images[i].cpu(), truth.to(torch.uint8).cpu()
            sheet.add(image.numpy(), truth.numpy(), _numbered(shown))
        bar.update()
    bar.close()
    everything = coco.gather(own, process)
    if not process.is_main:
        return {}
    split = tiles.folder.name
    sheet.write(folder / f"{split}_sheet.jpg", f"{len(sheet.rows)} of {len(tiles)} {split} tiles")
    coco.write(everything, folder / f"{split}_predictions.json")
    return coco.score(everything, tiles)


def test(args: argparse.Namespace) -> None:
    """What `--test-only` does."""
    score.test(args, NAME, from_checkpoint, evaluate, coco.DEFINITION)


def _numbered(masks: torch.Tensor) -> np.ndarray:
    """[N,H,W] → uint8 [H,W], 0 ground, 1…N; of two that overlap the first, which scores higher."""
    ids = np.zeros(masks.shape[1:], np.uint8)
    for number, mask in reversed(list(enumerate(masks.cpu().numpy().astype(bool), start=1))):
        ids[mask] = number
    return ids
