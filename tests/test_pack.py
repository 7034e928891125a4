"""Packed tiles: the same batches as PNGs, the same bytes for any number of workers, never stale."""

import json
import pickle
import random
import shutil
import time
from collections import namedtuple

import numpy as np
import pytest
import torch
from helpers.coco import make_coco, tile_args
from helpers.commands import ROOT, run_script, training
from helpers.scenes import make_dataset, make_scene, tree
from helpers.tiling import kill, start_and_wait

from common.cli import UserError
from common.data import Tiles
from common.distributed import Process
from common.io.tiles import PACKED, Packed, Pngs
from common.loader import scoring_loader
from preprocessing import coco
from preprocessing.preprocess import main
from unet import train

SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def packed(tiled, tmp_path_factory):
    """`tiled` made again with `--pack`. Do not write into it."""
    root = tmp_path_factory.mktemp("packed")
    assert main([str(tiled), "-s", "128", "-n", "1", "--pack", "-o", str(root)]) == 0
    return root


@pytest.fixture
def packed_copy(packed, tmp_path):
    """A copy of `packed` that a test may damage."""
    return shutil.copytree(packed, tmp_path / "packed")


@pytest.fixture
def wide(tmp_path):
    """Two tiles, a 16-bit one and an 8-bit one, both with ignored pixels."""
    ids = np.zeros((96, 192), np.uint16)
    blocks = np.arange(1, 16 * 18 + 1, dtype=np.uint16).reshape(16, 18)
    ids[:, :108] = np.kron(blocks, np.ones((6, 6), np.uint16))
    ids[:, 180:] = 1  # most of aircraft 1: its block in the first tile is a fragment
    ids[:2, 150:152] = 2  # a fragment in the second tile
    make_scene(tmp_path / "wide", "A_Airport_0", ids=ids, count=288)
    args = [str(tmp_path / "wide"), "-s", "96", "-n", "1", "--min-visible", "0.2", "--pack"]
    assert main(args) == 0
    return tmp_path / "wide"


def without_png(folder):
    for name in ("images_tiled", "masks_tiled"):
        shutil.rmtree(folder / name)


def both_forms(folder, tmp_path):
    """Tiles of a packed split without its PNGs, and of the same split without its pack."""
    pair = [shutil.copytree(folder, tmp_path / name / "train") for name in ("arrays", "pngs")]
    without_png(pair[0])
    for name in PACKED:
        (pair[1] / name).unlink()
    arrays, pngs = map(Tiles, pair)
    assert isinstance(arrays.stored, Packed)
    assert isinstance(pngs.stored, Pngs)
    return arrays, pngs


def assert_same(batch, other):
    for found, expected in zip(batch, other, strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["packed", "wide"])
def test_both_forms_give_the_same_batches(request, tmp_path, name):
    root = request.getfixturevalue(name)
    arrays, pngs = both_forms(root / "train" if name == "packed" else root, tmp_path)
    assert len(arrays) == len(pngs)
    some = random.Random(0).choices(range(len(arrays)), k=9)  # some of them twice
    batch = arrays.__getitems__(some)
    assert_same(batch, pngs.__getitems__(some))
    assert batch.tile.tolist() == some
    assert batch.images.shape == (9, arrays.size, arrays.size, 3)
    everything = list(range(len(arrays)))
    assert_same(arrays.__getitems__(everything), pngs.__getitems__(everything))
    assert_same(arrays[1], pngs[1])
    with pytest.raises(IndexError):
        arrays[len(arrays)]
    assert len(pickle.dumps(arrays)) < arrays.stored.arrays[0].nbytes / 2


def test_sixteen_bits_throughout_where_one_tile_needs_them(wide):
    tiles = Tiles(wide)
    assert tiles.stored.arrays[1].dtype == np.uint16
    ids = tiles.__getitems__([0, 1]).ids
    assert ids.dtype == torch.int32
    for tile in ids:
        assert tile.max() == 65535
    assert not (ids[1] == 255).any()


