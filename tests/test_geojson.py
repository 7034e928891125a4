"""Polygons drawn on georeferenced scenes become the same tiles as COCO's."""

import json

import cv2
import numpy as np
import pytest
import rasterio
from helpers.commands import training
from helpers.rasters import raster
from helpers.scenes import read_tiles
from PIL import Image
from rasterio import Affine
from rasterio.warp import transform

from common.cli import UserError
from common.io.look import Look
from common.io.raster import NEUTRAL, open_scene
from common.predict.maps import feature_file
from common.predict.regions import Region
from preprocessing import geojson
from preprocessing.geojson import Block, cut_into_blocks
from preprocessing.shapes import read_labels
from unet import export, inference, train

RNG = np.random.default_rng(0)
PLACE = Affine.translation(448_000, 5_411_000) @ Affine.rotation(20) @ Affine.scale(0.5, -0.5)
SQUARES = {"plane": [(10, 10, 40), (90, 20, 30)], "ship": [(60, 90, 50)]}


def ring(x, y, side):
    return [(x, y), (x + side, y), (x + side, y + side), (x, y + side), (x, y)]


def labels_of(path, crs, features):
    """Write features (class, type, rings in pixels), moved to `crs`; None leaves pixels."""

    def moved(points):
        if crs is None:
            return points
        x, y = PLACE @ np.array(points, float).T
        return list(zip(*transform("EPSG:32631", crs, x, y), strict=True))

    def geometry(kind, polygons):
        moved_ = [[moved(r) for r in polygon] for polygon in polygons]
        return {"type": kind, "coordinates": moved_ if kind == "MultiPolygon" else moved_[0]}

    content = {
        "type": "FeatureCollection",
        "features": [
            {"type": "Feature", "properties": {"kind": name}, "geometry": geometry(kind, polygons)}
            for name, kind, polygons in features
        ],
    }
    if crs not in (None, "EPSG:4326"):
        urn = "urn:ogc:def:crs:EPSG::" + crs[5:]
        content["crs"] = {"type": "name", "properties": {"name": urn}}
    path.write_text(json.dumps(content))
    return path


FEATURES = [
    ("plane", "Polygon", [[ring(10, 10, 40), ring(20, 20, 8)[::-1]]]),
    ("plane", "MultiPolygon", [[ring(90, 20, 30)], [ring(90, 60, 10)]]),
    ("ship", "Polygon", [[ring(60, 90, 50)]]),
    ("ship", "Polygon", [[ring(9000, 9000, 50)]]),  # on no scene
]


def truth():
    kinds = np.zeros((160, 200), int)
    kinds[10:50, 10:50] = 1
    kinds[20:28, 20:28] = 0
    kinds[20:50, 90:120] = 1
    kinds[60:70, 90:100] = 1
    kinds[90:140, 60:110] = 2
    return kinds


def scene(path, georeferenced=True):
    values = np.stack([truth() * 90, truth() * 20, np.indices((160, 200))[1]]).astype(np.uint8)
    place = {"crs": "EPSG:32631", "transform": PLACE} if georeferenced else {}
    return raster(path, values, **place), np.moveaxis(values, 0, 2)


def tiled_kinds(folder):
    """The tiles pasted together again: class of each pixel, and the image."""
    coco, _ = read_tiles(folder)
    classes = {c["id"]: c["name"] for c in coco["categories"]}
    kinds, image = np.zeros((160, 200), int), np.zeros((160, 200, 3), np.uint8)
    for entry in coco["images"]:
        y, x = entry["y"], entry["x"]
        if "_y" in entry["scene"]:
            row, column = entry["scene"].rpartition("_y")[2].split("_x")
            y, x = y + int(row), x + int(column)
        stem = entry["file_name"][:-4]
        mask = np.asarray(Image.open(folder / f"masks_tiled/{stem}_mask.png"))
        side = mask.shape[0]
        image[y : y + side, x : x + side] = Image.open(folder / f"images_tiled/{stem}.png")
        part = kinds[y : y + side, x : x + side]
        for a in coco["annotations"]:
            if a["image_id"] == entry["id"] and not a["iscrowd"]:
                part[mask == a["instance"]] = ["", "plane", "ship"].index(classes[a["category_id"]])
    return kinds, image


