"""What a model wrongly finds in scenes without aircraft becomes tiles to train on."""

import json

import cv2
import numpy as np
import pytest
from helpers.commands import training

import mask.inference
import mask.train
import unet.inference
import unet.train
from common.cli import UserError
from preprocessing import hard_negatives

MODULES = {"unet": (unet.train, unet.inference), "mask": (mask.train, mask.inference)}


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """Two scenes without aircraft, of 300x200 and 90x70 pixels, in grey stripes and noise."""
    folder = tmp_path_factory.mktemp("ground") / "scenes"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, (width, height) in {"wide": (300, 200), "small": (90, 70)}.items():
        stripes = np.arange(width) // 20 % 2 * 120 + rng.integers(40, 90, (height, width))
        cv2.imwrite(str(folder / f"{name}.png"), np.stack([stripes] * 3, -1).astype(np.uint8))
    return folder


def regions_of(path):
    """The boxes of a `predictions.json`, by the name of the image."""
    content = json.loads(path.read_text())
    if "annotations" not in content:
        return {i["image"]: [r["bbox"] for r in i["regions"]] for i in content["images"]}
    names = {image["id"]: image["file_name"] for image in content["images"]}
    boxes = {name: [] for name in names.values()}
    for annotation in content["annotations"]:
        boxes[names[annotation["image_id"]]].append(annotation["bbox"])
    return boxes


def write(path, boxes, size=(300, 200), **more):
    regions = [
        {"class": "aircraft", "bbox": box, "area": box[2] * box[3], "score": 0.9} for box in boxes
    ]
    image = {"image": "wide.png", "width": size[0], "height": size[1], "regions": regions} | more
    path.write_text(json.dumps({"classes": ["ground", "aircraft"], "images": [image]}))
    return path


def test_each_place_is_in_a_tile_that_is_all_ground(ground, tmp_path):
    rng = np.random.default_rng(1)
    corners = rng.integers(0, (280, 180), (40, 2))
    boxes = [[int(x), int(y), *map(int, rng.integers(1, 21, 2))] for x, y in corners]
    predictions = write(tmp_path / "predictions.json", boxes)
    hard_negatives.main([*map(str, (predictions, ground, "-o", tmp_path / "hard", "-s", 64))])
    coco = json.loads((tmp_path / "hard/train/instances_tiled.json").read_text())
    assert coco["annotations"] == []
    assert [c["name"] for c in coco["categories"]] == ["aircraft"]
    scene = cv2.imread(str(ground / "wide.png"))
    corner = {}
    for image in coco["images"]:
        name = image["file_name"]
        tile = cv2.imread(str(tmp_path / "hard/train/images_tiled" / name))
        mask = cv2.imread(str(tmp_path / f"hard/train/masks_tiled/{name[:-4]}_mask.png"), -1)
        assert not mask.any()
        y, x = (int(part) for part in image["scene"].split("_y")[1].split("_x"))
        assert np.array_equal(tile, scene[y : y + 64, x : x + 64])
        corner[name] = x, y
    for x, y, w, h in boxes:
        middle = x + w / 2, y + h / 2
        assert any(
            0 <= middle[0] - left < 64 and 0 <= middle[1] - top < 64
            for left, top in corner.values()
        )
    assert len(corner) < len(boxes)  # one tile shows several places


@pytest.mark.parametrize("model", ["unet", "mask"])
def test_a_training_goes_on_with_them(model, ground, few, tmp_path):
    """From the predictions of a real model, a scene smaller than a tile among them."""
    train, inference = MODULES[model]
    train.main(training(few, tmp_path / "a", "--max-steps", 8, model=model))
    best = tmp_path / "a/model_best.pth"
    more = ["--min-area", "0", "--window", "64"]
    more += ["--score-threshold", "0"] if model == "mask" else []
    inference.main([str(best), str(ground), str(tmp_path / "found"), *more])
    predictions = tmp_path / "found/predictions.json"
    found = {name: boxes for name, boxes in regions_of(predictions).items() if boxes}
    assert found
    words = (predictions, ground, "-o", tmp_path / "hard", "-s", 128, "-n", 1)
    assert hard_negatives.main([*map(str, words)]) == 0
    coco = json.loads((tmp_path / "hard/train/instances_tiled.json").read_text())
    assert {image["airport"] for image in coco["images"]} == {name[:-4] for name in found}
    more = ("--extra-data", tmp_path / "hard", "--init-from", best, "--max-steps", 1)
    train.main(training(few, tmp_path / "b", *more, model=model))
    facts = json.loads((tmp_path / "b/run.json").read_text())
    own = len(json.loads((few / "train/instances_tiled.json").read_text())["images"])
    assert facts["data"]["train"]["tiles"] == own + len(coco["images"])


def test_what_does_not_fit_is_said_before_anything_is_cut(ground, tmp_path, capsys):
    def refused(predictions, match, folder=ground):
        with pytest.raises(UserError, match=match):
            hard_negatives.main([*map(str, (predictions, folder, "-o", tmp_path / "hard"))])

    path = tmp_path / "predictions.json"
    refused(write(path, [[1, 2, 3, 4]], size=(150, 100)), "150x100 pixels .*300x200; .*--gsd")
    refused(write(path, [[1, 2, 3, 4]], image="else.png"), "'else.png', which is not in")
    for damaged in ("[]", "{}", '{"images": [{}], "classes": []}', '{"images": 3, "classes": 3}'):
        path.write_text(damaged)
        refused(path, "is not a predictions.json")
    refused(tmp_path / "nowhere.json", "nowhere.json")
    assert not (tmp_path / "hard").exists()
    words = (write(path, []), ground, "-o", tmp_path / "hard")
    assert hard_negatives.main([*map(str, words)]) == 0
    assert "nothing was found in 1 scenes" in capsys.readouterr().out
    assert not (tmp_path / "hard").exists()
