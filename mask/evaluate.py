"""Average precision of Mask R-CNN over a split, and a sheet of what it found."""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, default_collate

from common import args as arguments
from common import checkpoint, resume
from common.augment import normalise
from common.cli import UserError
from common.data import Tiles, prefetch, scoring_loader, scoring_split
from common.distributed import Process, process_group
from common.log import describe
from common.overlay import sheet
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
    """What `--test-only` does: score `--resume` on a split of the data, without training.

    Writes `<split>_scores.json`, `<split>_predictions.json` and `<split>_sheet.jpg` beside the
    checkpoint. The sheet shows eight tiles with aircraft, spread evenly over the set.
    """
    if args.resume in (None, resume.AUTO):
        raise UserError(
            f"--test-only scores a checkpoint; add --resume {args.output_dir}/model_best.pth."
        )
    saved = checkpoint.load(args.resume, "mask")
    split, folder = args.test_only, args.resume.parent
    tiles = scoring_split(args.data_path, split, saved["classes"])
    with process_group(args.device) as process:
        speedups = arguments.speedups(args, process)
        model = (
            checkpoint.rebuild(saved, from_checkpoint)
            .to(process.device)
            .to(memory_format=speedups.layout)
        )
        process.print(speedups.banner(process))
        batches = scoring_loader(tiles, args, process)
        result = evaluate(model, batches, process, speedups, folder)
        if not process.is_main:
            return
        (folder / f"{split}_scores.json").write_text(json.dumps(result, indent=1) + "\n")
        process.print(f"{split}: {describe(result)}\n({coco.DEFINITION})")
        positive = [i for i, found in enumerate(tiles.instances) if found]
        shown = min(8, len(positive))
        rows = []
        for i in (positive[k * len(positive) // shown] for k in range(shown)):
            rows.append(_row(model, tiles, i, process.device, speedups))
        if rows:
            path = folder / f"{split}_sheet.jpg"
            sheet(rows, path, f"{len(rows)} of {len(tiles)} {split} tiles")
            process.print(f"wrote {path}")


@torch.inference_mode()
def _row(
    model: nn.Module, tiles: Tiles, index: int, device: torch.device, speedups: Speedups
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image, true and predicted instances, each instance in a colour of its own."""
    tile = default_collate([tiles[index]])
    images = normalise(tile.images.to(device)).contiguous(memory_format=speedups.layout)
    (found,) = predict(model.eval(), images)
    (truth,) = instance_targets(tile)
    sure = found["masks"][found["scores"] > 0.5].cpu()
    return tile.images[0].numpy(), _numbered(truth["masks"]), _numbered(sure)


def _numbered(masks: torch.Tensor) -> np.ndarray:
    """[N,H,W] → uint8 [H,W], 0 ground, 1…N; where two overlap the first, which scores higher."""
    ids = np.zeros(masks.shape[1:], np.uint8)
    for number, mask in reversed(list(enumerate(masks.numpy().astype(bool), start=1))):
        ids[mask] = number
    return ids
