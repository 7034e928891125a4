"""Runs a function in its own process, where it may die, hang or use too much memory safely."""

import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import cv2
from torture.children import PATIENCE

cv2.setNumThreads(0)  # its threads would not survive the fork
_inside = False


def contained(function: Callable[[], str], seconds: int = 10, mebibytes: int = 200) -> str:
    """Returns what `function` returns, a word; after a leading `!` it says what is wrong.

    Raises:
        AssertionError: it returned `!…`, raised, died, computed for longer than `seconds`, waited
            for longer than `PATIENCE`, or needed more than `mebibytes` in addition to this
            process's memory.
    """
    global _inside
    if _inside:
        words = function()
        assert not words.startswith("!"), words[1:]
        return words
    before = _resident()
    ready, answer = os.pipe()
    child = os.fork()
    if child == 0:
        _inside = True
        # Neither signal is handled: it ends the process. Other processes do not use up its time.
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        signal.alarm(PATIENCE)
        try:
            words = function()
        except BaseException:
            words = "!" + traceback.format_exc(limit=-3)
        os.write(answer, words.encode(errors="replace")[-4000:])
        sys.stderr.flush()
        os._exit(0)
    os.close(answer)
    with os.fdopen(ready, "rb") as pipe:
        words = pipe.read().decode(errors="replace")
    _, status, usage = os.wait4(child, 0)
    code = os.waitstatus_to_exitcode(status)
    limits = {-signal.SIGXCPU: f"computed for {seconds} s", -signal.SIGALRM: "hung"}
    assert code == 0, limits.get(code, f"died by {-code}")
    assert not words.startswith("!"), words[1:]
    grown = (usage.ru_maxrss >> 10) - before
    assert grown < mebibytes, f"took {grown} MiB"
    return words


def several(case: Callable[[int, Path], str], numbers: range, folder: Path) -> set[str]:
    """How some cases end, all in one such process: a fork takes longer than a case."""

    def run() -> str:
        return "\n".join({case(number, folder) for number in numbers})

    return set(contained(run, seconds=240).splitlines())


def hundred(case: Callable[[int, Path], str], number: int, folder: Path) -> str:
    """Run a hundred cases as one."""
    several(case, range(100 * number, 100 * number + 100), folder)
    return "hundred read or refused"


def _resident() -> int:
    """MiB that this process holds now; they count for a fork, too."""
    with open("/proc/self/statm") as file:  # noqa: PTH123
        return int(file.read().split()[1]) * resource.getpagesize() >> 20
