"""The state of a training between two steps: how it is saved, and restored to the bit."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from common.cli import UserError
from common.distributed import Process, gather
from common.run import checkpoint_file, nonfinite

T = TypeVar("T")
COUNTERS = ("epoch", "step", "seen", "best", "scores", "scored_at")
LATEST, PREVIOUS, BEST = "checkpoint.pth", "checkpoint.previous.pth", "model_best.pth"


@dataclass(kw_only=True)
class State:
    """The state of a training between two steps: all that a checkpoint saves and `restore` loads.

    `args` are the options as plain values; with `classes` they rebuild the model `name`. `settings`
    must be equal for a bit-exact run, see `common.run.resume`. `model` is the bare module, so names
    have neither `module.` nor `_orig_mod.`. `average` is there with `--ema`. `seen` counts the
    tiles of the current epoch's global batches so far. It is the loader's whole state: the order of
    an epoch and the augmentation are functions of seed and epoch. `scored_at` is the step of the
    last validation. Nothing in a training draws from Python's or numpy's generators.
    """

    name: str
    classes: list[str]
    args: dict[str, Any]
    settings: dict[str, Any]
    process: Process
    model: nn.Module = field(init=False)
    optimizer: Optimizer = field(init=False)
    lr_scheduler: LRScheduler = field(init=False)
    scaler: GradScaler = field(init=False)
    average: "MovingAverage | None" = field(init=False)
    epoch: int = 0
    step: int = 0
    seen: int = 0
    best: float = -math.inf
    scores: dict[str, float] = field(default_factory=dict)
    scored_at: int = 0
    tally: nonfinite.Tally = field(default_factory=nonfinite.Tally)

    def scored_model(self) -> nn.Module:
        """The bare model that is scored and used for prediction: with `--ema` the averaged one."""
        return self.average.averaged(self.model) if self.average else self.model

    def save(self, folder: Path, best: bool = False) -> None:
        """Save into `folder`, from rank 0; every process takes part and waits for the disk.

        Writes `LATEST` and keeps the one before it as `PREVIOUS`, in case one is damaged.

        Args:
            best: Also write `BEST`. It is written first, because `LATEST` records its score.

        Raises:
            UserError: A weight is not finite, or the disk is full; what is on disk is untouched.
        """
        nonfinite.repair(self.model, self.tally)
        nonfinite.check(self.model)
        of_rank = _of_this_rank(self.model, self.process.device) | {"tally": self.tally.sums.cpu()}
        ranks = {name: gather(self.process, value) for name, value in of_rank.items()}
        if self.process.is_main:
            content = {
                "format": checkpoint_file.FORMATS[-1],
                "model_name": self.name,
                "classes": self.classes,
                "args": self.args,
                "settings": self.settings,
                "model": self.model.state_dict(),
                "ema": self.average.state_dict() if self.average else {},
                "optimizer": _numbers(self.optimizer.state_dict()),
                "lr_scheduler": _numbers(self.lr_scheduler.state_dict()),
                "scaler": self.scaler.state_dict(),
                **{name: getattr(self, name) for name in COUNTERS},
                "ranks": ranks,
                "software": {"torch": str(torch.__version__)},
            }
            also = folder / BEST if best else None
            checkpoint_file.write(content, folder / LATEST, folder / PREVIOUS, also)
        # If another rank exited now, torchrun would kill rank 0 while it writes.
        gather(self.process, torch.zeros(1))

    def restore(self, content: dict[str, Any]) -> None:
        """Continue from `content`, which `load` returned.

        Raises:
            UserError: It is of another model, or from a version that could not resume.
        """
        if "optimizer" not in content:
            raise UserError("the checkpoint holds weights alone; start from it with --init-from.")
        if content["format"] < checkpoint_file.FORMATS[-1]:
            raise UserError(
                "the checkpoint was written before runs could be resumed in the middle of an "
                "epoch; it can be scored and used for prediction, but not trained further."
            )
        _copy_weights(self.model, content["model"])
        try:
            restore_optimizer(self.optimizer, content["optimizer"])
            known = self.lr_scheduler.state_dict()
            schedule = {k: v for k, v in _numbers(content["lr_scheduler"]).items() if k in known}
            self.lr_scheduler.load_state_dict(schedule)
            if self.scaler.is_enabled() and content["scaler"]:  # switching --amp is allowed
                self.scaler.load_state_dict(content["scaler"])
            if self.average:  # --ema may begin in the middle of a run
                self.average.load_state_dict(content.get("ema", {}))
            self.epoch, self.step, self.seen = (int(content[k]) for k in ("epoch", "step", "seen"))
            # Earlier checkpoints were scored at the end of an epoch, where `seen` is 0.
            self.scored_at = int(content.get("scored_at", 0 if self.seen else self.step))
            self.best, self.scores = float(content["best"]), dict(content["scores"])
            ranks = content["ranks"]
            if len(ranks["rng"]) == self.process.world_size:
                of_rank = {name: values[self.process.rank] for name, values in ranks.items()}
                _restore_rank(self.model, self.process, of_rank)
                self.tally.restore(of_rank["tally"])
        except Exception as error:  # whatever torch raises for the state of another network
            raise UserError(f"the checkpoint does not fit this run: {short(error)}") from error


def short(error: Exception) -> str:
    """The beginning of an error's text, on one line."""
    return " ".join(str(error).split())[:200]


