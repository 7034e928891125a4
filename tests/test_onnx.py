"""A trained network as an ONNX file: the same numbers, and the same maps through inference.py."""

import importlib
import importlib.util
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers.commands import NETWORKS, ROOT, training
from helpers.scenes import decode, write_png
from PIL import Image

from benchmarks.lib.standins import narrow
from common.augment import MEAN, STD, normalise
from common.cli import UserError
from common.predict import onnx_file
from common.run import checkpoint, checkpoint_file
from mask.boxes import paste
from mask.model import from_outputs

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
SIDE = 64
needs_onnx = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, PACKAGES)),
    reason=f"{', '.join(PACKAGES)} are not installed",
)


@dataclass
class Exported:
    """A model's checkpoint and the file that its export.py made of it."""

    model: str
    checkpoint: Path
    file: Path

    def module(self, name):
        return importlib.import_module(f"{self.model}.{name}")


LONG = [pytest.param(model, marks=pytest.mark.long) for model in NETWORKS if model != "unet"]


@pytest.fixture(scope="module", params=["unet", *LONG])
def exported(request, few, tmp_path_factory):
    """Each model, narrow, after two steps whose average differs from the last weights."""
    root = tmp_path_factory.mktemp(request.param)
    made = Exported(request.param, root / "model_best.pth", root / "network.onnx")
    words = ["--max-steps", 2, "--lr", 0.001, "--warmup-steps", 0, "--ema", 0.5]
    with pytest.MonkeyPatch.context() as patch:
        narrow(patch.setattr)
        made.module("train").main(training(few, root, *words, model=made.model))
        if made.model != "mask":
            tell_two_classes_apart(made, few)
        words = [str(made.checkpoint), str(made.file), "--window", str(SIDE)]
        made.module("export").main(words + ["--max-detections", "20"] * (made.model == "mask"))
        yield made


def tell_two_classes_apart(made, few):
    """Shift the last layer's bias so that half of the pixels are aircraft, half are ground."""
    content = checkpoint.load(made.checkpoint)
    model = checkpoint.rebuild(content, made.module("model").from_checkpoint).eval()
    with torch.inference_mode():
        images = normalise(images_of(few, 4))
        ground, aircraft = made.module("model").probabilities(model, images).log().unbind(1)
    average = content["ema"]
    name = [key for key in average["sums"] if key.endswith("bias") and "aux" not in key][-1]
    average["sums"][name][0] += (aircraft - ground).median() * average["factors"]
    checkpoint_file.write(content, made.checkpoint)


def images_of(few, count):
    tiles = sorted((few / "train/images_tiled").glob("*.png"))[:count]
    return torch.stack(
        [torch.from_numpy(decode(tile)[:SIDE, :SIDE, ::-1].copy()) for tile in tiles]
    )


@needs_onnx
def test_the_file_computes_what_pytorch_does(exported, few):
    content = checkpoint.load(exported.checkpoint)
    model = checkpoint.rebuild(content, exported.module("model").from_checkpoint).eval()
    network, facts = onnx_file.open_network(exported.file.read_bytes())
    expected = {"model": exported.model, "classes": content["classes"], "mean": list(MEAN)}
    expected |= {"std": list(STD), "stride": 32, "window": SIDE, "look": None}
    expected |= {"max_detections": 20} if exported.model == "mask" else {}
    assert facts == expected
    for count in (1, 20):
        images = images_of(few, count)
        found = network(images)
        with torch.inference_mode():
            if exported.model != "mask":
                probabilities = exported.module("model").probabilities(model, normalise(images))
                # Logits up to a constant for each pixel.
                expected, logits = probabilities.log(), found[0].log()
                torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
                continue
            model.most_detections = 20
            predicted = exported.module("model").predict(model, normalise(images).contiguous())
        assert [len(values) for values in found] == [count] * len(found)
        for ours, theirs in zip(from_outputs(*found, size=SIDE), predicted, strict=True):
            assert len(theirs["scores"]) > 2
            assert torch.equal(ours["labels"], theirs["labels"])
            torch.testing.assert_close(ours["scores"], theirs["scores"], rtol=0, atol=1e-4)
            torch.testing.assert_close(ours["boxes"], theirs["boxes"], rtol=0, atol=1e-2)
            assert (ours["masks"] != theirs["masks"]).float().mean() < 1e-3


