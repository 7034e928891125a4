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
from common.run.log import Clock

T = TypeVar("T")
LATEST, PREVIOUS, BEST = "checkpoint.pth", "checkpoint.previous.pth", "model_best.pth"


@dataclass
class Run:
    """The state of a run between two steps: all that a checkpoint saves and `restore` loads.

    `model` is the bare module, so names have neither `module.` nor `_orig_mod.`. `args` are plain
    values that rebuild the model `model_name` for `classes`. `settings` must be equal for a
    bit-exact run, see `common.run.resume`. `seen` counts the tiles of the current epoch's global
    batches so far. It is the loader's whole state: the order of an epoch and the augmentation are
    functions of seed and epoch. `scored_at` is the step of the last validation. Nothing in a run
    draws from Python's or numpy's generators.
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
                "optimizer": _numbers(self.optimizer.state_dict()),
                "lr_scheduler": _numbers(self.lr_scheduler.state_dict()),
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
        load_weights(self.model, content)
        try:
            # Earlier checkpoints were scored at the end of an epoch, where `seen` is 0.
            scored_at = content.get("scored_at", 0 if content["seen"] else content["step"])
            counts = [content[name] for name in ("epoch", "step", "seen")] + [scored_at]
            if not all(type(count) is int and 0 <= count < 2**53 for count in counts):
                raise ValueError("its epoch, step or position in the epoch is invalid")
            if not -1 <= content["best"] <= 1 or not isinstance(content["scores"], dict):
                raise ValueError("its scores are invalid")
            restore_optimizer(self.optimizer, content["optimizer"])
            schedule = _numbers(self.lr_scheduler.state_dict())
            self.lr_scheduler.load_state_dict(_of_the_form(content["lr_scheduler"], schedule))
            if self.scaler.is_enabled() and content["scaler"]:  # switching --amp is allowed
                self.scaler.load_state_dict(content["scaler"])
            self.epoch, self.step, self.seen, self.scored_at = counts
            self.best, self.scores = float(content["best"]), content["scores"]
            ranks = content["ranks"]
            if len(ranks["rng"]) == process.world_size:
                _set_own(self.model, process, {k: v[process.rank] for k, v in ranks.items()})
                self.tally.restore(ranks["tally"][process.rank])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
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


def _of_the_form(value: Any, form: Any) -> Any:
    """`value`, in its order, without keys that `form` does not have: another torch may have others.

    Raises:
        TypeError: A value is of another type than its counterpart in `form`.
    """
    if isinstance(form, dict) and isinstance(value, dict):
        return {k: _of_the_form(v, form[k]) for k, v in value.items() if k in form}
    if isinstance(form, list | tuple) and isinstance(value, list | tuple):
        return type(form)(_of_the_form(v, f) for v, f in zip(value, form, strict=True))
    kind = (int, float) if isinstance(form, int | float) else type(form)
    if not isinstance(value, kind):
        raise TypeError(f"it has a {type(value).__name__} instead of a {type(form).__name__}")
    return value


def restore_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load `state`, saved on any device and with any speed-ups.

    How the optimizer computes (`fused`, `capturable`, the learning rate as a number or as the
    tensor that a CUDA graph reads, the memory layout) stays as this run has it.

    Raises:
        TypeError, ValueError: It is the state of other parameters, or invalid.
    """
    how = ("fused", "foreach", "capturable")
    kept = [{k: v for k, v in group.items() if k in how} for group in optimizer.param_groups]
    rates = [group["lr"] for group in optimizer.param_groups]
    form = _numbers(optimizer.state_dict()["param_groups"])
    saved = _of_the_form(_numbers(state["param_groups"]), form)
    groups = [group | own for group, own in zip(saved, kept, strict=True)]
    optimizer.load_state_dict(state | {"param_groups": groups})
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(rate, Tensor):
            group["lr"] = rate.fill_(group["lr"])
    # A fused optimizer reads parameter, gradient and state in memory order. State with the other
    # layout would be applied to the wrong weights on a CPU, and is refused on a GPU.
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            if value.shape == parameter.shape:
                values[key] = torch.empty_like(parameter).copy_(value)
            elif value.ndim:
                raise ValueError(f"{key} {list(value.shape)} for a weight {list(parameter.shape)}")


def _numbers(value: Any) -> Any:
    """Turn scalar tensors in the hyperparameters into numbers: a CUDA graph's rate is a tensor."""
    if isinstance(value, dict):
        return {k: v if k == "state" else _numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    return value.item() if isinstance(value, Tensor) and value.ndim == 0 else value


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
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the checkpoint's model cannot be built: {reason}") from error


def load_weights(model: nn.Module, content: dict[str, Any]) -> None:
    """Copy the weights of a checkpoint into `model`, once all of them are known to fit.

    Raises:
        UserError: They are of another model.
    """
    saved, own = content["model"], model.state_dict()
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
