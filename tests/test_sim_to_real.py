"""The command that measures what rendered scenes are worth on real images, in small."""

import csv
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers.commands import NETWORKS, run_forked, run_script

from benchmarks import quickstart, sim_to_real
from benchmarks.lib.readme import part, read_rows


def test_the_readmes_show_the_committed_scores():
    rows = read_rows(sim_to_real.FILE)
    assert part(sim_to_real.PAGE, "sim-to-real") == sim_to_real.table(rows)
    assert part(sim_to_real.FRONT, "real-images") == sim_to_real.front(rows)


def test_seeds_are_averaged_and_lengths_kept_apart():
    same = {"model": "unet", "row": "tuned", "cpu": "X", "torch": "2", "commit": "c"}
    same |= {"command": "python x.py"}
    same |= dict.fromkeys([*sim_to_real.COLUMNS, "cpu_minutes"], "0.5")
    runs = [("10", "0.3"), ("10", "0.5"), ("20", "0.9")]
    table = sim_to_real.table([same | {"steps": steps, "nwpu": nwpu} for steps, nwpu in runs])
    assert "0.400 ± 0.100" in table
    short, long = (row.split("|") for row in table.splitlines()[4:])
    assert (short[-3].strip(), long[-3].strip()) == ("10", "20")
    seen = 3 + list(sim_to_real.COLUMNS).index("nwpu58")
    assert short[seen].strip() == "" != short[seen + 1].strip()  # 46 of the 58 were trained on


def test_the_front_page_shows_the_length_with_the_most_seeds():
    same = {"model": "unet", "row": "frozen", "cpu": "X", "cpu_minutes": "7"}
    same |= dict.fromkeys(sim_to_real.COLUMNS, "0.5")
    runs = [("10", "0.3", "a"), ("20", "0.5", "b"), ("20", "0.7", "b"), ("30", "0.9", "c")]
    keys = ("steps", "nwpu58", "commit")
    table = sim_to_real.front([same | dict(zip(keys, run, strict=True)) for run in runs])
    (row,) = [line for line in table.splitlines() if line.startswith("| UNet")]
    assert "| 0.600 ± 0.100 |" in row
    assert table.endswith("*Measured on X, commits b.*")


def write_predictions(path, boxes, side=1000):
    regions = [{"bbox": [x, y, u - x, v - y], "area": 1} for x, y, u, v in boxes]
    images = [{"image": "a.jpg", "width": side, "height": side, "regions": regions}]
    path.write_text(json.dumps({"classes": ["ground", "aircraft"], "images": images}))
    return path


def write_labels(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["image", "x0", "y0", "x1", "y1", "class"], *rows])
    return path


def test_boxes_are_matched_one_to_one(tmp_path):
    labels = write_labels(
        tmp_path / "boxes.csv",
        [
            ["a.jpg", 0, 0, 100, 100, "Airplane"],
            ["a.jpg", 200, 0, 300, 100, "Airplane"],
            ["a.jpg", 400, 0, 500, 100, "Airplane"],
            ["a.jpg", 600, 0, 700, 100, "Truncated_airplane"],
            ["b.jpg", 0, 0, 100, 100, "Airplane"],
        ],
    )
    boxes = [
        (0, 0, 100, 100),
        (0, 0, 100, 90),  # the same aircraft again
        (200, 0, 300, 51),  # IoU 0.51
        (400, 0, 500, 49),  # IoU 0.49
        (600, 0, 700, 100),  # truncated: neither needed nor false
        (800, 800, 900, 900),
    ]
    result = sim_to_real.found_boxes(write_predictions(tmp_path / "p.json", boxes), labels)
    # b.jpg has no prediction at all, and its aircraft is missed.
    assert result["airbus"] == 2 / 4
    assert result["false_per_aircraft"] == 3 / 4
    assert result["false_per_km2"] == pytest.approx(3 / (1000 * sim_to_real.GSD / 1000) ** 2)
    nothing = sim_to_real.found_boxes(write_predictions(tmp_path / "p.json", []), labels)
    assert list(nothing.values()) == [0, 0, 0]


