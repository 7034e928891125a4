"""A trained network, ready to predict windows: from a checkpoint or from an ONNX file."""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from common import args as arguments
from common.augment import normalise
from common.cli import say
from common.distributed import Process, pick_device
from common.predict import onnx_file
from common.predict.folder import WINDOW
from common.predict.windows import Network
from common.run import checkpoint


def load_network(
    args: argparse.Namespace,
    name: str,
    from_checkpoint: Callable[[dict[str, Any]], nn.Module],
    predict: Callable[[nn.Module, Tensor], Any],
    from_outputs: Callable[..., Any],
    **defaults: int,
) -> tuple[Network, list[str]]:
    """A function that predicts windows with the network of `args.model`, and its classes.

    An ONNX file decides `--window` and the options in `defaults`; they are set in `args`.

    Args:
        args: From `common.predict.folder.inference_parser`. `args.model` is a checkpoint or an
            ONNX file.
        name: The model's `NAME`.
        predict: (model, float [B,3,side,side], normalised) → one result for each window.
        from_outputs: (the tensors of an ONNX file, size=side) → the same.
        defaults: Values of these options for a checkpoint, where the user gave none.
    """
    defaults = {"window": WINDOW, **defaults}
    if args.model.suffix == onnx_file.SUFFIX:
        run, classes = onnx_file.load(args, name, list(defaults))
        return lambda windows: from_outputs(*run(windows), size=args.window), classes

    for option, value in defaults.items():
        if getattr(args, option) is None:
            setattr(args, option, value)
    device = pick_device(args.device)
    arguments.check_speedups(args, device)
    saved = checkpoint.load(args.model, name)
    args.look_of_training = saved["args"].get("look")
    if args.channels_last is None:
        args.channels_last = device.type == "cpu"  # there it is faster for every network
    process = Process(0, 1, device)
    speedups = arguments.resolve_speedups(args, process)
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
