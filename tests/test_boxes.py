"""Suppression and pasting against torchvision's, for any boxes and on every path."""

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torchvision.models.detection import roi_heads
from torchvision.ops import nms

from benchmarks.lib.standins import CpuGraph
from benchmarks.syncs import census
from mask import boxes as mask_boxes
from mask.boxes import paste, suppress, suppress_on_gpu
from mask.export import suppress_in_onnx

THRESHOLD = 0.7
BATCH = ({0: torch.export.Dim("batch")}, {0: torch.export.Dim("batch")})


def chain(count):
    """Each box overlaps only its neighbours, so every second one stays."""
    x = torch.arange(count) * 3.0
    return torch.stack([x, x * 0, x + 20, x * 0 + 20], 1)


def smooth(knots, side, count):
    """The best boxes of a smooth field of scores, which is what convolutions make."""
    torch.manual_seed(knots)
    scores = F.interpolate(torch.randn(1, 1, knots, knots), (128, 128), mode="bicubic")[0, 0]
    scores += 0.01 * torch.randn(128, 128)
    y, x = torch.meshgrid(torch.arange(128) * 4.0, torch.arange(128) * 4.0, indexing="ij")
    half = side / 2 * (1 + 0.02 * torch.randn(128, 128))
    boxes = torch.stack([x - half, y - half, x + half, y + half], -1).reshape(-1, 4)
    return boxes.clamp(0, 512)[scores.flatten().topk(count).indices]


def clusters(seed, count, spread):
    """Random boxes around a few points, many of which overlap; some have no area."""
    torch.manual_seed(seed)
    centre = torch.rand(max(1, count // 8), 2) * 100
    centre = centre[torch.randint(len(centre), (count,))] + torch.randn(count, 2) * spread
    half = torch.rand(count, 2) * 12
    half[torch.rand(count) < 0.05] = 0
    boxes = torch.cat([centre - half, centre + half], 1)
    return boxes.round() if seed % 2 else boxes  # whole pixels: an IoU can equal the threshold


def copies(count):
    """A few boxes many times each, in any order: ties."""
    torch.manual_seed(0)
    return chain(12)[torch.randint(12, (count,))]


HARD = {
    "chain": chain(1000),
    "smooth": smooth(4, 48, 1000),
    "smoother": smooth(8, 32, 1000),
    "copies": copies(1000),
    "clusters": clusters(1, 1000, 3),
}


def torchvisions(boxes, exists, threshold=THRESHOLD):
    """bool [B,N]: what `torchvision.ops.nms` keeps of each image's existing boxes."""
    kept = torch.zeros_like(exists)
    for i in range(len(boxes)):
        ranks = torch.arange(boxes.shape[1])[exists[i]]
        kept[i, ranks[nms(boxes[i, ranks], -ranks.to(boxes.dtype), threshold)]] = True
    return kept


def hard_batch():
    """All the hard cases as images of one batch, with all boxes and with some left out."""
    boxes = torch.stack(list(HARD.values())).repeat(2, 1, 1)
    exists = torch.ones(boxes.shape[:2], dtype=torch.bool)
    torch.manual_seed(3)
    exists[len(HARD) :] = torch.rand(len(HARD), boxes.shape[1]) < 0.9
    return boxes, exists


class Suppress(torch.nn.Module):
    def forward(self, boxes, exists):
        return suppress(boxes, exists, THRESHOLD)


def eager(boxes, exists):
    return suppress(boxes, exists, THRESHOLD)


def compiled(boxes, exists):
    return torch.compile(Suppress(), backend="aot_eager", fullgraph=True)(boxes, exists)


def exported(boxes, exists):
    """`torch.export` for any number of images; it must have one operator, not a loop."""
    program = torch.export.export(Suppress(), (boxes[:2], exists[:2]), dynamic_shapes=BATCH)
    assert sum(node.op == "call_function" for node in program.graph.nodes) == 1
    return program.module()(boxes, exists)


def onnx(boxes, exists):
    if not all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime"))):
        pytest.skip("onnx, onnxscript, onnxruntime are not installed")
    import onnxruntime

    program = torch.onnx.export(
        Suppress().eval(),
        (boxes[:2], exists[:2]),
        verbose=False,
        input_names=("boxes", "exists"),
        dynamic_shapes=BATCH,
        custom_translation_table={torch.ops.mask.suppress.default: suppress_in_onnx},
    )
    content = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (kept,) = session.run(None, {"boxes": boxes.numpy(), "exists": exists.numpy()})
    return torch.from_numpy(kept)


def fixed(boxes, exists):
    return suppress_on_gpu(boxes, exists, THRESHOLD)


def captured(boxes, exists):
    """Recorded with other boxes, replayed with these; nothing waits for the device."""
    graph = CpuGraph()
    stored, flags = torch.zeros_like(boxes), torch.ones_like(exists)
    assert census(lambda: fixed(stored, flags)) == {}
    kept = graph.capture(lambda: fixed(stored, flags))
    stored.copy_(boxes)
    flags.copy_(exists)
    graph.replay()
    return kept


@pytest.mark.parametrize("way", [eager, compiled, exported, onnx, fixed, captured])
def test_every_path_suppresses_as_torchvision(way):
    boxes, exists = hard_batch()
    kept = way(boxes, exists)
    expected = torchvisions(boxes, exists)
    assert kept.shape == exists.shape
    assert kept.dtype == torch.bool
    for name, ours, theirs in zip([*HARD, *HARD], kept, expected, strict=True):
        assert torch.equal(ours.nonzero(), theirs.nonzero()), name
    assert kept[0].tolist() == [True, False] * 500


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(0, 300),
    images=st.integers(1, 3),
    spread=st.sampled_from([0.5, 3, 20]),
    threshold=st.sampled_from([0.5, 0.7]),
    block=st.sampled_from([1, 16, 256]),
)
def test_random_boxes_are_suppressed_as_by_torchvision(
    seed, count, images, spread, threshold, block
):
    boxes = torch.stack([clusters(seed + i, count, spread) for i in range(images)])
    exists = torch.rand(images, count) < 0.9
    expected = torchvisions(boxes, exists, threshold)
    assert torch.equal(suppress(boxes, exists, threshold), expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mask_boxes, "BLOCK", block)
        assert torch.equal(suppress_on_gpu(boxes, exists, threshold), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_boxes_without_a_place_suppress_nothing(dtype):
    """Also boxes of nan or infinity, which exist but overlap nothing, and those that do not."""
    good = torch.tensor([0, 0, 10, 10], dtype=dtype)
    boxes = torch.stack([good * torch.nan, good, good * 0, good + 0.1, good * torch.inf])[None]
    exists = torch.tensor([[False, True, True, True, False]])
    for way in (suppress, suppress_on_gpu):
        assert way(boxes, exists, 0.5).tolist() == [[False, True, True, False, False]]
        assert way(boxes, exists ^ exists, 0.5).sum() == 0


# --- Masks ---------------------------------------------------------------------------------------


def there_and_back(mask):
    """A true mask, bool [H,W], as its target of 28 x 28, and the IoU of that, pasted, with it."""
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    box = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])[None].float()
    target = roi_heads.project_masks_on_boxes(mask[None].float(), box, torch.tensor([0]), 28)
    (pasted,) = paste(target, box, tuple(mask.shape))
    return ((pasted & mask).sum() / (pasted | mask).sum()).item()


