"""A training step of any model on tiles of noise, built as in its train.py."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.lib.models import MODELS
from common import args as arguments
from common.args import Speedups
from common.data import Batch
from common.distributed import Process
from common.io.tiles import IGNORE
from common.semantic import training_views
from common.session import Session
from common.speedups import make_step, place
from mask.targets import MAX_AIRCRAFT
from mask.targets import training_views as mask_views


def noise_tiles(count: int, side: int, device: torch.device, aircraft: int = 3) -> Batch:
    """A batch as the loader gives it: noise, blocks as aircraft, some rows ignored."""
    images = torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, device=device)
    ids = torch.zeros(count, side, side, dtype=torch.uint8, device=device)
    block = side // (2 * aircraft)
    for i in range(aircraft):
        ids[:, block : 2 * block, 2 * i * block : (2 * i + 1) * block] = i + 1
    ids[:, -block:] = IGNORE
    classes = torch.zeros(count, IGNORE + 1, dtype=torch.uint8, device=device)
    classes[:, 1 : aircraft + 1] = 1
    classes[:, IGNORE] = IGNORE
    return Batch(images, ids, classes, torch.arange(count, device=device))


def bare_session(process: Process, speedups: Speedups, **options: Any) -> Session:
    """A session that was not opened: without data, a lock or a process group.

    Args:
        options: Options of train.py that differ from the defaults.
    """
    defaults = arguments.plain(arguments.train_parser("").parse(["--scale-jitter", "0"]))
    return Session(
        name="",
        classes=["ground", "aircraft"],
        args=defaults | options,
        settings={},
        process=process,
        speedups=speedups,
        batches=None,  # type: ignore[arg-type]
        val_batches=None,
        output_dir=Path(),
        total_steps=10_000,
        eval_interval=10_000,
    )


def training_step(
    name: str,
    process: Process,
    speedups: Speedups,
    crop: int,
    backbone: str | None = None,
    clip_grad_norm: float | None = None,
    norm: str = "batch",
) -> tuple[nn.Module, Callable[[Batch], Tensor]]:
    """The bare model, in training mode, and the step from a loader's batch to its loss."""
    module = MODELS[name].module
    torch.manual_seed(0)
    with torch.device(process.device):
        model = module.build_model(backbone or MODELS[name].backbone, 2, norm=norm)
    objective = place(model.train(), module.loss_fn, process, speedups)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    s = bare_session(process, speedups, clip_grad_norm=clip_grad_norm)
    s.start(model, optimizer)
    step = make_step(objective, s)
    args = argparse.Namespace(**s.args | {"crop_size": crop, "max_aircraft": MAX_AIRCRAFT})
    views: Callable[[Batch, int], tuple[Tensor, Any]]
    views = (training_views if MODELS[name].semantic else mask_views)(args)
    total = torch.zeros((), device=process.device)

    def whole(batch: Batch) -> Tensor:
        return total.add_(step(*views(batch, 0)))

    return model, whole