@needs_onnx
def test_inference_writes_the_same_with_either_file(exported, few, tmp_path, capsys):
    scenes = tmp_path / "scenes"
    scene = decode(sorted((few / "test/images").glob("*.png"))[0])[:100, :150, ::-1]
    write_png(scenes / "large.png", scene)
    write_png(scenes / "small.png", scene[:40, :50])
    reports = {}
    for file, more in ((exported.checkpoint, ["--window", SIDE]), (exported.file, [])):
        words = [file, scenes, tmp_path / file.suffix, *more, "--device", "cpu", "--min-area", 0]
        words += ["--score-threshold", 0] if exported.model == "mask" else ["--tta"]
        words += ["--max-detections", 20] if exported.model == "mask" and more else []
        exported.module("inference").main(list(map(str, words)))
        reports[file.suffix] = json.loads((tmp_path / file.suffix / "predictions.json").read_text())
    said = capsys.readouterr().out
    assert "'model_best.pth': device cpu" in said
    assert "'network.onnx': onnxruntime" in said
    theirs, ours = reports.values()
    assert [image.keys() for image in ours["images"]] == [i.keys() for i in theirs["images"]]
    if exported.model == "mask":
        assert len(ours["annotations"]) == len(theirs["annotations"]) > 2
        for one, other in zip(ours["annotations"], theirs["annotations"], strict=True):
            assert one["category_id"] == other["category_id"]
            assert one["score"] == pytest.approx(other["score"], abs=2e-4)
            assert one["area"] == pytest.approx(other["area"], rel=0.01, abs=2)
        return
    assert ours["classes"] == theirs["classes"]
    for image in ours["images"]:
        both = [decode(tmp_path / suffix / image["mask"]) for suffix in reports]
        assert (both[0] != both[1]).mean() < 1e-3
    areas = [[sum(r["area"] for r in i["regions"]) for i in r["images"]] for r in reports.values()]
    np.testing.assert_allclose(*areas, atol=5)


@needs_onnx
def test_what_does_not_fit_an_onnx_file_is_answered_in_one_sentence(exported, tmp_path):
    main, out = exported.module("inference").main, str(tmp_path / "out")
    other = "fcn" if exported.model != "fcn" else "unet"
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(exported.file.read_bytes()[:-1000])
    mistakes = [
        ([exported.file, "--amp", "--compile"], "--amp --compile cannot be used with an .onnx"),
        ([exported.file, "--channels-last"], "--channels-last cannot be used"),
        ([exported.file, "--device", "cuda"], "--device cuda cannot be used"),
        ([exported.file, "--window", 128], f"was exported for {SIDE}; leave it out"),
        ([exported.file, "--window", 512], f"was exported for {SIDE}; leave it out"),
        ([damaged], "is damaged or was not written by export.py"),
        ([tmp_path / "none.onnx"], "there is no file or folder"),
    ]
    if exported.model == "mask":
        mistakes.append(([exported.file, "--max-detections", 100], "was exported for 20"))
    for (file, *more), sentence in mistakes:
        with pytest.raises(UserError) as caught:
            main(list(map(str, [file, tmp_path, out, *more])))
        assert sentence in str(caught.value)
    with pytest.raises(UserError, match=rf"holds a {exported.model} model, and this is {other}"):
        importlib.import_module(f"{other}.inference").main([str(exported.file), ".", out])
    assert not Path(out).exists()


@needs_onnx
def test_a_failed_export_leaves_what_was_there(trained, tmp_path, monkeypatch):
    from unet import export

    def fail(*_, **__):
        raise torch.onnx.OnnxExporterError("no such operator")

    monkeypatch.setattr(torch.onnx, "export", fail)
    (tmp_path / "a.onnx").write_bytes(b"before")
    model = str(trained / "model_best.pth")
    for output, sentence in (
        ("a.onnx", "cannot export this network to ONNX: no such operator"),
        ("a.pb", r"ends neither in \.onnx nor in \.pth"),
        ("nowhere/a.onnx", "there is no folder"),
    ):
        with pytest.raises(UserError, match=sentence):
            export.main([model, str(tmp_path / output)])
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"before"]


@needs_onnx
def test_a_network_for_one_number_of_windows_is_refused():
    with pytest.raises(UserError, match="for any number of windows"):
        onnx_file.to_onnx(torch.nn.Identity(), lambda _, x: x * len(x), ("y",), 32, {})


def test_missing_packages_are_named_with_the_command_that_installs_them(tmp_path, monkeypatch):
    from unet import export, inference

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    file = tmp_path / "a.onnx"
    file.touch()
    with pytest.raises(UserError, match="`python -m pip install onnx onnxscript`"):
        export.main([str(file), str(file)])
    with pytest.raises(UserError, match="`python -m pip install onnxruntime`"):
        inference.main([str(file), str(tmp_path), str(tmp_path / "out")])


