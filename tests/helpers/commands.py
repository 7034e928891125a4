"""Runs the repository's commands for the tests, and reads what they wrote."""

import json
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from torture import children

from benchmarks.lib.models import MODELS

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
ENCODER = "tu-test_resnet"  # timm's own test network
NETWORKS = {name: model.tiny for name, model in MODELS.items()}  # trained in seconds
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
PATIENCE = children.PATIENCE


def training(data: Path, output: Path, *more: object, model: str = "unet") -> list[str]:
    """The arguments of a small training on random weights; those in `more` override the others."""
    words = ["--data-path", data, "--output-dir", output, *NETWORKS[model], "--print-freq", 1]
    words += ["--weights-backbone", "none", "--device", "cpu", "-j", 0, "-b", 4, "--crop-size", 64]
    return list(map(str, [*words, *more]))


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


def run_forked(script: Path, *words: object, cwd: Path) -> subprocess.CompletedProcess:
    """As `run_script`, from a process that has imported torch; a new process needs seconds for it.

    The repository's own modules are imported again, as the script itself would.
    """
    with TemporaryDirectory() as folder:
        said, errors = Path(folder) / "said", Path(folder) / "errors"
        code = children.end(
            children.start(partial(_as_main, script, list(map(str, words)), cwd, errors), said)
        )
        return subprocess.CompletedProcess(words, code, said.read_text(), errors.read_text())


def _as_main(script: Path, words: list[str], cwd: Path, errors: Path) -> None:
    import torch  # already imported; not every importer of this module needs it

    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        if Path(file).is_relative_to(ROOT) and "site-packages" not in file:
            del sys.modules[name]
    sys.path[:] = [str(script.parent), *(p for p in sys.path if not _is_ours(p))]
    sys.argv = [str(script), *words]
    os.chdir(cwd)
    torch.set_num_threads(1)
    runpy.run_path(str(script), run_name="__main__")


def _is_ours(folder: str) -> bool:
    return folder in ("", str(ROOT), str(ROOT / "tests"))


def losses(folder: Path) -> list[float]:
    """The losses in the log lines of a run."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def wait_for(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it did not happen"
        time.sleep(0.005)
