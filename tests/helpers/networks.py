"""Trains narrow networks in a process of their own; a run for steps of no particular model."""

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torture import kills

from benchmarks.lib.standins import Replace, narrow
from benchmarks.lib.synthetic import bare_session
from common.args import Speedups
from common.distributed import Process
from common.session import Session


def train_thin(folder: str, words: list[str]) -> None:
    """Run `folder`/train.py with thin networks, in a process that needs no others."""
    narrow()
    train_without_dropout()
    kills.run(f"{folder}.train", words)


def without_dropout(model: nn.Module) -> nn.Module:
    """`model` without random numbers: dropout, also of paths (DropPath, StochasticDepth) is 0.

    They are found by the names of their numbers, `p`, `drop_prob`, `dropout` and the like.
    """
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and (name == "p" or "drop" in name):
                setattr(module, name, 0.0)
    return model


def train_without_dropout(replace: Replace = setattr) -> None:
    """Let every training begin with `without_dropout`."""
    start = Session.start

    def start_without(self: Session, model: nn.Module, optimizer: Optimizer) -> None:
        start(self, without_dropout(model), optimizer)

    replace(Session, "start", start_without)


def session_of(
    model: nn.Module,
    optimizer: Optimizer,
    schedule: LRScheduler,
    speedups: Speedups,
    clip_grad_norm: float | None = None,
    device: str = "cpu",
) -> Session:
    """A session for `make_step`, of no particular model and without data."""
    process = Process(0, 1, torch.device(device))
    s = bare_session(process, speedups, clip_grad_norm=clip_grad_norm)
    s.model, s.optimizer, s.lr_scheduler = model, optimizer, schedule
    s.scaler, s.average = speedups.scaler(process.device), None
    return s
