"""Where and with what a figure was measured."""

import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def provenance(script: str, argv: list[str] | None) -> dict[str, str]:
    """Columns that every results file has: cpu, torch, commit, command."""
    words = sys.argv[1:] if argv is None else argv
    return {
        "cpu": _cpu(),
        "torch": torch.__version__,
        "commit": _commit(),
        "command": shlex.join(["python", str(Path(script).resolve().relative_to(ROOT)), *words]),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not on Linux
        return platform.processor()
    return next((s.split(":")[1].strip() for s in lines if s.startswith("model name")), "unknown")


def _commit() -> str:
    """The checkout's commit; the results it holds do not make it dirty."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return git("rev-parse", "--short", "HEAD") + ("+dirty" if changed else "")
