"""Which boxes Mask R-CNN trains on, and its five losses, in fixed shapes.

The losses of an image depend on that image alone, and those of a batch are their mean. So several
processes, or several passes, compute the gradient of one large batch. (torchvision takes the mean
over the boxes of all images.)
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align

from common.augment import uniform
from mask.boxes import (
    ANCHOR_WEIGHTS,
    BOX_WEIGHTS,
    SAME_AIRCRAFT,
    Proposals,
    as_rois,
    encode,
    gather_rows,
    ignored,
    iou,
    sample,
)
from mask.targets import Targets

POSITIVE, NEGATIVE = 0.7, 0.3  # IoU of an anchor with an aircraft
ANCHORS, POSITIVE_ANCHORS = 256, 128  # to train on, per image
SMOOTH = 1 / 9  # error below which the box losses are quadratic, and not L1


class Samples(NamedTuple):
    """Boxes to train the heads on, the positives first.

    boxes: [B,S,4]. labels: int64 [B,S], 0 ground. slot: int64 [B,S], the slot in the targets of the
    aircraft with the highest IoU. exists: bool [B,S].
    """

    boxes: Tensor
    labels: Tensor
    slot: Tensor
    exists: Tensor


def rpn_losses(
    anchors: Tensor, objectness: Tensor, deltas: Tensor, targets: Targets
) -> dict[str, Tensor]:
    """The losses of the RPN: is an anchor on an aircraft, and which code gives the aircraft's box.

    Args:
        anchors: [A,4].
        objectness: Logits [B,A].
        deltas: Codes of boxes [B,A,4].
        targets: The aircraft.
    """
    labels, slot = label_anchors(anchors, targets)
    random = uniform(targets.key, len(anchors), 1, 0)
    chosen, exists = sample(labels, random, ANCHORS, POSITIVE_ANCHORS)
    positive = labels.gather(1, chosen) == 1
    logits = objectness.gather(1, chosen)
    loss = F.binary_cross_entropy_with_logits(logits, positive.to(logits.dtype), reduction="none")
    boxes = gather_rows(targets.boxes, slot.gather(1, chosen))
    wanted = encode(boxes, anchors[chosen], ANCHOR_WEIGHTS)
    box_loss = _box_loss(gather_rows(deltas, chosen), wanted, positive)
    return {"loss_objectness": _mean(loss, exists), "loss_rpn_box_reg": _mean(box_loss, exists)}


@torch.no_grad()
def label_anchors(anchors: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """Labels [B,A], 1 positive, 0 negative, -1 neither; and the slot of the most similar aircraft.

    The anchors with the highest IoU with an aircraft are positive, too, however low that IoU is.
    """
    overlap = iou(targets.boxes, anchors)
    best, slot = overlap.max(1)
    highest = overlap.amax(2, keepdim=True)
    nearest = ((overlap == highest) & (highest > 0)).any(1)
    negative = (best < NEGATIVE) & ~ignored(anchors.expand(len(overlap), -1, -1), targets.ids < 0)
    labels = torch.where(negative, 0, -1)
    return torch.where(nearest | (best >= POSITIVE), 1, labels), slot


@torch.no_grad()
def choose(
    proposals: Proposals, targets: Targets, anchors: int, count: int, positives: int
) -> Samples:
    """Proposals and true boxes to train the heads on, `count` per image.

    Args:
        proposals: Of the RPN.
        targets: The aircraft.
        anchors: The number of anchors per image.
        count: Boxes to choose per image.
        positives: The largest number of positives among them.
    """
    is_aircraft = targets.labels > 0
    boxes = torch.cat([proposals.boxes, targets.boxes], 1)
    labels, slot = label_boxes(boxes, targets)
    labels = torch.where(torch.cat([proposals.exists, is_aircraft], 1), labels, -1)
    # A proposal has the random number of its anchor, which does not depend on the proposal's rank.
    random = uniform(targets.key, anchors + is_aircraft.shape[1], 2, 0)
    random = torch.cat([random[:, :anchors].gather(1, proposals.anchor), random[:, anchors:]], 1)
    chosen, exists = sample(labels, random, count, positives)
    labels, slot = labels.gather(1, chosen).clamp(min=0), slot.gather(1, chosen)
    return Samples(gather_rows(boxes, chosen), labels, slot, exists)


def label_boxes(boxes: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """The class of each box of [B,N,4], 0 ground, -1 ignored; the slot of its nearest aircraft."""
    best, slot = iou(targets.boxes, boxes).max(1)
    ground = torch.where(ignored(boxes, targets.ids < 0), -1, 0)
    return torch.where(best >= SAME_AIRCRAFT, targets.labels.gather(1, slot), ground), slot


def box_losses(
    logits: Tensor, codes: Tensor, samples: Samples, targets: Targets
) -> dict[str, Tensor]:
    """The losses of the box head: the class of each sample, and the code of its aircraft's box.

    Args:
        logits: Of the classes, [B·S,C].
        codes: Codes of a box for each class, [B·S,C,4].
        samples: The boxes that `logits` and `codes` were computed for.
        targets: The aircraft.
    """
    labels = samples.labels
    loss = F.cross_entropy(logits, labels.flatten(), reduction="none").view_as(samples.exists)
    codes = gather_rows(codes, labels.flatten()[:, None]).view_as(samples.boxes)
    wanted = encode(gather_rows(targets.boxes, samples.slot), samples.boxes, BOX_WEIGHTS)
    return {
        "loss_classifier": _mean(loss, samples.exists),
        "loss_box_reg": _mean(_box_loss(codes, wanted, labels > 0), samples.exists),
    }


def mask_loss(logits: Tensor, samples: Samples, targets: Targets) -> Tensor:
    """The loss of the mask head: which pixels of each positive sample belong to its aircraft.

    Args:
        logits: Of the samples' masks, [B·S,M,M].
        samples: Only the positive ones count.
        targets: The aircraft.
    """
    positive = samples.exists & (samples.labels > 0)
    # One image per box: the mask of its aircraft.
    masks = (targets.ids[:, None] == samples.slot[..., None, None] + 1).flatten(0, 1)
    boxes = as_rois(samples.boxes.flatten(0, 1)[:, None])
    wanted = roi_align(masks[:, None].to(boxes.dtype), boxes, logits.shape[-1])[:, 0]
    loss = F.binary_cross_entropy_with_logits(logits, wanted.to(logits.dtype), reduction="none")
    return _mean(loss.mean((1, 2)).view_as(positive), positive)


def _box_loss(codes: Tensor, wanted: Tensor, positive: Tensor) -> Tensor:
    """Smooth L1 of each positive box, 0 for the others: [B,N]."""
    wanted = torch.where(positive[..., None], wanted, 0)  # infinite without an aircraft
    loss = F.smooth_l1_loss(codes, wanted.to(codes.dtype), beta=SMOOTH, reduction="none").sum(-1)
    return loss * positive


def _mean(losses: Tensor, exists: Tensor) -> Tensor:
    """The mean over the images of each image's mean over its boxes that exist."""
    return ((losses * exists).sum(1) / exists.sum(1).clamp(min=1)).mean()
