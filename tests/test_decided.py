"""What may differ between a checkpoint and the command and data that continue it."""

import importlib
import json
import re
import shutil

import pytest
import torch
from helpers.commands import NETWORKS, ROOT, training

from common import args as arguments
from common.cli import UserError
from common.run import checkpoint, checkpoint_file, resume
from unet import train

README = (ROOT / "common/run/README.md").read_text()
# Another value of each option than `helpers.commands.training` gives.
OTHER = {
    "--config": None,  # what it sets counts
    "--data-path": None,  # what is in the folder counts
    "--extra-data": None,
    "--output-dir": None,
    "--resume": None,
    "--test-only": None,
    "--device": None,  # the device itself counts
    "--cuda-graphs": None,  # refused on a CPU, whatever the checkpoint is
    "--workers": "1",
    "--seed": "7",
    "--print-freq": "3",
    "--save-every": "5",
    "--dist-timeout": "77",
    "--epochs": "3",
    "--max-steps": "9",
    "--eval-freq": "2",
    "--eval-steps": "3",
    "--eval-tiles": "2",
    "--batch-size": "2",
    "--grad-accum": "2",
    "--crop-size": "32",
    "--augment": "strong",
    "--scale-jitter": "0.1",
    "--foreground": "0.5",
    "--lr": "0.5",
    "--lr-schedule": "cosine",
    "--warmup-steps": "3",
    "--weight-decay": "0.5",
    "--ema": "0.5",
    "--clip-grad-norm": "2",
    "--norm": "group",
    "--weights-backbone": "nowhere.pth",
    "--init-from": "nowhere.pth",
    "--lr-encoder": "0.5",
    "--freeze-encoder": "",
    "--amp": "",
    "--amp-dtype": "bf16 --amp",
    "--channels-last": "",
    "--compile": "",
    "--encoder": "resnet18",
    "--decoder-channels": "32 32 16 16 8",
    "--dropout": "0.3",
    "--backbone": "resnet50",
    "--proposals": "41",
    "--mask-rois": "11",
    "--max-aircraft": "12",
}


class Options(Exception):
    """Carries the parser's options out of a train.py."""


def options_of(model):
    """The long names of all options of a train.py, without `--no-` and `--help`."""
    module = importlib.import_module(f"{model}.train")

    def parse(self, argv):
        raise Options({max(a.option_strings[:1] + a.option_strings[1:2], key=len)
                       for a in self._actions if a.option_strings})  # fmt: skip

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.cli.Parser.parse", parse)
        with pytest.raises(Options) as caught:
            module.main([])
    names = caught.value.args[0]
    return sorted(
        n if not n.startswith("--no-") or n == "--norm" else n.replace("--no-", "--")
        for n in names - {"--help"}
    )


def decided() -> dict[str, str]:
    """Option → refused, told or free, by the table in the README."""
    part = README.split("<!-- resume -->")[1].split("<!-- /resume -->")[0]
    table: dict[str, str] = {}
    for line in part.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 3 and cells[0] in ("refused", "told", "free"):
            for option in re.findall(r"--[a-z-]+", cells[1]):
                assert option not in table, f"{option} is there twice"
                table[option] = cells[0]
    return table


@pytest.mark.parametrize("model", NETWORKS)
def test_every_option_is_decided(model):
    """A new option belongs into the table, and its other value into `OTHER`."""
    missing = [option for option in options_of(model) if option not in decided()]
    assert missing == []
    assert [option for option in options_of(model) if option not in OTHER] == []


def test_the_table_names_no_option_that_is_not_there():
    assert set(decided()) == {option for model in NETWORKS for option in options_of(model)}


def test_what_is_free_is_no_setting():
    named = {name[2:].replace("-", "_") for name, kind in decided().items() if kind == "free"}
    assert named == resume.FREE


