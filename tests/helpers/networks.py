"""Trains narrow networks in a process of their own; a run for steps of no particular model."""

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torture import kills

from benchmarks.lib.standins import narrow
from benchmarks.lib.synthetic import bare_session
from common.args import Speedups
from common.distributed import Process
from common.session import Session


def train_thin(folder: str, words: list[str]) -> None:
    """Run `folder`/train.py with thin networks, in a process that needs no others."""
    narrow()
    kills.run(f"{folder}.train", words)


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
