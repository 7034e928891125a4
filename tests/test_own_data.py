"""coco.py and geojson.py check labels in one way, and a training accepts what they write."""

import json
import os
import re
import unicodedata
from contextlib import redirect_stdout
from io import StringIO
from itertools import count

import numpy as np
import pytest
from helpers.commands import training
from helpers.exports import annotation, image, picture, write
from helpers.rasters import raster
from helpers.scenes import read_tiles, tree
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from rasterio import Affine

from common.cli import UserError
from common.data import Tiles, training_splits
from common.io.folders import rasters_in
from common.io.raster import open_scene
from preprocessing import coco, geojson, splits

SIDE = 128
PLACE = {"crs": "EPSG:32631", "transform": Affine(0.5, 0, 448_000, 0, -0.5, 5_411_000)}
COMMANDS = ("coco", "geojson")


class InProcess:
    """`Workers` without processes, which take most of the time of a small run."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def outcomes(self, function, tasks):
        for i, task in enumerate(tasks):
            try:
                yield i, function(*task)
            except UserError as error:
                yield i, error


@pytest.fixture(autouse=True, scope="module")
def quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splits, "Workers", InProcess)
        yield


def box(number):
    """The corners of the outline of a number, in pixels: all lie apart."""
    x, y = 3 + 7 * (number % 17), 3 + 7 * (number // 17)
    return [(x, y), (x + 6, y), (x + 6, y + 6), (x, y + 6)]


def feature(number, value="plane", geometry=None, **more):
    """A feature as QGIS saves it, in the reference system of `PLACE`."""
    ring = [PLACE["transform"] @ point for point in (*box(number), box(number)[0])]
    geometry = geometry or {"type": "Polygon", "coordinates": [ring]}
    return {"type": "Feature", "properties": {"kind": value}, "geometry": geometry} | more


def labels(path, features, crs="urn:ogc:def:crs:EPSG::32631"):
    path.parent.mkdir(parents=True, exist_ok=True)
    named = {"crs": {"type": "name", "properties": {"name": crs}}} if crs else {}
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features} | named))
    return path


def scene(path, side=SIDE, **profile):
    path.parent.mkdir(parents=True, exist_ok=True)
    return raster(path, np.full((3, side, side), 90, np.uint8), **(PLACE | profile))


def named(root, command, names, stem="a"):
    """A scene with an object of each name; what a user types for it."""
    if command == "geojson":
        scene(root / f"{stem}.tif")
        file = labels(root / f"{stem}.geojson", [feature(n, v) for n, v in enumerate(names)])
        return [root / f"{stem}.tif", file, "--class-property", "kind"]
    picture(root / f"images/{stem}.png")
    outlines = [[float(v) for point in box(n) for v in point] for n in range(len(names))]
    annotations = [
        annotation(n, 1, n, segmentation=[outline]) for n, outline in enumerate(outlines)
    ]
    categories = [{"id": n, "name": name} for n, name in enumerate(names)]
    file = write(root / f"{stem}.json", [image(name=f"{stem}.png")], annotations, categories)
    return [root / "images", file]


def tile(command, *words, out, size=SIDE):
    main = {"coco": coco.main, "geojson": geojson.main}[command]
    return main([*map(str, words), "-o", str(out), "-n", "1", "-s", str(size)])


def classes(split):
    return [c["name"] for c in read_tiles(split)[0]["categories"]]


# --- Whatever a class is called, training accepts the tiles, or the command refuses ---------------

NASTY = [
    "ground", "Boeing 737\n", "Boeing\u00a0737", "Boeing 737", "旅客機\u3000大型", "\u200b",
    "a\x1b[2J", "é", "e\u0301", "\U0001f6e9", "\U0001f468\u200d\u2708\ufe0f", "\u202egnp",
    "\ud800", "", " ", "\t", "x" * 100, "x" * 101, "x" * 100 + " ", 0, 7, 7.0, "7", -1, 1.5,
    10**400, True, False, None, [], {}, "a/b", "\0", "ground ", "\u2028", "_background_",
]  # fmt: skip
numbered = count()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    command=st.sampled_from(COMMANDS),
    train=st.lists(st.sampled_from(NASTY) | st.text(max_size=4), min_size=1, max_size=4),
    val=st.lists(st.sampled_from(NASTY) | st.text(max_size=4), max_size=2),
)
@example("geojson", list(range(300)), [])
@example("coco", [str(n) for n in range(300)], [])
@example("geojson", list(range(254)), [7, 253.0])
@example("geojson", ["ground", "aircraft"], [])
@example("geojson", ["A320", "Boeing 737\n"], ["Boeing\u00a0737"])
@example("coco", ["é", "Boeing\u00a0737"], ["Boeing 737", "e\u0301"])
def test_what_is_tiled_can_be_trained_on(tmp_path_factory, command, train, val):
    root = tmp_path_factory.getbasetemp() / f"named{next(numbered)}"
    if not tiles_or_refuses(command, *named(root, command, train), out=root / "out"):
        assert not list(root.glob("out/*/[!.]*"))
        return
    found, _ = training_splits(root / "out")
    assert len(set(found.classes)) == len(found.classes) <= 255
    before = tree(root / "out")
    words = [*named(root / "v", command, [*train[:1], *val], "b"), "--as", "val"]
    if tiles_or_refuses(command, *words, out=root / "out"):
        _, validation = training_splits(root / "out")
        assert validation.classes == found.classes
    else:
        assert tree(root / "out") == before


def tiles_or_refuses(command, *words, out):
    try:
        return tile(command, *words, out=out) == 0
    except UserError as error:
        sentence = str(error)
    assert sentence.isprintable()
    return False


@pytest.mark.parametrize("command", COMMANDS)
def test_classes_are_taken_over_from_the_other_splits(tmp_path, capsys, command):
    words = named(tmp_path / "1", command, ["zebra", "ant"])
    assert tile(command, *words, "--rename", "zebra=bee", out=tmp_path / "out") == 0
    before = classes(tmp_path / "out/train")
    assert sorted(before) == ["ant", "bee"]
    words = named(tmp_path / "2", command, ["cat"], "b")
    with pytest.raises(UserError, match=r"class 'cat' and the other splits have.*--rename"):
        tile(command, *words, "--as", "val", out=tmp_path / "out")
    words += ["--rename", "cat=bee"]
    assert tile(command, *words, "--as", "val", out=tmp_path / "out") == 0
    assert f"those of the other splits: {', '.join(map(repr, before))}" in capsys.readouterr().out
    coco_file = read_tiles(tmp_path / "out/val")[0]
    assert classes(tmp_path / "out/val") == before
    assert {a["category_id"] for a in coco_file["annotations"]} == {before.index("bee") + 1}
    with pytest.raises(UserError, match=r"'dog' is not in .* which has \['cat'\]"):
        tile(command, *words[:-2], "--rename", "dog=bee", "--as", "val", out=tmp_path / "out")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_scene_is_in_one_split_only(tmp_path, command):
    words = named(tmp_path, command, ["a"])
    assert tile(command, *words, out=tmp_path / "out") == 0
    with pytest.raises(UserError, match=r"earlier run from the same images, such as 'a'"):
        tile(command, *words, "--as", "val", out=tmp_path / "out")
    with pytest.raises(UserError, match=r"'--as': a split cannot be called '\.\./b'"):
        tile(command, *words, "--as", "../b", out=tmp_path / "out")
    if command == "geojson":  # the same scene by its folder
        with pytest.raises(UserError, match=r"earlier run from the same images, such as 'a'"):
            tile(command, tmp_path, *words[1:], "--as", "val", out=tmp_path / "out")
        with pytest.raises(UserError, match=r"another split.*--as"):
            tile(command, tmp_path, *words[1:], out=tmp_path / "out")


# --- Names in another Unicode form than on the disk -----------------------------------------------

FORMS = [unicodedata.normalize(form, "Zürich_é") for form in ("NFC", "NFD")]
MIXED = FORMS[0][:3] + FORMS[1][4:]


@pytest.mark.parametrize(("disk", "listed"), [FORMS, FORMS[::-1]], ids=["NFC", "NFD"])
def test_an_image_is_found_in_either_form_of_its_name(tmp_path, disk, listed):
    for split in ("train", "val"):
        picture(tmp_path / f"images/{disk}/{split}{disk}.png")
    images = [image(n, f"{listed}/{s}{listed}.png") for n, s in enumerate(("train", "val"))]
    file = write(tmp_path / "a.json", images, [annotation(n, n) for n in range(2)])
    (tmp_path / "s.json").write_text(
        json.dumps({s: [f"{disk}/{s}{disk}.png"] for s in ("train", "val")})
    )
    words = [tmp_path / "images", file, "--split", tmp_path / "s.json"]
    assert tile("coco", *words, out=tmp_path / "out") == 0
    scenes = [read_tiles(tmp_path / "out" / s)[0]["images"][0]["scene"] for s in ("train", "val")]
    assert scenes == [f"{FORMS[0]}_{s}{FORMS[0]}" for s in ("train", "val")]


def test_any_space_may_be_in_the_name_of_an_image(tmp_path):
    """macOS writes U+202F into the names of screenshots."""
    name = "10.00\u202fAM\u00a0a\u3000b.png"
    picture(tmp_path / "images" / name)
    file = write(tmp_path / "a.json", [image(name=name)], [annotation()])
    assert tile("coco", tmp_path / "images", file, out=tmp_path / "out") == 0
    Tiles(tmp_path / "out/train")


def test_names_that_differ_only_in_their_form_are_told(tmp_path):
    for form in FORMS:
        picture(tmp_path / f"images/{form}.png")
    if len(list((tmp_path / "images").iterdir())) == 1:
        pytest.skip("this file system takes both forms for one name")
    file = write(tmp_path / "a.json", [image(name=f"{MIXED}.png")], [annotation()])
    with pytest.raises(UserError, match=r"2 names in .*differ from .*Unicode form: .*u\\u0308"):
        tile("coco", tmp_path / "images", file, out=tmp_path / "out")
    # Each is there as it is written, but their tiles would have one name.
    file = write(tmp_path / "a.json", [image(n, f"{f}.png") for n, f in enumerate(FORMS)], [])
    with pytest.raises(UserError, match=r"a\.json.*case, folder or Unicode form; rename"):
        tile("coco", tmp_path / "images", file, "--negatives", 100, out=tmp_path / "out")
    # One image may not be in two splits under two names.
    (tmp_path / "images" / f"{FORMS[1]}.png").unlink()
    file = write(tmp_path / "a.json", [image(name=f"{FORMS[0]}.png")], [annotation()])
    split = {"train": [f"{FORMS[0]}.png"], "val": [f"{FORMS[1]}.png"]}
    (tmp_path / "s.json").write_text(json.dumps(split))
    words = [tmp_path / "images", file, "--split", tmp_path / "s.json"]
    with pytest.raises(UserError, match=r"s\.json' names .* twice, in 'train' and in 'val'"):
        tile("coco", *words, out=tmp_path / "out")


def test_an_image_listed_twice_may_state_its_size_once(tmp_path):
    picture(tmp_path / "images/a.png")
    sizes = {"width": 0, "height": 0}, {}
    for first, second in (sizes, sizes[::-1]):
        images = [image(1, **first), image(2, **second)]
        file = write(tmp_path / "a.json", images, [annotation(1, 1)])
        assert tile("coco", tmp_path / "images", file, out=tmp_path / "out") == 0
    images = [image(1, width=0, height=0), image(2), image(3, width=SIDE + 1)]
    file = write(tmp_path / "a.json", images, [annotation(1, 1)])
    with pytest.raises(UserError, match=r"two sizes of the image 'a\.png'"):
        tile("coco", tmp_path / "images", file, out=tmp_path / "out")
    # A size that is stated only once is compared, too.
    images = [image(1, width=0, height=0), image(2, width=SIDE + 1)]
    file = write(tmp_path / "a.json", images, [annotation(1, 1)])
    with pytest.raises(UserError, match="none of the 1 scenes"):
        tile("coco", tmp_path / "images", file, out=tmp_path / "out")


# --- Polygons on a map ----------------------------------------------------------------------------


def test_scenes_with_a_label_file_each_become_splits_in_one_run(tmp_path, capsys):
    """Pictures without a place, so that each file must be used for its own scene alone."""
    for n, stem in enumerate((FORMS[0], "b", "c", "d")):
        scene(tmp_path / f"scenes/{stem}.png", driver="PNG", crs=None, transform=None)
        x, y = box(9 * n)[0]
        ring = [[x, y], [x + 6, y], [x + 6, y + 6], [x, y + 6], [x, y]]
        kind = {"b": "ship"}.get(stem, "plane")
        features = [feature(0, kind, {"type": "Polygon", "coordinates": [ring]})] * (stem != "d")
        form = FORMS[1] if stem == FORMS[0] else stem
        labels(tmp_path / f"labels/{form}.geojson", features, crs=None)
    (tmp_path / "s.json").write_text(
        json.dumps({"train": [f"{FORMS[1]}.png", "d.png"], "val": ["b.png"]})
    )
    words = [tmp_path / "scenes", tmp_path / "labels", "--class-property", "kind"]
    words += ["--split", tmp_path / "s.json", "--negatives", 100]
    assert tile("geojson", *words, out=tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "1 images are in no split" in said
    assert "3 of 4 scenes and 2 of 2 objects are in the tiles" in said
    for split, number in (("train", 0), ("val", 9)):
        assert classes(tmp_path / "out" / split) == ["plane", "ship"]
        tiles = read_tiles(tmp_path / "out" / split)[1]
        shown = [a["bbox"] for _, annotations, *_ in tiles for a in annotations]
        assert shown == [[*box(number)[0], 6, 6]]
    (tmp_path / "labels/b.geojson").unlink()
    with pytest.raises(UserError, match=r"there is no 'b\.geojson' in .*labels'.*--split"):
        tile("geojson", *words, out=tmp_path / "out")
    # One file in pixels cannot be for several pictures.
    words[1] = tmp_path / "labels/c.geojson"
    with pytest.raises(UserError, match="none of the 3 scenes"):
        tile("geojson", *words, out=tmp_path / "other")
    assert "not georeferenced" in capsys.readouterr().err


def test_a_scene_that_cannot_be_read_can_be_left_out(tmp_path, capsys):
    scene(tmp_path / "scenes/a.tif")
    (tmp_path / "scenes/b.tif").write_bytes(b"II*\0 no raster")
    (tmp_path / "scenes/c.tif").write_text("no raster")
    (tmp_path / "scenes/._a.tif").write_bytes(b"of macOS")
    (tmp_path / "scenes/notes.txt").write_text("")
    words = [tmp_path / "scenes", labels(tmp_path / "l.geojson", [feature(0)])]
    assert tile("geojson", *words, out=tmp_path / "out") == 1
    said = capsys.readouterr()
    assert "left out 2 files that are hidden or no .png" in said.out
    assert "'._a.tif', 'notes.txt'" in said.out
    bad = [line for line in said.err.splitlines() if line.startswith("bad scene")]
    assert ["b.tif" in bad[0], "c.tif" in bad[1], len(bad)] == [True, True, 2]
    assert "2 of 3 scenes could not be read" in said.err
    assert not list((tmp_path / "out/train").glob("[!.]*"))
    assert tile("geojson", *words, "--skip-bad", out=tmp_path / "out") == 0
    assert "1 of 3 scenes and 1 of 1 objects" in capsys.readouterr().out
    # It is read once it is repaired.
    (tmp_path / "scenes/b.tif").unlink()
    scene(tmp_path / "scenes/b.tif", transform=Affine(0.5, 0, 449_000, 0, -0.5, 5_411_000))
    (tmp_path / "scenes/c.tif").unlink()
    assert tile("geojson", *words, "--negatives", 100, out=tmp_path / "out") == 0
    assert "2 of 2 scenes" in capsys.readouterr().out
    scene(tmp_path / "odd/a.tif").rename(tmp_path / os.fsdecode(b"odd/\xff.tif"))
    with pytest.raises(UserError, match=r"'\\udcff\.tif' is not UTF-8; rename"):
        tile("geojson", tmp_path / "odd", words[1], out=tmp_path / "odd/out")
    with pytest.raises(UserError, match="no image or folder"):
        tile("geojson", tmp_path / "nowhere.tif", words[1], out=tmp_path / "out")


RING = [[0, 0], [9, 0], [9, 9], [0, 0]]
LEFT_OUT = {
    "without a geometry": [
        None, {"type": "Polygon", "coordinates": []}, {"type": "MultiPolygon", "coordinates": []},
        {"type": "MultiPolygon", "coordinates": [[]]}, {"type": "Polygon", "coordinates": None},
    ],
    "that are no Polygon or MultiPolygon": [
        {"type": "Point", "coordinates": [1, 2]}, 3, {}, {"type": "GeometryCollection"},
        {"type": ["Polygon"], "coordinates": [RING]},
    ],
    "with an invalid outline": [
        {"type": "Polygon", "coordinates": [[*RING[:2], [None, 9], *RING[2:]]]},
        {"type": "Polygon", "coordinates": [[*RING[:2], [9, float("nan")], *RING[2:]]]},
        {"type": "Polygon", "coordinates": [RING[:3]]}, {"type": "Polygon", "coordinates": 3},
        {"type": "MultiPolygon", "coordinates": [[RING], [[[0, 0]]]]},
        {"type": "Polygon", "coordinates": [RING, [[0, 10**400]] * 4]},
    ],
}  # fmt: skip


@pytest.mark.parametrize("reason", LEFT_OUT)
def test_a_bad_feature_costs_itself(tmp_path, capsys, reason):
    path = scene(tmp_path / "a.tif")
    bad = [{"type": "Feature", "geometry": geometry} for geometry in LEFT_OUT[reason]]
    file = labels(tmp_path / "l.geojson", [feature(0), *bad])
    assert tile("geojson", path, file, out=tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert f"1 of {len(bad) + 1} objects are in the tiles; " in said
    named = ", ".join(f"feature {n} of 'l.geojson'" for n in (2, 3, 4))
    assert f"objects left out: {len(bad)} {reason} ({named}, …)" in said
    labels(file, bad)
    with pytest.raises(UserError, match=rf"no valid polygon: .* {len(bad)} {reason} \(feature 1 "):
        tile("geojson", path, file, "--negatives", 100, out=tmp_path / "none")


def test_what_lies_on_no_scene_and_what_has_no_class_is_counted(tmp_path, capsys):
    path = scene(tmp_path / "a.tif")
    values = ["plane", None, "x" * 101, "plane"]
    features = [*(feature(n, value) for n, value in enumerate(values)), feature(17 * 999)]
    file = labels(tmp_path / "l.geojson", features)
    words = [path, file, "--class-property", "kind"]
    assert tile("geojson", *words, out=tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "2 of 5 objects are in the tiles" in said
    assert "1 on no scene that was read (feature 5 of 'l.geojson')" in said
    assert "2 without a class" in said
    ((_, annotations, _, mask),) = read_tiles(tmp_path / "out/train")[1]
    assert sorted(a["iscrowd"] for a in annotations) == [0, 0, 1, 1]
    # Of unknown class, but no ground.
    assert [(mask == value).sum() for value in (1, 2, 255)] == [36, 36, 72]
    with pytest.raises(UserError, match=r"'colour'; the properties are \['kind'\]"):
        tile("geojson", path, file, "--class-property", "colour", out=tmp_path / "out")


KINDS = {
    "good": {},
    "none": {"geometry": LEFT_OUT["without a geometry"][1]},
    "point": {"geometry": LEFT_OUT["that are no Polygon or MultiPolygon"][0]},
    "invalid": {"geometry": LEFT_OUT["with an invalid outline"][0]},
    "no class": {"value": None},
    "elsewhere": {"number": 17 * 999},
    "small": {
        "geometry": {
            "type": "Polygon",
            "coordinates": [[PLACE["transform"] @ p for p in [(99, 99), (103, 99), (99, 103)]] * 2],
        }
    },
    "nothing": {"properties": 3, "geometry": "?"},
}


@settings(max_examples=40, deadline=None)
@given(kinds=st.lists(st.sampled_from(sorted(KINDS)), max_size=12))
def test_every_feature_is_learnt_from_or_counted(tmp_path_factory, kinds):
    root = tmp_path_factory.getbasetemp() / f"counted{next(numbered)}"
    features = [feature(**{"number": n} | KINDS[kind]) for n, kind in enumerate(["good", *kinds])]
    words = [scene(root / "a.tif"), labels(root / "l.geojson", features)]
    with redirect_stdout(StringIO()) as said:
        assert tile("geojson", *words, "--class-property", "kind", out=root / "out") == 0
    line = said.getvalue().splitlines()[-1]
    learnt = 1 + kinds.count("good")
    assert line.startswith(
        f"1 of 1 scenes and {learnt} of {len(features)} objects are in the tiles"
    )
    reasons = re.sub(r" \(.*?\)", "", line.partition("; objects left out: ")[2])
    counts = [reason.split(" ")[0] for reason in reasons.split(", ") if reason]
    assert sum(map(int, counts)) == len(features) - learnt
    shown = [a for a in read_tiles(root / "out/train")[0]["annotations"] if not a["iscrowd"]]
    assert len(shown) == learnt


def test_a_scene_without_aircraft_can_be_scored(tmp_path):
    words = [scene(tmp_path / "a.tif"), labels(tmp_path / "l.geojson", [])]
    with pytest.raises(UserError, match=r"no class"):
        tile("geojson", *words, "--class-property", "kind", out=tmp_path / "out")
    other = [scene(tmp_path / "b.tif"), labels(tmp_path / "b.geojson", [feature(0)])]
    assert tile("geojson", *other, "--class-property", "kind", out=tmp_path / "out") == 0
    words += ["--class-property", "kind", "--as", "val"]
    with pytest.raises(UserError, match=r"val' would have no tile.*100 keeps all"):
        tile("geojson", *words, out=tmp_path / "out")
    assert tile("geojson", *words, "--negatives", 100, out=tmp_path / "out") == 0
    assert classes(tmp_path / "out/val") == ["plane"]
    words = [*words[:2], "--negatives", 100]
    assert tile("geojson", *words, out=tmp_path / "one") == 0
    assert classes(tmp_path / "one/train") == ["aircraft"]


def test_other_classes_of_the_same_polygons_are_cut_anew(tmp_path):
    """What an interrupted run has finished is not used for other classes."""
    path = scene(tmp_path / "a.tif")
    features = [feature(n, "xy"[n]) for n in range(2)]
    for n, one in enumerate(features):
        one["properties"]["other"] = "yx"[n]
    file = labels(tmp_path / "l.geojson", features)
    words = [path, file, "--class-property"]

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splits, "write_index", stop)
        assert tile("geojson", *words, "kind", out=tmp_path / "out") == 130
    for name, expected in (("other", [2, 1]), ("kind", [1, 2])):
        assert tile("geojson", *words, name, out=tmp_path / "out") == 0
        found = read_tiles(tmp_path / "out/train")[0]["annotations"]
        assert [a["category_id"] for a in sorted(found, key=lambda a: a["bbox"])] == expected


def test_a_validation_scene_with_fewer_classes_is_trained_on(thin, tmp_path):
    for stem, names, split in (
        ("a", ["airliner", "helicopter"], "train"),
        ("b", ["airliner"], "val"),
    ):
        words = named(tmp_path, "geojson", names, stem)
        assert tile("geojson", *words, "--as", split, out=tmp_path / "out", size=64) == 0
    from unet.train import main

    main(training(tmp_path / "out", tmp_path / "run", "-b", 1, "--max-steps", 1))
    run = json.loads((tmp_path / "run/run.json").read_text())
    assert run["classes"] == ["ground", "airliner", "helicopter"]


def test_images_one_folder_down_are_pointed_at(tmp_path):
    """CVAT writes images/default/a.png and the name a.png."""
    picture(tmp_path / "images/default/a.png")
    file = write(tmp_path / "a.json", [image()], [annotation(1, 1)])
    with pytest.raises(UserError, match=r"none of the 1 images .*perhaps '.*images/default'\.$"):
        tile("coco", tmp_path / "images", file, out=tmp_path / "out")
    assert tile("coco", tmp_path / "images/default", file, out=tmp_path / "out") == 0
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"file names are relative to\.$"):
        tile("coco", tmp_path / "empty", file, out=tmp_path / "other")


@pytest.mark.parametrize("suffix", [".gpkg", ".SHP"])
def test_other_formats_of_labels_are_named_with_the_way_out(tmp_path, suffix):
    scene(tmp_path / "a.tif")
    (tmp_path / f"labels{suffix}").write_bytes(b"SQLite format 3")
    with pytest.raises(UserError, match="is not GeoJSON; export the layer as GeoJSON"):
        tile("geojson", tmp_path / "a.tif", tmp_path / f"labels{suffix}", out=tmp_path / "out")


def test_a_raster_that_must_be_converted_is_named_first(tmp_path, capsys):
    for name in ("a.txt", "b.txt", "c.txt", "scene.vrt", "x.png"):
        (tmp_path / name).write_text("<VRTDataset>")
    assert [path.name for path in rasters_in(tmp_path)] == ["x.png"]
    assert "left out 4 files" in (said := capsys.readouterr().out)
    assert said.index("'scene.vrt'") < said.index("'a.txt'")
    with (
        pytest.raises(UserError, match="`gdal_translate` converts it"),
        open_scene(tmp_path / "scene.vrt"),
    ):
        pass
