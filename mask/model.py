"""Mask R-CNN (He et al. 2017) on a feature pyramid: its backbones, loss and prediction.

The network itself is in `mask/rcnn.py`.
"""

import math
from typing import Any

import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn
from torch.backends import cudnn
from torch.nn import functional as F
from torchvision.models import resnet
from torchvision.models.detection import backbone_utils
from torchvision.models.detection.faster_rcnn import (
    FastRCNNConvFCHead,
    FastRCNNPredictor,
    TwoMLPHead,
)
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from common.backbones import imagenet_weights, load_backbone, normalised_by, on_encoder
from common.run.checkpoint import load_weights
from mask.boxes import paste
from mask.rcnn import MaskRCNN
from mask.targets import Targets

NAME = "mask"
STRIDE = 32  # sides of a training crop must be multiples of it
BACKBONES = ("resnet50", "resnet50_v2", "resnet18", "mobilenet_v3_large")  # torchvision's
# Sides of square anchors on the five levels of the pyramid, whose strides are 4 to 64. An anchor
# matches boxes of half to nearly three times its side, so together aircraft of 7 to 270 pixels.
ANCHORS = (12, 24, 48, 96, 192)
RATIOS = (0.7, 1.0, 1.4)  # height over width
CHANNELS = 256  # of the pyramid's levels and the convolutions on them
MASK_ROIS = 25  # all positives of 200 proposals
OUTPUTS = ("boxes", "scores", "labels", "masks", "exists")  # of an exported network


def build_model(
    backbone: str,
    num_classes: int,
    weights_backbone: str = "none",
    norm: str = "batch",
    proposals: int = 1000,
    mask_rois: int = MASK_ROIS,
) -> MaskRCNN:
    """A Mask R-CNN on a feature pyramid with strides of 4 to 64.

    Args:
        backbone: One of `BACKBONES`, or an encoder of segmentation_models_pytorch. `resnet50_v2`
            has the deeper heads of Li et al. 2021 ("Benchmarking detection transfer learning with
            vision transformers"). The pyramid and the mask head have BatchNorm, without which
            random weights learn slowly (He et al. 2019, "Rethinking ImageNet pre-training"), but
            not those on `resnet50` and `mobilenet_v3_large`, as in torchvision.
        num_classes: Including the ground.
        weights_backbone: `imagenet` (downloaded once), `none` (random), or a file (see
            `common.backbones.load_backbone`).
        norm: `batch` or `group`.
        proposals: The number kept per image after NMS; the heads train on half as many.
        mask_rois: Positives per image that the mask head trains on, at most an eighth of the
            proposals.

    Raises:
        UserError: Unknown or unsuitable backbone, the weights cannot be downloaded, or the file
            does not fit.
    """
    v2 = backbone == "resnet50_v2"
    norm_layer = None if backbone in ("resnet50", "mobilenet_v3_large") else nn.BatchNorm2d
    if backbone in BACKBONES:
        pretrained = "IMAGENET1K_V1" if weights_backbone == "imagenet" else None
        with imagenet_weights(weights_backbone, backbone):
            pyramid = _pyramid(backbone.removesuffix("_v2"), pretrained, norm_layer)
    else:
        pyramid = on_encoder("--backbone", backbone, weights_backbone, EncoderWithFPN)
    load_backbone(pyramid.body, weights_backbone)
    box_head: nn.Module = TwoMLPHead(CHANNELS * 7**2, 1024)
    if v2:
        box_head = FastRCNNConvFCHead(
            (CHANNELS, 7, 7), [CHANNELS] * 4, [1024], norm_layer=norm_layer
        )
    model = MaskRCNN(
        backbone=pyramid,
        rpn_head=RPNHead(CHANNELS, len(RATIOS), conv_depth=2 if v2 else 1),
        box_head=box_head,
        box_predictor=FastRCNNPredictor(1024, num_classes),
        mask_head=MaskRCNNHeads(CHANNELS, [CHANNELS] * 4, 1, norm_layer=norm_layer),
        mask_predictor=MaskRCNNPredictor(CHANNELS, CHANNELS, num_classes),
        cells=[[_anchor(side, ratio) for ratio in RATIOS] for side in ANCHORS],
        proposals=proposals,
        mask_rois=mask_rois,
    )
    normalised_by(norm, model)
    return model


