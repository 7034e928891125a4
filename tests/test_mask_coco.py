"""COCO's numbers for Mask R-CNN: against pycocotools, and for any number of processes."""

import contextlib
import copy
import io
import json
import os
import re
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import ROOT
from helpers.instances import as_dicts
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torture import children

from common.args import Speedups
from common.data import Tiles
from common.distributed import Process, process_group
from common.distributed import gather as gather_tensors
from common.loader import scoring_loader
from common.run.heartbeat import watched
from mask import evaluate as evaluation
from mask.coco import LABELS, NAMES, evaluate, gather, results, score, write
from mask.targets import instance_targets

ALONE = Process(0, 1, torch.device("cpu"))
SIZE = 256


def truth_as_predictions(data, shift=0):
    """Predictions for all tiles of a perfect model, or of one that is `shift` pixels off."""
    predictions = []
    for target in as_dicts(instance_targets(data.__getitems__(list(range(len(data)))))):
        masks = target["masks"].bool().roll((shift, shift), (1, 2))
        scores = torch.linspace(0.9, 0.5, len(masks))
        boxes = target["boxes"] + shift
        predictions.append(target | {"boxes": boxes, "masks": masks, "scores": scores})
    return predictions


def all_results(data, predictions):
    return results(predictions, list(range(len(data))), data)


def blob(rng, side):
    """An ellipse about `side` pixels across: bool [SIZE,SIZE]."""
    y, x = np.ogrid[:SIZE, :SIZE]
    cy, cx = rng.uniform(0, SIZE, 2)
    ry, rx = side / 2 * rng.uniform(0.7, 1.4, 2)
    return ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 <= 1


def runs_of(mask):
    runs = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": runs["size"], "counts": runs["counts"].decode()}


def noisy(seed=0, images=12):
    """A set with crowds, three classes and all sizes, and noisy results for it, some tied."""
    rng = np.random.default_rng(seed)
    names = [(2, "ant"), (5, "bee"), (9, "cat"), (11, "never")]
    coco = {"categories": [{"id": i, "name": name} for i, name in names]}
    coco |= {"images": [], "annotations": []}
    found = []
    for i in range(1, images + 1):
        airport = f"airport {i % 3}"
        image = {
            "id": i,
            "file_name": f"{i}.png",
            "width": SIZE,
            "height": SIZE,
            "scene": f"{i}",
            "airport": airport,
        }
        coco["images"].append(image)
        for _ in range(rng.integers(0, 7)):
            mask = blob(rng, rng.choice([14, 40, 150]))
            segmentation, category = runs_of(mask), int(rng.choice([2, 5, 9]))
            box = rle.toBbox(segmentation).tolist()
            if not mask.any():
                continue
            annotation = {"id": len(coco["annotations"]) + 1, "image_id": i, "bbox": box}
            annotation |= {"area": int(mask.sum()), "iscrowd": int(rng.random() < 0.2)}
            annotation |= {"category_id": category, "segmentation": segmentation}
            coco["annotations"].append(annotation)
            for _ in range(rng.integers(0, 4)):
                moved = np.roll(mask, rng.integers(-4, 5, 2), (0, 1))
                if rng.random() < 0.1:
                    moved = blob(rng, 30)
                jitter = rng.normal(0, 3, 4)
                result = {"image_id": i, "category_id": category}
                result["bbox"] = np.maximum(np.float32(box + jitter), 1).tolist()
                result["score"] = float(np.float32(rng.choice([rng.random(), 0.5])))
                found.append(result | {"segmentation": runs_of(moved)})
    return coco, found


def reference(truth, predictions, kind, guard=1e-300):
    """pycocotools' twelve numbers from two files.

    It divides by TP + FP + 2**-52 to avoid a division by 0, and so finds a precision of 1 - 2**-52
    for a single true detection. A smaller guard does not change the counts.
    """
    with contextlib.redirect_stdout(io.StringIO()), pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "spacing", lambda _one: guard)
        truth = COCO(str(truth))
        evaluation = COCOeval(truth, truth.loadRes(str(predictions)), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(NAMES, evaluation.stats.tolist(), strict=True))


def test_some_of_the_tiles_are_scored_like_a_set_of_their_own(tiled):
    data = Tiles(tiled / "train").spread(9)
    numbers = score(all_results(data, truth_as_predictions(data)), data)
    assert numbers["mask_AP"] == pytest.approx(1)
    assert numbers["box_AR100"] == pytest.approx(1)


@pytest.mark.parametrize("seed", range(3))
def test_the_numbers_are_those_of_pycocotools(tmp_path, seed, capfd):
    coco, found = noisy(seed)
    (tmp_path / "truth.json").write_text(json.dumps(coco))
    found = gather(found, ALONE)
    before = copy.deepcopy(found)
    write(found, tmp_path / "found.json")
    numbers = evaluate(found, coco)
    assert found == before
    assert capfd.readouterr() == ("", "")
    for prefix, kind in (("box", "bbox"), ("mask", "segm")):
        ours = {name: numbers[f"{prefix}_{name}"] for name in NAMES}
        files = tmp_path / "truth.json", tmp_path / "found.json"
        assert reference(*files, kind) == ours
        assert reference(*files, kind, guard=2**-52) == pytest.approx(ours, rel=0, abs=2**-52)
    assert 0.05 < numbers["mask_AP"] < 0.95
    classes = [numbers[f"mask_AP.{name}"] for name in ("ant", "bee", "cat")]
    assert numbers["mask_AP"] == pytest.approx(np.mean(classes))
    assert "mask_AP.never" not in numbers


