"""Masks from four points: chips of aircraft, what a network finds there, masks pasted back."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers.commands import SHARED, training
from helpers.real import PLACES
from helpers.scenes import read_tiles
from pycocotools import mask as rle

from benchmarks import points
from common.cli import UserError
from preprocessing import chips, coco, preprocess, real
from unet import label
from unet import train as unet_train

pytestmark = pytest.mark.usefixtures("thin")


def command(module, *words):
    return module.main(list(map(str, words)))


def with_truth(folder):
    """What a network that makes no mistake would write: the masks of the chips themselves."""
    for split in folder.iterdir():
        (split / chips.FOUND).mkdir()
        for path in (split / "masks_tiled").iterdir():
            mask = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
            name = path.name.replace("_mask.png", ".png")
            cv2.imwrite(str(split / chips.FOUND / name), (mask == 1).astype(np.uint8) * 255)


@pytest.fixture(scope="module")
def cut(tiled, tmp_path_factory):
    """Chips of `tiled`, and its masks as they come back from them."""
    root = tmp_path_factory.mktemp("chips")
    assert command(chips, tiled, "-o", root / "chips", "-s", 256, "-n", 1) == 0
    with_truth(root / "chips")
    words = [tiled, "-o", root / "masks", "--found", root / "chips", "-n", 1]
    assert command(chips, *words) == 0
    return root


def by_points(folder, pasted=False):
    """Annotation and mask of each aircraft, by the name of its first tile and its points."""
    _, tiles = read_tiles(folder)
    return {
        (entry["scene"] if pasted else Path(entry["file_name"]).stem, *a["keypoints"]): (a, mask)
        for entry, annotations, _, mask in tiles
        for a in annotations
        if not a["iscrowd"]
    }


# Geometry


@pytest.mark.parametrize("degrees", [0, 37, 90, 200, 315])
@pytest.mark.parametrize("mirrored", [False, True])
def test_the_nose_is_up_and_the_left_wing_left(degrees, mirrored):
    """Length or span, whichever is larger, takes 1 / MARGIN of the chip; turned, not mirrored."""
    angle = np.radians(degrees)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    upright = np.array([[0, -30], [-20, 5], [0, 30], [14, 8]]) * (1, -1 if mirrored else 1)
    placed = upright @ turn.T + (71.3, 55.9)
    to_chip = cv2.invertAffineTransform(chips.frame(placed, 130))
    nose, left, tail, right = placed @ to_chip[:, :2].T + to_chip[:, 2]
    extent = 130 / chips.MARGIN / 2
    assert nose == pytest.approx([65, 65 - extent])
    assert tail == pytest.approx([65, 65 + extent])
    assert (left[0] < 65) != mirrored
    assert (right[0] > 65) != mirrored
    assert abs(left[0] - 65) == pytest.approx(20 / 30 * extent)


@pytest.mark.parametrize("points_at_one_place", [[[9, 9]] * 4, [[9, 9], [3, 9], [9, 9], [15, 9]]])
def test_points_without_a_length_have_a_frame(points_at_one_place):
    matrix = chips.frame(np.array(points_at_one_place, float), 64)
    assert np.isfinite(matrix).all()
    assert abs(np.linalg.det(matrix[:, :2])) > 0


@pytest.mark.parametrize("scale", [0.3, 0.5, 1, 1.7, 3])
def test_a_warped_shape_keeps_place_and_area(scale):
    """A disc is drawn by its formula at both scales; the edge differs by part of a pixel."""

    def disc(size, x, y, radius):
        finer = (np.arange(size * 8) + 0.5) / 8
        inside = (finer - x) ** 2 + (finer[:, None] - y) ** 2 < radius**2
        return inside.reshape(size, 8, size, 8).mean((1, 3)).astype(np.float32)

    source = disc(200, 101.3, 96.4, 40)
    size = round(200 / scale)
    matrix = np.array([[scale, 0, 0], [0, scale, 0]])
    expected = disc(size, 101.3 / scale, 96.4 / scale, 40 / scale)
    warped = chips.warped(source, matrix, (size, size))
    assert warped.sum() == pytest.approx(expected.sum(), rel=0.005)
    assert np.abs(warped - expected).sum() < 0.4 * max(1, 1 / scale) * 2 * np.pi * 40 / scale


def test_the_expected_iou_is_that_of_the_probabilities():
    """Of many masks drawn by the probabilities, the ratio of mean intersection and mean union."""
    rng = np.random.default_rng(0)
    found = rng.integers(0, 256, (20, 20)).astype(np.uint8)
    drawn = rng.random((4000, 20, 20)) < found / 255
    mask = found >= chips.HALF
    expected = (drawn & mask).sum() / (drawn | mask).sum()
    assert chips.expected_iou(found) == pytest.approx(expected, rel=0.005)
    assert chips.expected_iou(np.zeros((9, 9), np.uint8)) == 0


# The way there and back


def test_each_aircraft_has_a_chip(tiled, cut):
    for split in ("train", "val", "test"):
        coco_of_tiles, _ = read_tiles(tiled / split)
        of_chips, tiles = read_tiles(cut / "chips" / split)
        aircraft = [a for a in coco_of_tiles["annotations"] if not a["iscrowd"]]
        assert len(tiles) == len(aircraft) > 0
        airports = {e["file_name"]: e["airport"] for e in coco_of_tiles["images"]}
        for entry, *_ in tiles:
            tile = entry["scene"].rpartition("_aircraft_")[0] + ".png"
            assert entry["airport"] == airports[tile]
        assert of_chips["info"]["labels"] == "mask"


def test_a_chip_shows_the_aircraft_in_the_middle_and_no_other(cut):
    _, tiles = read_tiles(cut / "chips/train")
    unknown = 0
    for _, annotations, image, mask in tiles:
        assert image.shape == (256, 256, 3)
        assert set(np.unique(mask)) <= {0, 1, 255}
        assert len(annotations) == 1
        unknown += (mask == 255).any()
    assert 0 < unknown < len(tiles)


def test_true_masks_come_back(tiled, cut):
    """Through a chip of twice the resolution an outline moves by less than half a pixel."""
    for split in ("train", "val", "test"):
        before, after = by_points(tiled / split), by_points(cut / "masks" / split, True)
        assert set(after) <= set(before)
        assert len(after) > 0.95 * len(before)
        for key, (a, mask) in after.items():
            old, old_mask = before[key]
            assert a["quality"] == 1
            one, other = mask == a["instance"], old_mask == old["instance"]
            rim = other & (cv2.erode(other.astype(np.uint8), np.ones((3, 3))) == 0)
            assert (one ^ other).sum() <= 0.35 * rim.sum() + 4
            assert (a["category_id"], a["make"]) == (old["category_id"], old["make"])
        assert (cut / "masks" / split).exists()


def test_pasted_tiles_have_the_same_pixels_and_the_same_regions_to_ignore(tiled, cut):
    _, tiles = read_tiles(tiled / "train")
    after = {e["scene"]: (a, i, m) for e, a, i, m in read_tiles(cut / "masks/train")[1]}
    crowds = 0
    for entry, annotations, image, mask in tiles:
        new, new_image, new_mask = after[Path(entry["file_name"]).stem]
        assert np.array_equal(image, new_image)
        crowds += (n := sum(a["iscrowd"] for a in annotations))
        assert sum(a["iscrowd"] for a in new) >= n
        assert ((mask == 255) <= (new_mask > 0)).all()
    assert crowds


def test_copies_are_jittered_and_the_same_in_each_run(tiled, tmp_path):
    words = ["--copies", 3, "--jitter", 2, "-s", 64, "-n", 1]
    for name in ("a", "b"):
        command(chips, tiled, "-o", tmp_path / name, *words)
    images = sorted((tmp_path / "a/test/images_tiled").iterdir())
    plain = [path for path in images if "_copy_" not in path.name]
    assert len(images) == 3 * len(plain)
    for path in images:
        same = tmp_path / "b/test/images_tiled" / path.name
        assert path.read_bytes() == same.read_bytes()
    assert len({path.read_bytes() for path in images}) == len(images)


def test_an_aircraft_with_an_uncertain_mask_is_ignored(tiled, cut, tmp_path):
    """Where it was, nothing counts: neither as ground nor as aircraft."""
    shutil.copytree(cut / "chips", tmp_path / "chips")
    for path in (tmp_path / "chips/test" / chips.FOUND).iterdir():
        found = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        cv2.imwrite(str(path), found // 255 * 140)
    words = ["-o", tmp_path / "masks", "--found", tmp_path / "chips", "-n", 1]
    command(chips, tiled, *words)
    before = {Path(e["file_name"]).stem: m for e, _, _, m in read_tiles(tiled / "test")[1]}
    for entry, annotations, _, mask in read_tiles(tmp_path / "masks/test")[1]:
        assert all(a["iscrowd"] and "quality" not in a for a in annotations)
        assert (mask[before[entry["scene"]] > 0] == 255).all()
    command(chips, tiled, *words, "--least-iou", 0.5)
    known = by_points(cut / "masks/test", True)
    assert len(by_points(tmp_path / "masks/test", True)) > 0.9 * len(known) > 0


def test_of_two_that_overlap_the_surer_one_is_on_top(tiled, cut, tmp_path):
    """Every mask grows over its neighbours; one of a tile is sure."""
    shutil.copytree(cut / "chips", tmp_path / "chips")
    crowded = [
        a for _, a, _, _ in read_tiles(tiled / "train")[1] if sum(not x["iscrowd"] for x in a) > 1
    ]
    assert crowded
    for path in (tmp_path / "chips/train" / chips.FOUND).iterdir():
        value = 255 if path.name.endswith("_aircraft_1_tile_0.png") else 200
        cv2.imwrite(str(path), np.full((256, 256), value, np.uint8))
    words = ["-o", tmp_path / "masks", "--found", tmp_path / "chips", "-n", 1]
    command(chips, tiled, *words)
    for _, annotations, _, mask in read_tiles(tmp_path / "masks/train")[1]:
        sure = [a for a in annotations if a.get("quality") == 1]
        for a in sure:
            around = rle.decode(a["segmentation"])
            assert (mask[around > 0] == a["instance"]).all()


@pytest.mark.parametrize(
    ("options", "number"),
    [(("--copies", 100), 100), (("--jitter", 100), 1), (("-s", 16), 1), (("-s", 2048), 1)],
)
def test_chips_of_the_lowest_and_highest_numbers(tiled, tmp_path, options, number):
    """With points far off a chip may show little of its aircraft; then it is ground to ignore."""
    (tmp_path / "tiles").mkdir()
    index = json.loads((tiled / "test/instances_tiled.json").read_text())
    kept = next(a for a in index["annotations"] if not a["iscrowd"])["image_id"]
    index["images"] = [e for e in index["images"] if e["id"] == kept]
    index["annotations"] = [a for a in index["annotations"] if a["image_id"] == kept]
    shutil.copytree(tiled / "test", tmp_path / "tiles/test")
    (tmp_path / "tiles/test/instances_tiled.json").write_text(json.dumps(index))
    command(chips, tmp_path / "tiles", "-o", tmp_path / "chips", "-n", 1, *options)
    aircraft = sum(not a["iscrowd"] for a in index["annotations"])
    _, cut = read_tiles(tmp_path / "chips/test")
    assert len(cut) == number * aircraft
    with_truth(tmp_path / "chips")
    words = ["-o", tmp_path / "masks", "--found", tmp_path / "chips", "-n", 1]
    if options[0] == "-s":
        for least in (0, 1):
            command(chips, tmp_path / "tiles", *words, "--least-iou", least)
            assert read_tiles(tmp_path / "masks/test")[1]


def test_chips_that_are_cut_again_have_nothing_found(tiled, cut, tmp_path):
    """What was found in the chips before may be of other aircraft."""
    shutil.copytree(cut / "chips", tmp_path / "chips")
    command(chips, tiled, "-o", tmp_path / "chips", "-s", 64, "-n", 1)
    assert not list((tmp_path / "chips").rglob(chips.FOUND))
    with pytest.raises(UserError, match=r"no found_tiled/"):
        command(chips, tiled, "-o", tmp_path / "masks", "--found", tmp_path / "chips")


@pytest.mark.parametrize("words", [["--jitter", 2], ["-s", 64]])
def test_chips_of_other_points_or_other_tiles_are_refused(tiled, tmp_path, words):
    """The files may have the same names after the tiles were made again with another -s."""
    shutil.copytree(tiled / "test", tmp_path / "tiles/test")
    command(chips, tmp_path / "tiles", "-o", tmp_path / "chips", "-n", 1, *words)
    with_truth(tmp_path / "chips")
    paste = [tmp_path / "tiles", "-o", tmp_path / "masks", "--found", tmp_path / "chips", "-n", 1]
    if words[0] == "-s":
        assert command(chips, *paste) == 0
        index = tmp_path / "tiles/test/instances_tiled.json"
        content = json.loads(index.read_text())
        aircraft = next(a for a in content["annotations"] if not a["iscrowd"])
        aircraft["keypoints"][0] += 40
        index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"do not show .*; cut them again with .*label\.py"):
        command(chips, *paste)


# With a network


@pytest.fixture(scope="module")
def real_tiles(tmp_path_factory):
    """Diamonds of the real half's structure, in tiles of 128 pixels."""
    root = tmp_path_factory.mktemp("real")
    for place in (*PLACES[:5], PLACES[6]):
        place.write(root / "real")
    words = [root / "real", "-o", root / "tiles", "-s", 128, "-n", 1, "--labels", "diamond"]
    assert command(real, *words) == 0
    return root / "tiles"


