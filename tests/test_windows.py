"""Windows: every pixel is read once, and the blend is that of all windows at once in memory."""

from itertools import pairwise

import numpy as np
import torch
from helpers.rasters import Memory
from hypothesis import given, settings
from hypothesis import strategies as st

from common.augment import MEAN
from common.io.raster import NEUTRAL
from common.predict.semantic import symmetric
from common.predict.windows import Tiling, blend, filled, strips


def network(crops):
    """Depends on a pixel's surroundings and on its position in the window, as a real one does."""
    assert crops.shape[1:] == (32, 32, 3)
    values = crops.permute(0, 3, 1, 2).float() / 255
    blurred = torch.nn.functional.avg_pool2d(values, 5, 1, 2)[:, 0]
    position = torch.linspace(0, 0.3, 32)
    first = (blurred * 0.6 + position[:, None] * position).clamp(0, 1)
    return torch.stack([first, 1 - first], 1)


def whole_blend(pixels, tiling):
    """The blend of all windows, with sums as large as the scene."""
    height, width = pixels.shape[:2]
    side = tiling.side
    ramp = torch.arange(side) + 0.5
    ramp = torch.minimum(ramp, side - ramp)
    total = torch.zeros(2, max(height, side), max(width, side), dtype=torch.float64)
    norm = torch.zeros(total.shape[1:], dtype=torch.float64)
    for y in tiling.starts(height):
        for x in tiling.starts(width):
            crop = torch.from_numpy(pixels[y : y + side, x : x + side])[None]
            result = network(filled(crop, side))[0]
            total[:, y : y + side, x : x + side] += result * ramp[:, None] * ramp
            norm[y : y + side, x : x + side] += ramp[:, None] * ramp
    return (total / norm)[:, :height, :width].float()


@settings(max_examples=60)
@given(
    height=st.integers(1, 150),
    width=st.integers(1, 150),
    overlap=st.floats(0, 0.9),
    batch=st.integers(1, 7),
)
def test_the_moving_band_gives_the_blend_of_the_whole_scene(height, width, overlap, batch):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    scene, tiling = Memory(pixels), Tiling(32, overlap, batch)
    bands = list(blend(scene, network, tiling))
    assert [band.y for band in bands] == tiling.starts(height)
    found = torch.cat([band.probability for band in bands], 1)
    torch.testing.assert_close(found, whole_blend(pixels, tiling), atol=1e-5, rtol=0)
    assert np.array_equal(np.concatenate([band.pixels for band in bands]), pixels)
    assert scene.reads == height * width


@settings(max_examples=40)
@given(
    height=st.integers(1, 150),
    width=st.integers(1, 150),
    batch=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_windows_without_a_valid_pixel_are_not_computed(height, width, batch, seed):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
    valid = np.kron(rng.random((4, 4)) < 0.3, np.ones((40, 40), bool))[:height, :width]
    computed = 0

    def counted(crops):
        nonlocal computed
        computed += len(crops)
        return network(crops)

    tiling = Tiling(32, 0.25, batch)
    bands = list(blend(Memory(pixels, valid), counted, tiling))
    found = torch.cat([band.probability.expand(2, -1, -1) for band in bands], 1)
    reference = whole_blend(pixels, tiling)
    shown = torch.from_numpy(valid)
    near = torch.zeros_like(shown)
    for y in tiling.starts(height):
        for x in tiling.starts(width):
            part = shown[y : y + 32, x : x + 32]
            computed -= bool(part.any())
            near[y : y + 32, x : x + 32] |= not part.any()
    assert computed == 0
    torch.testing.assert_close(found[:, ~near], reference[:, ~near], atol=1e-5, rtol=0)
    masks = [b.valid if b.valid is not None else np.ones(b.pixels.shape[:2], bool) for b in bands]
    assert np.array_equal(np.concatenate(masks), valid)


@given(length=st.integers(32, 500), overlap=st.floats(0, 0.9))
def test_neighbours_overlap_as_asked_and_reach_both_ends(length, overlap):
    starts = Tiling(32, overlap, 1).starts(length)
    assert starts[0] == 0
    assert starts[-1] == length - 32
    strides = [b - a for a, b in pairwise(starts)]
    assert all(s <= max(1, round(32 * (1 - overlap))) for s in strides)


def test_strips_hold_no_more_than_a_row_of_windows():
    scene = Memory(np.zeros((1000, 10, 3), np.uint8))
    assert {len(strip.pixels) for strip in strips(scene, Tiling(64, 0.5, 1))} == {64}


def test_the_mean_over_symmetries_commutes_with_them():
    images = torch.rand(2, 32, 32, 3)

    def skewed(seen):
        weight, seen = torch.linspace(0, 1, 32), seen.permute(0, 3, 1, 2)
        return seen[:, :2] * weight[:, None] + seen[:, 1:] * weight**2

    mean = symmetric(skewed)
    for turned in (
        lambda t, y, x: t.rot90(1, (y, x)),
        lambda t, y, x: t.flip(y),
        lambda t, y, x: t.transpose(y, x),
    ):
        torch.testing.assert_close(mean(turned(images, 1, 2)), turned(mean(images), 2, 3))
    assert not torch.allclose(skewed(images.flip(1)), skewed(images).flip(2))


def test_a_window_that_the_scene_does_not_fill_is_filled_by_the_mean_colour():
    assert tuple(map(round, MEAN)) == NEUTRAL
    crops = torch.randint(0, 256, (2, 5, 8, 3), dtype=torch.uint8)
    extended = filled(crops, 8)
    assert torch.equal(extended[:, :5], crops)
    assert extended[:, 5:].float().sub(torch.tensor(MEAN)).abs().max() < 0.5
    assert filled(extended, 8) is extended