def test_the_files_have_our_numbers_by_pycocotools_and_the_lines_of_the_readme(
    tiled, tmp_path, capsys
):
    data = Tiles(tiled / "test")
    found = all_results(data, truth_as_predictions(data, shift=2))
    numbers = score(found, data)
    assert 0 < numbers["mask_AP"] < 1
    write(found, tmp_path / "test_predictions.json")
    files = data.folder / "instances_tiled.json", tmp_path / "test_predictions.json"
    readme = (ROOT / "mask/README.md").read_text()
    lines = readme.split("```python\n")[1].split("```")[0]
    for path in files:
        lines = re.sub(rf'"[^"]*{path.name}"', repr(str(path)), lines)
    for prefix, kind in (("box", "bbox"), ("mask", "segm")):
        ours = {name: numbers.get(f"{prefix}_{name}", -1) for name in NAMES}
        assert reference(*files, kind) == ours
        values: dict = {}
        exec(lines.replace('"segm"', repr(kind)), values)
        assert dict(zip(NAMES, values["evaluation"].stats.tolist(), strict=True)) == ours
        assert f"maxDets=100 ] = {ours['AP']:.3f}\n" in capsys.readouterr().out


def test_the_scores_of_a_size_have_labels():
    sized: set[str] = set()
    for kind in ("mask", "diamond"):
        coco, found = noisy()
        numbers = evaluate(found, coco | {"info": {"labels": kind}})
        sized |= {name for name in numbers if re.fullmatch(r"(box|mask|diamond)_A[PR][sml]", name)}
    assert set(LABELS) == sized
    assert LABELS["mask_APs"] == "mask_AP.size.small"
    assert LABELS["box_ARl"] == "box_AR.size.large"
    assert len(set(LABELS.values())) == len(LABELS)


def test_an_airport_scores_as_its_tiles_alone():
    coco, found = noisy()
    numbers = evaluate(found, copy.deepcopy(coco))
    for airport in {image["airport"] for image in coco["images"]}:
        images = [image for image in coco["images"] if image["airport"] == airport]
        ids = {image["id"] for image in images}
        part = {"annotations": [a for a in coco["annotations"] if a["image_id"] in ids]}
        alone = evaluate(
            [result for result in found if result["image_id"] in ids],
            copy.deepcopy({**coco, **part, "images": images}),
        )
        assert numbers[f"mask_AP.airport.{airport}"] == alone["mask_AP"]
        assert not any(".airport." in name for name in alone)
    for image in coco["images"]:
        image["airport"] = image["scene"]  # as in a set without known airports
    assert not any(".airport." in name for name in evaluate(found, coco))


def test_perfect_shifted_and_no_predictions(tiled):
    data = Tiles(tiled / "test")
    perfect = score(all_results(data, truth_as_predictions(data)), data)
    assert {name for name in perfect if name.startswith("box")} >= {"box_AP", "box_AR100"}
    assert perfect["mask_AP"] == perfect["box_AP"] == pytest.approx(1)
    assert "box_APl" not in perfect  # no aircraft of that size in the set
    airports = {image["airport"] for image in data.images}
    assert {n for n in perfect if ".airport." in n} <= {f"mask_AP.airport.{a}" for a in airports}
    assert "mask_AP.aircraft" not in perfect  # the only class
    shifted = score(all_results(data, truth_as_predictions(data, shift=3)), data)
    assert 0 < shifted["mask_AP"] < 0.9
    assert 0 < shifted["box_AP"] < 0.9
    nothing = truth_as_predictions(data)
    nothing = [{name: tensor[:0] for name, tensor in one.items()} for one in nothing]
    assert all_results(data, nothing) == []
    empty = score([], data)
    assert empty.keys() == perfect.keys()
    assert set(empty.values()) == {0.0}


def test_a_set_without_aircraft_has_no_numbers():
    coco, found = noisy()
    for some in ([], found):
        assert evaluate(some, {**copy.deepcopy(coco), "annotations": []}) == {}


