"""Starts a cell's training as a user would type it, in its own process."""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.lib.matrix import Cell
from benchmarks.lib.models import MODELS


def columns(cell: Cell, args: argparse.Namespace) -> dict[str, Any]:
    """The columns of a row that describe the cell."""
    row: dict[str, Any] = {"model": cell.model, "technique": cell.technique}
    row |= {"flags": " ".join(cell.flags), "world": cell.world, "batch": cell.batch}
    return row | {"threads": cell.threads, "backbone": _backbone(cell, args)}


def train_words(cell: Cell, args: argparse.Namespace, output_dir: str) -> list[str]:
    """The arguments of train.py."""
    return [
        *(MODELS[cell.model].option, _backbone(cell, args)),
        *("--weights-backbone", "none", "--device", args.device),
        *("--data-path", str(args.data_path), "--output-dir", output_dir),
        *("--crop-size", str(args.crop_size), "-b", str(cell.batch), "-j", str(args.workers)),
        *cell.flags,
    ]


def cache_name(cell: Cell, args: argparse.Namespace) -> str:
    """Cells with the same name compile the same code."""
    name = f"{cell.name.replace(' ', '-')}-{_backbone(cell, args)}-{args.crop_size}-{cell.batch}"
    return name.replace("/", "-")


def run(cell: Cell, words: list[str], cache: Path, timeout: float) -> str:
    """Run a script of the repository, under torchrun for DDP; returns what went wrong, or ''."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={cell.world}"]
    words = [sys.executable, *(launcher if cell.world > 1 else []), *words]
    environment = os.environ | {"OMP_NUM_THREADS": str(cell.threads)}
    environment |= {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(words, env=environment, stdout=output, stderr=output)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            return f"stopped after {timeout:.0f} s"
        finally:
            _end(process)
        output.seek(0)
        return _reason(output.read()) if code else ""


def _backbone(cell: Cell, args: argparse.Namespace) -> str:
    model = MODELS[cell.model]
    return args.backbone or (model.light if args.device == "cpu" else model.backbone)


def _end(process: subprocess.Popen) -> None:
    """Stop the process if it still runs; torchrun then ends its own processes."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _reason(output: str) -> str:
    """The most useful line: our error sentence, or the exception's."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith("error: ") or "Error: " in line]
    return (telling or lines or ["ended without output"])[0 if telling else -1][:300]
