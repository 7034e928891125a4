"""Runs preprocess.py in a separate process that can be killed at a chosen moment."""

import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from helpers.commands import PATIENCE, ROOT, wait_for
from torture.children import alive

COMMAND = [sys.executable, str(ROOT / "preprocessing" / "preprocess.py")]


def command(*args, cwd=None):
    return subprocess.run(
        [*COMMAND, *map(str, args)], capture_output=True, text=True, timeout=PATIENCE, cwd=cwd
    )


def children(pid):
    """Pool workers of the command `pid`: what its fork server has forked."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text().rsplit(")", 1)[1].split()
            if b"forkserver" in (stat.parent / "cmdline").read_bytes():
                parents[int(stat.parent.name)] = int(fields[1])
    return [worker for worker, server in parents.items() if parents.get(server) == pid]


def start_and_wait(args, stage, pattern, count):
    """Start the command, and return when `count` files of a kind are staged (or it has ended)."""
    process = subprocess.Popen(
        [*COMMAND, *map(str, args)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for(lambda: len(list(stage.glob(pattern))) >= count or process.poll() is not None)
    return process


def kill(process):
    """Kill only the command; its workers must end by themselves."""
    workers = children(process.pid)
    process.kill()
    process.wait()
    wait_for(lambda: not any(map(alive, workers)))
