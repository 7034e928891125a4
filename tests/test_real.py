"""The real half of RarePlanes, whose structure is made by code, and real annotations."""

import json
import re
import threading
from math import cos, radians

import numpy as np
import pytest
import rasterio
from helpers.commands import SHARED
from helpers.real import PLACES, WHOLE, Place, Plane
from helpers.s3 import FakeS3
from helpers.scenes import EXAMPLE, read_tiles

from common.cli import UserError
from preprocessing import real
from preprocessing.real import four_points, order_costs
from rareplanes import attributes, download
from rareplanes.scene import read_xml

EXCERPT = SHARED / "rareplanes_real" / "excerpt.json"
BY_STEM = {place.stem: place for place in PLACES}


def tile(folder, out, *more):
    words = [folder, "-o", out, "-s", 256, "-n", 1, *more]
    return real.main(list(map(str, words)))


@pytest.fixture(scope="module")
def downloaded(tmp_path_factory):
    """The real half, fetched from a bucket."""
    root = tmp_path_factory.mktemp("real")
    for place in PLACES:
        place.write(root / "bucket" / "real")
    server = FakeS3()
    files = [path for path in (root / "bucket").rglob("*.*") if path.is_file()]
    server.objects = {str(path.relative_to(root / "bucket")): path.read_bytes() for path in files}
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        words = ["-o", str(root / "data"), "--real", "--endpoint-url", server.url]
        assert download.main(words) == 0
    server.shutdown()
    server.server_close()
    thread.join()
    assert len(list((root / "data/real").rglob("*.*"))) == len(files) == 2 * len(PLACES)
    return root / "data" / "real"


@pytest.fixture(scope="module")
def tiled(downloaded):
    out = downloaded.parent / "real_tiles"
    assert tile(downloaded, out, "--negatives", 100) == 0
    return out


def scene_tiles(folder):
    """Each tile with its scene's description."""
    return [(BY_STEM[entry["scene"]], entry, *others) for entry, *others in read_tiles(folder)[1]]


def nearest(place, entry, keypoints):
    """The aircraft of a scene whose nose is nearest, and its points in pixels of the tile."""
    points = np.reshape(keypoints, (4, 3))[:, :2] + [entry["x"], entry["y"]]
    truth = [place.square(plane.points) for plane in place.planes]
    number = int(np.argmin([abs(t[0] - points[0]).sum() for t in truth]))
    return number, points, truth[number]


# Places and proportions


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_points_are_where_they_are_on_the_ground(tiled, split):
    """Nose, left wing, tail, right wing, whatever the order of the corners in the file is."""
    seen = set()
    for place, entry, annotations, _, mask in scene_tiles(tiled / split):
        for a in annotations:
            if a["iscrowd"]:
                continue
            number, points, truth = nearest(place, entry, a["keypoints"])
            assert number in WHOLE or place.lat < 60  # there scenes are wider
            assert abs(points - truth).max() < 0.05
            plane = place.planes[number]
            for i, metres in ((0, plane.length), (1, plane.wingspan)):
                assert np.hypot(*(points[i] - points[i + 2])) * 0.3 == pytest.approx(
                    metres, rel=0.01
                )
            seen.add((place.stem, number))
            inside = [0 <= v <= 256 for v in (points - [entry["x"], entry["y"]]).ravel()]
            flags = [2 if x and y else 1 for x, y in np.reshape(inside, (4, 2))]
            assert a["keypoints"][2::3] == flags
            assert a["num_keypoints"] == 4
            if flags == [2] * 4 and (mask == a["instance"]).sum() == a["area"]:
                assert a["area"] == pytest.approx(
                    plane.length * plane.wingspan / 2 / 0.09, rel=0.02
                )
                low, high = points.min(0), points.max(0)
                box = np.array(a["bbox"]) + [entry["x"], entry["y"], 0, 0]
                assert abs(np.array([*box[:2], *(box[:2] + box[2:])]) - [*low, *high]).max() < 2
    assert {stem for stem, _ in seen} == {e["scene"] for _, e, *_ in scene_tiles(tiled / split)}
    assert {number for _, number in seen} >= set(WHOLE)


