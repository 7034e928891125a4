"""Starting from a trained model, for other classes, with the encoder slower or frozen."""

import importlib
import json
import shutil

import pytest
import segmentation_models_pytorch as smp
import torch
from helpers.commands import ENCODER, NETWORKS, training
from timm.layers import BatchNormAct2d, GroupNormAct

from common.cli import UserError
from common.run import checkpoint
from mask.model import build_model as build_mask
from unet import train
from unet.model import build_model

pytestmark = pytest.mark.usefixtures("thin")
ENCODERS = {
    "unet": "encoder.",
    "DeepLabV3": "backbone.",
    "fcn": "backbone.",
    "mask": "dense.backbone.body.",
}


@pytest.fixture(scope="module")
def two_classes(few, tmp_path_factory):
    """`few` with one more class, which no object has."""
    root = shutil.copytree(few, tmp_path_factory.mktemp("two") / "tiled")
    for index in root.glob("*/instances_tiled.json"):
        coco = json.loads(index.read_text())
        coco["categories"].append({"id": 2, "name": "helicopter"})
        index.write_text(json.dumps(coco))
    return root


def weights(folder):
    return checkpoint.load(folder / "checkpoint.pth")["model"]


def starting(capsys):
    """The layers that the run printed as new."""
    (said,) = (line for line in capsys.readouterr().out.splitlines() if "starting from" in line)
    return set(said.rstrip(".").split("classes differ: ")[1].split(", "))


@pytest.mark.parametrize("model", NETWORKS)
def test_other_classes_on_a_frozen_encoder(few, two_classes, tmp_path, capsys, model):
    main = importlib.import_module(f"{model}.train").main
    words = ["--lr", 0.01, "--warmup-steps", 0]
    main(training(few, tmp_path / "first", *words, "--max-steps", 1, model=model))
    capsys.readouterr()
    words += ["--init-from", tmp_path / "first/checkpoint.pth", "--freeze-encoder"]
    words += ["--max-steps", 2, "--eval-steps", 1]  # scored in between
    main(training(two_classes, tmp_path / "second", *words, model=model))
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    new = {name for name in first if first[name].shape != second[name].shape}
    assert starting(capsys) == new
    assert all(second[name].shape[0] * 2 == first[name].shape[0] * 3 for name in new)
    kept = {name for name in first.keys() - new if torch.equal(first[name], second[name])}
    inside = {name for name in first if name.startswith(ENCODERS.get(model, "encoder."))}
    assert inside <= kept
    learnt = {n for n in first.keys() - inside - new if n.endswith("weight")}
    assert len(learnt - kept) > len(learnt) / 2


def test_a_start_is_from_the_averaged_weights_and_downloads_nothing(
    few, two_classes, tmp_path, capsys
):
    words = ["--max-steps", 2, "--ema", 0.5]
    train.main(training(few, tmp_path / "first", *words))
    saved = checkpoint.load(tmp_path / "first/model_best.pth")
    capsys.readouterr()
    start = ["--init-from", tmp_path / "first/model_best.pth", "--weights-backbone", "imagenet"]
    train.main(training(two_classes, tmp_path / "second", *start, "--lr", 0, "--max-steps", 1))
    second, new = weights(tmp_path / "second"), starting(capsys)
    for name, sums in saved["ema"]["sums"].items():
        assert name in new or torch.equal(second[name], sums / saved["ema"]["factors"])


def test_the_encoder_learns_at_its_own_rate_and_a_resumed_run_keeps_it(few, tmp_path):
    words = training(few, tmp_path / "run", "--lr", 0.01, "--lr-encoder", 0.1, "--max-steps")
    train.main([*words, "2"])
    groups = checkpoint.load(tmp_path / "run/checkpoint.pth")["optimizer"]["param_groups"]
    assert [group["initial_lr"] for group in groups] == [0.01, pytest.approx(0.001)]
    inside = len(list(build_model(ENCODER, 2).encoder.parameters()))
    assert len(groups[1]["params"]) == inside
    with pytest.raises(UserError, match=r"the run had --lr-encoder .* and keeps it"):
        train.main([*words, "4", "--resume", "--lr-encoder", "1"])
    train.main([*words, "4", "--resume"])


def test_another_network_is_refused_by_its_options(few, trained, tmp_path):
    words = ["--init-from", trained / "checkpoint.pth", "--encoder", "resnet18"]
    with pytest.raises(UserError, match=f"trained with --encoder '{ENCODER}'; give the same"):
        train.main(training(few, tmp_path / "run", *words))
    assert not (tmp_path / "run/checkpoint.pth").exists()
    for path, sentence in {"none.pth": "none.pth", trained / "log.jsonl": "log.jsonl"}.items():
        with pytest.raises(UserError, match=sentence):
            train.main(training(few, tmp_path / "run", "--init-from", path))


