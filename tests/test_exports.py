"""Other people's COCO files: what they have works, or is answered in a sentence."""

import importlib
import json
import re
from functools import partial

import numpy as np
import pytest
from helpers import exports
from helpers.commands import training
from helpers.exports import POLYGON, RUNS, SIDE, annotation, image, picture, write
from helpers.scenes import read_png, read_tiles, tree
from hypothesis import given, settings
from hypothesis import strategies as st

from common.cli import UserError
from preprocessing.coco import main
from preprocessing.coco_file import as_id
from preprocessing.coco_images import Reading, read_dataset
from preprocessing.own_data import number_classes
from preprocessing.tiles import Settings, cut, not_shown


def tile(*words, out, more=("-s", SIDE)):
    return main([*map(str, words), "-o", str(out), "-n", "1", *map(str, more)])


def simple(root, annotations, images=None, categories=({"id": 1, "name": "aircraft"},)):
    """A set of one picture; what a user types for it."""
    picture(root / "images/a.png")
    file = write(root / "a.json", images or [image()], annotations, categories)
    return root / "images", file


def levels(split):
    """The grey level of each aircraft pixel of a split."""
    _, tiles = read_tiles(split)
    ignored = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535}
    return [rgb[(m > 0) & (m < ignored[m.dtype])] for *_, rgb, m in tiles]


@pytest.mark.parametrize("exporter", exports.EXPORTERS, ids=lambda exporter: exporter.__name__)
def test_an_export_is_learnt_from_as_it_is(tmp_path, capsys, exporter):
    assert tile(*exporter(tmp_path), out=tmp_path / "out") == 0
    coco, tiles = read_tiles(tmp_path / "out/train")
    assert [c["name"] for c in coco["categories"]] == ["aircraft"]
    assert len(tiles) == 1
    (pixels,) = levels(tmp_path / "out/train")
    assert len(pixels) == exports.AREA
    assert abs(pixels.astype(int) - 230).max() < 30
    assert "1 of 1 scenes and 1 of 1 objects are in the tiles\n" in capsys.readouterr().out


def test_only_crowds_are_answered_with_the_option_for_them(tmp_path, capsys):
    words = simple(tmp_path, [annotation(n, segmentation=RUNS, iscrowd=1) for n in (1, 2)])
    with pytest.raises(UserError, match=r"2 with iscrowd 1.*--no-crowds"):
        tile(*words, out=tmp_path / "out")
    assert not list(tmp_path.glob("out/train/[!.]*"))
    assert tile(*words, "--negatives", 100, out=tmp_path / "out") == 0
    assert "0 of 2 objects" in (said := capsys.readouterr().out)
    assert "iscrowd 1" in said
    assert tile(*words, "--no-crowds", out=tmp_path / "out") == 0
    assert sum(map(len, levels(tmp_path / "out/train"))) == exports.AREA


@pytest.mark.parametrize("picked", [0.1, 99])
def test_a_split_without_aircraft_needs_negatives(tmp_path, picked):
    words = simple(tmp_path, [])
    with pytest.raises(UserError, match=rf"train' would have no tile.*--negatives {picked}.*100"):
        tile(*words, "--negatives", picked, out=tmp_path / "out")
    assert tile(*words, "--negatives", 100, out=tmp_path / "out", more=("-s", 50)) == 0
    assert len(read_tiles(tmp_path / "out/train")[1]) == 9


def test_all_tiles_are_kept_beside_a_single_one_with_an_aircraft(tmp_path):
    square = [0, 0, 12, 0, 12, 12, 0, 12]
    words = simple(tmp_path, [annotation(segmentation=[square])])
    size = ("-s", 16, "--negatives")
    assert tile(*words, out=tmp_path / "some", more=(*size, 60)) == 0
    assert tile(*words, out=tmp_path / "all", more=(*size, 100)) == 0
    count = [len(read_tiles(tmp_path / name / "train")[1]) for name in ("some", "all")]
    assert count == [61, 64]


BAD = [
    {"segmentation": [], "area": 0, "bbox": [0, 0, 0, 0]},
    {"segmentation": None},
    {"segmentation": [[1, 2, 3, 4]]},
    {"segmentation": [[1, 2, 3, 4, 5]]},
    {"segmentation": {"size": [1, 1], "counts": [1]}},
    {"category_id": 77},
    {"category_id": None},
    {"image_id": 77},
    {"iscrowd": "perhaps"},
    {"segmentation": [[900, 900, 950, 900, 950, 950]]},
]


