"""Maps: regions of a scene that arrives in bands, their outlines, their georeference."""

import json
import os
import re
import signal
import subprocess
from itertools import pairwise
from xml.etree import ElementTree

import cv2
import numpy as np
import pyogrio
import pytest
import rasterio
import torch
from helpers.commands import ROOT
from helpers.instances import numbered
from helpers.rasters import raster
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as rle
from rasterio import Affine
from rasterio.features import rasterize
from rasterio.warp import transform
from rio_cogeo.cogeo import cog_validate

from common.cli import UserError
from common.predict import maps, regions, semantic, windows
from common.predict.folder import semantic_parser
from common.predict.maps import polygons
from common.predict.regions import Region, Regions
from mask import inference, scenes


def blobs(rng, height, width, classes=3):
    """Class ids with regions that touch at corners, enclose each other and span many rows."""
    noise = rng.random((classes, height, width))
    smooth = np.stack([cv2.blur(layer, (3, 3)) for layer in noise])
    return smooth.argmax(0).astype(np.uint8)


def in_bands(mask, confidence, cuts, min_area=1, join=0):
    found, regions = [], Regions(min_area, join)
    edges = [0, *sorted(set(cuts)), len(mask)]
    for top, bottom in pairwise(edges):
        if bottom > top:
            found += regions.add(top, mask[top:bottom], confidence[top:bottom])
    return found + list(regions.end())


def described(region):
    """Everything about a region, its mask as bytes."""
    return region.label, region.box, region.mask.tobytes(), round(region.score, 4)


@settings(max_examples=150)
@given(
    seed=st.integers(0, 10_000),
    height=st.integers(1, 40),
    width=st.integers(1, 30),
    cuts=st.lists(st.integers(1, 39), max_size=12),
    min_area=st.integers(0, 12),
    join=st.sampled_from((0, 0, 2, 3, 4.5, 8)),
)
def test_regions_do_not_depend_on_the_bands(seed, height, width, cuts, min_area, join):
    rng = np.random.default_rng(seed)
    mask = blobs(rng, height, width)
    if join:
        mask[rng.random(mask.shape) < 0.9] = 0  # small parts with gaps
    confidence = rng.random(mask.shape, np.float32)
    found = in_bands(mask, confidence, [c for c in cuts if c < height], min_area, join)
    expected = []
    disc = np.hypot(*np.mgrid[-4:5, -4:5]) <= join / 2
    for label in (1, 2):
        grown = cv2.dilate((mask == label).astype(np.uint8), disc.astype(np.uint8))
        count, ids = cv2.connectedComponents(grown, connectivity=8)
        ids[mask != label] = 0
        for i in range(1, count):
            rows, columns = np.nonzero(ids == i)
            if len(rows) < max(1, min_area):
                continue
            box = (slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1))
            score = float(confidence[ids == i].mean(dtype=float))
            x, y = int(columns.min()), int(rows.min())
            expected.append(Region(label, score, x, y, ids[box] == i))
    assert sorted(map(described, found)) == sorted(map(described, expected))


def test_a_region_without_end_is_closed_in_parts(monkeypatch):
    monkeypatch.setattr(regions, "LARGEST", 500)
    mask = np.ones((100, 20), np.uint8)
    found = in_bands(mask, np.ones(mask.shape, np.float32), range(10, 100, 10))
    assert sum(region.area for region in found) == mask.size
    assert max(region.mask.size for region in found) <= 700
    assert all(region.score == 1 for region in found)


@settings(max_examples=80)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 40))
def test_outlines_enclose_exactly_the_pixels(seed, count):
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        mask = blobs(rng, *rng.integers(1, 14, 2), classes=2) == 1
        found += [Region(1, 0.5, *map(int, rng.integers(0, 99, 2)), mask)] * bool(mask.any())
    for region, shape in zip(found, polygons(found), strict=True):
        # Even-odd at the pixels' centres, from a ray to the left.
        inside = np.zeros(region.mask.shape, bool)
        for ring in (ring for polygon in shape for ring in polygon):
            assert np.array_equal(ring[0], ring[-1])
            for (x1, y1), (x2, y2) in pairwise(ring):
                assert (x1 == x2) != (y1 == y2)
                if x1 == x2:
                    top, bottom = sorted((y1 - region.y, y2 - region.y))
                    inside[top:bottom, x1 - region.x :] ^= True
        assert np.array_equal(inside, region.mask)


def crossing(rings):
    """Whether any two sides of some rings cross."""
    a, b = np.concatenate([np.stack([ring[:-1], ring[1:]], 1) for ring in rings]).swapaxes(0, 1)

    def side(p, q, r):
        (x1, y1), (x2, y2) = np.moveaxis(q - p, -1, 0), np.moveaxis(r - p, -1, 0)
        return x1 * y2 - y1 * x2

    p, q, r, s = a[:, None], b[:, None], a[None], b[None]
    return ((side(p, q, r) * side(p, q, s) < 0) & (side(r, s, p) * side(r, s, q) < 0)).any()


