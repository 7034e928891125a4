"""Any COCO instance dataset as tiles: outlines of every kind, splits, and files with mistakes."""

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from helpers.coco import make_coco, save, tile_args
from helpers.rasters import pixels_of
from helpers.scenes import EXAMPLE, read_tiles, tree
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as rle
from pycocotools.coco import COCO

from common.cli import UserError
from preprocessing.coco import main
from preprocessing.outlines import run_lengths

NWPU = EXAMPLE.parent / "nwpu_airplane"


@lru_cache(maxsize=2)
@lru_cache(maxsize=1)
def painted(path):
    """From the source file: the annotation id of each pixel of each image, smaller ones on top."""
    coco = COCO(path)
    result = {}
    for entry in coco.dataset["images"]:
        annotations = coco.imgToAnns[entry["id"]]
        masks = {a["id"]: coco.annToMask(a).astype(bool) for a in annotations}
        canvas = np.full((entry["height"], entry["width"]), -1)
        order = sorted(annotations, key=lambda a: (not a.get("iscrowd"), -masks[a["id"]].sum()))
        for a in order:
            canvas[masks[a["id"]]] = a["id"]
        result[entry["file_name"]] = canvas
    return coco, result


def check(root, source, out, tile):
    """Compare every pixel of every tile with the source file; return the ids that are shown."""
    coco, canvas = painted(source)
    file_of = {
        "_".join(Path(e["file_name"]).with_suffix("").parts): e["file_name"]
        for e in coco.dataset["images"]
    }
    shown = set()
    content, tiles = read_tiles(out)
    COCO(out / "instances_tiled.json")
    for entry, annotations, rgb, mask in tiles:
        name = file_of[entry["scene"]]
        x, y = entry["x"], entry["y"]
        part = canvas[name][y : y + tile, x : x + tile]
        height, width = part.shape
        ignore = np.iinfo(mask.dtype).max
        assert (mask[height:] == ignore).all()
        assert (mask[:, width:] == ignore).all()
        inner = mask[:height, :width]
        np.testing.assert_array_equal(inner == 0, part == -1)
        image = pixels_of(root / name)
        np.testing.assert_array_equal(rgb[:height, :width], image[y : y + tile, x : x + tile])
        own = coco.imgToAnns[
            next(e["id"] for e in coco.dataset["images"] if e["file_name"] == name)
        ]
        for a in annotations:
            origin = own[a["object"] - 1]
            where = rle.decode(a["segmentation"])[:height, :width].astype(bool)
            np.testing.assert_array_equal(where, part == origin["id"])
            assert (inner[where] == a["instance"]).all()
            assert a["make"] == coco.cats[origin["category_id"]]["name"]
            assert content["categories"][a["category_id"] - 1]["name"] == a["make"]
            if origin.get("iscrowd"):
                assert a["iscrowd"] == 1
            if not a["iscrowd"]:
                shown.add(origin["id"])
    return content, tiles, shown


@pytest.mark.parametrize("seed", range(3))
def test_every_kind_of_outline(tmp_path, seed):
    data = make_coco(tmp_path, images=6, seed=seed)
    out = tmp_path / "out"
    assert main(tile_args(tmp_path, out, "-s", "64", "--negatives", "1000")) == 0
    source = tmp_path / "instances.json"
    content, tiles, shown = check(tmp_path / "images", source, out / "train", 64)
    assert [c["name"] for c in content["categories"]] == ["zebra", "ant"]
    assert [c["id"] for c in content["categories"]] == [1, 2]
    assert len({entry["scene"] for entry, *_ in tiles}) == len(data["images"])
    assert all(entry["airport"] == entry["scene"] for entry, *_ in tiles)
    assert len(shown) > 5


@pytest.mark.skipif(not NWPU.is_dir(), reason="the real COCO dataset is not here")
def test_real_dataset(tmp_path):
    source, split = NWPU / "instances.json", NWPU / "split.json"
    args = [
        str(NWPU / "images"),
        str(source),
        "--split",
        str(split),
        "-n",
        "2",
        "-o",
        str(tmp_path),
    ]
    assert main(args) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train", "val"]
    wanted = json.loads(split.read_text())
    found = set()
    for name in ("train", "val"):
        _, tiles, shown = check(NWPU / "images", source, tmp_path / name, 512)
        assert {entry["scene"] for entry, *_ in tiles} == {Path(n).stem for n in wanted[name]}
        assert not shown & found
        found |= shown
    assert len(found) == 449  # every aircraft is trained on in at least one tile


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 40), st.floats(0, 1))
def test_compressed_run_lengths_are_read_as_written(seed, width, height, density):
    mask = (np.random.default_rng(seed).random((height, width)) < density).astype(np.uint8)
    runs = rle.encode(np.asfortranarray(mask))
    outline = {"size": [height, width], "counts": runs["counts"].decode()}
    read = run_lengths({"segmentation": outline}, (width, height))
    np.testing.assert_array_equal(rle.decode(read), mask)


@given(st.text(st.characters(min_codepoint=48, max_codepoint=111), max_size=30))
def test_garbled_run_lengths_never_reach_the_c_code(text):
    try:
        read = run_lengths({"segmentation": {"size": [7, 9], "counts": text}}, (9, 7))
    except UserError:
        return
    assert rle.decode(read).shape == (7, 9)


