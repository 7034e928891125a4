"""Boxes of Mask R-CNN in fixed shapes: coding, matching, sampling, suppression, pasting.

Boxes are float [...,4], x1, y1, x2, y2 in pixels. No shape here depends on values: a boolean tensor
says which boxes exist, and the others are padding.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torchvision.ops import nms

LARGEST_GROWTH = math.log(1000 / 16)  # logarithm of a side's growth; torchvision's limit
BLOCK = 256  # boxes whose IoUs `suppress_on_gpu` computes at a time, to save memory

SAME_PROPOSAL, SAME_AIRCRAFT = 0.7, 0.5  # IoU of two boxes above which only the better is kept

Weights = tuple[float, float, float, float]
ANCHOR_WEIGHTS: Weights = (1.0, 1.0, 1.0, 1.0)
BOX_WEIGHTS: Weights = (10.0, 10.0, 5.0, 5.0)


class Proposals(NamedTuple):
    """boxes: [B,P,4], best first. exists: bool [B,P]. anchor: int64 [B,P], index of its anchor."""

    boxes: Tensor
    exists: Tensor
    anchor: Tensor


class Detections(NamedTuple):
    """boxes: [B,D,4]. scores: [B,D], highest first, 0 for padding. labels: int64 [B,D], 1…C."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


def precise(values: Tensor) -> Tensor:
    """`values` in float32 if autocast gave them fewer bits, else unchanged."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of each box of [...,N,4] with each of [...,M,4]: [...,N,M].

    0 for boxes without an area, such as padding.
    """
    # One contiguous row per coordinate is four times as fast on a CPU.
    ax1, ay1, ax2, ay2 = a.mT.contiguous()[..., :, None].unbind(-3)
    bx1, by1, bx2, by2 = b.mT.contiguous()[..., None, :].unbind(-3)
    shared = torch.minimum(ax2, bx2).sub_(torch.maximum(ax1, bx1)).clamp_(min=0)
    height = torch.minimum(ay2, by2).sub_(torch.maximum(ay1, by1)).clamp_(min=0)
    shared.mul_(height)
    area = ((ax2 - ax1) * (ay2 - ay1)).clamp(min=1e-9)
    return shared.div_((area + (bx2 - bx1) * (by2 - by1)).sub_(shared))


def encode(boxes: Tensor, references: Tensor, weights: Weights) -> Tensor:
    """The shift and growth that turn `references` into `boxes`, both [...,4]: [...,4].

    Equations 2 of Ren et al. 2015 ("Faster R-CNN"), times `weights`.
    """
    size = references[..., 2:] - references[..., :2]
    box_size = boxes[..., 2:] - boxes[..., :2]
    distance = (boxes[..., :2] + 0.5 * box_size) - (references[..., :2] + 0.5 * size)
    (dx, dy), (dw, dh) = (distance / size).unbind(-1), torch.log(box_size / size).unbind(-1)
    wx, wy, ww, wh = weights
    return torch.stack([wx * dx, wy * dy, ww * dw, wh * dh], -1)


def decode(codes: Tensor, references: Tensor, weights: Weights) -> Tensor:
    """The inverse of `encode`; the growth is limited to `LARGEST_GROWTH`."""
    size = references[..., 2:] - references[..., :2]
    centre = references[..., :2] + 0.5 * size
    dx, dy, dw, dh = (code / weight for code, weight in zip(codes.unbind(-1), weights, strict=True))
    shift = torch.stack([dx, dy], -1) * size + centre
    half = 0.5 * (torch.exp(torch.stack([dw, dh], -1).clamp(max=LARGEST_GROWTH)) * size)
    return torch.cat([shift - half, shift + half], -1)


