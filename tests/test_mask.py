"""Mask R-CNN: the network against torchvision's, and its commands."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from helpers.commands import losses, training
from helpers.instances import batch_of
from pycocotools import mask as rle
from torchvision.models import detection
from torchvision.models.detection import roi_heads
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torture import children, kills

from benchmarks.lib.synthetic import noise_tiles
from benchmarks.syncs import census
from common.cli import UserError
from common.distributed import process_group
from common.run import checkpoint
from common.speedups import Speedups, place
from mask import inference, train
from mask.model import (
    ANCHORS,
    BACKBONES,
    RATIOS,
    build_model,
    loss_fn,
    predict,
)
from mask.rcnn import Sampler, ignored, paste
from mask.scenes import Instance, detect, merge
from mask.targets import instance_targets

CPU = torch.device("cpu")


def torchvisions(model, side):
    """torchvision's Mask R-CNN with the modules of ours and our choice of samples."""
    heads = model.roi_heads
    theirs = detection.MaskRCNN(
        model.dense.backbone,
        min_size=side,
        max_size=side,
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
        rpn_anchor_generator=AnchorGenerator(ANCHORS, (RATIOS,) * len(ANCHORS)),
        rpn_head=model.dense.head,
        rpn_pre_nms_top_n_train=model.rpn._pre_nms_top_n["training"],
        rpn_post_nms_top_n_train=model.rpn._post_nms_top_n["training"],
        box_roi_pool=heads.box_roi_pool,
        box_head=heads.box_head,
        box_predictor=heads.box_predictor,
        mask_roi_pool=heads.mask_roi_pool,
        mask_head=heads.mask_head,
        mask_predictor=heads.mask_predictor,
    )
    return theirs


def test_the_losses_are_torchvisions_to_the_bit():
    torch.manual_seed(0)
    model = build_model("resnet18", 3, norm="group", proposals=60).train()
    images, targets = batch_of(2, ignore=False)
    ours = model(images, targets)
    theirs = torchvisions(model, 96).train()
    for part, mine in ((theirs.rpn, model.rpn), (theirs.roi_heads, model.roi_heads)):
        part.fg_bg_sampler = mine.fg_bg_sampler
    expected = theirs(list(images), targets)
    assert {k: v.item() for k, v in ours.items()} == {k: v.item() for k, v in expected.items()}


@pytest.mark.parametrize("backbone", ["resnet50", "resnet50_v2"])
def test_the_layers_are_torchvisions(backbone):
    """Even the RPN's: torchvision has three anchors of each size, too."""

    def shapes(model):
        return sorted(tuple(value.shape) for value in model.state_dict().values())

    builder = getattr(detection, f"maskrcnn_{backbone.replace('50', '50_fpn')}")
    theirs = builder(weights=None, weights_backbone=None, num_classes=3)
    assert shapes(build_model(backbone, 3)) == shapes(theirs)


def test_at_most_half_of_torchvisions_syncs_are_left():
    torch.manual_seed(0)
    model = build_model("resnet18", 2, proposals=60).train()
    images, targets = batch_of(4, ignore=False)
    theirs = torchvisions(model, 96).train()
    model(images, targets), theirs(list(images), targets)  # constants and scales are made once
    ours = census(lambda: model(images, targets))
    expected = census(lambda: theirs(list(images), targets))
    assert 0 < ours.total() <= expected.total() / 2, (ours, expected)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_trains_and_finds(backbone):
    torch.manual_seed(0)
    model = build_model(backbone, 2, proposals=40)
    images, targets = batch_of(2)
    loss = loss_fn(model.train(), images, targets)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    levels = [tuple(f.shape[-2:]) for f in model.dense(images)[:4]]
    assert levels == [(24, 24), (12, 12), (6, 6), (3, 3)]
    found = predict(model.eval(), images)
    assert len(found) == 2
    for one in found:
        assert one["masks"].shape == (len(one["scores"]), 96, 96)
        assert one["masks"].dtype == torch.bool


