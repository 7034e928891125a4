"""FCN and DeepLabV3 through their commands, and what the semantic models share."""

import importlib
import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from helpers.commands import ROOT, run_forked, training
from torch import nn
from torchvision.models import mobilenet_v3_large
from torture import children

from common.backbones import load_backbone
from common.cli import UserError, run
from common.distributed import check_equal, process_group
from common.io.tiles import IGNORE
from common.run import checkpoint
from common.semantic import segmentation_loss, two_head_loss
from DeepLabV3 import inference, train
from DeepLabV3.model import build_model, loss_fn, predict, probabilities


def deeplab_words(data, output, *more):
    return training(data, output, *more, model="DeepLabV3")


@pytest.fixture(scope="module")
def deeplab(tiled, tmp_path_factory):
    """The output folder of a short DeepLabV3 training."""
    output = tmp_path_factory.mktemp("deeplab") / "run"
    train.main(deeplab_words(tiled, output, "--max-steps", 9, "--clip-grad-norm", 1))
    return output


def test_a_run_can_be_read_scored_and_used(deeplab, tiled, tmp_path, capsys):
    assert {path.name for path in deeplab.iterdir()} >= {"checkpoint.pth", "curves.png"}
    model = str(deeplab / "checkpoint.pth")
    words = ["--data-path", str(tiled), "--test-only", "--resume", model, "-b", "4", "-j", "0"]
    train.main([*words, "--device", "cpu"])
    scores = json.loads((deeplab / "test_scores.json").read_text())
    assert f"mIoU {scores['mIoU']:.4f}" in capsys.readouterr().out
    inference.main([model, str(tiled / "test/images"), str(tmp_path), "-i", "0", "--device", "cpu"])
    report = json.loads((tmp_path / "predictions.json").read_text())
    assert len(report["images"]) == 1
    assert (tmp_path / report["images"][0]["overlay"]).stat().st_size > 1000


def test_a_resumed_run_keeps_its_step_and_its_options(deeplab, tiled, tmp_path):
    shutil.copytree(deeplab, tmp_path / "run")
    saved = tmp_path / "run/checkpoint.pth"
    train.main(deeplab_words(tiled, tmp_path / "run", "--resume", saved, "--max-steps", 11))
    content = checkpoint.load(saved, "DeepLabV3")
    assert content["step"] == 11
    assert content["optimizer"]["param_groups"][0]["fused"]


@pytest.mark.parametrize("folder", ["fcn", "DeepLabV3", "unet"])
def test_a_checkpoint_of_another_model_is_refused(deeplab, trained, folder, tmp_path):
    other = trained if folder != "unet" else deeplab
    script = importlib.import_module(f"{folder}.inference")
    with pytest.raises(UserError, match=r"holds a (unet|DeepLabV3) model.*inference\.py"):
        script.main([str(other / "checkpoint.pth"), ".", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("folder", "words", "sentence"),
    [
        ("DeepLabV3", ["-b", "1"], "use -b 2 or --norm group"),
        ("DeepLabV3", ["--backbone", "resnet18"], "invalid choice"),
        ("DeepLabV3", ["--crop-size", "72"], "not a multiple of 16"),
        ("fcn", ["--crop-size", "60"], "not a multiple of 8"),
        ("fcn", ["--weights-backbone", "nowhere.pth"], "neither imagenet, none nor a file"),
        ("fcn", ["--cuda-graphs"], "--cuda-graphs needs a CUDA device"),
        ("fcn", ["--grad-accum", "1000"], "lower --batch-size"),
        ("unet", ["--clip-grad-norm", "-1"], "-1 is not from 1e-09 to"),
        ("unet", ["--amp-dtype", "fp16"], "add --amp"),
    ],
)
def test_what_cannot_work_is_refused_before_it_starts(tiled, tmp_path, folder, words, sentence):
    output = tmp_path / "run"
    script = importlib.import_module(f"{folder}.train")
    with pytest.raises(UserError) as caught:
        script.main(training(tiled, output, "--max-steps", 1, *words, model=folder))
    assert sentence in str(caught.value)
    assert not (output / "checkpoint.pth").exists()


def test_compiling_without_a_compiler_is_refused(tiled, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"install g\+\+"):
        train.main(deeplab_words(tiled, tmp_path / "run", "--compile"))


def test_batches_of_one_train_with_group_norm(tiled, tmp_path):
    words = ["-b", 1, "--norm", "group", "--max-steps", 2]
    train.main(deeplab_words(tiled, tmp_path / "run", *words))
    assert (tmp_path / "run/checkpoint.pth").is_file()


def disagree() -> None:
    with process_group("cpu") as process:
        check_equal(process, tiles=7 + process.rank, steps=3)


def test_processes_that_disagree_end_with_a_sentence(tmp_path):
    """Ranks with different data would hang in the first collective that one of them skips."""
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    ranks = children.start_ranks(partial(run, disagree), logs)
    assert [children.end(rank) for rank in ranks] == [2, 2]
    said = "\n".join(log.read_text() for log in logs)
    assert "disagree about the number of tiles: 7 on rank 0, 8 on rank 1" in said


def test_the_auxiliary_head_counts_in_training_alone():
    torch.manual_seed(0)
    model = build_model("mobilenet_v3_large", 3, norm="group", dropout=0.0).train()
    images, targets = torch.randn(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64))
    outputs = model(images)
    expected = segmentation_loss(outputs["out"], targets)
    expected += 0.5 * segmentation_loss(outputs["aux"], targets)
    torch.testing.assert_close(loss_fn(model, images, targets), expected)
    torch.testing.assert_close(two_head_loss(outputs, targets), expected)
    called = []
    model.aux_classifier.register_forward_hook(lambda *_: called.append(1))
    found = predict(model.eval(), images)
    assert torch.equal(found, outputs["out"].argmax(1).to(torch.uint8))
    torch.testing.assert_close(
        probabilities(model, images).sum(1), torch.ones(2, 64, 64), rtol=1e-5, atol=1e-5
    )
    assert called == []


