"""Whole training steps on a CUDA device of fake tensors: what crosses the bus, what leaves NHWC.

The operators, devices, dtypes and strides are torch's own for CUDA; the values do not exist.
"""

from itertools import product

import pytest
import torch
from helpers.commands import ENCODER
from helpers.fake_cuda import CUDA, SMALL, Census, copied_by_group_norm, fake_cuda
from helpers.networks import session_of
from torch import nn

from benchmarks.lib.standins import THIN, thin_fcn
from benchmarks.lib.synthetic import noise_tiles, training_step
from common import augment
from common.args import Speedups
from common.distributed import Process
from common.run import nonfinite
from common.speedups import make_step, place
from fcn import model as fcn
from mask import model as mask

GPU = Process(0, 1, CUDA)
# Without DeepLabV3, which is as FCN and whose hundred small layers take long; `test_gpu.py` has it.
LIGHT = [("fcn", "resnet50"), ("unet", ENCODER), ("mask", "resnet18"), ("mask", ENCODER)]
DTYPES = (None, torch.bfloat16, torch.float16)
# Mask R-CNN's pyramid becomes one map for RoIAlign, which reads only NCHW; a view of its scores.
CANVAS = {
    "aten::replication_pad2d",
    "aten::replication_pad2d_backward",
    "torchvision::_roi_align_backward",  # seen with torchvision 0.26
    "aten::permute",
}


@pytest.fixture
def on_cuda(monkeypatch):
    monkeypatch.setitem(fcn.BACKBONES, "resnet50", thin_fcn)
    monkeypatch.setattr(mask, "CHANNELS", THIN)
    with fake_cuda(monkeypatch):
        augment.normalise(noise_tiles(1, 8, CUDA).images)  # its constants are copied once
        augment._noise_field(CUDA)
        yield


@pytest.mark.parametrize(("dtype", "clip", "grad_accum"), [*product(DTYPES, (None, 1.0), (1, 2))])
def test_no_operator_of_a_step_sees_two_devices(on_cuda, dtype, clip, grad_accum):
    settings = Speedups(dtype, channels_last=True, grad_accum=grad_accum)
    with CUDA:
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    objective = place(model, lambda m, x, y: (m(x).float() - y).square().mean(), GPU, settings)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    s = session_of(model, optimizer, schedule, settings, clip, "cuda")
    tally = nonfinite.Tally(CUDA)
    step = make_step(objective, s)
    images = torch.empty(4, 3, 8, 8, device=CUDA)
    targets = torch.empty(4, 2, 6, 6, device=CUDA)
    with Census() as census:
        for number in range(2):
            loss = step(images, targets)
            tally.add(loss, number, torch.arange(4, device=CUDA))
    assert census.mixed == {}
    assert loss.device == CUDA
    assert all(parameter.grad.device == CUDA for parameter in model.parameters())


@pytest.mark.parametrize(("name", "backbone"), LIGHT)
def test_a_step_stays_on_the_device_and_in_channels_last(on_cuda, name, backbone):
    settings = Speedups(torch.float16, channels_last=True)
    model, step = training_step(name, GPU, settings, 64, backbone, clip_grad_norm=1.0)
    batch = noise_tiles(2, 96, CUDA)
    with Census() as census:
        step(batch)
    assert census.mixed == {}
    assert set(census.left) <= SMALL | (CANVAS if name == "mask" else set())
    for parameter in model.parameters():
        if parameter.ndim == 4:
            assert parameter.grad.is_contiguous(memory_format=torch.channels_last)


def test_group_norm_leaves_channels_last_on_cuda_in_each_layer_or_in_none(on_cuda):
    """Newer torch has a channels-last kernel."""
    settings = Speedups(torch.float16, channels_last=True)
    model, step = training_step("fcn", GPU, settings, 64, "resnet50", norm="group")
    batch = noise_tiles(2, 96, CUDA)
    with Census() as census:
        step(batch)
    layers = sum(isinstance(module, nn.GroupNorm) for module in model.modules())
    assert copied_by_group_norm(census) in (0, layers)


def test_the_census_is_red_for_a_copy_and_for_a_transposition(on_cuda):
    image = torch.empty(2, 3, 8, 8, device=CUDA).contiguous(memory_format=torch.channels_last)
    with Census() as census:
        torch.empty(3).to(CUDA)
        image.cpu()
        image.contiguous()
    assert census.mixed.total() == 2
    assert census.left == {"aten::clone": 1}
