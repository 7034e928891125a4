"""Tiles from the real command: every pixel, any number of processes, any interruption."""

import argparse
import os
import signal
import subprocess
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from helpers.coco import make_coco, tile_args
from helpers.commands import PATIENCE, wait_for
from helpers.scenes import (
    EXAMPLE,
    MAKES,
    make_dataset,
    make_scene,
    random_ids,
    read_tiles,
    tree,
    write_png,
)
from helpers.tiling import COMMAND, children, command, kill, start_and_wait
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as rle
from pycocotools.coco import COCO

from common.cli import UserError
from common.io.raster import NEUTRAL
from preprocessing import scene_tiles
from preprocessing import workers as pool
from preprocessing.coco import main as tile_coco
from preprocessing.preprocess import RarePlanesScene, choose_airports, main
from preprocessing.splits import add_tiling_options, tile_splits
from preprocessing.tiles import MIN_PIXELS, Labels, Settings, Thing, cut, grid
from rareplanes.attributes import makes


def check_tiles(folder, scenes, tile, min_visible=0.1):
    """Compare every pixel and every number of a split with the scenes it was cut from."""
    coco, tiles = read_tiles(folder)
    assert [e["id"] for e in coco["images"]] == list(range(1, len(tiles) + 1))
    assert [a["id"] for a in coco["annotations"]] == list(range(1, len(coco["annotations"]) + 1))
    names = [e["file_name"] for e in coco["images"]]
    assert names == sorted(names) == sorted(p.name for p in (folder / "images_tiled").iterdir())
    assert len(list((folder / "masks_tiled").iterdir())) == len(names)
    official = COCO(folder / "instances_tiled.json")
    for entry, annotations, rgb, mask in tiles:
        ids, image = scenes[entry["scene"]]
        x, y = entry["x"], entry["y"]
        part = ids[y : y + tile, x : x + tile]
        height, width = part.shape
        assert entry.get("padded", [0, 0]) == [tile - width, tile - height]
        assert rgb.shape == (tile, tile, 3)
        assert mask.shape == (entry["height"], entry["width"]) == (tile, tile)
        np.testing.assert_array_equal(rgb[:height, :width], image[y : y + tile, x : x + tile])
        assert (rgb[height:] == NEUTRAL).all()
        assert (rgb[:, width:] == NEUTRAL).all()
        ignore = np.iinfo(mask.dtype).max
        assert (mask[height:] == ignore).all()
        assert (mask[:, width:] == ignore).all()

        value = np.zeros(int(ids.max()) + 1, int)  # of each aircraft, by the definition
        shown, total = Counter(part.ravel().tolist()), Counter(ids.ravel().tolist())
        for k in sorted(set(shown) - {0}):
            fair = shown[k] >= max(min_visible * total[k], MIN_PIXELS)
            value[k] = sum(0 < v < ignore for v in value) + 1 if fair else ignore
        np.testing.assert_array_equal(mask[:height, :width], value[part])

        assert {a["object"]: a["instance"] for a in annotations} == {
            k: value[k] for k in shown if k
        }
        for a in annotations:
            whole = np.zeros((tile, tile), bool)
            whole[:height, :width] = part == a["object"]
            np.testing.assert_array_equal(official.annToMask(a).astype(bool), whole)
            assert a["iscrowd"] == (a["instance"] == ignore)
            ys, xs = np.nonzero(whole)
            assert a["bbox"] == [
                xs.min(), ys.min(), xs.max() - xs.min() + 1, ys.max() - ys.min() + 1
            ]  # fmt: skip
            assert a["area"] == whole.sum() == rle.area(a["segmentation"])
            assert isinstance(a["segmentation"]["counts"], str)
    return coco, tiles


def positive(annotations):
    return any(not a["iscrowd"] for a in annotations)