def from_the_line(points, ring):
    """The distance of points [N,2] from a ring, the larger one of x and y, to 0.02 pixels."""
    at = np.linspace(0, 1, 1 + 25 * int(np.ptp(ring, axis=0).max()))[:, None, None]
    line = (ring[:-1] * (1 - at) + ring[1:] * at).reshape(-1, 2)
    return np.abs(points[:, None] - line).max(2).min(1)


@settings(max_examples=60)
@given(seed=st.integers(0, 10_000), smooth=st.integers(1, 9), side=st.integers(2, 16))
def test_a_simplified_outline_is_that_of_the_same_pixels(seed, smooth, side):
    """By rasterio, which paints the pixels whose centres are inside."""
    mask = cv2.blur(np.random.default_rng(seed).random((side, side + 3)), (smooth, smooth)) > 0.5
    if not mask.any():
        return
    (exact,) = polygons([Region(1, 0.5, 0, 0, mask)])
    straight = [[maps._straightened(ring, 0.49) for ring in polygon] for polygon in exact]
    for shape in (straight, maps.simplified(exact)):
        geometry = {"type": "MultiPolygon", "coordinates": shape}
        assert np.array_equal(rasterize([geometry], mask.shape), mask)
        assert not crossing([ring for polygon in shape for ring in polygon])
        for before, after in zip(exact, shape, strict=True):
            for stairs, line in zip(before, after, strict=True):
                assert np.array_equal(line[0], line[-1])
                assert from_the_line(stairs, line).max() <= 0.52
                assert from_the_line(line, stairs).max() <= 0.52
    area = maps._covered(maps.simplified(exact))
    assert area == pytest.approx(mask.sum(), rel=0.01)


def test_a_straight_edge_has_few_corners():
    for angle in (7, 30, 45, 71):
        mask = np.zeros((200, 200), np.uint8)
        box = cv2.boxPoints(((100, 100), (120, 40), angle))
        cv2.fillPoly(mask, [box.round().astype(int)], 1)
        (exact,) = polygons([Region(1, 0.5, 0, 0, mask > 0)])
        ((ring,),) = maps.simplified(exact)
        assert len(ring) < len(exact[0][0]) / 4


# --- Through predict_folder, with a network that takes red for aircraft --------------------------

CLASSES = ["ground", "aircraft", "ship & boat"]


def red_or_green(crops):
    """Probabilities of ground, aircraft (red) and ship (green)."""
    kind = torch.where(crops[..., 0] > 100, 1, torch.where(crops[..., 1] > 100, 2, 0))
    kind = torch.nn.functional.pad(kind, (0, 64 - kind.shape[2], 0, 64 - kind.shape[1]))
    return torch.nn.functional.one_hot(kind, 3).permute(0, 3, 1, 2) * 0.7 + 0.1


def predict(monkeypatch, source, target, *more, network=red_or_green, look=None):
    """Run what every semantic inference.py runs, and return its report by the scene's name."""
    monkeypatch.setattr(semantic, "load_network", lambda *_: (network, CLASSES))
    words = [__file__, source, target, "--window", 64, *more]
    args = semantic_parser("").parse(list(map(str, words)))
    args.look_of_training = look
    semantic.predict_folder(args, "", None, None)
    report = json.loads((target / "predictions.json").read_text())
    return {entry["image"]: entry for entry in report["images"]}


def scene_of(shapes, height=230, width=310):
    """uint8 [3,H,W]; shapes are (band, polygon)."""
    values = np.full((3, height, width), 40, np.uint8)
    for band, polygon in shapes:
        part = np.zeros((height, width), np.uint8)
        cv2.fillPoly(part, [np.array(polygon)], 1)
        values[band][part > 0] = 200
    return values


