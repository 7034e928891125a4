"""Tiles, batches and targets: the content of the files reaches the device unchanged."""

import json
from contextlib import nullcontext
from itertools import chain
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from helpers.commands import training
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import default_collate

import unet.train
from common import loader
from common.cli import UserError
from common.data import Batch, Tiles, training_splits
from common.distributed import Process
from common.io.tiles import tile_paths
from common.loader import GlobalBatches, shard
from common.predict.score import scoring_split
from common.semantic import semantic_target
from mask.targets import instance_targets

CPU = torch.device("cpu")


def test_a_tile_is_what_its_files_hold(tiled):
    tiles = Tiles(tiled / "train")
    assert tiles.classes == ["ground", "aircraft"]
    for i in range(len(tiles)):
        tile = tiles[i]
        _, path = tile_paths(tiles.folder, tiles.images[i]["file_name"])
        mask = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_UNCHANGED)
        assert tile.images.shape == (128, 128, 3)
        assert tile.images.dtype == torch.uint8
        assert np.array_equal(tile.ids.numpy(), mask)
        target = semantic_target(default_collate([tile]))[0].numpy()
        assert np.array_equal(target == 255, mask == 255)
        assert np.array_equal(target == 1, (mask > 0) & (mask < 255))


def test_targets_follow_the_categories_of_the_coco_file(tiled_copy):
    index = tiled_copy / "train" / "instances_tiled.json"
    coco = json.loads(index.read_text())
    coco["categories"] = [{"id": 3, "name": "b"}, {"id": 7, "name": "a"}]
    for annotation in coco["annotations"]:
        annotation["category_id"] = 7 if annotation["instance"] % 2 else 3
    index.write_text(json.dumps(coco))
    tiles = Tiles(tiled_copy / "train")
    assert tiles.classes == ["ground", "b", "a"]
    batch = default_collate([tiles[i] for i in range(len(tiles))])
    target, ids = semantic_target(batch), batch.ids
    aircraft = (ids > 0) & (ids < 255)
    assert aircraft.any()
    assert torch.equal(target[aircraft], 1 + ids[aircraft].long() % 2)


def test_instances_are_those_of_the_coco_file(tiled):
    """Boxes, labels and masks from the id mask equal those that the tiling wrote."""
    tiles = Tiles(tiled / "train")
    coco = json.loads((tiled / "train/instances_tiled.json").read_text())
    targets = instance_targets(default_collate([tiles[i] for i in range(len(tiles))]))
    seen = []
    for image, boxes, labels, ids in zip(tiles.images, *targets[:3], strict=True):
        truth = [
            a for a in coco["annotations"] if a["image_id"] == image["id"] and not a["iscrowd"]
        ]
        truth.sort(key=lambda a: a["instance"])
        count = len(truth)
        expected = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in truth)]
        assert boxes[:count].tolist() == expected
        assert not boxes[count:].any()
        areas = [int((ids == place).sum()) for place in range(1, count + 1)]
        assert areas == [a["area"] for a in truth]
        assert labels.tolist() == [1] * count + [0] * (100 - count)
        seen.append(count)
    assert sum(seen) > 10
    assert 0 in seen


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(count=st.integers(1, 40))
def test_a_spread_of_a_set_is_made_of_its_tiles(tiled, count):
    tiles = Tiles(tiled / "train")
    part = tiles.spread(count)
    assert len(part) == min(count, len(tiles))
    names = [image["file_name"] for image in tiles.images]
    chosen = [names.index(image["file_name"]) for image in part.images]
    assert chosen == sorted(set(chosen))
    for tile, origin in zip(range(len(part)), chosen, strict=True):
        for name in ("images", "ids", "classes"):
            assert torch.equal(getattr(part[tile], name), getattr(tiles[origin], name))
        assert part.shows_aircraft(tile) == bool(tiles.instances[origin])


