"""Names the process that has stopped responding.

A collective that waits for a peer does not know which one. So a thread of each process writes a
beat and the process's step into the job's store. If the beat stops, the process was stopped or its
machine is gone. If the step stays behind, the process hangs: NCCL itself does not notice it when
its collectives are captured, see `common.distributed.process_group`.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist

from common.cli import UserError
from common.distributed import Process


@contextmanager
def watched(process: Process, timeout_seconds: float, step: Callable[[], int]) -> Iterator[None]:
    """Beat while the body runs; end the process when a peer has been silent or stuck for too long.

    With one process nothing happens.

    Args:
        process: This process.
        timeout_seconds: How long a peer may be silent, or stay behind.
        step: The step that this process has done.

    Raises:
        UserError: A collective of the body failed; names the ranks that are silent or behind.
    """
    if process.world_size == 1:
        yield
        return
    heart = _Heart(process.rank, process.world_size, timeout_seconds, step)
    heart.start()
    try:
        yield
    except RuntimeError as error:  # gloo's timeouts and lost connections; torch's DistError
        if not _is_collective_error(error):
            raise
        raise UserError(heart.diagnosis(str(error))) from error
    finally:
        heart.stop()


def _is_collective_error(error: RuntimeError) -> bool:
    text = str(error)
    return isinstance(error, dist.DistError) or any(
        word in text for word in ("gloo", "Gloo", "NCCL", "Timed out waiting", "Connection closed")
    )


class _Heart(threading.Thread):
    def __init__(
        self, rank: int, world_size: int, timeout_seconds: float, step: Callable[[], int]
    ) -> None:
        super().__init__(daemon=True, name="heartbeat")
        self.rank, self.world_size, self.timeout = rank, world_size, timeout_seconds
        self.step = step
        self.period = min(5.0, timeout_seconds / 10)
        store = dist.distributed_c10d._get_default_store()
        # A separate connection, because the loop's may be blocked in a wait. Its timeout is short.
        self.store = dist.PrefixStore("heartbeat", store.clone())
        self.store.set_timeout(timedelta(seconds=max(2.0, self.period)))
        self.label = f"{socket.gethostname()}, process {os.getpid()}"
        self.seen: dict[int, tuple[str, float]] = {}  # the last beat of a rank, and when it came
        self.behind: dict[int, tuple[int, float]] = {}  # its step while below ours, and since when
        self.over = threading.Event()

    def run(self) -> None:
        beat = 0
        while not self.over.wait(self.period if beat else 0):
            beat += 1
            with suppress(RuntimeError):  # the store's host may be the one that is gone
                self.store.set(str(self.rank), f"{beat}|{self.step()}|{self.label}")
                self.look()
            problem = self.problem(self.timeout + self.period)
            if problem and not self.over.is_set():
                # Nothing can wake the loop inside an NCCL collective.
                print(f"error: {problem}", file=sys.stderr)
                os._exit(2)

    def stop(self) -> None:
        self.over.set()
        self.join(2 * self.period)

    def look(self) -> None:
        now = time.monotonic()
        for rank in range(self.world_size):
            if rank != self.rank and self.store.check([str(rank)]):
                beat = self.store.get(str(rank)).decode()
                if self.seen.get(rank, ("", 0.0))[0] != beat:
                    self.seen[rank] = beat, now
                step = int(beat.split("|")[1])
                # A rank at our own step may score or save for as long as it takes.
                if step >= self.step():
                    self.behind.pop(rank, None)
                elif self.behind.get(rank, (-1, 0.0))[0] != step:
                    self.behind[rank] = step, now

    def problem(self, seconds: float) -> str:
        """Names the ranks that for longer than this have not beaten, or not moved; else ''."""
        if silent := self.silent(seconds):
            return self.sentence(silent, "has been silent")
        now = time.monotonic()
        stuck = [rank for rank, (_, since) in self.behind.items() if now - since > seconds]
        return self.sentence(stuck, "has not moved") if stuck else ""

    def silent(self, seconds: float) -> list[int]:
        """The ranks whose last beat is older than this."""
        now = time.monotonic()
        return [rank for rank, (_, when) in self.seen.items() if now - when > seconds]

    def diagnosis(self, reason: str) -> str:
        """Name the ranks whose beat has stopped, or else those that are behind in steps."""
        time.sleep(min(self.period, 2.0))  # for a rank that was heard a moment ago
        silent = self.silent(2.5 * self.period)
        if silent:
            return self.sentence(silent, "has been silent")
        behind = [
            rank for rank, (beat, _) in self.seen.items() if int(beat.split("|")[1]) < self.step()
        ]
        if behind:
            return self.sentence(behind, "is behind")
        return (
            f"rank {self.rank} waited at step {self.step()} for a process that did not answer "
            f"({' '.join(reason.split())[:120]}); no rank is silent, so one hangs inside the same "
            "step. The last checkpoint is untouched: --resume continues from it."
        )

    def sentence(self, ranks: list[int], what: str) -> str:
        names = []
        for rank in ranks:
            _, step, where = self.seen[rank][0].split("|", 2)
            names.append(f"rank {rank} ({where}) {what} since step {step}")
        return (
            f"{'; '.join(names)}, and rank {self.rank} waits for it at step {self.step()}. "
            "The last checkpoint is untouched: --resume continues from it."
        )