@pytest.fixture(scope="module")
def model(cut, tmp_path_factory):
    run = tmp_path_factory.mktemp("model")
    words = ["--max-steps", 40, "--crop-size", 256, "--eval-tiles", 4, "--print-freq", 20]
    unet_train.main(training(cut / "chips", run, *words))
    return run / "checkpoint.pth"


def test_the_real_half_gets_masks(real_tiles, model, tmp_path, capsys):
    """From diamonds to masks on which every model trains, with points, places and look."""
    command(chips, real_tiles, "-o", tmp_path / "chips", "-s", 256, "-n", 1)
    command(label, model, tmp_path / "chips", "--device", "cpu")
    words = ["-o", tmp_path / "masks", "--found", tmp_path / "chips", "-n", 1]
    command(chips, real_tiles, *words, "--least-iou", 0)
    for split in ("train", "val", "test"):
        assert "look" not in read_tiles(tmp_path / "chips" / split)[0]["info"]
        index, _ = read_tiles(tmp_path / "masks" / split)
        assert index["info"]["labels"] == "mask"
        before = json.loads((real_tiles / split / "instances_tiled.json").read_text())
        assert index["info"]["look"] == before["info"]["look"]
        found = by_points(tmp_path / "masks" / split, True)
        assert set(found) <= set(by_points(real_tiles / split))
        assert all(0 < a["quality"] <= 1 for a, _ in found.values())
    capsys.readouterr()
    unet_train.main(training(tmp_path / "masks", tmp_path / "run", "--max-steps", 2))
    assert "IoU.aircraft" in capsys.readouterr().out
    words = ["--data-path", tmp_path / "masks", "--device", "cpu", "-j", 0, "--test-only"]
    command(unet_train, *words, "--resume", tmp_path / "run/model_best.pth")
    scores = json.loads((tmp_path / "run/test_scores.json").read_text())
    expected = np.mean([a["quality"] for a, _ in found.values()])
    assert scores["quality_of_masks"] == pytest.approx(expected)


