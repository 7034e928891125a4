"""What a network gets before training: weights, another norm or dropout, frozen parts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from common.cli import UserError
from common.run.checkpoint import averaged, short

PLACES = ("encoder.", "backbone.", "dense.backbone.body.")  # of the backbone, in our models


@contextmanager
def imagenet_weights(weights_backbone: str, backbone: str) -> Iterator[None]:
    """Wrap the construction of a model: a failed download becomes a one-sentence error."""
    try:
        yield
    except Exception as error:  # each library raises its own when there is no network
        if weights_backbone != "imagenet":
            raise
        raise UserError(
            f"the ImageNet weights of {backbone} could not be downloaded ({type(error).__name__}): "
            "without a network use --weights-backbone none, or a file."
        ) from error


def on_encoder(option: str, name: str, weights_backbone: str, build: Callable[..., Any]) -> Any:
    """`build(name, encoder_weights=…)`: a network on an encoder of segmentation_models_pytorch.

    Weights without an effect on its output are frozen, because DDP would wait for their gradients.

    Args:
        option: `--encoder` or `--backbone`, for the error.
        name: smp's, or `tu-` and the name of a network in timm.
        weights_backbone: `imagenet`, `none` or a file, which `load_backbone` loads.

    Raises:
        UserError: Unknown or unsuitable encoder, or no network for the weights.
    """
    import timm  # takes half a second, with smp; FCN and DeepLabV3 do without
    from segmentation_models_pytorch.encoders import encoders

    pretrained = "imagenet" if weights_backbone == "imagenet" else None
    try:
        of_timm = name.startswith("tu-") and ":" not in name  # what has a colon is downloaded
        if name not in encoders and not (of_timm and timm.is_model(name[3:])):
            raise LookupError("it is not known to segmentation_models_pytorch")
        with imagenet_weights(weights_backbone, name):
            network = build(name, encoder_weights=pretrained)
        # Some take a single size of images, and say so when they get another.
        outputs = network.eval()(torch.zeros(1, 3, 64, 64))
        torch.stack([output.sum() for output in tree_leaves(outputs)]).sum().backward()
    except (AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"{option} {name!r} cannot be used ({short(error).rstrip('.')}); use a convolutional "
            "network with five stages, such as resnet34, mobilenet_v2 or, of timm, tu-regnetx_002."
        ) from error
    for parameter in network.parameters():
        parameter.requires_grad_(parameter.grad is not None)
    network.zero_grad()
    return network.train()


def load_backbone(backbone: nn.Module, weights_backbone: str) -> None:
    """Load `--weights-backbone FILE`; the constructor has already handled `imagenet` and `none`.

    Args:
        backbone: Receives the weights.
        weights_backbone: The file holds a state dict of the backbone, of torchvision's classifier
            with the same backbone, or a checkpoint of any model here with the same backbone.

    Raises:
        UserError: There is no such file, or it does not fit.
    """
    if weights_backbone in ("imagenet", "none"):
        return
    file = Path(weights_backbone)
    if not file.is_file():
        raise UserError(f"--weights-backbone: {str(file)!r} is neither imagenet, none nor a file.")
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
        if "model" in weights:
            saved = averaged(weights).items()
            weights = {k[len(p) :]: v for k, v in saved for p in PLACES if k.startswith(p)}
        built = backbone.state_dict()
        # Feature extractors of torchvision drop the prefix `features.`.
        prefix = "" if any(key.startswith("features.") for key in built) else "features."
        weights = {
            key.removeprefix(prefix): tensor
            for key, tensor in weights.items()
            if key in built or not key.startswith(("fc.", "classifier."))
        }
        backbone.load_state_dict(weights)
    except Exception as error:
        raise UserError(
            f"--weights-backbone: {str(file)!r} does not fit this backbone: {short(error)}"
        ) from error


def normalised_by(norm: str, module: nn.Module) -> nn.Module:
    """`batch` leaves `module` as it is; `group` puts GroupNorm in place of every BatchNorm.

    GroupNorm (Wu and He 2018) with 16 channels per group, their best. It computes its statistics
    for each image alone, so a process's batch may be small.
    """
    if norm == "batch":
        return module
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            channels = child.num_features
            layer = nn.GroupNorm(channels // 16 if channels % 16 == 0 else 1, channels)
            layer.requires_grad_(child.weight.requires_grad)
            act: Any = getattr(child, "act", None)  # in timm's BatchNormAct2d
            setattr(module, name, layer if act is None else nn.Sequential(layer, act))
        else:
            normalised_by(norm, child)
    return module


def with_dropout(probability: float | None, module: nn.Module) -> nn.Module:
    """Set the probability of every dropout in `module`; None changes nothing."""
    for child in module.modules():
        if isinstance(child, nn.Dropout) and probability is not None:
            child.p = probability
    return module


def parameter_groups(
    model: nn.Module, encoder: Any, lr: float, factor: float
) -> list[dict[str, Any]]:
    """The parameter groups of an optimizer: the `encoder` of `model` learns at `factor` times `lr`.

    At 0 it is frozen: no gradient is computed for it. Call this before DDP wraps the model, because
    DDP expects a gradient for every weight that is not frozen.
    """
    if factor == 1:
        return [{"params": list(model.parameters())}]
    if factor == 0:
        encoder.requires_grad_(False)
    inside = {id(parameter) for parameter in encoder.parameters()}
    others = [p for p in model.parameters() if id(p) not in inside]
    slow = {"params": list(encoder.parameters()), "lr": factor * lr}
    return [{"params": others}, slow] if factor else [{"params": others}]


def training_mode(model: nn.Module) -> None:
    """`model.train()`, but a BatchNorm with frozen weights uses its statistics and keeps them."""
    model.train()
    for module in model.modules():
        frozen = [not parameter.requires_grad for parameter in module.parameters(recurse=False)]
        if isinstance(module, nn.BatchNorm2d) and any(frozen):
            module.eval()
