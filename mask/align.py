"""RoIAlign (He et al. 2017) over a whole feature pyramid in one call, of fixed shapes.

torchvision's `MultiScaleRoIAlign` sorts the boxes by level, so its shapes depend on the boxes. Here
all levels lie side by side in one tensor, and each box is shifted to where its level begins. The
results are the same.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align

SAMPLES = 2  # points per bin along each axis, interpolated and averaged


class Pyramid:
    """Levels of features, the finest first; each level has half the resolution of the one before.

    Args:
        levels: Float [B,C,h,w] each.
        size: Height and width of the images.
    """

    def __init__(self, levels: list[Tensor], size: tuple[int, int]) -> None:
        self.shapes = [(level.shape[-2], level.shape[-1]) for level in levels]
        # As in torchvision: the power of two that is nearest to the true stride.
        self.strides = [2 ** round_log2(size[0] / height) for height, _ in self.shapes]
        self.batch, self.dtype = levels[0].shape[0], levels[0].dtype
        self.as_rows = as_rows(levels[0])
        self.features = _rows(levels) if self.as_rows else _canvas(levels)

    def pool(self, rois: Tensor, bins: int) -> Tensor:
        """The features of boxes, averaged over `bins` x `bins` cells: [R,C,bins,bins].

        Args:
            rois: [R,5], the image's index in the batch and x1, y1, x2, y2 in pixels. They get no
                gradient.
            bins: Cells per side of the result.
        """
        level = level_of(rois[:, 1:])
        boxes = rois[:, 1:] / _lookup(self.strides, level)[:, None]
        if self.as_rows:
            return self._pool_rows(rois[:, 0].long(), boxes, level, bins)
        x, y = (_lookup(offsets, level)[:, None] for offsets in _offsets(self.shapes))
        shifted = boxes + torch.cat([x, y, x, y], 1)
        return roi_align(self.features, torch.cat([rois[:, :1], shifted], 1), bins, 1.0, SAMPLES)

    def _pool_rows(self, image: Tensor, boxes: Tensor, level: Tensor, bins: int) -> Tensor:
        """`pool` as a sparse matrix times the features: a bin is a weighted sum of 16 pixels."""
        height = _lookup([h for h, _ in self.shapes], level)
        width = _lookup([w for _, w in self.shapes], level)
        first_rows, row = [], 0
        for h, w in self.shapes:
            first_rows.append(row)
            row += self.batch * h * w
        y, y_weight = _points(boxes[:, 1], boxes[:, 3], height, bins)
        x, x_weight = _points(boxes[:, 0], boxes[:, 2], width, bins)
        corner = _lookup(first_rows, level) + image * height * width
        y = corner[:, None, None] + y * width[:, None, None]
        pixels = y[:, :, None, :, None] + x[:, None, :, None, :]
        weights = y_weight[:, :, None, :, None] * x_weight[:, None, :, None, :]
        pooled = F.embedding_bag(
            pixels.flatten(0, 2).flatten(1),
            self.features,
            mode="sum",
            per_sample_weights=weights.to(self.features.dtype).flatten(0, 2).flatten(1),
        )
        shape = len(boxes), bins, bins, self.features.shape[1]
        return pooled.view(shape).permute(0, 3, 1, 2).to(self.dtype)


def as_rows(features: Tensor) -> bool:
    """Whether to pool by a sparse matrix: on a CPU, where torchvision's backward pass is serial.

    Not in an export, because the exporter knows only torchvision's operator. In torch 2.11
    `is_exporting` is also true while torch.compile traces.
    """
    exporting = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
    return features.device.type == "cpu" and not exporting


def level_of(boxes: Tensor) -> Tensor:
    """The level, 0 to 3, from which each box of [R,4] is pooled: int64 [R].

    Equation 1 of Lin et al. 2017 ("Feature pyramid networks for object detection"): a box of 224
    pixels belongs to the third, one of half that side to the second.
    """
    side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    level = (4 + torch.log2(side / 224) + 1e-6).floor()
    return level.clamp(2, 5).long() - 2


def round_log2(ratio: float) -> int:
    """The exponent of the power of two nearest to `ratio`, which is at least 1."""
    return next(k for k in range(32) if ratio < 2 ** (k + 0.5))


def _lookup(values: list[int], level: Tensor) -> Tensor:
    """`values[level]`, without a tensor of constants, which would be copied to the device."""
    result = torch.full_like(level, values[0])
    for k, value in enumerate(values[1:], start=1):
        result = torch.where(level == k, value, result)
    return result


def _points(low: Tensor, high: Tensor, length: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """The pixels along one axis that each bin reads, and their weights: [R,bins,4] both."""
    count = bins * SAMPLES
    steps = (torch.arange(count, device=low.device) + 0.5) / count
    points = low[:, None] + (high - low).clamp(min=1)[:, None] * steps
    last = length[:, None] - 1
    inside = (points >= -1) & (points <= length[:, None])
    points = points.clamp(min=0)
    before = points.long().clamp(min=0).minimum(last)
    after = (before + 1).minimum(last)
    fraction = torch.where(before < last, points - before, 0)
    pixels = torch.stack([before, after], -1).unflatten(1, (bins, SAMPLES)).flatten(2)
    weights = torch.stack([1 - fraction, fraction], -1) * (inside / SAMPLES)[..., None]
    return pixels, weights.unflatten(1, (bins, SAMPLES)).flatten(2)


def _rows(levels: list[Tensor]) -> Tensor:
    """All pixels of all levels as the rows of one matrix: [B·(h·w + …),C], at least float32."""
    rows = torch.cat([level.permute(0, 2, 3, 1).flatten(0, 2) for level in levels])
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _canvas(levels: list[Tensor]) -> Tensor:
    """All levels on one map: the finest on the left, the others in a column to its right.

    Each has a border of one replicated pixel, because RoIAlign reads up to one pixel outside of a
    level and takes the nearest pixel there.
    """
    first, *others = (F.pad(level, (1, 1, 1, 1), mode="replicate") for level in levels)
    width = max(level.shape[3] for level in others)
    right = torch.cat([F.pad(level, (0, width - level.shape[3])) for level in others], 2)
    height = max(first.shape[2], right.shape[2])
    return torch.cat([F.pad(part, (0, 0, 0, height - part.shape[2])) for part in (first, right)], 3)


def _offsets(shapes: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """The position of the first pixel of each level on the canvas: x and y."""
    y, bottom = [1, 1], 1
    for height, _ in shapes[1:-1]:
        bottom += height + 2
        y.append(bottom)
    return [1] + [shapes[0][1] + 3] * (len(shapes) - 1), y
