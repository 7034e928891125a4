"""Mask R-CNN (He et al. 2017) for images of one size, in fixed shapes from the pixels to the loss.

Read `forward` first; it follows the paper. All images of a batch take every step at once. Each step
has a fixed number of boxes per image, and a boolean tensor says which of them exist. So no shape
depends on values: training never waits for the device, and a step can be captured, compiled and
exported as a whole. (Only an eager step on a CPU, where nothing has to wait, skips the masks of
boxes that do not exist.) The mathematics is torchvision's, and the tests compare the two. The
differences are:

- images are one batch of one size and already normalised;
- boxes on ignored ground are neither positive nor negative;
- a hash of the image's key chooses the boxes to train on, like the random numbers of
  `common/augment.py`;
- the mask head trains on a fixed number of positives per image, and not on all;
- boxes are coded and losses are computed in float32, also with AMP;
- the losses of an image depend on that image alone (`mask/losses.py`).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mask.align import Pyramid
from mask.boxes import (
    ANCHOR_WEIGHTS,
    BOX_WEIGHTS,
    SAME_AIRCRAFT,
    SAME_PROPOSAL,
    Detections,
    Proposals,
    apply_where,
    as_rois,
    clip,
    decode,
    fill_index,
    gather_rows,
    has_min_side,
    precise,
    suppress,
)
from mask.losses import Samples, box_losses, choose, mask_loss, rpn_losses
from mask.targets import Targets


class MaskRCNN(nn.Module):
    """Images float [B,3,H,W], normalised → five losses; in eval mode detections and their masks.

    Args:
        backbone: Images → a dict of five levels of features, finest first, like torchvision's FPN.
        rpn_head, box_head, box_predictor, mask_head, mask_predictor: As in torchvision.
        cells: For each level the anchors around the point 0, 0: x1, y1, x2, y2 in pixels.
        proposals: Boxes per image that the RPN proposes; the heads train on half as many.
        mask_rois: Positives per image that the mask head trains on.
    """

    cells: Tensor
    least_score = 0.05  # of a detection
    most_detections = 100  # per image

    def __init__(
        self,
        backbone: nn.Module,
        rpn_head: nn.Module,
        box_head: nn.Module,
        box_predictor: nn.Module,
        mask_head: nn.Module,
        mask_predictor: nn.Module,
        cells: list[list[list[int]]],
        proposals: int,
        mask_rois: int,
    ) -> None:
        super().__init__()
        # Grouped like this because existing checkpoints use these names.
        self.dense = nn.ModuleDict({"backbone": backbone, "head": rpn_head})
        self.roi_heads = nn.ModuleDict(
            {
                "box_head": box_head,
                "box_predictor": box_predictor,
                "mask_head": mask_head,
                "mask_predictor": mask_predictor,
            }
        )
        # Integers, because code that averages or saves BatchNorm's statistics takes float buffers.
        self.register_buffer("cells", torch.tensor(cells), persistent=False)
        self.proposals = proposals
        self.samples = max(1, proposals // 2)
        self.positives = max(1, self.samples // 4)
        self.mask_rois = min(mask_rois, self.positives)

    def forward(self, images: Tensor, targets: Targets | None = None) -> Any:
        if not self.training:
            pyramid, detections = self.detect(images)
            labels = detections.labels
            masks = self.outline(pyramid, as_rois(detections.boxes), labels.flatten())
            return detections, masks.unflatten(0, labels.shape)
        assert targets is not None
        pyramid, anchors, objectness, deltas = self.scan(images)
        proposals = self.propose(anchors, objectness.detach(), deltas.detach(), images)
        losses = rpn_losses(torch.cat(anchors), objectness, deltas, targets)

        count = objectness.shape[1]
        samples = choose(proposals, targets, count, self.samples, self.positives)
        index = fill_index(samples.exists.flatten())
        logits, codes = self.classify(pyramid, as_rois(samples.boxes)[index])
        losses |= box_losses(logits, codes, samples, targets)

        samples = Samples(*(value[:, : self.mask_rois] for value in samples))
        rois, labels = as_rois(samples.boxes), samples.labels.flatten()
        masks = apply_where(
            lambda index: self.mask_logits(pyramid, rois[index], labels[index]),
            samples.exists.flatten() & (labels > 0),
        )
        return losses | {"loss_mask": mask_loss(masks, samples, targets)}

    def scan(self, images: Tensor) -> tuple[Pyramid, list[Tensor], Tensor, Tensor]:
        """Features; anchors [A,4] of each level; their objectness [B,ΣA] and deltas [B,ΣA,4]."""
        size = _size(images)
        levels = list(self.dense["backbone"](images).values())
        scores, codes = self.dense["head"](levels)
        # In the order of `_grid`: row, column, anchor.
        scores = [score.permute(0, 2, 3, 1).flatten(1) for score in scores]
        codes = [code.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3) for code in codes]
        pairs = zip(self.cells.unbind(), levels, strict=True)
        anchors = [_grid(cells, level, size) for cells, level in pairs]
        objectness, deltas = precise(torch.cat(scores, 1)), precise(torch.cat(codes, 1))
        return Pyramid(levels[:4], size), anchors, objectness, deltas

    @torch.no_grad()
    def propose(
        self, anchors: list[Tensor], objectness: Tensor, deltas: Tensor, images: Tensor
    ) -> Proposals:
        """The best boxes of each image after suppression within each level."""
        boxes = clip(decode(deltas, torch.cat(anchors), ANCHOR_WEIGHTS), _size(images))
        candidates = 2 * self.proposals if self.training else self.proposals
        candidates = min(candidates, len(anchors[0]))  # the finest level has the most
        scores, indices, start = [], [], 0
        for level in anchors:
            level_scores = objectness[:, start : start + len(level)]
            best, index = level_scores.topk(min(candidates, len(level)), 1)
            missing = candidates - best.shape[1]
            scores.append(F.pad(best, (0, missing), value=-torch.inf))
            indices.append(F.pad(index + start, (0, missing)))
            start += len(level)
        best, index = torch.stack(scores, 1), torch.stack(indices, 1)  # [B,levels,candidates]
        candidate_boxes = gather_rows(boxes, index.flatten(1)).view(-1, candidates, 4)
        exists = (best.flatten(0, 1) > -torch.inf) & has_min_side(candidate_boxes, 1e-3)
        kept = suppress(candidate_boxes, exists, SAME_PROPOSAL)
        scored = torch.where(kept.view_as(best), best, -torch.inf).flatten(1)
        best, order = scored.topk(min(self.proposals, start), 1)
        exists = best > -torch.inf
        anchor = index.flatten(1).gather(1, order)
        chosen = torch.where(exists[..., None], gather_rows(boxes, anchor), 0)  # also replaces nan
        return Proposals(chosen, exists, anchor)

    def classify(self, pyramid: Pyramid, rois: Tensor) -> tuple[Tensor, Tensor]:
        """For boxes [R,5] the logits of the classes [R,C], and box codes for each class [R,C,4]."""
        features = self.roi_heads["box_head"](pyramid.pool(rois, 7))
        logits, codes = self.roi_heads["box_predictor"](features)
        return precise(logits), precise(codes).unflatten(1, (-1, 4))

    def mask_logits(self, pyramid: Pyramid, rois: Tensor, labels: Tensor) -> Tensor:
        """The masks of boxes [R,5] of classes [R]: logits [R,28,28]."""
        features = self.roi_heads["mask_head"](pyramid.pool(rois, 14))
        logits = self.roi_heads["mask_predictor"](features)
        return precise(gather_rows(logits, labels[:, None])[:, 0])

    def detect(self, images: Tensor) -> tuple[Pyramid, Detections]:
        """The best boxes of each image after suppression within each class."""
        pyramid, anchors, objectness, deltas = self.scan(images)
        proposals = self.propose(anchors, objectness, deltas, images)
        batch, count = proposals.exists.shape
        logits, codes = self.classify(pyramid, as_rois(proposals.boxes))
        # [B,C-1,P]: each class but the ground has its own boxes and scores.
        scores = logits.softmax(1)[:, 1:].unflatten(0, (batch, count)).mT
        codes = codes[:, 1:].unflatten(0, (batch, count)).transpose(1, 2)
        boxes = clip(decode(codes, proposals.boxes[:, None], BOX_WEIGHTS), _size(images))
        valid = (scores > self.least_score) & has_min_side(boxes, 1e-2) & proposals.exists[:, None]
        scores, order = torch.where(valid, scores, 0).flatten(0, 1).sort(1, descending=True)
        boxes = gather_rows(boxes.flatten(0, 1), order)
        kept = suppress(boxes, scores > 0, SAME_AIRCRAFT)
        scores = torch.where(kept, scores, 0).view(batch, -1)
        best, index = scores.topk(min(self.most_detections, scores.shape[1]), 1)
        exists = (best > 0)[..., None]
        boxes = torch.where(exists, gather_rows(boxes.view(batch, -1, 4), index), 0)
        return pyramid, Detections(boxes, best, index // count + 1)

    def outline(self, pyramid: Pyramid, rois: Tensor, labels: Tensor) -> Tensor:
        """The masks of boxes [R,5] of classes [R]: probabilities [R,28,28]."""
        return self.mask_logits(pyramid, rois, labels).sigmoid()


def _grid(cells: Tensor, level: Tensor, size: tuple[int, int]) -> Tensor:
    """The anchors of a level, float32 [h·w·A,4]: `cells` [A,4] around each of its points."""
    height, width = _size(level)
    y = torch.arange(height, device=cells.device) * (size[0] // height)
    x = torch.arange(width, device=cells.device) * (size[1] // width)
    y, x = torch.meshgrid(y, x, indexing="ij")
    return (torch.stack([x, y, x, y], -1)[:, :, None] + cells).flatten(0, 2).float()


def _size(images: Tensor) -> tuple[int, int]:
    return images.shape[-2], images.shape[-1]