@pytest.fixture(scope="module")
def saved(few, tmp_path_factory):
    """The folder of a run that is not at its end, for each model."""
    made = {}

    def make(model):
        if model not in made:
            folder = tmp_path_factory.mktemp(model) / "run"
            module = importlib.import_module(f"{model}.train")
            module.main(training(few, folder, "--max-steps", 1, model=model))
            made[model] = folder
        return made[model]

    return make


CASES = [(m, o) for m in ("unet", "mask") for o in options_of(m) if OTHER.get(o) is not None]
CASES = [(m, o) for m, o in CASES if m == "unet" or o not in options_of("unet")]


@pytest.mark.parametrize(("model", "option"), CASES)
def test_another_value_is_refused_told_or_free(
    few, saved, thin, monkeypatch, capsys, model, option
):
    folder = saved(model)
    module = importlib.import_module(f"{model}.train")
    monkeypatch.setattr(module, "fit", lambda *_: None)
    words = training(few, folder, "--max-steps", 8, "--resume", model=model)
    more = f"{option} {OTHER[option]}".split()
    if option == "--epochs":  # which --max-steps overrides
        words[words.index("--max-steps") : words.index("--resume")] = []
    name = {"--freeze-encoder": "lr_encoder"}.get(option, option[2:].replace("-", "_"))
    expected = decided()[option]
    if expected == "refused":
        with pytest.raises(UserError):
            module.main([*words, *more])
        return
    module.main([*words, *more])
    said = capsys.readouterr().out
    assert "continuing at step 1" in said
    told = re.search(rf"\b{name} was .* and is ", said) is not None
    assert expected == ("told" if told else "free")


def with_classes(root, rename):
    for split in ("train", "val"):
        index = root / split / "instances_tiled.json"
        coco = json.loads(index.read_text())
        coco["categories"] = rename(coco["categories"])
        index.write_text(json.dumps(coco))


@pytest.mark.parametrize("order", [["wing", "tail"], ["tail", "aircraft"], ["tail"]])
def test_other_classes_or_another_order_are_refused_with_both_lists(tiled_copy, tmp_path, order):
    first = [{"id": 1, "name": "aircraft"}, {"id": 2, "name": "tail"}]
    with_classes(tiled_copy, lambda _: first)
    train.main(training(tiled_copy, tmp_path / "run", "--max-steps", 1))
    with_classes(tiled_copy, lambda _: [{"id": i, "name": n} for i, n in enumerate(order, 1)])
    before = (tmp_path / "run/checkpoint.pth").read_bytes()
    with pytest.raises(UserError) as caught:
        train.main(training(tiled_copy, tmp_path / "run", "--max-steps", 2, "--resume"))
    assert "['aircraft', 'tail']" in str(caught.value)
    assert str(order) in str(caught.value)
    assert (tmp_path / "run/checkpoint.pth").read_bytes() == before


def test_other_validation_tiles_are_told_and_the_best_is_chosen_again(tiled_copy, tmp_path, capsys):
    folder = tmp_path / "run"
    train.main(training(tiled_copy, folder, "--max-steps", 1))
    for name in ("checkpoint.pth", "model_best.pth"):
        content = checkpoint.load(folder / name) | {"best": 0.99}
        checkpoint_file.write(content, folder / name)
    train.main(training(tiled_copy, folder, "--max-steps", 2, "--resume"))
    assert checkpoint.load(folder / "checkpoint.pth")["best"] == 0.99
    index = tiled_copy / "val/instances_tiled.json"
    index.write_bytes(index.read_bytes() + b" ")
    train.main(training(tiled_copy, folder, "--max-steps", 3, "--resume"))
    assert "validation tiles have changed (the best checkpoint is" in capsys.readouterr().out
    assert checkpoint.load(folder / "checkpoint.pth")["best"] < 0.99
    assert checkpoint.load(folder / "model_best.pth")["step"] == 3