def _of_this_rank(model: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """What only this process has: its generators, and its BatchNorm statistics in an epoch."""
    cuda = device.type == "cuda"
    return {
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state(device) if cuda else torch.empty(0, dtype=torch.uint8),
        "buffers": torch.cat([torch.empty(0), *(b.cpu().flatten() for b in _floats(model))]),
    }


def _restore_rank(model: nn.Module, process: Process, saved: dict[str, Tensor]) -> None:
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
    """What `from_checkpoint` makes of `content`.

    Raises:
        UserError: The model cannot be built, or the weights do not fit it.
    """
    try:
        return from_checkpoint(content)
    except UserError:
        raise
    except Exception as error:  # an untrusted file may describe a model that cannot exist
        raise UserError(f"the checkpoint's model cannot be built: {short(error)}") from error


def load_weights(model: nn.Module, content: dict[str, Any]) -> None:
    """Copy the weights of a checkpoint, averaged if it was written with `--ema`, into `model`.

    Raises:
        UserError: They are of another model. `model` is unchanged.
    """
    _copy_weights(model, averaged(content))


def start_from(
    model: nn.Module, content: dict[str, Any], classes: list[str], options: dict[str, Any]
) -> list[str]:
    """Copy the weights of a checkpoint of the same network, perhaps for other classes.

    Args:
        content: What `load` returned.
        classes: Of `model`, with the ground.
        options: Those with which `model` was built.

    Returns:
        Names of the weights that stay as they are: a layer for each class, of another number.

    Raises:
        UserError: It is another network.
    """
    built, saved = model.state_dict(), rebuild(content, averaged)
    counts = len(classes), len(content["classes"])
    new = [
        name
        for name, weight in built.items()
        if isinstance(saved.get(name), Tensor)
        and weight.shape != saved[name].shape
        and _for_each_class(weight, counts[0]) == _for_each_class(saved[name], counts[1])
    ]
    try:
        _copy_weights(model, saved | {name: built[name] for name in new})
    except UserError as error:
        texts = {k: repr(v) for k, v in content["args"].items()}  # of an untrusted file
        before = [k for k, v in options.items() if texts.get(k, repr(v)) != repr(v)]
        named = " ".join(f"--{k.replace('_', '-')} {texts[k]:.60}" for k in before)
        remedy = f" It was trained with {named}; give the same." if before else ""
        raise UserError(f"--init-from: {error}{remedy}") from None
    return new


def _for_each_class(weight: Tensor, count: int) -> tuple[int, ...]:
    """The shape for a single class; the shape itself if it does not depend on the classes."""
    rows, *rest = weight.shape or (1,)
    return (rows // count, *rest) if count and rows % count == 0 else tuple(weight.shape)


def _copy_weights(model: nn.Module, saved: dict[str, Tensor]) -> None:
    built = model.state_dict()
    for name in built.keys() | saved.keys():
        here, there = (_form(weights.get(name)) for weights in (built, saved))
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


def restore_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load `state`, saved on any device and with any speed-ups.

    How the optimizer computes (`fused`, `capturable`, the learning rate as a number or as the
    tensor that a CUDA graph reads, the memory layout) stays as this run has it. Keys that this
    release of torch does not know are left out.

    Raises:
        ValueError: It is the state of other parameters.
    """
    fixed = ("fused", "foreach", "capturable")  # how it computes, not what
    rates = [group["lr"] for group in optimizer.param_groups]
    now = optimizer.state_dict()["param_groups"]
    groups = [
        {k: group[k] if k in fixed or k not in before else before[k] for k in group}
        for group, before in zip(now, _numbers(state["param_groups"]), strict=True)
    ]
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


class MovingAverage:
    """Exponential moving average of a model's trained weights.

    Every step multiplies the sums by `decay` and adds 1 - `decay` times the weights. The average is
    the sums divided by the sum of these factors, as Adam corrects its moments (Kingma and Ba 2015,
    section 3). So the initial weights have no part in it. A skipped step does not count. Before the
    first step that counts the average is the model. BatchNorm's statistics are moving averages
    already; those of the model are used.

    Args:
        model: On its device and in its layout; its parameters must stay the same tensors.
        decay: Between 0 and 1. The average is over about 1 / (1 - decay) steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.sums = {name: torch.zeros_like(p) for name, p in weights.items()}
        one = torch.ones((), device=next(iter(weights.values())).device)
        self.factors = torch.zeros_like(one)  # the same average, of ones
        self._old, self._new = [*self.sums.values(), self.factors], [*weights.values(), one]
        self._new_share = one * (1 - decay)

    @torch.no_grad()
    def update(self, counts: Tensor) -> None:
        """Include the current weights if `counts`, a scalar, is true; waits for nothing."""
        share = self._new_share * counts
        if share.device.type == "cpu":
            torch._foreach_lerp_(self._old, self._new, [share] * len(self._old))
            return
        # On a GPU that would be a kernel for each weight; this is a few for all of them.
        difference = torch._foreach_sub(self._new, self._old)
        torch._foreach_mul_(difference, share)
        torch._foreach_add_(self._old, difference)

    def averaged(self, model: nn.Module) -> nn.Module:
        """A copy of `model` with the averaged weights."""
        twin = copy.deepcopy(model)
        twin.load_state_dict(_divided(self.state_dict()), strict=False)
        return twin

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums, "factors": self.factors}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`; if it is empty, from the current weights.

        Raises:
            KeyError, TypeError, ValueError: It is of other weights, or invalid.
        """
        saved = self._new
        if state:
            saved = [*(state["sums"][name] for name in self.sums), state["factors"]]
        for own, value in zip(self._old, saved, strict=True):
            if own.shape != value.shape:
                raise ValueError(f"its average has {list(value.shape)} for {list(own.shape)}")
            own.copy_(value)


def averaged(content: dict[str, Any]) -> dict[str, Tensor]:
    """The weights of a checkpoint by name, averaged if it was written with `--ema`.

    Those that `export.py` stored in half precision become float32.
    """
    weights = content["model"] | _divided(content.get("ema", {}))
    return {k: w.float() if w.dtype == torch.half else w for k, w in weights.items()}


def _divided(state: dict[str, Any]) -> dict[str, Tensor]:
    """The averaged weights by name; none without an average, or if no step has counted."""
    if not state or not torch.is_nonzero(state["factors"]):
        return {}
    return {name: value / state["factors"] for name, value in state["sums"].items()}
