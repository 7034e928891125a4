"""Polygons drawn on georeferenced scenes become the same tiles as COCO's."""

import json

import numpy as np
import pytest
import rasterio
from helpers.rasters import raster
from helpers.scenes import read_tiles
from PIL import Image
from rasterio import Affine
from rasterio.warp import transform

from common.cli import UserError
from common.io.raster import open_scene
from common.predict.maps import feature_file
from common.predict.regions import Region
from preprocessing import geojson

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


def test_a_map_that_was_predicted_can_be_corrected_and_learnt_from(tmp_path):
    """What inference.py writes is what this command reads."""
    path, _ = scene(tmp_path / "a.tif")
    with (
        open_scene(path) as opened,
        feature_file(tmp_path / "p.geojson", opened, ["", "plane", "ship"]) as f,
    ):
        for label in (1, 2):
            f.add(Region(label, 0.9, 0, 0, truth() == label))
    words = [path, tmp_path / "p.geojson", "-o", tmp_path / "out", "--class-property", "class"]
    words += ["-s", 40, "-n", 1, "--negatives", 100, "--min-visible", 0]
    assert geojson.main(list(map(str, words))) == 0
    assert (tiled_kinds(tmp_path / "out/train")[0] != truth()).mean() < 0.01
    with rasterio.open(path) as file:
        assert file.crs == "EPSG:32631"
