"""Trainings that are killed at random moments end with an undisturbed run's bits."""

import importlib
import json
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torture import children

from benchmarks.lib.models import MODELS
from common.cli import run as run_main
from common.run import checkpoint, checkpoint_file
from preprocessing import preprocess
from rareplanes import sample

KILLS = 10  # in each run
COMMON = ["--device", "cpu", "-j", "0", "-b", "4", "--crop-size", "64", "--print-freq", "2"]
COMMON += ["--weights-backbone", "none", "--max-steps", "11", "--save-every", "2"]


def make_data(root: Path) -> None:
    """24 scenes of 384x256 in 128-pixel tiles."""
    sample.main(["-o", str(root), "-n", "24", "--seed", "1", "--size", "384", "256"])
    preprocess.main([str(root), "-s", "128", "-n", "1"])


def arguments(model: str, data: Path, output: Path, *more: str) -> list[str]:
    """What a user would type after `train.py`, to start a training and to restart it."""
    given = ["--data-path", str(data), "--output-dir", str(output), *COMMON, *MODELS[model].tiny]
    return [*given, "--resume", *more]


def command(model: str, data: Path, output: Path, *more: str) -> Callable[[], None]:
    return partial(run, f"{model}.train", arguments(model, data, output, *more))


def run(script: str, words: list[str]) -> None:
    torch.set_num_threads(1)
    main = importlib.import_module(script).main
    run_main(lambda: main(words))


def outcome(folder: Path) -> tuple[list[tuple[int, str]], str]:
    """What must be equal: step and loss of each log line, and a checksum of the final state."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = [(line["step"], line["loss"].hex()) for line in lines if "loss" in line]
    end = checkpoint.load(folder / checkpoint.LATEST)
    return losses, checkpoint_file.digest(
        [end[k] for k in ("model", "ema", "optimizer", "step", "best", "ranks")]
    )


def killed_run(number: int, folder: Path, kills: int = KILLS, data: Path | None = None) -> str:
    """Train, kill -9 and resume, ten times; compare with a run that was not killed."""
    model = list(MODELS)[number % len(MODELS)]
    if data is None:
        data = folder / "data"
        if not data.exists():
            made = children.start(partial(make_data, data), folder / "data.log")
            assert children.end(made) == 0, (folder / "data.log").read_text()
    whole, cut, log = folder / f"{model}-whole", folder / f"cut-{number}", folder / f"{number}.log"
    begun = time.monotonic()
    if not whole.exists():
        code = children.end(children.start(command(model, data, whole), log))
        assert code == 0, log.read_text()[-300:]
        (folder / f"{model}-seconds").write_text(str(time.monotonic() - begun))
    usual = float((folder / f"{model}-seconds").read_text())
    rng = random.Random(number)
    step = 0
    for _ in range(kills):
        child = children.start(command(model, data, cut), log)
        time.sleep(rng.uniform(0.05, 0.9) * usual)
        children.kill(child)
        if (cut / checkpoint.LATEST).exists():
            saved = checkpoint.load(cut / checkpoint.LATEST)["step"]
            assert saved >= step, f"step {step} was lost"
            step = saved
    code = children.end(children.start(command(model, data, cut), log))
    assert code == 0, log.read_text()[-300:]
    assert "Traceback" not in log.read_text(), log.read_text()[-300:]
    assert outcome(cut) == outcome(whole), f"{model}: not the undisturbed run"
    assert not list(cut.glob(".*.tmp")), "a temporary file was left"
    return f"{model} equal after {kills} kills"
