"""What the loop reports of a device that computes behind its back."""

import time

import pytest
import torch
from helpers.networks import session_of
from torch import nn

from benchmarks.lib.synthetic import noise_tiles
from common import engine
from common.args import Speedups
from common.distributed import Process
from common.loader import training_loader
from common.run import machine
from common.run.report import Log

CPU = Process(0, 1, torch.device("cpu"))
LAUNCH, STEP = 0.010, 0.100  # seconds of the CPU and of the device


class Device:
    """A clock, and a device that takes `STEP` for what the CPU hands over in `LAUNCH`."""

    def __init__(self):
        self.time = self.free = 0.0

    def launch(self, *_):
        self.time += LAUNCH
        self.free = max(self.time, self.free) + STEP
        return torch.zeros(())

    def wait(self, until):
        self.time = max(self.time, until)

    def now(self):
        return max(self.time, self.free)


class Tiles:
    """A batch every `period` seconds."""

    def __init__(self, device, period):
        self.device, self.period, self.ready = device, period, 0.0

    def __len__(self):
        return 20

    def __getitems__(self, indices):
        self.ready += self.period
        self.device.wait(self.ready)
        return noise_tiles(1, 8, torch.device("cpu"))


@pytest.mark.parametrize(("period", "share"), [(0.080, 0.0), (0.200, 0.45)])
def test_a_wait_counts_only_while_the_device_has_nothing_to_do(
    tmp_path, monkeypatch, period, share
):
    device = Device()
    monkeypatch.setattr(time, "perf_counter", lambda: device.time)
    monkeypatch.setattr(machine.Timeline, "now", lambda self: device.now())
    real = engine.account
    monkeypatch.setattr(engine, "account", lambda *given: device.wait(device.free) or real(*given))
    model = nn.Conv2d(1, 1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    s = session_of(model, optimizer, None, Speedups())
    log = Log(tmp_path / "log.jsonl", CPU, 0)
    lines = []
    monkeypatch.setattr(log, "write", lambda **line: lines.append(line))
    s.batches, s.total_steps = training_loader(Tiles(device, period), 1, 0, CPU, 0), 20
    s.args["print_freq"] = 10
    for _ in engine.train_one_epoch(
        s, device.launch, lambda batch, epoch: (batch.images, None), log
    ):
        pass
    assert [line["step"] for line in lines] == [10, 20]
    assert lines[-1]["data_share"] == pytest.approx(share, abs=0.02)
