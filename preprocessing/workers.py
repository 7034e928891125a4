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
        is killed, to the same effect. The tasks that were running, which are few, are then tried
        again, one after the other, and the task whose process dies again fails. The rest continues
        in a new pool. So `function` may be called twice for a task.

        Yields:
            Index and result of each task, in order of completion; a `UserError` instead of the
            result where the task raised one or its process died twice.

        Raises:
            Exception: whatever else a task raised, such as `OSError` for a full disk.
        """
        waiting = deque(range(len(tasks)))
        while waiting:
            pending: dict[Future[T], int] = {}
            try:
                while waiting or pending:
                    while waiting and len(pending) < 2 * self.number:
                        self._pool = self._pool or _pool(self.number)
                        future = self._pool.submit(function, *tasks[waiting[0]])
                        pending[future] = waiting.popleft()
                    done = wait(pending, PATIENCE_S, return_when=FIRST_COMPLETED).done
                    if not done:
                        _end_processes()  # wakes the next wait
                    for future in done:
                        result = _result(future)  # raises while the task still counts as pending
                        yield pending.pop(future), result
            except BrokenProcessPool:
                self._end()
            for index in pending.values():
                yield index, _again(function, tasks[index])

    def _end(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def _again(function: Callable[..., T], task: tuple[Any, ...]) -> T | UserError:
    """The result of a task in a process of its own, after that of a first attempt has died."""
    problem = "died twice (perhaps out of memory)"
    with _pool(1) as pool:
        future = pool.submit(function, *task)
        if not wait([future], PATIENCE_S).done:
            problem = f"hung for {PATIENCE_S:.0f} s"
            _end_processes()
        try:
            return _result(future)
        except BrokenProcessPool:
            return UserError(f"the process that worked on it {problem}.")


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
