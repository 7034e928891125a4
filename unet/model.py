"""UNet (Ronneberger et al. 2015) on any encoder of segmentation_models_pytorch."""

from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import torch
from segmentation_models_pytorch.encoders import encoders
from torch import Tensor, nn
from torch.nn import functional as F

from common.checkpoint import load_weights
from common.cli import UserError
from common.metrics import IGNORE

STRIDE = 32  # sides of an input must be multiples of it
AIRCRAFT_WEIGHT = (
    3.0  # of a class's pixels against the ground's, which are some forty times as many
)


def build_model(
    encoder: str, num_classes: int, weights_backbone: str = "none", norm: str = "batch"
) -> nn.Module:
    """A UNet that maps float [B,3,H,W] to logits [B,num_classes,H,W].

    Args:
        encoder: Any name of smp, `resnet34` for one.
        num_classes: The ground included.
        weights_backbone: `imagenet` (downloaded once), `none` (random), or a file: the encoder's
            state dict, or a checkpoint of a UNet with the same encoder.
        norm: `batch`, or `group`, whose statistics are each image's own and which therefore does
            not care how small a process's batch is.

    Raises:
        UserError: Unknown encoder, no network for the weights, or a file that does not fit.
    """
    if encoder not in encoders and not encoder.startswith("tu-"):
        raise UserError(
            f"--encoder {encoder} is not known to segmentation_models_pytorch; resnet18, resnet34, "
            "mobilenet_v2, timm-… and tu-… are."
        )
    try:
        pretrained = "imagenet" if weights_backbone == "imagenet" else None
        model = smp.Unet(encoder, encoder_weights=pretrained, classes=num_classes)
    except Exception as error:  # no two libraries below name a missing network alike
        if weights_backbone != "imagenet":
            raise
        raise UserError(
            f"the ImageNet weights of {encoder} could not be had ({type(error).__name__}): without "
            "a network use --weights-backbone none, or a file."
        ) from error
    if weights_backbone not in ("imagenet", "none"):
        _load_encoder(model.encoder, Path(weights_backbone))
    return _group_norm(model) if norm == "group" else model


def from_checkpoint(content: dict[str, Any]) -> nn.Module:
    """The trained network of a checkpoint that `common.checkpoint.load` returned."""
    args = content["args"]
    model = build_model(args["encoder"], len(content["classes"]), norm=args["norm"])
    load_weights(model, content)
    return model


def loss_fn(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy plus Dice (Milletari et al. 2016), both averages over the images.

    Every term is a mean over the B images of something each image has by itself. So the loss of a
    global batch is the mean of its parts' losses, however many processes share it; a mean over the
    valid pixels of each part, as `cross_entropy` takes it, would weigh the parts unequally.

    Args:
        model: images → logits [B,C,H,W].
        images: float32 [B,3,H,W], normalised.
        targets: int64 [B,H,W], class ids, `IGNORE` where nothing is learnt.

    Returns:
        A float32 scalar; 0 for a batch of nothing but `IGNORE`.
    """
    logits = model(images).float()  # sums over 10^5 pixels leave the range of 16-bit floats
    valid = targets != IGNORE
    known = torch.where(valid, targets, 0)
    log_p = F.log_softmax(logits, 1)
    weight = torch.where(known > 0, AIRCRAFT_WEIGHT, 1.0) * valid
    cross_entropy = -(log_p.gather(1, known[:, None])[:, 0] * weight).mean()

    truth = F.one_hot(known, logits.shape[1]).permute(0, 3, 1, 2)[:, 1:] * valid[:, None]
    p = log_p[:, 1:].exp() * valid[:, None]
    overlap = (p * truth).sum((2, 3))
    total = p.sum((2, 3)) + truth.sum((2, 3))
    # Only where the class occurs: an empty image has no overlap to gain.
    occurs = truth.amax((2, 3)) > 0
    dice = torch.where(occurs, 1 - (2 * overlap + 1) / (total + 1), 0.0)
    return cross_entropy + dice.mean()


def predict(model: nn.Module, images: Tensor) -> Tensor:
    """The likeliest class of every pixel: float [B,3,H,W] → uint8 [B,H,W]."""
    return model(images).argmax(1).to(torch.uint8)


def probabilities(model: nn.Module, images: Tensor) -> Tensor:
    """What `common.windows` blends: float [B,3,H,W] → float32 [B,C,H,W] that sums to 1 over C."""
    return model(images).float().softmax(1)


def _load_encoder(encoder: nn.Module, file: Path) -> None:
    if not file.is_file():
        raise UserError(f"--weights-backbone: '{file}' is neither imagenet, none nor a file.")
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
        if "model" in weights:  # a checkpoint of ours holds the whole network
            weights = {
                name.removeprefix("encoder."): tensor
                for name, tensor in weights["model"].items()
                if name.startswith("encoder.")
            }
        encoder.load_state_dict(weights)
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"--weights-backbone: '{file}' does not fit this encoder: {reason}"
        ) from error


def _group_norm(module: nn.Module) -> nn.Module:
    """Put GroupNorm (Wu and He 2018) with 16 channels a group in place of every BatchNorm."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            channels = child.num_features
            groups = channels // 16 if channels % 16 == 0 else 1
            setattr(module, name, nn.GroupNorm(groups, channels))
        else:
            _group_norm(child)
    return module
