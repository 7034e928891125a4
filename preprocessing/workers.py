"""Runs a function over many items in processes; a process that dies does not end the run."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import cv2

from common.cli import UserError

T = TypeVar("T")

PATIENCE_S = 600.0
"""Processes are killed when no task ends for so long. A scene takes seconds, a lost network disk
never returns."""


class Workers:
    """Processes that call functions; if one dies, a single task fails."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def outcomes(
        self, function: Callable[..., T], tasks: list[tuple[Any, ...]]
    ) -> Iterator[tuple[int, T | UserError]]:
        """Call `function(*task)` for every task.

        A worker that dies (killed for memory, a crash in a codec) breaks the pool; one that hangs
        is killed, to the same effect. The tasks that were running are then tried again, one after
        the other, and the task whose process dies again fails. The rest continues in a new pool.
        So `function` may be called twice for a task. Only a few tasks run at a time, so only a few
        are tried again.

        Yields:
            Index and result of each task, in order of completion; a `UserError` instead of the
            result where the task raised one or its process died twice.

        Raises:
            Exception: whatever else a task raised, such as `OSError` for a full disk.
        """
        waiting, again = deque(range(len(tasks))), deque[int]()
        while waiting or again:
            alone = bool(again)
            queue, number = (again, 1) if alone else (waiting, self.number)
            pending: dict[Future[T], int] = {}
            what = "died twice (perhaps out of memory)"
            try:
                while queue or pending:
                    while queue and len(pending) < (1 if alone else 2 * number):
                        self._pool = self._pool or _pool(number)
                        future = self._pool.submit(function, *tasks[queue[0]])
                        pending[future] = queue.popleft()
                    done = wait(pending, PATIENCE_S, return_when=FIRST_COMPLETED).done
                    if not done:
                        what = f"hung for {PATIENCE_S:.0f} s"
                        _end_processes()  # wakes the next wait
                    for future in done:
                        result = _result(future)  # raises while the task still counts as pending
                        yield pending.pop(future), result
            except BrokenProcessPool:
                self._end()
            if not alone:
                again.extend(pending.values())
                continue
            self._end()
            for index in pending.values():
                yield index, UserError(f"the process that worked on it {what}.")

    def _end(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def _result(future: Future[T]) -> T | UserError:
    try:
        return future.result()
    except UserError as error:
        return error
    except MemoryError:
        return UserError("there was not enough memory for it; try fewer processes with -n.")


def _end_processes() -> None:
    for process in multiprocessing.active_children():
        process.kill()


def _pool(workers: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("forkserver")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare)


def _prepare() -> None:
    cv2.setNumThreads(0)  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    """End when the parent ends: otherwise workers of a killed parent would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
