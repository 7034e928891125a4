"""What a training step computes and what it sends at any world size, counted in one process.

PyTorch's fake process group answers every collective at once, so `place` sets DDP up here exactly
as among 1024 processes. Fake tensors have shapes and no memory, so counting the FLOP of a
512-pixel batch takes seconds. Nothing is timed: the results are the same on any machine.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.futures import Future
from torch.nn.modules.batchnorm import _BatchNorm
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.lib.flops import FORMULAS
from common.args import Speedups
from common.distributed import Process
from common.speedups import place

CROP = 512  # pixels, the side all train.py take by default
BATCH = 2  # the least for BatchNorm behind DeepLabV3's global pooling; FLOP are linear in it
CLASSES = 2  # ground and aircraft


@dataclass(frozen=True)
class Workload:
    """One step of one process. FLOP are of one image, bytes of float32 gradients."""

    parameters: int
    forward: int  # FLOP
    backward: int  # FLOP
    buckets: list[int]  # bytes, in the order DDP reduces them
    ready: list[int]  # FLOP of the backward pass done when a bucket is complete; the last: all
    broadcasts: int  # a step, as `place` sets DDP up
    buffer_broadcasts: list[int]  # bytes of each that `broadcast_buffers` would add to a step
    norm_channels: list[int]  # of every BatchNorm layer: what SyncBatchNorm would synchronise


@contextmanager
def fake_world(world_size: int) -> Iterator[Process]:
    """Rank 0 of `world_size` processes; the others do not exist."""
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield Process(0, world_size, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def measure(build: Callable[[], nn.Module], loss_fn: Callable, process: Process) -> Workload:
    """Count what a step of `build()` costs under DDP.

    Args:
        build: Returns the model, on the CPU.
        loss_fn: (model, images, targets) → scalar, the one training uses.
        process: Of a `fake_world`.
    """
    forward, total, done = _flops(build, loss_fn)
    model = build()
    name_of: dict[Tensor, str] = {tensor: name for name, tensor in model.named_parameters()}
    objective: Any = place(model, loss_fn, process, Speedups())
    fired: list[tuple[int, list[str]]] = []

    # DDP's own all-reduce takes its result from the work handle; a fake one has none. So a hook
    # returns the bucket itself. Content and order of buckets are fixed before the hook is called.
    def hook(_: None, bucket: dist.GradBucket) -> Future[Tensor]:
        fired.append((bucket.buffer().nbytes, [name_of[p] for p in bucket.parameters()]))
        dist.all_reduce(bucket.buffer())
        future: Future[Tensor] = Future()
        future.set_result(bucket.buffer())
        return future

    objective.register_comm_hook(None, hook)
    # DDP observes a static graph for two steps, with one bucket, and rebuilds before the third.
    settled = [_step(objective, 64, fired) for _ in range(4)][-1]
    buckets = list(fired)
    objective.broadcast_buffers = True
    with_buffers = _step(objective, 64, fired)
    return Workload(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        forward=forward,
        backward=total - forward,
        buckets=[size for size, _ in buckets],
        ready=[max(done[name] for name in names) - forward for _, names in buckets],
        broadcasts=len(settled),
        buffer_broadcasts=with_buffers[len(settled) :],
        norm_channels=[m.num_features for m in model.modules() if isinstance(m, _BatchNorm)],
    )


class _Broadcasts(TorchDispatchMode):
    """Records the bytes of each broadcast, also of those that DDP's C++ code starts."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and "broadcast" in func.name():
            self.bytes.append(sum(tensor.nbytes for tensor in args[0]))
        return func(*args, **(kwargs or {}))


def _step(objective: nn.Module, side: int, fired: list) -> list[int]:
    """Forward and backward; refills `fired` and returns the bytes of each broadcast."""
    fired.clear()
    with _Broadcasts() as broadcasts:
        images, targets = _batch(side)
        objective(images, targets).backward()
    return broadcasts.bytes


def _batch(side: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(BATCH, 3, side, side), torch.zeros(BATCH, side, side, dtype=torch.long)


def _flops(build: Callable[[], nn.Module], loss_fn: Callable) -> tuple[int, int, dict[str, int]]:
    """FLOP per image of the forward pass, of both, and those done when each gradient is ready.

    Only matrix products and convolutions are counted, a multiply-add as two; everything else in
    these networks is bound by memory, not by arithmetic.
    """
    done: dict[str, int] = {}
    with FakeTensorMode():
        model = build()
        counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
        for name, parameter in model.named_parameters():

            def note(_: Tensor, name: str = name) -> None:
                done[name] = counter.get_total_flops() // BATCH

            parameter.register_post_accumulate_grad_hook(note)
        with counter:
            loss = loss_fn(model, *_batch(CROP))
            forward = counter.get_total_flops() // BATCH
            loss.backward()
    return forward, counter.get_total_flops() // BATCH, done