@pytest.mark.parametrize(("batch", "world"), [(8, 2), (6, 4), ("\x1b[2J", "x"), (None, [1])])
def test_another_number_of_processes_must_keep_the_global_batch(few, saved, tmp_path, batch, world):
    folder = shutil.copytree(saved("unet"), tmp_path / "run")
    content = checkpoint.load(folder / "checkpoint.pth")
    content["settings"] |= {"world_size": world, "global_batch": batch}
    checkpoint_file.write(content, folder / "checkpoint.pth")
    with pytest.raises(UserError, match=r"so that 1 processes x -b x --grad-accum is .*\.$") as got:
        train.main(training(few, folder, "--max-steps", 9, "--resume"))
    assert str(got.value).isprintable()


@pytest.mark.parametrize("option", ["--init-from", "--weights-backbone"])
def test_files_of_the_start_are_not_opened_again(few, saved, tmp_path, option):
    start = shutil.copy(saved("unet") / "checkpoint.pth", tmp_path / "start.pth")
    words = training(few, tmp_path / "run", option, start)
    train.main([*words, "--max-steps", "1"])
    start.unlink()
    train.main([*words, "--max-steps", "2", "--resume"])
    assert checkpoint.load(tmp_path / "run/checkpoint.pth")["step"] == 2
    with pytest.raises(UserError):
        train.main([*words[:2], "--output-dir", str(tmp_path / "new"), *words[4:]])


def test_an_imagenet_run_is_continued_without_a_network(few, saved, tmp_path, monkeypatch):
    folder = shutil.copytree(saved("unet"), tmp_path / "run")
    built = train.build_model

    def offline(encoder, classes, weights_backbone, *args):
        assert weights_backbone == "none"
        return built(encoder, classes, weights_backbone, *args)

    monkeypatch.setattr(train, "build_model", offline)
    words = ["--max-steps", 2, "--resume", "--weights-backbone", "imagenet"]
    train.main(training(few, folder, *words))
    assert checkpoint.load(folder / "checkpoint.pth")["args"]["weights_backbone"] == "imagenet"


HOSTILE = [None, "\x1b[2J", [1], {}, {"a": torch.ones(2)}, torch.ones(2), float("nan"), 1j]


@pytest.mark.parametrize("value", HOSTILE, ids=str)
def test_an_odd_value_in_a_checkpoint_is_a_sentence_or_no_matter(
    few, saved, tmp_path, monkeypatch, capsys, value
):
    """Each part of a checkpoint, and each setting, in turn."""
    monkeypatch.setattr(train, "fit", lambda *_: None)
    whole = checkpoint.load(saved("unet") / "checkpoint.pth")
    parts = [(whole, key) for key in whole if key != "format"]
    parts += [(whole["settings"], key) for key in ("lr", "global_batch", "lr_encoder", "device")]
    for content, key in parts:
        before, content[key] = content[key], value
        checkpoint_file.write(whole, tmp_path / "odd.pth")
        for start in ("--resume", "--init-from"):
            words = training(few, tmp_path / "run", "--max-steps", 8, start, tmp_path / "odd.pth")
            sentence = ""
            try:
                train.main(words)
            except UserError as error:
                sentence = str(error)
            assert sentence.isprintable(), (key, sentence)
            assert capsys.readouterr().out.replace("\n", "").isprintable(), key
        content[key] = before


def test_settings_that_are_no_dict_are_a_sentence(few, saved, tmp_path):
    content = checkpoint.load(saved("unet") / "checkpoint.pth") | {"settings": ["lr"]}
    checkpoint_file.write(content, tmp_path / "odd.pth")
    with pytest.raises(UserError, match="its settings is missing or invalid"):
        train.main(training(few, tmp_path / "run", "--resume", tmp_path / "odd.pth"))


def test_the_parser_of_the_table_is_the_real_one():
    shared = vars(arguments.train_parser("").parse([]))
    assert {f"--{name.replace('_', '-')}" for name in shared} <= set(OTHER)
