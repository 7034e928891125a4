"""An optimizer's state in a checkpoint, which may come from another device or other speed-ups."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def of_the_form(value: Any, form: Any) -> Any:
    """`value`, in its order, without keys that `form` does not have: another torch may have others.

    Raises:
        TypeError: A value is of another type than its counterpart in `form`.
    """
    if isinstance(form, dict) and isinstance(value, dict):
        return {k: of_the_form(v, form[k]) for k, v in value.items() if k in form}
    if isinstance(form, list | tuple) and isinstance(value, list | tuple):
        return type(form)(of_the_form(v, f) for v, f in zip(value, form, strict=True))
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
    form = numbers(optimizer.state_dict()["param_groups"])
    saved = of_the_form(numbers(state["param_groups"]), form)
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


def numbers(value: Any) -> Any:
    """Turn scalar tensors in the hyperparameters into numbers: a CUDA graph's rate is a tensor."""
    if isinstance(value, dict):
        return {k: v if k == "state" else numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [numbers(v) for v in value]
    return value.item() if isinstance(value, Tensor) and value.ndim == 0 else value
