"""Prediction on images of any size: overlapping windows, blended so that no seam shows."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

Probabilities = Callable[[Tensor], Tensor]


def blend(
    image: Tensor, probabilities: Probabilities, window: int, overlap: float, batch_size: int
) -> Tensor:
    """Class probabilities of a whole image, blended from those of its windows.

    Args:
        image: float [3,H,W], normalised, on the device; any H and W.
        probabilities: [B,3,window,window] → [B,C,window,window].
        window: Side in pixels, a multiple of the network's stride.
        overlap: Share of a window that its neighbour covers too, 0 to below 1.
        batch_size: Windows per forward pass.

    Returns:
        float32 [C,H,W] on the image's device; every pixel's probabilities sum to 1.
    """
    height, width = image.shape[1:]
    image = F.pad(image, (0, max(0, window - width), 0, max(0, window - height)))
    weight = _hill(window, image.device)
    total: Tensor | None = None
    norm = torch.zeros(image.shape[1:], device=image.device)
    for corners in _batched(
        list(grid(image.shape[1], image.shape[2], window, overlap)), batch_size
    ):
        crops = torch.stack([image[:, y : y + window, x : x + window] for y, x in corners])
        predicted = probabilities(crops).float()
        if total is None:
            total = predicted.new_zeros(predicted.shape[1], *image.shape[1:])
        for (y, x), probability in zip(corners, predicted, strict=True):
            total[:, y : y + window, x : x + window] += probability * weight
            norm[y : y + window, x : x + window] += weight
    assert total is not None
    return (total / norm)[:, :height, :width]


def grid(height: int, width: int, window: int, overlap: float) -> Iterator[tuple[int, int]]:
    """Top-left corners of the fewest evenly spread windows that overlap by at least `overlap`."""
    stride = max(1, round(window * (1 - overlap)))
    for y in _starts(height, window, stride):
        for x in _starts(width, window, stride):
            yield y, x


def _starts(length: int, window: int, stride: int) -> list[int]:
    room = length - window
    steps = -(-room // stride)
    return [round(i * room / steps) for i in range(steps + 1)] if steps > 0 else [0]


def _hill(window: int, device: torch.device) -> Tensor:
    """Weight by distance to the window's edge: the middle has the most context."""
    ramp = torch.arange(window, device=device) + 0.5
    ramp = torch.minimum(ramp, window - ramp) / (window / 2)
    return ramp[:, None] * ramp[None, :]


def _batched(corners: list[tuple[int, int]], size: int) -> Iterator[list[tuple[int, int]]]:
    for i in range(0, len(corners), size):
        yield corners[i : i + size]