def test_results_speak_of_the_files_ids_and_of_whole_pixels(tiled_copy):
    index = tiled_copy / "test/instances_tiled.json"
    coco = json.loads(index.read_text())
    coco["categories"] = [{"id": 40, "name": "jet"}, {"id": 7, "name": "glider"}]
    for number, image in enumerate(coco["images"]):
        image["id"] = 1000 - number
    for annotation in coco["annotations"]:
        annotation["image_id"] = 1001 - annotation["image_id"]
        annotation["category_id"] = (7, 40)[annotation["id"] % 2]
    index.write_text(json.dumps(coco))
    data = Tiles(index.parent)
    found = all_results(data, truth_as_predictions(data))
    kept = [a for a in coco["annotations"] if not a["iscrowd"]]
    keys = ("image_id", "category_id", "bbox", "segmentation")
    shown = [[item[key] for key in keys] for item in kept]
    assert sorted(map(repr, shown)) == sorted(
        repr([r["image_id"], r["category_id"], [int(v) for v in r["bbox"]], r["segmentation"]])
        for r in found
    )
    numbers = score(found, data)
    assert numbers["mask_AP.jet"] == numbers["mask_AP.glider"] == pytest.approx(1)


def found_in(tile):
    random = torch.Generator().manual_seed(tile)
    corners = torch.randint(0, 64, (6, 2, 2), generator=random)
    boxes = torch.stack([corners[:, 0], corners[:, 0] + corners[:, 1] + 1], 1).flatten(1)
    masks = torch.zeros(6, 128, 128, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.tolist(), strict=True):
        mask[y1:y2, x1:x2] = True
    scores = torch.randint(1, 4, (6,), generator=random) / 4
    labels = torch.ones(6, dtype=torch.int64)
    return {"boxes": boxes.float(), "labels": labels, "scores": scores, "masks": masks}


def write_together(folder: Path, path: Path) -> None:
    """Run by each process, for any number of processes."""
    with process_group("cpu") as process:
        data = Tiles(folder)
        tiles = list(range(process.rank, len(data), process.world_size))
        found = gather(results([found_in(tile) for tile in tiles], tiles, data), process)
        assert process.is_main or found == []
        if process.is_main:
            write(found, path)


def score_slowly(folder: Path, output: Path, fails: bool) -> None:
    """Run by each of two processes: rank 0 scores for longer than a collective may wait."""

    def slow(*_):
        time.sleep(6)
        if fails:
            os._exit(7)
        return {"mask_AP": 0.5}

    evaluation.predict = lambda model, images: [found_in(i) for i in range(len(images))]
    evaluation.coco.score = slow
    with process_group("cpu", timeout_seconds=2) as process, watched(process, 2, lambda: 0):
        batches = scoring_loader(Tiles(folder), 2, 0, process)
        scores = evaluation.evaluate(torch.nn.Identity(), batches, process, Speedups(), output)
        assert scores == ({"mask_AP": 0.5} if process.is_main else {})
        gather_tensors(process, torch.zeros(1))  # as when a training saves after that


@pytest.mark.parametrize("fails", [False, True])
def test_the_other_processes_wait_while_rank_0_scores(few, tmp_path, fails):
    """However long it takes, but not when rank 0 has ended."""
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    ranks = children.start_ranks(partial(score_slowly, few / "test", tmp_path, fails), logs)
    codes = [children.end(rank, 60) for rank in ranks]
    if fails:
        assert codes[0] == 7
        assert codes[1] not in (0, None)
    else:
        assert codes == [0, 0], logs[1].read_text()


def test_two_processes_write_the_file_of_one(tiled, tmp_path):
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    ranks = children.start_ranks(
        partial(write_together, tiled / "test", tmp_path / "two.json"), logs
    )
    assert [children.end(rank) for rank in ranks] == [0, 0], logs[0].read_text()
    write_together(tiled / "test", tmp_path / "one.json")
    found = json.loads((tmp_path / "one.json").read_text())
    assert len(found) == 6 * len(Tiles(tiled / "test"))
    assert (tmp_path / "two.json").read_bytes() == (tmp_path / "one.json").read_bytes()
    assert [(r["image_id"], -r["score"]) for r in found] == sorted(
        (r["image_id"], -r["score"]) for r in found
    )


numbers_in_json = st.floats(allow_nan=False, allow_infinity=False)
any_results = st.lists(
    st.fixed_dictionaries(
        {
            "image_id": st.integers(1),
            "category_id": st.integers(1),
            "bbox": st.lists(numbers_in_json, min_size=4, max_size=4),
            "score": st.floats(0, 1),
            "segmentation": st.fixed_dictionaries(
                {
                    "size": st.lists(st.integers(1, 4096), min_size=2, max_size=2),
                    "counts": st.text(st.characters(min_codepoint=48, max_codepoint=111)),
                }
            ),
        }
    ),
    max_size=8,
)


@settings(max_examples=50)
@given(found=any_results, order=st.randoms())
def test_any_results_come_back_from_the_file(tmp_path_factory, found, order):
    path = tmp_path_factory.getbasetemp() / "results.json"
    write(found, path)
    assert json.loads(path.read_text()) == found
    mixed = order.sample(found, len(found))
    one, two = (json.dumps(gather(some, ALONE), sort_keys=True) for some in (mixed, found))
    assert one == two


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "results.json"
    _, found = noisy()
    write(found, path)
    with pytest.raises(ValueError, match="JSON"):
        write([found[0] | {"score": float("nan")}], path)
    assert json.loads(path.read_text()) == found
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
