"""What every training needs besides a model and an optimizer, set up once by `session`."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from common import args as arguments
from common.data import Tiles, training_splits
from common.distributed import Process, locked, process_group
from common.loader import scoring_loader, training_loader
from common.run import checkpoint, machine, resume
from common.run.average import MovingAverage
from common.run.checkpoint import Run
from common.run.log import Clock
from common.speedups import Speedups


@dataclass(frozen=True)
class Session:
    """What a training needs besides a model and an optimizer: plain values and this process's data.

    `eval_interval` is the number of steps between validations. `args` are the options as a
    checkpoint holds them. `settings` are the values that must be equal for a bit-exact run. `saved`
    is the checkpoint to continue from, `initial` the one whose weights to start from.
    """

    name: str
    classes: list[str]
    process: Process
    speedups: Speedups
    batches: DataLoader
    val_batches: DataLoader | None
    output_dir: Path
    total_steps: int
    eval_interval: int
    warmup_steps: int = 0
    print_freq: int = 20
    save_every: tuple[str, float] | None = None
    args: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    saved: dict[str, Any] | None = None
    initial: dict[str, Any] | None = None
    clock: Clock = field(default_factory=Clock)

    def run(self, model: nn.Module, optimizer: Optimizer) -> Run:
        """All that a checkpoint saves of this training, at step 0; `fit` restores `saved`.

        Copies the weights of `initial` into `model`. Seeds torch again, so that every rank has its
        own dropout.

        Raises:
            UserError: `initial` is of another network.
        """
        if self.initial:
            new = checkpoint.start_from(model, self.initial, self.classes, self.args)
            fresh = f"; new, because the classes differ: {', '.join(new)}" if new else ""
            self.process.print(f"starting from {self.args['init_from']!r}{fresh}.")
        torch.manual_seed(self.args["seed"] + self.process.rank)
        schedule = polynomial_schedule(optimizer, self.total_steps, self.warmup_steps)
        scaler = self.speedups.scaler(self.process.device)
        decay = self.args["ema"]
        return Run(
            self.name,
            self.classes,
            self.args,
            model,
            optimizer,
            schedule,
            scaler,
            self.settings,
            clock=self.clock,
            average=None if decay is None else MovingAverage(model, decay),
        )

    def facts(self) -> dict[str, Any]:
        """What the training is made of, as plain values for `run.json`."""
        sets = [b.dataset for b in (self.batches, self.val_batches) if b]
        return {
            "model": self.name,
            "classes": self.classes,
            "started": machine.now(),
            "total_steps": self.total_steps,
            "settings": self.args | self.settings,
            "data": {
                tiles.folder.name: tiles.summary()
                | {"fingerprint": resume.fingerprint(tiles.folder)}
                for tiles in sets
                if isinstance(tiles, Tiles)
            },
            **machine.facts(self.process.device),
        }


@contextmanager
def session(
    args: argparse.Namespace,
    name: str,
    stride: int,
    min_batch: int = 1,
    clock: Clock | None = None,
) -> Iterator[Session]:
    """Refuse what cannot work, open the data, join the process group and lock the output folder.

    Seeds torch last, so that all ranks build a model with the same weights.

    Args:
        args: From `arguments.train_parser`.
        name: The model's name.
        stride: Sides of a crop must be multiples of it.
        min_batch: Tiles that the network's BatchNorm needs in a forward pass.
        clock: Is told when each phase of a step begins.

    Raises:
        UserError: The sentence ends with what to type instead.
    """
    train_tiles, val_tiles = training_splits(args.data_path)
    arguments.check(args, stride, train_tiles.size, min_batch)
    saved = resume.find(args.resume, args.output_dir, name)
    initial = checkpoint.load(args.init_from, name) if args.init_from else None
    with (
        process_group(args.device, args.cuda_graphs, args.dist_timeout) as process,
        locked(args.output_dir, process),
    ):
        speedups = arguments.speedups(args, process)
        per_step = args.batch_size * args.grad_accum
        batches = training_loader(train_tiles, per_step, args.workers, process, args.seed)
        val_batches = None
        if val_tiles:
            shown = val_tiles.spread(args.eval_tiles)
            val_batches = scoring_loader(shown, args.batch_size, args.workers, process)
        plain = arguments.plain(args)
        torch.manual_seed(args.seed)
        yield Session(
            name,
            train_tiles.classes,
            process,
            speedups,
            batches,
            val_batches,
            args.output_dir,
            args.max_steps or args.epochs * len(batches),
            args.eval_steps or args.eval_freq * len(batches),
            args.warmup_steps,
            args.print_freq,
            args.save_every,
            plain,
            resume.settings(plain, process, train_tiles.folder),
            saved,
            initial,
            clock or Clock(),
        )


def polynomial_schedule(optimizer: Optimizer, steps: int, warmup: int) -> LambdaLR:
    """Linear rise over `warmup` steps, then (1 - t)^0.9 down to zero at `steps` (DeepLab's)."""
    warmup = min(warmup, steps // 2)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return (1 - min(step - warmup, steps - warmup) / max(steps - warmup, 1)) ** 0.9

    return LambdaLR(optimizer, factor)
