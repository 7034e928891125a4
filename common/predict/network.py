"""A trained network, ready to predict windows on its device."""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import args as arguments
from common.augment import normalise
from common.distributed import Process, pick_device
from common.predict.windows import Network
from common.run import checkpoint


def load_network(
    args: argparse.Namespace,
    name: str,
    from_checkpoint: Callable[[dict[str, Any]], nn.Module],
    predict: Callable[[nn.Module, Tensor], Any],
) -> tuple[Any, Network, list[str]]:
    """The model of `args.model`, a function that predicts windows with it, and its classes.

    Args:
        args: From `common.predict.folder.inference_parser`.
        name: The model's `NAME`.
        predict: (model, float [B,3,side,side], normalised) → one result for each window.
    """
    device = pick_device(args.device)
    arguments.check_speedups(args, device)
    saved = checkpoint.load(args.model, name)
    if args.channels_last is None:
        args.channels_last = device.type == "cpu"  # there it is faster for every network
    speedups = arguments.speedups(args, Process(0, 1, device))
    model = checkpoint.rebuild(saved, from_checkpoint).to(device).eval()
    model = model.to(memory_format=speedups.layout)  # type: ignore[call-overload]
    if args.compile:
        predict = torch.compile(predict)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # all windows have one size

    @torch.inference_mode()
    def network(crops: Tensor) -> Any:
        images = normalise(crops.to(device, non_blocking=True))
        height, width = images.shape[2:]
        # A scene smaller than a window is extended by the mean colour.
        images = F.pad(images, (0, args.window - width, 0, args.window - height))
        with speedups.autocast(device):
            return predict(model, images.contiguous(memory_format=speedups.layout))

    return model, network, saved["classes"]


def symmetric(
    predict: Callable[[nn.Module, Tensor], Tensor],
) -> Callable[[nn.Module, Tensor], Tensor]:
    """The mean of `predict` over the eight symmetries of a window: 8 times the work."""

    def mean(model: nn.Module, images: Tensor) -> Tensor:
        total: Tensor | float = 0.0
        for turns in range(4):
            for mirrored in (False, True):
                seen = images.rot90(turns, (2, 3))
                found = predict(model, seen.flip(3) if mirrored else seen)
                found = found.flip(3) if mirrored else found
                total = total + found.rot90(-turns, (2, 3))
        return total / 8  # type: ignore[return-value]

    return mean
