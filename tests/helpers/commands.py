"""The repository's commands as the tests give them, and what they leave."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
# Small enough to train in seconds: timm's own test network, and the lightest of the others.
ENCODER = "tu-test_resnet"
NETWORKS = {
    "unet": ["--encoder", ENCODER],
    "DeepLabV3": ["--backbone", "mobilenet_v3_large"],
    "fcn": ["--backbone", "resnet50"],
    "mask": ["--backbone", "resnet18", "--proposals", "40"],
}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
# Limits of time are for what hangs: many times what is needed, also beside other work.
PATIENCE = 240


def tiny(model: str | None = "unet", batch: int = 4, crop: int = 64) -> list[str]:
    """Options of a small training on random weights; without the network's own for None."""
    words = ["--weights-backbone", "none", "--device", "cpu", "-j", "0", "--print-freq", "1"]
    words += ["-b", str(batch), "--crop-size", str(crop)]
    return [*(NETWORKS[model] if model else ()), *words]


def training(data: Path, output: Path, *more: object, model: str = "unet") -> list[str]:
    """The words of a small training; `more` come last, and so win."""
    words = ["--data-path", data, "--output-dir", output, *tiny(model), *more]
    return list(map(str, words))


def run_script(
    *words: object, cwd: Path, launcher: tuple[str, ...] = ()
) -> subprocess.CompletedProcess:
    """Run a script of the repository as a user would, from the folder `cwd`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *launcher, *map(str, words)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def losses(folder: Path) -> list[float]:
    """Those of a run's log lines."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def wait_for(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it did not happen"
        time.sleep(0.005)
