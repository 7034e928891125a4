"""Where and with what a figure was measured."""

import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.backends import cudnn

ROOT = Path(__file__).resolve().parents[2]


def provenance(script: str, argv: list[str] | None) -> dict[str, str]:
    """Columns that every results file has: cpu, torch, commit, command."""
    words = sys.argv[1:] if argv is None else argv
    return {
        "cpu": _cpu(),
        "torch": torch.__version__,
        "commit": _commit(),
        "command": shlex.join(["python", str(Path(script).resolve().relative_to(ROOT)), *words]),
    }


def hardware(device: torch.device) -> dict[str, Any]:
    """Columns that tell one machine's timings from another's."""
    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else "cpu",
        "driver": _smi(device, "driver_version") if gpu else "",
        "cores": cores(),
        "cudnn": cudnn.version() if gpu else "",
        "float32": cudnn.conv.fp32_precision if gpu else "ieee",  # type: ignore[attr-defined]
    }


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """How long a call takes, including its work on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    since = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - since


def cores() -> int:
    """Number of CPU cores that we may use: OMP_NUM_THREADS if it is set."""
    if os.environ.get("OMP_NUM_THREADS", "").isdecimal():
        return int(os.environ["OMP_NUM_THREADS"])
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def clock_mhz(device: torch.device) -> str:
    """Current clock of the GPU's multiprocessors, or of the first core; '' if unreadable."""
    if device.type == "cuda":
        return _smi(device, "clocks.sm").removesuffix(" MHz")
    return _cpuinfo("cpu MHz").partition(".")[0]


def _smi(device: torch.device, query: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    lines = done.stdout.splitlines()
    index = device.index or 0
    return lines[index].strip() if index < len(lines) else ""


def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not on Linux
        return ""
    return next((s.split(":")[1].strip() for s in lines if s.startswith(key)), "")


def _cpu() -> str:
    return _cpuinfo("model name") or platform.processor() or "unknown"


def _commit() -> str:
    """The checkout's commit; changed results files do not make it dirty."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    changed = git(
        "status", "--porcelain", "--", ".", ":!benchmarks/results", ":!tests/torture/results.csv"
    )
    return git("rev-parse", "--short", "HEAD") + ("+dirty" if changed else "")
