"""Mask R-CNN (He et al. 2017) for tiles: torchvision's parts, without what a tile does not need.

torchvision's `MaskRCNN` takes a list of pictures of any size and resizes, normalises and pads them.
Tiles are one batch of one size and already normalised. What is different here:

- the dense part (backbone, FPN, RPN head) is one module with one input and a fixed number of
  outputs, which can be captured in a CUDA graph or compiled, as in NVIDIA's MLPerf entries;
- anchors are made once per size and in float32, and boxes are coded in float32, also with AMP;
- boxes that lie on ignored ground are neither positive nor negative;
- a hash of the tile's key chooses the boxes to train on, as for all chance in `common/augment.py`:
  the choice does not depend on the process, and no generator state has to be saved;
- masks return to where they were seen in the image, to a fraction of a pixel;
- constants are made once; all of this together removes most waits for the device
  (`benchmarks/syncs.py`).
"""

from collections import OrderedDict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.models.detection import backbone_utils
from torchvision.models.detection.faster_rcnn import (
    FastRCNNConvFCHead,
    FastRCNNPredictor,
    TwoMLPHead,
)
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import (
    RPNHead,
)
from torchvision.ops import MultiScaleRoIAlign

from common.backbones import imagenet_weights, load_backbone, normalised_by
from common.distributed import all_reduce_sum
from common.run.checkpoint import load_weights
from mask.rcnn import Anchors, Coder, Dense, Heads, Proposals, Sampler, paste
from mask.targets import Targets

NAME = "mask"
STRIDE = 32  # sides of a training crop must be multiples of it
BACKBONES = ("resnet50", "resnet50_v2", "resnet18", "mobilenet_v3_large")
# Sides of square anchors on the five levels of the pyramid, whose strides are 4 to 64. Boxes from a
# half to nearly three times of each can match, so aircraft of 7 to 270 pixels.
ANCHORS = ((12,), (24,), (48,), (96,), (192,))
RATIOS = (0.7, 1.0, 1.4)
CHANNELS = 256  # of the pyramid's levels


