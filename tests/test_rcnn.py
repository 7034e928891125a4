"""Mask R-CNN in fixed shapes computes what torchvision's does, and its step waits for nothing."""

import pytest
import torch
from helpers.commands import ENCODER
from helpers.instances import CPU, FINEST, as_dicts, batch_of, detect_with, torchvisions
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException
from torchvision.models import detection
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign

from benchmarks.lib.standins import THIN
from benchmarks.lib.synthetic import noise_tiles, training_step
from benchmarks.syncs import SyncCensus, census
from common import graphs
from common.args import Speedups
from common.augment import uniform
from common.distributed import Process
from mask import align, losses, rcnn
from mask import model as mask
from mask.boxes import apply_where, as_rois, fill_index, ignored, sample
from mask.losses import ANCHORS, POSITIVE_ANCHORS, label_anchors, label_boxes
from mask.model import BACKBONES, EncoderWithFPN, build_model, loss_fn, predict

SIDE = 96


@pytest.fixture
def model(monkeypatch):
    """Narrow, with weights of the RPN that spread its boxes and their scores."""
    monkeypatch.setattr(mask, "CHANNELS", THIN)
    torch.manual_seed(0)
    model = build_model("resnet18", 3, norm="group", proposals=60)
    for layer in model.dense["head"].modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.normal_(layer.weight, std=0.05)
    return model


# --- The network against torchvision's -----------------------------------------------------------


@pytest.mark.parametrize("backbone", ["resnet50", "resnet50_v2"])
def test_the_layers_are_torchvisions(backbone):
    """Even the RPN's: torchvision has three anchors of each size, too."""

    def shapes(model):
        return sorted(tuple(value.shape) for value in model.state_dict().values())

    builder = getattr(detection, f"maskrcnn_{backbone.replace('50', '50_fpn')}")
    theirs = builder(weights=None, weights_backbone=None, num_classes=3)
    assert shapes(build_model(backbone, 3)) == shapes(theirs)


def test_the_pyramid_on_an_encoder_is_torchvisions():
    """smp's resnet18 has the parameters of torchvision's, and the names of both agree."""
    torch.manual_seed(0)
    ours = EncoderWithFPN("resnet18", None)
    theirs = mask._pyramid("resnet18", None, torch.nn.BatchNorm2d)
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, SIDE, SIDE)
    found, expected = ours(images), theirs(images)
    assert list(found) == list(expected)
    for name, level in expected.items():
        torch.testing.assert_close(found[name], level)


@pytest.mark.parametrize("backbone", [*BACKBONES, "mobilenet_v2", "tu-test_convnext"])
def test_every_backbone_trains_and_finds(backbone):
    torch.manual_seed(0)
    model = build_model(backbone, 2, proposals=40)
    images, targets = batch_of(2)
    loss = loss_fn(model.train(), images, targets)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.scan(images)[0].shapes == [(24, 24), (12, 12), (6, 6), (3, 3)]
    found = predict(model.eval(), images)
    assert len(found) == 2
    for one in found:
        assert one["masks"].shape == (len(one["scores"]), 96, 96)
        assert one["masks"].dtype == torch.bool


def masks_of(chosen, exists, positive):
    """What torchvision's sampler returns for the boxes chosen in one image."""
    return [torch.zeros_like(positive).scatter_(0, chosen[exists], True) & positive]


def test_the_losses_are_torchvisions(model, monkeypatch):
    """In float64, on the same samples; ours are the mean of theirs over the images."""
    model = model.double().train()
    model.mask_rois = model.positives
    images, targets = batch_of(3, ignore=False)
    targets.labels[2] = targets.boxes[2] = targets.ids[2] = 0  # only ground
    images, kept = images.double(), []
    choose = rcnn.choose
    monkeypatch.setattr(rcnn, "choose", lambda *given: kept.append(choose(*given)) or kept[-1])
    ours = model(images, targets)
    (samples,) = kept
    assert samples.exists.all()
    assert 3 < (samples.labels > 0).sum() < samples.labels.numel() / 2

    theirs = torchvisions(model, SIDE).double().train()
    listed, expected = as_dicts(targets), []
    for i in range(3):

        def sampler(labels, key=targets.key[i : i + 1]):
            random = uniform(key, labels[0].numel(), 1, 0)
            chosen, exists = sample(labels[0][None], random, ANCHORS, POSITIVE_ANCHORS)
            both = chosen[0], exists[0]
            return masks_of(*both, labels[0] == 1), masks_of(*both, labels[0] == 0)

        def select(proposals, given, i=i):
            boxes, slot = samples.boxes[i], samples.slot[i]
            truth = given[0]["boxes"]
            matched = truth[slot] if len(truth) else torch.zeros_like(boxes)
            codes = theirs.roi_heads.box_coder.encode([matched], [boxes])
            return [boxes], [slot], [samples.labels[i]], codes

        theirs.rpn.fg_bg_sampler = sampler
        theirs.roi_heads.select_training_samples = select
        expected.append(theirs([images[i]], [listed[i]]))
    for name, loss in ours.items():
        assert loss.dtype == torch.float64
        mean = sum(one[name].item() for one in expected) / 3
        assert loss.item() == pytest.approx(mean, rel=1e-6), name


