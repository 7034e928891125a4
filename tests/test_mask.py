"""Mask R-CNN: the network against torchvision's, and its commands."""

import json
import re
import shutil
from argparse import Namespace
from functools import partial

import numpy as np
import pytest
import torch
from helpers.commands import losses, training
from helpers.instances import batch_of, numbered
from helpers.rasters import Memory
from helpers.scenes import random_ids
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as rle
from torchvision.models.detection import roi_heads
from torture import children

from benchmarks.lib.synthetic import noise_tiles
from common.args import Speedups
from common.cli import UserError
from common.distributed import process_group
from common.predict.pictures import Reduced
from common.predict.windows import Tiling
from common.run import checkpoint
from common.speedups import place
from mask import inference, scenes, train
from mask import model as mask_model
from mask.boxes import Detections, paste
from mask.coco import DEFINITION
from mask.model import build_model, from_checkpoint, loss_fn, predict
from mask.scenes import Instance, detect, merge
from mask.targets import instance_targets, training_views
from rareplanes.scene import read_scene, scene_stems

pytestmark = pytest.mark.usefixtures("thin")
CPU = torch.device("cpu")


def test_nothing_but_ground_trains():
    torch.manual_seed(0)
    model = build_model("resnet18", 2, proposals=40).train()
    images, targets = batch_of(2)
    for value in targets[:3]:
        value.zero_()
    for dtype in (None, torch.bfloat16):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = loss_fn(model, images, targets)
        model.zero_grad()
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad is not None for p in model.parameters())


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


def test_every_seed_can_train():
    """A large one, shifted to the left, would leave int64."""
    batch = noise_tiles(2, 64, CPU)
    options = partial(
        Namespace, crop_size=64, augment="strong", scale_jitter=1.0, foreground=0.5, max_aircraft=9
    )
    keys = [
        training_views(options(seed=seed))(batch, epoch)[1].key
        for seed in (0, 1, 2**19 - 1, 2**19 + 2, 20261128, 2**64)
        for epoch in (0, 1)
    ]
    assert len(set(torch.cat(keys).tolist())) == 2 * 2 * 5  # 2**64 has the keys of seed 0


def test_targets_leave_slivers_out():
    batch = noise_tiles(1, 96, CPU)
    batch.ids[0, 0, :9] = 2
    batch.ids[batch.ids == 2] = 0
    batch.ids[0, 0, :9] = 2
    everything, large = instance_targets(batch), instance_targets(batch, min_pixels=10)
    assert (everything.labels > 0).sum() == (large.labels > 0).sum() + 1
    assert (large.ids[0, 0, :9] == -1).all()
    assert not (everything.ids[0, 0, :9] == -1).any()


@given(places=st.integers(1, 12), least=st.integers(1, 60), seed=st.integers(0, 10**6))
def test_targets_are_the_largest_aircraft(places, least, seed):
    """Against a loop over the aircraft; those without a place become ignored ground."""
    ids = random_ids(np.random.default_rng(seed), 48, 40, 9)
    batch = noise_tiles(1, 8, CPU)._replace(ids=torch.tensor(ids.astype(np.uint8))[None])
    batch.classes[0, 1:10] = torch.arange(1, 10)
    counts = {n: int((ids == n).sum()) for n in range(1, 10)}
    visible = sorted((n for n in counts if counts[n] >= least), key=lambda n: (-counts[n], n))
    kept = sorted(visible[:places])
    boxes, labels, found, _ = instance_targets(batch, places, least)
    assert labels[0].tolist() == kept + [0] * (places - len(kept))
    for k, number in enumerate(kept):
        ys, xs = np.nonzero(ids == number)
        assert boxes[0, k].tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        assert np.array_equal(found[0] == k + 1, ids == number)
    assert not boxes[0, len(kept) :].any()
    assert np.array_equal(found[0] == -1, ~np.isin(ids, [0, *kept]))


@pytest.fixture(scope="module")
def masked(few, thin, tmp_path_factory):
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
    printed = capsys.readouterr().out
    assert f"mask_AP {scores['mask_AP']:.4f}" in printed
    assert f"({DEFINITION})" in printed.splitlines()
    assert (masked / "test_sheet.jpg").stat().st_size > 1000