class TileMaskRCNN(nn.Module):
    """Images float [B,3,H,W], normalised, of one size → losses, or detections in eval mode."""

    def __init__(self, dense: Dense, rpn: "Proposals", roi_heads: "Heads") -> None:
        super().__init__()
        self.dense, self.rpn, self.roi_heads = dense, rpn, roi_heads

    def forward(self, images: Tensor, targets: Targets | None = None) -> Any:
        size = (images.shape[-2], images.shape[-1])
        sizes = [size] * len(images)
        outputs = self.dense(images)
        levels = len(outputs) // 3
        features = OrderedDict(zip(("0", "1", "2", "3", "pool"), outputs[:levels], strict=True))
        batch = ImageList(images, sizes)
        boxes, losses = self.rpn(batch, features, targets, outputs[levels:])
        detections, more = self.roi_heads(features, boxes, sizes, targets)
        if self.training:
            return self._shared(losses | more)
        for found in detections:
            found["masks"] = paste(found["masks"][:, 0], found["boxes"], size)
        return detections

    def _shared(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weight this process's losses by its share of the samples.

        Each loss is a mean over the samples of this process, and DDP takes the mean over the
        processes, so a process with few aircraft would give each of them more weight. One
        all-reduce of three numbers makes it the mean over all samples, as with one process.
        """
        if not dist.is_initialized():
            return losses
        rpn, heads = self.rpn.fg_bg_sampler, self.roi_heads.fg_bg_sampler
        own = torch.stack([rpn.taken[0], heads.taken[0], heads.taken[1]]).float()
        weight = own * dist.get_world_size() / all_reduce_sum(own.clone()).clamp(min=1)
        of_loss = {
            "loss_objectness": weight[0],
            "loss_rpn_box_reg": weight[0],
            "loss_classifier": weight[1],
            "loss_box_reg": weight[1],
            "loss_mask": weight[2],
        }
        return {name: loss * of_loss[name] for name, loss in losses.items()}


def build_model(
    backbone: str,
    num_classes: int,
    weights_backbone: str = "none",
    norm: str = "batch",
    proposals: int = 1000,
) -> TileMaskRCNN:
    """A Mask R-CNN on a feature pyramid with strides of 4 to 64.

    Args:
        backbone: One of `BACKBONES`. `resnet50_v2` has the deeper heads of Li et al. 2021
            ("Benchmarking detection transfer learning with vision transformers"); its pyramid and
            mask head, and `resnet18`'s, are normalised, without which random weights learn slowly
            (He et al. 2019, "Rethinking ImageNet pre-training").
        num_classes: Including the ground.
        weights_backbone: `imagenet` (downloaded once), `none` (random), or a file, see
            `common.backbones.load_backbone`.
        norm: `batch` or `group`.
        proposals: The number kept per image after NMS; the heads train on half as many.

    Raises:
        UserError: The weights cannot be downloaded, or the file does not fit.
    """
    v2 = backbone == "resnet50_v2"
    norm_layer = nn.BatchNorm2d if v2 or backbone == "resnet18" else None
    pretrained = "IMAGENET1K_V1" if weights_backbone == "imagenet" else None
    with imagenet_weights(weights_backbone, backbone):
        pyramid = _pyramid(backbone.removesuffix("_v2"), pretrained, norm_layer)
    load_backbone(pyramid.body, weights_backbone, "dense.backbone.body")
    boxes: nn.Module = TwoMLPHead(CHANNELS * 7**2, 1024)
    if v2:
        boxes = FastRCNNConvFCHead((CHANNELS, 7, 7), [256] * 4, [1024], norm_layer=norm_layer)
    head = RPNHead(CHANNELS, len(RATIOS), conv_depth=2 if v2 else 1)
    rpn = Proposals(
        Anchors(ANCHORS, (RATIOS,) * len(ANCHORS)),
        nn.Identity(),  # the head is in the dense part
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 2 * proposals, "testing": proposals},
        post_nms_top_n={"training": proposals, "testing": proposals},
        nms_thresh=0.7,
    )
    rpn.box_coder, rpn.fg_bg_sampler = Coder((1.0, 1.0, 1.0, 1.0)), Sampler(256, 0.5, salt=1)
    names = ["0", "1", "2", "3"]
    heads = Heads(
        MultiScaleRoIAlign(names, output_size=7, sampling_ratio=2),
        boxes,
        FastRCNNPredictor(1024, num_classes),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=max(1, proposals // 2),
        positive_fraction=0.25,
        bbox_reg_weights=None,
        score_thresh=0.05,
        nms_thresh=0.5,
        detections_per_img=100,
        mask_roi_pool=MultiScaleRoIAlign(names, output_size=14, sampling_ratio=2),
        mask_head=MaskRCNNHeads(CHANNELS, [256] * 4, 1, norm_layer=norm_layer),
        mask_predictor=MaskRCNNPredictor(256, 256, num_classes),
    )
    heads.box_coder = Coder((10.0, 10.0, 5.0, 5.0))
    heads.fg_bg_sampler = Sampler(max(1, proposals // 2), 0.25, salt=2)
    model = TileMaskRCNN(Dense(pyramid, head), rpn, heads)
    normalised_by(norm, model)
    return model


def _pyramid(backbone: str, weights: str | None, norm_layer: type[nn.Module] | None) -> Any:
    """The backbone with its FPN, which `norm_layer` normalises; every layer is trained."""
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


def from_checkpoint(content: dict[str, Any]) -> TileMaskRCNN:
    """The trained network of a checkpoint that `common.run.checkpoint.load` returned."""
    args = content["args"]
    model = build_model(
        args["backbone"],
        len(content["classes"]),
        norm=args["norm"],
        proposals=args["proposals"],
    )
    load_weights(model, content)
    return model


def loss_fn(model: nn.Module, images: Tensor, targets: Targets) -> Tensor:
    """The sum of the five losses: objectness, two of boxes, class and mask. A float32 scalar.

    Args:
        model: In training mode.
        images: float32 [B,3,H,W], normalised.
        targets: From `mask.targets.instance_targets`, each with a `key`, an int64 scalar that is
            unique to the tile and the epoch.
    """
    losses = model(images, targets).values()
    return torch.stack([loss.float() for loss in losses]).sum()


def predict(model: nn.Module, images: Tensor) -> Targets:
    """Detections above a score of 0.05, best first, at most 100 per image.

    Returns:
        B dicts of `boxes` float32 [N,4] x1, y1, x2, y2, `labels` int64 [N], `scores` float32 [N]
        and `masks` bool [N,H,W].
    """
    return model(images)