def test_more_than_254_aircraft_in_a_tile(tmp_path):
    """16-bit masks: no id equals the ignore value."""
    for folder in ("images_tiled", "masks_tiled"):
        (tmp_path / "train" / folder).mkdir(parents=True)
    ids = np.arange(400, dtype=np.uint16).reshape(20, 20)
    ids[0, 0] = 65535
    cv2.imwrite(str(tmp_path / "train/images_tiled/a.png"), np.zeros((20, 20, 3), np.uint8))
    cv2.imwrite(str(tmp_path / "train/masks_tiled/a_mask.png"), ids)
    coco = {
        "images": [{"id": 1, "file_name": "a.png", "width": 20, "height": 20}],
        "categories": [{"id": 1, "name": "aircraft"}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": 1, "instance": i, "iscrowd": 0}
            for i in range(1, 400)
        ],
    }
    (tmp_path / "train/instances_tiled.json").write_text(json.dumps(coco))
    tile = Tiles(tmp_path / "train")[0]
    assert tile.ids.max() == 65535
    target = semantic_target(default_collate([tile]))[0]
    assert target[0, 0] == 255
    assert (target.flatten()[1:] == 1).all()


@given(
    length=st.integers(1, 60),
    batch=st.integers(1, 4),
    world=st.integers(1, 4),
    epoch=st.integers(0, 5),
)
def test_a_step_takes_the_same_tiles_however_many_processes_share_it(length, batch, world, epoch):
    whole = batch * world
    if length < whole:
        with pytest.raises(UserError, match="lower --batch-size"):
            GlobalBatches(length, batch, Process(0, world, CPU), 3)
        return
    alone = GlobalBatches(length, whole, Process(0, 1, CPU), 3)
    alone.set_epoch(epoch)
    shares = [GlobalBatches(length, batch, Process(r, world, CPU), 3) for r in range(world)]
    for share in shares:
        share.set_epoch(epoch)
    joined = [list(chain(*parts)) for parts in zip(*shares, strict=True)]
    assert joined == list(alone)
    seen = list(chain(*joined))
    assert len(set(seen)) == len(seen) == length // whole * whole
    late = GlobalBatches(length, whole, Process(0, 1, CPU), 3)
    late.set_epoch(epoch, first_step=len(alone) // 2)
    assert list(late) == list(alone)[len(alone) // 2 :]


def test_epochs_and_seeds_differ():
    def order(seed, epoch):
        batches = GlobalBatches(64, 8, Process(0, 1, CPU), seed)
        batches.set_epoch(epoch)
        return list(batches)

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


@given(length=st.integers(0, 50), batch=st.integers(1, 7), world=st.integers(1, 5))
def test_an_evaluation_counts_every_tile_once(length, batch, world):
    shards = [shard(length, batch, Process(r, world, CPU)) for r in range(world)]
    seen = [i for shard in shards for part in shard for i in part]
    assert sorted(seen) == list(range(length))


def damage(tiled, what):
    train = tiled / "train"
    image = sorted((train / "images_tiled").iterdir())[0]
    mask = train / "masks_tiled" / f"{image.stem}_mask.png"
    match what:
        case "no mask":
            mask.unlink()
        case "truncated":
            image.write_bytes(image.read_bytes()[:2000])
        case "empty file":
            image.write_bytes(b"")
        case "other size":
            cv2.imwrite(str(mask), np.zeros((64, 128), np.uint8))
        case "out of range":
            cv2.imwrite(str(mask), np.full((128, 128), 200, np.uint8))
        case "colour mask":
            cv2.imwrite(str(mask), np.zeros((128, 128, 3), np.uint8))
        case "no tiles":
            index = json.loads((train / "instances_tiled.json").read_text())
            index["images"] = index["annotations"] = []
            (train / "instances_tiled.json").write_text(json.dumps(index))
        case "one name":
            index = json.loads((train / "instances_tiled.json").read_text())
            index["categories"].append({"id": 9, "name": "aircraft"})
            (train / "instances_tiled.json").write_text(json.dumps(index))
        case "no image of it":
            index = json.loads((train / "instances_tiled.json").read_text())
            index["annotations"][0]["image_id"] = -1
            (train / "instances_tiled.json").write_text(json.dumps(index))
        case "no index":
            (train / "instances_tiled.json").unlink()
        case "not COCO":
            (train / "instances_tiled.json").write_text('{"images": 3')


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("no mask", "_mask.png' is listed"),
        ("truncated", "damaged or truncated"),
        ("empty file", "is not a PNG"),
        ("other size", "128x64 pixels, but its labels are for 128x128"),
        ("out of range", "values above its"),
        ("colour mask", "3 channels"),
        ("no tiles", "lists no tiles"),
        ("one name", "two categories of one name"),
        ("no image of it", "not as preprocessing wrote it"),
        ("no index", "holds no tiles"),
        ("not COCO", "is not JSON"),
    ],
)
def test_bad_tiles_are_named_in_one_sentence(tiled_copy, what, sentence):
    damage(tiled_copy, what)
    with pytest.raises(UserError, match=sentence) as caught:
        list(Tiles(tiled_copy / "train"))
    assert str(tiled_copy) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_class_of_another_name_is_scored_if_it_is_the_only_one(tiled, capsys):
    assert scoring_split(tiled, "test", ["ground", "aircraft"]).classes == ["ground", "aircraft"]
    assert capsys.readouterr().out == ""
    assert scoring_split(tiled, "test", ["ground", "plane"]).classes == ["ground", "plane"]
    assert "'aircraft' of" in (said := capsys.readouterr().out)
    assert "is scored as 'plane'" in said
    with pytest.raises(UserError, match=r"--attribute \(preprocess\.py\).*--rename OLD=NEW"):
        scoring_split(tiled, "test", ["ground", "plane", "car"])