@pytest.mark.parametrize("bad", BAD, ids=repr)
def test_a_bad_annotation_costs_itself(tmp_path, capsys, bad):
    bad = {"bbox": [90, 90, 20, 20]} | bad
    words = simple(tmp_path, [annotation(2, **bad), annotation(1)])
    assert tile(*words, out=tmp_path / "out") == 0
    assert "1 of 1 scenes and 1 of 2 objects" in capsys.readouterr().out
    ((_, annotations, _, mask),) = read_tiles(tmp_path / "out/train")[1]
    assert sum(not a["iscrowd"] for a in annotations) == 1
    assert (mask == 1).sum() == exports.AREA
    without_outline = "segmentation" in bad and bad["segmentation"] != BAD[-1]["segmentation"]
    box = 400 if without_outline and bad["bbox"][2] else 0
    assert (mask == 255).sum() == box  # no ground: an aircraft may be there


def test_parts_of_two_points_do_not_cost_the_outline(tmp_path):
    words = simple(tmp_path, [annotation(segmentation=[POLYGON, [1, 2, 3, 4], []])])
    assert tile(*words, out=tmp_path / "out") == 0
    assert sum(map(len, levels(tmp_path / "out/train"))) == exports.AREA


KINDS = {
    "good": {},
    "crowd": {"iscrowd": 1},
    "runs": {"segmentation": RUNS},
    "unreadable": {"segmentation": "?", "bbox": [90, 90, 20, 20]},
    "no box": {"segmentation": [], "bbox": None},
    "small": {"segmentation": [[3, 3, 6, 3, 6, 6, 3, 6]]},
    "outside": {"segmentation": [[900, 900, 950, 900, 950, 950]]},
    "huge": {"segmentation": [[0, 0, SIDE, 0, SIDE, SIDE, 0, SIDE]]},
    "no image": {"image_id": 77},
    "no category": {"category_id": "car"},
}


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=8),
    st.sampled_from([16, 50, 128]),
    st.booleans(),
)
def test_every_annotation_is_learnt_from_or_counted(tmp_path_factory, kinds, size, crowds):
    root = tmp_path_factory.getbasetemp() / "counted"
    annotations = [annotation(n, **KINDS[kind]) for n, kind in enumerate(kinds)]
    folder, file = simple(root, [*annotations, annotation(segmentation=[[70, 70, 99, 70, 99, 99]])])
    number = partial(number_classes, path=file)
    images, _, left_out = read_dataset(file, folder, Reading(crowds), number)
    labels = images["a.png"].labels()
    tiles = [entry for entry, _ in cut(labels, Settings(tile_size=size))]
    left_out.update(not_shown(labels.things, tiles))
    learnt = {a["object"] for entry in tiles for a in entry["annotations"] if not a["iscrowd"]}
    assert len(learnt) + left_out.total() == len(annotations) + 1
    assert left_out["of images that are not listed"] == kinds.count("no image")


ids = st.one_of(
    st.integers(), st.integers(2**60, 2**64), st.uuids().map(str), st.text("0123ab", min_size=1)
)


@given(ids)
def test_an_id_is_the_same_in_every_form(value):
    key = as_id(value)
    assert key is not None
    assert as_id(key) == as_id(str(key)) == key
    if isinstance(key, int) and abs(key) < 1 << 53:
        assert as_id(float(key)) == as_id(json.loads(f"{key}.0")) == key


@pytest.mark.parametrize(
    "value", [None, True, False, "", [], {}, 0.5, float("nan"), 1e300, "x" * 999]
)
def test_what_is_no_id_is_refused(tmp_path, value):
    assert as_id(value) is None
    with pytest.raises(UserError, match=r"images has an entry whose 'id'"):
        tile(*simple(tmp_path, [], [image(value)]), out=tmp_path / "out")


@settings(max_examples=40)
@given(st.lists(ids, min_size=3, max_size=3, unique_by=as_id), st.sampled_from([str, int, float]))
def test_ids_of_any_kind_belong_together(tmp_path_factory, numbers, kind):
    """Images 0 to 2 have 1 to 3 outlines, whose ids start from the same number in each image."""
    root = tmp_path_factory.getbasetemp() / "ids"
    images, annotations = [], []
    for k, number in enumerate(numbers):
        picture(root / f"images/{k}.png")
        images.append(image(number, f"{k}.png"))
        exact = isinstance(as_id(number), str) or (kind is float and abs(as_id(number)) >= 1 << 53)
        shown = number if exact else kind(as_id(number))
        annotations += [annotation(n, shown, number) for n in range(k + 1)]
    file = write(
        root / "a.json", images, annotations, [{"id": n, "name": repr(n)} for n in numbers]
    )
    number = partial(number_classes, path=file)
    read, classes, _ = read_dataset(file, root / "images", Reading(), number)
    assert classes.names == [repr(n) for n in numbers]
    for k in range(3):
        things = read[f"{k}.png"].labels().things
        assert [thing.category_id for thing in things] == [k + 1] * (k + 1)