def test_nothing_but_ground_trains():
    torch.manual_seed(0)
    model = build_model("resnet18", 2, proposals=40).train()
    images, _ = batch_of(2)
    empty = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.long),
        "masks": torch.zeros(0, 96, 96, dtype=torch.uint8),
        "ignore": torch.zeros(96, 96, dtype=torch.bool),
        "key": torch.tensor(0),
    }
    for dtype in (None, torch.bfloat16):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = loss_fn(model, images, [empty, empty])
        model.zero_grad()
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad is not None for p in model.parameters())


def test_boxes_on_ignored_ground_are_no_negatives():
    ignore = torch.zeros(96, 96, dtype=torch.bool)
    ignore[:, 48:] = True
    boxes = torch.tensor([[0, 0, 40, 40], [50, 0, 90, 40], [40, 0, 50, 10], [44, 0, 58, 10.0]])
    assert ignored(boxes, ignore).tolist() == [False, True, False, True]
    model = build_model("resnet18", 2, proposals=40).train()
    target = batch_of(1)[1][0] | {"ignore": ignore, "boxes": boxes[:1]}
    labels, _ = model.rpn.assign_targets_to_anchors([boxes], [target])
    assert labels[0][0] == 1
    assert labels[0][1] == labels[0][3] == -1


def test_masks_return_to_where_they_were_seen():
    """Send crosses with thin wings through the targets of the mask head and back."""
    rows, columns = torch.meshgrid(torch.arange(96), torch.arange(80), indexing="ij")
    crosses, frames = [], []
    for x, y, reach in ((30, 40, 21), (55, 23, 15), (41, 64, 25), (0, 50, 17)):
        across, along = (columns - x).abs(), (rows - y).abs()
        cross = ((across < 3) & (along <= reach)) | ((along < 3) & (across <= reach))
        crosses.append(cross)
        seen = cross.nonzero()
        (y1, x1), (y2, x2) = seen.amin(0), seen.amax(0) + 1
        frames.append(torch.stack([x1, y1, x2, y2]))
    truth, boxes = torch.stack(crosses), torch.stack(frames).float()
    boxes += torch.tensor([[-0.4, 0.3, 0.7, 1.6]])  # detected boxes do not end at whole pixels
    targets = roi_heads.project_masks_on_boxes(truth.byte(), boxes, torch.arange(len(boxes)), 28)

    def iou(found):
        return ((truth & found).sum((1, 2)) / (truth | found).sum((1, 2))).min()

    theirs = roi_heads.paste_masks_in_image(targets[:, None].float(), boxes, (96, 80))[:, 0] > 0.5
    assert iou(paste(targets, boxes, (96, 80))) > max(0.85, iou(theirs))


def test_the_sampler_takes_what_there_is_and_the_same_again():
    labels = torch.tensor([1] * 40 + [0] * 400 + [-1] * 60)
    sampler = Sampler(64, 0.25, salt=1)
    sampler.keys = [torch.tensor(7)] * 2 + [torch.tensor(8)]
    few = torch.tensor([1] * 3 + [0] * 20 + [-1] * 477)
    (p, again, other), (n, _, _) = sampler([labels, labels, labels])
    assert (p.sum(), n.sum()) == (16, 48)
    assert p[labels != 1].sum() == n[labels != 0].sum() == 0
    assert torch.equal(p, again)
    assert not torch.equal(p, other)
    sampler.keys = [torch.tensor(7)]
    (p,), (n,) = sampler([few])
    assert (p.sum(), n.sum()) == (3, 20)
    counts = torch.zeros(500)
    for key in range(300):
        sampler.keys = [torch.tensor(key)]
        counts += sampler([labels])[1][0]
    assert counts[40:440].min() > 10  # each is chosen sometimes: 36 times of 300 on average


def test_targets_leave_slivers_out():
    batch = noise_tiles(1, 96, CPU)
    batch.ids[0, 0, :9] = 2
    batch.ids[batch.ids == 2] = 0
    batch.ids[0, 0, :9] = 2
    (all_of_them,), (large,) = instance_targets(batch), instance_targets(batch, 10)
    assert len(all_of_them["boxes"]) == len(large["boxes"]) + 1
    assert large["ignore"][0, :9].all()
    assert not all_of_them["ignore"][0, :9].any()


