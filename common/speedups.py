"""The speed-ups, each resolved once into an object that does nothing when it is off.

`place` moves and wraps the model (device, memory layout, compilation, DDP). `make_step` builds the
training step (autocast, scaler, accumulation, graph). The loop that calls it has no branch for any
speed-up.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten, tree_unflatten

from common import graphs
from common.distributed import Process
from common.run import nonfinite
from common.run.checkpoint import Run

Step = Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class Speedups:
    """What is switched on. DDP is not here: it is on when there is a process group."""

    amp_dtype: torch.dtype | None = None
    channels_last: bool = False
    cuda_graphs: bool = False
    compile: bool = False
    grad_accum: int = 1
    sync_bn: bool = False

    @property
    def layout(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, self.amp_dtype, self.amp_dtype is not None)

    def scaler(self, device: torch.device) -> GradScaler:
        """fp16 has five exponent bits and loses small gradients unscaled; bf16 has fp32's range."""
        return GradScaler(device.type, enabled=self.amp_dtype == torch.float16)

    def banner(self, process: Process, batch_size: int | None = None) -> str:
        """The first line that a run prints: what its flags were resolved to.

        Args:
            batch_size: Of one forward pass of one process, in training.
        """
        device = process.device
        items = [torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"]
        if device.type == "cpu":
            items.append(f"{torch.get_num_threads()} threads")
        items.append(str(self.amp_dtype or torch.float32).removeprefix("torch."))
        if device.type == "cuda" and _tf32_convolutions():
            items[-1] += " (float32 convolutions in TF32)"
        items.append("channels-last" if self.channels_last else "contiguous")
        items += ["compiled"] * self.compile
        items += [f"CUDA graph after {graphs.WARMUP_STEPS} steps"] * self.cuda_graphs
        items.append(f"world size {process.world_size}" + ", synchronised BN" * self.sync_bn)
        items += [f"torch {torch.__version__}", f"torchvision {torchvision.__version__}"]
        if batch_size:
            parts = (
                f"{batch_size} tiles x {process.world_size} processes x {self.grad_accum} passes"
            )
            total = batch_size * process.world_size * self.grad_accum
            items.append(f"global batch {total} ({parts})")
        return "device " + ", ".join(items)


def _tf32_convolutions() -> bool:
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


class Objective(nn.Module):
    """A model and its loss as one module, `(images, targets) -> loss`.

    DDP wraps it and torch.compile compiles it. So the loss, which reads every pixel's logits in
    float32, is fused like the rest, and DDP has one scalar to watch instead of a dict of maps.
    """

    def __init__(self, model: nn.Module, loss_fn: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, images: Tensor, targets: Any) -> Tensor:
        return self.loss_fn(self.model, images, targets)


def place(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    process: Process,
    speedups: Speedups,
) -> nn.Module:
    """Move `model` to its device and layout; compile it with its loss; wrap both into DDP.

    The layout comes before DDP and the optimizer, because the buckets and the state take over the
    parameters' strides. `model` itself stays the bare module, for evaluation and checkpoints:
    neither DDP nor compilation changes the names of its parameters.

    Args:
        loss_fn: (model, images, targets) → scalar.

    Returns:
        (images, targets) → loss, an `Objective` or DDP around one.
    """
    device = process.device
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # all training batches have one shape
    if speedups.cuda_graphs:
        graphs.own_stream(device)
    if speedups.sync_bn:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # in place; the names stay
    model = model.to(device).to(memory_format=speedups.layout)
    objective = Objective(model, loss_fn)
    if speedups.compile:
        # In place, so that no wrapper changes the names. One shape, so not dynamic.
        objective.compile(fullgraph=True, dynamic=False)
    if process.world_size == 1:
        return objective
    ddp = DistributedDataParallel(
        objective,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,  # reduced gradients are not copied out of the buckets
        # With a static graph the first backward pass reduces gradients even under `no_sync`.
        static_graph=speedups.grad_accum == 1,
    )
    # No broadcast of rank 0's BatchNorm statistics before each forward, two collectives a step: see
    # `average_buffers`. Set as an attribute, because the argument's name differs between releases.
    ddp.broadcast_buffers = False
    return ddp


def make_step(
    objective: nn.Module, run: Run, speedups: Speedups, clip_grad_norm: float | None = None
) -> Step:
    """One training step, `step(images, targets) -> loss`.

    `images` are float32 [B·grad_accum,3,H,W]. `targets` are what the objective takes, as many as
    images. They are processed in `grad_accum` equal parts, then the optimizer steps once. The loss
    is a detached scalar on the device, valid until the next step. Nothing in here waits for the
    device; reading the loss does. A step with a non-finite loss or gradient changes no weight and
    returns a non-finite loss. The optimizer must be a fused one, which can skip a step.

    Args:
        objective: What `place` returned.
        run: Its optimizer, schedule and scaler are stepped.
        clip_grad_norm: Scale gradients down to this global norm.
    """
    optimizer, scaler, parts = run.optimizer, run.scaler, speedups.grad_accum
    device = next(objective.parameters()).device
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def split(values: Any) -> Any:
        """Equal parts of a tensor, or of each tensor in a tuple."""
        tensors, form = tree_flatten(values)
        cut = zip(*(tensor.chunk(parts) for tensor in tensors), strict=True)
        return [tree_unflatten(part, form) for part in cut]

    def whole_step(images: Tensor, targets: Any) -> Tensor:
        optimizer.zero_grad()  # to None: the first part's gradients are then not added to zeros
        losses = []
        for i, part in enumerate(zip(split(images), split(targets), strict=True)):
            with _reduced_after(i == parts - 1, objective):
                with speedups.autocast(device):
                    loss = objective(*part) / parts
                run.clock.mark("backward")
                scaler.scale(nonfinite.poisoned(loss)).backward()
                run.clock.mark("forward")
            losses.append(loss.detach())
        run.clock.mark("optimizer")
        total = torch.stack(losses).sum()
        norm = None
        if clip_grad_norm is not None:
            scaler.unscale_(optimizer)
            norm = clip_grad_norm_(parameters, clip_grad_norm)
        if scaler.is_enabled():
            # No sync: a fused optimizer skips a non-finite step on the device.
            scaler.step(optimizer)
            scaler.update()
            # Halved at every skipped step, it would reach 0, and 0 · inf would reach the weights.
            scaler._scale.clamp_(min=1.0)  # type: ignore[union-attr]
        else:
            total = nonfinite.guarded_step(optimizer, parameters, total, norm)
        if run.average:
            run.average.update()
        return total

    run_step: Callable[..., Tensor] = whole_step
    if speedups.cuda_graphs:
        _make_capturable(optimizer, device)
        run_step = graphs.Graphed(whole_step, graphs.CudaGraph(), graphs.WARMUP_STEPS)

    def step(images: Tensor, targets: Any) -> Tensor:
        loss = run_step(images.contiguous(memory_format=speedups.layout), targets)
        run.lr_scheduler.step()
        return loss

    return step


def _reduced_after(last: bool, objective: nn.Module) -> AbstractContextManager[None]:
    """DDP averages the gradients once per step, in the backward pass of the last part."""
    if last or not isinstance(objective, DistributedDataParallel):
        return nullcontext()
    return objective.no_sync()


def _make_capturable(optimizer: Optimizer, device: torch.device) -> None:
    """Prepare `optimizer` for a capture: its learning rate becomes a tensor, set by the schedule.

    A number would be fixed in the graph. Schedulers fill a tensor in place; only the fused
    optimizers read one without a sync.
    """
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(float(group["lr"]), device=device)
        if "capturable" in group:  # Adam and the like then count steps on the device
            group["capturable"] = True
    # The warm-up runs uncaptured by design; the optimizer would warn about it once.
    optimizer._warned_capturable_if_run_uncaptured = True  # type: ignore[attr-defined]


def has_native_bf16(device: torch.device) -> bool:
    """Whether `device` multiplies bf16 itself; others convert to float32 and back.

    `ATEN_CPU_CAPABILITY=avx2` with `ONEDNN_MAX_CPU_ISA=AVX2` keeps torch from using a processor's
    bf16 instructions; it then computes as on a processor without them.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        return False
    if not hasattr(torch.cpu, "get_capabilities"):  # torch before 2.12
        return torch.cpu._is_avx512_bf16_supported()
    can = torch.cpu.get_capabilities()
    return any(can.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