def test_what_is_not_known_is_not_found(cut, model, tmp_path):
    shutil.copytree(cut / "chips", tmp_path / "chips", ignore=shutil.ignore_patterns(chips.FOUND))
    command(label, model, tmp_path / "chips", "--device", "cpu", "-b", 3)
    somewhere = False
    for split in ("train", "val", "test"):
        for entry, _, _, mask in read_tiles(tmp_path / "chips" / split)[1]:
            path = tmp_path / "chips" / split / chips.FOUND / entry["file_name"]
            found = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
            assert found.shape == mask.shape
            assert not found[mask == 255].any()
            somewhere |= bool(found.any())
    assert somewhere


# Mistakes


def test_tiles_without_points(tmp_path):
    image = np.full((64, 64, 3), 90, np.uint8)
    (tmp_path / "images").mkdir()
    cv2.imwrite(str(tmp_path / "images/a.png"), image)
    outline = [10, 10, 40, 10, 40, 40, 10, 40]
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [outline]}
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 64, "height": 64}],
        "annotations": [annotation | {"bbox": [10, 10, 30, 30], "area": 900, "iscrowd": 0}],
        "categories": [{"id": 1, "name": "aircraft"}],
    }
    (tmp_path / "labels.json").write_text(json.dumps(content))
    words = [tmp_path / "images", tmp_path / "labels.json", "-o", tmp_path / "tiles", "-s", 64]
    command(coco, *words, "--as", "train", "-n", 1)
    with pytest.raises(UserError, match=r"no aircraft in .* has four points"):
        command(chips, tmp_path / "tiles", "-o", tmp_path / "chips")


