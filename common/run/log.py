"""What a training step tells a benchmark."""

from collections.abc import Callable
from typing import Any

from torch import Tensor


class Clock:
    """Is told when each phase of a training step begins, and does nothing with it.

    The benchmark's own takes the time: `views`, `forward`, `backward`, `optimizer`, `loop`, `data`.
    """

    def mark(self, phase: str) -> None:
        """A phase begins."""

    def step(self, step: Callable[..., Tensor], images: Tensor, targets: Any) -> Tensor:
        """Call the training step; a clock may look at it."""
        return step(images, targets)