@pytest.mark.parametrize("split", ["train", "val"])
def test_aircraft_in_the_picture_have_the_right_proportions_and_places(tiled, split):
    """By the moments of the bright rectangles, which the scenes show in degrees."""
    pictures = {}
    for place, entry, _, rgb, _ in scene_tiles(tiled / split):
        x, y = entry["x"], entry["y"]
        picture = pictures.setdefault(place.stem, np.zeros((1500, 1500)))
        picture[y : y + 256, x : x + 256] = (rgb[..., 0].astype(float) - 40) / 190
    for stem, picture in pictures.items():
        place = BY_STEM[stem]
        for plane in (place.planes[number] for number in WHOLE):
            centre = place.square(np.array([plane.east, plane.north]))
            radius = int(max(plane.length, plane.wingspan) / 0.3 * 0.75)
            x0, y0 = (int(v) - radius for v in centre)
            part = picture[y0 : y0 + 2 * radius, x0 : x0 + 2 * radius]
            where = np.mgrid[: len(part), : len(part)][::-1].reshape(2, -1).T + 0.5 + [x0, y0]
            weight = part.ravel() / part.sum()
            middle = weight @ where
            assert abs(middle - centre).max() < 0.5
            angle = radians(plane.heading)
            ahead = np.array([np.sin(angle), -np.cos(angle)])  # y points down
            for axis, metres in ((ahead, plane.length), (ahead[::-1] * [-1, 1], plane.wingspan)):
                spread = weight @ ((where - middle) @ axis) ** 2
                assert np.sqrt(12 * spread) * 0.3 == pytest.approx(metres, rel=0.01)


def test_without_squaring_an_aircraft_at_65_degrees_is_twice_as_wide(downloaded, tmp_path):
    """So the tests above can fail."""
    assert tile(downloaded, tmp_path, "--gsd", 0) == 0
    for place, _, annotations, *_ in scene_tiles(tmp_path / "train"):
        for a in annotations:
            if not a["iscrowd"] and place.lat == 65:
                points = np.reshape(a["keypoints"], (4, 3))[:, :2]
                east = np.ptp(points[:, 0]) * 0.372 * cos(radians(65))
                down = np.ptp(points[:, 1]) * 0.372
                assert np.hypot(east, down) < 70  # metres


# Splits


def test_no_ground_is_in_two_splits(tiled, capsys):
    """Dates of one location, and locations whose ground overlaps, stay together; test is test."""
    scenes = {
        s: {e["scene"] for e in read_tiles(tiled / s)[0]["images"]}
        for s in ("train", "val", "test")
    }
    assert scenes["test"] == {"20_10400100480E4300"}
    assert scenes["val"] == {"9_10400100474E7400"}  # the location with the fewest scenes
    assert {s.partition("_")[0] for s in scenes["train"]} == {"7", "8", "12"}
    assert len(scenes["train"]) == 4
    airports = {e["airport"] for e in read_tiles(tiled / "train")[0]["images"]}
    assert airports == {"7", "12+8"}


def test_what_is_left_out_is_counted(downloaded, tmp_path, capsys):
    assert tile(downloaded, tmp_path) == 0
    said = capsys.readouterr().out
    assert "6 of 7 scenes and 20 of 36 objects are in the tiles" in said
    assert "1 of ground that test/ shows" in said
    assert "16 cut by a border (regions to ignore)" in said


# Labels


def test_the_file_says_what_the_labels_are(tiled, downloaded, tmp_path):
    coco, _ = read_tiles(tiled / "train")
    assert coco["info"]["labels"] == "box"
    assert coco["categories"][0]["keypoints"] == ["nose", "left_wing", "tail", "right_wing"]
    assert tile(downloaded, tmp_path, "--labels", "diamond", "--negatives", 100) == 0
    other, _ = read_tiles(tmp_path / "train")
    assert other["info"]["labels"] == "diamond"
    assert other["annotations"] == coco["annotations"]


def test_cut_aircraft_are_neither_ground_nor_aircraft(tiled):
    ignored = 0
    for place, entry, annotations, _, mask in scene_tiles(tiled / "train"):
        for number, plane in enumerate(place.planes):
            if number in WHOLE:
                continue
            x, y = (
                place.square(np.array([plane.east, plane.north])) - [entry["x"], entry["y"]]
            ).astype(int)
            if 0 <= x < 256 and 0 <= y < 256:
                assert mask[y, x] == 255
                ignored += 1
        assert all(
            "keypoints" not in a
            for a in annotations
            if a["iscrowd"] and a["instance"] == 255 and not a["make"]
        )
    assert ignored > 4


