"""Losses that are not finite: such a step leaves no trace but a count, and too many end the run.

Nothing here waits for the device in a step. What happened is counted on the device and read where
the loss is, at a log line; the step itself guards the weights (`common.speedups.make_step`).
"""

import math

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from common.cli import UserError

LIMIT = 20  # steps in a row
NAMED = 4  # tiles of the last such step that are remembered


def poisoned(loss: Tensor) -> Tensor:
    """`loss`, with gradients that are all nan where it is not finite, on all processes.

    An infinite loss may have gradients that are finite in part; those would reach the weights.
    """
    return loss * torch.where(loss.isfinite(), 1.0, torch.nan)


def guarded_step(
    optimizer: Optimizer, parameters: list[Tensor], loss: Tensor, norm: Tensor | None = None
) -> Tensor:
    """Step `optimizer`, but change nothing where a gradient is not finite; waits for nothing.

    It does for float32 and bf16 what the loss scaler does for fp16.

    Args:
        optimizer: A fused one, which skips a step on the device where `found_inf` says so.
        parameters: Those of the optimizer.
        loss: A scalar.
        norm: Of all gradients, where somebody has computed it already.

    Returns:
        The loss; nan where the step was skipped.
    """
    if norm is None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        # One kernel makes all norms on a GPU. A CPU sums in 0.6 times the time of a norm.
        norm = (
            torch.stack([gradient.sum() for gradient in gradients]).sum()
            if loss.device.type == "cpu"
            else nn.utils.get_total_norm(gradients)
        )
    skipped = ~norm.isfinite()
    optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
    optimizer.step()
    return torch.where(skipped, torch.nan, loss)


class Tally:
    """Sums since the last log line, as one float64 vector on the device.

    The sum of the finite losses; how many were not; how many in a row until now, and at most; the
    step of the last one, and the first `NAMED` of its tiles (-1: none).
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(5 + NAMED, dtype=torch.float64, device=device)
        self.sums[5:] = -1
        self.statistics: list[Tensor] = []

    def add(self, loss: Tensor, step: int, tiles: Tensor) -> None:
        """Count a step's `loss`, a scalar; `tiles` int64 [B] are the ones it was made of."""
        total, bad, row, worst = self.sums[:4].unbind()
        lost = ~loss.isfinite()
        total += torch.where(lost, 0.0, loss)
        bad += lost
        row += 1
        row *= lost
        torch.maximum(worst, row, out=worst)
        self.sums[4] = torch.where(lost, step, self.sums[4])
        shown = tiles[:NAMED]
        self.sums[5 : 5 + len(shown)] = torch.where(lost, shown, self.sums[5 : 5 + len(shown)])

    def restore(self, sums: Tensor) -> None:
        if sums.shape != self.sums.shape or sums.dtype != self.sums.dtype:
            raise ValueError("its counters of losses are invalid")
        self.sums.copy_(sums)

    def clear(self) -> None:
        """Start again after a log line; a row of skipped steps goes on."""
        row = self.sums[2].clone()
        self.sums.zero_()
        self.sums[2:4] = row
        self.sums[5:] = -1


def repair(model: nn.Module, tally: Tally) -> None:
    """Give BatchNorm statistics that met a non-finite image their last good values (waits).

    One such image spoils them in the forward pass alone, for ever. They are looked at whenever
    counts are read, and no training step reads them, so that a step pays nothing; what comes back
    is as old as the last look.
    """
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    if not buffers:
        return
    if not tally.statistics:
        # Before the first look: what a fresh network starts with.
        tally.statistics = [
            torch.ones_like(b) if name.endswith("var") else torch.zeros_like(b)
            for name, b in model.named_buffers()
            if b.is_floating_point()
        ]
    if _all_finite(buffers):
        for kept, buffer in zip(tally.statistics, buffers, strict=True):
            kept.copy_(buffer)
        return
    for kept, buffer in zip(tally.statistics, buffers, strict=True):
        torch.where(buffer.isfinite(), buffer, kept, out=buffer)


def check(model: nn.Module) -> None:
    """Let nothing that is not finite be saved.

    Raises:
        UserError: A weight is not finite. What was saved before is untouched.
    """
    if not _all_finite(list(model.parameters())):
        raise UserError(
            "the weights are not finite; lower --lr. Nothing was saved and the last checkpoint is "
            "untouched: --resume continues from it."
        )


@torch.no_grad()
def _all_finite(tensors: list[Tensor]) -> bool:
    return math.isfinite(float(nn.utils.get_total_norm([t.float() for t in tensors])))