def test_labels_are_torchvisions(model):
    images, targets = batch_of(2, ignore=False)
    theirs, listed = torchvisions(model, SIDE), as_dicts(targets)
    levels = list(model.dense["backbone"](images).values())
    anchors = theirs.rpn.anchor_generator(ImageList(images, [(SIDE, SIDE)] * 2), levels)
    assert torch.equal(torch.cat(model.scan(images)[1]), anchors[0])
    expected, boxes = theirs.rpn.assign_targets_to_anchors(anchors, listed)
    labels, slot = label_anchors(anchors[0], targets)
    assert torch.equal(labels, torch.stack(expected).long())
    positive = labels == 1
    assert positive.sum() > 5
    for i in range(2):
        matched = targets.boxes[i][slot[i]]
        assert torch.equal(matched[positive[i]], boxes[i][positive[i]])

    corner = torch.rand(2, 200, 2) * 60
    boxes = torch.cat([corner, corner + 4 + torch.rand(2, 200, 2) * 30], 2)
    slots, expected = theirs.roi_heads.assign_targets_to_proposals(
        list(boxes), [t["boxes"] for t in listed], [t["labels"] for t in listed]
    )
    labels, slot = label_boxes(boxes, targets)
    assert torch.equal(labels, torch.stack(expected))
    assert torch.equal(slot[labels > 0], torch.stack(slots)[labels > 0])
    assert (labels > 0).any()


@pytest.mark.parametrize(
    ("classes", "side", "tiles"),
    [(2, 96, 2), (4, 100, 2), pytest.param(2, 96, 50, marks=pytest.mark.long)],
)
def test_detections_are_torchvisions(monkeypatch, classes, side, tiles):
    """Also of tiles whose sides are no multiple of the pyramid's strides.

    In float32 two scores that differ in their last bits may change places.
    """
    monkeypatch.setattr(mask, "CHANNELS", THIN)
    torch.manual_seed(classes)
    model = build_model("resnet18", classes, norm="group", proposals=80).eval().double()
    for part in (model.dense["head"], model.roi_heads["box_predictor"]):
        for layer in part.modules():
            if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
                torch.nn.init.normal_(layer.weight, std=0.05)
    images = batch_of(tiles, side)[0].double()
    with torch.inference_mode():
        detections, masks = model(images)
        expected = detect_with(torchvisions(model, side).eval(), images)
        predicted = predict(model, images)
    for i, theirs in enumerate(expected):
        count = len(theirs["scores"])
        assert count == (detections.scores[i] > 0).sum() > 5
        for name in ("boxes", "scores", "labels"):
            ours = getattr(detections, name)[i, :count]
            torch.testing.assert_close(ours, theirs[name], rtol=1e-6, atol=1e-4)
            torch.testing.assert_close(predicted[i][name], ours, rtol=1e-6, atol=1e-4)
        torch.testing.assert_close(masks[i, :count], theirs["masks"][:, 0], rtol=0, atol=1e-6)
        assert predicted[i]["masks"].shape == (count, side, side)
        assert not detections.boxes[i, count:].any()


# --- Its parts -----------------------------------------------------------------------------------


@pytest.fixture(params=["rows", "canvas"])
def way(request, monkeypatch):
    """RoIAlign as on a CPU, and as on a GPU and in an exported model."""
    monkeypatch.setattr(align, "as_rows", lambda features: request.param == "rows")
    return request.param


def test_a_compiled_step_pools_as_an_eager_one():
    compiled = torch.compile(align.as_rows, backend="eager", fullgraph=True)
    assert compiled(torch.zeros(1))
    assert align.as_rows(torch.zeros(1))