def _pyramid(backbone: str, weights: str | None, norm_layer: type[nn.Module] | None) -> Any:
    """The backbone with its FPN, normalised by `norm_layer`; every layer is trained."""
    if backbone == "mobilenet_v3_large":
        return backbone_utils.mobilenet_backbone(
            backbone_name=backbone,
            weights=weights,
            fpn=True,
            norm_layer=nn.BatchNorm2d,
            trainable_layers=6,
            returned_layers=[1, 2, 3, 5],  # the stages with strides 4, 8, 16, 32
        )
    body = getattr(resnet, backbone)(weights=weights, norm_layer=nn.BatchNorm2d)
    layers = {f"layer{k}": str(k - 1) for k in (1, 2, 3, 4)}
    widths = [body.inplanes // 8 * 2**k for k in range(4)]
    return backbone_utils.BackboneWithFPN(body, layers, widths, CHANNELS, norm_layer=norm_layer)


class EncoderWithFPN(nn.Module):
    """An encoder of smp with an FPN and BatchNorm; torchvision's names and order of parts.

    Args:
        name: Of an encoder whose features have the strides 4, 8, 16 and 32, too.
        encoder_weights: smp's name of its weights, or None.
    """

    def __init__(self, name: str, encoder_weights: str | None) -> None:
        super().__init__()
        self.body: Any = smp.encoders.get_encoder(name, weights=encoder_weights)
        widths, pool = self.body.out_channels[2:], LastLevelMaxPool()
        self.fpn = FeaturePyramidNetwork(widths, CHANNELS, pool, norm_layer=nn.BatchNorm2d)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images float [B,3,H,W] → five levels [B,CHANNELS,H/s,W/s], with strides s of 4 to 64."""
        levels = self.body(images)[2:]  # without the image itself, and without the stride 2
        for level, stride in zip(levels, (4, 8, 16, 32), strict=True):
            if level.shape[-1] * stride != images.shape[-1]:
                raise ValueError("the strides of its features are not 4, 8, 16 and 32")
        return self.fpn({str(k): level for k, level in enumerate(levels)})


def _anchor(side: int, ratio: float) -> list[int]:
    """The box around the point 0, 0 with the area side² and this ratio, in whole pixels."""
    height, width = side * math.sqrt(ratio), side / math.sqrt(ratio)
    return [round(edge / 2) for edge in (-width, -height, width, height)]


def from_checkpoint(
    content: dict[str, Any], most_detections: int = MaskRCNN.most_detections
) -> MaskRCNN:
    """The trained network of a checkpoint that `common.run.checkpoint.load` returned.

    Args:
        most_detections: Per image.
    """
    args = content["args"]
    model = build_model(
        args["backbone"],
        len(content["classes"]),
        norm=args["norm"],
        proposals=args["proposals"],
        mask_rois=args.get("mask_rois", MASK_ROIS),  # missing in early checkpoints
    )
    load_weights(model, content)
    model.most_detections = most_detections
    return model


def loss_fn(model: nn.Module, images: Tensor, targets: Targets) -> Tensor:
    """The sum of the five losses (objectness, RPN box, class, box, mask): a float32 scalar.

    Args:
        model: In training mode.
        images: float32 [B,3,H,W], normalised.
        targets: From `mask.targets.training_views`.
    """
    return torch.stack(list(model(images, targets).values())).sum()


def predict(model: Any, images: Tensor) -> list[dict[str, Tensor]]:
    """Detections above `model.least_score`, best first, at most `model.most_detections` per image.

    Waits for the device once, for the number of detections, because only these get masks.

    Args:
        model: In evaluation mode.
        images: float32 [B,3,H,W], normalised.

    Returns:
        B dicts of `boxes` float32 [N,4] x1, y1, x2, y2, `labels` int64 [N], `scores` float32 [N]
        and `masks` bool [N,H,W].
    """
    size = images.shape[-2], images.shape[-1]
    pyramid, detections = model.detect(images)
    counts = (detections.scores > 0).sum(1).tolist()
    boxes, scores, labels = (
        [value[:count] for value, count in zip(values, counts, strict=True)]
        for values in detections
    )
    rois = torch.cat([F.pad(value, (1, 0), value=i) for i, value in enumerate(boxes)])
    # The number of boxes varies: cuDNN would search for the fastest algorithm in every call.
    search, cudnn.benchmark = cudnn.benchmark, False
    masks = model.outline(pyramid, rois, torch.cat(labels))
    cudnn.benchmark = search
    values = zip(boxes, scores, labels, masks.split(counts), strict=True)
    return [_pasted(*of_image, size) for of_image in values]


def outputs(model: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
    """What an exported network returns, named by `OUTPUTS`: D boxes for each image.

    Args:
        model: In evaluation mode.
        images: float32 [B,3,H,W], normalised.

    Returns:
        boxes float32 [B,D,4], scores float32 [B,D], labels int64 [B,D], masks float32 [B,D,28,28]
        of probabilities in each box, and bool [B,D]: whether the box is a detection.
    """
    detections, masks = model(images)
    return *detections, masks, detections.scores > 0


def from_outputs(*values: Tensor, size: int) -> list[dict[str, Tensor]]:
    """What `predict` returns, made from `outputs` for images of `size` x `size` pixels."""
    return [
        _pasted(boxes[exists], scores[exists], labels[exists], masks[exists], (size, size))
        for boxes, scores, labels, masks, exists in zip(*values, strict=True)
    ]


def _pasted(
    boxes: Tensor, scores: Tensor, labels: Tensor, masks: Tensor, size: tuple[int, int]
) -> dict[str, Tensor]:
    return {"boxes": boxes, "labels": labels, "scores": scores, "masks": paste(masks, boxes, size)}
