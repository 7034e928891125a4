"""COCO's numbers for Mask R-CNN: against pycocotools, and for any number of processes."""

import contextlib
import copy
import io
import json
import runpy
import sys
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

from common.cli import UserError
from common.data import Tiles
from common.distributed import Process, process_group
from mask.coco import DEFINITION, NAMES, evaluate, gather, main, results, score, write
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
        place = f"airport {i % 3}"
        image = {
            "id": i,
            "file_name": f"{i}.png",
            "width": SIZE,
            "height": SIZE,
            "scene": f"{i}",
            "airport": place,
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
        mine = {name: numbers[f"{prefix}_{name}"] for name in NAMES}
        files = tmp_path / "truth.json", tmp_path / "found.json"
        assert reference(*files, kind) == mine
        assert reference(*files, kind, guard=2**-52) == pytest.approx(mine, rel=0, abs=2**-52)
    assert 0.05 < numbers["mask_AP"] < 0.95
    classes = [numbers[f"mask_AP.{name}"] for name in ("ant", "bee", "cat")]
    assert numbers["mask_AP"] == pytest.approx(np.mean(classes))
    assert "mask_AP.never" not in numbers


@pytest.mark.parametrize("kept", ["bbox", "segmentation"])
def test_results_of_boxes_or_masks_alone(tmp_path, kept):
    coco, found = noisy()
    other = {"bbox": "segmentation", "segmentation": "bbox"}[kept]
    found = [{k: v for k, v in result.items() if k != other} for result in found]
    (tmp_path / "truth.json").write_text(json.dumps(coco))
    (tmp_path / "found.json").write_text(json.dumps(found))
    numbers = evaluate(found, coco)
    for prefix, kind in (("box", "bbox"), ("mask", "segm"))[: 1 + (kept == "segmentation")]:
        expected = reference(tmp_path / "truth.json", tmp_path / "found.json", kind)
        assert {name: numbers[f"{prefix}_{name}"] for name in NAMES} == expected
    assert any(name.startswith("mask") for name in numbers) == (kept == "segmentation")


def test_an_airport_scores_as_its_tiles_alone():
    coco, found = noisy()
    numbers = evaluate(found, copy.deepcopy(coco))
    for place in {image["airport"] for image in coco["images"]}:
        images = [image for image in coco["images"] if image["airport"] == place]
        ids = {image["id"] for image in images}
        part = {"annotations": [a for a in coco["annotations"] if a["image_id"] in ids]}
        alone = evaluate(
            [result for result in found if result["image_id"] in ids],
            copy.deepcopy({**coco, **part, "images": images}),
        )
        assert numbers[f"mask_AP.airport.{place}"] == alone["mask_AP"]
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
    places = {image["airport"] for image in data.images}
    assert {n for n in perfect if ".airport." in n} <= {f"mask_AP.airport.{p}" for p in places}
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
        tiles += [0] if process.rank else []  # rank 0 has it, too
        found = gather(results([found_in(tile) for tile in tiles], tiles, data), process)
        assert process.is_main or found == []
        if process.is_main:
            write(found, path)


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


@settings(max_examples=50, deadline=None)
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


def test_the_command_prints_the_numbers(tmp_path, monkeypatch, capfd):
    coco, found = noisy()
    (tmp_path / "truth.json").write_text(json.dumps(coco))
    write(found, tmp_path / "found.json")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["coco.py", "found.json", "truth.json"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "mask/coco.py"), run_name="__main__")
    assert not end.value.code
    lines = [f"{name} {value:.4f}" for name, value in evaluate(found, coco).items()]
    assert capfd.readouterr() == ("\n".join([DEFINITION, *lines, ""]), "")
    assert "\n" not in DEFINITION


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda r: r.update(image_id=99),
            "detection 2 has the image id 99, which is not in the set",
        ),
        (lambda r: r.update(category_id=1), "category id 1, which is not in the set"),
        (lambda r: r.update(image_id=[]), "detection 2 has the image id '[]', which is not"),
        (lambda r: r.pop("score"), "missing or invalid"),
        (lambda r: r.update(score=float("nan")), "not finite"),
        (lambda r: r.update(bbox=[1, 2]), "missing or invalid"),
        (lambda r: r.pop("bbox"), "where detection 1 has none"),
        (lambda r: (r.pop("bbox"), r.pop("segmentation")), "neither bbox nor segmentation"),
        (lambda r: r["segmentation"].update(size=[512, 512]), "of its tile's size"),
        (lambda r: r.update(segmentation=[[1, 2, 3, 4, 5, 6]]), "missing or invalid"),
    ],
)
def test_results_that_are_not_of_the_set_are_refused(tmp_path, change, sentence):
    coco, found = noisy()
    change(found[1])
    (tmp_path / "truth.json").write_text(json.dumps(coco))
    (tmp_path / "found.json").write_text(json.dumps(found))
    with pytest.raises(UserError) as caught:
        main([str(tmp_path / "found.json"), str(tmp_path / "truth.json")])
    assert sentence in str(caught.value)