def train_beside_ground(backbone: str, grad_accum: int) -> None:
    """One of two processes; the tiles of the second show only ground."""
    torch.set_num_threads(1)
    with process_group("cpu") as process:
        torch.manual_seed(0)
        model = build_model(backbone, 2, norm="group", proposals=40).train()
        objective = place(model, loss_fn, process, Speedups(grad_accum=grad_accum))
        images, targets = batch_of(2)
        if process.rank == 1:
            for value in targets[:3]:
                value.zero_()
        for _ in range(2):
            objective(images, targets).backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        total = sum(p.grad.double().abs().sum() for p in trained)
        print("gradients", total.isfinite().item(), total.item(), flush=True)


@pytest.mark.parametrize(("backbone", "grad_accum"), [("resnet18", 1), ("efficientnet-b0", 2)])
def test_a_rank_that_sees_only_ground_keeps_up(tmp_path, backbone, grad_accum):
    """It takes part in the all-reduces, and ends with the same weights as the other.

    smp's EfficientNet has weights that its features do not use. With `grad_accum` DDP does not
    look for such weights.
    """
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    ranks = children.start_ranks(partial(train_beside_ground, backbone, grad_accum), logs)
    assert [children.end(rank) for rank in ranks] == [0, 0], logs[0].read_text()
    first, second = (log.read_text().splitlines()[-1] for log in logs)
    assert first == second
    assert first.startswith("gradients True")


def test_crowded_tiles_are_counted(few, tmp_path, capsys):
    words = ["--max-steps", 1, "--eval-freq", 99, "--max-aircraft", 1]
    train.main(training(few, tmp_path / "run", *words, model="mask"))
    said = capsys.readouterr().out
    assert re.search(r"warning: [1-9]\d* of \d+ tiles show more than 1 aircraft \(up to \d\)", said)
    assert np.isfinite(losses(tmp_path / "run")).all()


def test_a_checkpoint_of_before_loads(masked):
    """It has no --mask-rois, and the names of its weights are those of today."""
    content = checkpoint.load(masked / "checkpoint.pth", "mask")
    del content["args"]["mask_rois"], content["args"]["max_aircraft"]
    images, _ = batch_of(1)
    assert len(predict(from_checkpoint(content).eval(), images)) == 1
    names = {re.match(r"dense\.(backbone|head)|roi_heads\.\w+", n)[0] for n in content["model"]}
    parts = ("box_head", "box_predictor", "mask_head", "mask_predictor")
    heads = {f"roi_heads.{part}" for part in parts}
    assert names == {"dense.backbone", "dense.head"} | heads


@pytest.mark.parametrize("backbone", ["tu-hf-hub:evil/x", "tu-resnet18.a:b", "vgg", None, []])
def test_a_checkpoint_with_an_invalid_backbone_is_refused(masked, monkeypatch, backbone):
    monkeypatch.setattr(mask_model, "EncoderWithFPN", None)  # which could download it
    content = checkpoint.load(masked / "checkpoint.pth", "mask")
    content["args"]["backbone"] = backbone
    with pytest.raises(UserError, match=r"not known|cannot be built"):
        checkpoint.rebuild(content, from_checkpoint)


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


@pytest.mark.parametrize("size", [(100, 150), (64, 64), (40, 200), (333, 257)])
def test_an_aircraft_at_a_seam_comes_out_once_and_whole(size):
    rng = np.random.default_rng(0)
    scene = np.zeros(size, np.uint8)
    for number in range(1, 12):
        y, x = rng.integers(0, size[0] - 12), rng.integers(0, size[1] - 12)
        h, w = rng.integers(6, 30, 2)
        part = scene[y : y + h, x : x + w]
        part[part == 0] = number
    pixels = np.repeat(scene[:, :, None], 3, 2)
    picture = Reduced(size[1], size[0], 500)
    found = detect(Memory(pixels), numbered, Tiling(64, 0.5, 3), 0.5, 100, picture)
    assert np.array_equal(picture.image(), pixels)
    numbers = [n for n in np.unique(scene) if n]
    assert len(found) == len(numbers)
    painted = np.zeros_like(scene)
    for one in found:
        x1, y1, x2, y2 = one.box
        assert x2 <= size[1]
        assert y2 <= size[0]
        number = round((0.9 - one.score) * 1000)
        painted[y1:y2, x1:x2][one.mask] = number
    assert np.array_equal(painted, scene)