@pytest.fixture(scope="module")
def masked(few, tmp_path_factory):
    """The output folder of a short Mask R-CNN training."""
    output = tmp_path_factory.mktemp("mask") / "run"
    train.main(training(few, output, "--max-steps", 10, "--eval-freq", 1, model="mask"))
    return output


def test_a_run_can_be_read_and_scored(masked, tiled, capsys):
    names = {path.name for path in masked.iterdir()}
    assert names >= {"checkpoint.pth", "model_best.pth", "log.jsonl", "val_predictions.json"}
    content = checkpoint.load(masked / "checkpoint.pth", "mask")
    assert 0 <= content["scores"]["mask_AP"] <= content["best"] <= 1
    words = ["--data-path", str(tiled), "--resume", str(masked / "checkpoint.pth"), "-b", "4"]
    train.main([*words, "--test-only", "-j", "0", "--device", "cpu"])
    scores = json.loads((masked / "test_scores.json").read_text())
    assert f"mask_AP {scores['mask_AP']:.4f}" in capsys.readouterr().out
    assert (masked / "test_sheet.jpg").stat().st_size > 1000


def test_two_processes_learn_what_one_does(tiled, tmp_path):
    base = ["--max-steps", 4, "--norm", "group", "--eval-freq", 99]
    train.main(training(tiled, tmp_path / "one", *base, model="mask"))
    words = training(tiled, tmp_path / "two", *base, "-b", 2, model="mask")
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    ranks = children.start_ranks(partial(kills.run, "mask.train", words), logs)
    assert [children.end(rank) for rank in ranks] == [0, 0], logs[0].read_text()
    assert "world size 2" in logs[0].read_text()
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=0.02)


def train_beside_ground() -> None:
    """One of two processes; the tiles of the second show only ground."""
    torch.set_num_threads(1)
    with process_group("cpu") as process:
        torch.manual_seed(0)
        model = build_model("resnet18", 2, norm="group", proposals=40).train()
        objective = place(model, loss_fn, process, Speedups())
        images, targets = batch_of(2)
        if process.rank == 1:
            for target in targets:
                target |= {k: target[k][:0] for k in ("boxes", "labels", "masks")}
        for _ in range(2):
            objective(images, targets).backward()
        total = sum(p.grad.double().abs().sum() for p in model.parameters())
        print("gradients", total.isfinite().item(), total.item(), flush=True)


def test_a_rank_that_sees_only_ground_keeps_up(tmp_path):
    """It takes part in the all-reduces, and ends with the same weights as the other."""
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    ranks = children.start_ranks(train_beside_ground, logs)
    assert [children.end(rank) for rank in ranks] == [0, 0], logs[0].read_text()
    first, second = (log.read_text().splitlines()[-1] for log in logs)
    assert first == second
    assert first.startswith("gradients True")


@pytest.mark.parametrize(
    ("flags", "tolerance"),
    [
        (["--channels-last"], 0.02),
        (["--amp", "--amp-dtype", "bf16", "--channels-last"], 0.1),
        (["--compile"], 0.02),
        (["--grad-accum", "2", "-b", "2", "--norm", "group"], None),
    ],
)
def test_techniques_change_the_speed_and_not_what_is_learnt(
    few, masked, tmp_path, monkeypatch, flags, tolerance
):
    """Only the first step: the proposals of later steps depend on it."""
    # Traced and differentiated only; compiling the code would take minutes.
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **how: compile_(self, backend="aot_eager", **how)
    )
    words = ["--max-steps", 2, "--eval-freq", 99, *flags]
    train.main(training(few, tmp_path / "run", *words, model="mask"))
    found = losses(tmp_path / "run")
    assert np.isfinite(found).all()
    if tolerance:
        np.testing.assert_allclose(found[0], losses(masked)[0], rtol=tolerance)
    names = checkpoint.load(tmp_path / "run/checkpoint.pth")["model"]
    assert not any("_orig_mod" in name or name.startswith("module.") for name in names)


