"""Narrow networks, for tests that do not depend on the width: FCN has no light backbone."""

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchvision.models import resnet
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.models.segmentation.deeplabv3 import DeepLabHead, DeepLabV3
from torchvision.models.segmentation.fcn import FCN, FCNHead
from torture import kills

from benchmarks.lib.synthetic import bare_session
from common.args import Speedups
from common.distributed import Process
from common.session import Session
from DeepLabV3 import model as deeplab
from fcn import model as fcn
from mask import model as mask

THIN = 32  # channels of Mask R-CNN's pyramid and heads, which has 256


class Thin(Bottleneck):
    expansion = 1


def thin_backbone() -> IntermediateLayerGetter:
    """Dilated stages of which `out` has 512 channels and `aux` 256."""
    dilated = [False, True, True]
    network = ResNet(Thin, [1, 1, 1, 1], width_per_group=16, replace_stride_with_dilation=dilated)
    return IntermediateLayerGetter(network, {"layer4": "out", "layer3": "aux"})


def thin_fcn(weights: None, weights_backbone: None, num_classes: int, aux_loss: bool) -> nn.Module:
    """Like torchvision's `fcn_resnet50`, dilated stages and both heads: 1.3 million weights."""
    return FCN(thin_backbone(), FCNHead(512, num_classes), FCNHead(256, num_classes))


def thin_deeplab(
    weights: None, weights_backbone: None, num_classes: int, aux_loss: bool
) -> nn.Module:
    """DeepLabV3's heads on the same backbone."""
    return DeepLabV3(thin_backbone(), DeepLabHead(512, num_classes), FCNHead(256, num_classes))


def shallow_resnet18(weights: None, norm_layer: type[nn.Module]) -> ResNet:
    """With one block in each stage instead of two."""
    return ResNet(BasicBlock, [1, 1, 1, 1], norm_layer=norm_layer)


def narrow(patch: pytest.MonkeyPatch) -> None:
    """Put such networks in place of those that the tests train."""
    patch.setitem(fcn.BACKBONES, "resnet50", thin_fcn)
    patch.setitem(deeplab.BACKBONES, "mobilenet_v3_large", thin_deeplab)
    patch.setattr(resnet, "resnet18", shallow_resnet18)
    patch.setattr(mask, "CHANNELS", THIN)


def train_thin(folder: str, words: list[str]) -> None:
    """Run `folder`/train.py with thin networks, in a process that needs no others."""
    narrow(pytest.MonkeyPatch())
    kills.run(f"{folder}.train", words)


def session_of(
    model: nn.Module,
    optimizer: Optimizer,
    schedule: LRScheduler,
    speedups: Speedups,
    clip_grad_norm: float | None = None,
    device: str = "cpu",
) -> Session:
    """A session for `make_step`, of no particular model and without data."""
    process = Process(0, 1, torch.device(device))
    s = bare_session(process, speedups, clip_grad_norm=clip_grad_norm)
    s.model, s.optimizer, s.lr_scheduler = model, optimizer, schedule
    s.scaler, s.average = speedups.scaler(process.device), None
    return s