def test_files_that_are_something_else_are_refused(tmp_path):
    coco, found = noisy()
    for name, text in {
        "truth": json.dumps(coco),
        "found": json.dumps(found),
        "half": json.dumps(found)[:-9],
        "one": json.dumps(found[0]),
        "names": '["a"]',
    }.items():
        (tmp_path / name).write_text(text)
    for words, sentence in [
        (("none", "truth"), "there is no file"),
        (("half", "truth"), "is not JSON"),
        (("one", "truth"), "holds no list of COCO results"),
        (("names", "truth"), "detection 1 has a missing or invalid"),
        (("found", "one"), "is not a COCO file"),
        (("found", "."), "is not a regular file"),
    ]:
        with pytest.raises(UserError, match=sentence):
            main([str(tmp_path / word) for word in words])


kinds_of_ids = st.sampled_from(["shared", "zero", "same", "texts", "huge", "none"])


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 99), kinds_of_ids, kinds_of_ids)
def test_ids_do_not_change_a_number(seed, of_annotations, of_the_rest):
    """COCO's own code takes annotation 0 for no match, and loses annotations that share an id."""
    coco, found = noisy(seed, images=4)
    expected = evaluate(found, copy.deepcopy(coco))
    new = {
        "shared": lambda n: n % 3,
        "zero": lambda n: n - 1,
        "same": lambda n: 7,
        "texts": lambda n: f"id {n:04}",
        "huge": lambda n: n + (1 << 70),
        "none": lambda n: n,
    }
    for annotation in coco["annotations"]:
        annotation["id"] = new[of_annotations](annotation["id"])
    if of_the_rest not in ("shared", "same"):
        for entry in (*coco["images"], *coco["categories"]):
            entry["id"] = new[of_the_rest](entry["id"])
        for entry in (*coco["annotations"], *found):
            entry |= {k: new[of_the_rest](entry[k]) for k in ("image_id", "category_id")}
    assert evaluate(found, coco) == expected


def score_files(folder, truth, found, capsys):
    """The numbers that the command prints, and its other lines."""
    (folder / "truth.json").write_text(json.dumps(truth))
    (folder / "found.json").write_text(json.dumps(found))
    main([str(folder / "found.json"), str(folder / "truth.json")])
    lines = capsys.readouterr().out.splitlines()
    start = lines.index(DEFINITION)
    return dict(line.rsplit(" ", 1) for line in lines[start + 1 :]), lines[:start]


def test_a_truth_of_boxes_alone_scores_boxes(tmp_path, capsys):
    coco, found = noisy()
    everything, _ = score_files(tmp_path, coco, found, capsys)
    for annotation in coco["annotations"]:
        annotation["segmentation"] = []
    numbers, said = score_files(tmp_path, coco, found, capsys)
    assert numbers == {k: v for k, v in everything.items() if k.startswith("box")}
    assert "only boxes are scored" in said[0]
    expected = reference(tmp_path / "truth.json", tmp_path / "found.json", "bbox")
    assert numbers["box_AP"] == f"{expected['AP']:.4f}"


def test_a_truth_as_other_programs_write_it(tmp_path, capsys):
    """Without what can be computed; two categories of one name; ids as texts."""
    coco, found = noisy()
    for entry in (*coco["annotations"], *found):
        entry["category_id"] = 2 if entry["category_id"] == 5 else entry["category_id"]
    coco["categories"] = [c for c in coco["categories"] if c["id"] != 5]
    expected, _ = score_files(tmp_path, coco, found, capsys)
    for annotation in coco["annotations"]:
        del annotation["bbox"], annotation["area"], annotation["id"]
        if not annotation["iscrowd"]:
            del annotation["iscrowd"]
    coco["categories"].append({"id": 5, "name": "ant"})
    for number, entry in enumerate((*coco["annotations"], *found)):
        if entry["category_id"] == 2 and number % 2:
            entry["category_id"] = 5
        entry["image_id"] = str(entry["image_id"])
    numbers, said = score_files(tmp_path, coco, found, capsys)
    assert numbers == expected
    assert "two categories of the same name" in said[0]


def test_detections_where_nothing_is_are_said_to_be_wrong(tmp_path, capsys):
    coco, found = noisy()
    numbers, said = score_files(tmp_path, {**coco, "annotations": []}, found, capsys)
    assert numbers == {}
    assert f"all {len(found)} detections are wrong" in said[0]
