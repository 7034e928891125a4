"""Augmentation: images and masks move together, exactly; randomness depends on the tile."""

import pytest
import torch

from common import augment
from common.augment import normalise, random_view, uniform
from common.data import Batch


def batch_of(images, ids, tiles=None):
    tiles = torch.arange(len(images)) if tiles is None else torch.tensor(tiles)
    return Batch(images, ids, torch.zeros(len(images), 256, dtype=torch.uint8), tiles)


def coordinates(count, side):
    """Tiles whose pixels hold their position: row, column and their xor; ids are the xor."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    image = torch.stack([y, x, y ^ x], -1).to(torch.uint8)
    return batch_of(image.expand(count, -1, -1, -1), image[..., 2].expand(count, -1, -1))


@pytest.mark.parametrize("jitter", [0.0, 0.5])
def test_image_and_mask_move_together(jitter):
    _, view = random_view(coordinates(32, 96), 48, seed=0, epoch=0, scale_jitter=jitter)
    assert torch.equal(view.images[..., 2], view.ids)
    assert torch.equal(view.images[..., 0] ^ view.images[..., 1], view.ids)


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


def test_a_tile_meets_the_same_fate_in_any_company():
    images = torch.randint(0, 256, (6, 40, 40, 3), dtype=torch.uint8)
    ids = torch.randint(0, 256, (6, 40, 40), dtype=torch.uint8)
    together, view = random_view(batch_of(images, ids, range(10, 16)), 32, 5, 7, 0.3)
    for i in range(6):
        alone, part = random_view(
            batch_of(images[i : i + 1], ids[i : i + 1], [10 + i]), 32, 5, 7, 0.3
        )
        assert torch.equal(alone[0], together[i])
        assert torch.equal(part.ids[0], view.ids[i])
    other, _ = random_view(batch_of(images, ids, range(10, 16)), 32, 5, 8, 0.3)
    assert not torch.equal(other, together)


def test_light_changes_values_and_stays_near_the_image():
    grey = torch.full((64, 32, 32, 3), 100, dtype=torch.uint8)
    lit, _ = random_view(batch_of(grey, grey[..., 0]), 32, 0, 0)
    plain = normalise(grey)
    assert (lit - plain).abs().mean() > 0.1
    in_grey_levels = (lit - plain).mean((1, 2, 3)) * 57
    # contrast and cast act on 100 - 128 and are at most 1.3 and 1.1 either way
    bound = augment.BRIGHTNESS + 28 * 0.45 + 100 * 0.11
    assert in_grey_levels.abs().max() < bound


def test_views_are_channels_last_without_a_copy():
    images, _ = random_view(coordinates(2, 64), 32, 0, 0)
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
    from torchvision.transforms.v2.functional import normalize

    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    reference = normalize(
        images.permute(0, 3, 1, 2).float() / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    )
    torch.testing.assert_close(normalise(images), reference, atol=1e-5, rtol=1e-5)
