"""Untrusted files: nothing hangs, crashes, fills the memory or ends in a traceback."""

import json
import os
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from helpers.rasters import pixels_of
from helpers.scenes import tree
from PIL import Image
from torture.coco_files import hostile_coco
from torture.contained import several
from torture.images import hostile_image
from torture.rasters import hostile_raster
from torture.xmls import hostile_xml

from common.cli import UserError
from common.io.files import temporary_name, whole_file, write_atomic
from preprocessing.outlines import run_lengths
from rareplanes.scene import instance_ids, read_xml
from unet import inference


def read_mask(path: Path):
    return instance_ids(path, (9, 9), [])


def loop(path: Path):
    path.symlink_to(path)


def endless(path: Path):
    path.symlink_to("/dev/zero")


def huge(path: Path):
    with path.open("wb") as file:
        file.truncate(3 << 30)  # sparse: takes no disk space


@pytest.mark.parametrize("read", [pixels_of, read_mask, read_xml])
@pytest.mark.parametrize("make", [os.mkfifo, loop, endless, huge, Path.mkdir])
def test_what_is_no_file_is_refused_at_once(tmp_path, make, read):
    path = tmp_path / "\x1b[2Ja.png"
    make(path)
    start = time.process_time()
    with pytest.raises(UserError) as error:
        read(path)
    assert time.process_time() - start < 10
    assert str(error.value).isprintable()


def progressive(scans):
    """A JPEG of 4 million pixels with its last scan repeated."""
    buffer = BytesIO()
    Image.new("RGB", (2000, 2000)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * scans + data[-2:]


@pytest.mark.parametrize(
    "data",
    [
        progressive(10_000),
        b"\xff\xd8\xff" + b"\xff" * 20_000_000,
        b"\xff\xd8" + b"\xff\xe0\0\0" * 5,
        b"\xff\xd8" + b"\xff\xe1\0\x12Exif\0\0++++++++++" * 800_000,
    ],
    ids=["scans", "fill bytes", "empty segments", "EXIF blocks"],
)
def test_jpegs_made_to_take_for_ever_are_refused_at_once(tmp_path, data):
    (tmp_path / "a.jpg").write_bytes(data)
    start = time.process_time()
    with pytest.raises(UserError, match=r"a\.jpg"):
        pixels_of(tmp_path / "a.jpg")
    assert time.process_time() - start < 200  # it would be hours
    (tmp_path / "a.jpg").write_bytes(progressive(0))
    assert not pixels_of(tmp_path / "a.jpg").any()


@pytest.mark.parametrize(
    "outline",
    [
        [np.tile([5, 130_000, 0, -130_000], 500).tolist()],
        [[0, 0, 130_000, 0, 0, 130_000]] * 500,
        {"size": [70, 100], "counts": "o" * 2_000_000},
    ],
    ids=["a long polygon", "many", "a number without end"],
)
def test_outlines_made_to_fill_the_memory_are_refused_at_once(outline):
    start = time.process_time()
    with pytest.raises(UserError, match="no outline"):
        run_lengths({"id": 1, "segmentation": outline}, (100, 70))
    assert time.process_time() - start < 10


def test_fuzzed_scene_descriptions(tmp_path):
    outcomes = several(hostile_xml, range(2_000), tmp_path)
    assert outcomes == {"read", "refused"}


def test_fuzzed_images(tmp_path):
    outcomes = several(hostile_image, range(1_000), tmp_path)
    assert {"flip refused", "chunk read", "pixels refused", "other refused"} <= outcomes


def test_fuzzed_rasters_and_labels(tmp_path):
    outcomes = several(hostile_raster, range(300), tmp_path)
    assert {"flip read", "flip refused", "number refused", "cut refused"} <= outcomes
    assert {"labels read", "labels refused"} <= outcomes


def test_fuzzed_coco_files(tmp_path):
    outcomes = several(hostile_coco, range(200, 500), tmp_path)
    assert outcomes == {"read", "refused"}


def test_images_that_cannot_be_read_are_named_and_the_others_predicted(tiled, trained, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    sound = min((tiled / "test" / "images").iterdir()).read_bytes()
    for name in ("a.png", "a.jpg", "a_png.png", "\x1b[2J\udcff\n.png"):
        (images / name).write_bytes(sound)
    (images / "cut.png").write_bytes(sound[:1000])
    os.mkfifo(images / "pipe.png")
    words = [str(trained / "model_best.pth"), str(images), str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"2 of 6 images .*cut\.png.*pipe\.png") as error:
        inference.main([*words, "--window", "64", "--device", "cpu"])
    assert str(error.value).isprintable()
    report = json.loads((tmp_path / "out" / "predictions.json").read_text())["images"]
    assert len(report) == len({entry["mask"] for entry in report}) == 4
    assert all((tmp_path / "out" / entry["mask"]).is_file() for entry in report)
    before = tree(images)
    with pytest.raises(UserError, match="another folder"):
        inference.main([*words[:2], str(images), "--device", "cpu"])
    assert tree(images) == before


def test_planted_links_are_replaced_and_never_followed(tmp_path):
    canary = tmp_path / "canary"
    canary.write_text("alive")
    target = tmp_path / "out.json"
    for planted in (target, temporary_name(target)):
        planted.symlink_to(canary)
    write_atomic(target, b"new")
    assert canary.read_text() == "alive"
    assert not target.is_symlink()
    assert target.read_bytes() == b"new"
    with pytest.raises(ZeroDivisionError), whole_file(target) as file:  # noqa: PT012
        file.write(b"half")
        _ = 1 / 0
    assert target.read_bytes() == b"new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["canary", "out.json"]