def test_what_is_missing_is_answered_with_both_commands(tiled):
    with pytest.raises(UserError, match=r"preprocess\.py .*coco\.py .* --as holdout"):
        scoring_split(tiled, "holdout", ["ground", "aircraft"])


def test_ids_that_no_tiling_writes_are_refused(tiled_copy):
    index = tiled_copy / "train/instances_tiled.json"
    coco = json.loads(index.read_text())
    coco["categories"].append({"id": "x", "name": "odd"})
    index.write_text(json.dumps(coco))
    with pytest.raises(UserError, match="not whole numbers"):
        Tiles(tiled_copy / "train")


def test_scenes_that_were_never_tiled(tmp_path):
    (tmp_path / "train" / "images").mkdir(parents=True)
    with pytest.raises(UserError, match=r"preprocess\.py .*"):
        Tiles(tmp_path / "train")
    with pytest.raises(UserError, match="there is no folder"):
        Tiles(tmp_path / "nowhere" / "train")


def own_set(root, count, name="aircraft", side=128):
    """A set of one tile with `count` aircraft of a pixel each, and some ignored pixels."""
    for folder in ("images_tiled", "masks_tiled"):
        (root / "train" / folder).mkdir(parents=True)
    ids = np.zeros((side, side), np.uint8 if count < 255 else np.uint16)
    ids.flat[: count + 1] = range(count + 1)
    ids[-1] = np.iinfo(ids.dtype).max
    pixels = np.random.default_rng(count).integers(0, 256, (side, side, 3), np.uint8)
    cv2.imwrite(str(root / "train/images_tiled/a.png"), pixels)
    cv2.imwrite(str(root / "train/masks_tiled/a_mask.png"), ids)
    coco = {
        "images": [{"id": 1, "file_name": "a.png", "width": side, "height": side, "scene": "a"}],
        "categories": [{"id": 5, "name": name}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": 5, "instance": i, "iscrowd": 0}
            for i in range(1, count + 1)
        ],
    }
    (root / "train/instances_tiled.json").write_text(json.dumps(coco))
    return root


