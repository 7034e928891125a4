"""Maps: regions of a scene that arrives in bands, their outlines, their place on earth."""

from itertools import pairwise

import cv2
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from common.predict import regions
from common.predict.maps import polygons
from common.predict.regions import Find, Regions


def blobs(rng, height, width, classes=3):
    """Class ids with regions that touch at corners, enclose each other and span many rows."""
    noise = rng.random((classes, height, width))
    smooth = np.stack([cv2.blur(layer, (3, 3)) for layer in noise])
    return smooth.argmax(0).astype(np.uint8)


def in_bands(mask, confidence, cuts, min_area=1):
    found, grown = [], Regions(min_area)
    edges = [0, *sorted(set(cuts)), len(mask)]
    for top, bottom in pairwise(edges):
        if bottom > top:
            found += grown.add(top, mask[top:bottom], confidence[top:bottom])
    return found + list(grown.end())


def described(find):
    """Everything about a find, its mask as bytes."""
    return find.label, find.box, find.mask.tobytes(), round(find.score, 4)


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 10_000),
    height=st.integers(1, 40),
    width=st.integers(1, 30),
    cuts=st.lists(st.integers(1, 39), max_size=12),
    min_area=st.integers(0, 12),
)
def test_regions_do_not_depend_on_the_bands(seed, height, width, cuts, min_area):
    rng = np.random.default_rng(seed)
    mask = blobs(rng, height, width)
    confidence = rng.random(mask.shape, np.float32)
    found = in_bands(mask, confidence, [c for c in cuts if c < height], min_area)
    expected = []
    for label in (1, 2):
        count, ids = cv2.connectedComponents((mask == label).astype(np.uint8), connectivity=8)
        for i in range(1, count):
            rows, columns = np.nonzero(ids == i)
            if len(rows) < max(1, min_area):
                continue
            box = (slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1))
            score = float(confidence[ids == i].mean(dtype=float))
            x, y = int(columns.min()), int(rows.min())
            expected.append(Find(label, score, x, y, ids[box] == i))
    assert sorted(map(described, found)) == sorted(map(described, expected))


def test_a_region_without_end_is_closed_in_parts(monkeypatch):
    monkeypatch.setattr(regions, "LARGEST", 500)
    mask = np.ones((100, 20), np.uint8)
    found = in_bands(mask, np.ones(mask.shape, np.float32), range(10, 100, 10))
    assert sum(find.area for find in found) == mask.size
    assert max(find.mask.size for find in found) <= 700
    assert all(find.score == 1 for find in found)


@settings(deadline=None, max_examples=80)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 40))
def test_outlines_enclose_exactly_the_pixels(seed, count):
    rng = np.random.default_rng(seed)
    finds = []
    for _ in range(count):
        mask = blobs(rng, *rng.integers(1, 14, 2), classes=2) == 1
        finds += [Find(1, 0.5, *map(int, rng.integers(0, 99, 2)), mask)] * bool(mask.any())
    for find, shape in zip(finds, polygons(finds), strict=True):
        # Even-odd at the pixels' centres, from a ray to the left.
        inside = np.zeros(find.mask.shape, bool)
        for ring in (ring for polygon in shape for ring in polygon):
            assert np.array_equal(ring[0], ring[-1])
            for (x1, y1), (x2, y2) in pairwise(ring):
                assert (x1 == x2) != (y1 == y2)
                if x1 == x2:
                    top, bottom = sorted((y1 - find.y, y2 - find.y))
                    inside[top:bottom, x1 - find.x :] ^= True
        assert np.array_equal(inside, find.mask)