@pytest.mark.parametrize("build", [build_model, build_mask])
def test_weights_of_smps_encoder_start_it(tmp_path, build):
    """Saved as the README does; then from a run of either model."""
    torch.manual_seed(1)
    made = smp.encoders.get_encoder("tu-test_efficientnet", weights=None).state_dict()
    torch.save(made, tmp_path / "0.pth")
    for number, model in enumerate((build, build_model, build_mask)):
        found = model("tu-test_efficientnet", 2, str(tmp_path / f"{number}.pth")).state_dict()
        inside = [k for k in found if "model.conv_stem" in k or "model.b" in k]
        assert len(inside) == len(made)
        for name in inside:
            assert torch.equal(found[name], made[name[name.index("model.") :]]), name
        torch.save({"model": found}, tmp_path / f"{number + 1}.pth")


@pytest.mark.parametrize("encoder", ["mobilenet_v2", "densenet121", "vgg11", "resnet18"])
def test_an_encoder_takes_its_own_weights(tmp_path, encoder):
    torch.manual_seed(1)
    made = build_model(encoder, 2).encoder.state_dict()
    torch.save(made, tmp_path / "own.pth")
    loaded = build_model(encoder, 2, str(tmp_path / "own.pth")).encoder.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in made.items())


def test_the_encoder_of_a_unet_starts_mask_rcnn(tmp_path):
    torch.manual_seed(1)
    unet = build_model("resnet50", 2)
    torch.save({"model": unet.state_dict()}, tmp_path / "unet.pth")
    body = build_mask("resnet50", 2, str(tmp_path / "unet.pth")).dense["backbone"].body
    pairs = zip(unet.encoder.state_dict().items(), body.state_dict().items(), strict=True)
    assert all(name == own and torch.equal(value, mine) for (name, value), (own, mine) in pairs)


@pytest.mark.parametrize(
    ("encoder", "sentence"),
    [
        ("tu-resnet81", "is not known"),
        ("tu-resnet18.a:b", "is not known"),
        ("tu-vit_tiny_patch16_224", r"cannot be used \(Unsupported model"),
        ("tu-swin_tiny_patch4_window7_224", r"cannot be used \(Input height"),
    ],
)
def test_an_encoder_that_does_not_work_is_answered_by_one_sentence(encoder, sentence):
    for weights_backbone in ("none", "imagenet") if sentence == "is not known" else ("none",):
        with pytest.raises(UserError, match=sentence):
            build_model(encoder, 2, weights_backbone)


@pytest.mark.parametrize("encoder", ["tu-test_efficientnet", "tu-regnetx_002"])
def test_group_norm_keeps_the_activations_of_timms_batch_norm(encoder):
    """Against timm's own layer with both, in place of every BatchNorm with an activation."""
    torch.manual_seed(0)
    ours = build_model(encoder, 2, norm="group").encoder
    theirs = build_model(encoder, 2).encoder
    for path, layer in dict(theirs.named_modules()).items():
        if isinstance(layer, BatchNormAct2d):
            channels = layer.num_features
            groups = channels // 16 if channels % 16 == 0 else 1
            both = GroupNormAct(channels, num_groups=groups)
            both.act = layer.act
            theirs.set_submodule(path, both)
    with torch.no_grad():
        for parameter, value in zip(theirs.parameters(), ours.parameters(), strict=True):
            parameter.copy_(value)
    images = torch.randn(1, 3, 64, 64)
    for found, expected in zip(ours.eval()(images), theirs.eval()(images), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("build", [build_model, build_mask])
def test_what_an_encoder_does_not_use_is_frozen(build, norm):
    """Its last convolution, which only the classifier needed: DDP would wait for its gradient."""
    encoder = [module for module in build("efficientnet-b0", 2, norm=norm).modules()
               if hasattr(module, "_conv_head")]  # fmt: skip
    (encoder,) = encoder
    frozen = {name for name, value in encoder.named_parameters() if not value.requires_grad}
    assert frozen == {"_conv_head.weight", "_bn1.weight", "_bn1.bias"}


def test_a_single_value_per_channel_is_refused(few, tmp_path):
    with pytest.raises(UserError, match="use -b 2 or --norm group"):
        train.main(training(few, tmp_path / "run", "-b", 1, "--crop-size", 32))
    words = ["-b", 1, "--crop-size", 32, "--norm", "group", "--max-steps", 1]
    train.main(training(few, tmp_path / "run", *words))