def test_neighbours_stay_apart_and_classes_too():
    full = np.ones((10, 10), bool)
    left, right = (0, 0, 64, 64), (32, 0, 96, 64)
    a, b = Instance(1, 0.9, 30, 5, full, left), Instance(1, 0.8, 41, 5, full, right)
    assert len(merge([a, b])) == 2
    other = Instance(2, 0.8, 30, 5, full[:6], right)
    assert len(merge([a, other])) == 2  # such as an engine on an aircraft
    (one,) = merge([Instance(1, 0.7, 36, 5, full, left), Instance(1, 0.8, 36, 5, full, right)])
    assert one.score == 0.8


def test_a_sliver_at_a_window_s_border_is_no_second_aircraft():
    """A mask of the next window that is a pixel off has an IoU below a half with a few pixels."""
    left, right = (0, 0, 64, 64), (32, 0, 96, 64)
    whole = np.ones((10, 20), bool)
    sliver = np.ones((10, 2), bool)
    (one,) = merge([Instance(1, 0.9, 15, 5, whole, left), Instance(1, 0.6, 32, 6, sliver, right)])
    assert one.score == 0.9
    assert one.box == (15, 5, 35, 16)


@pytest.mark.parametrize("sure", [0.7, 0.95])
def test_where_windows_disagree_the_surer_one_is_right(sure):
    """One window shows two aircraft, the next one aircraft in the place of both."""
    left, right = (0, 0, 64, 64), (32, 0, 96, 64)
    small, both = np.ones((10, 10), bool), np.ones((10, 20), bool)
    found = [Instance(1, 0.9, 36, 5, small, left), Instance(1, 0.8, 46, 5, small, left)]
    found.append(Instance(1, sure, 36, 5, both, right))
    apart = {(36, 5, 46, 15): 0.9, (46, 5, 56, 15): 0.8}
    together = {(36, 5, 56, 15): 0.95}
    assert {one.box: one.score for one in merge(found)} == (apart if sure < 0.8 else together)


@pytest.mark.parametrize("other", [(0, 0, 64, 64), (64, 0, 128, 64)])
@pytest.mark.parametrize(("inside", "count"), [(0.7, 2), (0.79, 2), (0.8, 1), (1, 1)])
def test_an_aircraft_counts_once(other, inside, count):
    """What lies to 80 % in the mask of another is no second aircraft, in a window and across."""
    window, whole = (0, 0, 64, 64), np.ones((10, 20), bool)
    whole[:, :10] = np.arange(100).reshape(10, 10) < round(100 * inside)
    part = Instance(1, 0.6, 40, 5, np.ones((10, 10), bool), other)
    kept = merge([part, Instance(1, 0.9, 40, 5, whole, window)])
    assert [one.score for one in kept] == [0.9, 0.6][:count]


def test_one_aircraft_in_two_classes_counts_once():
    full, window = np.ones((10, 10), bool), (0, 0, 64, 64)
    found = [Instance(1, 0.7, 30, 5, full, window), Instance(2, 0.8, 31, 5, full, window)]
    assert [one.label for one in merge(found)] == [2]


def apron(rng, shapes):
    """Aircraft set so close that they touch their neighbours or lie over them, uint8 [H,W]."""
    ids = np.zeros((420, 600), np.uint8)
    number, y = 0, 5
    while y < 330:
        x, deepest = 5, 20
        while x < 520 and number < 250:
            shape = shapes[rng.integers(len(shapes))]
            height, width = shape.shape
            part = ids[y : y + height, x : x + width]
            if part.shape == shape.shape:
                number, deepest = number + 1, max(deepest, height)
                part[shape & (part == 0)] = number
            x += int(width * rng.uniform(0.75, 0.95))
        y += int(deepest * 0.85)
    return np.where(np.bincount(ids.ravel())[ids] < 100, 0, ids)


