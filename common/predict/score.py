"""What `--test-only` does: score a checkpoint on a split of the data, and draw a picture."""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from common import args as arguments
from common import semantic
from common.cli import UserError
from common.data import scoring_split
from common.distributed import Process, process_group
from common.loader import loader_deaths, scoring_loader
from common.run import checkpoint, machine, report, resume
from common.run.report import describe
from common.speedups import Speedups

FromCheckpoint = Callable[[dict[str, Any]], nn.Module]


def test(
    args: argparse.Namespace,
    model_name: str,
    from_checkpoint: FromCheckpoint,
    score: Callable[[nn.Module, DataLoader, Process, Speedups, Path], dict[str, float]],
    definition: str,
) -> None:
    """Score `--resume` on a split of the data, without training.

    Writes `<split>_scores.json`, and what `score` writes, next to the checkpoint.

    Args:
        score: Called on all processes, with the folder to write into; its result on rank 0 is
            used.
        definition: What the scores are, in a sentence.
    """
    if args.resume in (None, resume.AUTO):
        raise UserError(
            f"--test-only scores a checkpoint; add --resume {args.output_dir}/model_best.pth."
        )
    saved = checkpoint.load(args.resume, model_name)
    split, folder = args.test_only, args.resume.parent
    tiles = scoring_split(args.data_path, split, saved["classes"])
    with process_group(args.device) as process, loader_deaths():
        speedups = arguments.speedups(args, process)
        model = (
            checkpoint.rebuild(saved, from_checkpoint)
            .to(process.device)
            .to(memory_format=speedups.layout)
            .eval()
        )
        batches = scoring_loader(tiles, args.batch_size, args.workers, process)
        process.print(speedups.banner(process))
        result = score(model, batches, process, speedups, folder)
        if process.is_main:
            (folder / f"{split}_scores.json").write_text(json.dumps(result, indent=1) + "\n")
            scored = {"checkpoint": args.resume.name, "step": saved.get("step")}
            if report.tested(folder, split, scored | {"when": machine.now()}):
                report.refresh(folder)
            process.print(f"{split}: {describe(result)}\n({definition})")
            process.print(f"wrote {split}_scores.json and {split}_sheet.jpg into {str(folder)!r}")


def test_semantic(
    args: argparse.Namespace,
    model_name: str,
    from_checkpoint: FromCheckpoint,
    predict: Callable[[nn.Module, Tensor], Tensor],
) -> None:
    """`test` of a semantic model."""
    score = partial(semantic.evaluate, predict)
    test(args, model_name, from_checkpoint, score, semantic.DEFINITION)
