"""A trained network, ready to predict windows on its device."""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from common import args as arguments
from common.augment import MEAN, normalise
from common.cli import say
from common.distributed import Process, pick_device
from common.predict import onnx_file
from common.predict.windows import Network
from common.run import checkpoint


def load_network(
    args: argparse.Namespace,
    name: str,
    from_checkpoint: Callable[[dict[str, Any]], nn.Module],
    predict: Callable[[nn.Module, Tensor], Any],
    from_outputs: Callable[..., Any],
) -> tuple[Network, list[str]]:
    """A function that predicts windows with the network of `args.model`, and its classes.

    Args:
        args: From `common.predict.folder.inference_parser`. `args.model` is a checkpoint or an
            ONNX file, which decides some of the options.
        name: The model's `NAME`.
        predict: (model, float [B,3,side,side], normalised) → one result for each window.
        from_outputs: (the tensors of an ONNX file, size=side) → the same.
    """
    if args.model.suffix == onnx_file.SUFFIX:
        run, classes = onnx_file.load(args, name)

        def through_file(windows: Tensor) -> Any:
            return from_outputs(*run(windows), size=args.window)

        whole: Network = through_file
    else:
        whole, classes = _from_checkpoint(args, name, from_checkpoint, predict)
    if args.tta:
        whole = symmetric(whole)

    @torch.inference_mode()
    def network(crops: Tensor) -> Any:
        return whole(filled(crops, args.window))

    return network, classes


def _from_checkpoint(
    args: argparse.Namespace,
    name: str,
    from_checkpoint: Callable[[dict[str, Any]], nn.Module],
    predict: Callable[[nn.Module, Tensor], Any],
) -> tuple[Network, list[str]]:
    device = pick_device(args.device)
    arguments.check_speedups(args, device)
    saved = checkpoint.load(args.model, name)
    if args.channels_last is None:
        args.channels_last = device.type == "cpu"  # there it is faster for every network
    process = Process(0, 1, device)
    speedups = arguments.speedups(args, process)
    model = checkpoint.rebuild(saved, from_checkpoint).to(device).eval()
    model = model.to(memory_format=speedups.layout)  # type: ignore[call-overload]
    if args.compile:
        predict = torch.compile(predict)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # all windows have one size
    say(f"{args.model.name!r}: {speedups.banner(process)}")

    def network(windows: Tensor) -> Any:
        images = normalise(windows.to(device, non_blocking=True))
        with speedups.autocast(device):
            return predict(model, images.contiguous(memory_format=speedups.layout))

    return network, saved["classes"]


def filled(crops: Tensor, side: int) -> Tensor:
    """Windows uint8 [B,h,w,3] of a scene smaller than `side`, extended by the mean colour."""
    count, height, width, _ = crops.shape
    if height == width == side:
        return crops
    whole = torch.tensor(MEAN).round().byte().repeat(count, side, side, 1)
    whole[:, :height, :width] = crops
    return whole


def symmetric(network: Network) -> Network:
    """The mean of `network` over the eight symmetries of a window: 8 times the work."""

    def mean(windows: Tensor) -> Tensor:
        total: Tensor | float = 0.0
        for turns in range(4):
            for mirrored in (False, True):
                seen = windows.rot90(turns, (1, 2))
                found = network(seen.flip(2) if mirrored else seen)
                found = found.flip(3) if mirrored else found
                total = total + found.rot90(-turns, (2, 3))
        return total / 8  # type: ignore[return-value]

    return mean
