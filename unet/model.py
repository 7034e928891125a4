"""UNet (Ronneberger et al. 2015) on any encoder of segmentation_models_pytorch."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import segmentation_models_pytorch as smp
from torch import Tensor, nn

from common.backbones import load_backbone, normalised_by, on_encoder
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
        weights_backbone: `imagenet`, `none` or a file, see `common.backbones.load_backbone`.
        norm: `batch` or `group`.
        decoder_channels: Channels of the five stages, at 1/16 to 1/1 of the input's resolution.

    Raises:
        UserError: Invalid encoder or width, no network for the weights, or they do not fit.
    """
    fine = [type(c) is int and 0 < c <= WIDEST for c in decoder_channels]
    if fine != [True] * len(DECODER):
        raise UserError(f"--decoder-channels takes {len(DECODER)} numbers from 1 to {WIDEST}.")
    build = partial(smp.Unet, decoder_channels=decoder_channels, classes=num_classes)
    model = on_encoder("--encoder", encoder, weights_backbone, build)
    load_backbone(model.encoder, weights_backbone)
    return normalised_by(norm, model)


def from_checkpoint(content: dict[str, Any]) -> nn.Module:
    """The trained network of a checkpoint that `common.run.checkpoint.load` returned."""
    args = content["args"]
    width = args.get("decoder_channels", DECODER)  # missing in early checkpoints
    model = build_model(args["encoder"], len(content["classes"]), "none", args["norm"], width)
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
