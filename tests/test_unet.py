"""UNet through its commands: train, score, resume, predict."""

import json
import os
import shutil
import subprocess

import cv2
import numpy as np
import pytest
import rasterio
import torch
from helpers.commands import ENCODER, ROOT, TORCHRUN, losses, run_forked, run_script, training
from helpers.scenes import decode

from common.cli import UserError
from common.data import Tiles
from common.io.tiles import IGNORE
from common.run import checkpoint, checkpoint_file
from unet import inference, train
from unet.model import DECODER, build_model, from_checkpoint, loss_fn, predict


def test_training_leaves_a_run_that_can_be_read(trained):
    found = {path.name for path in trained.iterdir()}
    written = {"checkpoint.pth", "checkpoint.previous.pth", "model_best.pth", "log.jsonl"}
    written |= {"curves.png", "val_sheet.jpg", "val_tiles.json", "run.json", "report.html"}
    assert found == written | {".lock"}
    assert len(losses(trained)) == 8
    content = checkpoint.load(trained / "checkpoint.pth", "unet")
    assert content["step"] == 8
    assert content["scores"]["mIoU"] <= content["best"] <= 1
    assert not any(name.startswith(("module.", "_orig_mod.")) for name in content["model"])
    assert decode(trained / "curves.png").std() > 5


def test_the_weights_of_the_repository_find_aircraft(tiled, tmp_path):
    weights = shutil.copy(ROOT / "assets/weights/unet.pth", tmp_path)
    train.main(["--data-path", str(tiled), "--test-only", "--resume", str(weights), "-j", "0"])
    scores = json.loads((tmp_path / "test_scores.json").read_text())
    assert scores["IoU.aircraft"] > 0.4
    image = min((tiled / "test/images").iterdir())
    inference.main([str(weights), str(image), str(tmp_path / "maps"), "--device", "cpu"])
    found = json.loads((tmp_path / "maps/predictions.json").read_text())
    assert found["classes"] == ["ground", "aircraft"]


def test_the_weights_change_and_the_loss_falls(tiled, tmp_path):
    output = tmp_path / "run"
    words = ["--max-steps", 40, "--lr", "3e-3", "--eval-freq", 99]
    train.main(training(tiled, output, *words))
    found = losses(output)
    assert np.mean(found[-8:]) < 0.8 * np.mean(found[:4])
    torch.manual_seed(0)
    fresh = build_model(ENCODER, 2).state_dict()
    content = checkpoint.load(output / "checkpoint.pth")
    still = [n for n, w in content["model"].items() if n.endswith("weight") and w.equal(fresh[n])]
    assert still == []


def test_no_secret_of_the_environment_is_written(tiled, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "CANARY")
    train.main(training(tiled, tmp_path, "--max-steps", 1))
    assert "CANARY" not in "".join(capfd.readouterr())
    assert not any(b"CANARY" in p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())


def test_scoring_a_split_writes_scores_and_a_sheet(tiled, trained, tmp_path, capsys):
    folder = shutil.copytree(trained, tmp_path / "run")
    words = ["--data-path", str(tiled), "--resume", str(folder / "checkpoint.pth"), "-b", "4"]
    train.main([*words, "--test-only", "-j", "0", "--device", "cpu"])
    scores = json.loads((folder / "test_scores.json").read_text())
    assert set(scores) >= {"mIoU", "IoU.ground", "pixel_accuracy"}
    assert f"mIoU {scores['mIoU']:.4f}" in capsys.readouterr().out
    assert decode(folder / "test_sheet.jpg").shape[1] == 4 * (320 + 8)
    train.main([*words, "--test-only", "val", "-j", "0", "--device", "cpu"])
    saved = checkpoint.load(folder / "checkpoint.pth")["scores"]
    assert json.loads((folder / "val_scores.json").read_text()) == pytest.approx(saved)