def test_loader_processes_give_the_same_batches_in_shared_memory(packed):
    tiles = Tiles(packed / "train")
    process = Process(0, 1, torch.device("cpu"))
    alone = list(scoring_loader(tiles, 4, 0, process))
    shared = list(scoring_loader(tiles, 4, 2, process))
    assert len(alone) == len(shared) == -(-len(tiles) // 4)
    for batch, other in zip(alone, shared, strict=True):
        assert_same(batch, other)
        assert other.images.is_shared()


def test_training_on_arrays_is_training_on_pngs(tiled, packed_copy, tmp_path):
    for split in SPLITS:
        without_png(packed_copy / split)
    logs = []
    for name, root in (("pngs", tiled), ("arrays", packed_copy)):
        output = tmp_path / name
        train.main(training(root, output, "--max-steps", 5))
        lines = map(json.loads, (output / "log.jsonl").read_text().splitlines())
        logs.append([(line["step"], line.get("loss"), line.get("mIoU")) for line in lines])
    assert logs[0] == logs[1]
    assert len(logs[0]) > 5


def test_same_bytes_for_any_number_of_processes(tiled, packed, tmp_path):
    assert main([str(tiled), "-s", "128", "-n", "2", "--pack", "-o", str(tmp_path)]) == 0
    assert tree(tmp_path) == tree(packed)
    assert len(Tiles(packed / "train")) > 16  # more than one chunk


def test_a_pack_leaves_the_other_outputs_as_they_are(tiled, packed):
    for split in SPLITS:
        found = tree(packed / split)
        assert [json.loads(found.pop(PACKED[2]))["tiles"]] == [len(Tiles(packed / split))]
        assert found.pop(PACKED[0])
        assert found.pop(PACKED[1])
        assert found.items() <= tree(tiled / split).items()


def test_killed_run_is_continued_to_the_same_bytes(tmp_path):
    make_dataset(tmp_path / "data", train=["A"] * 12, test=(), width=300, height=200, count=9)
    args = [tmp_path / "data", "-s", "48", "-n", "2", "--pack", "-o"]
    start = time.monotonic()
    clean = run_script(ROOT / "preprocessing/preprocess.py", *args, "clean", cwd=tmp_path)
    took = time.monotonic() - start
    assert clean.returncode == 0, clean.stderr
    out = tmp_path / "out"
    # Once when the arrays have been started, once at a random moment.
    for pattern, wait in ((PACKED[0], 0), ("lock", random.uniform(0, took))):
        process = start_and_wait([*args, out], out / "train" / ".tiling", pattern, 1)
        time.sleep(wait)
        kill(process)
    assert main([str(word) for word in [*args, out]]) == 0
    assert tree(out) == tree(tmp_path / "clean")


def test_a_run_without_pack_removes_an_older_one(tmp_path):
    make_scene(tmp_path, "s", width=200, height=150)
    args = [str(tmp_path), "-s", "64", "-n", "1"]
    assert main(args) == 0
    before = tree(tmp_path)
    assert main([*args, "--pack"]) == 0
    assert isinstance(Tiles(tmp_path).stored, Packed)
    (tmp_path / ".tiling").mkdir()
    shutil.copy(tmp_path / PACKED[0], tmp_path / ".tiling")  # as a stopped run leaves it
    assert main(args) == 0
    assert tree(tmp_path) == before


def test_a_coco_dataset_can_be_packed(tmp_path):
    make_coco(tmp_path)
    out = tmp_path / "out"
    assert coco.main(tile_args(tmp_path, out, "-s", "32", "--pack")) == 0
    arrays, pngs = both_forms(out / "train", tmp_path)
    everything = list(range(len(arrays)))
    assert_same(arrays.__getitems__(everything), pngs.__getitems__(everything))


def damage(folder, what):
    images, masks, index = (folder / name for name in PACKED)
    match what:
        case "stale":
            file = folder / "instances_tiled.json"
            file.write_text(file.read_text() + "\n")
        case "garbled":
            index.write_text("{")
        case "missing":
            images.unlink()
        case "cut":
            masks.write_bytes(masks.read_bytes()[:-1])
        case "empty":
            images.write_bytes(b"")
        case "other shape":
            np.save(masks, np.zeros((3, 128, 128), np.uint8))


@pytest.mark.parametrize(
    ("what", "name", "sentence"),
    [
        ("stale", PACKED[2], "does not fit"),
        ("garbled", PACKED[2], "does not fit"),
        ("missing", PACKED[0], "is not there"),
        ("cut", PACKED[1], "is cut short"),
        ("empty", PACKED[0], "is cut short"),
        ("other shape", PACKED[1], "holds uint8"),
    ],
)
def test_a_pack_that_does_not_fit_is_named_in_one_sentence(packed_copy, what, name, sentence):
    folder = packed_copy / "train"
    damage(folder, what)
    with pytest.raises(UserError, match=sentence) as caught:
        Tiles(folder)
    assert str(caught.value).startswith(f"'{folder / name}'")
    assert "again with --pack, or delete packed.json to read the PNGs" in str(caught.value)
    assert "\n" not in str(caught.value)
    (folder / PACKED[2]).unlink()
    assert isinstance(Tiles(folder).stored, Pngs)


def test_a_disk_too_full_is_found_before_the_arrays_are_begun(tmp_path, monkeypatch):
    make_scene(tmp_path, "s", width=200, height=150)
    args = [str(tmp_path), "-s", "64", "-n", "1", "--negatives", "1000"]
    assert main(args) == 0
    before = tree(tmp_path)
    needed = 12 * 64 * 64 * 4
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, needed - 1))
    with pytest.raises(UserError, match=rf"needs {needed:,} bytes .* has {needed - 1:,} free"):
        main([*args, "--pack"])
    found = tree(tmp_path)
    assert not any(name.endswith(".npy") for name in found)
    assert {name: data for name, data in found.items() if ".tiling" not in name} == before
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, needed))
    assert main([*args, "--pack"]) == 0
