"""The state of a run between two steps: how it is saved, and restored bit-exactly."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from common.cli import UserError
from common.distributed import Process, gather, wait_for_all
from common.run import checkpoint_file, nonfinite
from common.run.average import MovingAverage, averaged
from common.run.log import Clock
from common.run.optimizer_state import numbers, of_the_form, restore_optimizer

T = TypeVar("T")
# What values of the wrong type or size raise where they are used.
ODD_VALUES = ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError
LATEST, PREVIOUS, BEST = "checkpoint.pth", "checkpoint.previous.pth", "model_best.pth"


@dataclass
class Run:
    """The state of a run between two steps: all that a checkpoint saves and `restore` loads.

    `model` is the bare module, so names have neither `module.` nor `_orig_mod.`. `args` are plain
    values that rebuild the model `model_name` for `classes`. `settings` must be equal for a
    bit-exact run, see `common.run.resume`. `seen` counts the tiles of the current epoch's global
    batches so far. It is the loader's whole state: the order of an epoch and the augmentation are
    functions of seed and epoch. `scored_at` is the step of the last validation. `average` is there
    with `--ema`. Nothing in a run draws from Python's or numpy's generators.
    """

    model_name: str
    classes: list[str]
    args: dict[str, Any]
    model: nn.Module
    optimizer: Optimizer
    lr_scheduler: LRScheduler
    scaler: GradScaler
    settings: dict[str, Any] = field(default_factory=dict)
    epoch: int = 0
    step: int = 0
    seen: int = 0
    best: float = -1.0
    scores: dict[str, float] = field(default_factory=dict)
    scored_at: int = 0
    tally: nonfinite.Tally = field(default_factory=nonfinite.Tally)
    clock: Clock = field(default_factory=Clock)
    average: MovingAverage | None = None

    def scored_model(self) -> nn.Module:
        """The bare model that is scored and used for prediction: with `--ema` the averaged one."""
        return self.average.averaged(self.model) if self.average else self.model

    def save(self, paths: Iterable[Path], process: Process) -> None:
        """Save into all `paths`, from rank 0; every process takes part and waits for the disk.

        Raises:
            UserError: A weight is not finite, or the disk is full; what is on disk is untouched.
        """
        nonfinite.repair(self.model, self.tally)
        nonfinite.check(self.model)
        own = _own(self.model, process.device) | {"tally": self.tally.sums.cpu()}
        ranks = {name: gather(process, value) for name, value in own.items()}
        if process.is_main:
            content = {
                "format": checkpoint_file.FORMATS[-1],
                "model_name": self.model_name,
                "classes": self.classes,
                "args": self.args,
                "settings": self.settings,
                "model": self.model.state_dict(),
                "ema": self.average.state_dict() if self.average else {},
                "optimizer": numbers(self.optimizer.state_dict()),
                "lr_scheduler": numbers(self.lr_scheduler.state_dict()),
                "scaler": self.scaler.state_dict(),
                "epoch": self.epoch,
                "step": self.step,
                "seen": self.seen,
                "best": self.best,
                "scores": self.scores,
                "scored_at": self.scored_at,
                "ranks": ranks,
                "software": {"torch": str(torch.__version__)},
            }
            for path in paths:
                # The previous latest one is kept, in case one of them is damaged.
                previous = path.with_name(PREVIOUS) if path.name == LATEST else None
                checkpoint_file.write(content, path, previous)
        # If another rank exited now, torchrun would kill rank 0 while it writes.
        wait_for_all(process)

    def restore(self, content: dict[str, Any], process: Process) -> None:
        """Continue from `content`, which `load` returned.

        Raises:
            UserError: It is of another model, or from a version that could not resume.
        """
        if content["format"] < checkpoint_file.FORMATS[-1]:
            raise UserError(
                "the checkpoint was written before runs could be resumed in the middle of an "
                "epoch; it can be scored and used for prediction, but not trained further."
            )
        _copy_weights(self.model, content["model"])
        try:
            # Earlier checkpoints were scored at the end of an epoch, where `seen` is 0.
            scored_at = content.get("scored_at", 0 if content["seen"] else content["step"])
            counts = [content[name] for name in ("epoch", "step", "seen")] + [scored_at]
            if not all(type(count) is int and 0 <= count < 2**53 for count in counts):
                raise ValueError("its epoch, step or position in the epoch is invalid")
            if not -1 <= content["best"] <= 1 or not isinstance(content["scores"], dict):
                raise ValueError("its scores are invalid")
            restore_optimizer(self.optimizer, content["optimizer"])
            schedule = numbers(self.lr_scheduler.state_dict())
            self.lr_scheduler.load_state_dict(of_the_form(content["lr_scheduler"], schedule))
            if self.scaler.is_enabled() and content["scaler"]:  # switching --amp is allowed
                self.scaler.load_state_dict(content["scaler"])
            if self.average:  # --ema may begin in the middle of a run
                self.average.load_state_dict(content.get("ema", {}))
            self.epoch, self.step, self.seen, self.scored_at = counts
            self.best, self.scores = float(content["best"]), content["scores"]
            ranks = content["ranks"]
            if len(ranks["rng"]) == process.world_size:
                _set_own(self.model, process, {k: v[process.rank] for k, v in ranks.items()})
                self.tally.restore(ranks["tally"][process.rank])
        except ODD_VALUES as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"the checkpoint does not fit this run: {reason}") from error


def _own(model: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """What only this process has: its generators, and its BatchNorm statistics in an epoch."""
    cuda = device.type == "cuda"
    return {
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state(device) if cuda else torch.empty(0, dtype=torch.uint8),
        "buffers": torch.cat([torch.empty(0), *(b.cpu().flatten() for b in _floats(model))]),
    }


def _set_own(model: nn.Module, process: Process, saved: dict[str, Tensor]) -> None:
    torch.set_rng_state(saved["rng"])
    if process.device.type == "cuda" and saved["cuda_rng"].numel():
        torch.cuda.set_rng_state(saved["cuda_rng"], process.device)
    buffers = _floats(model)
    values = saved["buffers"].split([buffer.numel() for buffer in buffers])
    for buffer, value in zip(buffers, values, strict=True):
        buffer.copy_(value.view(buffer.shape))


def _floats(model: nn.Module) -> list[Tensor]:
    return [buffer for buffer in model.buffers() if buffer.is_floating_point()]


def load(path: Path, model_name: str | None = None) -> dict[str, Any]:
    """Read a checkpoint onto the CPU and check that it is whole and of the right model.

    Raises:
        UserError: Missing, damaged, not one of ours, or of another model than `model_name`.
    """
    content = checkpoint_file.read(path)
    if model_name:
        checkpoint_file.check_model(content, path, model_name)
    return content


def rebuild(content: dict[str, Any], from_checkpoint: Callable[[dict[str, Any]], T]) -> T:
    """The model that `content` describes; an untrusted file may not describe one.

    Raises:
        UserError: The model cannot be built, or the weights do not fit it.
    """
    try:
        args = content["args"]
        if not all(value.isprintable() for value in args.values() if isinstance(value, str)):
            raise ValueError("an option holds control characters")
        return from_checkpoint(content)
    except ODD_VALUES as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the checkpoint's model cannot be built: {reason}") from error


def load_weights(model: nn.Module, content: dict[str, Any]) -> None:
    """Copy the weights of a checkpoint, averaged if it was written with `--ema`, into `model`.

    Raises:
        UserError: They are of another model. `model` is unchanged.
    """
    _copy_weights(model, averaged(content))


def start_from(
    model: nn.Module, content: dict[str, Any], classes: list[str], args: dict[str, Any]
) -> list[str]:
    """Copy the weights of a checkpoint of the same network, perhaps for other classes.

    Args:
        content: What `load` returned.
        classes: Of `model`, with the ground.
        args: The options with which `model` was built.

    Returns:
        Names of the weights that stay as they are: a layer for each class, of another number.

    Raises:
        UserError: It is another network.
    """
    own, saved = model.state_dict(), rebuild(content, averaged)
    counts = len(classes), len(content["classes"])
    new = [
        name
        for name, weight in own.items()
        if isinstance(saved.get(name), Tensor)
        and weight.shape != saved[name].shape
        and _for_each_class(weight, counts[0]) == _for_each_class(saved[name], counts[1])
    ]
    try:
        _copy_weights(model, saved | {name: own[name] for name in new})
    except UserError as error:
        options = ("encoder", "backbone", "decoder_channels", "norm")
        given = {k: v for k, v in content["args"].items() if k in options and v != args.get(k)}
        named = " ".join(f"--{k.replace('_', '-')} {v!s:.60}" for k, v in given.items())
        remedy = f" It was trained with {named}; give the same." if given else ""
        raise UserError(f"--init-from: {error}{remedy}") from None
    return new


def _for_each_class(weight: Tensor, count: int) -> tuple[int, ...]:
    """The shape for a single class; the shape itself if it does not depend on the classes."""
    rows, *rest = weight.shape or (1,)
    return (rows // count, *rest) if count and rows % count == 0 else tuple(weight.shape)


def _copy_weights(model: nn.Module, saved: dict[str, Tensor]) -> None:
    own = model.state_dict()
    for name in own.keys() | saved.keys():
        here, there = (_form(weights.get(name)) for weights in (own, saved))
        if here != there:
            raise UserError(
                f"the checkpoint's weights do not fit this model: {str(name)[:80]!r} is {there} "
                f"in the checkpoint and {here} in the model."
            )
    model.load_state_dict(saved)


def _form(value: Any) -> str:
    if not isinstance(value, Tensor):
        return "missing" if value is None else type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