def test_weights_alone_are_half_the_size_and_predict_the_same(exported, few, tmp_path):
    """The averaged weights, in half precision; nothing of the machine that trained them."""
    name = exported.model
    small = tmp_path / "small.pth"
    exported.module("export").main([str(exported.checkpoint), str(small)])
    whole = checkpoint.load(exported.checkpoint, name)
    assert (
        small.stat().st_size
        < 0.55 * sum(w.numel() * w.element_size() for w in whole["model"].values()) + 100_000
    )
    assert str(few).encode() not in small.read_bytes()
    models = [
        checkpoint.rebuild(checkpoint.load(path, name), exported.module("model").from_checkpoint)
        for path in (exported.checkpoint, small)
    ]
    weights, halved = (model.state_dict() for model in models)
    for key, value in weights.items():
        assert halved[key].dtype == value.dtype
        assert torch.equal(halved[key], value.half().to(value.dtype)), key
    assert any(not torch.equal(whole["model"][k], v) for k, v in weights.items())  # the average
    inference = exported.module("inference")
    tile = min((few / "train/images_tiled").glob("*.png"))
    inference.main([str(small), str(tile), str(tmp_path / "found"), "--window", "64"])
    assert (tmp_path / "found/predictions.json").is_file()


def test_weights_alone_can_be_trained_on_but_not_resumed(exported, few, tmp_path):
    small = tmp_path / "small.pth"
    exported.module("export").main([str(exported.checkpoint), str(small)])
    train = exported.module("train").main
    words = training(few, tmp_path / "run", "--max-steps", 1, model=exported.model)
    with pytest.MonkeyPatch.context() as patch:
        narrow(patch.setattr)
        with pytest.raises(UserError, match=r"weights alone; start from it with --init-from"):
            train([*words, "--resume", str(small)])
        train([*words, "--init-from", str(small), "--lr", "0"])
        started = checkpoint.load(tmp_path / "run/checkpoint.pth")["model"]
    stored = checkpoint.averaged(checkpoint.load(small))
    trained = [key for key in stored if key.endswith(("weight", "bias"))]
    assert all(torch.equal(started[key], stored[key]) for key in trained)


def readme_code():
    """The two Python blocks of the README about ONNX files, as written."""
    text = (ROOT / "common/predict/README.md").read_text().partition("## Without PyTorch: ONNX")[2]
    return re.findall(r"```python\n(.*?)```", text.partition("\n## ")[0], re.DOTALL)


@needs_onnx
@pytest.mark.parametrize("size", [(150, 260), (40, 64), (64, 64)])
def test_the_lines_of_the_readme_predict_what_inference_predicts(
    exported, few, tmp_path, monkeypatch, size
):
    """Scenes that are larger than a window in one or two directions, smaller, or as large."""
    if exported.model == "mask":
        pytest.skip("its lines have a test of their own")
    tile = Image.open(min((few / "train/images_tiled").glob("*.png")))
    tile.resize(size[::-1]).save(tmp_path / "scene.png")
    shutil.copy(exported.file, tmp_path / "unet.onnx")
    monkeypatch.chdir(tmp_path)
    exported.module("inference").main(["unet.onnx", "scene.png", "maps"])
    names: dict = {}
    exec(readme_code()[0], names)
    expected = np.asarray(Image.open(tmp_path / "maps/scene_mask.png"))
    assert names["mask"].shape == size
    assert len(np.unique(expected)) == 2
    assert (names["mask"] == expected).mean() > 0.999


def test_the_lines_of_the_readme_paste_masks_as_the_network_does():
    """A stand-in for onnxruntime's session returns boxes within and beyond the window."""
    rng = np.random.default_rng(0)
    corners = rng.uniform(-8, 100, (1, 30, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(1, 60, (1, 30, 2))], 2)
    masks = cv2.GaussianBlur(rng.random((28, 28, 30)), (0, 0), 3).transpose(2, 0, 1)[None]
    masks, boxes = masks.astype(np.float32), boxes.astype(np.float32)
    exists = np.arange(30)[None] < 25

    class Session:
        def run(self, outputs, inputs):
            assert inputs["images"].shape == (1, 96, 96, 3)
            return boxes, None, None, masks, exists

    names = {"np": np, "side": 96, "session": Session(), "window": np.zeros((96, 96, 3), np.uint8)}
    exec(readme_code()[1], names)
    expected = paste(torch.from_numpy(masks[0, :25]), torch.from_numpy(boxes[0, :25]), (96, 96))
    assert len(names["aircraft"]) == 25
    assert expected.any()
    assert (np.stack(names["aircraft"]) == expected.numpy()).mean() > 0.9999
