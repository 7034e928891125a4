"""Scores against a plain implementation of their definition."""

import pytest
import torch

from common.semantic import confusion, scores


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
