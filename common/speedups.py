"""The speed-ups, each resolved once into an object that is harmless when off.

`place` decides where the model lives (device, memory layout, DDP) and `make_step` what a training
step is (autocast, scaler). The loop that calls them has no branch for any of them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torchvision
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from common.distributed import Process

Step = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Speedups:
    """What was switched on. DDP is not here: the process group says whether it is."""

    amp_dtype: torch.dtype | None = None
    channels_last: bool = False

    @property
    def layout(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, self.amp_dtype, enabled=self.amp_dtype is not None)

    def scaler(self, device: torch.device) -> GradScaler:
        """fp16 has five bits of exponent and loses small gradients unscaled; bf16 has fp32's."""
        return GradScaler(device.type, enabled=self.amp_dtype == torch.float16)

    def banner(self, process: Process) -> str:
        """What this run resolved its flags to: the first line it prints."""
        device = process.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        dtype = str(self.amp_dtype or torch.float32).removeprefix("torch.")
        layout = "channels-last" if self.channels_last else "contiguous"
        threads = f"{torch.get_num_threads()} threads, " if device.type == "cpu" else ""
        return (
            f"device {name}, {threads}{dtype}, {layout}, world size {process.world_size}, "
            f"torch {torch.__version__}, torchvision {torchvision.__version__};"
        )


def place(model: nn.Module, process: Process, speedups: Speedups) -> nn.Module:
    """Move `model` to its device and layout and, among several processes, into DDP.

    The layout comes before DDP and before the optimizer, whose buckets and state take over the
    parameters' strides. The argument itself is the bare module, for evaluation and checkpoints.
    """
    model = model.to(process.device).to(memory_format=speedups.layout)
    if process.world_size == 1:
        return model
    ddp = DistributedDataParallel(
        model,
        device_ids=[process.device.index] if process.device.type == "cuda" else None,
        gradient_as_bucket_view=True,  # gradients live in the buckets: one copy of them less
        static_graph=True,
    )
    # Not rank 0's BatchNorm statistics before each forward, two collectives a step: see
    # `average_buffers`. Set as an attribute, because the argument's name differs between releases.
    ddp.broadcast_buffers = False
    return ddp


def make_step(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Tensor, Tensor], Tensor],
    optimizer: Optimizer,
    lr_scheduler: LRScheduler,
    scaler: GradScaler,
    speedups: Speedups,
    device: torch.device,
) -> Step:
    """One training step, `step(images, targets) -> loss`.

    `images` are float32 [B,3,H,W], `targets` what `loss_fn` takes; the loss is a detached scalar on
    the device: reading it is a sync, and the caller's choice. Nothing in here waits for the device.
    """

    def step(images: Tensor, targets: Tensor) -> Tensor:
        images = images.contiguous(memory_format=speedups.layout)
        with speedups.autocast(device):
            loss = loss_fn(model, images, targets)
        scaler.scale(loss).backward()
        scaler.step(optimizer)  # no sync: fused optimizers skip a step of infinities on the device
        scaler.update()
        optimizer.zero_grad()
        lr_scheduler.step()
        return loss.detach()

    return step
