"""UNet (Ronneberger et al. 2015) on any encoder of segmentation_models_pytorch."""

from collections.abc import Sequence
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torch
from segmentation_models_pytorch.encoders import encoders
from torch import Tensor, nn

from common.backbones import imagenet_weights, load_backbone, normalised_by
from common.cli import UserError
from common.run.checkpoint import load_weights
from common.semantic import likeliest, segmentation_loss, softmax

NAME = "unet"
STRIDE = 32  # sides of an input must be multiples of it
DECODER = (256, 128, 64, 32, 16)  # channels of the decoder's stages, the coarsest first
WIDEST = 1024  # an untrusted checkpoint must not ask for all of the memory


def build_model(
    encoder: str,
    num_classes: int,
    weights_backbone: str = "none",
    norm: str = "batch",
    decoder_channels: Sequence[int] = DECODER,
) -> nn.Module:
    """A UNet that maps float [B,3,H,W] to logits [B,num_classes,H,W].

    Args:
        encoder: Any encoder of smp, for example `resnet34`.
        num_classes: Including the ground.
        weights_backbone: `imagenet` (downloaded once), `none` (random), or a file, see
            `common.backbones.load_backbone`.
        norm: `batch` or `group`.
        decoder_channels: Channels of the five stages, at 1/16 to 1/1 of the input's resolution.

    Raises:
        UserError: Unknown or unsuitable encoder, invalid width, no network for the weights, or a
            file that does not fit.
    """
    of_timm = encoder.startswith("tu-")
    if encoder not in encoders and not (of_timm and timm.is_model(encoder[3:])):
        raise UserError(
            f"--encoder {encoder} is not known to segmentation_models_pytorch; use resnet18, "
            "resnet34, mobilenet_v2, or tu- and the name of a network in timm."
        )
    fine = [type(c) is int and 0 < c <= WIDEST for c in decoder_channels]
    if fine != [True] * len(DECODER):
        raise UserError(f"--decoder-channels takes {len(DECODER)} numbers from 1 to {WIDEST}.")
    pretrained = "imagenet" if weights_backbone == "imagenet" else None
    try:
        with imagenet_weights(weights_backbone, encoder):
            model = smp.Unet(
                encoder,
                encoder_weights=pretrained,
                decoder_channels=decoder_channels,
                classes=num_classes,
            )
        if of_timm:  # some take a single size of images, and say so when they get another
            with torch.inference_mode():
                model.eval()(torch.zeros(1, 3, 2 * STRIDE, 2 * STRIDE))
            model.train()
    except (AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:160].rstrip(".")
        raise UserError(
            f"--encoder {encoder} cannot be the encoder of a UNet ({reason}); use a convolutional "
            "network with five stages, such as resnet34 or tu-regnetx_002."
        ) from error
    load_backbone(model.encoder, weights_backbone)
    return normalised_by(norm, model)


def from_checkpoint(content: dict[str, Any]) -> nn.Module:
    """The trained network of a checkpoint that `common.run.checkpoint.load` returned."""
    args = content["args"]
    # Earlier checkpoints have the default width and do not name it.
    width = args.get("decoder_channels", DECODER)
    if ":" in args["encoder"]:
        raise ValueError("its encoder would be downloaded")
    model = build_model(
        args["encoder"], len(content["classes"]), norm=args["norm"], decoder_channels=width
    )
    load_weights(model, content)
    return model


def loss_fn(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """The loss on float [B,3,H,W], normalised, and int64 [B,H,W]: a float32 scalar."""
    return segmentation_loss(model(images), targets)


def predict(model: nn.Module, images: Tensor) -> Tensor:
    """The most likely class of every pixel: float [B,3,H,W] → uint8 [B,H,W]."""
    return likeliest(model(images))


def probabilities(model: nn.Module, images: Tensor) -> Tensor:
    """What `predict.windows` blends: float [B,3,H,W] → float32 [B,C,H,W] that sums to 1 over C."""
    return softmax(model(images))