def test_weights_of_a_classifier_or_a_run_start_the_backbone(deeplab, tmp_path):
    torch.manual_seed(1)
    classifier = mobilenet_v3_large(weights=None)
    torch.save(classifier.state_dict(), tmp_path / "mobilenet.pth")
    model = build_model("mobilenet_v3_large", 2, str(tmp_path / "mobilenet.pth"))
    for name, weight in classifier.features.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[name], weight)
    saved = deeplab / "checkpoint.pth"
    model = build_model("mobilenet_v3_large", 5, str(saved))
    for name, weight in checkpoint.load(saved)["model"].items():
        if name.startswith("backbone."):
            assert torch.equal(model.state_dict()[name], weight)
    with pytest.raises(UserError, match="does not fit this backbone"):
        load_backbone(nn.Conv2d(1, 1, 1), str(saved))


def test_dropout_is_what_was_asked_for():
    def dropouts(model):
        return sorted(m.p for m in model.modules() if isinstance(m, nn.Dropout))

    assert dropouts(build_model("mobilenet_v3_large", 2)) == [0.1, 0.5]
    assert dropouts(build_model("mobilenet_v3_large", 2, dropout=0.0)) == [0.0, 0.0]


def test_the_loss_ignores_what_is_to_be_ignored():
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 3, 32, 32), torch.randint(0, 3, (2, 32, 32))
    targets[:, :16] = IGNORE
    changed = logits.clone()
    changed[:, :, :16] = torch.randn(2, 3, 16, 32) * 100
    torch.testing.assert_close(
        segmentation_loss(changed, targets), segmentation_loss(logits, targets)
    )
    for dtype in (torch.bfloat16, torch.float16):
        found = segmentation_loss(logits.to(dtype), targets)
        assert found.dtype == torch.float32
        assert np.isclose(found, segmentation_loss(logits, targets), rtol=0.02)


@pytest.mark.parametrize("folder", ["fcn", "DeepLabV3"])
def test_the_scripts_answer_from_any_directory_without_a_traceback(tmp_path, folder):
    for words in (
        (ROOT / folder / "train.py", "--data-path", "nowhere"),
        (ROOT / folder / "inference.py", "nothing.pth", ".", "out"),
    ):
        result = run_forked(*words, cwd=tmp_path)
        assert result.returncode == 2, result.stderr
        assert result.stderr.startswith("error: ")
        assert len(result.stderr.strip().splitlines()) == 1
