"""How much arithmetic a step needs, and how much this machine can do."""

from typing import Any

import torch
from torch.utils.flop_counter import conv_flop_count

from benchmarks.lib.environment import seconds


def _convolution_backward(grad_shape: Any, x_shape: Any, w_shape: Any, *rest: Any, **_: Any) -> int:
    """Each gradient of a convolution, of its input or its weight, costs as much as its forward.

    PyTorch's formula is the same for ungrouped convolutions. For the weight of a grouped one it
    does not divide by the groups (up to 2.14 at least): MobileNet's backward pass came out at nine
    times its forward (pytorch#183405).

    Args:
        rest: bias, stride, padding, dilation, transposed, output padding, groups, output mask.
    """
    transposed, mask = rest[4], rest[7]
    return conv_flop_count(x_shape, w_shape, grad_shape, transposed) * (mask[0] + mask[1])


# For `FlopCounterMode(custom_mapping=…)`. It counts only matrix products and convolutions, a
# multiply-add as two; everything else in these networks is bound by memory, not by arithmetic.
FORMULAS = {torch.ops.aten.convolution_backward: _convolution_backward}


def matmul_peak(device: torch.device, dtype: torch.dtype | None) -> float:
    """FLOP/s of the best of ten square matrix products in `dtype`, by default float32.

    After a second it stops: a product in emulated bfloat16 takes three.

    On a GPU float32 products use TF32 if its convolutions do. This is what the machine reaches at
    its easiest task, not the number in its data sheet.
    """
    gpu = device.type == "cuda"
    side = 8192 if gpu else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype or torch.float32) for _ in "ab")
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision  # type: ignore[attr-defined]
    if gpu:
        precision = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
        matmul.fp32_precision = precision  # type: ignore[attr-defined]
    a[:64] @ b  # the first product of a process also starts cuBLAS
    taken: list[float] = []
    while len(taken) < 10 and sum(taken) < 1:
        taken.append(seconds(lambda: a @ b, device))
    matmul.fp32_precision = before  # type: ignore[attr-defined]
    return 2 * side**3 / min(taken)
