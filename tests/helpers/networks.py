"""Narrow networks, for tests that do not depend on the width: FCN has no light backbone."""

import torch
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.models.segmentation.fcn import FCN, FCNHead
from torture import kills

from common.run.checkpoint import Run
from fcn import model as fcn
from mask import model as mask

THIN = 32  # channels of Mask R-CNN's pyramid and heads, which has 256


class Thin(Bottleneck):
    expansion = 1


def thin_fcn(weights: None, weights_backbone: None, num_classes: int, aux_loss: bool) -> nn.Module:
    """Like torchvision's `fcn_resnet50`, dilated stages and both heads: 1.3 million weights."""
    dilated = [False, True, True]
    resnet = ResNet(Thin, [1, 1, 1, 1], width_per_group=16, replace_stride_with_dilation=dilated)
    backbone = IntermediateLayerGetter(resnet, {"layer4": "out", "layer3": "aux"})
    return FCN(backbone, FCNHead(512, num_classes), FCNHead(256, num_classes))


def train_thin(folder: str, words: list[str]) -> None:
    """Run `folder`/train.py with thin networks, in a process that needs no others."""
    fcn.BACKBONES["resnet50"] = thin_fcn
    mask.CHANNELS = THIN
    kills.run(f"{folder}.train", words)


def run_of(model, optimizer, schedule, settings) -> Run:
    """A run for `make_step`, of no particular model."""
    return Run("", [], {}, model, optimizer, schedule, settings.scaler(torch.device("cpu")))
