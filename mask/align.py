"""RoIAlign (He et al. 2017) over a whole feature pyramid in one call, of fixed shapes.

torchvision's `MultiScaleRoIAlign` sorts the boxes by level, so its shapes depend on the boxes. Here
all levels lie side by side in one tensor, and each box is shifted to where its level begins. The
results are the same for all boxes inside of the image.
"""

from collections.abc import Sequence

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
            rois: [R,5], the image's index in the batch and x1, y1, x2, y2 in pixels, inside of the
                image. They get no gradient.
            bins: Cells per side of the result.
        """
        level = level_of(rois[:, 1:])
        boxes = rois[:, 1:] / _lookup(self.strides, level)[:, None]
        if self.as_rows:
            return self._pool_rows(rois[:, 0].long(), boxes, level, bins)
        x, y = (_lookup(offsets, level)[:, None] for offsets in _offsets(self.shapes))
        shifted = torch.cat([rois[:, :1], boxes + torch.cat([x, y, x, y], 1)], 1)
        pooled = roi_align(self.features, shifted, bins, 1.0, SAMPLES)
        # Points past the level count as 0. On the canvas they read the pixel at the level's border,
        # as does a point of the same bin that is not past it: their box has a side of one pixel.
        height, width = self._sides(level)
        rows = _points(boxes[:, 1], boxes[:, 3], height, bins)[1].mean(2)
        columns = _points(boxes[:, 0], boxes[:, 2], width, bins)[1].mean(2)
        return pooled * (rows[:, None, :, None] * columns[:, None, None, :]).to(pooled.dtype)

    def _sides(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """Height and width of the level of each box: int64 [R] both."""
        heights, widths = zip(*self.shapes, strict=True)
        return _lookup(heights, level), _lookup(widths, level)

    def _pool_rows(self, image: Tensor, boxes: Tensor, level: Tensor, bins: int) -> Tensor:
        """`pool` as a sparse matrix times the features: a bin is a weighted sum of 16 pixels."""
        height, width = self._sides(level)
        first_rows, row = [], 0
        for h, w in self.shapes:
            first_rows.append(row)
            row += self.batch * h * w
        y, y_weight = _pixels(*_points(boxes[:, 1], boxes[:, 3], height, bins), height)
        x, x_weight = _pixels(*_points(boxes[:, 0], boxes[:, 2], width, bins), width)
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


def _lookup(values: Sequence[int], level: Tensor) -> Tensor:
    """`values[level]`, without a tensor of constants, which would be copied to the device."""
    result = torch.full_like(level, values[0])
    for k, value in enumerate(values[1:], start=1):
        result = torch.where(level == k, value, result)
    return result


def _points(low: Tensor, high: Tensor, length: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """The points along one axis that each bin averages, [R,bins,SAMPLES]; 1 where they count.

    A point counts up to one pixel outside of a level, as in torchvision. The order of additions is
    torchvision's, too, because a point may lie exactly there.
    """
    bin_size = ((high - low).clamp(min=1) / bins)[:, None, None]
    first = low[:, None, None] + torch.arange(bins, device=low.device)[:, None] * bin_size
    points = first + (torch.arange(SAMPLES, device=low.device) + 0.5) * bin_size / SAMPLES
    inside = (points >= -1) & (points <= length[:, None, None])
    return points, inside.to(points.dtype)


def _pixels(points: Tensor, inside: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """The pixels along one axis that each bin reads, and their weights: [R,bins,4] both."""
    last = length[:, None, None] - 1
    points = points.clamp(min=0)
    before = points.long().clamp(min=0).minimum(last)
    after = (before + 1).minimum(last)
    fraction = torch.where(before < last, points - before, 0)
    weights = torch.stack([1 - fraction, fraction], -1) * (inside / SAMPLES)[..., None]
    return torch.stack([before, after], -1).flatten(2), weights.flatten(2)


def _rows(levels: list[Tensor]) -> Tensor:
    """All pixels of all levels as the rows of one matrix: [B·(h·w + …),C], at least float32."""
    rows = torch.cat([level.permute(0, 2, 3, 1).flatten(0, 2) for level in levels])
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _canvas(levels: list[Tensor]) -> Tensor:
    """All levels on one map: the finest on the left, the others in a column to its right.

    Each has a border of replicated pixels, because RoIAlign reads up to one pixel outside of a
    level and takes the nearest pixel there. At the right and at the bottom it is two pixels wide: a
    box that is narrower than a pixel is read as one pixel.
    """
    first, *others = (F.pad(level, (1, 2, 1, 2), mode="replicate") for level in levels)
    width = max(level.shape[3] for level in others)
    right = torch.cat([F.pad(level, (0, width - level.shape[3])) for level in others], 2)
    height = max(first.shape[2], right.shape[2])
    return torch.cat([F.pad(part, (0, 0, 0, height - part.shape[2])) for part in (first, right)], 3)


def _offsets(shapes: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """The position of the first pixel of each level on the canvas: x and y."""
    y, bottom = [1, 1], 1
    for height, _ in shapes[1:-1]:
        bottom += height + 3
        y.append(bottom)
    return [1] + [shapes[0][1] + 4] * (len(shapes) - 1), y