def test_two_images_of_one_id_are_refused(tmp_path):
    words = simple(tmp_path, [], [image(1), image("1", "b.png")])
    with pytest.raises(UserError, match="images has the same id twice"):
        tile(*words, out=tmp_path / "out")


def test_an_image_of_two_ids_has_the_outlines_of_both(tmp_path):
    """As in a merge of what two people have drawn."""
    corner = [[0, 0, 12, 0, 12, 12, 0, 12]]
    words = simple(
        tmp_path, [annotation(1, 1), annotation(2, 2, segmentation=corner)], [image(1), image(2)]
    )
    assert tile(*words, out=tmp_path / "out") == 0
    coco, _ = read_tiles(tmp_path / "out/train")
    assert [entry["scene"] for entry in coco["images"]] == ["a"]
    assert len(coco["annotations"]) == 2


def test_images_that_differ_in_their_suffix_keep_it(tmp_path):
    for name in ("a.png", "a.jpg"):
        picture(tmp_path / "images" / name)
    images = [image(1, "a.png"), image(2, "a.jpg")]
    file = write(tmp_path / "a.json", images, [annotation(1, 1), annotation(2, 2)])
    assert tile(tmp_path / "images", file, out=tmp_path / "out") == 0
    scenes = {entry["scene"] for entry in read_tiles(tmp_path / "out/train")[0]["images"]}
    assert scenes == {"a_png", "a_jpg"}


def test_names_with_windows_separators_or_the_folders_own_name(tmp_path):
    for name in ("part\\a.png", "images/part/a.png", "images\\part\\a.png", ".\\part\\a.png"):
        picture(tmp_path / "images/part/a.png")
        file = write(tmp_path / "a.json", [image(name=name)], [annotation()])
        assert tile(tmp_path / "images", file, out=tmp_path / "out") == 0
        assert {e["scene"] for e in read_tiles(tmp_path / "out/train")[0]["images"]} == {"part_a"}


def test_a_folder_in_the_folder_that_has_its_name(tmp_path):
    picture(tmp_path / "images/images/a.png")
    file = write(tmp_path / "a.json", [image(name="images/a.png")], [annotation()])
    assert tile(tmp_path / "images", file, out=tmp_path / "out") == 0
    assert {e["scene"] for e in read_tiles(tmp_path / "out/train")[0]["images"]} == {"images_a"}


def test_an_output_that_is_a_file_is_a_sentence(tmp_path):
    words = simple(tmp_path, [annotation()])
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match="a file is there"):
        tile(*words, out=tmp_path / "out")


def test_boxes_alone_are_refused_for_training(tmp_path):
    for nothing in ({"segmentation": []}, {"segmentation": None}):
        words = simple(tmp_path, [annotation(**nothing), annotation(2, **nothing)])
        with pytest.raises(UserError, match=r"boxes but no outlines.*mask/README\.md"):
            tile(*words, out=tmp_path / "out")


def categories(*names):
    return [{"id": n, "name": name} for n, name in enumerate(names)]


def test_categories_of_one_name_are_one_class(tmp_path, capsys):
    annotations = [annotation(n, category=n % 2) for n in range(4)]
    words = simple(tmp_path, annotations, categories=categories("aircraft", "aircraft"))
    assert tile(*words, out=tmp_path / "out") == 0
    coco = read_tiles(tmp_path / "out/train")[0]
    assert coco["categories"] == [{"id": 1, "name": "aircraft"}]
    assert "of the same name; they are one class" in capsys.readouterr().out
    assert {a["category_id"] for a in coco["annotations"]} == {1}


def test_renamed_categories(tmp_path):
    annotations = [
        annotation(category=0),
        annotation(2, category=2, segmentation=[[70, 70, 99, 70, 99, 99]]),
    ]
    words = simple(tmp_path, annotations, categories=categories("airplane", "car", "jet=fast"))
    rename = ["--rename", "airplane=aircraft", "--rename", "jet=fast=aircraft"]
    assert tile(*words, *rename, out=tmp_path / "out") == 0
    coco = read_tiles(tmp_path / "out/train")[0]
    assert [c["name"] for c in coco["categories"]] == ["aircraft", "car"]
    assert {a["category_id"] for a in coco["annotations"]} == {1}
    with pytest.raises(UserError, match=r"'plane' is not in .*'airplane', 'car'"):
        tile(*words, "--rename", "plane=aircraft", out=tmp_path / "out")
    for wrong in ("airplane", "=aircraft", "airplane="):
        with pytest.raises(UserError, match="airplane=aircraft"):
            tile(*words, "--rename", wrong, out=tmp_path / "out")


