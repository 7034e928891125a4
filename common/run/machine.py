"""Where a run takes place: the processor, the commit, the versions, the memory."""

import importlib.metadata
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "torchvision", "segmentation-models-pytorch", "numpy")


def facts(device: torch.device) -> dict[str, Any]:
    """The machine, the checkout, the versions and the command, as plain values."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return {
        "command": command(),
        "commit": commit(),
        "machine": {"cpu": cpu(), "cores": cores()} | ({"gpu": gpu} if gpu else {}),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
            "torch": str(torch.__version__),  # with the CUDA release it is built for
        },
    }


def now() -> str:
    """Date and time of day, for a person."""
    return time.strftime("%Y-%m-%d %H:%M %Z")


def command() -> str:
    """The command of this process, to be typed in the checkout."""
    script = Path(sys.argv[0]).resolve()
    inside = script.is_relative_to(ROOT)
    words = [str(script.relative_to(ROOT) if inside else sys.argv[0]), *sys.argv[1:]]
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return shlex.join(["python", *words])
    hosts = os.environ.get("GROUP_WORLD_SIZE", "1")
    launcher = ["torchrun"] + ([f"--nnodes={hosts}"] if hosts != "1" else [])
    each = os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])
    return shlex.join([*launcher, f"--nproc-per-node={each}", *words])


def cpu() -> str:
    """The processor's name, and its instructions where they end at AVX2.

    Cloud machines with and without AVX-512 have the same name, "AMD EPYC".
    """
    name = cpuinfo("model name") or platform.processor() or "unknown"
    if limit := os.environ.get("ONEDNN_MAX_CPU_ISA"):
        return f"{name} limited to {limit}"
    return f"{name} with AVX2" if torch.backends.cpu.get_cpu_capability() == "AVX2" else name


def cpuinfo(key: str) -> str:
    """The first value of `key` in Linux's description of the processor; '' elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((s.split(":")[1].strip() for s in lines if s.startswith(key)), "")


def cores() -> int:
    """Number of CPU cores that we may use: OMP_NUM_THREADS if it is set."""
    if os.environ.get("OMP_NUM_THREADS", "").isdecimal():
        return int(os.environ["OMP_NUM_THREADS"])
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def commit() -> str:
    """The checkout's commit, '' without git; changed results files do not make it dirty."""
    results = (":!benchmarks/results", ":!tests/torture/results.csv")
    changed = _git("status", "--porcelain", "--", ".", *results)
    return _git("rev-parse", "--short", "HEAD") + ("+dirty" if changed else "")


def _git(*words: str) -> str:
    line = ["git", "-C", str(ROOT), *words]
    try:
        done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


class Timeline:
    """Moments on a device: CUDA events, which nobody waits for; on a CPU the time of day.

    A GPU computes behind the CPU's back. Only events tell how long it had nothing to do.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"

    def now(self) -> Any:
        """The moment when the device has done what it was given so far."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        """The time between two moments that are over."""
        return begin.elapsed_time(end) / 1e3 if self.on_gpu else end - begin


def peak_mib(device: torch.device) -> float:
    """Most memory so far, MiB: allocated on a GPU, resident of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
