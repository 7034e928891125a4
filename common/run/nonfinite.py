"""Non-finite losses: such a step is skipped and counted, and too many in a row end the run.

Nothing here waits for the device during a step. Skipped steps are counted on the device, and the
counts are read with the loss, at a log line. The step itself protects the weights
(`common.speedups.make_step`).
"""

import torch
from torch import Tensor, nn

from common.cli import UserError

LIMIT = 20  # steps in a row
NAMED = 4  # tiles of the last such step that are remembered


class Tally:
    """Sums since the last log line, as one float64 vector on the device.

    The sum of the finite losses, and their number; the number of skipped steps, whose loss is not
    finite; how many of them in a row, now and at most; the step of the last one, and the first
    `NAMED` of its tiles (-1: no tile).
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(6 + NAMED, dtype=torch.float64, device=device)
        self.sums[6:] = -1
        self.statistics: dict[str, Tensor] = {}  # BatchNorm's, see `repair`

    def add(self, loss: Tensor, step: int, tiles: Tensor) -> None:
        """Count a step's `loss`, a scalar; `tiles` int64 [B] are the tiles of the step."""
        total, finite, bad, row, worst = self.sums[:5].unbind()
        skipped = ~loss.isfinite()
        total += torch.where(skipped, 0.0, loss)
        finite += ~skipped
        bad += skipped
        row += 1
        row *= skipped
        torch.maximum(worst, row, out=worst)
        self.sums[5] = torch.where(skipped, step, self.sums[5])
        shown = tiles[:NAMED]
        self.sums[6 : 6 + len(shown)] = torch.where(skipped, shown, self.sums[6 : 6 + len(shown)])

    def restore(self, sums: Tensor) -> None:
        """Continue from `sums`; those of earlier versions, without a number of losses, are dropped.

        Raises:
            ValueError: They are invalid.
        """
        if sums.shape == (5 + NAMED,):
            return
        if sums.shape != self.sums.shape or sums.dtype != self.sums.dtype:
            raise ValueError("its counters of losses are invalid")
        self.sums.copy_(sums)

    def clear(self) -> None:
        """Reset after a log line; the count of skipped steps in a row is kept."""
        row = self.sums[3].clone()
        self.sums.zero_()
        self.sums[3:5] = row
        self.sums[6:] = -1


def repair(model: nn.Module, tally: Tally) -> None:
    """Restore non-finite BatchNorm statistics to their last finite values; waits for nothing.

    One non-finite image makes them non-finite for good, in the forward pass alone. They are
    restored when the counts are read and when the run is saved. A step pays nothing: no training
    step reads them. The restored values are as old as the last call.
    """
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            initial = torch.ones_like if name.endswith("var") else torch.zeros_like
            kept = tally.statistics.setdefault(name, initial(buffer))
            torch.where(buffer.isfinite(), buffer, kept, out=buffer)
            kept.copy_(buffer)


def check(model: nn.Module) -> None:
    """Refuse to save weights that are not finite.

    Raises:
        UserError: A weight is not finite. What was saved before is untouched.
    """
    norm = nn.utils.get_total_norm([p.detach().float() for p in model.parameters()])
    if not norm.isfinite():
        raise UserError(
            "the weights are not finite; lower --lr. Nothing was saved and the last checkpoint is "
            "untouched: --resume continues from it."
        )