def test_more_classes_than_a_mask_holds_are_answered_with_an_option_of_this_command(tmp_path):
    many = categories(*map(str, range(255)))
    words = simple(tmp_path, [annotation()], categories=many)
    with pytest.raises(UserError, match=r"255 classes.*at most 254.*--rename"):
        tile(*words, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert tile(*words, "--rename", "254=0", out=tmp_path / "out") == 0


def test_a_category_that_is_called_as_the_rest_is_refused(tmp_path):
    """Of two classes of one name, one score would overwrite the other."""
    words = simple(tmp_path, [annotation(category=0)], categories=categories("ground"))
    with pytest.raises(UserError, match=r"--rename ground=NEW"):
        tile(*words, out=tmp_path / "out")
    assert tile(*words, "--rename", "ground=field", out=tmp_path / "out") == 0


def test_long_names_cost_nothing_or_only_themselves(tmp_path, capsys):
    names = [f"{'ä' * 60}/{'b' * 120}{n}.png" for n in (1, 2)]
    for name in names:
        picture(tmp_path / "images" / name)
    images = [image(n, name) for n, name in enumerate([*names, "c" * 300 + ".png"], start=1)]
    file = write(tmp_path / "a.json", images, [annotation(n, n) for n in (1, 2, 3)])
    assert tile(tmp_path / "images", file, "--skip-bad", out=tmp_path / "out") == 0
    assert "File name too long" in capsys.readouterr().err
    assert len({e["scene"] for e in read_tiles(tmp_path / "out/train")[0]["images"]}) == 2


def test_a_file_for_each_split_makes_one_data_set(tmp_path):
    """Both have the same ids, and pictures of the same name that differ."""
    for split, ground in (("train", 10), ("valid", 90)):
        words = exports.roboflow(tmp_path, split, ground)
        name = {"train": "train", "valid": "val"}[split]
        assert tile(*words, "--as", name, out=tmp_path / "out") == 0
    for name, ground in (("train", 10), ("val", 90)):
        coco, tiles = read_tiles(tmp_path / "out" / name)
        assert [c["name"] for c in coco["categories"]] == ["aircraft"]
        assert [int(rgb[0, 0, 0]) for *_, rgb, _ in tiles] == [ground]
    before = tree(tmp_path / "out")
    words = exports.roboflow(tmp_path, "test")
    for more in ([], ["--as", "val"]):
        with pytest.raises(UserError, match=r"would replace; .*--as"):
            tile(*words, *more, out=tmp_path / "out")
    assert tree(tmp_path / "out") == before
    words = exports.roboflow(tmp_path, "valid", 120)
    assert tile(*words, "--as", "val", out=tmp_path / "out") == 0  # the same files again
    assert int(read_png(next((tmp_path / "out/val/images_tiled").iterdir()))[0, 0, 0]) == 120


def test_split_files_of_two_sets_make_one(tmp_path):
    for split in ("train", "val"):
        words = exports.roboflow(tmp_path, split)
        (tmp_path / "s.json").write_text(json.dumps({split: [f"a_png.rf.{0:032x}.jpg"]}))
        assert tile(*words, "--split", tmp_path / "s.json", out=tmp_path / "out") == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["train", "val"]
    with pytest.raises(UserError, match="leave out --as"):
        tile(*words, "--split", tmp_path / "s.json", "--as", "val", out=tmp_path / "out")


def test_the_same_pictures_in_two_splits_are_refused(tmp_path):
    words = simple(tmp_path, [annotation()])
    assert tile(*words, out=tmp_path / "out") == 0
    with pytest.raises(
        UserError, match=r"train' holds tiles of an earlier run from the same images"
    ):
        tile(*words, "--as", "val", out=tmp_path / "out")
    other = write(tmp_path / "b.json", [image()], [annotation()])  # another file about them
    with pytest.raises(UserError, match=r"earlier run from the same images"):
        tile(words[0], other, "--as", "val", out=tmp_path / "out")
    picture(tmp_path / "images/b.png")
    other = write(tmp_path / "b.json", [image(name="b.png")], [annotation()])
    assert tile(words[0], other, "--as", "val", out=tmp_path / "out") == 0


def test_classes_of_the_splits_are_matched_by_name(tmp_path, capsys):
    first, second = tmp_path / "1", tmp_path / "2"
    words = simple(first, [annotation(category=1)], categories=categories("car", "aircraft"))
    assert tile(*words, out=tmp_path / "out") == 0
    words = simple(second, [annotation(category=0)], categories=categories("aircraft"))
    assert tile(*words, "--as", "val", out=tmp_path / "out") == 0
    assert "those of the other splits: 'car', 'aircraft'" in capsys.readouterr().out
    coco = read_tiles(tmp_path / "out/val")[0]
    assert [c["name"] for c in coco["categories"]] == ["car", "aircraft"]
    assert {a["category_id"] for a in coco["annotations"]} == {2}
    words = simple(second, [annotation(category=0)], categories=categories("plane"))
    with pytest.raises(UserError, match=r"class 'plane' and the other splits have.*--rename"):
        tile(*words, "--as", "val", out=tmp_path / "out")
    assert tile(*words, "--as", "val", "--rename", "plane=aircraft", out=tmp_path / "out") == 0


def test_tiles_of_rareplanes_scenes_are_not_replaced(tmp_path, tiled_copy):
    words = simple(tmp_path, [annotation()])
    with pytest.raises(UserError, match="holds tiles of RarePlanes scenes"):
        tile(*words, out=tiled_copy)
    assert tile(*words, "--as", "more", out=tiled_copy) == 0


def test_a_line_accounts_for_a_messy_export(tmp_path, capsys):
    good = [annotation(n, n) for n in (1, 2, 3)]
    bad = [
        {"segmentation": []},
        {"iscrowd": 1},
        {"image_id": 9},
        {"category_id": 9},
        {"image_id": 4},
    ]
    for n in (1, 2):
        picture(tmp_path / f"images/{n}.png")
    (tmp_path / "images/3.png").write_bytes(b"no picture")
    images = [image(n, f"{n}.png") for n in (1, 2, 3)]
    picture(tmp_path / "images/4.png", aircraft=40)
    images.append(image(4, "4.png"))
    annotations = [
        *good,
        *(annotation(10 + n, **{"image_id": 1} | b) for n, b in enumerate(bad[:4])),
    ]
    file = write(tmp_path / "a.json", images, annotations)
    assert tile(tmp_path / "images", file, out=tmp_path / "out") == 1
    assert "skip them with --skip-bad" in capsys.readouterr().err
    assert tile(tmp_path / "images", file, "--skip-bad", out=tmp_path / "out") == 0
    (line,) = re.findall(r"^\d.*are in the tiles.*$", capsys.readouterr().out, re.MULTILINE)
    assert line.startswith("2 of 4 scenes and 2 of 6 objects are in the tiles; scenes left out: ")
    assert "1 that cannot be read" in line
    assert "1 without aircraft" in line
    assert "1 with iscrowd 1" in line
    assert "1 of images that are not listed" in line
    assert "1 of categories that are not listed" in line


@pytest.mark.parametrize("model", ["unet", "mask"])
def test_a_validation_without_aircraft_counts_false_alarms(thin, tmp_path, capsys, model):
    assert tile(*exports.cvat(tmp_path / "a"), out=tmp_path / "out") == 0
    picture(tmp_path / "b/images/sea.png", aircraft=40)
    file = write(tmp_path / "b/b.json", [image(name="sea.png")], [])
    more = ("--as", "val", "--negatives", 100)
    assert tile(tmp_path / "b/images", file, *more, out=tmp_path / "out") == 0
    train = importlib.import_module(f"{model}.train").main
    words = partial(training, tmp_path / "out", tmp_path / "run", "-b", 1, model=model)
    train(words("--max-steps", 1))
    train(words("--test-only", "val", "--resume", tmp_path / "run/model_best.pth"))
    scores = json.loads((tmp_path / "run/val_scores.json").read_text())
    assert (tmp_path / "run/val_sheet.jpg").is_file()
    if model == "mask":
        assert scores.keys() == {"false_alarms_per_tile"}
        found = json.loads((tmp_path / "run/val_predictions.json").read_text())
        assert scores["false_alarms_per_tile"] == sum(one["score"] >= 0.5 for one in found)
    else:
        assert scores.get("IoU.aircraft", 0) == 0
        assert ("IoU.aircraft" in scores) == (scores["pixel_accuracy"] < 1)
