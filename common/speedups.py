"""What the speed-ups do, in `place` and in `make_step`, by objects that do nothing when off."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten, tree_unflatten

from common import graphs
from common.args import Speedups
from common.cli import UserError
from common.distributed import Process
from common.session import Session

Step = Callable[[Tensor, Any], Tensor]


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
    model: nn.Module, loss_fn: Callable[..., Tensor], process: Process, speedups: Speedups
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


def make_step(objective: nn.Module, s: Session) -> Step:
    """One training step, `step(images, targets) -> loss`.

    `images` are float32 [B·grad_accum,3,H,W]. `targets` are what the objective takes, as many as
    images. They are processed in `grad_accum` equal parts, then the optimizer steps once. The loss
    is a detached scalar on the device, valid until the next step. Nothing in here waits for the
    device; reading the loss does. A step with a non-finite loss or gradient changes no weight and
    no average, and returns nan, on all processes.

    Args:
        objective: What `place` returned.
        s: A started session. Its optimizer, schedule, scaler and moving average are stepped.

    Raises:
        UserError: The optimizer cannot skip a step on the device.
    """
    optimizer, scaler, parts = s.optimizer, s.scaler, s.speedups.grad_accum
    device, clip_grad_norm = s.process.device, s.args["clip_grad_norm"]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not getattr(optimizer, "_step_supports_amp_scaling", False):  # torch's name; fused ones can
        raise UserError(
            f"the optimizer {type(optimizer).__name__} cannot skip a step whose gradients are not "
            "finite; use Adam, AdamW, SGD or Adagrad of torch.optim with fused=True."
        )

    def split(values: Any) -> Any:
        """Equal parts of a tensor, or of each tensor in a tuple."""
        tensors, form = tree_flatten(values)
        chunks = zip(*(tensor.chunk(parts) for tensor in tensors), strict=True)
        return [tree_unflatten(chunk, form) for chunk in chunks]

    def whole_step(images: Tensor, targets: Any) -> Tensor:
        optimizer.zero_grad()  # to None: the first part's gradients are then not added to zeros
        losses = []
        for i, part in enumerate(zip(split(images), split(targets), strict=True)):
            s.clock.mark("forward")
            with _sync_gradients_if(i == parts - 1, objective):
                with s.speedups.autocast(device):
                    loss = objective(*part) / parts
                s.clock.mark("backward")
                scaler.scale(poisoned(loss)).backward()
            losses.append(loss.detach())
        s.clock.mark("optimizer")
        total = torch.stack(losses).sum()
        scaler.unscale_(optimizer)
        norm = None if clip_grad_norm is None else clip_grad_norm_(parameters, clip_grad_norm)
        total = step_if_finite(optimizer, parameters, total, norm)
        if scaler.is_enabled():
            scaler.update()
            # Halved at every skipped step, it would reach 0, and 0 · inf would reach the weights.
            scaler._scale.clamp_(min=1.0)  # type: ignore[union-attr]
        if s.average:
            s.average.update(total.isfinite())
        return total

    run_step: Callable[..., Tensor] = whole_step
    if s.speedups.cuda_graphs:
        _make_capturable(optimizer, device)
        run_step = graphs.Graphed(whole_step, graphs.CudaGraph(), graphs.WARMUP_STEPS)

    def step(images: Tensor, targets: Any) -> Tensor:
        loss = run_step(images.contiguous(memory_format=s.speedups.layout), targets)
        s.lr_scheduler.step()
        return loss

    return step


def poisoned(loss: Tensor) -> Tensor:
    """`loss`; if it is not finite, all its gradients are nan, on all processes.

    Some gradients of an infinite loss may be finite; those would reach the weights.
    """
    return loss * torch.where(loss.isfinite(), 1.0, torch.nan)


def step_if_finite(
    optimizer: Optimizer, parameters: list[Tensor], loss: Tensor, norm: Tensor | None = None
) -> Tensor:
    """Step `optimizer`, but change nothing if a gradient is not finite; waits for nothing.

    Args:
        optimizer: A fused one, which skips a step on the device if `found_inf` is set.
        norm: The norm of all gradients, if it has been computed already.

    Returns:
        The loss; nan if the step was skipped.
    """
    if norm is None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        # On a GPU one kernel computes all norms. On a CPU a sum takes 0.6 times as long as a norm.
        norm = (
            torch.stack([gradient.sum() for gradient in gradients]).sum()
            if loss.device.type == "cpu"
            else nn.utils.get_total_norm(gradients)
        )
    skipped = ~norm.isfinite()
    optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
    optimizer.step()  # the weights change here
    return torch.where(skipped, torch.nan, loss)


def _sync_gradients_if(last: bool, objective: nn.Module) -> AbstractContextManager[None]:
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
