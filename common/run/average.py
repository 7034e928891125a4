"""`--ema`: a moving average of the weights, which is scored, saved and used for prediction."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class MovingAverage:
    """Exponential moving average of a model's trained weights.

    Every step multiplies the sums by `decay` and adds 1 - `decay` times the weights. The average is
    the sums divided by the sum of these factors, as Adam corrects its moments (Kingma and Ba 2015,
    section 3). So the initial weights have no part in it: with a decay of 0.999 and without the
    division they would still be 70 % of it after 350 steps. BatchNorm's statistics are moving
    averages already; those of the model are used.

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
        self._lerp = get_ema_multi_avg_fn(decay)

    def update(self) -> None:
        """Include the current weights, by one kernel for all of them on a GPU; does not wait."""
        self._lerp(self._old, self._new, None)

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
    """The weights of a checkpoint by name, averaged if it was written with `--ema`."""
    return content["model"] | _divided(content.get("ema", {}))


def _divided(state: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value / state["factors"] for name, value in state.get("sums", {}).items()}
