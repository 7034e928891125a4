"""What `--test-only` does: a checkpoint's scores on a split of the data, and a picture of it."""

import argparse
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from common import args as arguments
from common import checkpoint, engine, metrics, resume
from common.augment import normalise
from common.cli import UserError
from common.data import Batch, scoring_loader, scoring_split
from common.distributed import Process, process_group
from common.log import describe
from common.overlay import sheet
from common.speedups import Speedups
from common.targets import semantic_target

FromCheckpoint = Callable[[dict[str, Any]], nn.Module]


def test(
    args: argparse.Namespace,
    model_name: str,
    from_checkpoint: FromCheckpoint,
    score: Callable[[nn.Module, DataLoader, Process, Speedups], dict[str, float]],
    drawn: Callable[[nn.Module, Tensor, Batch], tuple[np.ndarray, np.ndarray]],
    definition: str,
) -> None:
    """Score `--resume` on a split of the data, without training.

    Writes `<split>_scores.json` and `<split>_sheet.jpg` beside the checkpoint. The sheet shows
    eight tiles with aircraft, spread evenly over the set: a sample, not a choice.

    Args:
        score: Called on all processes; what it returns on rank 0 counts.
        drawn: (model, one tile's images, that tile as a batch of one) → true and predicted ids,
            uint8 [H,W] each.
        definition: What the scores are, in a sentence.
    """
    if args.resume in (None, resume.AUTO):
        raise UserError(
            f"--test-only scores a checkpoint; add --resume {args.output_dir}/model_best.pth."
        )
    saved = checkpoint.load(args.resume, model_name)
    split, folder = args.test_only, args.resume.parent
    tiles = scoring_split(args.data_path, split, saved["classes"])
    with process_group(args.device) as process, engine.loader_deaths():
        speedups = arguments.speedups(args, process)
        model = (
            checkpoint.rebuild(saved, from_checkpoint)
            .to(process.device)
            .to(memory_format=speedups.layout)
            .eval()
        )
        batches = scoring_loader(tiles, args, process)
        process.print(speedups.banner(process))
        result = score(model, batches, process, speedups)
        if not process.is_main:
            return
        (folder / f"{split}_scores.json").write_text(json.dumps(result, indent=1) + "\n")
        process.print(f"{split}: {describe(result)}\n({definition})")
        positive = [i for i, found in enumerate(tiles.instances) if found]
        shown = min(8, len(positive))
        rows = []
        for i in (positive[k * len(positive) // shown] for k in range(shown)):
            tile = default_collate([tiles[i]])
            images = normalise(tile.images.to(process.device))
            with torch.inference_mode():
                pair = drawn(model, images.contiguous(memory_format=speedups.layout), tile)
            rows.append((tile.images[0].numpy(), *pair))
        if rows:
            path = folder / f"{split}_sheet.jpg"
            sheet(rows, path, f"{len(rows)} of {len(tiles)} {split} tiles")
            process.print(f"wrote {path}")


def test_semantic(
    args: argparse.Namespace,
    model_name: str,
    from_checkpoint: FromCheckpoint,
    predict: Callable[[nn.Module, Tensor], Tensor],
) -> None:
    """`test` of a semantic model."""

    def score(
        model: nn.Module, batches: DataLoader, process: Process, speedups: Speedups
    ) -> dict[str, float]:
        classes = batches.dataset.classes  # type: ignore[attr-defined]
        return engine.evaluate(model, predict, batches, classes, process, speedups)

    def drawn(model: nn.Module, images: Tensor, tile: Batch) -> tuple[np.ndarray, np.ndarray]:
        truth = semantic_target(tile)[0].to(torch.uint8)
        return truth.numpy(), predict(model, images)[0].cpu().numpy()

    test(args, model_name, from_checkpoint, score, drawn, metrics.DEFINITION)