BAD_OUTLINES = [
    [], None, "x", [[1, 2, 3, 4]], [[1, 2, 3, 4, 5]], [[1, 2, 3, 4, 5, float("nan")]],
    [[1, 2, 3, 4, 5, 1e300]], [["1", 2, 3, 4, 5, 6]], {"counts": [5]}, {"size": [20, 30]},
    {"size": [20, 30], "counts": [601]}, {"size": [20, 30], "counts": [-1, 601]},
    {"size": [30, 20], "counts": [600]}, {"size": [20, 30], "counts": "é"},
]  # fmt: skip


@pytest.mark.parametrize("outline", BAD_OUTLINES, ids=repr)
def test_bad_outlines_are_refused(outline):
    with pytest.raises(UserError, match="'id7' has no outline"):
        run_lengths({"id": "id7", "segmentation": outline}, (30, 20))


def test_split_and_what_is_left_out(tmp_path, capsys):
    names = [image["file_name"] for image in make_coco(tmp_path, images=6)["images"]]
    split = tmp_path / "split.json"
    parts = {"note": "no leak", "train": names[:3], "holdout": names[3:5], "seed": 3}
    split.write_text(json.dumps(parts))
    args = tile_args(tmp_path, tmp_path / "out", "-s", "32", "--split", str(split))
    assert main(args) == 0
    assert "1 images are in no split" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["holdout", "train"]
    for key in ("train", "holdout"):
        scenes = {e["scene"] for e in read_tiles(tmp_path / "out" / key)[0]["images"]}
        assert scenes <= {name[:-4].replace("/", "_") for name in parts[key]}

    before = tree(tmp_path / "out")
    # It would share images with train.
    with pytest.raises(UserError, match=r"holdout.*earlier run"):
        main(tile_args(tmp_path, tmp_path / "out", "-s", "32"))
    for wrong in ({"a": [names[0]], "b": [names[0]]}, {"a": ["x.png"]}, {"../a": names}, {"n": 1}):
        split.write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=r"split\.json"):
            main(args)
    assert tree(tmp_path / "out") == before


def test_bad_images_are_listed_and_can_be_left_out(tmp_path, capsys):
    data = make_coco(tmp_path, images=6)
    images = [tmp_path / "images" / image["file_name"] for image in data["images"]]
    images[0].unlink()
    images[1].write_bytes(images[1].read_bytes()[:-300])
    data["images"][2]["width"] += 1
    save(tmp_path, data)
    args = tile_args(tmp_path, tmp_path / "out", "-s", "32", "--negatives", "1000")
    assert main(args) == 1
    bad = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bad scene")]
    assert len(bad) == 3
    assert all(f"part_00{i}" in line for i, line in enumerate(bad))
    assert not (tmp_path / "out" / "train" / "instances_tiled.json").exists()
    assert main([*args, "--skip-bad"]) == 0
    scenes = {e["scene"] for e in read_tiles(tmp_path / "out" / "train")[0]["images"]}
    assert scenes == {"part_003", "part_004", "part_005"}
    assert "3 of 6 scenes" in capsys.readouterr().out


HOSTILE = [
    "/etc/passwd", "//etc/passwd", "../../x.png", "a/../../x.png", "..\\x.png", "C:\\x.png", ".",
    "a\x1b.png", "a\n.png",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE, ids=repr)
def test_hostile_names_are_refused(tmp_path, name):
    data = make_coco(tmp_path, images=2)
    data["images"][0]["file_name"] = name
    save(tmp_path, data)
    with pytest.raises(UserError, match="outside the folder") as error:
        main(tile_args(tmp_path, tmp_path / "out"))
    assert str(error.value).isprintable()
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_dataset(tmp_path):
    data = make_coco(tmp_path, images=2)
    wrong = {
        "no file": None,
        "no JSON": "{",
        "a list": "[]",
        "no images": json.dumps({**data, "images": []}),
        "no categories": json.dumps({k: v for k, v in data.items() if k != "categories"}),
        "no width": json.dumps({**data, "images": [{"id": 1, "file_name": "a.png", "height": 3}]}),
        "no category": json.dumps({**data, "categories": []}),
        "twice": json.dumps({**data, "images": data["images"] * 2}),
        "same but for case": json.dumps(
            {
                **data,
                "images": [
                    {**e, "file_name": f"{'aA'[k]}.png"} for k, e in enumerate(data["images"])
                ],
            }
        ),
        "two sizes": json.dumps(
            {
                **data,
                "images": [
                    {**e, "file_name": "a.png", "width": 90 + e["id"]} for e in data["images"]
                ],
            }
        ),
        "deep": "[" * 100_000,
    }
    for text in wrong.values():
        (tmp_path / "instances.json").unlink(missing_ok=True)
        if text is not None:
            (tmp_path / "instances.json").write_text(text)
        with pytest.raises(UserError, match=r"instances\.json"):
            main(tile_args(tmp_path, tmp_path / "out"))
    save(tmp_path, data)
    with pytest.raises(UserError, match="no folder of images"):
        main(["nowhere", *tile_args(tmp_path, tmp_path / "out")[1:]])
    assert not (tmp_path / "out").exists()
