"""Trains narrow networks in a process of their own; a run for steps of no particular model."""

import torch
from torture import kills

from benchmarks.lib.standins import narrow
from common.run.checkpoint import Run


def train_thin(folder: str, words: list[str]) -> None:
    """Run `folder`/train.py with thin networks, in a process that needs no others."""
    narrow()
    kills.run(f"{folder}.train", words)


def run_of(model, optimizer, schedule, settings) -> Run:
    """A run for `make_step`, of no particular model."""
    return Run("", [], {}, model, optimizer, schedule, settings.scaler(torch.device("cpu")))