@pytest.mark.parametrize("crs", ["EPSG:32631", "EPSG:4326", "EPSG:3857", None])
@pytest.mark.parametrize("block", [16, 2])
def test_polygons_in_any_system_become_tiles(tmp_path, monkeypatch, crs, block):
    monkeypatch.setattr(geojson, "BLOCK", block)
    path, pixels = scene(tmp_path / "a.tif", georeferenced=crs is not None)
    labels = labels_of(tmp_path / "l.geojson", crs, FEATURES)
    words = [path, labels, "-o", tmp_path / "out", "--class-property", "kind", "-s", 40, "-n", 1]
    words += ["--negatives", 100, "--min-visible", 0]
    assert geojson.main(list(map(str, words))) == 0
    kinds, image = tiled_kinds(tmp_path / "out/train")
    assert np.array_equal(image, pixels)
    # What a tile shows fewer than 25 pixels of is ignored.
    assert (kinds != truth()).mean() < 0.01
    names = {c["name"] for c in read_tiles(tmp_path / "out/train")[0]["categories"]}
    assert names == {"plane", "ship"}


def test_a_folder_of_scenes_and_one_class(tmp_path):
    folder = tmp_path / "scenes"
    folder.mkdir()
    scene(folder / "a.tif")
    labels = labels_of(tmp_path / "l.geojson", "EPSG:4326", FEATURES)
    words = [folder, labels, "-o", tmp_path / "out", "-s", 64, "-n", 1, "--as", "val"]
    assert geojson.main(list(map(str, words))) == 0
    coco, _ = read_tiles(tmp_path / "out/val")
    assert [c["name"] for c in coco["categories"]] == ["aircraft"]
    assert {e["airport"] for e in coco["images"]} == {"a"}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is not JSON"),
        ("[]", "not a GeoJSON file"),
        ('{"features": {}}', "not a GeoJSON file"),
        ('{"features": [3]}', "no valid polygon"),
        (None, "no polygon of"),
        ("crs", "unknown reference system"),
        ("kind", "as its 'colour'"),
    ],
)
def test_bad_labels_are_answered_by_one_sentence(tmp_path, content, sentence):
    path, _ = scene(tmp_path / "a.tif")
    labels = labels_of(tmp_path / "l.geojson", "EPSG:32631", FEATURES[-1:])
    words = [path, labels, "-o", tmp_path / "out"]
    if content == "crs":
        labels.write_text(labels.read_text().replace("EPSG::32631", "EPSG::99999"))
    elif content == "kind":
        words += ["--class-property", "colour"]
    elif content:
        labels.write_text(content)
    with pytest.raises(UserError, match=sentence) as caught:
        geojson.main(list(map(str, words)))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_labels_in_degrees_of_an_image_without_a_place(tmp_path, capsys):
    """As those of a tile whose `.aux.xml` says where it lies, which is not read."""
    path, _ = scene(tmp_path / "a.tif", georeferenced=False)
    labels = labels_of(tmp_path / "a.geojson", "EPSG:4326", FEATURES)
    words = list(map(str, [path, labels, "-o", tmp_path / "out", "-n", 1]))
    with pytest.raises(UserError, match="none of the 1 scenes"):
        geojson.main(words)
    assert "'a.geojson' is in degrees, but image" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["on earth", "in pixels", "in pixels, y downwards"])
def test_a_map_that_was_predicted_can_be_corrected_and_learnt_from(tmp_path, place):
    """What inference.py writes, or an older one wrote, is what this command reads."""
    path, _ = scene(tmp_path / "a.tif")
    if place != "on earth":
        with rasterio.open(path) as file:
            values = file.read()
        raster(path, values)
    with (
        open_scene(path) as opened,
        feature_file(tmp_path / "p.geojson", opened, ["", "plane", "ship"]) as f,
    ):
        for label in (1, 2):
            f.add(Region(label, 0.9, 0, 0, truth() == label))
    if "down" in place:
        text = (tmp_path / "p.geojson").read_text()
        (tmp_path / "p.geojson").write_text(text.replace(", -", ", "))
    words = [path, tmp_path / "p.geojson", "-o", tmp_path / "out", "--class-property", "class"]
    words += ["-s", 40, "-n", 1, "--negatives", 100, "--min-visible", 0]
    assert geojson.main(list(map(str, words))) == 0
    assert (tiled_kinds(tmp_path / "out/train")[0] != truth()).mean() < 0.01