def test_prediction_of_a_folder(masked, tiled, tmp_path):
    words = [str(masked / "checkpoint.pth"), str(tiled / "test/images"), str(tmp_path / "out")]
    words += ["--device", "cpu", "--window", "128", "--score-threshold", "0.05"]
    inference.main([*words, "-i", "0"])
    report = json.loads((tmp_path / "out/predictions.json").read_text())
    (image,) = report["images"]
    assert (tmp_path / "out" / image["overlay"]).stat().st_size > 1000
    for one in report["annotations"]:
        assert one["area"] == rle.area(one["segmentation"])
        assert one["bbox"] == [int(v) for v in rle.toBbox(one["segmentation"])]
        assert one["category_id"] == 1


# --- Whole scenes from windows -------------------------------------------------------------------


def finder(scene):
    """A network that finds, in any window, exactly the blobs of `scene` [H,W] that it sees."""

    def find(crops):
        found = []
        for crop in crops:
            ids = crop[0].long()
            numbers = [int(n) for n in ids.unique() if n > 0]
            masks = (
                torch.stack([ids == n for n in numbers]) if numbers else torch.zeros(0, *ids.shape)
            )
            scores = torch.tensor([0.9 - 0.01 * n for n in numbers])
            labels = torch.ones(len(numbers), dtype=torch.long)
            found.append({"masks": masks.bool(), "scores": scores, "labels": labels})
        return found

    return lambda crops: find(crops), torch.as_tensor(scene).float()[None].expand(3, -1, -1)


@pytest.mark.parametrize("size", [(100, 150), (64, 64), (40, 200), (333, 257)])
def test_an_aircraft_at_a_seam_comes_out_once_and_whole(size):
    rng = np.random.default_rng(0)
    scene = np.zeros(size, np.uint8)
    for number in range(1, 12):
        y, x = rng.integers(0, size[0] - 12), rng.integers(0, size[1] - 12)
        h, w = rng.integers(6, 30, 2)
        part = scene[y : y + h, x : x + w]
        part[part == 0] = number
    predict_, image = finder(scene)
    found = detect(image, predict_, 64, 0.5, 3, 0.5)
    numbers = [n for n in np.unique(scene) if n]
    assert len(found) == len(numbers)
    painted = np.zeros_like(scene)
    for one in found:
        x1, y1, x2, y2 = one.box
        assert x2 <= size[1]
        assert y2 <= size[0]
        number = round((0.9 - one.score) * 100)
        painted[y1:y2, x1:x2][one.mask] = number
    assert np.array_equal(painted, scene)


def test_neighbours_stay_apart_and_classes_too():
    full = np.ones((10, 10), bool)
    left, right = (0, 0, 64, 64), (32, 0, 96, 64)
    a, b = Instance(1, 0.9, 30, 5, full, left), Instance(1, 0.8, 41, 5, full, right)
    assert len(merge([a, b])) == 2
    other = Instance(2, 0.8, 30, 5, full, right)
    assert len(merge([a, other])) == 2
    (one,) = merge([Instance(1, 0.7, 36, 5, full, left), Instance(1, 0.8, 36, 5, full, right)])
    assert one.score == 0.8


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--crop-size", "100"], "not a multiple of 32"),
        (["--cuda-graphs"], "needs a CUDA device"),
        (["--backbone", "vgg"], "invalid choice"),
        (["--test-only"], "add --resume"),
    ],
)
def test_mistakes_are_answered_by_one_sentence(tiled, tmp_path, words, sentence):
    with pytest.raises(UserError) as caught:
        train.main(training(tiled, tmp_path / "run", *words, model="mask"))
    assert sentence in str(caught.value)


def test_other_classes_than_the_checkpoints_are_refused(masked, tiled_copy):
    index = tiled_copy / "test/instances_tiled.json"
    index.write_text(index.read_text().replace('"name":"aircraft"', '"name":"ship"'))
    words = ["--data-path", str(tiled_copy), "--resume", str(masked / "checkpoint.pth")]
    with pytest.raises(UserError, match="the checkpoint"):
        train.main([*words, "--test-only"])
    shutil.rmtree(tiled_copy / "test")
    with pytest.raises(UserError, match="there is no folder"):
        train.main([*words, "--test-only"])
