"""FCN (Long, Shelhamer and Darrell 2015) on a dilated ResNet, as torchvision builds it."""

from typing import Any

from torch import Tensor, nn
from torchvision.models.segmentation import fcn_resnet50, fcn_resnet101

from common.backbones import imagenet_weights, load_backbone, normalised_by, with_dropout
from common.run.checkpoint import load_weights
from common.semantic import likeliest, main_head, softmax, two_head_loss

NAME = "fcn"
STRIDE = 8  # sides of a training crop must be multiples of it
BACKBONES = {"resnet50": fcn_resnet50, "resnet101": fcn_resnet101}


def build_model(
    backbone: str,
    num_classes: int,
    weights_backbone: str = "none",
    norm: str = "batch",
    dropout: float | None = None,
) -> nn.Module:
    """An FCN that maps float [B,3,H,W] to `{"out", "aux"}`, logits [B,num_classes,H,W] each.

    Args:
        backbone: `resnet50` or `resnet101`; its last two stages are dilated, not strided.
        num_classes: Including the ground.
        weights_backbone: `imagenet` (downloaded once), `none` (random), or a file, see
            `common.backbones.load_backbone`.
        norm: `batch` or `group`.
        dropout: Before the last layer of both heads; None means torchvision's 0.1.

    Raises:
        UserError: The weights cannot be downloaded, or the file does not fit.
    """
    pretrained = "IMAGENET1K_V1" if weights_backbone == "imagenet" else None
    with imagenet_weights(weights_backbone, backbone):
        model = BACKBONES[backbone](
            weights=None, weights_backbone=pretrained, num_classes=num_classes, aux_loss=True
        )
    load_backbone(model.backbone, weights_backbone)
    return with_dropout(dropout, normalised_by(norm, model))


def from_checkpoint(content: dict[str, Any]) -> nn.Module:
    """The trained network of a checkpoint that `common.run.checkpoint.load` returned."""
    args = content["args"]
    model = build_model(args["backbone"], len(content["classes"]), norm=args["norm"])
    load_weights(model, content)
    return model


def loss_fn(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """The loss of both heads on float [B,3,H,W] and int64 [B,H,W]: a float32 scalar."""
    return two_head_loss(model(images), targets)


def predict(model: nn.Module, images: Tensor) -> Tensor:
    """The most likely class of every pixel: float [B,3,H,W] → uint8 [B,H,W]."""
    return likeliest(main_head(model, images))


def probabilities(model: nn.Module, images: Tensor) -> Tensor:
    """What `predict.windows` blends: float [B,3,H,W] → float32 [B,C,H,W] that sums to 1 over C."""
    return softmax(main_head(model, images))
