"""Runs functions in child processes, forked from a server that has imported everything: 1 s each.

The server computes nothing itself: PyTorch refuses a backward pass in a process forked from one
that has had a backward pass, and a test process may have had any number of them.
"""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path

# Seconds. A limit of time is for what hangs: ten times what the slowest wait takes on two cores.
PATIENCE = 600
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["fcn.train", "DeepLabV3.train", "unet.train", "mask.train", "rareplanes.sample"]
)


def start(function: Callable[[], object], log: Path, **environment: object) -> ForkServerProcess:
    """Call `function`, which can be pickled, in a child that prints into `log`."""
    # The server takes its import path from the environment alone (until Python 3.14).
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    child = CONTEXT.Process(target=_run, args=(function, log, environment))
    child.start()
    return child


def _run(function: Callable[[], object], log: Path, environment: dict[str, object]) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = sys.stderr = os.fdopen(file, "w", buffering=1)
    os.environ.update({key: str(value) for key, value in environment.items()})
    function()


def start_ranks(function: Callable[[], object], logs: list[Path]) -> list[ForkServerProcess]:
    """As many processes as there are logs, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": len(logs), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [start(function, log, RANK=r, LOCAL_RANK=r, **world) for r, log in enumerate(logs)]


def end(child: ForkServerProcess, seconds: float = PATIENCE) -> int:
    """Wait for a child; returns its exit code, negative for a signal.

    Raises:
        AssertionError: it hung.
    """
    child.join(seconds)
    if child.exitcode is None:
        kill(child)
        raise AssertionError(f"it hung for {seconds:g} s")
    return child.exitcode


def kill(child: ForkServerProcess) -> None:
    child.kill()
    child.join()


def alive(process: int) -> bool:
    """Whether a process runs; False for a zombie."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