def test_chips_that_do_not_fit(tiled, cut, tmp_path, capsys):
    with pytest.raises(UserError, match="there is no train/"):
        command(chips, tmp_path, "-o", tmp_path / "chips")
    for wrong in (tiled, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"no found_tiled/.*chips.py .*unet/label.py"):
            command(chips, tiled, "-o", tmp_path / "masks", "--found", wrong)
    shutil.copytree(cut / "chips", tmp_path / "others")
    for path in (tmp_path / "others/train" / chips.FOUND).iterdir():
        path.unlink()
    words = [tiled, "-o", tmp_path / "masks", "--found", tmp_path / "others", "-n", 1]
    assert command(chips, *words) == 1
    assert "_aircraft_1_tile_0.png' is missing" in capsys.readouterr().err
    assert not (tmp_path / "masks/train/instances_tiled.json").exists()
    with pytest.raises(UserError, match="there is no train/"):
        command(label, "README.md", tmp_path)


# The benchmark


def test_the_points_of_an_outline(tiled):
    """Beside the points that the renderer wrote, of aircraft that lie in a tile as a whole."""
    distances, turned = [], 0
    for split in ("train", "val", "test"):
        for _, annotations, _, _ in read_tiles(tiled / split)[1]:
            for a in annotations:
                if a["iscrowd"] or a["keypoints"][2::3] != [2] * 4 or a["area"] < 300:
                    continue
                exact = chips.points_of(a)
                found = points.points_of_outline(rle.decode(a["segmentation"]) > 0)
                ends = np.hypot(*(found[:1] - exact[[0, 2]]).T)
                if ends[1] < ends[0]:
                    turned, found = turned + 1, found[[2, 3, 0, 1]]
                distances.append(np.hypot(*(found - exact).T))
    assert len(distances) > 7
    assert turned < len(distances) / 4
    assert (np.median(distances, 0) < 2.5).all()