# --- Across 180 degrees of longitude --------------------------------------------------------------

STEP = 3e-6  # degrees of longitude for a pixel, about 0.3 m
MERCATOR = transform("EPSG:4326", "EPSG:3857", [STEP], [0])[0][0]
TURN = {"EPSG:4326": 360.0, "EPSG:3857": 2 * np.pi * 6378137}
TOP = {"EPSG:4326": -16.7, "EPSG:3857": -1.9e6}


def across(crs, left):
    """The place of a scene of 256 x 256 pixels whose column `left` begins at 180 degrees."""
    step = {"EPSG:4326": STEP, "EPSG:3857": MERCATOR}[crs]
    return Affine(step, 0, TURN[crs] / 2 - left * step, 0, -step, TOP[crs])


def wrapped(lon):
    return (np.asarray(lon) + 180) % 360 - 180


OUTLINE = np.array([(100, 50), (160, 50), (160, 90), (100, 90), (100, 50)])


def forms(place, crs):
    """An outline as lists of rings, as tools write it that crosses 180 degrees."""

    def lon_lat(points):
        x, y = place @ np.array(points, float).T
        lon, lat = transform(crs, "EPSG:4326", np.minimum(x, TURN[crs] / 2), y)
        return np.stack(
            [np.array(lon) + (x - np.minimum(x, TURN[crs] / 2)) * 360 / TURN[crs], lat], 1
        )

    beyond = lon_lat(OUTLINE)
    cut = np.clip(beyond[:, 0], None, 180), np.clip(beyond[:, 0], 180, None) - 360
    return {
        "beyond 180": [beyond],
        "beyond -180": [beyond - (360, 0)],
        "torn": [np.stack([wrapped(beyond[:, 0]), beyond[:, 1]], 1)],
        "cut": [np.stack([half, beyond[:, 1]], 1) for half in cut],
    }


@pytest.mark.parametrize("form", ["beyond 180", "beyond -180", "torn", "cut"])
@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:3857"])
# The outline is crossed, or lies on one side, as the scene may.
@pytest.mark.parametrize("left", [128, 20, 230, 0, 256, 100, 160])
@pytest.mark.parametrize("turns", [0, -1])
def test_labels_across_the_antimeridian_fall_on_their_pixels(tmp_path, form, crs, left, turns):
    place = across(crs, left)
    rings = forms(place, crs)[form]
    moved = Affine.translation(turns * TURN[crs], 0) @ place
    path = raster(tmp_path / "a.tif", np.zeros((1, 256, 256), np.uint8), crs=crs, transform=moved)
    # A neighbour on the other side of the earth, across the line where longitudes jump from here.
    far = [(rings[0] + (180, 0)).tolist()]
    polygons = [[[ring.tolist() for ring in rings if np.ptp(ring[:, 0])]], [far]]
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "MultiPolygon", "coordinates": [[ring] for ring in parts]},
        }
        for (parts,) in polygons
    ]
    content = {"type": "FeatureCollection", "features": features}
    (tmp_path / "l.geojson").write_text(json.dumps(content))
    drawn = read_labels(tmp_path / "l.geojson", None)
    whole = Block(
        path, drawn.path, None, "a", "a", (0, 0, 0, 0), Look(), {"aircraft": (1, "aircraft")}
    )
    (block,) = cut_into_blocks(whole, drawn, 64)
    assert [shape.number for shape in block.shapes] == [1]
    labels = block.labels()
    expected = np.zeros((256, 256), np.uint8)
    expected[50:90, 100:160] = 1
    assert np.array_equal(labels.ids, expected)
    assert labels.things[0].pixels == 60 * 40


@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:3857"])
@pytest.mark.parametrize("gap", [0, 3])
def test_a_label_that_crosses_the_edge_of_a_scene_at_180_degrees_keeps_its_shape(
    tmp_path, crs, gap
):
    """Its part beyond would otherwise span the earth, and so the scene."""
    place = across(crs, 256 + gap)
    path = raster(tmp_path / "a.tif", np.zeros((1, 256, 256), np.uint8), crs=crs, transform=place)
    points = OUTLINE + (140, 0)  # columns 240 to 300
    x, y = place @ points.T.astype(float)
    lon, lat = transform(crs, "EPSG:4326", x, y)
    ring = np.stack([wrapped(lon), lat], 1)
    geometry = {"type": "Polygon", "coordinates": [ring.tolist()]}
    content = {"features": [{"type": "Feature", "geometry": geometry}]}
    (tmp_path / "l.geojson").write_text(json.dumps(content))
    drawn = read_labels(tmp_path / "l.geojson", None)
    whole = Block(
        path, drawn.path, None, "a", "a", (0, 0, 0, 0), Look(), {"aircraft": (1, "aircraft")}
    )
    ids = cut_into_blocks(whole, drawn, 64)[0].labels().ids
    expected = np.zeros((256, 256), np.uint8)
    expected[50:90, 240:] = 1
    assert np.array_equal(ids, expected)


