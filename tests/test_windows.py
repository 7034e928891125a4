"""Windows: every pixel is covered, and a blend of true answers is the true answer."""

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.predict.windows import blend, grid


@settings(deadline=None, max_examples=60)
@given(
    height=st.integers(1, 200),
    width=st.integers(1, 200),
    overlap=st.floats(0, 0.9),
    batch=st.integers(1, 5),
)
def test_a_pixelwise_network_is_reproduced_exactly(height, width, overlap, batch):
    image = torch.rand(3, height, width)

    def pixelwise(crops):
        return torch.stack([crops[:, 0], 1 - crops[:, 0]], 1)

    found = blend(image, pixelwise, 32, overlap, batch)
    assert found.shape == (2, height, width)
    torch.testing.assert_close(found, pixelwise(image[None])[0], atol=1e-5, rtol=0)


@given(length=st.integers(32, 500), overlap=st.floats(0, 0.9))
def test_neighbours_overlap_as_asked_and_reach_both_ends(length, overlap):
    starts = sorted({y for y, _ in grid(length, 32, 32, overlap)})
    assert starts[0] == 0
    assert starts[-1] == length - 32
    strides = [b - a for a, b in pairwise(starts)]
    assert all(s <= max(1, round(32 * (1 - overlap))) for s in strides)
