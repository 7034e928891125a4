"""What Mask R-CNN learns: which boxes it trains on, and its five losses, in fixed shapes.

Each image's losses depend on that image alone, and a batch's are their mean. So several processes
or passes learn what one does. (torchvision takes the mean over the boxes of all images.)
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
    ignored,
    iou,
    sample,
    taken,
)
from mask.targets import Targets

POSITIVE, NEGATIVE = 0.7, 0.3  # IoU of an anchor with an aircraft
ANCHORS, POSITIVE_ANCHORS = 256, 128  # to train on, per image
SMOOTH = 1 / 9  # of the box losses: where L1 becomes quadratic


class Samples(NamedTuple):
    """Boxes to train the heads on, the positives first.

    boxes: [B,S,4]. labels: int64 [B,S], 0 ground. place: int64 [B,S], of the most similar aircraft
    in the targets. exists: bool [B,S].
    """

    boxes: Tensor
    labels: Tensor
    place: Tensor
    exists: Tensor


def rpn_losses(
    anchors: Tensor, objectness: Tensor, deltas: Tensor, targets: Targets
) -> dict[str, Tensor]:
    """Whether an anchor is at an aircraft, and what turns it into the aircraft's box.

    Args:
        anchors: [A,4].
        objectness: Logits [B,A].
        deltas: Codes of boxes [B,A,4].
        targets: The aircraft.
    """
    labels, place = label_anchors(anchors, targets)
    chance = uniform(targets.key, len(anchors), 1, 0)
    chosen, exists = sample(labels, chance, ANCHORS, POSITIVE_ANCHORS)
    positive = labels.gather(1, chosen) == 1
    logits = objectness.gather(1, chosen)
    loss = F.binary_cross_entropy_with_logits(logits, positive.to(logits.dtype), reduction="none")
    boxes = taken(targets.boxes, place.gather(1, chosen))
    box_loss = _box_loss(
        taken(deltas, chosen), encode(boxes, anchors[chosen], ANCHOR_WEIGHTS), positive
    )
    return {"loss_objectness": _mean(loss, exists), "loss_rpn_box_reg": _mean(box_loss, exists)}


@torch.no_grad()
def label_anchors(anchors: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """Labels [B,A], 1 positive, 0 negative, -1 neither, and the most similar aircraft's place.

    Positive are also the anchors most similar to an aircraft, however little they overlap it.
    """
    overlap = iou(targets.boxes, anchors)
    best, place = overlap.max(1)
    highest = overlap.amax(2, keepdim=True)
    nearest = ((overlap == highest) & (highest > 0)).any(1)
    negative = (best < NEGATIVE) & ~ignored(anchors.expand(len(overlap), -1, -1), targets.ids < 0)
    labels = torch.where(negative, 0, -1)
    return torch.where(nearest | (best >= POSITIVE), 1, labels), place


@torch.no_grad()
def choose(
    proposals: Proposals, targets: Targets, anchors: int, count: int, positives: int
) -> Samples:
    """Proposals and true boxes to train the heads on, `count` per image.

    Args:
        proposals: Of the RPN.
        targets: The aircraft.
        anchors: Their number.
        count: Boxes to choose per image.
        positives: The most positives among them.
    """
    real = targets.labels > 0
    boxes = torch.cat([proposals.boxes, targets.boxes], 1)
    labels, place = label_boxes(boxes, targets)
    labels = torch.where(torch.cat([proposals.exists, real], 1), labels, -1)
    # A proposal's chance is its anchor's, so that it does not depend on the proposal's rank.
    chance = uniform(targets.key, anchors + real.shape[1], 2, 0)
    chance = torch.cat([chance[:, :anchors].gather(1, proposals.anchor), chance[:, anchors:]], 1)
    chosen, exists = sample(labels, chance, count, positives)
    labels, place = labels.gather(1, chosen).clamp(min=0), place.gather(1, chosen)
    return Samples(taken(boxes, chosen), labels, place, exists)


def label_boxes(boxes: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """The class of each box [B,N,4], 0 ground, -1 if ignored; the most similar aircraft's place."""
    best, place = iou(targets.boxes, boxes).max(1)
    ground = torch.where(ignored(boxes, targets.ids < 0), -1, 0)
    return torch.where(best >= SAME_AIRCRAFT, targets.labels.gather(1, place), ground), place


def box_losses(
    logits: Tensor, codes: Tensor, samples: Samples, targets: Targets
) -> dict[str, Tensor]:
    """The class of each sample, and what turns it into the box of its aircraft.

    Args:
        logits: Of the classes, [B·S,C].
        codes: Of a box for each class, [B·S,C,4].
        samples: What they were computed for.
        targets: The aircraft.
    """
    labels = samples.labels
    loss = F.cross_entropy(logits, labels.flatten(), reduction="none").view_as(samples.exists)
    own = taken(codes, labels.flatten()[:, None]).view_as(samples.boxes)
    wanted = encode(taken(targets.boxes, samples.place), samples.boxes, BOX_WEIGHTS)
    return {
        "loss_classifier": _mean(loss, samples.exists),
        "loss_box_reg": _mean(_box_loss(own, wanted, labels > 0), samples.exists),
    }


def mask_loss(logits: Tensor, samples: Samples, targets: Targets) -> Tensor:
    """Which pixels of each positive sample belong to its aircraft.

    Args:
        logits: Of the samples' masks, [B·S,M,M].
        samples: At most the positives count.
        targets: The aircraft.
    """
    positive = samples.exists & (samples.labels > 0)
    # Each box has its aircraft's mask as an image of its own.
    masks = (targets.ids[:, None] == samples.place[..., None, None] + 1).flatten(0, 1)
    boxes = as_rois(samples.boxes.flatten(0, 1)[:, None])
    wanted = roi_align(masks[:, None].to(boxes.dtype), boxes, logits.shape[-1])[:, 0]
    loss = F.binary_cross_entropy_with_logits(logits, wanted.to(logits.dtype), reduction="none")
    return _mean(loss.mean((1, 2)).view_as(positive), positive)


def _box_loss(codes: Tensor, wanted: Tensor, positive: Tensor) -> Tensor:
    """Smooth L1 of each positive box, 0 for the others: [B,N]."""
    wanted = torch.where(positive[..., None], wanted, 0)  # without an aircraft it is infinite
    loss = F.smooth_l1_loss(codes, wanted.to(codes.dtype), beta=SMOOTH, reduction="none").sum(-1)
    return loss * positive


def _mean(losses: Tensor, exists: Tensor) -> Tensor:
    """The mean over the images of each image's mean over its boxes that exist."""
    return ((losses * exists).sum(1) / exists.sum(1).clamp(min=1)).mean()
