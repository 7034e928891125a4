"""Non-finite losses: such a step is skipped and counted, and too many in a row end the run.

Nothing here waits for the device during a step. Skipped steps are counted on the device, and the
counts are read with the loss, at a log line. The step itself protects the weights
(`common.speedups.make_step`).
"""

import math

import torch
from torch import Tensor, nn

from common.cli import UserError

LIMIT = 20  # steps in a row
NAMED = 4  # tiles of the last such step that are remembered


class Tally:
    """Sums since the last log line, as one float64 vector on the device.

    The sum of the finite losses; the number of non-finite ones; how many of them in a row, now and
    at most; the step of the last one, and the first `NAMED` of its tiles (-1: no tile).
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(5 + NAMED, dtype=torch.float64, device=device)
        self.sums[5:] = -1
        self.statistics: list[Tensor] = []

    def add(self, loss: Tensor, step: int, tiles: Tensor) -> None:
        """Count a step's `loss`, a scalar; `tiles` int64 [B] are the tiles of the step."""
        total, bad, row, worst = self.sums[:4].unbind()
        skipped = ~loss.isfinite()
        total += torch.where(skipped, 0.0, loss)
        bad += skipped
        row += 1
        row *= skipped
        torch.maximum(worst, row, out=worst)
        self.sums[4] = torch.where(skipped, step, self.sums[4])
        shown = tiles[:NAMED]
        self.sums[5 : 5 + len(shown)] = torch.where(skipped, shown, self.sums[5 : 5 + len(shown)])

    def restore(self, sums: Tensor) -> None:
        if sums.shape != self.sums.shape or sums.dtype != self.sums.dtype:
            raise ValueError("its counters of losses are invalid")
        self.sums.copy_(sums)

    def clear(self) -> None:
        """Reset after a log line; the count of skipped steps in a row is kept."""
        row = self.sums[2].clone()
        self.sums.zero_()
        self.sums[2:4] = row
        self.sums[5:] = -1


def repair(model: nn.Module, tally: Tally) -> None:
    """Restore non-finite BatchNorm statistics to their last finite values (one sync).

    One non-finite image makes them non-finite for good, in the forward pass alone. They are checked
    when the counts are read and when the run is saved. A step pays nothing: no training
    step reads them. The restored values are as old as the last check.
    """
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    if not buffers:
        return
    if not tally.statistics:
        # Before the first check: the initial values of a network.
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
    """Refuse to save weights that are not finite.

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