@pytest.mark.parametrize("height", [1, 2, 3, 6, 8, 16, 27, 40, 90])
@pytest.mark.parametrize("width", [1, 8, 29, 100])
@pytest.mark.parametrize("corner", [(0, 0), (7, 13), "far"])
def test_a_rectangle_returns_whole(height, width, corner):
    """Also at each border of the image."""
    mask = torch.zeros(110, 120, dtype=torch.bool)
    y, x = (110 - height, 120 - width) if corner == "far" else corner
    mask[y : y + height, x : x + width] = True
    assert there_and_back(mask) == 1


@pytest.mark.parametrize(("diameter", "least"), [(5, 1), (9, 1), (16, 1), (30, 0.98), (100, 0.98)])
def test_a_disc_returns(diameter, least):
    y, x = torch.meshgrid(torch.arange(150.0), torch.arange(150.0), indexing="ij")
    disc = (x - 60.3) ** 2 + (y - 71.6) ** 2 < (diameter / 2) ** 2
    assert there_and_back(disc) >= least


@settings(deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_full_mask_fills_the_pixels_whose_centres_lie_in_its_box(seed):
    """Boxes with broken edges, at the border and past it, of less than a pixel and of no size."""
    torch.manual_seed(seed)
    corner = torch.rand(20, 2) * 60 - 10
    boxes = torch.cat([corner, corner + torch.rand(20, 2) ** 2 * 50], 1)
    boxes[::4] = (boxes[::4] * 2).round() / 2  # edges at centres of pixels
    boxes[::5, 2:] = boxes[::5, :2]
    y, x = torch.arange(40) + 0.5, torch.arange(50) + 0.5
    x1, y1, x2, y2 = boxes[..., None].unbind(1)
    inside = ((y >= y1) & (y < y2))[:, :, None] & ((x >= x1) & (x < x2))[:, None, :]
    assert torch.equal(paste(torch.ones(20, 28, 28), boxes, (40, 50)), inside)
    assert not paste(torch.zeros(20, 28, 28), boxes, (40, 50)).any()
