"""Starts a cell's training as a user would type it, in its own process."""

import argparse
import importlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO, Any

import torch

from benchmarks.lib.matrix import DEFAULT_MALLOC, Cell
from benchmarks.lib.models import MODELS
from benchmarks.lib.standins import narrow, use_cpu_graphs
from common import cli, loader
from common.distributed import die_with_parent

ROOT = Path(__file__).resolve().parents[2]


def columns(cell: Cell, args: argparse.Namespace) -> dict[str, Any]:
    """The columns of a row that describe the cell."""
    row: dict[str, Any] = {"model": cell.model, "technique": cell.technique}
    row |= {"flags": " ".join(cell.flags), "world": cell.world, "batch": cell.batch}
    row |= {"crop": cell.crop or args.crop_size}
    return row | {"threads": cell.threads, "backbone": _backbone(cell, args)}


def train_arguments(cell: Cell, args: argparse.Namespace, output_dir: str) -> list[str]:
    """The arguments of train.py."""
    option = MODELS[cell.model].option
    arguments: list[Any] = [option, _backbone(cell, args), "--weights-backbone", "none"]
    arguments += ["--device", args.device, "--data-path", args.data_path]
    arguments += ["--output-dir", output_dir, "--crop-size", cell.crop or args.crop_size]
    arguments += ["-b", cell.batch, "-j", args.workers, *cell.flags]
    return list(map(str, arguments))


def cache_name(cell: Cell, args: argparse.Namespace) -> str:
    """Cells with the same name compile the same code."""
    name = f"{cell.name.replace(' ', '-')}-{_backbone(cell, args)}"
    name += f"-{cell.crop or args.crop_size}-{cell.batch}"
    return name.replace("/", "-")


def run(cell: Cell, command: list[str], cache: Path, timeout: float, dry: bool = False) -> str:
    """Run a script of the repository for a cell; returns what went wrong, or ''.

    A process that has imported all models forks a child for each cell. So a cell does not wait for
    the imports, and starts without a model, a compiled code, a CUDA context or a heap of another
    cell. Under DDP torchrun starts new processes.

    Args:
        command: The script, relative to the repository, and its arguments.
        cache: Folder of the compiler's cache.
        timeout: Seconds after which the cell is ended.
        dry: With narrow networks and a stand-in for CUDA graphs.
    """
    environment = {"OMP_NUM_THREADS": str(cell.threads), "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    with tempfile.NamedTemporaryFile("w+") as output:
        if cell.world > 1:
            code = _torchrun(cell.world, command, environment, output, timeout)
        else:
            malloc = cell.technique == DEFAULT_MALLOC
            child = _server().Process(
                target=_forked, args=(command, environment, output.name, malloc, dry)
            )
            child.start()
            code = _wait(child, timeout)
        if code is None:
            return f"stopped after {timeout:.0f} s"
        output.seek(0)
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
    command: list[str], environment: dict[str, str], output: str, malloc: bool, dry: bool
) -> None:
    """What a child does: become the script, and write into `output`."""
    die_with_parent()
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), stream)
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    if malloc:
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
    MODELS["unet"] = replace(MODELS["unet"], light="tu-test_resnet")
    MODELS["mask"] = replace(MODELS["mask"], light_flags=("--proposals", "20"))


def _torchrun(
    world: int, command: list[str], environment: dict[str, str], output: IO[str], timeout: float
) -> int | None:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    line = [sys.executable, *launcher, str(ROOT / command[0]), *command[1:]]
    process = subprocess.Popen(line, env=os.environ | environment, stdout=output, stderr=output)
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end(process, process.wait, lambda: process.poll() is None)


def _wait(child: BaseProcess, timeout: float) -> int | None:
    """The child's exit code; None if it had to be ended."""
    try:
        child.join(timeout)
        return child.exitcode
    finally:
        _end(child, child.join, child.is_alive)


def _end(process: Any, wait: Callable[[float], Any], alive: Callable[[], bool]) -> None:
    """Stop a process if it still runs; torchrun then ends its own processes."""
    if alive():
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            wait(20)
        if alive():
            process.kill()
            wait(20)


def _backbone(cell: Cell, args: argparse.Namespace) -> str:
    model = MODELS[cell.model]
    return args.backbone or (model.light if args.device == "cpu" else model.backbone)


def _reason(output: str) -> str:
    """The most useful line: our error sentence, or the exception's."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith("error: ") or "Error: " in line]
    return (telling or lines or ["ended without output"])[0 if telling else -1][:300]
