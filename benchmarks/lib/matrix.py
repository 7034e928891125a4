"""What is measured: every model under every combination of techniques that the machine allows."""

import shutil
import sys
from dataclasses import dataclass
from itertools import combinations

import torch

from benchmarks.lib.models import MODELS
from benchmarks.lib.techniques import DEFAULT_MALLOC, FIRST, FLAGS, PLAIN
from common import graphs
from common.cli import UserError
from common.run.machine import cores


@dataclass(frozen=True)
class Cell:
    """One model under one technique."""

    model: str
    technique: str
    flags: tuple[str, ...]
    world: int
    batch: int  # tiles per process
    threads: int  # of each process
    crop: int = 0  # pixels; 0 for that of all cells

    @property
    def name(self) -> str:
        return f"{self.model} {self.technique}"


def plan(
    models: list[str],
    wanted: list[str],
    extra: dict[str, str],
    device: torch.device,
    batch: int,
    without_compile: bool = False,
    dry: bool = False,
) -> tuple[list[Cell], list[str]]:
    """The cells to measure, the most wanted techniques first, and what is left out and why.

    Processes on GPUs have a GPU each and a batch of `batch` each. On a CPU they share the cores
    and the batch.

    Args:
        wanted: Names such as `plain` or `amp+channels-last`; nothing for all.
        extra: Further techniques: name → flags of train.py.
        dry: The first techniques only, on one device, on which CUDA graphs are replaced.

    Raises:
        UserError: A name is unknown, or a row of that name would not be true.
    """
    gpu = device.type == "cuda"
    world = torch.cuda.device_count() if gpu else 2
    cannot = _cannot(device, world, batch, without_compile, dry)
    all_of = [
        PLAIN,
        *("+".join(c) for n in range(1, len(FLAGS) + 1) for c in combinations(FLAGS, n)),
        DEFAULT_MALLOC,
    ]
    for name in extra.keys() & {PLAIN, *FLAGS, DEFAULT_MALLOC}:
        raise UserError(f"--also {name!r} is the name of another technique; choose another.")
    flags_of = {name: tuple(flags.split()) for name, flags in (FLAGS | extra).items()}
    flags_of[DEFAULT_MALLOC] = ()
    for name in wanted:
        named = {*name.split("+")}
        if named != {PLAIN} and not named <= flags_of.keys():
            known = ", ".join(flags_of)
            raise UserError(
                f"--techniques {name!r} is not known; give plain, or join any of {known} by a +."
            )
        if named >= {"ddp", DEFAULT_MALLOC}:
            raise UserError(
                f"--techniques {name!r}: processes of torchrun keep freed memory; leave out one."
            )
    asked = [_sorted(name) for name in wanted] or (FIRST if dry else all_of)
    asked += [
        beside
        for name in asked
        if "compile" in name.split("+")
        and "channels-last" not in name.split("+")
        and (beside := _sorted(f"{name}+channels-last")) not in asked
    ]
    chosen = {PLAIN: (), **{name: flags_of[name] for name in extra}}
    for name in sorted(asked, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST)):
        parts = name.split("+")
        if name not in chosen and not cannot.keys() & parts:
            chosen[name] = tuple(flag for part in parts for flag in flags_of[part])
    parts_of_cpu = 1 if gpu else world
    cells = []
    for name, flags in chosen.items():
        many = "ddp" in name.split("+")
        part = parts_of_cpu if many else 1
        # A dry run has one thread: on a busy machine two wait for each other most of the time.
        threads = 1 if dry else max(1, cores() // part)
        sizes = world if many else 1, batch // part, threads
        cells += [
            Cell(model, name, (*(() if gpu else MODELS[model].light_flags), *flags), *sizes)
            for model in models
        ]
    asked_for = {part for name in asked for part in name.split("+")}
    left_out = [f"{name}: {why}" for name, why in cannot.items() if name in asked_for]
    return cells, left_out


def _sorted(name: str) -> str:
    """The parts of a name, once each, in the order of `FLAGS`."""
    parts = dict.fromkeys(name.split("+"))
    return "+".join(sorted(parts, key=lambda part: [*FLAGS, part].index(part)))


def _cannot(
    device: torch.device, world: int, batch: int, without_compile: bool, dry: bool
) -> dict[str, str]:
    """Techniques that do not apply here, each with the reason."""
    cannot = {}
    if not (dry or graphs.available(device)):
        cannot["cuda-graphs"] = "there is no CUDA device"
    if without_compile:
        cannot["compile"] = "compiling takes a minute or more per cell; leave out --quick for it"
    elif device.type == "cpu" and not shutil.which("g++"):
        cannot["compile"] = "there is no C++ compiler"
    if device.type == "cuda" or sys.platform != "linux":
        cannot[DEFAULT_MALLOC] = "only glibc's malloc on a CPU is set otherwise"
    if dry:
        cannot["ddp"] = "a dry run has one device"
    elif device.type == "cuda" and world < 2:
        cannot["ddp"] = "there is one GPU"
    elif device.type == "cpu" and cores() < world:
        cannot["ddp"] = "there is one core, or OMP_NUM_THREADS is 1"
    elif device.type == "cpu" and batch < 2 * world:
        cannot["ddp"] = f"a batch of {batch} leaves each of {world} processes too few tiles"
    return cannot