@pytest.mark.parametrize("count", [0, 3, 254, 300])
def test_sets_that_are_joined_keep_each_tile(tiled, tmp_path, count):
    """Also if one of them has more aircraft in a tile than 8 bits can number."""
    other = own_set(tmp_path, count) / "train"
    sets = [Tiles(tiled / "train"), Tiles(other), Tiles(tiled / "test")]
    whole = Tiles(*(part.folder for part in sets))
    assert len(whole) == sum(map(len, sets))
    parts = [(part, i) for part in sets for i in range(len(part))]
    for (part, i), tile in zip(parts, (whole[k] for k in range(len(whole))), strict=True):
        alone = part[i]
        assert torch.equal(tile.images, alone.images)
        assert torch.equal(
            semantic_target(default_collate([tile])), semantic_target(default_collate([alone]))
        )
        ignored = alone.ids == part.ignore
        assert torch.equal(tile.ids[~ignored], alone.ids[~ignored].to(tile.ids.dtype))
        assert (tile.ids[ignored] == whole.ignore).all()
    assert whole.summary()["scenes"] == sum(part.summary()["scenes"] for part in sets)
    assert whole.fingerprint() == "+".join(part.fingerprint() for part in sets)


def test_sets_that_cannot_be_joined(tiled, tmp_path):
    with pytest.raises(UserError, match=r"has the classes \['aircraft'\] and .* has \['ship'\]"):
        Tiles(tiled / "train", own_set(tmp_path / "a", 2, "ship") / "train")
    with pytest.raises(UserError, match=r"several sizes, \[\(64, 64\), \(128, 128\)\]"):
        Tiles(tiled / "train", own_set(tmp_path / "b", 2, side=64) / "train")
    with pytest.raises(UserError, match="there is no folder"):
        training_splits(tiled, [str(tmp_path / "nowhere")])
    # What is validated on must not be trained on.
    (tmp_path / "c").mkdir()
    (tmp_path / "c/train").symlink_to(tiled / "val")
    with pytest.raises(UserError, match="the score would be too high"):
        training_splits(tiled, [str(tmp_path / "c")])
    train, val = training_splits(tiled, [str(own_set(tmp_path / "d", 2))])
    assert len(train) == len(Tiles(tiled / "train")) + 1
    assert len(val) == len(Tiles(tiled / "val"))


def test_a_training_needs_an_aircraft(tiled, tmp_path):
    """Tiles of ground alone are refused, but not beside tiles with aircraft."""
    empty = own_set(tmp_path, 0)
    with pytest.raises(UserError, match=r"no tile in .*train' shows an aircraft; tile scenes"):
        training_splits(empty)
    assert training_splits(tiled, [str(empty)])[0].labels


def test_a_training_on_several_folders(few, tmp_path, capsys):
    """Resuming with other folders is said. `test_resume.py` compares the bits."""
    config = tmp_path / "options.yaml"
    extra = [str(own_set(tmp_path / name, 3)) for name in ("one", "two")]
    config.write_text(json.dumps({"extra-data": extra}))
    unet.train.main(training(few, tmp_path / "run", "--max-steps", 1, "--config", config))
    facts = json.loads((tmp_path / "run/run.json").read_text())
    assert facts["data"]["train"]["tiles"] == len(Tiles(few / "train")) + 2
    assert facts["settings"]["extra_data"] == extra
    (tmp_path / "two").rename(tmp_path / "three")
    again = ("--max-steps", 2, "--resume", "--extra-data")
    unet.train.main(training(few, tmp_path / "run", *again, tmp_path / "one", tmp_path / "three"))
    assert "tiles have changed" not in capsys.readouterr().out
    unet.train.main(training(few, tmp_path / "run", *again, tmp_path / "one", "--max-steps", 3))
    assert "the training tiles have changed" in capsys.readouterr().out


def test_a_step_does_not_wait_for_the_batch_after_its_own(monkeypatch):
    """On a device, with streams that do nothing: a loader that is late delays one step, not two."""
    happened = []

    class Copied(Batch):
        def to(self, device):
            happened.append(f"copy {int(self.tile)}")
            return self

    def delivered(_batches):
        for i in range(3):
            happened.append(f"load {i}")
            yield Copied(*3 * [torch.zeros(1)], torch.tensor([i]))

    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(loader, "_delivered", delivered)
    monkeypatch.setattr(loader, "_copying", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    for batch in loader.prefetch([], torch.device("cuda")):
        happened.append(f"step {int(batch.tile)}")
    assert happened == [f"{what} {i}" for i in range(3) for what in ("load", "copy", "step")]