def clip(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut boxes off at the border of an image of this height and width."""
    x, y = boxes[..., 0::2].clamp(0, size[1]), boxes[..., 1::2].clamp(0, size[0])
    return torch.stack([x, y], -1).flatten(-2)


def has_min_side(boxes: Tensor, min_side: float) -> Tensor:
    """Whether both sides are at least `min_side` pixels: bool [...]. False for boxes of nan."""
    return ((boxes[..., 2:] - boxes[..., :2]) >= min_side).all(-1)


@torch.library.custom_op("mask::suppress", mutates_args=(), device_types="cpu")
def suppress(boxes: Tensor, exists: Tensor, threshold: float) -> Tensor:
    """Non-maximum suppression: drop each box that overlaps a kept box of a higher rank too much.

    A compiled or exported network has this function as one operator, and on a GPU it is
    `suppress_on_gpu`. `mask/export.py` says which operator of ONNX it is. All keep the same boxes.

    Args:
        boxes: [B,N,4], sorted by falling score.
        exists: bool [B,N].
        threshold: The largest IoU of two boxes that are kept. A CPU compares with it in float64 and
            the others in float32; 0.5 and 0.7 give the same, because float32 rounds neither up.

    Returns:
        bool [B,N]: whether the box exists and is kept.
    """
    kept = torch.zeros_like(exists)
    for image, row in enumerate(exists):
        ranks = row.nonzero()[:, 0]
        best_first = nms(boxes[image, ranks], -ranks.to(boxes.dtype), threshold)
        kept[image, ranks[best_first]] = True
    return kept


@suppress.register_kernel("cuda")
def suppress_on_gpu(boxes: Tensor, exists: Tensor, threshold: float) -> Tensor:
    """The same in fixed shapes; torchvision's function would wait for the number of kept boxes.

    It runs about one kernel for each of the N boxes. No fixed number below N is enough for all
    boxes: the last box of a chain, in which each box overlaps the next, depends on the first.

    The state of a box is 0.5 while it is kept, and infinite when it is dropped. In step i, each
    later box that box i overlaps gets `largest` / (state of box i) more. That is infinity from a
    kept box, and 0 from a dropped one.
    """
    largest = torch.finfo(torch.float32).max
    state = torch.where(exists, 0.5, torch.inf).float()
    rest, decided = boxes, []
    for block in boxes.split(BLOCK, 1):
        count = block.shape[1]
        overlaps = (iou(block, rest) > threshold).triu(1)
        for i, row in enumerate(torch.where(overlaps, largest, 0).float().unbind(1)):
            state = torch.addcdiv(state, row, state[:, i : i + 1])
        decided.append(state[:, :count])
        rest, state = rest[:, count:], state[:, count:]
    return torch.cat(decided, 1).isfinite()


@suppress.register_fake
def _shape_of_suppress(boxes: Tensor, exists: Tensor, threshold: float) -> Tensor:
    return torch.empty_like(exists)


def sample(labels: Tensor, random: Tensor, count: int, positives: int) -> tuple[Tensor, Tensor]:
    """Choose boxes to train on: those with the lowest random numbers.

    Args:
        labels: [B,N]: >= 1 positive, 0 negative, -1 neither.
        random: float [B,N] in [0, 1).
        count: Boxes to choose per image.
        positives: The largest number of positives among them.

    Returns:
        The indices of the chosen boxes, int64 [B,count], the positives first; and bool [B,count],
        False where there were too few boxes to choose from.
    """
    count, positives = min(count, labels.shape[1]), min(positives, labels.shape[1])
    lowest = torch.where(labels >= 1, random, 2.0).topk(positives, largest=False).values
    chosen_positive = (labels >= 1) & (random <= lowest.amax(1, keepdim=True))
    rank = torch.where(chosen_positive, random - 1, torch.where(labels == 0, random, 2.0))
    chosen = rank.topk(count, largest=False)
    return chosen.indices, chosen.values < 2


def ignored(boxes: Tensor, ignore: Tensor) -> Tensor:
    """Whether over half of each box of [B,N,4] lies on pixels of bool [B,H,W]: bool [B,N]."""
    height, width = ignore.shape[1:]
    # Summed-area table: at y, x the number of ignored pixels above and to the left.
    table = F.pad(ignore.float().cumsum(1).cumsum(2), (1, 0, 1, 0)).flatten(1)
    x1, x2 = (boxes[..., i].round().long().clamp(0, width) for i in (0, 2))
    y1, y2 = (boxes[..., i].round().long().clamp(0, height) for i in (1, 3))

    def above(y: Tensor, x: Tensor) -> Tensor:
        return table.gather(1, y * (width + 1) + x)

    covered = above(y2, x2) - above(y1, x2) - above(y2, x1) + above(y1, x1)
    return covered > 0.5 * (x2 - x1) * (y2 - y1)


def shapes_may_vary(values: Tensor) -> bool:
    """Whether this is an eager step on a CPU: not compiled, not exported, under no dispatch mode.

    A dispatch mode that counts FLOPs or syncs therefore sees fixed shapes, as on a GPU.
    """
    eager = not torch.compiler.is_compiling() and not is_in_torch_dispatch_mode()
    return eager and values.device.type == "cpu"


def apply_where(head: Callable[[Tensor], Tensor], valid: Tensor) -> Tensor:
    """Apply `head` to the valid rows of bool [N]: [N,...]; the other rows are arbitrary.

    An eager step on a CPU computes only the valid rows, so fixed shapes cost it nothing. Elsewhere
    valid rows are computed again in place of the others.

    Args:
        head: int64 [R], indices of rows → values [R,...].
        valid: bool [N].
    """
    if shapes_may_vary(valid) and valid.any():  # without any, the weights still get gradients of 0
        index = valid.nonzero()[:, 0]
        values = head(index)
        return values.new_zeros(len(valid), *values.shape[1:]).index_copy(0, index, values)
    return head(fill_index(valid))


def fill_index(valid: Tensor) -> Tensor:
    """For bool [N]: i where row i is valid, else the index of a valid row, in turn; int64 [N].

    BatchNorm then sees only valid rows. If no row is valid, the indices are arbitrary.
    """
    index = torch.arange(len(valid), device=valid.device)
    valid_first = valid.int().argsort(descending=True, stable=True)
    turn = (~valid).cumsum(0) - 1
    return torch.where(valid, index, valid_first[turn % valid.sum().clamp(min=1)])


def as_rois(boxes: Tensor) -> Tensor:
    """Boxes [B,N,4] as rows [B·N,5] that begin with the image's index in the batch."""
    image = torch.arange(boxes.shape[0], device=boxes.device, dtype=boxes.dtype)
    return torch.cat([image[:, None, None].expand(-1, boxes.shape[1], 1), boxes], 2).flatten(0, 1)


def gather_rows(values: Tensor, index: Tensor) -> Tensor:
    """The rows of `values` [B,N,...] at int64 `index` [B,M]: [B,M,...]."""
    expanded = index.view(*index.shape, *[1] * (values.ndim - 2))
    return values.gather(1, expanded.expand(*index.shape, *values.shape[2:]))


def paste(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Paste the masks of boxes into the image.

    As in torchvision, RoIAlign makes the mask targets and features, and it puts the centre of pixel
    i at i. A pixel is read from the mask at that place too, or from the nearest cell; otherwise the
    mask would be half a pixel too far up and left, as by torchvision's function. A pixel belongs to
    a box if its true centre, i + 0.5, lies in it. The true masks of 98 rendered aircraft of 16 to
    200 pixels, encoded as targets of 28 x 28 and pasted again, keep a mean IoU of 0.99 with this
    function and of 0.78 with torchvision's.

    Args:
        masks: Probabilities, float [N,M,M].
        boxes: float32 [N,4], x1, y1, x2, y2.
        size: Height and width of the image.

    Returns:
        bool [N,height,width]: where the probability, interpolated linearly, is above a half.
    """
    side = masks.shape[-1]

    def weights(low: Tensor, high: Tensor, length: int) -> Tensor:
        """The weight of each mask cell for each pixel along one axis of the image: [N,length,M]."""
        low, high = low[:, None], high[:, None]
        pixels = torch.arange(length, device=boxes.device)
        inside = (pixels + 0.5 >= low) & (pixels + 0.5 < high)
        cell = ((pixels - low) / (high - low) * side - 0.5).clamp(0, side - 1)
        cell = torch.where(inside, cell, -1)  # which is too far from every cell
        cells = torch.arange(side, device=boxes.device)
        return (1 - (cell[..., None] - cells).abs()).clamp(min=0)

    x1, y1, x2, y2 = boxes.unbind(1)
    with torch.autocast(boxes.device.type, enabled=False):
        rows, columns = weights(y1, y2, size[0]), weights(x1, x2, size[1])
        return rows @ masks.to(rows.dtype) @ columns.mT > 0.5