@pytest.fixture(scope="module")
def real(tiled, tmp_path_factory):
    """A folder of real images as the command wants it, made of rendered scenes."""
    root = tmp_path_factory.mktemp("sets") / "real"
    scenes = sorted((tiled / "train/images").glob("*.png"))[:4]
    nwpu, airbus, empty = root / "nwpu_airplane", root / "airbus_scenes", root / "negatives"
    for folder in (nwpu / "images", airbus / "images", empty):
        folder.mkdir(parents=True)
    images, annotations = [], []
    for i, scene in enumerate(scenes, start=1):
        shutil.copy(scene, nwpu / f"images/{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": 384, "height": 256})
        square = [100, 60, 160, 60, 160, 120, 100, 120]
        annotations.append({"id": i, "image_id": i, "category_id": 1, "segmentation": [square],
                            "bbox": [100, 60, 60, 60], "area": 3600, "iscrowd": 0})  # fmt: skip
    coco = {"images": images, "annotations": annotations}
    coco["categories"] = [{"id": 1, "name": "airplane"}]
    (nwpu / "instances.json").write_text(json.dumps(coco))
    (nwpu / "split.json").write_text(
        json.dumps({"train": ["1.png", "2.png"], "val": ["3.png", "4.png"]})
    )
    shutil.copy(scenes[0], airbus / "images/a.png")
    write_labels(airbus / "boxes.csv", [["a.png", 10, 10, 60, 60, "Airplane"]])
    rng = np.random.default_rng(0)
    cv2.imwrite(str(empty / "a.png"), rng.integers(60, 120, (400, 600, 3), np.uint8))
    for name in ("images", "masks", "xmls"):
        (root / "rareplanes_example" / name).mkdir(parents=True)
        (path,) = (tiled / "test" / name).glob(f"{min((tiled / 'test/xmls').iterdir()).stem}*")
        shutil.copy(path, root / "rareplanes_example" / name)
    return root


def test_every_row_is_trained_scored_and_shown(real, tmp_path, monkeypatch):
    """Rows that are in the results file are not trained again."""
    small = {"sample.py": ["-n", "24", "--seed", "8", "--size", "384", "256"],
             "preprocess.py": ["-s", "128"], "coco.py": ["-s", "128"],
             "hard_negatives.py": ["-s", "128"],
             "train.py": ["--crop-size", "64"], "inference.py": ["--window", "64"]}  # fmt: skip
    calls = []

    def run_small(words):
        script = Path(words[1])
        calls.append(f"{script.parent.name}/{script.name}")
        more = small[script.name]
        if script.name == "train.py":
            more = [] if "--test-only" in words else [*NETWORKS[script.parent.name], *more]
        if script.name == "inference.py" and "found" in words[4] and script.parent.name == "mask":
            more = [*more, "--score-threshold", "0"]
        # The time of a fork is not counted as this process's, so the first row is a child.
        start = run_script if "runs/sim_to_real/unet_rendered_3_0" in words else run_forked
        result = start(script, *words[2:], *more, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        return 0

    monkeypatch.setattr(quickstart.subprocess, "call", run_small)
    monkeypatch.setattr(sim_to_real, "has_native_bf16", lambda device: False)
    monkeypatch.setattr(sim_to_real, "NETWORK", {"unet": "", "mask": ""})
    monkeypatch.chdir(tmp_path)
    words = [str(real), "--weights-backbone", "none", "--steps", "3", "--results", "results.csv"]
    sim_to_real.main([*words, "--models", "unet"])
    rows = read_rows(tmp_path / "results.csv")
    assert [row["row"] for row in rows] == list(sim_to_real.ROWS)
    scores = [float(row[name]) for row in rows for name in ("rendered", "scene", "nwpu", "nwpu58")]
    assert all(0 <= score <= 1 for score in scores)
    assert float(rows[0]["cpu_minutes"]) > 0
    before = len(calls)
    sim_to_real.main([*words, "--models", "unet", "mask", "--rows", "rendered"])
    assert set(calls[before:]) == {"mask/train.py", "mask/inference.py"}
    table = sim_to_real.table(read_rows(tmp_path / "results.csv"))
    rows = [line for line in table.splitlines() if line.startswith(("| UNet", "| Mask"))]
    assert len(rows) == len(sim_to_real.ROWS) + 1