def test_an_aircraft_at_the_end_of_the_data_is_ignored(tmp_path):
    """The valid part of a scene has a border, too."""
    place = Place("train", "3_1040010000000000", planes=[Plane(-60, 0, 10), Plane(40, 0, 10)])
    other = Place("train", "4_1040010000000000", lat=60.0)
    path = place.write(tmp_path / "real")
    other.write(tmp_path / "real")
    pixels = place.pixels().copy()
    pixels[:, :, 960:] = 0  # 25 metres to the east
    with rasterio.open(path, "r+") as file:
        file.nodata = 0
        file.write(pixels)
    assert tile(tmp_path / "real", tmp_path / "out", "--negatives", 100) == 0
    found = [t for s in ("train", "val") for t in scene_tiles_of(tmp_path / "out" / s, place)]
    kept = [a for _, annotations, *_ in found for a in annotations if not a["iscrowd"]]
    assert kept
    for entry, annotations, *_ in found:
        for a in annotations:
            if not a["iscrowd"]:
                x = a["keypoints"][0] + entry["x"]
                assert abs(x - place.square(place.planes[0].points)[0, 0]) < 1


def scene_tiles_of(folder, place):
    return [t for t in read_tiles(folder)[1] if t[0]["scene"] == place.stem]


def test_attributes_are_read_from_the_properties(downloaded, tmp_path):
    """`canards` in either case, `num_engines` also as a float."""
    expected = {
        "role": ["Small Civil Transport/Utility", "Large Civil Transport/Utility", None],
        "num_engines": ["1", "2", "1"],
        "canards": ["no", "no", "yes"],
        "wing_type": ["straight", "swept", "straight"],
    }
    for attribute, values in expected.items():
        out = tmp_path / attribute
        assert tile(downloaded, out, "--attribute", attribute) == 0
        coco, _ = read_tiles(out / "train")
        names = {c["id"]: c["name"] for c in coco["categories"]}
        assert list(names.values()) == attributes.categories(attribute)
        for place, entry, annotations, *_ in scene_tiles(out / "train"):
            for a in annotations:
                if not a["iscrowd"] and place.lat > 60:
                    number, *_ = nearest(place, entry, a["keypoints"])
                    assert names[a["category_id"]] == (values[number] or values[0])


# The order of the points


@pytest.mark.skipif(not EXCERPT.is_file(), reason="the real annotations are not here")
def test_the_order_of_all_whole_real_annotations_is_verified():
    """Their pixels are degrees: shares along the diagonals are the same."""
    annotations = json.loads(EXCERPT.read_text())["annotations"]
    assert len(annotations) == 21
    partial = [real.is_partial({"truncated": flag}) for *_, flag in annotations]
    assert partial.count(True) == 4
    for (_, _, ring, *_), is_partial in zip(annotations, partial, strict=True):
        if is_partial:
            continue
        corners = np.reshape(ring, (-1, 2))[:4]
        costs = order_costs(corners, {})
        assert costs.argmin() == 0
        for first in range(4):
            for turned in (corners, corners[[0, 3, 2, 1]]):
                points = np.array(four_points(np.roll(turned, first, 0), {}, first))
                # They go round clockwise in the picture.
                assert np.array_equal(points, corners[[0, 3, 2, 1]])


@pytest.mark.parametrize("first", range(4))
@pytest.mark.parametrize("clockwise", [False, True])
@pytest.mark.parametrize("wing_type", ["straight", "swept"])
def test_any_order_of_the_corners_gives_the_same_points(tmp_path, first, clockwise, wing_type):
    """Swept wings end behind the middle, so the order of the straight ones decides for them."""
    swept = Plane(-20, 40, 250, 38, 34, 0.6, {"wing_type": "swept"})
    planes = [swept] + [Plane(-90, 50, 20), Plane(60, -30, 135), Plane(0, -40, 200, wings=0.3)] * (
        wing_type == "straight" or first > 0
    )
    for stem, lat in (("3_1040010000000000", 65.0), ("4_1040010000000000", 60.0)):
        place = Place("train", stem, lat=lat, planes=planes, first=first, clockwise=clockwise)
        place.write(tmp_path / "real")
    assert tile(tmp_path / "real", tmp_path / "out") == 0
    count = 0
    for split in ("train", "val"):
        for entry, annotations, *_ in read_tiles(tmp_path / "out" / split)[1]:
            place = Place("", "", lat=65.0 if entry["scene"][0] == "3" else 60.0, planes=planes)
            for a in annotations:
                if not a["iscrowd"]:
                    _, points, truth = nearest(place, entry, a["keypoints"])
                    assert abs(points - truth).max() < 0.05
                    count += 1
    assert count >= 2 * len(planes)


