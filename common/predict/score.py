"""What `--test-only` does: score a checkpoint on a split of the data, and draw a picture."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from common import args as arguments
from common.cli import UserError
from common.data import Tiles, check_same
from common.distributed import pick_device, process_group
from common.loader import loader_deaths, scoring_loader
from common.run import checkpoint, heartbeat, machine, report, resume
from common.run.report import Scoring, describe


def score_checkpoint(
    args: argparse.Namespace,
    model_name: str,
    from_checkpoint: Callable[[dict[str, Any]], nn.Module],
    scoring: Scoring,
) -> None:
    """Score `--resume` on a split of the data, without training.

    Writes `<split>_scores.json`, and what `scoring` writes, next to the checkpoint.
    """
    if args.resume in (None, resume.AUTO):
        raise UserError(
            f"--test-only scores a checkpoint; add --resume {args.output_dir}/model_best.pth."
        )
    unused = [flag for flag in ("compile", "cuda_graphs") if vars(args)[flag]]
    args.compile = args.cuda_graphs = False
    arguments.check_speedups(args, pick_device(args.device))
    saved = checkpoint.load(args.resume, model_name)
    split, folder = args.test_only, args.resume.parent
    labels = str(saved["args"].get("labels", ""))[:20] or "mask"
    boxes = "box_AP" in scoring.drawn
    tiles = scoring_split(args.data_path, split, saved["classes"], labels, boxes)
    with (
        process_group(args.device, timeout_seconds=args.dist_timeout) as process,
        heartbeat.watched(process, args.dist_timeout, lambda: 0),
        loader_deaths(),
    ):
        speedups = arguments.resolve_speedups(args, process)
        model = checkpoint.rebuild(saved, from_checkpoint).to(process.device)
        model = model.to(memory_format=speedups.layout).eval()  # type: ignore[call-overload]
        batches = scoring_loader(tiles, args.batch_size, args.workers, process)
        process.print(speedups.banner(process))
        for flag in unused:
            process.print(f"--{flag.replace('_', '-')} speeds up training; scoring is without it.")
        scores = scoring.evaluate(model, batches, process, speedups, folder)
        if process.is_main:
            if tiles.drawn:
                scores["quality_of_masks"] = sum(tiles.drawn) / len(tiles.drawn)
            report.write(folder / f"{split}_scores.json", scores)
            of = {"checkpoint": args.resume.name, "step": saved.get("step"), "when": machine.now()}
            if report.tested(folder, split, of, scoring):
                report.refresh(folder)
            process.print(f"{split}: {describe(scores)}\n({scoring.definition})")
            process.print(f"wrote {split}_scores.json and {split}_sheet.jpg into {str(folder)!r}")


def scoring_split(
    root: Path, split: str, classes: list[str], labels: str = "", boxes: bool = False
) -> Tiles:
    """The tiles of `root/split`, which must have the classes and the labels of a model.

    If both have a single class, it may have another name in the tiles, which a line says. A model
    that finds `boxes` can be scored on box labels, whatever it was trained on.
    """
    tiles = Tiles(root / split)
    if len(tiles.classes) == len(classes) == 2 and tiles.classes != classes:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"{tiles.classes[1]!r} of {str(tiles.folder)!r} is scored as {classes[1]!r}")
        tiles.classes = classes
    kind = labels if boxes and tiles.labels == "box" else tiles.labels
    check_same("the checkpoint", classes, labels, tiles.folder, tiles.classes, kind)
    return tiles