def test_masks_beside_simpler_ways(tiled, model, tmp_path):
    """The diamond is scored by pycocotools from its own polygon; the network may be poor."""
    words = [model, tiled / "train", "--name", "tiles", "--results", tmp_path / "points.csv"]
    command(points, *words, "--picture", tmp_path / "points.png")
    rows = points.readme.read_rows(tmp_path / "points.csv")
    of_all = {(r["way"], r["jitter"]): r for r in rows if r["size"] == "all"}
    assert {way for way, _ in of_all} == {points.NETWORK, *points.OTHERS}
    assert {jitter for way, jitter in of_all if way == points.NETWORK} == {"0", "1", "2"}
    ious = []
    for _, annotations, *_ in read_tiles(tiled / "train")[1]:
        for a in annotations:
            x, y, w, h = a["bbox"]
            if a["iscrowd"] or a["keypoints"][2::3] != [2] * 4:
                continue
            if not (x > 0 and y > 0 and x + w < 128 and y + h < 128):
                continue
            corners = [chips.points_of(a).ravel().tolist()]
            drawn = rle.merge(rle.frPyObjects(corners, 128, 128))
            ious.append(rle.iou([drawn], [a["segmentation"]], [0])[0, 0])
    diamond = of_all["diamond", "0"]
    assert int(diamond["aircraft"]) == len(ious) > 3
    assert float(diamond["iou"]) == pytest.approx(np.mean(ious), abs=0.03)
    assert cv2.imread(str(tmp_path / "points.png")).shape[0] == 2 * points.SIDE
    assert "tiles" in points.table(rows)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not here")
def test_the_rendered_scene_of_rareplanes_comes_back(tmp_path):
    """Its aircraft are shaped as real ones, and their chips are as large as they are."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/test").symlink_to(SHARED / "rareplanes_example")
    command(preprocess, tmp_path / "data", "-o", tmp_path / "tiles", "-n", 1)
    command(chips, tmp_path / "tiles", "-o", tmp_path / "chips", "-s", 256, "-n", 1)
    with_truth(tmp_path / "chips")
    words = ["-o", tmp_path / "masks", "--found", tmp_path / "chips", "-n", 1]
    command(chips, tmp_path / "tiles", *words)
    before, after = by_points(tmp_path / "tiles/test"), by_points(tmp_path / "masks/test", True)
    assert len(after) > 10
    for key, (a, mask) in after.items():
        old, old_mask = before[key]
        one, other = mask == a["instance"], old_mask == old["instance"]
        assert (one & other).sum() > 0.93 * (one | other).sum()
