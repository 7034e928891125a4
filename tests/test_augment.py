"""Augmentation: images and masks move together, exactly; randomness depends on the tile."""

import math

import cv2
import numpy as np
import pytest
import torch
from helpers.fake_cuda import CUDA, Census, fake_cuda
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as transforms

from benchmarks.lib.synthetic import noise_tiles
from benchmarks.syncs import census
from common import augment
from common.augment import MEAN, STD, normalise, random_view, uniform
from common.data import Batch

MODES = [("none", 0.0), ("light", 0.0), ("light", 0.5), ("strong", 0.0), ("strong", 1.0)]
FOREGROUND = [0.0, 0.5]


def batch_of(images, ids, tiles=None, aircraft=0):
    """Tiles that show the aircraft 1 to `aircraft`, or as many of them as are in `ids`."""
    tiles = torch.arange(len(images)) if tiles is None else torch.tensor(tiles)
    classes = torch.zeros(len(images), 256, dtype=torch.uint8)
    classes[:, 1 : aircraft + 1] = 1
    return Batch(images, ids, classes, tiles)


def coordinates(count, side):
    """Tiles whose pixels hold their position: row, column and their xor; ids are the xor."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    image = torch.stack([y, x, y ^ x], -1).to(torch.uint8)
    return batch_of(image.expand(count, -1, -1, -1), image[..., 2].expand(count, -1, -1))


def grey_levels(images):
    """What `normalise` was given: [B,H,W,3]."""
    return images.permute(0, 2, 3, 1) * torch.tensor(STD) + torch.tensor(MEAN)


@pytest.mark.parametrize("mode", ["none", "light"])
def test_image_and_mask_move_together(mode):
    _, view = random_view(coordinates(32, 96), 48, 0, 0, mode)
    assert torch.equal(view.images[..., 2], view.ids)
    assert torch.equal(view.images[..., 0] ^ view.images[..., 1], view.ids)


@pytest.mark.parametrize(("mode", "jitter"), MODES)
@pytest.mark.parametrize(("height", "width", "crop"), [(96, 96, 48), (64, 96, 64), (90, 70, 32)])
def test_a_label_stays_under_its_pixels(height, width, crop, mode, jitter):
    """A ramp of both coordinates: image and ids name the same place of the tile."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.stack([y, x, y], -1).to(torch.uint8).expand(40, -1, -1, -1)
    ids = (y * width + x).int().expand(40, -1, -1)
    _, view = random_view(batch_of(image, ids), crop, 3, 1, mode, jitter)
    at = torch.stack([view.ids // width, view.ids % width], -1)
    # A label has the pixel that the centre is in; the image is interpolated between centres. A
    # blurred ramp is the same ramp but near the border of the tile, where less of it is seen.
    inner = ((at > 12) & (at < torch.tensor([height, width]) - 13)).all(-1)
    distance = (view.images[..., :2].float() - at).abs()[inner]
    assert inner.float().mean() > 0.1
    # The tents of a blur lean a little, because they are sums over whole pixels.
    assert distance.max() < (0.6 if mode == "strong" else 0.501 if jitter else 1e-6)
    assert (view.images[..., :2].float() - at)[inner].mean().abs() < 0.02


@pytest.mark.parametrize(("mode", "jitter"), MODES)
def test_a_single_pixel_keeps_its_label(mode, jitter):
    images, ids = torch.zeros(200, 32, 32, 3, dtype=torch.uint8), torch.zeros(200, 32, 32).byte()
    images[:, 15, 17], ids[:, 15, 17] = 255, 1
    _, view = random_view(batch_of(images, ids), 32, 0, 4, mode, jitter)
    bright, labelled = view.images[..., 0].float(), view.ids == 1
    steps = torch.arange(32.0)
    for image, label in zip(bright, labelled, strict=True):
        for axis in (0, 1):  # the centres of mass, where the label is in the view
            mass, count = image.sum(axis), label.float().sum(axis)
            if count.sum():
                centre = (mass * steps).sum() / mass.sum()
                assert (centre - (count * steps).sum() / count.sum()).abs() < 1
    assert labelled.flatten(1).any(1).float().mean() > 0.5


def test_every_orientation_and_the_whole_tile_occur_and_no_pixel_is_resampled():
    _, view = random_view(coordinates(400, 40), 24, seed=1, epoch=2)
    y, x = view.images[..., 0].int(), view.images[..., 1].int()
    kinds = set()
    for rows, columns in zip(y, x, strict=True):
        step = (rows[1, 0] - rows[0, 0]).item(), (columns[0, 1] - columns[0, 0]).item()
        turned = (rows[0, 1] - rows[0, 0]).item(), (columns[1, 0] - columns[0, 0]).item()
        kinds.add((*step, *turned))
        assert len(torch.unique(rows * 40 + columns)) == 24 * 24
        assert rows.max() - rows.min() == 23
        assert columns.max() - columns.min() == 23
    assert len(kinds) == 8
    assert (y.min(), y.max(), x.min(), x.max()) == (0, 39, 0, 39)


@pytest.mark.parametrize("share", FOREGROUND)
@pytest.mark.parametrize(("mode", "jitter"), MODES)
@pytest.mark.parametrize("width", [40, 51])
def test_a_tile_meets_the_same_fate_in_any_company(width, mode, jitter, share):
    images = torch.randint(0, 256, (6, 40, width, 3), dtype=torch.uint8)
    ids = torch.randint(0, 256, (6, 40, width), dtype=torch.uint8)

    def view(part, seed, epoch):
        batch = batch_of(images[part], ids[part], range(10, 16)[part], 254)
        seen, moved = random_view(batch, 32, seed, epoch, mode, jitter, share)
        return seen, moved.ids

    together, moved = view(slice(6), 5, 7)
    for part in (slice(0, 1), slice(4, 5), slice(1, 3), slice(2, 6)):
        alone, few = view(part, 5, 7)
        assert torch.equal(alone, together[part])
        assert torch.equal(few, moved[part])
    for seed, epoch in ((5, 8), (6, 7)):
        assert not torch.equal(view(slice(6), seed, epoch)[0], together)


def hashed(tile, count, seed, epoch):
    """`uniform` in Python's integers."""
    numbers = []
    for k in range(count):
        z = tile * count + k + ((seed * 0x9E3779B97F4A7C15) ^ (epoch * 0xD1B54A32D192ED03))
        z = z * 0x9E3779B97F4A7C15 % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        numbers.append(((z ^ z >> 31) >> 40) / 2**24)
    return np.array(numbers)


def reference(image, ids, crop, tile, seed, epoch, mode, jitter, share):
    """The view of a tile and its ids, pixel by pixel in float64; values 0…255.

    The tile shows 254 aircraft. At a `share` of the views one of their pixels must be in the crop.
    """
    u, v = hashed(tile, 16, seed, epoch), hashed(tile, 8, seed, ~epoch)
    w = hashed(tile, 3, ~seed, epoch)
    pixels = np.argwhere(ids == 1 + math.floor(w[1] * 254))
    near_one = w[0] < share and len(pixels) > 0
    signed = 2 * u[6:] - 1
    strong = mode == "strong"
    low, high = 1 / (1 + jitter), min(1 + jitter, min(ids.shape) / crop)
    scale = low * (high / low) ** u[0]
    stretch = 1.2 ** ((2 * v[0] - 1) / 2) if strong else 1
    soft = max(0, (v[1] - 0.3) / 0.7) if strong else 0
    pitch, blur = 1 + 1.5 * soft * v[2], 1.7 * soft * (1 - v[2])
    near, weights = [], []
    for axis, length in enumerate(ids.shape):
        s = min(scale * (stretch, 1 / stretch)[axis], length / crop)
        first, last = 0, length - crop * s
        if near_one:
            pixel = pixels[math.floor(w[2] * len(pixels))][axis]
            first, last = max(0, math.floor(pixel - crop * s + 1)), min(last, pixel)
        origin = math.floor(first + u[4 + axis] * (last - first + 1))
        width = max(s * pitch, 1)
        reach = math.sqrt(width**2 + 6 * (s * blur) ** 2)
        rows = np.zeros((crop, length))
        for k in range(crop):
            step = crop - 1 - k if u[1 + axis] < 0.5 else k
            centre = (step + 0.5) * s
            m = math.floor(centre / width - 0.5 + 1e-9)
            for pixel, share in ((m, m + 1.5 - centre / width), (m + 1, centre / width - m - 0.5)):
                top = np.clip(origin + (pixel + 0.5) * width, 0, length)
                tent = np.maximum(0, 1 - np.abs(np.arange(length) + 0.5 - top) / reach)
                rows[k] += share * tent / tent.sum()
            near.append(min(origin + math.floor(centre + 1e-9), length - 1))
        weights.append(rows)
    y, x = np.array(near).reshape(2, crop)
    moved, view = ids[np.ix_(y, x)], image[np.ix_(y, x)].astype(float)
    if strong or jitter:
        view = np.einsum("ah,bw,hwc->abc", *weights, image.astype(float))
    if u[3] < 0.5:
        moved, view = moved.T, view.transpose(1, 0, 2)
    if mode == "none":
        return view, moved
    if strong:
        view = 255 * np.minimum(1, view / 255 * 1.7 ** (2 * v[3] - 1)) ** (1.7 ** (2 * v[4] - 1))
        angle, axis = 0.5 * (2 * v[6] - 1), np.ones(3) / math.sqrt(3)
        along = (view @ axis)[..., None] * axis  # Rodrigues' formula
        turned = math.cos(angle) * (view - along) + math.sin(angle) * np.cross(axis, view)
        view = along + 2 * v[5] * turned
    gain = 1.3 ** signed[0] * 1.1 ** signed[1:4]
    view = (view - 128) * gain + 128 + 32 * signed[4]
    field = augment._noise_field(torch.device("cpu")).numpy()
    at = [(math.floor(n * 701) + np.arange(crop)) % 701 for n in u[12:14]]
    view = view + field[np.ix_(*at)] * 12 * u[11]
    return (np.clip(view, 0, 255) if strong else view), moved


@pytest.mark.parametrize("share", FOREGROUND)
@pytest.mark.parametrize(("mode", "jitter"), MODES)
@pytest.mark.parametrize(("height", "width", "crop"), [(24, 24, 24), (20, 31, 12)])
def test_every_pixel_equals_a_plain_computation_in_float64(
    height, width, crop, mode, jitter, share
):
    images = torch.randint(0, 256, (12, height, width, 3), dtype=torch.uint8)
    ids = torch.randint(0, 256, (12, height, width), dtype=torch.uint8)
    tiles = [*range(11), 12_345_678]
    how = crop, 2**63 - 1, 9, mode, jitter, share
    got, view = random_view(batch_of(images, ids, tiles, 254), *how)
    for i, tile in enumerate(tiles):
        seed_and_more = crop, tile, *how[1:]
        pixels, moved = reference(images[i].numpy(), ids[i].numpy(), *seed_and_more)
        assert np.array_equal(view.ids[i].numpy(), moved)
        np.testing.assert_allclose(grey_levels(got)[i].numpy(), pixels, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
@pytest.mark.parametrize(("mode", "jitter"), MODES)
def test_a_share_of_the_crops_contains_an_aircraft(mode, jitter, dtype):
    """Tiles of 3 aircraft, squares of 4 pixels in corners and inside; every other has none."""
    ids = torch.zeros(400, 96, 120, dtype=dtype)
    for i, (y, x) in enumerate([(0, 0), (92, 116), (40, 70)], 1):
        ids[::2, y : y + 4, x : x + 4] = i
    batch = batch_of(torch.zeros(400, 96, 120, 3, dtype=torch.uint8), ids, None, 3)
    batch.classes[1::2] = 0
    shown = {}
    for share in (0.0, 0.3, 1.0):
        _, view = random_view(batch, 24, 1, 2, mode, jitter, share)
        shown[share] = view.ids
    has = {share: (ids[::2] > 0).flatten(1).any(1) for share, ids in shown.items()}
    usual = has[0.0].float().mean()
    assert usual < 0.25
    exact = mode in ("none", "light") and not jitter  # scaled, a pixel may be skipped
    assert has[1.0].float().mean() > (0.999 if exact else 0.95)
    assert has[0.3].float().mean().item() == pytest.approx(0.3 + 0.7 * usual.item(), abs=0.08)
    # Each aircraft as often as the others, and a view that is not chosen is the usual one.
    of_each = [(shown[1.0][::2] == i).flatten(1).any(1) for i in (1, 2, 3)]
    counts = [shows.float().mean().item() for shows in of_each]
    assert counts == pytest.approx([1 / 3] * 3, abs=0.1)
    usual_view = (shown[0.3] == shown[0.0]).flatten(1).all(1)
    assert usual_view.float().mean() > 0.65
    assert usual_view[1::2].all()


def test_a_small_aircraft_is_chosen_as_often_as_a_large_one_and_any_of_its_pixels():
    ids = torch.zeros(3000, 40, 40, dtype=torch.uint8)
    ids[:, 3, 5], ids[:, 10:30, 20:30], ids[:, 35:] = 2, 4, 255
    batch = batch_of(torch.zeros(3000, 40, 40, 3, dtype=torch.uint8), ids, None, 4)
    pixel = augment._pixel_of_an_aircraft(batch, 1.0, 0, 0)[..., 0]
    # Nothing shows the aircraft 1 and 3: these crops lie anywhere.
    kinds = torch.where(pixel[:, 0] < 0, 0, ids[0][pixel[:, 0], pixel[:, 1]].long())
    assert torch.bincount(kinds, minlength=5).tolist() == pytest.approx([1500, 0, 750, 0, 750], 0.1)
    large = pixel[kinds == 4].float()
    assert large.amin(0).tolist() == [10, 20]
    assert large.amax(0).tolist() == [29, 29]
    assert large.mean(0).tolist() == pytest.approx([19.5, 24.5], abs=0.7)


def weights(length, crop, scale, pitch=1.0, blur=0.0):
    size, step = torch.Size((length, length)), torch.arange(crop).expand(1, 2, -1)
    zero, sides = torch.zeros(1, 2, 1), torch.tensor([[length], [length]])
    lines = augment._Lines(step, zero, zero + scale, sides, size)
    return augment._weights(lines, pitch, blur)[0][0]


@pytest.mark.parametrize("crop", [24, 33, 48, 64, 96, 100])
def test_the_whole_tile_is_resampled_as_by_torch(crop):
    signal = torch.rand(1, 3, 48, 48)
    ours = weights(48, crop, 48 / crop)
    theirs = F.interpolate(signal, size=(crop, crop), mode="bilinear", antialias=True)
    torch.testing.assert_close(ours @ signal[0] @ ours.T, theirs[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("period", [2, 3])
def test_what_is_too_fine_for_the_view_becomes_grey(period):
    """A checkerboard and stripes, shrunk: no pattern is left, where the nearest pixel keeps one."""
    y, x = torch.meshgrid(torch.arange(96), torch.arange(96), indexing="ij")
    board = ((y + x) % period == 0).float()
    for scale in (1.7, 2.0):
        seen = weights(96, 48, scale)[4:-4]
        view = seen @ board @ seen.T
        assert (view - 1 / period).abs().max() < 0.13
        assert view.std() < 0.25 * board.std()


@pytest.mark.parametrize(("sigma", "near"), [(0.6, 0.35), (1.0, 0.12), (1.7, 0.06)])
def test_a_blur_is_nearly_that_of_a_gaussian(sigma, near):
    image = np.random.default_rng(0).integers(0, 256, (64, 64)).astype(np.float32)
    image = cv2.GaussianBlur(image, (0, 0), 0.7)
    ours = weights(64, 64, 1.0, blur=sigma).numpy()
    theirs = cv2.GaussianBlur(image, (0, 0), sigma)
    error = (ours @ image @ ours.T - theirs)[8:-8, 8:-8]
    assert error.std() < near * (image - theirs).std()
    variance = (ours[32] * (np.arange(64) - 32) ** 2).sum()
    assert variance == pytest.approx(sigma**2, abs=0.19)


def test_a_coarser_sensor_is_the_image_shrunk_and_enlarged():
    image = torch.rand(1, 1, 48, 48)
    ours = weights(48, 48, 1.0, pitch=2.0)
    small = F.interpolate(image, size=24, mode="bilinear", antialias=True)
    large = F.interpolate(small, size=48, mode="bilinear")
    inside = slice(5, -5)  # theirs takes what lies beyond the border from the border
    seen = (ours @ image[0, 0] @ ours.T)[inside, inside]
    torch.testing.assert_close(seen, large[0, 0, inside, inside], atol=1e-5, rtol=0)


def test_exposure_and_gamma_are_those_of_torchvision():
    images = torch.randint(0, 256, (5, 8, 8, 3)).float()
    u = torch.rand(5, 2)
    ours = augment._exposed(images.clone(), u)
    for i in range(5):
        exposure, gamma = (1.7 ** (2 * u[i] - 1)).tolist()
        bright = transforms.adjust_brightness(images[i].permute(2, 0, 1) / 255, exposure)
        theirs = transforms.adjust_gamma(bright, gamma).permute(1, 2, 0) * 255
        torch.testing.assert_close(ours[i], theirs, atol=1e-3, rtol=1e-5)


def test_saturation_and_hue_turn_about_the_grey_axis():
    u = torch.rand(50, 2)
    matrix = augment._colours(u)
    torch.testing.assert_close(matrix.sum(2), torch.ones(50, 3))  # grey stays grey
    grey = augment._colours(torch.tensor([[0.0, 0.3]]))[0]
    torch.testing.assert_close(grey, torch.full((3, 3), 1 / 3))  # no saturation
    # Half of the range is a saturation of 1 and no turn.
    torch.testing.assert_close(augment._colours(torch.tensor([[0.5, 0.5]]))[0], torch.eye(3))
    colours = np.float32([[[0.6, 0.4, 0.35], [0.3, 0.5, 0.35], [0.4, 0.45, 0.6]]])
    for angle in (-0.5, -0.2, 0.3, 0.5):
        turn = augment._colours(torch.tensor([[0.5, 0.5 + angle]]))[0].numpy()
        hues = [cv2.cvtColor(c, cv2.COLOR_RGB2HSV)[..., 0] for c in (colours, colours @ turn.T)]
        turned = (hues[1] - hues[0] + 180) % 360 - 180
        assert np.abs(turned - math.degrees(angle)).max() < 4  # a hexagon's angle, not a circle's


@pytest.mark.parametrize("value", [0, 1, 128, 254, 255])
def test_strong_views_stay_in_range(value):
    images = torch.full((64, 32, 32, 3), value, dtype=torch.uint8)
    views, _ = random_view(batch_of(images, images[..., 0]), 32, 0, 0, "strong", 1.0)
    levels = grey_levels(views)
    assert levels.min() > -1e-3
    assert levels.max() < 255 + 1e-3
    assert views.isfinite().all()


def test_strong_views_reach_from_dark_to_white():
    images = torch.randint(90, 150, (300, 32, 32, 3), dtype=torch.uint8)
    views, _ = random_view(batch_of(images, images[..., 0]), 32, 0, 0, "strong")
    levels = grey_levels(views).mean((1, 2, 3))
    assert levels.min() < 50
    assert levels.max() > 215


def test_a_third_of_strong_views_is_sharp():
    pitch, blur = augment._sensor(uniform(torch.arange(3000), 8, 0, 0)[:, 1:3])
    sharp = ((pitch == 1) & (blur == 0)).float().mean()
    assert sharp == pytest.approx(0.3, abs=0.03)
    assert 2.3 < pitch.max() < 2.5
    assert 1.5 < blur.max() < 1.7


@pytest.mark.parametrize("crop", [32, 64])
def test_scales_reach_from_a_half_to_two_and_stay_in_the_tile(crop):
    batch = coordinates(500, 64)
    ids = batch.ids.int() * 0 + torch.arange(64 * 64).view(64, 64)
    _, view = random_view(batch._replace(ids=ids), crop, 0, 0, "strong", 1.0)
    rows, columns = view.ids // 64, view.ids % 64
    spans = [(t.amax((1, 2)) - t.amin((1, 2)) + 1) / crop for t in (rows, columns)]
    assert all(span.min() < 0.55 for span in spans)
    assert all(span.max() > min(1.9, 64 / crop - 0.05) for span in spans)
    ratio = spans[0] / spans[1]
    assert ratio.max() > 1.1
    assert ratio.min() < 0.9


def test_strong_numbers_are_not_those_of_light():
    """Columns of one hash with two counts would be the same numbers."""
    tiles = torch.arange(3000)
    both = torch.cat([uniform(tiles, 16, 0, 0), uniform(tiles, 8, 0, ~0)], 1)
    assert (torch.corrcoef(both.T) - torch.eye(24)).abs().max() < 0.09  # 4.9 sigma of 276 pairs
    assert not set(both[:, :16].flatten().tolist()) >= set(both[:, 16:].flatten().tolist())


@pytest.mark.parametrize("share", FOREGROUND)
@pytest.mark.parametrize(("mode", "jitter"), MODES)
def test_a_view_waits_for_nothing_and_stays_on_its_device(monkeypatch, mode, jitter, share):
    def view(device):
        return lambda: random_view(noise_tiles(2, 96, device), 64, 0, 0, mode, jitter, share)[0]

    view(torch.device("cpu"))()  # makes the constants
    assert census(view(torch.device("cpu"))) == {}
    with fake_cuda(monkeypatch):
        view(CUDA)()
        with Census() as seen:
            images = view(CUDA)()
    assert seen.mixed == {}
    assert images.device == CUDA
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_light_changes_values_and_stays_near_the_image():
    grey = torch.full((64, 32, 32, 3), 100, dtype=torch.uint8)
    lit, _ = random_view(batch_of(grey, grey[..., 0]), 32, 0, 0)
    plain = normalise(grey)
    assert (lit - plain).abs().mean() > 0.1
    in_grey_levels = (lit - plain).mean((1, 2, 3)) * 57
    # contrast and cast act on 100 - 128 and are at most 1.3 and 1.1 either way
    bound = augment.BRIGHTNESS + 28 * 0.45 + 100 * 0.11
    assert in_grey_levels.abs().max() < bound


@pytest.mark.parametrize(("mode", "jitter"), MODES)
def test_views_are_channels_last_without_a_copy(mode, jitter):
    images, _ = random_view(coordinates(2, 64), 32, 0, 0, mode, jitter)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert normalise(coordinates(2, 64).images).is_contiguous(memory_format=torch.channels_last)


def test_numbers_are_uniform_and_uncorrelated():
    numbers = uniform(torch.arange(20_000), 8, seed=3, epoch=1)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    histogram = torch.histc(numbers, 16, 0, 1) / numbers.numel()
    assert (histogram - 1 / 16).abs().max() < 2e-3
    correlation = torch.corrcoef(numbers.T) - torch.eye(8)
    assert correlation.abs().max() < 0.04  # 4 sigma of 28 pairs at n = 20 000 is 0.028
    assert len(torch.unique(numbers[:100])) == 800


def test_normalise_is_what_pretrained_encoders_expect():
    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    expected = transforms.normalize(
        images.permute(0, 3, 1, 2).float() / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    )
    torch.testing.assert_close(normalise(images), expected, atol=1e-5, rtol=1e-5)