SHAPES = [
    (0, [(20, 10), (130, 60), (60, 90)]),
    (1, [(200, 30), (290, 40), (280, 200), (150, 210)]),
    (0, [(30, 150), (90, 150), (90, 220), (30, 220)]),
]
PLACES = {
    "utm": ("EPSG:32631", Affine(0.3, 0, 448_000.2, 0, -0.3, 5_411_000.7)),
    "degrees": ("EPSG:4326", Affine(4e-6, 0, 2.35, 0, -3e-6, 48.86)),
    "turned": (
        "EPSG:32633",
        Affine.translation(448_000, 5_411_000) @ Affine.rotation(33) @ Affine.scale(0.5, -0.4),
    ),
    "far south": ("EPSG:3031", Affine(10, 0, 1_500_000, 0, -10, -900_000)),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_map_lies_where_its_scene_does(monkeypatch, tmp_path, place):
    crs, matrix = PLACES[place]
    values = scene_of(SHAPES)
    values[0, 180:190, 50:70] = 40  # a hole
    path = raster(tmp_path / "a.tif", values, crs=crs, transform=matrix)
    entry = predict(monkeypatch, path, tmp_path / "out", "--confidence")["a.tif"]
    expected = np.where(values[0] > 100, 1, np.where(values[1] > 100, 2, 0))
    with rasterio.open(tmp_path / "out/a_mask.tif") as file:
        assert np.array_equal(file.read(1), expected)
        assert file.crs == rasterio.CRS.from_string(crs)
        assert file.transform.almost_equals(matrix, 1e-6)
        assert file.colormap(1)[1][:3] == (225, 0, 152)
    for name in ("a_mask.tif", "a_confidence.tif"):
        valid, errors, warnings = cog_validate(tmp_path / "out" / name, strict=True)
        assert (valid, errors, warnings) == (True, [], [])
    with rasterio.open(tmp_path / "out/a_confidence.tif") as file:
        np.testing.assert_allclose(file.read(1), 0.8, atol=1e-6)

    meta, _, geometries, columns = pyogrio.raw.read(tmp_path / "out/a.geojson")
    assert meta["crs"] == "EPSG:4326"
    table = dict(zip(meta["fields"], columns, strict=True))
    assert sorted(table["class"]) == ["aircraft", "aircraft", "ship & boat"]
    features = json.loads((tmp_path / "out/a.geojson").read_text())["features"]
    assert len(geometries) == len(features)
    painted = np.zeros(expected.shape, int)
    for feature in features:
        assert feature["geometry"]["type"] == "Polygon"
        pixels = []
        for i, ring in enumerate(feature["geometry"]["coordinates"]):
            lon, lat = np.array(ring).T
            assert (float(lon[:-1] @ lat[1:] - lon[1:] @ lat[:-1]) > 0) == (i == 0)
            x, y = ~matrix @ np.array(transform("EPSG:4326", crs, lon, lat))
            pixels.append(np.stack([x, y], 1))
            twice = 2 * pixels[-1]  # a corner, or the middle of an edge
            assert np.abs(twice - twice.round()).max() < 0.1
        shape = {"type": "Polygon", "coordinates": pixels}
        kind = CLASSES.index(feature["properties"]["class"])
        painted += rasterize([(shape, kind)], expected.shape)
        # Area and extent on the ellipsoid, from a projection of our own choice.
        centre = np.array(feature["geometry"]["coordinates"][0]).mean(0)
        here = f"+proj=cea +lat_ts={centre[1]} +lon_0={centre[0]} +datum=WGS84"
        area = 0.0
        for ring in feature["geometry"]["coordinates"]:
            x, y = np.array(transform("EPSG:4326", here, *np.array(ring).T))
            x, y = x - x[0], y - y[0]
            area += float(x[:-1] @ y[1:] - x[1:] @ y[:-1]) / 2
        properties = feature["properties"]
        assert properties["area_m2"] == pytest.approx(area, rel=1e-2)
        assert properties["width_m"] <= properties["length_m"]
        assert properties["score"] == 0.8
        assert properties["source"] == "a.tif"
    assert np.array_equal(painted, expected)
    assert sorted(r["area"] for r in entry["regions"]) == sorted(
        int(n)
        for n in np.bincount(cv2.connectedComponents((expected > 0).astype(np.uint8))[1].ravel())[
            1:
        ]
    )


def test_length_and_width_are_those_of_the_aircraft(monkeypatch, tmp_path):
    values = scene_of([(0, [(50, 50), (170, 110), (160, 130), (40, 70)])])
    crs, matrix = PLACES["utm"]
    predict(
        monkeypatch, raster(tmp_path / "a.tif", values, crs=crs, transform=matrix), tmp_path / "o"
    )
    (feature,) = json.loads((tmp_path / "o/a.geojson").read_text())["features"]
    assert feature["properties"]["length_m"] == pytest.approx(0.3 * 60 * 5**0.5, abs=0.3 * 2)
    assert feature["properties"]["width_m"] == pytest.approx(0.3 * 10 * 5**0.5, abs=0.3 * 2)


@pytest.mark.parametrize("place", [*PLACES, None])
@pytest.mark.parametrize("turned", [0, 20, 64, 100, 155])
def test_the_rectangle_is_the_smallest_and_its_angle_is_from_north(
    monkeypatch, tmp_path, place, turned
):
    """In metres around the region, by a projection of our own choice; in pixels without a place."""
    corners = cv2.boxPoints(((150, 110), (120, 40), turned)).round().astype(int)
    more = dict(zip(("crs", "transform"), PLACES[place], strict=True)) if place else {}
    path = raster(tmp_path / "a.tif", scene_of([(0, corners)]), **more)
    predict(monkeypatch, path, tmp_path / "o")
    (feature,) = json.loads((tmp_path / "o/a.geojson").read_text())["features"]
    properties = feature["properties"]
    rectangle = np.array(properties["rectangle"])
    outline = np.array(feature["geometry"]["coordinates"][0])
    if place:
        lon, lat = outline.mean(0)
        here = f"+proj=laea +lat_0={lat} +lon_0={lon} +datum=WGS84"
        rectangle, outline = (
            np.array(transform("EPSG:4326", here, *points.T)).T for points in (rectangle, outline)
        )
    unit = "m" if place else "px"
    sides = np.diff(rectangle[[0, 1, 2, 3, 0]], axis=0)
    lengths = np.linalg.norm(sides, axis=1)
    assert abs(sides[0] @ sides[1]) < 0.01 * lengths[0] * lengths[1]
    assert sorted(lengths)[0] == pytest.approx(properties[f"width_{unit}"], rel=0.01)
    assert sorted(lengths)[-1] == pytest.approx(properties[f"length_{unit}"], rel=0.01)
    east, north = sides[lengths.argmax()]
    angle = np.degrees(np.arctan2(east, north)) % 180
    off = abs(properties["angle_deg"] - angle)
    assert min(off, 180 - off) < 1
    areas = []
    for degrees in np.radians(np.arange(0, 90, 0.5)):
        axes = [[np.cos(degrees), -np.sin(degrees)], [np.sin(degrees), np.cos(degrees)]]
        areas.append(np.ptp(outline @ axes, axis=0).prod())
    assert min(areas) == pytest.approx(lengths[0] * lengths[1], rel=0.05)
    inside = (outline - rectangle[0]) @ (sides[:2] / lengths[:2, None]).T
    assert inside.min() > -0.01 * lengths.max()
    assert (inside.max(0) < lengths[:2] + 0.01 * lengths.max()).all()


@pytest.mark.parametrize("find", ["predict", "find_all"])
def test_small_large_and_unsure_regions_are_left_out(monkeypatch, tmp_path, find):
    """By square metres if the scene has a place, otherwise by pixels."""
    values = scene_of([(0, [(x, 10), (x + n - 1, 10), (x + n - 1, 9 + n), (x, 9 + n)])
                       for x, n in ((10, 3), (30, 5), (70, 10), (110, 30))]) // 100  # fmt: skip
    values = values * (100 if find == "predict" else 1)
    values[1:] = 0
    numbers = cv2.connectedComponents((values[0] > 0).astype(np.uint8))[1].astype(np.uint8)
    values[0] = values[0] if find == "predict" else numbers
    crs, _ = PLACES["utm"]
    place = {"crs": crs, "transform": Affine(2, 0, 448_000, 0, -2, 5_411_000)}
    raster(tmp_path / "a.tif", values, **place)
    raster(tmp_path / "b.tif", values)

    def areas(name, *more):
        report = globals()[find](monkeypatch, tmp_path / name, tmp_path / "out", *more)
        features = json.loads((tmp_path / f"out/{name[0]}.geojson").read_text())["features"]
        listed = report[name]["regions"] if find == "predict" else report[1]["annotations"]
        assert len(features) == len(listed)
        return sorted(entry["area"] for entry in listed)

    assert areas("a.tif") == areas("b.tif") == [25, 100, 900]
    assert areas("a.tif", "--min-area", 0) == [9, 25, 100, 900]
    assert areas("a.tif", "--min-area", 50, "--max-area", 1000) == [25, 100]
    assert areas("b.tif", "--min-area", 50, "--max-area", 1000) == [100, 900]
    assert areas("a.tif", "--score-threshold", 0.9) == []
    if find == "predict":  # gaps of 17, 35 and 30 pixels
        assert areas("a.tif", "--join", 40) == [34, 100, 900]
        assert areas("b.tif", "--join", 40) == [1034]


def test_without_a_georeference_maps_are_in_pixels(monkeypatch, tmp_path, capsys):
    folder = tmp_path / "scenes"
    folder.mkdir()
    raster(folder / "a.tif", scene_of(SHAPES))
    raster(folder / "b.png", scene_of(SHAPES), "PNG")
    raster(
        folder / "c.tif",
        scene_of(SHAPES),
        crs='LOCAL_CS["hall",UNIT["metre",1]]',
        transform=Affine(2, 0, 0, 0, -2, 9),
    )
    report = predict(monkeypatch, folder, tmp_path / "out")
    said = capsys.readouterr().out
    assert said.count("not georeferenced, so map and areas are in pixels") == 3
    assert "1 of 3, 'a.tif': 310x230 pixels, bands 1 2 3 (by their colours), values as" in said
    assert report["b.png"]["mask"] == "b_mask.png"
    mask = np.asarray(Image.open(tmp_path / "out/b_mask.png"))
    for name in "abc":
        content = json.loads((tmp_path / f"out/{name}.geojson").read_text())
        assert set(content) == {"type", "features"}
        for feature in content["features"]:
            assert {"area_px2", "length_px", "width_px"} < feature["properties"].keys()
            ring = np.array(feature["geometry"]["coordinates"][0])
            assert ring.min(0).tolist() >= [0, -230]
            assert ring.max(0).tolist() <= [310, 0]
    assert {f["properties"]["area_px2"] for f in content["features"]} == {
        r["area"] for r in report["c.tif"]["regions"]
    }
    assert len(np.unique(mask)) == 3


def test_the_readme_draws_a_map_over_its_scene(monkeypatch, tmp_path):
    (tmp_path / "scenes").mkdir()
    raster(tmp_path / "scenes/scene.png", scene_of(SHAPES), "PNG")
    predict(monkeypatch, tmp_path / "scenes", tmp_path / "maps")
    readme = (ROOT / "common/predict/README.md").read_text()
    code, *_ = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    drawn = np.asarray(Image.open("map.jpg")).astype(int)
    yellow = (drawn[..., 0] > 180) & (drawn[..., 1] > 180) & (drawn[..., 2] < 120)
    # The outlines, and the scores beside them, cover a small part of the picture.
    assert 0.001 < yellow.mean() < 0.1


def test_pixels_without_data_are_known_in_every_output(monkeypatch, tmp_path):
    values = np.concatenate([scene_of(SHAPES), np.full((1, 230, 310), 255, np.uint8)])
    values[3, :, :60] = 0
    values[0, :, :60] = 200  # red under the transparency
    path = raster(tmp_path / "a.tif", values, colours=["red", "green", "blue", "alpha"])
    predict(monkeypatch, path, tmp_path / "out", "--confidence")
    with rasterio.open(tmp_path / "out/a_mask.tif") as mask:
        assert (mask.read(1)[:, :60] == mask.nodata).all()
        assert mask.read(1)[:, 60:].max() == 2
    with rasterio.open(tmp_path / "out/a_confidence.tif") as confidence:
        assert (confidence.read(1)[:, :60] == confidence.nodata).all()
        assert confidence.read(1)[:, 60:].all()


def edges(crops):
    """Probabilities of ground and of aircraft, which are at every hard edge."""
    jumps = torch.zeros(crops.shape[:3], dtype=torch.bool)
    jumps[:, 1:] |= (crops[:, 1:].float() - crops[:, :-1].float()).abs().amax(3) > 60
    jumps = torch.nn.functional.pad(jumps, (0, 64 - crops.shape[2], 0, 64 - crops.shape[1]))
    return torch.nn.functional.one_hot(jumps.long(), 3).permute(0, 3, 1, 2) * 0.7 + 0.1


@pytest.mark.parametrize("kind", ["alpha", "nodata", "nan", "mask"])
def test_a_rim_of_pixels_without_data_is_no_aircraft(monkeypatch, tmp_path, kind):
    """A black one has an edge that networks take for aircraft, along the whole rim."""
    values = np.random.default_rng(0).integers(90, 150, (3, 200, 150)).astype(np.float32)
    values[:, 120:] = np.nan if kind == "nan" else 0
    values = values if kind == "nan" else values.astype(np.uint8)
    more = {"nodata": 0} if kind == "nodata" else {}
    if kind == "alpha":
        values = np.concatenate([values, np.where(values[:1], 255, 0).astype(np.uint8)])
        more = {"colours": ["red", "green", "blue", "alpha"]}
    path = raster(tmp_path / "a.tif", values, **more)
    if kind == "mask":
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "r+") as file:
            file.write_mask(values[0] > 0)
    predict(monkeypatch, path, tmp_path / "out", "--range", 0, 255, network=edges)
    with rasterio.open(tmp_path / "out/a_mask.tif") as mask:
        assert (mask.read(1)[120:] == 255).all()
        assert not mask.read(1)[:120].any()


