"""What DDP sends in a step of a large world, in which PyTorch's fake process group answers."""

import json
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.futures import Future
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torture import children

from common.args import Speedups
from common.distributed import Process
from common.speedups import place
from unet.model import build_model, loss_fn

WORLD = 1024


class Collectives(TorchDispatchMode):
    """Counts collectives, also those that DDP's C++ code starts."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.namespace == "c10d"
        return func(*args, **(kwargs or {}))


def print_traffic(broadcast_buffers):
    """In a process of its own: the fake process group must not affect other tests."""
    dist.init_process_group("fake", rank=0, world_size=WORLD, store=FakeStore())
    model = build_model("resnet18", 2)
    objective = place(model, loss_fn, Process(0, WORLD, torch.device("cpu")), Speedups())
    objective.broadcast_buffers |= broadcast_buffers
    buckets = []

    # DDP's own all-reduce takes its result from the work handle; a fake one has none. So a hook
    # returns the bucket itself.
    def hook(_, bucket):
        buckets.append(bucket.buffer().nbytes)
        future = Future()
        future.set_result(bucket.buffer())
        return future

    objective.register_comm_hook(None, hook)
    # DDP observes a static graph for two steps, with one bucket, and rebuilds before the third.
    for _ in range(4):
        buckets.clear()
        with Collectives() as others:
            images = torch.zeros(2, 3, 64, 64)
            objective(images, torch.zeros(2, 64, 64, dtype=torch.long)).backward()
    weights = sum(parameter.numel() for parameter in model.parameters())
    print(json.dumps({"buckets": buckets, "weights": weights, "others": others.count}))


@pytest.mark.parametrize("broadcast_buffers", [False, True])
def test_every_gradient_is_sent_once_and_nothing_else(tmp_path, broadcast_buffers):
    """With broadcasts, which `place` switches off, other collectives are seen."""
    child = children.start(partial(print_traffic, broadcast_buffers), tmp_path / "log")
    code, log = children.end(child), (tmp_path / "log").read_text()
    assert code == 0, log
    sent = json.loads(log.splitlines()[-1])
    assert len(sent["buckets"]) > 1  # rebuilt
    assert sum(sent["buckets"]) == 4 * sent["weights"]
    assert (sent["others"] > 0) == broadcast_buffers