@pytest.mark.parametrize("size", [(256, 192), (100, 100), (64, 64)])
@pytest.mark.parametrize("bins", [7, 14])
def test_roi_align_is_torchvisions_and_so_is_its_gradient(way, size, bins):
    """Boxes of all sizes, also at the border; sides of 100 pixels make levels of 25, 13, 7, 4."""
    torch.manual_seed(0)
    shapes = [[-(-side // step) for side in size] for step in (4, 8, 16, 32)]
    levels = [torch.randn(2, 5, *shape, requires_grad=True) for shape in shapes]
    corner = torch.rand(2, 200, 2) * torch.tensor(size).flip(0)
    boxes = torch.cat([corner, corner + 5 + torch.rand(2, 200, 2) ** 2 * 400], 2)
    boxes[:, ::7, :2] = 0
    high = torch.tensor([*size[::-1]] * 2)
    boxes = boxes.clamp(torch.zeros(4), high)
    boxes[..., :2] = boxes[..., :2].minimum(boxes[..., 2:] - 5)
    named = dict(zip(FINEST, levels, strict=True))
    theirs = MultiScaleRoIAlign(FINEST, bins, 2)(named, list(boxes), [size] * 2)
    ours = align.Pyramid(levels, size).pool(as_rois(boxes), bins)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    pull = torch.randn_like(theirs)
    expected = torch.autograd.grad(theirs, levels, pull)
    gradients = torch.autograd.grad(ours, levels, pull)
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("size", [(128, 160), (96, 7200), (7200, 96), (100, 100)])
def test_slivers_at_the_border_are_pooled_as_by_torchvision(way, size):
    """A box narrower than a pixel of its level counts as one pixel, which can leave the level.

    The long images have such boxes on each level, where its neighbours on the canvas lie.
    """
    torch.manual_seed(0)
    shapes = [[-(-side // step) for side in size] for step in (4, 8, 16, 32)]
    levels = [torch.randn(2, 3, *shape, requires_grad=True) for shape in shapes]
    length = torch.tensor(size).flip(0)
    thickness = torch.cat([torch.rand(200) * 32, torch.arange(200) // 8 / 2])
    across, along = thickness[:, None] * torch.ones(2), torch.rand(400, 2) ** 3 * length
    thin = torch.rand(400, 2) < 0.7
    extent = torch.where(thin, across, along)
    at_border = torch.rand(400, 2) < 0.7
    corner = torch.where(at_border, length - extent, torch.rand(400, 2) * (length - extent))
    boxes = torch.cat([corner, corner + extent], 1)
    boxes[::9, 2:] = boxes[::9, :2]  # no size, also exactly at the border
    boxes[::18, 0], boxes[::18, 2] = size[1], size[1]
    boxes = boxes.minimum(length.repeat(2)).clamp(min=0).view(2, 200, 4)
    found = align.level_of(boxes.flatten(0, 1)).unique().tolist()
    assert found == [0, 1, 2, 3] if max(size) > 1000 else 0 in found
    named = dict(zip(FINEST, levels, strict=True))
    theirs = MultiScaleRoIAlign(FINEST, 7, 2)(named, list(boxes), [size] * 2)
    ours = align.Pyramid(levels, size).pool(as_rois(boxes), 7)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)  # points up to 1,800, in float32
    pull = torch.randn_like(theirs)
    gradients = (torch.autograd.grad(pooled, levels, pull) for pooled in (ours, theirs))
    for gradient, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-2)


def test_boxes_of_no_size_are_pooled(way):
    """Padding has no size."""
    levels = [torch.ones(1, 1, 64 // s, 64 // s) for s in (4, 8, 16, 32)]
    pooled = align.Pyramid(levels, (64, 64)).pool(torch.zeros(3, 5), 7)
    torch.testing.assert_close(pooled, torch.ones(3, 1, 7, 7))


def test_the_sampler_takes_what_there_is_and_the_same_again():
    labels = torch.tensor([1] * 40 + [0] * 400 + [-1] * 60).repeat(3, 1)
    random = uniform(torch.tensor([7, 7, 8]), 500, 1, 0)
    index, exists = sample(labels, random, 64, 16)
    chosen = labels.gather(1, index)
    assert exists.all()
    assert chosen[0].tolist() == [1] * 16 + [0] * 48
    assert torch.equal(index[0], index[1])
    assert not torch.equal(index[0], index[2])
    assert all(len(set(row.tolist())) == 64 for row in index)
    few = torch.tensor([[1] * 3 + [0] * 20 + [-1] * 477])
    index, exists = sample(few, random[:1], 64, 16)
    assert exists.tolist() == [[True] * 23 + [False] * 41]
    assert few.gather(1, index)[0, :23].tolist() == [1] * 3 + [0] * 20
    counts = torch.zeros(500)
    for key in range(300):
        index, _ = sample(labels[:1], uniform(torch.tensor([key]), 500, 1, 0), 64, 16)
        counts[index[0]] += 1
    assert counts[40:440].min() > 10  # each is chosen sometimes: 36 times of 300 on average


@given(valid=st.lists(st.booleans(), min_size=1, max_size=30))
def test_only_valid_rows_are_repeated(valid):
    valid = torch.tensor(valid)
    index = fill_index(valid)
    assert torch.equal(index[valid], torch.arange(len(valid))[valid])
    if valid.any():
        assert valid[index].all()
        times = torch.bincount(index, minlength=len(valid))[valid]
        assert times.max() - times.min() <= 1


@given(valid=st.lists(st.booleans(), min_size=1, max_size=30))
def test_only_an_eager_step_on_a_cpu_skips_invalid_rows(valid):
    valid, computed = torch.tensor(valid), []
    values = torch.rand(len(valid), 2)

    def head(index):
        computed.append(len(index))
        return values[index]

    eager = apply_where(head, valid)
    with SyncCensus() as syncs:
        recorded = apply_where(head, valid)
    assert computed == [int(valid.sum()) or len(valid), len(valid)]
    assert syncs.found == {}
    assert torch.equal(eager[valid], values[valid])
    assert torch.equal(recorded[valid], values[valid])


def test_boxes_on_ignored_ground_are_no_negatives():
    _, targets = batch_of(2)
    ground = torch.zeros(2, SIDE, SIDE, dtype=torch.bool)
    ground[:, :, 48:] = True
    boxes = torch.tensor([[0, 0, 40, 40], [50, 0, 90, 40], [40, 0, 50, 10], [44, 0, 58, 10.0]])
    assert ignored(boxes.expand(2, -1, -1), ground)[1].tolist() == [False, True, False, True]
    targets.boxes[:] = 0
    targets.boxes[:, 0], targets.labels[:, 0] = boxes[0], 1
    targets = targets._replace(ids=-ground.to(torch.int16))
    assert label_anchors(boxes, targets)[0].tolist() == [[1, -1, 0, -1]] * 2
    assert label_boxes(boxes.expand(2, -1, -1), targets)[0].tolist() == [[1, -1, 0, -1]] * 2


# --- What it must not do on a GPU ----------------------------------------------------------------


def test_the_network_waits_for_nothing_and_predict_once(model):
    """`tests/test_speedups.py` has the training step."""
    images, _ = batch_of(2)
    model.eval()
    with torch.inference_mode():
        predict(model, images)
        assert census(lambda: model(images)) == {}
        found = census(lambda: predict(model, images))
    assert [(name, count) for (name, _), count in found.items()] == [("Tensor.tolist", 1)]


def test_a_step_that_reads_a_value_is_seen(fake, monkeypatch):
    monkeypatch.setattr(
        losses, "_box_loss", lambda codes, wanted, positive: codes.sum() * positive.sum().item()
    )
    _, step = training_step("mask", Process(0, 1, CPU), Speedups(), 64, "resnet18")
    with pytest.raises(DataDependentOutputException):
        step(noise_tiles(2, 96, CPU))


def test_the_canvas_reads_nothing_back(fake, monkeypatch):
    """A whole step with the RoIAlign of a GPU, backward pass and optimizer included."""
    monkeypatch.setattr(align, "as_rows", lambda features: False)
    settings = Speedups(amp_dtype=torch.bfloat16, channels_last=True, grad_accum=2)
    _, step = training_step("mask", Process(0, 1, CPU), settings, 64, "resnet18")
    assert step(noise_tiles(4, 96, CPU)).shape == ()


@pytest.mark.parametrize("backbone", ["resnet18", ENCODER])
@pytest.mark.parametrize(("norm", "grad_accum"), [("batch", 1), ("group", 2)])
def test_a_captured_step_has_the_gradients_of_an_eager_one(
    standin, monkeypatch, backbone, norm, grad_accum
):
    """Although the captured step repeats boxes in place of those that do not exist.

    BatchNorm sees the repeated boxes, so it is compared with an eager step of fixed shapes.
    """
    if norm == "batch":
        monkeypatch.setattr("mask.boxes.shapes_may_vary", lambda values: False)
    monkeypatch.setattr(graphs, "WARMUP_STEPS", 1)
    monkeypatch.setattr(mask, "CHANNELS", THIN)
    process = Process(0, 1, CPU)
    settings = Speedups(grad_accum=grad_accum, cuda_graphs=True)
    graphed, captured_step = training_step("mask", process, settings, 64, backbone, norm=norm)
    settings = Speedups(grad_accum=grad_accum)
    eager, eager_step = training_step("mask", process, settings, 64, backbone, norm=norm)
    for _ in range(2):
        captured_step(noise_tiles(2, 96, CPU))
    eager.load_state_dict(graphed.state_dict())
    last = noise_tiles(2, 96, CPU)
    captured_step(last)
    eager_step(last)
    assert [(graph.captures, graph.replays) for graph in standin] == [(1, 2)]
    for name, parameter in eager.named_parameters():
        found = graphed.get_parameter(name).grad
        torch.testing.assert_close(found, parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
    for (name, found), expected in zip(graphed.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(found, expected, msg=name)
