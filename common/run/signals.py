"""When to save and when to end: signals and intervals, on which all processes agree.

The flags of a step are sent while the next step computes, so no process waits for them. A signal
takes effect at the end of the step after the one in which it arrived.
"""

import os
import signal
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from common.distributed import SIGNALS, Process

REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, start the run again with --resume
INTERRUPTED = 130  # as a shell reports Ctrl-C


class Watch:
    """While it is entered, `agreed` reports SIGTERM, SIGUSR1 and Ctrl-C.

    A second Ctrl-C ends the process at once; a file that is being written is then left as it was.

    Args:
        process: This process.
        save_every: What `interval` returned; None means never.
    """

    def __init__(self, process: Process, save_every: tuple[str, float] | None) -> None:
        self.process = process
        self.unit, self.count = save_every or ("steps", 0.0)
        self.signal = 0
        self.interrupted = float("inf")
        self.saved = time.monotonic()
        self.pending: tuple[Any, torch.Tensor] | None = None
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Watch":
        for number in SIGNALS:
            # A shell starts background jobs with Ctrl-C ignored.
            if signal.getsignal(number) != signal.SIG_IGN:
                self.before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.pending and kind is None:
            self.pending[0].wait()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            # torchrun may pass on a Ctrl-C that the terminal has sent to all processes already.
            if time.monotonic() - self.interrupted > 1:
                os._exit(INTERRUPTED)
            self.interrupted = min(self.interrupted, time.monotonic())
            if self.process.is_main:  # a handler must not use the buffers of print
                os.write(2, b"\nsaving after this step; Ctrl-C again ends the run at once\n")
        self.signal = number

    def agreed(self, step: int) -> tuple[int, bool]:
        """After a step: the signal that ends the run, or 0, and whether it is time to save."""
        due = late = False
        if self.count and self.unit == "steps":
            due = step % self.count == 0
        elif self.count:
            late = time.monotonic() - self.saved > 60 * self.count
        if self.process.world_size == 1:
            return self.signal, due or late
        answered = [0, 0]
        if self.pending:
            work, flags = self.pending
            work.wait()
            answered = flags.tolist()
        # Only rank 0's clock counts.
        flags = torch.tensor([self.signal, int(late and self.process.is_main)])
        self.pending = dist.all_reduce(flags, dist.ReduceOp.MAX, async_op=True), flags
        return answered[0], due or bool(answered[1])

    def restart(self) -> None:
        """The run was saved: the interval starts again."""
        self.saved = time.monotonic()