@pytest.mark.parametrize("seed", range(3))
def test_no_aircraft_of_a_crowded_apron_is_lost(tiled, seed):
    """Rendered aircraft that overlap; the detections are the true masks, as windows cut them."""
    shapes = []
    for stem in scene_stems(tiled / "test"):
        ids = read_scene(tiled / "test", stem).ids
        for number in np.unique(ids[ids > 0]):
            rows, columns = np.nonzero(ids == number)
            box = (slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1))
            shapes += [ids[box] == number] if 150 < len(rows) < 4000 else []
    ids = apron(np.random.default_rng(seed), shapes)
    pixels = np.repeat(ids[:, :, None], 3, 2)
    picture = Reduced(600, 420, 500)
    side = 128

    def oracle(crops):
        return [truth_of(crop[..., 0].numpy()) for crop in crops]

    def truth_of(crop):
        numbers = [n for n in np.unique(crop) if n]
        masks = torch.tensor(np.array([crop == n for n in numbers]).reshape(-1, side, side))
        scores = torch.tensor([0.9 - 0.001 * n for n in numbers])
        return {"masks": masks, "scores": scores, "labels": torch.ones(len(numbers)).long()}

    scene = Memory(pixels)
    found = detect(scene, oracle, Tiling(side, 0.5, 3), 0.0, 10**6, picture)
    painted = np.zeros_like(ids)
    for one in found:
        x1, y1, x2, y2 = one.box
        painted[y1:y2, x1:x2][one.mask] = round((0.9 - one.score) * 1000)
    assert len(found) == len(np.unique(ids)) - 1 > 15
    assert np.array_equal(painted, ids)


def test_merging_does_not_compare_what_is_far_apart(monkeypatch):
    """Ten times as many aircraft on ten times the ground are ten times as many comparisons."""
    compared, counts, overlap = [], [], scenes._overlap
    monkeypatch.setattr(scenes, "_overlap", lambda *two: compared.append(1) or overlap(*two))
    for columns in (5, 50):
        compared.clear()
        found = [
            Instance(1, 0.5, 40 * x + k, 40 * y, np.ones((30, 30), bool), (k, k, 9999, 999))
            for x in range(columns)
            for y in range(20)
            for k in (0, 1)
        ]
        assert len(merge(found)) == columns * 20
        counts.append(len(compared))
    assert counts[1] == 10 * counts[0]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--crop-size", "100"], "not a multiple of 32"),
        (["--cuda-graphs"], "needs a CUDA device"),
        (["--backbone", "vgg"], "--backbone 'vgg' cannot be used (it is not known"),
        (["--backbone", "tu-legacy_xception"], "the strides of its features are not 4"),
        (["--test-only"], "add --resume"),
    ],
)
def test_mistakes_are_answered_by_one_sentence(tiled, tmp_path, words, sentence):
    with pytest.raises(UserError) as caught:
        train.main(training(tiled, tmp_path / "run", *words, model="mask"))
    assert sentence in str(caught.value)


def test_other_classes_than_the_checkpoints_are_refused(masked, tiled_copy):
    index = tiled_copy / "test/instances_tiled.json"
    coco = json.loads(index.read_text())
    coco["categories"].append({"id": 2, "name": "ship"})
    index.write_text(json.dumps(coco))
    words = ["--data-path", str(tiled_copy), "--resume", str(masked / "checkpoint.pth")]
    with pytest.raises(UserError, match="the checkpoint"):
        train.main([*words, "--test-only"])
    shutil.rmtree(tiled_copy / "test")
    with pytest.raises(UserError, match="there is no folder"):
        train.main([*words, "--test-only"])


def test_cudnn_does_not_search_for_each_number_of_boxes(monkeypatch):
    searched = []

    class Model:
        def detect(self, images):
            boxes = torch.tensor([[[1.0, 1, 5, 5], [0, 0, 0, 0]]])
            return None, Detections(boxes, torch.tensor([[0.9, 0]]), torch.tensor([[1, 1]]))

        def outline(self, pyramid, rois, labels):
            searched.append(torch.backends.cudnn.benchmark)
            return torch.ones(len(rois), 28, 28)

    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)  # as in a training on a GPU
    (found,) = predict(Model(), torch.zeros(1, 3, 8, 8))
    assert found["masks"].shape == (1, 8, 8)
    assert searched == [False]
    assert torch.backends.cudnn.benchmark
