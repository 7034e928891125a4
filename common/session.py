"""A training as one object: opened by `session`, given a model and an optimizer by `start`."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from common import args as arguments
from common.args import SCHEDULES, Speedups
from common.augment import SCALE_JITTER
from common.data import Tiles, training_splits
from common.distributed import process_group
from common.io import files
from common.loader import scoring_loader, training_loader
from common.run import checkpoint, heartbeat, machine, resume
from common.run.checkpoint import MovingAverage, State


class Clock:
    """Hooks for the benchmark's timer; no-ops here."""

    def mark(self, phase: str) -> None:
        """A phase begins: `views`, `backward`, `forward`, `optimizer`, `loop` or `data`."""


@dataclass(kw_only=True)
class Session(State):
    """A training: what `session` opened and, after `start`, the state of the run.

    `eval_interval` is the number of steps between validations. `saved` is the checkpoint to
    continue from, `initial` the one whose weights to start from.
    """

    speedups: Speedups
    batches: DataLoader
    val_batches: DataLoader | None
    output_dir: Path
    total_steps: int
    eval_interval: int
    saved: dict[str, Any] | None = None
    initial: dict[str, Any] | None = None
    clock: Clock = field(default_factory=Clock)

    def start(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Train `model` with `optimizer`, from step 0 or from where `saved` ended.

        Makes the schedule, the loss scaler and the moving average. Copies the weights of `initial`
        into `model`. Seeds torch again, so that every rank has its own dropout.

        Raises:
            UserError: `saved` or `initial` does not fit this training.
        """
        if self.initial:
            options = arguments.of_the_model(self.args)
            new = checkpoint.start_from(model, self.initial, self.classes, options)
            suffix = f"; new, because the classes differ: {', '.join(new)}" if new else ""
            self.process.print(f"starting from {self.args['init_from']!r}{suffix}.")
        torch.manual_seed(self.args["seed"] + self.process.rank)
        self.model, self.optimizer = model, optimizer
        rates = self.args["lr_schedule"], self.total_steps, self.args["warmup_steps"]
        self.lr_scheduler = schedule(optimizer, *rates)
        self.scaler = self.speedups.scaler(self.process.device)
        decay = self.args["ema"]
        self.average = None if decay is None else MovingAverage(model, decay)
        if self.saved:
            resume.restore(self, self.saved, self.total_steps)
        self.saved = self.initial = None  # frees their memory

    def facts(self) -> dict[str, Any]:
        """What the training is made of, as plain values for `run.json`."""
        loaders = (self.batches, self.val_batches)
        sets = [loader.dataset for loader in loaders if loader is not None]
        return {
            "model": self.name,
            "classes": self.classes,
            "started": machine.now(),
            "from_step": self.step,
            "total_steps": self.total_steps,
            "settings": self.args | self.settings,
            "data": {
                tiles.folder.name: tiles.summary() | {"fingerprint": tiles.fingerprint()}
                for tiles in sets
                if isinstance(tiles, Tiles)
            },
            **machine.facts(self.process.device),
        }


@contextmanager
def session(
    args: argparse.Namespace, name: str, stride: int, min_batch: int = 1
) -> Iterator[Session]:
    """Refuse what cannot work, open the data, join the process group and lock the output folder.

    Seeds torch last, so that all ranks build a model with the same weights. In `args` it resolves
    `scale_jitter`, and `weights_backbone` to `none` where all weights come from a checkpoint.

    `stride` and `min_batch` are those of `arguments.check`.

    Raises:
        UserError: The sentence ends with what to type instead.
    """
    if args.scale_jitter is None:
        args.scale_jitter = SCALE_JITTER[args.augment]
    train_tiles, val_tiles = training_splits(args.data_path, args.extra_data)
    arguments.check(args, stride, train_tiles.size, min_batch)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    saved = resume.find(args.resume, args.output_dir, name, train_tiles.classes)
    initial = checkpoint.load(args.init_from, name) if args.init_from and not saved else None
    options = arguments.plain(args) | {"labels": train_tiles.labels}
    if saved or initial:
        args.weights_backbone = "none"
    with (
        process_group(args.device, args.cuda_graphs, args.dist_timeout) as process,
        files.locked(args.output_dir, args.output_dir / ".lock")
        if process.is_main
        else nullcontext(),
    ):
        per_step = args.batch_size * args.grad_accum
        batches = training_loader(train_tiles, per_step, args.workers, process, args.seed)
        val_batches = None
        if val_tiles:
            scored = val_tiles.spread(args.eval_tiles)
            val_batches = scoring_loader(scored, args.batch_size, args.workers, process)
        s = Session(
            name=name,
            classes=train_tiles.classes,
            args=options | {"look": train_tiles.look},
            settings=resume.settings(options, process, train_tiles, val_tiles),
            process=process,
            speedups=arguments.resolve_speedups(args, process),
            batches=batches,
            val_batches=val_batches,
            output_dir=args.output_dir,
            total_steps=args.max_steps or args.epochs * len(batches),
            eval_interval=args.eval_steps or args.eval_freq * len(batches),
            saved=saved,
            initial=initial,
        )
        with heartbeat.watched(process, args.dist_timeout, lambda: s.step):
            torch.manual_seed(args.seed)
            yield s


def schedule(optimizer: Optimizer, name: str, steps: int, warmup: int) -> LambdaLR:
    """Linear rise over `warmup` steps, then `SCHEDULES[name]` from t = 0 to t = 1 at `steps`."""
    warmup = min(warmup, steps // 2)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return SCHEDULES[name](1 - min(step - warmup, steps - warmup) / max(steps - warmup, 1))

    return LambdaLR(optimizer, factor)
