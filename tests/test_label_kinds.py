"""Boxes, diamonds and masks as labels: what is scored, and what is never mixed."""

import json
import shutil

import numpy as np
import pytest
from helpers.commands import training
from helpers.real import HEIGHT, PIXEL, PLACES, WIDTH, Place
from helpers.scenes import read_tiles
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from common.cli import UserError
from common.data import Tiles, training_splits
from mask import inference as mask_inference
from mask import train as mask_train
from preprocessing import preprocess, real
from unet import inference as unet_inference
from unet import train as unet_train

pytestmark = pytest.mark.usefixtures("thin")


@pytest.fixture(scope="module")
def data(tiled, tmp_path_factory):
    """Tiles of 128 pixels of real scenes, `box` and `diamond`, and of rendered ones."""
    root = tmp_path_factory.mktemp("kinds")
    for place in (*PLACES[:5], PLACES[6]):
        place.write(root / "real")
    for kind in ("box", "diamond"):
        words = [root / "real", "-o", root / kind, "-s", 128, "-n", 1, "--labels", kind]
        assert real.main(list(map(str, words))) == 0
    for kind in ("mask", "diamond", "box"):
        words = [tiled, "-o", root / f"rendered_{kind}", "-s", 128, "-n", 1]
        assert preprocess.main([*map(str, words), "--labels", kind]) == 0
    return root


def score(train, run, data, *more):
    words = ["--data-path", data, "--test-only", "--resume", run / "model_best.pth"]
    train.main([*map(str, words), "--device", "cpu", "-j", "0", *more])
    return json.loads((run / "test_scores.json").read_text())


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Mask R-CNNs trained for some steps on labels of each kind."""
    root = tmp_path_factory.mktemp("runs")
    for kind, tiles in (("box", "box"), ("diamond", "diamond"), ("mask", "rendered_mask")):
        words = training(data / tiles, root / kind, "--max-steps", 6, model="mask")
        mask_train.main([*words, "--eval-tiles", "4"])
    return root


# What is scored


@pytest.mark.parametrize("kind", ["box", "diamond", "mask"])
def test_scores_are_named_after_the_labels(runs, data, kind):
    """Of box labels only boxes are scored, also by class and airport and to choose the best."""
    run = runs / kind
    facts = json.loads((run / "run.json").read_text())
    assert facts["select"] == f"{kind}_AP"
    assert facts["settings"]["labels"] == kind
    line = [json.loads(text) for text in (run / "log.jsonl").read_text().splitlines()][-1]
    named = {name.split("_")[0] for name in line if "_AP" in name or "_AR" in name}
    assert named == {"box", kind}
    assert "loss" not in line
    tiles = data / ("rendered_mask" if kind == "mask" else kind)
    scores = score(mask_train, run, tiles)
    assert {name.split("_")[0] for name in scores} == {"box", kind}
    page = (run / "report.html").read_text()
    assert f"{kind} AP" in page
    if kind != "mask":
        assert "mask AP" not in page


@pytest.mark.parametrize("kind", ["box", "diamond"])
def test_scores_of_boxes_and_diamonds_are_pycocotools(runs, data, kind, capsys):
    scores = score(mask_train, runs / kind, data / kind)
    truth = COCO(data / kind / "test/instances_tiled.json")
    found = truth.loadRes(str(runs / kind / "test_predictions.json"))
    for name, iou in (("box", "bbox"), ("diamond", "segm")):
        if f"{name}_AP" in scores:
            evaluation = COCOeval(truth, found, iou)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            assert scores[f"{name}_AP"] == pytest.approx(evaluation.stats[0], abs=1e-12)
            assert scores[f"{name}_AR100"] == pytest.approx(evaluation.stats[8], abs=1e-12)


def test_from_simulation_to_real_boxes_are_scored_and_masks_are_not(runs, data):
    scores = score(mask_train, runs / "mask", data / "box")
    assert {name.split("_")[0] for name in scores} == {"box"}
    tiles = json.loads((runs / "mask/test_tiles.json").read_text())
    assert not tiles["worst"] + tiles["best"]  # of pixels, too
    with pytest.raises(
        UserError, match=r"labels: mask and diamond\); tile .* --labels \(box: boxes"
    ):
        score(mask_train, runs / "mask", data / "diamond")
    with pytest.raises(UserError, match="labels: diamond and mask"):
        score(mask_train, runs / "diamond", data / "rendered_mask")


def test_semantic_scores_say_it_and_are_of_the_same_labels(data, tmp_path):
    words = training(data / "diamond", tmp_path / "run", "--max-steps", 2)
    unet_train.main(words)
    scores = score(unet_train, tmp_path / "run", data / "diamond")
    assert {name.partition(".airport")[0] for name in scores if name.startswith("IoU.")} == {
        "IoU.ground",
        "IoU.aircraft (diamond)",
    }
    for other in ("box", "rendered_mask"):
        with pytest.raises(UserError, match="labels: diamond and"):
            score(unet_train, tmp_path / "run", data / other)


# What is never mixed


def test_kinds_are_not_trained_on_together(data, tmp_path):
    with pytest.raises(UserError, match="labels: box and mask"):
        training_splits(data / "box", [str(data / "rendered_mask")])
    for kind in ("box", "diamond"):
        train, val = training_splits(data / kind, [str(data / f"rendered_{kind}")])
        assert train.labels == val.labels == kind
        assert len(train) > len(Tiles(data / kind / "train"))
    shutil.copytree(data / "box", tmp_path / "mixed")
    shutil.rmtree(tmp_path / "mixed/val")
    shutil.copytree(data / "diamond/val", tmp_path / "mixed/val")
    with pytest.raises(UserError, match="labels: box and diamond"):
        training_splits(tmp_path / "mixed")


def test_tiles_without_aircraft_go_with_any_labels(data, tmp_path):
    """As those of `hard_negatives.py`."""
    shutil.copytree(data / "rendered_mask", tmp_path / "negatives")
    for path in (tmp_path / "negatives").glob("*/instances_tiled.json"):
        content = json.loads(path.read_text())
        shown = {a["image_id"] for a in content["annotations"]}
        content["images"] = [i for i in content["images"] if i["id"] not in shown]
        path.write_text(json.dumps(content | {"annotations": []}))
    train, _ = training_splits(data / "box", [str(tmp_path / "negatives")])
    assert train.labels == "box"
    assert Tiles(tmp_path / "negatives/train", data / "diamond/train").labels == "diamond"


def test_a_run_that_is_continued_on_other_labels_says_so(data, tmp_path, capsys):
    shutil.copytree(data / "box", tmp_path / "tiles")
    words = [tmp_path / "tiles", tmp_path / "run", "--eval-tiles", 1]
    mask_train.main(training(*words, "--max-steps", 1, model="mask"))
    shutil.rmtree(tmp_path / "tiles")
    shutil.copytree(data / "diamond", tmp_path / "tiles")
    capsys.readouterr()
    mask_train.main(training(*words, "--max-steps", 2, "--resume", "auto", model="mask"))
    assert "labels was 'box' and is 'diamond'" in capsys.readouterr().out


# Rendered scenes with the labels of the real half


def test_diamonds_of_rendered_scenes(data):
    """They are painted between the four points, which tiles of masks have, too."""
    masks, _ = read_tiles(data / "rendered_mask/train")
    diamonds, tiles = read_tiles(data / "rendered_diamond/train")
    boxes, _ = read_tiles(data / "rendered_box/train")
    assert [c["info"]["labels"] for c in (masks, diamonds, boxes)] == ["mask", "diamond", "box"]
    assert boxes["annotations"] == diamonds["annotations"]
    points = {tuple(a["keypoints"]) for a in masks["annotations"]}
    alone = 0
    for _, annotations, _, mask in tiles:
        for a in annotations:
            if a["iscrowd"]:
                continue
            assert a["num_keypoints"] == 4
            corners = np.reshape(a["keypoints"], (4, 3))[:, :2]
            x, y = corners.T
            area = abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2
            assert (mask == a["instance"]).sum() <= area + 0.1 * area + 20
            if set(a["keypoints"][2::3]) == {2} and tuple(a["keypoints"]) in points:
                alone += a["area"] == pytest.approx(area, rel=0.1)
    assert alone > 3


# The way from scenes to a map


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A scene of ground that no training saw, and its file."""
    place = Place("train", "33_1040010000000000", lat=65.2, lon=24.0)
    return place, place.write(tmp_path_factory.mktemp("scene"))


