"""One checkpoint format: plain tensors, dicts, strings and numbers, written whole or not at all."""

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from common.cli import UserError


@dataclass
class Run:
    """What a run is, between two steps: all that a checkpoint saves and `restore` brings back.

    `model` is the bare module, so that names carry neither `module.` nor `_orig_mod.`. `args` are
    plain values and rebuild the model; `model_name` and `classes` say what it is.
    """

    model_name: str
    classes: list[str]
    args: dict[str, Any]
    model: nn.Module
    optimizer: Optimizer
    lr_scheduler: LRScheduler
    scaler: GradScaler
    epoch: int = 0
    step: int = 0
    best: float = -1.0
    scores: dict[str, float] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        content = {
            "format": 1,
            "model_name": self.model_name,
            "classes": self.classes,
            "args": self.args,
            "model": self.model.state_dict(),
            "optimizer": _numbers(self.optimizer.state_dict()),
            "lr_scheduler": _numbers(self.lr_scheduler.state_dict()),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "best": self.best,
            "scores": self.scores,
            "rng": torch.get_rng_state(),
            "software": {"torch": str(torch.__version__)},
        }
        content["sha256"] = digest(content)
        write(content, path)

    def restore(self, content: dict[str, Any]) -> None:
        """Continue from `content`, which `load` returned."""
        load_weights(self.model, content)
        restore_optimizer(self.optimizer, content["optimizer"])
        self.lr_scheduler.load_state_dict(content["lr_scheduler"])
        self.scaler.load_state_dict(content["scaler"])
        self.epoch, self.step = content["epoch"], content["step"]
        self.best, self.scores = content["best"], content["scores"]
        torch.set_rng_state(content["rng"])


def restore_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load `state`, whichever device and speed-ups it was saved under.

    How the optimizer computes (`fused`, `capturable`, the learning rate as a number or as the
    tensor a CUDA graph reads, the memory layout) stays as this run has it.
    """
    how = ("fused", "foreach", "capturable")
    mine = [{k: v for k, v in group.items() if k in how} for group in optimizer.param_groups]
    rates = [group["lr"] for group in optimizer.param_groups]
    groups = [saved | kept for saved, kept in zip(state["param_groups"], mine, strict=True)]
    optimizer.load_state_dict(state | {"param_groups": groups})
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(rate, Tensor):
            group["lr"] = rate.fill_(group["lr"])
    # A fused optimizer walks through parameter, gradient and state in step: the state of a run with
    # the other layout would meet the wrong weights on a CPU, and is refused on a GPU.
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            if value.shape == parameter.shape:
                values[key] = torch.empty_like(parameter).copy_(value)


def _numbers(value: Any) -> Any:
    """Scalars in the hyperparameters as numbers: a CUDA graph's learning rate is a tensor."""
    if isinstance(value, dict):
        return {k: v if k == "state" else _numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    return value.item() if isinstance(value, Tensor) and value.ndim == 0 else value


def write(content: dict[str, Any], path: Path) -> None:
    """Write beside `path`, flush to the disk, rename: whatever happens, `path` stays loadable."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except RuntimeError as error:
        # torch.save says "unexpected pos" when the disk is full, and nothing of the disk.
        raise UserError(
            f"'{path}' could not be written ({str(error).splitlines()[0]}): is the disk full? "
            "The previous checkpoint is untouched."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path, model_name: str | None = None) -> dict[str, Any]:
    """Read a checkpoint onto the CPU and check that it is whole and of the right model.

    Raises:
        UserError: Missing, damaged, not one of ours, or of another model than `model_name`.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint '{path}'; a training run writes checkpoint.pth.")
    try:
        # Explicit: TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD in the environment must not undo it.
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # its errors range from EOFError to KeyError(1785425525)
        raise UserError(
            f"'{path}' is damaged or no checkpoint of plain tensors ({type(error).__name__})."
        ) from error
    if not isinstance(content, dict) or content.get("format") != 1:
        raise UserError(f"'{path}' was not written by this repository's train.py.")
    stored = content.pop("sha256", None)
    if stored != digest(content):
        raise UserError(
            f"'{path}' has changed since it was written (its checksum is wrong); take another copy."
        )
    found = content["model_name"]
    if model_name and found != model_name:
        raise UserError(
            f"'{path}' holds a {found} model, and this is {model_name}; use `python "
            f"{found}/inference.py` or `python {found}/train.py` with it."
        )
    return content


def load_weights(model: nn.Module, content: dict[str, Any]) -> None:
    """Copy the weights of a checkpoint into `model`.

    Raises:
        UserError: They are not this model's.
    """
    try:
        model.load_state_dict(content["model"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the checkpoint's weights do not fit this model: {reason}") from error


def digest(content: Any) -> str:
    """SHA-256 over all keys, numbers and tensor bytes (0.5 s per 400 MB)."""
    sha = hashlib.sha256()

    def walk(value: Any) -> None:
        if isinstance(value, Tensor):
            plain = value.detach().cpu().contiguous()
            sha.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
            sha.update(plain.flatten().view(torch.uint8).numpy().data)
        elif isinstance(value, dict):
            for key, item in value.items():
                sha.update(f"{key!r}:".encode())
                walk(item)
        elif isinstance(value, list | tuple):
            sha.update(f"[{len(value)}".encode())
            for item in value:
                walk(item)
        else:
            sha.update(repr(value).encode())

    walk(content)
    return sha.hexdigest()