def test_validation_every_so_many_steps_on_some_of_the_tiles(tiled, tmp_path):
    chosen = ["--max-steps", 11, "--eval-steps", 3, "--eval-tiles", 4]
    train.main(training(tiled, tmp_path / "run", *chosen))
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    scores = [line for line in log if "mIoU" in line]
    steps = [line["step"] for line in scores]
    assert steps == [3, 6, 9, 11]
    of_epoch = len(Tiles(tiled / "train")) // 4
    assert [line["epoch"] for line in scores] == [(step - 1) // of_epoch for step in steps]
    assert decode(tmp_path / "run/val_sheet.jpg").shape[1] == 4 * (320 + 8)
    saved = checkpoint.load(tmp_path / "run/checkpoint.pth")
    assert (saved["epoch"], saved["scored_at"]) == (10 // of_epoch, 11)
    assert saved["seen"] == 4 * (11 - saved["epoch"] * of_epoch)


def test_without_validation_tiles_the_last_state_is_the_best(tiled_copy, tmp_path, capsys):
    shutil.rmtree(tiled_copy / "val")
    train.main(training(tiled_copy, tmp_path / "run", "--max-steps", 2))
    assert "model_best.pth is the last state" in capsys.readouterr().out
    best, latest = (tmp_path / "run" / name for name in ("model_best.pth", "checkpoint.pth"))
    weights = [checkpoint_file.digest(checkpoint.load(path)["model"]) for path in (best, latest)]
    assert weights[0] == weights[1]


def test_a_decoder_of_another_width_is_trained_and_used(tiled, tmp_path):
    width = ["--decoder-channels", 32, 16, 16, 8, 8]
    train.main(training(tiled, tmp_path / "run", "--max-steps", 1, *width))
    model = from_checkpoint(checkpoint.load(tmp_path / "run/checkpoint.pth"))
    assert [block.conv1[0].out_channels for block in model.decoder.blocks] == [32, 16, 16, 8, 8]
    with pytest.raises(UserError, match="--decoder-channels: expected 5 arguments"):
        train.main(training(tiled, tmp_path / "other", *width[:3]))


def test_layout_and_precision_change_the_speed_and_not_what_is_learnt(few, tmp_path):
    found, words = {}, ["--max-steps", 3, "--norm", "group", "--crop-size", 32]
    # In the narrow decoder of the other tests fp16's first gradients overflow: steps are skipped.
    words += ["--decoder-channels", *DECODER]
    for name, flags in {
        "plain": [],
        "channels-last": ["--channels-last"],
        "bf16": ["--amp", "--amp-dtype", "bf16"],
        "fp16": ["--amp", "--amp-dtype", "fp16"],
    }.items():
        output = tmp_path / name
        train.main(training(few, output, *words, *flags))
        found[name] = losses(output)
    # The same function up to rounding; later steps multiply a difference in rounding.
    assert found["channels-last"][0] == pytest.approx(found["plain"][0], rel=1e-5)
    np.testing.assert_allclose(found["channels-last"], found["plain"], rtol=0.01)
    np.testing.assert_allclose(found["bf16"], found["plain"], rtol=0.05)
    np.testing.assert_allclose(found["fp16"], found["plain"], rtol=0.05)
    assert found["bf16"] != found["plain"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("flags", [[], ["--channels-last"], ["--amp", "--channels-last"]])
def test_a_gpu_learns_what_the_cpu_does(tiled, tmp_path, flags):
    found = {}
    for device in ("cpu", "cuda"):
        words = ["--max-steps", 6, "--norm", "group", *flags, "--device", device]
        train.main(training(tiled, tmp_path / device, *words))
        found[device] = losses(tmp_path / device)
    np.testing.assert_allclose(found["cuda"], found["cpu"], rtol=0.05)


def test_two_processes_learn_what_one_does_with_the_same_global_batch(tiled, tmp_path):
    """GroupNorm: BatchNorm would use each process's own tiles, which is another model."""
    base = ["--max-steps", 5, "--norm", "group", "--eval-freq", 99]
    train.main(training(tiled, tmp_path / "one", *base))
    words = training(tiled, "two", *base, "-b", 2)
    two = run_script(ROOT / "unet/train.py", *words, cwd=tmp_path, launcher=TORCHRUN)
    assert two.returncode == 0, two.stderr
    assert "world size 2" in two.stdout
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=2e-4)
    a = checkpoint.load(tmp_path / "one/checkpoint.pth")
    b = checkpoint.load(tmp_path / "two/checkpoint.pth")
    assert a["scores"]["mIoU"] == pytest.approx(b["scores"]["mIoU"], abs=2e-3)


def test_the_loss_of_a_batch_is_the_mean_of_its_parts():
    torch.manual_seed(0)
    model = build_model(ENCODER, 3, norm="group")
    images = torch.randn(4, 3, 64, 64)
    targets = torch.randint(0, 3, (4, 64, 64))
    targets[0, :40] = IGNORE
    targets[1] = 0
    whole = loss_fn(model, images, targets)
    parts = [loss_fn(model, images[i : i + 1], targets[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(whole, torch.stack(parts).mean())
    nothing = loss_fn(model, images, torch.full_like(targets, IGNORE))
    assert nothing == 0
    nothing.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_better_predictions_lose_less():
    targets = torch.zeros(1, 64, 64, dtype=torch.long)
    targets[0, 20:30, 20:40] = 1

    def logits_of(mask):
        return lambda _: torch.stack([(mask == 0) * 8.0, (mask == 1) * 8.0], 1) - 4

    shifted = targets.roll(5, 2)
    images = torch.zeros(1, 3, 64, 64)
    right, near, none = (
        loss_fn(logits_of(m), images, targets) for m in (targets, shifted, targets * 0)
    )
    assert right < near < none
    assert right < 0.02


def test_prediction_of_a_folder(trained, tiled, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    scene = sorted((tiled / "test/images").iterdir())[0]
    shutil.copy(scene, images / "scene.png")
    cv2.imwrite(str(images / "small.jpg"), rng.integers(0, 255, (50, 70, 3), np.uint8))
    cv2.imwrite(str(images / "small.png"), rng.integers(0, 255, (130, 45, 3), np.uint8))
    (images / "notes.txt").write_text("no image")
    target = tmp_path / "out"
    words = [str(trained / "checkpoint.pth"), str(images), str(target), "--device", "cpu"]
    inference.main([*words, "--window", "64"])
    report = json.loads((target / "predictions.json").read_text())
    assert [entry["image"] for entry in report["images"]] == ["scene.png", "small.jpg", "small.png"]
    for entry in report["images"]:
        mask = decode(target / entry["mask"])
        # A palette image: cv2 expands it to colours, so only the shape is checked.
        assert mask.shape[:2] == (entry["height"], entry["width"])
        assert decode(target / entry["overlay"]).shape == (entry["height"], entry["width"], 3)
        for region in entry["regions"]:
            x, y, w, h = region["bbox"]
            assert 0 <= x < x + w <= entry["width"]
            assert 16 <= region["area"] <= w * h
            assert y + h <= entry["height"]
            assert 0.5 <= region["score"] <= 1
    inference.main([*words[:2], str(tmp_path / "one"), *words[3:], "-i", "2", "--window", "64"])
    one = json.loads((tmp_path / "one" / "predictions.json").read_text())
    assert [entry["image"] for entry in one["images"]] == ["small.png"]


@pytest.mark.parametrize(
    ("flags", "tolerance"),
    [
        (["--no-channels-last", "-b", "1"], 1e-4),
        (["--amp", "--amp-dtype", "bf16"], 0.15),
        (["--compile"], 1e-4),
        (["--tta"], None),
    ],
)
def test_speed_ups_change_the_time_and_not_the_prediction(
    trained, tiled, tmp_path, monkeypatch, flags, tolerance
):
    compile_, compiled = torch.compile, []
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(
        torch,
        "compile",  # traced only; compiling the code takes a minute
        lambda predict: compiled.append(1) or compile_(predict, backend="aot_eager"),
    )
    maps = []
    for target, more in (("plain", []), ("fast", flags)):
        words = [
            str(trained / "checkpoint.pth"),
            str(tiled / "test/images"),
            str(tmp_path / target),
        ]
        words += ["-i", "0", "--device", "cpu", "--window", "64", "--confidence", *more]
        inference.main(words)
        (path,) = (tmp_path / target).glob("*_confidence.tif")
        with rasterio.open(path) as file:
            maps.append(file.read(1))
    assert bool(compiled) == ("--compile" in flags)
    if tolerance:
        np.testing.assert_allclose(*maps, atol=tolerance)
    assert compiled or not np.array_equal(*maps)


def test_predict_gives_class_ids():
    model = build_model(ENCODER, 4).eval()
    found = predict(model, torch.randn(2, 3, 64, 96))
    assert found.shape == (2, 64, 96)
    assert found.dtype == torch.uint8
    assert found.max() < 4


def test_weights_of_an_earlier_run_start_the_encoder(trained, tmp_path):
    content = checkpoint.load(trained / "checkpoint.pth")
    model = build_model(ENCODER, 5, str(trained / "checkpoint.pth"))
    for name, weight in model.encoder.state_dict().items():
        assert torch.equal(weight, content["model"][f"encoder.{name}"])
    with pytest.raises(UserError, match="does not fit"):
        build_model("resnet34", 5, str(trained / "checkpoint.pth"))
    with pytest.raises(UserError, match="neither imagenet, none nor a file"):
        build_model(ENCODER, 5, str(tmp_path / "nothing.pth"))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--eopchs", "3"], "unknown option --eopchs; did you mean --epochs?"),
        (["--crop-size", "100"], "not a multiple of 32"),
        (["--crop-size", "256"], "larger than the tiles"),
        (["--amp-dtype", "bf16"], "add --amp"),
        (["--data-path", "nowhere"], "there is no folder 'nowhere/train'"),
        (["--resume", "nothing.pth"], "there is no checkpoint"),
        (["-b", "4000"], "lower --batch-size"),
        (["-b", "0"], "0 is not from 1 to"),
        (["--lr", "fast"], "invalid number value"),
        (["--encoder", "resnet999"], "not known"),
        (["--device", "cuda:7"], "GPU 7"),
        (["--device", "abacus"], "is not supported; use auto"),
        (["--test-only"], "add --resume"),
        (["--config", "nothing.yaml"], "cannot be read as YAML"),
    ],
)
def test_mistakes_are_answered_by_one_sentence(tiled, tmp_path, words, sentence):
    output = tmp_path / "run"
    with pytest.raises(UserError) as caught:
        train.main(training(tiled, output, "--max-steps", 1, *words))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (output / "checkpoint.pth").exists()


def test_a_finished_run_is_not_written_over(tiled, trained):
    before = checkpoint_file.digest(checkpoint.load(trained / "checkpoint.pth"))
    with pytest.raises(UserError, match="holds a run already"):
        train.main(training(tiled, trained))
    assert checkpoint_file.digest(checkpoint.load(trained / "checkpoint.pth")) == before


def test_config_file(tiled, tmp_path):
    config = tmp_path / "c.yaml"
    words = training(tiled, tmp_path / "r")
    config.write_text("max_steps: 1\nchannels-last: true\nlr: 5.0e-4\n")
    train.main([*words, "--config", str(config), "--lr", "7e-4"])
    args = checkpoint.load(tmp_path / "r" / "checkpoint.pth")["args"]
    assert (args["max_steps"], args["channels_last"], args["lr"]) == (1, True, 7e-4)
    config.write_text("chanels_last: true\n")
    with pytest.raises(UserError, match="unknown key chanels-last; did you mean channels-last"):
        train.main([*words, "--config", str(config)])


def test_the_scripts_answer_from_any_directory_without_a_traceback(tmp_path):
    for words in (
        (ROOT / "unet/train.py", "--data-path", "nowhere"),
        (ROOT / "unet/inference.py", "nothing.pth", ".", "out"),
    ):
        result = run_script(*words, cwd=tmp_path)
        assert result.returncode == 2
        assert result.stderr.startswith("error: ")
        assert len(result.stderr.strip().splitlines()) == 1
        assert list(tmp_path.iterdir()) == []


def test_prediction_mistakes(trained, tmp_path):
    model = str(trained / "checkpoint.pth")
    out = str(tmp_path / "out")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\4\0\0\0\4 no")
    for words, sentence in (
        ([model, str(tmp_path / "empty"), out], "holds no .png"),
        ([model, str(tmp_path / "none"), out], "there is no file or folder"),
        ([model, str(tmp_path / "bad"), out], "damaged or truncated"),
        ([model, str(tmp_path / "bad"), out, "-i", "3"], "images 0 to 0"),
        ([model, str(tmp_path / "bad"), out, "--window", "100"], "not a multiple of 32"),
        ([model, str(tmp_path / "bad"), out, "--amp-dtype", "bf16"], "add --amp"),
        ([model, str(tmp_path / "bad"), out + "\udcff"], "is not UTF-8"),
    ):
        with pytest.raises(UserError) as caught:
            inference.main([*words, "--device", "cpu"])
        assert sentence in str(caught.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_a_full_or_read_only_disk_ends_in_one_sentence_and_keeps_the_last_checkpoint(
    tiled, trained, tmp_path, fault
):
    disk = tmp_path / "disk"
    disk.mkdir()
    size = (trained / "checkpoint.pth").stat().st_size * 3 // 2
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this machine does not allow mounting")
    try:
        shutil.copy(trained / "checkpoint.pth", disk / "checkpoint.pth")
        if fault == "read-only":
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        words = training(tiled, disk, "--max-steps", 9, "--resume", disk / "checkpoint.pth")
        result = run_forked(ROOT / "unet/train.py", *words, cwd=tmp_path)
        assert result.returncode == 2, result.stderr
        assert result.stderr.splitlines()[-1].startswith("error: ")
        assert "Traceback" not in result.stderr
        assert checkpoint.load(disk / "checkpoint.pth")["step"] == 8
        assert not list(disk.glob(".*tmp"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)
