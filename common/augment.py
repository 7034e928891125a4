"""Turns a uint8 batch on the device into what the network sees: crop, turn, flip, light, noise.

Every random number is a hash of (seed, epoch, tile). A tile gets the same view in every process,
worker and restart, and no generator state has to be saved or kept separate.
"""

import math
from functools import cache

import torch
from torch import Tensor

from common.data import Batch

# ImageNet's channel statistics (RGB, 0…255): what pretrained encoders were trained with.
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)

CONTRAST = 0.3  # up to this far from 1, in either direction
BRIGHTNESS = 32.0  # in grey levels
CAST = 0.1  # of each channel against the others
NOISE = 12.0  # greatest standard deviation, in grey levels


def normalise(images: Tensor) -> Tensor:
    """uint8 [B,H,W,3] → float32 [B,3,H,W], ImageNet's mean and deviation.

    `[B,H,W,3]` permuted is channels-last in memory without a copy. For plain NCHW call
    `.contiguous()`.
    """
    mean, scale = _statistics(images.device)
    return ((images.float() - mean) * scale).permute(0, 3, 1, 2)


def random_view(
    batch: Batch, crop: int, seed: int, epoch: int, scale_jitter: float = 0.0
) -> tuple[Tensor, Batch]:
    """A random crop of each tile in one of its eight orientations, under random light.

    Args:
        batch: B tiles of one size, at least `crop` pixels a side.
        crop: Side of the result in pixels.
        seed: The run's seed.
        epoch: Part of the hash, so that every epoch has other views.
        scale_jitter: j > 0 samples the crop at a random scale between 1/(1+j) and 1+j, by nearest
            neighbour (0: pixels are only moved, never resampled).

    Returns:
        Images, float32 [B,3,crop,crop], normalised, channels-last in memory, and the batch with
        `images` and `ids` cropped in the same way.
    """
    height, width = batch.images.shape[1:3]
    u = uniform(batch.tile, 16, seed, epoch)
    index = _gather_index(u[:, :6], height, width, crop, scale_jitter)
    rows = torch.arange(len(u), device=u.device)[:, None]
    images = batch.images.flatten(1, 2)[rows, index].unflatten(1, (crop, crop))
    ids = batch.ids.flatten(1)[rows, index].unflatten(1, (crop, crop))
    view = batch._replace(images=images, ids=ids)
    return _light(images, u[:, 6:]).permute(0, 3, 1, 2), view


def _gather_index(u: Tensor, height: int, width: int, crop: int, jitter: float) -> Tensor:
    """Where in its tile (as row·width + column) each pixel of the view comes from: [B, crop²]."""
    # Not so large that the crop would leave the tile.
    largest = min(1 + jitter, min(height, width) / crop)
    low, high = -math.log1p(jitter), math.log(largest)
    scale = torch.exp(low + (high - low) * u[:, 0])
    steps = torch.arange(crop, device=u.device)
    flip_down, flip_across, transpose = (d[:, None, None] < 0.5 for d in u[:, 1:4].unbind(1))
    down, across = steps[:, None].expand(crop, crop), steps[None, :].expand(crop, crop)
    # Two flips and a transposition generate the eight symmetries of the square.
    y = torch.where(transpose, across, down)
    x = torch.where(transpose, down, across)
    y = torch.where(flip_down, crop - 1 - y, y)
    x = torch.where(flip_across, crop - 1 - x, x)
    y = _source(y, u[:, 4], scale, height, crop)
    x = _source(x, u[:, 5], scale, width, crop)
    return (y * width + x).flatten(1)


def _source(step: Tensor, where: Tensor, scale: Tensor, length: int, crop: int) -> Tensor:
    """Map 0…crop-1 to pixels of a tile `length` long, from a random origin, at `scale`."""
    room = length - crop * scale  # >= 0, except for rounding
    origin = (where * (room + 1)).floor().clamp(min=0)
    source = origin[:, None, None] + ((step + 0.5) * scale[:, None, None]).floor()
    return source.long().clamp(0, length - 1)


def _light(images: Tensor, u: Tensor) -> Tensor:
    """Brightness, contrast, colour cast and noise, folded into the normalisation: float, HWC.

    Values may leave 0…255 a little. Clamping would cost a pass and teach the network nothing.
    """
    mean, scale = _statistics(images.device)
    signed = u * 2 - 1
    contrast = torch.exp(signed[:, 0:1] * math.log1p(CONTRAST))
    gain = contrast * torch.exp(signed[:, 1:4] * math.log1p(CAST))
    shift = 128 + signed[:, 4:5] * BRIGHTNESS - 128 * gain
    gain, shift = gain * scale, (shift - mean) * scale
    noise = (u[:, 5:6] * NOISE) * scale
    lit = torch.addcmul(shift[:, None, None], images.float(), gain[:, None, None])
    return lit.addcmul_(_grain(images.shape[1], u[:, 6:8]), noise[:, None, None])


def _grain(side: int, u: Tensor) -> Tensor:
    """Unit noise [B,side,side,3], cut for each tile from one fixed field, at a random position.

    A generator on the device would give other numbers for each world size, and its state would have
    to be saved. Two tiles may share parts of it, at other positions.
    """
    field = _noise_field(u.device)
    steps = torch.arange(side, device=u.device)
    origin = (u * len(field)).long()
    y = (origin[:, 0:1] + steps) % len(field)
    x = (origin[:, 1:2] + steps) % len(field)
    return field[y[:, :, None], x[:, None, :]]


def uniform(index: Tensor, count: int, seed: int, epoch: int) -> Tensor:
    """`count` numbers in [0, 1) for each tile: float32 [B, count], a hash of its arguments.

    The hash mixes as SplitMix64 does (Steele, Lea and Flood, "Fast splittable pseudorandom number
    generators", OOPSLA 2014), on int64 that wraps around.
    """
    start = _signed((seed * 0x9E3779B97F4A7C15) ^ (epoch * 0xD1B54A32D192ED03))
    z = index[:, None] * count + torch.arange(count, device=index.device) + start
    z = z * _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return _shift(z ^ _shift(z, 31), 40).float() / 2**24


def _signed(value: int) -> int:
    value %= 2**64
    return value - 2**64 if value >= 2**63 else value


def _shift(z: Tensor, bits: int) -> Tensor:
    """A logical shift: torch's `>>` on int64 keeps the sign."""
    return (z >> bits) & (2 ** (64 - bits) - 1)


# Made once per device: a tensor made from Python numbers costs a copy to the device and a sync.
@cache
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.tensor(MEAN, device=device), 1 / torch.tensor(STD, device=device)


@cache
def _noise_field(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(701, 701, 3, generator=generator).to(device)
