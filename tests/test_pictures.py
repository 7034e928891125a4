"""Overlays and sheets of what was found: marks, scores, one scale, and a legend."""

import numpy as np
import pytest
from helpers.rasters import raster
from PIL import Image, ImageDraw

from common.io.pictures import paint
from common.io.raster import open_scene
from common.predict.pictures import SIDE, Crops, outline, with_legend
from common.predict.regions import Region

MAGENTA = (0xE1, 0x00, 0x98)


def square(side, x, y, score=0.5, label=1):
    return Region(label, score, x, y, np.ones((side, side), bool))


def strong(picture):
    """Pixels of the colour of class 1 itself, as lines are drawn."""
    return (np.abs(picture.astype(int) - MAGENTA) < 40).all(-1)


@pytest.fixture
def texts(monkeypatch):
    """The boxes of all texts that are drawn: x1, y1, x2, y2, text."""
    boxes, draw = [], ImageDraw.ImageDraw.text

    def text(self, at, written, *words, **options):
        boxes.append((*self.textbbox(at, written, *words[1:3], stroke_width=1), written))
        return draw(self, at, written, *words, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return boxes


def test_scores_do_not_overlap_and_the_best_keep_theirs(texts):
    rng = np.random.default_rng(0)
    regions = [
        square(int(rng.integers(4, 60)), *map(int, rng.integers(0, 240, 2)), score=0.99 - n / 400)
        for n in range(200)
    ]
    outline(np.full((300, 300, 3), 90, np.uint8), regions)
    assert texts[0][4] == "99%"
    assert 10 < len(texts) < 200
    taken = np.zeros((300, 300), int)
    for x1, y1, x2, y2, _ in texts:
        assert min(x1, y1) >= 0
        assert max(x2, y2) <= 300
        taken[round(y1) : round(y2), round(x1) : round(x2)] += 1
    assert taken.max() == 1


@pytest.mark.parametrize("draw", ["outline", "paint"])
def test_a_small_aircraft_stays_visible(draw):
    """Five white pixels on grey keep their contrast inside of the line around them."""
    image = np.full((200, 200, 3), 100, np.uint8)
    image[50:55, 50:55] = 255
    mask = np.zeros((200, 200), np.uint8)
    mask[50:55, 50:55] = 1
    region = square(5, 50, 50)
    drawn = outline(image, [region]) if draw == "outline" else paint(image, mask)
    assert drawn[51:54, 51:54].min(-1).min() > 170
    assert strong(drawn)[49, 50:55].all()
    assert strong(drawn)[50:55, 55].all()
    assert np.array_equal(drawn[60:, 60:], image[60:, 60:])


@pytest.mark.parametrize("georeferenced", [True, False])
def test_crops_have_one_scale_and_a_bar_that_measures_it(tmp_path, texts, georeferenced):
    """A bar that is written with 20 m has the length of 20 m in the pictures."""
    from rasterio import Affine

    place = {"crs": "EPSG:32633", "transform": Affine(0.5, 0, 500_000, 0, -0.5, 5_000_000)}
    values = np.full((3, 400, 600), 80, np.uint8)
    path = raster(tmp_path / "a.tif", values, **(place if georeferenced else {}))
    crops = Crops(3, lambda region: region.area)
    for region in (square(80, 300, 300), square(40, 100, 100), square(20, 10, 10)):
        crops.add(region)
    with open_scene(path) as scene:
        crops.write(scene, tmp_path / "crops.png", ["ground", "aircraft"])
    sheet = np.asarray(Image.open(tmp_path / "crops.png").convert("RGB"))
    widths = []
    for n in range(3):
        cell = strong(sheet[:SIDE, n * (SIDE + 6) : n * (SIDE + 6) + SIDE])
        columns = np.flatnonzero(cell.any(0))
        widths.append(np.ptp(columns) - 1)
    assert widths == pytest.approx([widths[0], widths[0] / 2, widths[0] / 4], abs=2)
    scale = widths[0] / 80  # pixels of the sheet per pixel of the scene
    (said,) = [text for *_, text in texts if text.split()[-1] in ("m", "pixels")]
    length, unit = said.split()
    assert unit == ("m" if georeferenced else "pixels")
    bar = (sheet[-3] == 0).all(-1).sum()
    assert bar == pytest.approx(float(length) / (0.5 if georeferenced else 1) * scale, abs=2)
    assert "aircraft" in [text for *_, text in texts]


def test_a_region_that_is_larger_than_its_crop_is_cut(tmp_path):
    path = raster(tmp_path / "a.tif", np.full((3, 900, 900), 80, np.uint8))
    crops = Crops(4, lambda region: region.area)
    for region in (square(800, 60, 50), *(square(20, 10 + 30 * n, 10) for n in range(3))):
        crops.add(region)
    with open_scene(path) as scene:
        crops.write(scene, tmp_path / "crops.png", ["ground", "aircraft"])
    assert Image.open(tmp_path / "crops.png").size[0] == 4 * SIDE + 3 * 6


def test_a_legend_stands_in_the_corner_unless_the_picture_is_too_small(texts):
    image = np.full((400, 600, 3), 90, np.uint8)
    drawn = with_legend(image, ["ground", "aircraft", "ship\n"])
    assert [text for *_, text in texts] == ["aircraft", "ship\ufffd"]
    assert drawn.shape == image.shape
    assert strong(drawn[-30:, :60]).sum() > 60
    assert (drawn[:300] == 90).all()
    assert (image == 90).all()
    assert np.array_equal(with_legend(image[:40, :60], ["ground", "aircraft"]), image[:40, :60])