# Mistakes


def test_mistakes_get_one_sentence(downloaded, tmp_path):
    def refused(folder, *more):
        with pytest.raises(UserError) as error:
            tile(folder, tmp_path / "out", *more)
        assert str(error.value).count(". ") == 0
        return str(error.value)

    (tmp_path / "tiles/train/PS-RGB_tiled").mkdir(parents=True)
    assert "tiles such as PS-RGB_tiled are not read" in refused(tmp_path / "tiles")
    assert "no train/PS-RGB_cog/" in refused(tmp_path)
    assert "no train/PS-RGB_cog/" in refused(tmp_path / "nowhere")
    assert "invalid choice" in refused(downloaded, "--attribute", "make")
    assert "invalid choice" in refused(downloaded, "--labels", "mask")
    assert not (tmp_path / "out").exists()


def in_metres(content):
    for feature in content["features"]:
        for polygon in feature["geometry"]["coordinates"]:
            ring = polygon[0] if isinstance(polygon[0][0], list) else polygon
            ring[:] = [[x * 50_000, y * 110_000] for x, y in ring]
    del content["crs"]


def of_a_tile(content):
    content["features"][0]["properties"]["image_fname"] = "7_104001000896F900_tile_3.png"


def elsewhere(content):
    content["crs"]["properties"]["name"] = "urn:ogc:def:crs:EPSG::32627"


SPOILT = {
    "in metres": (in_metres, "no aircraft of '.*' lies on '7_104001000896F900.tif'; save its"),
    "in another system": (elsewhere, "no aircraft of .* lies on"),
    "of a tile": (of_a_tile, "has labels of the tile '7_104001000896F900_tile_3.png', not of a"),
    "absent": (None, "there is no '7_104001000896F900.geojson' in '.*'; fetch the labels"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_bad_labels_stop_the_run_and_lose_nothing(tmp_path, capsys, name):
    spoil, sentence = SPOILT[name]
    for place in PLACES[:5]:
        place.write(tmp_path / "real")
    assert tile(tmp_path / "real", tmp_path / "out") == 0
    before = (tmp_path / "out/train/instances_tiled.json").read_bytes()
    labels = tmp_path / "real/train/geojson_aircraft/7_104001000896F900.geojson"
    content = json.loads(labels.read_text())
    labels.unlink()
    if spoil:
        spoil(content)
        labels.write_text(json.dumps(content))
    capsys.readouterr()
    assert tile(tmp_path / "real", tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert len([line for line in said.splitlines() if line.startswith("bad scene")]) == 1
    assert re.search(sentence, said)
    assert (tmp_path / "out/train/instances_tiled.json").read_bytes() == before
    assert tile(tmp_path / "real", tmp_path / "out", "--skip-bad") == 0


@pytest.mark.skipif(not EXAMPLE.is_dir(), reason="the scene of RarePlanes is not here")
def test_the_order_of_rendered_aircraft_of_any_wing():
    """Most wings end behind the middle of the axis, so that their outlines do not tell the nose."""
    told = []
    for path in (EXAMPLE / "xmls").glob("*.xml"):
        for aircraft in read_xml(path)[2]:
            facts, diamond = attributes.makes()[aircraft.make], np.array(aircraft.diamond)
            told.append(order_costs(diamond, {}).argmin() == 0)  # as if all wings were straight
            for first in range(4):
                for turned in (diamond, diamond[[0, 3, 2, 1]]):
                    points = four_points(np.roll(turned, first, 0), facts, first)
                    assert np.array_equal(points, diamond)
    assert (sum(told), len(told)) == (1, 15)