@given(st.integers(1, 5000), st.integers(1, 600))
def test_grid_covers_with_the_fewest_tiles_evenly(length, tile):
    origins = grid(length, tile)
    assert len(origins) == max(1, -(-length // tile))
    assert origins[0] == 0
    assert origins[-1] == max(0, length - tile)
    steps = np.diff(origins)
    assert all(0 < step <= tile for step in steps)
    assert not len(steps) or max(steps) - min(steps) <= 1


def test_grid_of_the_dataset():
    assert len(grid(1920, 512)) == 4
    assert len(grid(1080, 512)) == 3


@settings(max_examples=60)
@given(
    st.integers(0, 2**32 - 1), st.integers(5, 90), st.integers(5, 90), st.integers(0, 12),
    st.integers(16, 60), st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)  # fmt: skip
def test_cut_tiles_rebuild_the_scene(seed, width, height, count, tile, min_visible):
    ids = random_ids(np.random.default_rng(seed), width, height, count)
    pixels = [int((ids == k).sum()) for k in range(1, count + 1)]
    labels = Labels(
        ids, [Thing(1, "x", n, "a crowd" * (k == 4)) for k, n in enumerate(pixels, start=1)]
    )
    seen = np.zeros_like(ids, bool)
    rebuilt = np.full(ids.shape, -1)
    for entry, mask in cut(labels, Settings(tile_size=tile, min_visible=min_visible)):
        assert mask.shape == (tile, tile)
        ignore = np.iinfo(mask.dtype).max
        x, y = entry["x"], entry["y"]
        area = (slice(y, y + tile), slice(x, x + tile))
        seen[area] = True
        inner = mask[: height - y, : width - x]
        object_of = np.zeros(ignore + 1, int)
        for a in entry["annotations"]:
            if not a["iscrowd"]:
                object_of[a["instance"]] = a["object"]
        known = inner != ignore
        rebuilt[area][known] = object_of[inner[known]]
        assert not ((inner == 0) & (ids[area] > 0)).any()  # a fragment is never ground
        assert 4 not in object_of
    assert seen.all()
    known = rebuilt >= 0
    np.testing.assert_array_equal(rebuilt[known], ids[known])


@pytest.mark.parametrize("tile", [32, 48, 128])
def test_command_tiles_every_pixel_right(tmp_path, capsys, tile):
    made = make_dataset(tmp_path / "data", width=100, height=70)
    out = tmp_path / "out"
    given_tree = tree(tmp_path / "data")
    args = [
        str(tmp_path / "data"),
        "-s",
        str(tile),
        "-n",
        "1",
        "-o",
        str(out),
        "--negatives",
        "1000",
    ]
    assert main(args) == 0
    assert tree(tmp_path / "data") == given_tree
    stems = []
    for split in ("train", "val", "test"):
        coco, tiles = check_tiles(out / split, made, tile)
        stems += sorted({entry["scene"] for entry, *_ in tiles})
        assert [(c["id"], c["name"]) for c in coco["categories"]] == [(1, "aircraft")]
        # With all negatives kept, the tiles cover each scene.
        for stem in {entry["scene"] for entry, *_ in tiles}:
            seen = np.zeros(made[stem][0].shape, bool)
            for entry, *_ in tiles:
                if entry["scene"] == stem:
                    seen[entry["y"] : entry["y"] + tile, entry["x"] : entry["x"] + tile] = True
            assert seen.all()
    assert sorted(stems) == sorted(made)
    assert ("were padded" in capsys.readouterr().out) == (tile == 128)
    assert not list(out.rglob(".*"))


@pytest.mark.skipif(not EXAMPLE.is_dir(), reason="the example scene of RarePlanes is not here")
def test_a_scene_of_rareplanes(tmp_path):
    from rareplanes.scene import read_scene, read_scene_image

    assert main([str(EXAMPLE), "-o", str(tmp_path), "-n", "1"]) == 0
    scene = read_scene(EXAMPLE, "Adelaide_Airport_0_0_101")
    image = read_scene_image(EXAMPLE, scene.stem, (1920, 1080))[..., ::-1]
    coco, tiles = check_tiles(tmp_path, {scene.stem: (scene.ids, image)}, 512)
    assert len(tiles) == 8
    assert all(positive(annotations) for _, annotations, *_ in tiles)
    assert {a["make"] for a in coco["annotations"]} <= makes().keys()
    assert {entry["airport"] for entry, *_ in tiles} == {"Adelaide"}


def test_sixteen_bit_masks_beyond_254_aircraft(tmp_path):
    ids = np.zeros((96, 192), np.uint16)
    blocks = np.arange(1, 19 * 33, dtype=np.uint16)[: 16 * 18].reshape(16, 18)
    ids[:, :108] = np.kron(blocks, np.ones((6, 6), np.uint16))
    ids[:, 180:] = 1  # most of aircraft 1: its block in the first tile is a fragment
    scenes = {"A_Airport_0": make_scene(tmp_path, "A_Airport_0", ids=ids, count=288)}
    assert main([str(tmp_path), "-s", "96", "-n", "1", "--min-visible", "0.2"]) == 0
    _, tiles = check_tiles(tmp_path, scenes, 96, 0.2)
    assert [mask.dtype for *_, mask in tiles] == [np.uint16, np.uint8]
    assert tiles[0][3][0, 0] == 65535
    assert tiles[0][3].max() == 65535


@pytest.mark.parametrize("fraction", [0, 0.3, 1])
def test_share_of_negatives(tmp_path, fraction):
    make_dataset(tmp_path, train=["A"] * 6, test=(), width=200, height=150, count=2)
    args = [str(tmp_path), "-s", "32", "-n", "1", "--negatives"]
    assert main([*args, str(fraction)]) == 0
    _, tiles = read_tiles(tmp_path / "train")
    yes = sum(positive(annotations) for _, annotations, *_ in tiles)
    assert yes > 10
    assert len(tiles) - yes == int(fraction * yes)
    if fraction == 0.3:
        names = [entry["file_name"] for entry, *_ in tiles]
        assert main([*args, "0.3", "--seed", "1"]) == 0
        other = [entry["file_name"] for entry, *_ in read_tiles(tmp_path / "train")[1]]
        assert len(other) == len(names)
        assert other != names


def test_categories_are_the_same_for_every_split(tmp_path):
    make_dataset(tmp_path, train=("A", "B"), test=("C",))
    for attribute in ("role", "num_engines", "make", "canards"):
        assert main([str(tmp_path), "-s", "64", "-n", "1", "--attribute", attribute]) == 0
        cocos = [read_tiles(tmp_path / split)[0] for split in ("train", "val", "test")]
        assert cocos[0]["categories"] == cocos[1]["categories"] == cocos[2]["categories"]
        name = {c["id"]: c["name"] for c in cocos[0]["categories"]}
        assert min(name) == 1
        for a in cocos[0]["annotations"]:
            assert name[a["category_id"]] == makes()[a["make"]][attribute]
        assert cocos[0]["info"]["attribute"] == attribute


def test_unknown_make_needs_no_table_without_attribute(tmp_path, capsys):
    make_scene(tmp_path, "A_Airport_0", makes=["Sopwith_Camel"])
    make_scene(tmp_path, "A_Airport_1", makes=MAKES)
    assert main([str(tmp_path), "-s", "64", "-n", "1"]) == 0
    before = tree(tmp_path)
    assert main([str(tmp_path), "-s", "64", "-n", "1", "--attribute", "role"]) == 1
    assert "'Sopwith_Camel'" in capsys.readouterr().err
    after = {name: data for name, data in tree(tmp_path).items() if ".tiling" not in name}
    assert after == before


def test_validation_is_held_out_by_airport(tmp_path, capsys):
    make_dataset(tmp_path, train=["A"] * 5 + ["B"] * 2 + ["C"], test=("D",), width=50, height=50)
    args = [str(tmp_path), "-s", "32", "-n", "1"]

    def airports(split):
        return {entry["airport"] for entry in read_tiles(tmp_path / split)[0]["images"]}

    assert main(args) == 0
    assert (airports("train"), airports("val"), airports("test")) == ({"A", "B"}, {"C"}, {"D"})
    assert main([*args, "--val-airports", "A", "C"]) == 0
    assert (airports("train"), airports("val")) == ({"B"}, {"A", "C"})
    capsys.readouterr()
    for wrong in (["Z"], ["A", "B", "C"]):
        with pytest.raises(UserError, match="'A', 'B', 'C'"):
            main([*args, "--val-airports", *wrong])


def test_no_validation_from_one_airport_and_none_left_over(tmp_path, capsys):
    make_dataset(tmp_path, train=["A", "B"], test=(), width=50, height=50)
    args = [str(tmp_path), "-s", "32", "-n", "1"]
    assert main(args) == 0
    assert (tmp_path / "val").is_dir()
    for path in (tmp_path / "train").rglob("B_*"):
        path.unlink()
    assert main(args) == 0
    assert not (tmp_path / "val").exists()
    assert "validation: none, as 'A' is the only airport" in capsys.readouterr().out


@given(st.dictionaries(st.text("abcdef", min_size=1), st.integers(1, 30), min_size=1, max_size=15))
def test_default_airports_make_up_the_share(count):
    airports = [name for name, n in count.items() for _ in range(n)]
    chosen = choose_airports(airports, None)
    assert len(chosen) < len(count)
    assert chosen == choose_airports(airports[::-1], None)
    held = sum(count[name] for name in chosen)
    assert held >= 0.1 * len(airports) or len(chosen) == len(count) - 1


def test_same_bytes_for_any_number_of_processes_and_from_any_folder(tmp_path):
    make_dataset(tmp_path / "data")
    trees = []
    for workers, cwd in ((1, "/"), (2, tmp_path), (3, tmp_path)):
        out = tmp_path / f"out{workers}"
        result = command(tmp_path / "data", "-s", 32, "-n", workers, "-o", out, cwd=cwd)
        assert result.returncode == 0, result.stderr
        trees.append(tree(out))
    assert trees[0] == trees[1] == trees[2]
    assert len(trees[0]) > 20


def test_other_settings_leave_nothing_of_the_old_ones(tmp_path):
    make_dataset(tmp_path / "data")
    for out, sizes in (("once", ["40"]), ("twice", ["32", "40"])):
        for size in sizes:
            args = [str(tmp_path / "data"), "-s", size, "-n", "1", "-o", str(tmp_path / out)]
            assert main(args) == 0
    assert tree(tmp_path / "once") == tree(tmp_path / "twice")


def test_record_of_overwritten_tiles_is_not_believed(tmp_path, monkeypatch):
    """Stop while other settings overwrite staged tiles, then use the first settings again."""
    make_scene(tmp_path, "s", width=200, height=150)
    args = [str(tmp_path), "-n", "1", "-s"]
    source = RarePlanesScene(tmp_path, "s", None)
    stage = tmp_path / ".tiling"
    for name in ("records", "masks_tiled", "images_tiled"):
        (stage / name).mkdir(parents=True)
    scene_tiles.write_labels(source, stage, Settings(tile_size=64))

    written = []

    def stop_later(path, data, write=scene_tiles.write_atomic):
        if len(written) == 12:
            raise KeyboardInterrupt
        written.append(write(path, data))

    with monkeypatch.context() as patch:
        patch.setattr(scene_tiles, "write_atomic", stop_later)
        with pytest.raises(KeyboardInterrupt):
            scene_tiles.write_labels(source, stage, Settings(tile_size=48))
    assert main([*args, "64"]) == 0
    interrupted = tree(tmp_path)
    assert main([*args, "48"]) == 0
    assert main([*args, "64"]) == 0
    assert tree(tmp_path) == interrupted


@pytest.mark.parametrize(
    ("pattern", "count"),
    [("records/*.json", 1), ("records/*.json", 9), ("images_tiled/*", 9)],
)
def test_killed_run_is_continued_to_the_same_bytes(tmp_path, pattern, count):
    make_dataset(tmp_path / "data", train=["A"] * 12, test=(), width=300, height=200, count=9)
    out = tmp_path / "out"
    assert main([str(tmp_path / "data"), "-s", "48", "-n", "2", "-o", str(tmp_path / "clean")]) == 0
    # An earlier interrupted run with other settings must not matter either.
    for size in (40, 48):
        args = [tmp_path / "data", "-s", size, "-n", 2, "-o", out]
        process = start_and_wait(args, out / "train" / ".tiling", pattern, count)
        kill(process)
    assert main([str(a) for a in args]) == 0
    assert tree(out) == tree(tmp_path / "clean")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the worker in /proc")
def test_run_survives_a_killed_worker(tmp_path):
    make_dataset(tmp_path / "data", train=["A"] * 12, test=(), width=300, height=200, count=9)
    out = tmp_path / "out"
    args = [tmp_path / "data", "-s", "48", "-n", "2", "-o", out]
    process = start_and_wait(args, out / "train" / ".tiling", "records/*.json", 2)
    workers = children(process.pid)
    assert workers
    os.kill(workers[0], signal.SIGKILL)
    assert process.wait(PATIENCE) == 0
    args[-1] = tmp_path / "clean"
    assert command(*args).returncode == 0
    assert tree(out) == tree(tmp_path / "clean")


def test_interrupt_is_a_sentence(tmp_path):
    make_dataset(tmp_path / "data", train=["A"] * 12, test=(), width=300, height=200, count=9)
    args = [*COMMAND, tmp_path / "data", "-s", "48", "-n", "2", "-o", tmp_path / "out"]
    process = subprocess.Popen(
        list(map(str, args)),
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts background jobs, perhaps these tests, with Ctrl-C ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    records = partial((tmp_path / "out").rglob, "records/*.json")
    wait_for(lambda: any(records()) or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert "the same command continues" in errors
    assert "Traceback" not in errors


@dataclass(frozen=True)
class Scene:
    """A scene in memory; one of them kills every process that reads it."""

    stem: str
    deadly: bool = False
    endless: bool = False
    airport: str = "A"

    def files(self):
        return []

    def labels(self):
        if self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.endless:
            os.kill(os.getpid(), signal.SIGSTOP)
        return Labels(np.ones((32, 32), np.uint8), [Thing(1, "x", 1024)])

    def image(self, size):
        return np.zeros((*size[::-1], 3), np.uint8)


def options(*words):
    parser = argparse.ArgumentParser()
    add_tiling_options(parser)
    return parser.parse_args(["-s", "32", "-n", "2", *words])


def test_scene_that_kills_its_worker_is_named_and_the_others_are_tiled(tmp_path, capsys):
    scenes = [Scene(f"s{i}", deadly=i == 3) for i in range(9)]
    assert tile_splits({tmp_path: scenes}, ["aircraft"], options()) == 1
    assert not (tmp_path / "instances_tiled.json").exists()
    assert tile_splits({tmp_path: scenes}, ["aircraft"], options("--skip-bad")) == 0
    named = [line for line in capsys.readouterr().err.splitlines() if "bad scene" in line]
    assert len(named) == 2
    assert all("s3" in line and "died" in line for line in named)
    assert [e["scene"] for e in read_tiles(tmp_path)[0]["images"]] == [
        scene.stem for scene in scenes if not scene.deadly
    ]


def test_scene_that_hangs_its_worker_is_named_and_the_others_are_tiled(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(pool, "PATIENCE_S", 15.0)  # a worker needs one to start
    scenes = [Scene(f"s{i}", endless=i == 3) for i in range(5)]
    assert tile_splits({tmp_path: scenes}, ["aircraft"], options("--skip-bad")) == 0
    (named,) = (line for line in capsys.readouterr().err.splitlines() if "bad scene" in line)
    assert "s3" in named
    assert "hung for 15 s" in named
    assert len(read_tiles(tmp_path)[0]["images"]) == 4


def damage(folder, stem, how):
    image, mask = folder / "images" / f"{stem}.png", folder / "masks" / f"{stem}_mask.png"
    if how == "image cut":
        image.write_bytes(image.read_bytes()[:-2000])
    elif how == "mask cut":
        mask.write_bytes(mask.read_bytes()[:-200])
    elif how == "no mask":
        mask.unlink()
    elif how == "no xml":
        (folder / "xmls" / f"{stem}.xml").unlink()
    elif how == "size":
        write_png(image, np.zeros((70, 101, 3), np.uint8))


@pytest.mark.parametrize("how", ["image cut", "mask cut", "no mask", "no xml", "size"])
def test_bad_scene_is_listed_and_changes_nothing(tmp_path, how):
    made = make_dataset(tmp_path, train=["A"] * 4, test=())
    folder, stem = tmp_path / "train", "A_Airport_0_0_2"
    assert main([str(tmp_path), "-s", "32", "-n", "1"]) == 0
    damage(folder, stem, how)
    before = tree(tmp_path)

    result = command(tmp_path, "-s", 40, "-n", 1)
    assert result.returncode == 1
    assert f"{stem}" in result.stderr
    assert "Traceback" not in result.stderr
    kept = {name: data for name, data in tree(tmp_path).items() if ".tiling" not in name}
    assert kept == before

    assert main([str(tmp_path), "-s", "40", "-n", "1", "--skip-bad"]) == 0
    _, tiles = check_tiles(folder, made, 40)
    assert {entry["scene"] for entry, *_ in tiles} == set(made) - {stem}
    yes = sum(positive(annotations) for _, annotations, *_ in tiles)
    assert len(tiles) - yes == int(0.1 * yes)


def test_nothing_readable_is_a_sentence(tmp_path):
    make_scene(tmp_path, "s")
    (tmp_path / "xmls" / "s.xml").unlink()
    result = command(tmp_path, "--skip-bad", "-n", 1)
    assert result.returncode == 2
    assert "none of the 1 scenes" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("nowhere", "there is no folder"),
        ("empty", "there are no scenes in"),
        ("data/train/images", "part of the scenes"),
        ("data/train/images_tiled", "holds tiles already"),
        ("tiled", "holds tiles already"),
        ("hollow", r"there is no scene \(\*.png\)"),
        ("data/train/xmls/A_Airport_0_0_0.xml", "there is no folder"),
    ],
)
def test_user_mistakes_about_folders(tmp_path, path, sentence):
    make_dataset(tmp_path / "data", train=["A"], test=(), width=40, height=40)
    for name in ("empty", "tiled/images_tiled", "data/train/images_tiled", "hollow/train/images"):
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(UserError, match=sentence):
        main([str(tmp_path / path), "-n", "1"])
    assert not list(tmp_path.rglob(".tiling"))


@pytest.mark.parametrize(
    "flags",
    [["-s", "0"], ["-s", "-5"], ["-s", "99999"], ["-s", "x"], ["-n", "0"], ["--negatives", "-1"],
     ["--min-visible", "2"], ["--min-visible", "nan"], ["--attribute", "colour"],
     ["--png-level", "10"]],
)  # fmt: skip
def test_user_mistakes_about_numbers(tmp_path, flags):
    make_scene(tmp_path, "s")
    with pytest.raises(UserError, match=flags[0]):
        main([str(tmp_path), *flags])
    assert not list(tmp_path.rglob(".tiling"))


def test_output_in_the_way_is_a_sentence(tmp_path):
    make_scene(tmp_path / "data", "s")
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match="a file is there"):
        main([str(tmp_path / "data"), "-n", "1", "-o", str(tmp_path / "out")])


def test_two_runs_at_once_are_refused(tmp_path):
    import fcntl

    make_scene(tmp_path, "s")
    (tmp_path / ".tiling").mkdir()
    with (tmp_path / ".tiling" / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another run"):
            main([str(tmp_path), "-n", "1"])
    assert main([str(tmp_path), "-n", "1"]) == 0


def test_full_disk_is_a_sentence_and_the_old_tiles_stay(tmp_path):
    make_scene(tmp_path / "data", "s", width=700, height=700, count=30)
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        small = [tmp_path / "data", "-n", 1, "-o", disk, "-s", "128"]
        make_scene(tmp_path / "little", "s")
        assert command(tmp_path / "little", *small[1:]).returncode == 0
        before = tree(disk)
        result = command(*small)
        assert result.returncode == 2
        assert "No space left" in result.stderr
        assert str(disk) in result.stderr
        assert "Traceback" not in result.stderr
        kept = {name: data for name, data in tree(disk).items() if ".tiling" not in name}
        assert kept == before
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_help_shows_the_options():
    text = command("--help").stdout
    for flag in ("-s", "--tile-size", "-n", "--num-workers", "--negatives", "default: 512"):
        assert flag in text


def test_a_line_says_what_is_in_the_tiles_and_what_is_not(tmp_path, capsys):
    ids = np.zeros((64, 64), np.uint8)
    ids[:20, :20], ids[40:43, 40:43] = 1, 2  # the third is hidden
    make_scene(tmp_path, "A_Airport_0", ids=ids, count=3)
    make_scene(tmp_path, "A_Airport_1", ids=np.zeros((64, 64), np.uint8), count=0)
    assert main([str(tmp_path), "-s", "64", "-n", "1"]) == 0
    said = "1 of 2 scenes and 1 of 3 objects are in the tiles; scenes left out: 1 without aircraft"
    assert said in (line := capsys.readouterr().out.splitlines()[-1])
    assert "1 of fewer than 25 pixels" in line
    assert "1 hidden by others" in line


def test_a_validation_without_aircraft_is_refused_or_kept(tmp_path):
    make_dataset(tmp_path, train=["A", "A", "B"], test=(), width=40, height=40)
    empty = np.zeros((40, 40), np.uint8)
    make_scene(tmp_path / "train", "B_Airport_0_0_2", ids=empty, count=0)
    with pytest.raises(UserError, match=r"val' would have no tile.*100 keeps all"):
        main([str(tmp_path), "-s", "40", "-n", "1"])
    assert not (tmp_path / "train/instances_tiled.json").exists()
    assert main([str(tmp_path), "-s", "40", "-n", "1", "--negatives", "100"]) == 0
    assert len(read_tiles(tmp_path / "val")[1]) == 1


def test_tiles_of_a_coco_file_are_not_replaced(tmp_path):
    make_coco(tmp_path / "other")
    assert tile_coco(tile_args(tmp_path / "other", tmp_path / "data", "-s", "32")) == 0
    before = tree(tmp_path / "data/train")
    make_dataset(tmp_path / "scenes", train=["A"], test=(), width=40, height=40)
    with pytest.raises(UserError, match=r"holds tiles of .*instances\.json.*--output-dir"):
        main([str(tmp_path / "scenes"), "-o", str(tmp_path / "data"), "-n", "1"])
    assert tree(tmp_path / "data/train") == before
