"""What explains the speed-ups: the networks' operators, one by one, forward and backward.

    python benchmarks/operators.py
    python benchmarks/operators.py --device cuda -b 8 --crop-size 512 -o runs/operators.csv

Each runs in float32 and in bf16, contiguous and channels-last, interleaved in one process, on
inputs as in training: a network's own number of channels, at that network's stride.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from benchmarks.lib.environment import hardware, measured_on, provenance, seconds
from benchmarks.lib.readme import METHOD, add_output, markdown, publish
from benchmarks.lib.results import percentiles
from benchmarks.lib.turns import in_turns, ratio_columns, shown_ratio
from common.cli import Parser, positive, run
from common.distributed import pick_device


def conv(channels: int, kernel: int, dilation: int = 1, groups: int = 1) -> nn.Module:
    padding = dilation * (kernel // 2)
    options = {"padding": padding, "dilation": dilation, "groups": groups, "bias": False}
    return nn.Conv2d(channels, channels, kernel, **options)  # type: ignore[arg-type]


# Operator (the networks that have it): constructor, channels, stride of its input.
OPERATORS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "convolution 3×3 (ResNets)": (lambda: conv(64, 3), 64, 4),
    "the same, wide and dilated (FCN)": (lambda: conv(512, 3, dilation=2), 512, 8),
    "convolution 1×1 (all)": (lambda: conv(256, 1), 256, 8),
    "depthwise 3×3 (MobileNetV3)": (lambda: conv(64, 3, groups=64), 64, 2),
    "depthwise 5×5 (MobileNetV3)": (lambda: conv(120, 5, groups=120), 120, 8),
    "BatchNorm (all)": (lambda: nn.BatchNorm2d(64), 64, 2),
    "ReLU (all)": (nn.ReLU, 64, 2),
    "nearest upsampling (UNet)": (lambda: nn.Upsample(scale_factor=2), 64, 4),
}
PLAIN = "float32"
WAYS = {
    PLAIN: (torch.float32, torch.contiguous_format),
    "float32, channels-last": (torch.float32, torch.channels_last),
    "bf16": (torch.bfloat16, torch.contiguous_format),
    "bf16, channels-last": (torch.bfloat16, torch.channels_last),
}
CALLS = 5  # per round


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    torch.manual_seed(0)
    device = pick_device(args.device)
    rows = []
    for name in OPERATORS:
        steps = {way: _step(name, way, args, device) for way in WAYS}
        times = in_turns(steps, args.rounds, name)
        for way, seconds_of_way in times.items():
            row: dict[str, Any] = {"operator": name, "way": way, "rounds": args.rounds}
            row |= {"batch": args.batch_size, "crop": args.crop_size}
            p10, p50, p90 = percentiles([1e3 * s for s in seconds_of_way])
            row |= {"ms": f"{p50:.4g}", "ms_p10": f"{p10:.4g}", "ms_p90": f"{p90:.4g}"}
            row |= ratio_columns(times[PLAIN], seconds_of_way)
            rows.append(row | hardware(device) | provenance(__file__, argv))
    publish(rows, table, METHOD, "operators", args)


def table(rows: list[dict[str, str]]) -> str:
    """The results in Markdown: ms of the plain way, and the speed-ups of the others."""
    others = [way for way in WAYS if way != PLAIN]
    row = {(r["operator"], r["way"]): r for r in rows}
    lines = [
        [name, row[name, PLAIN]["ms"], *(shown_ratio(row[name, way]) for way in others)]
        for name in dict.fromkeys(r["operator"] for r in rows)
    ]
    shown = markdown(["forward and backward", f"{PLAIN}, ms", *others], lines)
    return f"{measured_on(rows[0])}\n\n{shown}"


def _step(
    name: str, way: str, args: argparse.Namespace, device: torch.device
) -> Callable[[], float]:
    """A function that returns the seconds of a forward and a backward pass, the mean of `CALLS`.

    As in training: weights stay float32 and are cast in each call; gradients are new tensors. So
    the time includes autograd's copy of a gradient whose layout differs from its weight's.
    """
    make, channels, stride = OPERATORS[name]
    dtype, layout = WAYS[way]
    module = make().to(device).to(memory_format=layout)
    side = max(1, args.crop_size // stride)
    x = torch.randn(args.batch_size, channels, side, side, device=device, dtype=dtype)
    x = x.contiguous(memory_format=layout).requires_grad_()

    def calls() -> None:
        for _ in range(CALLS):
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
                y = module(x)
            y.backward(torch.ones_like(y))
            x.grad = None
            module.zero_grad()

    return lambda: seconds(calls, device) / CALLS


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--crop-size", type=positive, default=128, help="pixels")
    add("-b", "--batch-size", type=positive, default=4, help="crops in a step")
    add("--rounds", type=positive, default=15, help="of each, after one for warm-up")
    add_output(parser, "operators", METHOD)
    return parser.parse(argv)


if __name__ == "__main__":
    run(main)