def test_a_mask_is_as_a_gis_wants_it(monkeypatch, tmp_path):
    """The ground is transparent, no data is no value, and the file says what is what."""
    values = scene_of(SHAPES)
    values[:, :, :20] = 0
    crs, matrix = PLACES["utm"]
    path = raster(tmp_path / "a.tif", values, nodata=0, crs=crs, transform=matrix)
    predict(monkeypatch, path, tmp_path / "out")
    with rasterio.open(tmp_path / "out/a_mask.tif") as file:
        assert file.count == 1
        assert file.nodata == 255
        assert (file.read(1)[:, :20] == 255).all()
        assert [file.colormap(1)[i][3] for i in (0, 1, 2)] == [0, 255, 255]
        assert file.descriptions[0] == "0 ground, 1 aircraft, 2 ship & boat, 255 no data"
        assert file.tags()["MODEL"] == "test_maps.py"
        assert re.fullmatch(r"20\d\d:\d\d:\d\d [\d:]{8}", file.tags()["TIFFTAG_DATETIME"])
    legend = ElementTree.parse(tmp_path / "out/a_mask.tif.aux.xml")
    assert [name.text for name in legend.iter("Category")] == CLASSES


@pytest.mark.parametrize("find", ["predict", "find_all"])
def test_the_map_appears_when_the_scene_is_complete(monkeypatch, tmp_path, find):
    path = raster(tmp_path / "a.png", scene_of(SHAPES) // 100, "PNG")
    for module in (semantic, scenes):
        monkeypatch.setattr(module, "save", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        globals()[find](monkeypatch, path, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} <= {"a_mask.png"}


def test_one_bad_scene_does_not_stop_the_others(monkeypatch, tmp_path):
    folder, out = tmp_path / "scenes", tmp_path / "out"
    folder.mkdir()
    raster(folder / "a.tif", scene_of(SHAPES), compress="deflate")
    data = (folder / "a.tif").read_bytes()
    (folder / "cut.tif").write_bytes(data[: len(data) * 2 // 3])
    raster(
        folder / "empty.tif",
        np.zeros((4, 90, 90), np.uint8),
        colours=["red", "green", "blue", "alpha"],
    )
    raster(folder / "nodata.tif", np.zeros((1, 90, 90), np.uint16), nodata=0)
    raster(folder / "one.tif", scene_of(SHAPES)[:1])
    raster(folder / "wave.tif", np.ones((1, 9, 9), np.complex64))
    (folder / "words.tif").write_text("no raster")
    (folder / "z.png").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        predict(monkeypatch, folder, out)
    assert "6 of 8 images" in str(caught.value)
    assert "\n" not in str(caught.value)
    made = {path.name for path in out.iterdir()}
    expected = {
        f"{n}{end}"
        for n in ("a", "one")
        for end in ("_mask.tif", "_mask.tif.aux.xml", "_overlay.jpg", ".geojson")
    }
    assert made == expected | {"predictions.json"}
    for name, sentence in (
        ("cut.tif", "damaged or truncated"),
        ("empty.tif", "no valid pixel"),
        ("nodata.tif", "no valid pixel"),
        ("wave.tif", "complex"),
        ("words.tif", "is not a PNG, JPEG"),
    ):
        with pytest.raises(UserError, match=sentence):
            predict(monkeypatch, folder / name, tmp_path / "one")
    with pytest.raises(UserError, match="no band 2; it has 1"):
        predict(monkeypatch, folder / "one.tif", tmp_path / "one", "--bands", 1, 2, 1)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
@pytest.mark.parametrize("kilobytes", [40, 120, 200])
def test_a_full_disk_leaves_no_half_file(monkeypatch, tmp_path, kilobytes):
    """Whatever is written when the disk becomes full: rows, overviews, map or overlay."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this machine does not allow mounting")
    try:
        rng = np.random.default_rng(0)
        values = (rng.random((3, 600, 700)) < 0.4).astype(np.uint8) * 200
        path = raster(tmp_path / "a.tif", values)
        with pytest.raises((UserError, OSError)) as caught:
            predict(monkeypatch, path, disk / "out", "--min-area", 0)
        assert "\n" not in str(caught.value)
        left = [p for p in (disk / "out").rglob("*") if p.is_file()]
        for file in left:
            if file.suffix == ".tif":
                with rasterio.open(file) as mask:
                    assert mask.read(1).shape == (600, 700)
            elif file.suffix in (".json", ".geojson"):
                json.loads(file.read_text())
            else:
                Image.open(file).load()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--bands", 1, 2], "three bands or one"),
        (["--stretch", 98, 2], "--stretch 98 2"),
        (["--range", 5, 5], "--range 5 5"),
        (["--range", 0, 5, "--stretch", 2, 98], "exclude each other"),
        (["--gsd", 0.5], "not georeferenced"),
    ],
)
def test_mistakes_are_answered_by_one_sentence(monkeypatch, tmp_path, words, sentence):
    path = raster(tmp_path / "a.tif", scene_of(SHAPES))
    with pytest.raises(UserError, match=sentence):
        predict(monkeypatch, path, tmp_path / "out", *words)


def test_names_sizes_and_files_of_any_kind(monkeypatch, tmp_path, capsys):
    folder, out = tmp_path / "scenes", tmp_path / "out"
    folder.mkdir()
    long = ["a" * 240 + ".png", "a" * 241 + ".png", "é" * 120 + ".png"]
    for name in long:
        raster(folder / name, scene_of(SHAPES), "PNG")
    strip = np.zeros((3, 4, 66_000), np.uint8)
    strip[0, :, 500:600] = 200
    raster(folder / "strip.png", strip, "PNG")
    (folder / "notes.txt").write_text("no image")
    report = predict(monkeypatch, folder, out)
    assert "left out 1 files" in capsys.readouterr().out
    assert set(report) == {*long, "strip.png"}
    assert len({entry["mask"] for entry in report.values()}) == 4
    for entry in report.values():
        size = (entry["width"], entry["height"])
        assert Image.open(out / entry["mask"]).size == size
        assert max(Image.open(out / entry["overlay"]).size) <= 4096
    (region,) = report["strip.png"]["regions"]
    assert region["bbox"] == [500, 0, 100, 4]


def test_the_overlay_is_reduced_and_the_regions_are_on_a_sheet(monkeypatch, tmp_path):
    path = raster(tmp_path / "a.tif", scene_of(SHAPES))
    predict(monkeypatch, path, tmp_path / "out", "--overlay-size", 100, "--crops", 2)
    overlay = np.asarray(Image.open(tmp_path / "out/a_overlay.jpg")).astype(int)
    assert overlay.shape == (58, 78, 3)
    magenta = (overlay[..., 0] > 150) & (overlay[..., 1] < 100) & (overlay[..., 2] > 55)
    assert magenta[48, 15]
    assert not magenta[:, 70:].any()
    assert Image.open(tmp_path / "out/a_crops.jpg").size[0] == 3 * 160 + 2 * 6


def test_what_was_decided_is_said_for_each_scene(monkeypatch, tmp_path, capsys):
    folder = tmp_path / "scenes"
    folder.mkdir()
    crs, matrix = PLACES["utm"]
    place = {"crs": crs, "transform": matrix}
    eight = np.random.default_rng(0).integers(0, 1000, (8, 90, 90)).astype(np.uint16)
    raster(folder / "a.tif", eight, **place)
    bgr = scene_of(SHAPES)
    raster(folder / "b.tif", bgr, colours=["blue", "green", "red"], **place)
    predict(monkeypatch, folder, tmp_path / "out", "--range", 0, 500, look={"trained_gsd": 0.5})
    first, second = capsys.readouterr().out.splitlines()[:2]
    gsd = "0.3 m a pixel, the training tiles 0.5 m: see --gsd 0.5"
    black = "0 to 500, 0 to 500, 0 to 500 become black to white"
    chosen = "bands 1 2 3 (of 8 without names of colours, see --bands)"
    assert first == f"1 of 2, 'a.tif': 90x90 pixels, {chosen}, {black}; {gsd}"
    chosen = "bands 3 2 1 (by their colours)"
    assert second == f"2 of 2, 'b.tif': 310x230 pixels, {chosen}, {black}; {gsd}"
    words = ("--bands", 5, 3, 2, "--gsd", 0.52)
    predict(monkeypatch, folder / "a.tif", tmp_path / "out", *words, look={"trained_gsd": 0.5})
    (only, _) = capsys.readouterr().out.splitlines()
    low, high = np.percentile(eight[1], (2, 98))
    assert "bands 5 3 2 (as asked for), " in only
    assert only.endswith("become black to white; 0.52 m a pixel")
    assert low < 30 < 970 < high


@pytest.mark.parametrize("side", ["a.tfw", "a.prj", "a.tif.aux.xml"])
def test_a_place_in_another_file_is_told(monkeypatch, tmp_path, capsys, side):
    path = raster(tmp_path / "a.tif", scene_of(SHAPES))
    for text, is_place in (("", side != "a.tif.aux.xml"), ("<GeoTransform>0, 1", True)):
        (tmp_path / side).write_text(text)
        predict(monkeypatch, path, tmp_path / "out")
        told = f"{side!r} is not read: `gdal_translate -a_srs EPSG:CODE a.tif placed.tif`"
        assert (told in capsys.readouterr().out) == is_place
    crs, matrix = PLACES["utm"]
    raster(path, scene_of(SHAPES), crs=crs, transform=matrix)
    predict(monkeypatch, path, tmp_path / "out")
    assert "is not read" not in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("find", ["predict", "find_all"])
def test_hours_of_scenes_can_be_stopped_and_go_on(monkeypatch, tmp_path, find, number):
    """What was complete stays and is listed, nothing else is left, and nothing is done twice."""
    folder, out, handler = tmp_path / "scenes", tmp_path / "out", signal.getsignal(signal.SIGTERM)
    folder.mkdir()
    for name in "abcdef":
        raster(folder / f"{name}.png", scene_of(SHAPES) // 90, "PNG")
    find = globals()[find]

    def names(results):
        images = results if find is predict else [i["file_name"] for i in results[1]["images"]]
        return sorted(images)

    whole = find(monkeypatch, folder, tmp_path / "whole")
    assert names(whole) == [f"{name}.png" for name in "abcdef"]
    find(monkeypatch, folder, out, "-i", 4)
    strips = windows.strips

    def stopped_at_c(scene, tiling):
        if scene.path.name == "c.png":
            os.kill(os.getpid(), number)
        return strips(scene, tiling)

    with monkeypatch.context() as patch:
        patch.setattr(windows, "strips", stopped_at_c)
        with pytest.raises(KeyboardInterrupt, match="stopped after 2 of 6 scenes"):
            find(monkeypatch, folder, out, "--skip-existing")
    left = {path.name.partition(".")[0].partition("_")[0] for path in out.iterdir()}
    assert left == {"a", "b", "e", "predictions"}
    assert signal.getsignal(signal.SIGTERM) == handler
    kept = (out / "a.geojson").stat().st_mtime_ns
    hidden = out / f".c_mask.png.{dead_process()}.tmp"
    hidden.write_text("of a run that was killed")
    assert find(monkeypatch, folder, out, "--skip-existing") == whole
    assert (out / "a.geojson").stat().st_mtime_ns == kept
    assert not hidden.exists()
    (out / "predictions.json").write_text('{"images": 3}')
    with pytest.raises(UserError, match="leave out --skip-existing"):
        find(monkeypatch, folder, out, "--skip-existing")


def dead_process():
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_only_names_that_clash_become_longer(monkeypatch, tmp_path):
    folder = tmp_path / "scenes"
    folder.mkdir()
    for name in ("a.png", "a.tif", "a.tif.png", "b.png"):
        raster(folder / name, scene_of(SHAPES), "PNG" if name.endswith("png") else "GTiff")
    report = predict(monkeypatch, folder, tmp_path / "out")
    masks = {name: entry["mask"] for name, entry in report.items()}
    assert masks == {
        "a.png": "a.png_mask.png",
        "a.tif": "a.tif_mask.tif",
        "a.tif.png": "a.tif.png_mask.png",
        "b.png": "b_mask.png",
    }
    alone = predict(monkeypatch, folder, tmp_path / "one", "-i", 1)
    assert alone["a.tif"]["mask"] == "a.tif_mask.tif"


# --- Instances: through mask/inference.py, with a network that finds numbered blobs ---------------


def find_all(monkeypatch, source, target, *more):
    """Run mask/inference.py; return the limit that the network is built with, and the report."""
    built = []

    def load_network(args, name, from_checkpoint, *_, max_detections):
        args.max_detections = args.max_detections or max_detections
        built.append(from_checkpoint({}))
        return numbered, ["ground", "aircraft"]

    monkeypatch.setattr(scenes, "load_network", load_network)
    monkeypatch.setattr(scenes, "from_checkpoint", lambda content, most: most)
    words = [__file__, source, target, "--window", 64, *more]
    inference.main(list(map(str, words)))
    return built[0], json.loads((target / "predictions.json").read_text())


def numbered_scene(height, width, count, seed=0):
    rng = np.random.default_rng(seed)
    ids = np.zeros((height, width), np.uint8)
    for number in range(1, count + 1):
        y, x = rng.integers(0, height - 12), rng.integers(0, width - 12)
        part = ids[y : y + rng.integers(8, 30), x : x + rng.integers(8, 30)]
        part[part == 0] = number
    return ids


def test_aircraft_become_coco_and_a_map(monkeypatch, tmp_path, capsys):
    ids = numbered_scene(200, 280, 25)
    crs, matrix = PLACES["turned"]
    values = np.stack([ids, ids * 0, ids * 0])
    folder = tmp_path / "scenes"
    folder.mkdir()
    raster(folder / "a.tif", values, crs=crs, transform=matrix)
    raster(folder / "b.png", values, "PNG")
    words = ("--overlap", 0.5, "--min-area", 0, "--crops", 4)
    most, report = find_all(monkeypatch, folder, tmp_path / "out", *words, "--max-detections", 3)
    assert most == 3
    assert re.search(r"'a.tif': \d+ windows reached --max-detections 3", capsys.readouterr().out)
    assert [image["file_name"] for image in report["images"]] == ["a.tif", "b.png"]
    assert [a["id"] for a in report["annotations"]] == list(
        range(1, len(report["annotations"]) + 1)
    )
    for image, name in zip(report["images"], "ab", strict=True):
        annotations = [a for a in report["annotations"] if a["image_id"] == image["id"]]
        assert len(annotations) == len(np.unique(ids)) - 1
        painted = np.zeros_like(ids)
        for a in annotations:
            number = round((0.9 - a["score"]) * 1000)
            painted += rle.decode(a["segmentation"]) * np.uint8(number)
            assert a["area"] == rle.area(a["segmentation"]) == (ids == number).sum()
            assert a["bbox"] == [int(v) for v in rle.toBbox(a["segmentation"])]
        assert np.array_equal(painted, ids)
        features = json.loads((tmp_path / f"out/{name}.geojson").read_text())["features"]
        assert len(features) == len(annotations)
        if name == "a":
            areas = sorted(f["properties"]["area_m2"] for f in features)
            exact = sorted(0.2 * a["area"] for a in annotations)  # a pixel is 0.5 m by 0.4 m
            np.testing.assert_allclose(areas, exact, rtol=2e-3)
        assert Image.open(tmp_path / f"out/{name}_crops.jpg").size[0] == 4 * 160 + 3 * 6
    most, _ = find_all(monkeypatch, folder, tmp_path / "out")
    assert most == 100
    assert "--max-detections" not in capsys.readouterr().out


@settings(max_examples=200)
@given(seed=st.integers(0, 10_000), height=st.integers(1, 12), width=st.integers(1, 12))
def test_run_lengths_of_a_cut_mask_are_those_of_the_image(seed, height, width):
    rng = np.random.default_rng(seed)
    image = np.zeros((height, width), np.uint8, order="F")
    y, x = rng.integers(0, height), rng.integers(0, width)
    h, w = rng.integers(1, height - y + 1), rng.integers(1, width - x + 1)
    mask = rng.random((h, w)) < rng.choice([0.3, 0.9, 1])
    if not mask.any():
        mask[0, 0] = True
    image[y : y + h, x : x + w] = mask
    found = scenes.annotate(Region(1, 0.5, int(x), int(y), mask), height, width)
    assert found["segmentation"]["counts"] == rle.encode(image)["counts"].decode()