UTM = Affine.translation(*(v[0] for v in transform("EPSG:4326", "EPSG:32660", [180], [-16.7])))
PLACES = {
    "EPSG:4326": across("EPSG:4326", 60),
    "within a pixel": across("EPSG:4326", 60.3),
    "EPSG:3857": across("EPSG:3857", 60.7),
    "west": Affine.translation(-360, 0) @ across("EPSG:4326", 60.5),
    "EPSG:32660": UTM @ Affine.scale(0.5, -0.5) @ Affine.translation(-60, -40),
    "rotated": UTM @ Affine.rotation(20) @ Affine.scale(0.5, -0.5) @ Affine.translation(-60, -40),
}


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("seed", range(3))
def test_our_own_map_across_the_antimeridian_falls_on_the_same_pixels(tmp_path, name, seed):
    crs = name if name.startswith("EPSG") else "EPSG:32660" if name == "rotated" else "EPSG:4326"
    shape = (80, 120)
    path = raster(
        tmp_path / "a.tif", np.zeros((1, *shape), np.uint8), crs=crs, transform=PLACES[name]
    )
    rng = np.random.default_rng(seed)
    mask = np.kron(rng.random((20, 30)) < 0.5, np.ones((4, 4))).astype(np.uint8)
    mask[30:34] = 1  # one of them crosses for sure
    count, ids = cv2.connectedComponents(mask, connectivity=8)
    regions = []
    for i in range(1, count):
        rows, columns = np.nonzero(ids == i)
        box = np.s_[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        regions.append(Region(1, 0.9, int(columns.min()), int(rows.min()), ids[box] == i))

    def written(regions):
        with (
            open_scene(path) as opened,
            feature_file(tmp_path / "p.geojson", opened, ["", "aircraft"]) as file,
        ):
            for region in regions:
                file.add(region)
        return json.loads((tmp_path / "p.geojson").read_text())["features"]

    alone = [feature for region in regions for feature in written([region])]
    together = written(regions)
    assert together == alone
    signs = set()
    for feature in together:
        geometry = feature["geometry"]
        parts = geometry["coordinates"]
        for polygon in parts if geometry["type"] == "MultiPolygon" else [parts]:
            for ring in polygon:
                lon = np.array(ring)[:, 0]
                assert np.abs(lon).max() <= 180
                assert np.ptp(lon) < 1
                signs.add(bool(lon[0] > 0))
    assert signs == {True, False}
    drawn = read_labels(tmp_path / "p.geojson", None)
    whole = Block(
        path, drawn.path, None, "a", "a", (0, 0, 0, 0), Look(), {"aircraft": (1, "aircraft")}
    )
    (block,) = cut_into_blocks(whole, drawn, 64)
    assert len(block.shapes) == len(regions)
    wrong = (block.labels().ids > 0) != (mask > 0)
    if name == "rotated":  # there the line cuts corners of pixels
        assert wrong.sum() < 10
        x, y = PLACES[name] @ (np.argwhere(wrong)[:, ::-1].T + 0.5)
        lon, _ = transform(crs, "EPSG:4326", x, y)
        assert all(180 - abs(value) < 1e-5 for value in lon)
    else:
        assert not wrong.any()


def test_pixels_without_data_are_neither_ground_nor_aircraft(tmp_path):
    """Also under a polygon; a tile that shows nothing else is left out."""
    values = np.full((3, 128, 256), 90, np.uint8)
    values[:, :, 96:] = 0
    path = raster(tmp_path / "a.tif", values, nodata=0, crs="EPSG:32631", transform=PLACE)
    features = [("plane", "Polygon", [[ring(60, 40, 50)]])]
    labels = labels_of(tmp_path / "a.geojson", "EPSG:32631", features)
    words = [path, labels, "-o", tmp_path / "out", "-n", 1, "-s", 64, "--negatives", 100]
    assert geojson.main(list(map(str, words))) == 0
    _, tiles = read_tiles(tmp_path / "out/train")
    assert {(entry["x"], entry["y"]) for entry, *_ in tiles} == {
        (x, y) for x in (0, 64) for y in (0, 64)
    }
    for entry, annotations, rgb, mask in tiles:
        y, x = np.mgrid[:64, :64] + [[[entry["y"]]], [[entry["x"]]]]
        on_the_plane = (abs(x - 84.5) < 25) & (abs(y - 64.5) < 25)
        assert (mask[x >= 96] == 255).all()
        assert not mask[(x < 96) & ~on_the_plane].any()
        assert (rgb[x >= 96] == NEUTRAL).all()
        area = sum(a["area"] for a in annotations if not a["iscrowd"])
        assert area == (mask == 1).sum()


def test_splits_that_are_read_in_different_ways_are_told(tmp_path, capsys):
    for name in ("a.tif", "b.tif"):
        values = RNG.integers(0, 255, (3, 128, 128), np.uint8)
        path = raster(tmp_path / name, values, crs="EPSG:32631", transform=PLACE)
        features = [("plane", "Polygon", [[ring(60, 40, 50)]])]
        labels = labels_of(tmp_path / "l.geojson", "EPSG:32631", features)
        more = ["--as", "val"] if name == "b.tif" else ["--bands", 3, 2, 1]
        words = [path, labels, "-o", tmp_path / "data", "-n", 1, "-s", 64, *more]
        assert geojson.main(list(map(str, words))) == 0
    said = capsys.readouterr().out
    assert "were read with {'bands': [3, 2, 1]}, these with no option" in said


@pytest.mark.parametrize("as_onnx", [False, True])
def test_a_scene_is_predicted_as_the_training_tiles_were_read(tmp_path, capsys, as_onnx):
    """Bands, limits and ground resolution travel from the tiles through the checkpoint."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 4000, (5, 40, 40)).repeat(6, 1).repeat(6, 2).astype(np.uint16)
    path = raster(tmp_path / "a.tif", values, crs="EPSG:32631", transform=PLACE)
    features = [("plane", "Polygon", [[ring(60, 40, 50)]])]
    labels = labels_of(tmp_path / "a.geojson", "EPSG:32631", features)
    look = ["--bands", "5", "2", "1", "--range", "500", "3000", "--gsd", "0.75"]
    words = [path, labels, "-o", tmp_path / "data", "-n", 1, "-s", 64, *look]
    assert geojson.main(list(map(str, words))) == 0
    index = json.loads((tmp_path / "data/train/instances_tiled.json").read_text())
    assert index["info"]["look"] == {
        "bands": [5, 2, 1],
        "range": [500, 3000],
        "gsd": 0.75,
        "trained_gsd": pytest.approx(0.75, rel=1e-3),
    }
    assert index["images"][0]["look"]["gsd"] == pytest.approx(0.75, rel=1e-3)
    train.main(training(tmp_path / "data", tmp_path / "run", "--max-steps", 1))
    model = tmp_path / "run/checkpoint.pth"
    if as_onnx:
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
        export.main([str(model), str(tmp_path / "model.onnx"), "--window", "64"])
        model = tmp_path / "model.onnx"

    def overlay(*more):
        words = [model, path, tmp_path / "out", "--window", 64, "--overlap", 0, *more]
        inference.main(list(map(str, words)))
        return np.asarray(Image.open(tmp_path / "out/a_overlay.jpg"))

    expected = overlay(*look)
    assert expected.shape[0] == 160  # 240 pixels of 0.5 m
    assert np.array_equal(overlay(), expected)
    assert overlay("--gsd", 0).shape[0] == 240
    assert not np.array_equal(overlay("--stretch", 2, 98), expected)
    assert not np.array_equal(overlay("--bands", 1, 2, 3), expected)
    # A picture has no ground resolution, and neither these bands.
    path = tmp_path / "b.png"
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(path)
    with pytest.raises(UserError, match="no band 5; it has 3, see --bands"):
        overlay()
    inference.main([str(model), str(path), str(tmp_path / "out"), "--window", "64", "--bands", "1"])
