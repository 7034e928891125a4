"""Every convolution of a model's step and its optimizer, contiguous and channels-last."""

from collections import Counter
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.lib.environment import seconds
from benchmarks.lib.models import MODELS
from benchmarks.lib.synthetic import noise_tiles, training_step
from common.args import Speedups
from common.cli import progress
from common.distributed import Process

LAYOUTS = (torch.contiguous_format, torch.channels_last)
# Shape of the input, then the arguments of nn.Conv2d.
Shape = tuple[Any, ...]


def of_model(name: str, backbone: str, batch: int, crop: int) -> tuple[nn.Module, Counter[Shape]]:
    """The model, and the convolutions of one training step with how often each is computed."""
    device = torch.device("cpu")
    model, step = training_step(name, Process(0, 1, device), Speedups(), crop, backbone)
    seen: Counter[Shape] = Counter()

    def note(conv: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if isinstance(conv, nn.Conv2d):
            sizes = conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride
            seen[(*inputs[0].shape,), *sizes, conv.padding, conv.dilation, conv.groups] += 1

    hooks = [module.register_forward_pre_hook(note) for module in model.modules()]
    step(noise_tiles(batch, crop, device))
    for hook in hooks:
        hook.remove()
    return model, seen


def table(name: str, backbone: str | None, batch: int, crop: int, rounds: int) -> str:
    """Milliseconds of each convolution in a step, forward and backward, and of the optimizer."""
    device = torch.device("cpu")
    model, seen = of_model(name, backbone or MODELS[name].light, batch, crop)
    parts = [(shape, count, [_calls(shape, layout) for layout in LAYOUTS])
             for shape, count in seen.items()]  # fmt: skip
    rows: list[tuple[str, list[float]]] = []
    for shape, count, calls in progress(parts, desc=name, unit="convolution"):
        times = _in_turns([call for pair in calls for call in pair], rounds, device)
        size, inputs, outputs, kernel, stride = shape[:5]
        words = f"{inputs} → {outputs}, {'×'.join(map(str, kernel))}, stride {stride[0]}, at "
        words += f"{size[2]}×{size[3]}" + f", {count} times" * (count > 1)
        rows.append((words, [1e3 * count * t for t in times]))
    rows.sort(key=lambda row: row[1][1] - row[1][3])  # what loses most in the backward pass first
    sums = [sum(values) for values in zip(*(times for _, times in rows), strict=True)]
    rows.append(("**all convolutions**", sums))
    steps = [_optimizer(model, layout) for layout in LAYOUTS]
    plain, last = (1e3 * t for t in _in_turns(steps, rounds, device))
    lines = ["| ms in a step | forward | channels-last | backward | channels-last |"]
    lines.append("|---|--:|--:|--:|--:|")
    for words, (forward, backward, forward_last, backward_last) in rows:
        values = (forward, forward_last, backward, backward_last)
        lines.append(f"| {words} | {' | '.join(f'{value:.1f}' for value in values)} |")
    lines.append(f"| **the optimizer** (plain, channels-last) | {plain:.1f} | {last:.1f} | | |")
    return "\n".join(lines)


def _calls(shape: Shape, layout: torch.memory_format) -> list[Callable[[], None]]:
    """Forward and backward of a convolution."""
    size, inputs, outputs, kernel, stride, padding, dilation, groups = shape
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias=False)
    conv = conv.to(memory_format=layout)
    x = torch.randn(size).contiguous(memory_format=layout)
    x.requires_grad_(inputs != 3)  # the first has no gradient of its input
    y = conv(x)
    grad = torch.randn_like(y)

    def forward() -> None:
        conv(x)

    def backward() -> None:
        torch.autograd.grad(y, [conv.weight, *([x] if x.requires_grad else [])], grad, True)

    return [forward, backward]


def _optimizer(model: nn.Module, layout: torch.memory_format) -> Callable[[], Any]:
    """A fused step on gradients in the layout of their weights, as autograd leaves them."""
    weights = [
        torch.randn_like(p).to(memory_format=layout if p.ndim == 4 else torch.contiguous_format)
        for p in model.parameters()
    ]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    return torch.optim.AdamW(weights, fused=True).step


def _in_turns(calls: list[Callable[[], Any]], rounds: int, device: torch.device) -> list[float]:
    """The median seconds of each, after one round for warm-up."""
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds + 1):
        for call, taken in zip(calls, times, strict=True):
            spent = seconds(call, device)
            if turn:
                taken.append(spent)
    return [median(taken) for taken in times]
