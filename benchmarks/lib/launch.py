"""Starts a cell's training as a user would type it, in its own process."""

import argparse
import importlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib.matrix import DEFAULT_MALLOC, Cell
from benchmarks.lib.models import MODELS
from benchmarks.lib.standins import narrow, use_cpu_graphs
from common import cli, loader
from common.distributed import die_with_parent
from common.run.report import read_log

ROOT = Path(__file__).resolve().parents[2]


def measured(
    cell: Cell,
    args: argparse.Namespace,
    script: Sequence[Any],
    options: Sequence[Any],
    timeout: float,
    cold: bool = False,
) -> dict[str, Any]:
    """Train a cell; its row of a results file, and the lines of `log.jsonl` as `log`.

    The row has the columns of the cell, all that the script wrote into `report.json` beside the
    log, and `error`, which is empty if the script succeeded.

    Args:
        script: Path in the repository, and what it takes before the arguments of train.py.
        options: Further arguments of train.py.
        timeout: Seconds after which the cell is ended.
        cold: Whether the compiler's cache is an empty one, not that of earlier such cells.
    """
    began = time.monotonic()
    backbone, crop = _backbone(cell, args), cell.crop or args.crop_size
    row: dict[str, Any] = {"model": cell.model, "technique": cell.technique, "crop": crop}
    row |= {"flags": " ".join(cell.flags), "world": cell.world, "batch": cell.batch}
    row |= {"threads": cell.threads, "backbone": backbone}
    with tempfile.TemporaryDirectory() as folder:
        name = f"{cell.name.replace(' ', '-')}-{backbone}-{crop}-{cell.batch}".replace("/", "-")
        cache = Path(folder, "compiled") if cold else args.cache / name
        row["cache"] = "warm" if cache.is_dir() else "cold"
        output = Path(folder, "run")
        command = [*script, *train_arguments(cell, args, output), *options]
        row["error"] = run(cell, list(map(str, command)), cache, timeout, args.dry_run)
        if (output / "report.json").is_file():
            row |= json.loads((output / "report.json").read_text())
        row["log"] = read_log(output / "log.jsonl")
    when = time.strftime("%Y-%m-%dT%H:%M:%S")
    return row | {"wall_s": time.monotonic() - began, "when": when}


def train_arguments(cell: Cell, args: argparse.Namespace, output_dir: Path) -> list[str]:
    """The arguments of train.py."""
    arguments: list[Any] = [MODELS[cell.model].option, _backbone(cell, args)]
    arguments += ["--weights-backbone", "none", "--device", args.device]
    arguments += ["--data-path", args.data_path, "--output-dir", output_dir]
    arguments += ["--crop-size", cell.crop or args.crop_size]
    arguments += ["-b", cell.batch, "-j", args.workers, *cell.flags]
    return list(map(str, arguments))


def run(cell: Cell, command: list[str], cache: Path, timeout: float, dry: bool = False) -> str:
    """Run a script of the repository for a cell; returns what went wrong, or ''.

    A process that has imported all models forks a child for each cell. So a cell does not wait for
    the imports, and starts without a model, a compiled code, a CUDA context or a heap of another
    cell. Under DDP the child becomes torchrun, which starts new processes.

    Args:
        command: The script, relative to the repository, and its arguments.
        cache: Folder of the compiler's cache.
        timeout: Seconds after which the cell is ended.
        dry: With narrow networks and a stand-in for CUDA graphs.
    """
    environment = {"OMP_NUM_THREADS": str(cell.threads), "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    with tempfile.NamedTemporaryFile("r") as output:
        given = (cell, command, environment, output.name, dry)
        child = _server().Process(target=_forked, args=given)
        child.start()
        try:
            child.join(timeout)
            code = child.exitcode
        finally:
            _end(child)
        if code is None:
            return f"stopped after {timeout:.0f} s"
        return _reason(output.read()) if code else ""


def _server() -> Any:
    """The context of the process that forks: it has imported what a cell needs, and does nothing.

    It must not touch CUDA, which does not survive a fork: asking whether there is a GPU goes to the
    driver's management library instead.
    """
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    path = os.environ.get("PYTHONPATH", "")
    if str(ROOT) not in path.split(os.pathsep):  # before 3.12 the process ignores our sys.path
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [path])])
    context = multiprocessing.get_context("forkserver")
    trains = [f"{model}.train" for model in MODELS]
    context.set_forkserver_preload([*trains, "benchmarks.lib.timed_train", "benchmarks.run"])
    return context


def start_server() -> None:
    """Wait until it has imported everything, so that no cell is timed meanwhile."""
    child = _server().Process(target=int)
    child.start()
    child.join()


def _forked(
    cell: Cell, command: list[str], environment: dict[str, str], output: str, dry: bool
) -> None:
    """What a child does: become the script, or torchrun, and write into `output`."""
    die_with_parent()
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), stream)
    os.environ.update(environment)
    if cell.world > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={cell.world}"]
        script = str(ROOT / command[0])
        os.execv(sys.executable, [sys.executable, *launcher, script, *command[1:]])
    torch.set_num_threads(cell.threads)
    if DEFAULT_MALLOC in cell.technique.split("+"):
        cli.keep_freed_memory = lambda: None
    if dry:
        rehearse()
    sys.argv = list(command)
    module = importlib.import_module(command[0].removesuffix(".py").replace("/", "."))
    loader.START = "forkserver"  # the one that this process is from, which has imported everything
    try:
        cli.run(module.main)
    finally:
        loader.end_loaders()  # they ignore SIGTERM, so that multiprocessing would wait for ever


def rehearse() -> None:
    """For a dry run, until the process ends: narrow networks, graphs that replay on the CPU."""
    narrow()
    use_cpu_graphs()
    for name, model in MODELS.items():
        smallest = model.smallest or model.light
        MODELS[name] = replace(model, light=smallest, light_flags=model.smallest_flags)


def _end(child: Any) -> None:
    """Stop a process if it still runs; torchrun then ends its own processes."""
    if child.is_alive():
        child.terminate()
        child.join(20)
    if child.is_alive():
        child.kill()
        child.join(20)


def _backbone(cell: Cell, args: argparse.Namespace) -> str:
    model = MODELS[cell.model]
    return args.backbone or (model.light if args.device == "cpu" else model.backbone)


def _reason(output: str) -> str:
    """The most useful line: our error sentence, or the exception's."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith("error: ") or "Error: " in line]
    return (telling or lines or ["ended without output"])[0 if telling else -1][:300]
