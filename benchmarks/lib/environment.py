"""Where and with what a figure was measured."""

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch.backends import cudnn

from common.run.machine import ROOT, commit, cores, cpu, cpuinfo


def provenance(script: str, argv: list[str] | None) -> dict[str, str]:
    """Columns that every results file has: cpu, torch, commit, command."""
    arguments = sys.argv[1:] if argv is None else argv
    return {
        "cpu": cpu(),
        "torch": torch.__version__,
        "commit": commit(),
        "command": shlex.join(
            ["python", str(Path(script).resolve().relative_to(ROOT)), *arguments]
        ),
    }


def measured_on(row: dict[str, str]) -> str:
    """The columns of `provenance` as a sentence, for the line above a table."""
    return f"{row['cpu']}, torch {row['torch']}, commit {row['commit']}, `{row['command']}`."


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


def clock_mhz(device: torch.device) -> str:
    """Current clock of the GPU's multiprocessors, or of the first core; '' if unreadable."""
    if device.type == "cuda":
        return _smi(device, "clocks.sm").removesuffix(" MHz")
    return cpuinfo("cpu MHz").partition(".")[0]


def _smi(device: torch.device, query: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    lines = done.stdout.splitlines()
    index = device.index or 0
    return lines[index].strip() if index < len(lines) else ""
