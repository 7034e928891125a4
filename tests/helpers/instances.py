"""Batches as Mask R-CNN trains on, and torchvision's network on the same modules."""

import torch
from torch.nn import functional as F
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign

from benchmarks.lib.synthetic import noise_tiles
from common.augment import normalise
from mask.model import ANCHORS, RATIOS
from mask.targets import instance_targets

CPU = torch.device("cpu")
FINEST = ["0", "1", "2", "3"]


def batch_of(count, side=96, ignore=True):
    """Images of noise and their targets."""
    batch = noise_tiles(count, side, CPU)
    if not ignore:
        batch.ids[batch.ids == 255] = 0
    return normalise(batch.images).contiguous(), instance_targets(batch)


def as_dicts(targets):
    """Targets as torchvision takes them."""
    listed = []
    for boxes, labels, ids, _ in zip(*targets, strict=True):
        count = int((labels > 0).sum())
        masks = (ids[None] == torch.arange(1, count + 1)[:, None, None]).byte()
        listed.append({"boxes": boxes[:count], "labels": labels[:count], "masks": masks})
    return listed


def torchvisions(model, side):
    """torchvision's Mask R-CNN with the modules of ours."""
    sides = [(side,) for side in ANCHORS]
    return detection.MaskRCNN(
        model.dense["backbone"],
        min_size=side,
        max_size=side,
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
        rpn_anchor_generator=AnchorGenerator(sides, (RATIOS,) * len(sides)),
        rpn_head=model.dense["head"],
        rpn_pre_nms_top_n_train=2 * model.proposals,
        rpn_post_nms_top_n_train=model.proposals,
        rpn_pre_nms_top_n_test=model.proposals,
        rpn_post_nms_top_n_test=model.proposals,
        box_batch_size_per_image=model.samples,
        box_roi_pool=MultiScaleRoIAlign(FINEST, output_size=7, sampling_ratio=2),
        box_head=model.roi_heads["box_head"],
        box_predictor=model.roi_heads["box_predictor"],
        mask_roi_pool=MultiScaleRoIAlign(FINEST, output_size=14, sampling_ratio=2),
        mask_head=model.roi_heads["mask_head"],
        mask_predictor=model.roi_heads["mask_predictor"],
    )


def detect_with(theirs, images):
    """The detections of torchvision's network, with masks as probabilities [N,1,28,28]."""
    sizes = [tuple(images.shape[-2:])] * len(images)
    features = theirs.backbone(images)
    proposals, _ = theirs.rpn(ImageList(images, sizes), features)
    return theirs.roi_heads(features, proposals, sizes)[0]


def numbered(crops):
    """What `mask.model.predict` returns, for blobs whose red is their number."""
    found = []
    for crop in crops:
        ids = F.pad(crop[..., 0].long(), (0, 64 - crop.shape[1]))
        ids = F.pad(ids, (0, 0, 0, 64 - len(ids)))
        numbers = [int(n) for n in ids.unique() if n > 0]
        masks = torch.stack([ids == n for n in numbers]) if numbers else torch.zeros(0, 64, 64) > 0
        scores = torch.tensor([0.9 - 0.001 * n for n in numbers])
        labels = torch.ones(len(numbers), dtype=torch.long)
        found.append({"masks": masks, "scores": scores, "labels": labels})
    return found
