"""Runs preprocess.py in a separate process that can be killed at a chosen moment."""

import subprocess
import sys
from pathlib import Path

from helpers.commands import PATIENCE, ROOT, wait_for
from torture.children import alive

COMMAND = [sys.executable, str(ROOT / "preprocessing" / "preprocess.py")]


def command(*args, cwd=None):
    return subprocess.run(
        [*COMMAND, *map(str, args)], capture_output=True, text=True, timeout=PATIENCE, cwd=cwd
    )


def children(pid):
    """Pool workers whose parent is `pid`."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
            cmdline = (stat.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if int(fields[1]) == pid and b"forkserver" in cmdline:
            found.append(int(stat.parent.name))
    return found


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