def test_a_real_scene_becomes_a_map_where_it_lies(data, scene, tmp_path):
    """It is squared as the tiles were, and aircraft come back to their longitude and latitude."""
    words = training(data / "diamond", tmp_path / "run", "--max-steps", 60, "--eval-steps", 20)
    unet_train.main(words)
    place, path = scene
    unet_inference.main([str(tmp_path / "run/model_best.pth"), str(path), str(tmp_path / "maps")])
    features = json.loads((tmp_path / f"maps/{place.stem}.geojson").read_text())["features"]
    rings = []
    for geometry in (feature["geometry"] for feature in features):
        parts = geometry["coordinates"]
        rings += [p[0] for p in parts] if geometry["type"] == "MultiPolygon" else [parts[0]]
    boxes = np.array([[np.min(ring, 0), np.max(ring, 0)] for ring in rings])
    boxes = (boxes - [place.lon, place.lat]) * place.metres_per_degree()
    for plane in place.planes[:5]:
        centre = np.array([plane.east, plane.north])
        around = boxes[(boxes[:, 0] < centre).all(1) & (boxes[:, 1] > centre).all(1)]
        assert len(around) == 1
        assert abs(around[0].mean(0) - centre).max() < 0.2 * plane.length


def test_the_map_of_a_mask_rcnn_is_written(runs, scene, tmp_path):
    place, path = scene
    words = [runs / "box/model_best.pth", path, tmp_path / "maps", "--score-threshold", 0]
    mask_inference.main([*map(str, words), "--window", "256"])
    image = json.loads((tmp_path / "maps/predictions.json").read_text())["images"][0]
    size = np.array([WIDTH, HEIGHT]) * PIXEL * place.metres_per_degree() / 0.3
    assert abs(size - [image["width"], image["height"]]).max() < 1
