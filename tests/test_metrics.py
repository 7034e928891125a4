"""Scores against a plain implementation of their definition."""

import pytest
import torch

from common.data import Batch
from common.semantic import confusion, recalled, scores


def brute(predicted, target, class_id):
    p, t = predicted[target != 255] == class_id, target[target != 255] == class_id
    return (p & t).sum().item(), (p | t).sum().item(), (p.sum() + t.sum()).item()


def test_scores_are_those_of_all_pixels_at_once():
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 4, (5, 16, 16), generator=generator)
    predicted = torch.randint(0, 4, (5, 16, 16), generator=generator).to(torch.uint8)
    target[torch.rand(target.shape, generator=generator) < 0.2] = 255
    names = ["ground", "a", "b", "c"]
    matrix = confusion(predicted, target, 4).sum(0)
    found = scores(matrix, names)
    for class_id, name in enumerate(names):
        hits, union, both = brute(predicted, target, class_id)
        assert found[f"IoU.{name}"] == pytest.approx(hits / union)
        assert found[f"Dice.{name}"] == pytest.approx(2 * hits / both)
    assert found["mIoU"] == pytest.approx(sum(found[f"IoU.{n}"] for n in names) / 4)
    counted = target != 255
    assert found["pixel_accuracy"] == pytest.approx(
        (predicted[counted] == target[counted]).float().mean().item()
    )


def test_an_absent_class_is_left_out_and_a_false_alarm_is_not():
    target = torch.zeros(1, 8, 8, dtype=torch.long)
    clean = scores(confusion(torch.zeros(1, 8, 8, dtype=torch.uint8), target, 2)[0], ["g", "a"])
    assert clean["mIoU"] == 1
    assert "IoU.a" not in clean
    alarm = torch.zeros(1, 8, 8, dtype=torch.uint8)
    alarm[0, 0, 0] = 1
    assert scores(confusion(alarm, target, 2)[0], ["g", "a"])["IoU.a"] == 0


def test_nothing_but_ignored_pixels():
    target = torch.full((1, 4, 4), 255)
    nothing = confusion(torch.zeros(1, 4, 4, dtype=torch.uint8), target, 2)
    assert scores(nothing[0], ["g", "a"]) == {}


def test_recall_by_size_is_that_of_each_aircraft_counted_alone():
    generator = torch.Generator().manual_seed(0)
    tiles, side = 3, 160
    ids = torch.zeros(tiles, side, side, dtype=torch.uint8)
    # Areas around the limits 32² and 96², and an aircraft of a tile that has no other.
    for tile, corners in enumerate([[(0, 0, 32, 32), (40, 0, 96, 96)], [(0, 0, 25, 41)], []]):
        for number, (x, y, width, height) in enumerate(corners, start=1):
            ids[tile, y : y + height, x : x + width] = number
    ids[1, 100:, :100] = 2
    ids[0, 0, 32] = 1  # one pixel more than 32²
    ids[2, 5:9] = 255
    classes = torch.zeros(tiles, 256, dtype=torch.uint8)
    classes[:, 255] = 255
    classes[0, 1:3] = torch.tensor([1, 2], dtype=torch.uint8)
    classes[1, 1:3] = 1
    right = torch.rand(ids.shape, generator=generator) < 0.7
    nothing = torch.empty(0)
    found = recalled(Batch(nothing, ids, classes, nothing), right)
    expected = torch.zeros(3, 2, dtype=torch.int64)
    for tile, number in [(0, 1), (0, 2), (1, 1), (1, 2)]:
        shown = ids[tile] == number
        area = int(shown.sum())
        size = 0 if area <= 32**2 else 1 if area <= 96**2 else 2
        expected[size] += torch.tensor([area, int((shown & right[tile]).sum())])
    assert expected[0].sum() == 0  # 25 × 41 is 1,025
    assert found.tolist() == expected.tolist()
