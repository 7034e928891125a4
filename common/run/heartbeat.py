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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from common.cli import UserError
from common.distributed import Process


@contextmanager
def watched(process: Process, timeout_seconds: float, step: Callable[[], int]) -> Iterator[None]:
    """Beat while the body runs; end the process when a peer has been silent or stuck for too long.

    With one process nothing happens.

    Args:
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
        self.rank, self.timeout, self.step = rank, timeout_seconds, step
        self.peers = [peer for peer in range(world_size) if peer != rank]
        self.period = min(5.0, timeout_seconds / 10)
        store = dist.distributed_c10d._get_default_store()
        # A separate connection, because the loop's may be blocked in a wait. Its timeout is short.
        self.store = dist.PrefixStore("heartbeat", store.clone())
        self.store.set_timeout(timedelta(seconds=max(2.0, self.period)))
        self.label = f"{socket.gethostname()}, process {os.getpid()}"
        self.beats: dict[int, tuple[str, float]] = {}  # the last one of a peer, and when it came
        self.behind: dict[int, tuple[int, float]] = {}  # its step while below ours, and since when
        self.over = threading.Event()

    def run(self) -> None:
        beat = 0
        while not self.over.wait(self.period if beat else 0):
            beat += 1
            with suppress(RuntimeError):  # the store's host may be the one that is gone
                self.store.set(str(self.rank), f"{beat}|{self.step()}|{self.label}")
                self.look()
            limit = self.timeout + self.period
            problem = self.named(self.beats, limit, "has been silent")
            problem = problem or self.named(self.behind, limit, "has not moved")
            if problem and not self.over.is_set():
                # Nothing can wake the loop inside an NCCL collective.
                print(f"error: {problem}", file=sys.stderr)
                os._exit(2)

    def stop(self) -> None:
        self.over.set()
        self.join(2 * self.period)

    def look(self) -> None:
        now = time.monotonic()
        for peer in self.peers:
            if not self.store.check([str(peer)]):
                continue
            beat = self.store.get(str(peer)).decode()
            if self.beats.get(peer, ("", 0.0))[0] != beat:
                self.beats[peer] = beat, now
            step = int(beat.split("|")[1])
            # A rank at our own step may score or save for as long as it takes.
            if step >= self.step():
                self.behind.pop(peer, None)
            elif self.behind.get(peer, (-1, 0.0))[0] != step:
                self.behind[peer] = step, now

    def diagnosis(self, reason: str) -> str:
        """Name the ranks whose beat has stopped, or else those that are behind in steps."""
        time.sleep(min(self.period, 2.0))  # for a rank that was heard a moment ago
        reason = " ".join(reason.split())[:120]
        return (
            self.named(self.beats, 2.5 * self.period, "has been silent")
            or self.named(self.behind, 0, "is behind")
            or f"rank {self.rank} waited at step {self.step()} for a process that did not answer "
            f"({reason}); no rank is silent, so one hangs inside the same step. The last "
            "checkpoint is untouched: --resume continues from it."
        )

    def named(self, since: Mapping[int, tuple[Any, float]], seconds: float, what: str) -> str:
        """A sentence that names the ranks with an entry older than `seconds`; else ''."""
        now, names = time.monotonic(), []
        for rank, (_, when) in list(since.items()):  # the thread may change it
            if now - when > seconds:
                _, step, where = self.beats[rank][0].split("|", 2)
                names.append(f"rank {rank} ({where}) {what} since step {step}")
        if not names:
            return ""
        return (
            f"{'; '.join(names)}, and rank {self.rank} waits for it at step {self.step()}. "
            "The last checkpoint is untouched: --resume continues from it."
        )
