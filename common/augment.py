"""Turns a uint8 batch on the device into what the network sees: crop, turn, flip, light, noise.

Every random number is a hash of (seed, epoch, tile). A tile gets the same view in every process,
worker and restart, and no generator state has to be saved or kept separate.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from common.data import Batch

Number = Tensor | float
# ImageNet's channel statistics (RGB, 0…255): what pretrained encoders were trained with.
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)

CONTRAST = 0.3  # up to this far from 1, in either direction
BRIGHTNESS = 32.0  # in grey levels
CAST = 0.1  # of each channel against the others
NOISE = 12.0  # greatest standard deviation, in grey levels
# Only in `strong`:
STRETCH = 1.2  # of height against width, up to this factor either way
SHARP = 0.3  # share of the tiles that are neither blurred nor seen by a coarser sensor
BLUR = 1.7  # greatest standard deviation, in pixels of the view
PITCH = 2.5  # greatest width of a sensor's pixel, in pixels of the view
EXPOSURE = 1.7  # up to this factor either way, as is gamma
GAMMA = 1.7
SATURATION = 2.0  # from 0, which is grey
HUE = 0.5  # greatest angle about the grey axis
SCALE_JITTER = {"none": 0.0, "light": 0.0, "strong": 1.0}  # without --scale-jitter


def normalise(images: Tensor) -> Tensor:
    """uint8 [B,H,W,3] → float32 [B,3,H,W], ImageNet's mean and deviation.

    The result is channels-last in memory; for plain NCHW call `.contiguous()`.
    """
    mean, scale = _statistics(images.device)
    return ((images.float() - mean) * scale).permute(0, 3, 1, 2)


def random_view(
    batch: Batch,
    crop: int,
    seed: int,
    epoch: int,
    augment: str = "light",
    scale_jitter: float = 0,
    foreground: float = 0,
) -> tuple[Tensor, Batch]:
    """A random crop of each tile in one of its eight orientations, under random light.

    Args:
        batch: B tiles of one size, at least `crop` pixels a side.
        crop: Side of the result in pixels.
        seed, epoch: Of the run; parts of the hash, so that every epoch has other views.
        augment: `none`: pixels are only moved. `light`: and brightness, contrast, colour cast and
            noise. `strong`: before these stretch, blur, exposure, gamma, saturation and hue.
        scale_jitter: j > 0 samples the crop at a random scale between 1/(1+j) and 1+j.
        foreground: Share of the crops that contain an aircraft, if their tile shows one; the others
            lie anywhere.

    Returns:
        Images, float32 [B,3,crop,crop], normalised, channels-last in memory, and the batch with
        `images` (without light; float32 if resampled) and `ids` cropped in the same way.
    """
    u = uniform(batch.tile, 16, seed, epoch)
    strong = augment == "strong"
    stretch: Number = 1.0
    sensor: tuple[Number, Number] = 1.0, 0.0  # as fine as the view, and sharp
    if strong:
        v = uniform(batch.tile, 8, seed, ~epoch)  # below 0, so no epoch has the same
        stretch, sensor = _around_one(v[:, 0, None, None], STRETCH), _sensor(v[:, 1:3])
    pixel = _pixel_of_an_aircraft(batch, foreground, seed, epoch) if foreground else None
    lines = _lines(u, stretch, batch.ids.shape[1:], crop, scale_jitter, pixel)
    transpose = u[:, 3, None, None] < 0.5
    index = _nearest(lines, transpose)
    if strong or scale_jitter:
        images = _resampled(batch.images, _weights(lines, *sensor), transpose)
    else:
        images = _moved(batch.images, index)
    view = batch._replace(images=images, ids=_moved(batch.ids, index))
    if augment == "none":
        return normalise(images), view
    if strong:
        images = _light(_exposed(images, v[:, 3:5]), u[:, 6:], _colours(v[:, 5:7]))
    else:
        images = _light(images, u[:, 6:])
    return images.permute(0, 3, 1, 2), view


class _Lines(NamedTuple):
    """Where the rows (at 0 in the second dimension) and the columns of each view lie in its tile.

    The centre of a line is `origin` + (`step` + 0.5) x `scale`, in pixels of the tile.
    """

    step: Tensor  # int64 [B,2,crop], from 0 to crop - 1 or back
    origin: Tensor  # [B,2,1], as is `scale`
    scale: Tensor
    sides: Tensor  # int64 [2,1], height and width of the tile
    size: torch.Size  # the same


def _lines(
    u: Tensor, stretch: Number, size: torch.Size, crop: int, jitter: float, pixel: Tensor | None
) -> _Lines:
    """A random scale, place and flip for each tile; `stretch` is of height against width.

    The view contains `pixel`, int64 [B,2,1], where that is not negative.
    """
    axis = torch.arange(2, device=u.device)[:, None]
    sides = size[0] + (size[1] - size[0]) * axis  # a tensor of the two numbers would cost a sync
    # Not so large that the crop would leave the tile.
    largest = min(1 + jitter, min(size) / crop)
    low, high = -math.log1p(jitter), math.log(largest)
    scale = torch.exp(low + (high - low) * u[:, 0, None, None]) * stretch ** (0.5 - axis)
    scale = torch.minimum(scale, sides / crop)
    steps = torch.arange(crop, device=u.device)
    step = torch.where(u[:, 1:3, None] < 0.5, crop - 1 - steps, steps)
    room = sides - crop * scale  # >= 0, except for rounding
    first, last = torch.zeros_like(room), room
    if pixel is not None:
        first = (pixel - crop * scale + 1).floor().clamp(min=0)
        last = torch.where(pixel < 0, room, torch.minimum(pixel, room))
    origin = (first + u[:, 4:6, None] * (last - first + 1)).floor().clamp(min=0)
    return _Lines(step, origin, scale, sides, size)


def _pixel_of_an_aircraft(batch: Batch, share: float, seed: int, epoch: int) -> Tensor:
    """Row and column of a random pixel of a random aircraft: int64 [B,2,1].

    Negative for a share of 1 - `share` of the tiles, and where no pixel shows the aircraft.
    """
    u = uniform(batch.tile, 3, ~seed, epoch)  # below 0, so no seed has the same
    aircraft = 1 + (u[:, 1] * (batch.classes[:, 1:-1] > 0).sum(1)).to(batch.ids.dtype)
    count = (batch.ids == aircraft[:, None, None]).flatten(1).cumsum(1, dtype=torch.int32)
    rank = (u[:, 2] * count[:, -1]).floor()
    pixel = (count <= rank[:, None]).sum(1)
    place = torch.stack([pixel // batch.ids.shape[2], pixel % batch.ids.shape[2]], 1)
    return torch.where(((u[:, 0] < share) & (count[:, -1] > 0))[:, None], place, -1)[..., None]


def _nearest(lines: _Lines, transpose: Tensor) -> Tensor:
    """Where in its tile (as row·width + column) the centre of each pixel of the view is."""
    at = (lines.origin + ((lines.step + 0.5) * lines.scale).floor()).long()
    y, x = torch.minimum(at, lines.sides - 1).unbind(1)
    index = y[:, :, None] * lines.size[1] + x[:, None]
    # Two flips and a transposition generate the eight symmetries of the square.
    return torch.where(transpose, index.mT, index).contiguous()


def _moved(values: Tensor, index: Tensor) -> Tensor:
    """The pixels of [B,H,W,…] at `index`, int64 [B,crop,crop]."""
    tiles = torch.arange(len(values), device=values.device)[:, None, None]
    return values.flatten(1, 2)[tiles, index]


def _resampled(images: Tensor, weights: tuple[Tensor, Tensor], transpose: Tensor) -> Tensor:
    """uint8 [B,H,W,3] → float32 [B,crop,crop,3], 0…255: a product of matrices for each axis."""
    rows = torch.bmm(weights[0], images.flatten(2).float()).unflatten(2, images.shape[2:])
    turned = torch.bmm(weights[1], rows.transpose(1, 2).flatten(2)).unflatten(2, (-1, 3))
    return torch.where(transpose[..., None], turned, turned.transpose(1, 2))


def _weights(lines: _Lines, pitch: Number, blur: Number) -> tuple[Tensor, Tensor]:
    """What each pixel along an axis of the tile adds to those of the view: [B,crop,H], [B,crop,W].

    A sensor sees the tile. Its pixels are `pitch` >= 1 pixels of the view wide, but not finer than
    the tile's, and the view is interpolated between them. Each is an average under a tent. It
    reaches to the next pixel of the sensor on either side, so that nothing aliases, and further for
    a `blur`, a standard deviation in pixels of the view (a tent that reaches r has a variance of
    r²/6). A sharp view at scale 1 has weights of 0 and 1. `pitch` and `blur` may be [B,1,1].
    """
    wide = (lines.scale * pitch).clamp(min=1)
    reach = (wide**2 + 6 * (lines.scale * blur) ** 2).sqrt()[..., None]
    place = (lines.step + 0.5) * (lines.scale / wide) - 0.5  # in pixels of the sensor
    before = place.floor()
    centre = lines.origin + (before + 0.5) * wide
    pixels = torch.arange(0.5, max(lines.size), device=place.device)

    def tents(top: Tensor) -> Tensor:
        top = torch.minimum(top.clamp(min=0), lines.sides)[..., None]
        tent = (1 - (pixels - top).abs() / reach).clamp(min=0)
        if lines.size[0] != lines.size[1]:
            tent = tent * (pixels < lines.sides)[:, None]
        return tent / tent.sum(3, keepdim=True)

    both = torch.lerp(tents(centre), tents(centre + wide), (place - before)[..., None])
    return both[:, 0, :, : lines.size[0]], both[:, 1, :, : lines.size[1]]


def _sensor(u: Tensor) -> tuple[Tensor, Tensor]:
    """Pitch and blur for `_weights`."""
    softness, of_pitch = u[..., None, None].unbind(1)
    soft = ((softness - SHARP) / (1 - SHARP)).clamp(min=0)
    return 1 + (PITCH - 1) * soft * of_pitch, BLUR * soft * (1 - of_pitch)


def _exposed(images: Tensor, u: Tensor) -> Tensor:
    """Exposure, which may clip, and gamma: float32, 0…255."""
    exposure, gamma = _around_one(u[:, 0], EXPOSURE), _around_one(u[:, 1], GAMMA)
    bright = (images * (exposure[:, None, None, None] / 255)).clamp_(max=1)
    return bright.pow_(gamma[:, None, None, None]).mul_(255)


def _colours(u: Tensor) -> Tensor:
    """Saturation and hue as a matrix for RGB: [B,3,3].

    It turns about the grey axis (Rodrigues' formula for the axis (1, 1, 1)) and scales across it.
    """
    saturation = SATURATION * u[:, 0, None, None]
    channel = torch.arange(3, device=u.device)
    turn = HUE * (2 * u[:, 1, None, None] - 1) + (channel - channel[:, None]) * (2 * math.pi / 3)
    return (1 + 2 * saturation * torch.cos(turn)) / 3


def _around_one(u: Tensor, limit: float) -> Tensor:
    """[0, 1) → 1/limit … limit, uniform in the logarithm."""
    return torch.exp((u * 2 - 1) * math.log(limit))


def _light(images: Tensor, u: Tensor, colours: Tensor | None = None) -> Tensor:
    """Brightness, contrast, colour cast and noise, folded into the normalisation: float, HWC.

    With `colours`, these come first, and values are clipped to 0…255. Without, they may leave it a
    little. Clamping would cost a pass and teach the network nothing.
    """
    mean, scale = _statistics(images.device)
    signed = u * 2 - 1
    contrast = torch.exp(signed[:, 0:1] * math.log1p(CONTRAST))
    gain = contrast * torch.exp(signed[:, 1:4] * math.log1p(CAST))
    shift = 128 + signed[:, 4:5] * BRIGHTNESS - 128 * gain
    gain, shift = gain * scale, (shift - mean) * scale
    noise = ((u[:, 5:6] * NOISE) * scale)[:, None, None]
    grain = _grain(images.shape[1], u[:, 6:8])
    if colours is None:
        lit = torch.addcmul(shift[:, None, None], images.float(), gain[:, None, None])
        return lit.addcmul_(grain, noise)
    matrix = (gain[..., None] * colours).mT
    lit = torch.baddbmm(shift[:, None], images.flatten(1, 2), matrix).view_as(images)
    return lit.addcmul_(grain, noise).clamp_(-mean * scale, (255 - mean) * scale)


def _grain(side: int, u: Tensor) -> Tensor:
    """Unit noise [B,side,side,3], cut for each tile from one fixed field, at a random position."""
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
