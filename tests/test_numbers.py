"""Every number that an option accepts works; all others are refused in one sentence.

The options are those of the scripts' own parsers. `TRIED` runs the real commands with the smallest
and the largest numbers; `REASONED` says of the other options why no number can break them.
"""

import argparse
import importlib
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from affine import Affine
from helpers.commands import ROOT, training
from helpers.rasters import raster
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.lib.models import MODELS
from common import cli, loader
from common.args import SCHEDULES
from common.cli import UserError
from common.data import Batch, Tiles
from common.distributed import Process
from common.loader import GlobalBatches
from common.predict.folder import there
from common.run import checkpoint
from common.session import schedule as rate_schedule
from mask.targets import training_views
from rareplanes.sample import schedule

FOLDERS = ("rareplanes", "preprocessing", *MODELS, "benchmarks")
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
    if '__name__ == "__main__"' in path.read_text()
]
LARGE = [2**31 - 1, 2**31, 2**32 - 1, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**30]
TEXTS = ["0", "-1", "1", "0.5", *map(str, LARGE), "1e-300", "1e300", "1e3", " 1 ", "1_0", ""]
TEXTS += ["nan", "inf", "-inf", "9" * 5000, "500", "10m", "1e300m", "nanm", "0x10", "٣"]


class Collected(Exception):
    """Ends a script when it has made its parser."""


def parser_of(module: str) -> cli.Parser:
    def collect(self, argv=None):
        raise Collected(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli.Parser, "parse", collect)
        with pytest.raises(Collected) as caught:
            importlib.import_module(module).main([])
    return caught.value.args[0]


PARSERS = {module: parser_of(module) for module in MODULES}
PREFIX = {"--sweep": "batch="}


def is_number(action: argparse.Action) -> bool:
    """Whether the option's type makes a number of one of these, or it has the name of one."""
    if action.type in (None, Path, there):
        return False
    for text in ("1", "0.5", "64"):
        try:
            value = action.type(PREFIX.get(name_of(action), "") + text)
        except (ValueError, argparse.ArgumentTypeError):
            continue
        if not isinstance(value, str):
            return True
    return False


def name_of(action: argparse.Action) -> str:
    return max(action.option_strings, key=len, default=action.dest)


OPTIONS = {
    (module, name_of(action)): action
    for module, parser in PARSERS.items()
    for action in parser._actions
    if is_number(action)
}


def given_to(module: str, option: str, text: str) -> object:
    """What the script's parser makes of the text; the other required options have some value."""
    parser, action = PARSERS[module], OPTIONS[module, option]
    count = action.nargs if isinstance(action.nargs, int) else 1
    values = [PREFIX.get(option, "") + text] * count
    words = []
    for other in parser._actions:
        if other is action and not action.option_strings:
            words += values
        elif other is not action and other.required and not other.option_strings:
            words.append("." if other.type in (None, Path, there) else "3")
        elif other is not action and other.required:
            words += [name_of(other), "x"]
    if module == "rareplanes.download" and option != "--limit":
        words.append("--all")
    if action.option_strings:
        words = [*words, option, *values] if count > 1 or action.nargs else [*words]
        if not (count > 1 or action.nargs):
            words.append(f"{option}={values[0]}")
    return getattr(parser.parse(words), action.dest)


def assert_refused_or_fits(module, option, text):
    value, sentence = outcome(given_to, module, option, text)
    assert "\n" not in sentence
    for number in [] if sentence else numbers_in(value):
        assert math.isfinite(number)
        assert abs(number) < 2**63 if isinstance(number, int) else abs(number) <= 1e30


def outcome(function, *given):
    """What the function returns, and the sentence by which it refuses its arguments."""
    try:
        return function(*given), ""
    except UserError as error:
        return None, str(error)


def numbers_in(value: object) -> list[float]:
    if isinstance(value, list | tuple):
        return [number for part in value for number in numbers_in(part)]
    return [] if isinstance(value, str) else [value]


def test_all_scripts_were_asked():
    assert {m.partition(".")[0] for m in MODULES} == set(FOLDERS)
    assert len(OPTIONS) > 150
    assert ("mask.train", "--seed") in OPTIONS
    assert ("benchmarks.run", "--sweep") in OPTIONS


@pytest.mark.parametrize(("module", "option"), OPTIONS)
def test_a_number_is_refused_or_fits(module, option):
    for text in TEXTS:
        assert_refused_or_fits(module, option, text)


numbers = (
    st.integers() | st.floats() | st.sampled_from([2**k + d for k in range(70) for d in (-1, 0)])
)


@given(st.sampled_from(sorted(OPTIONS)), numbers.map(repr) | st.text(max_size=4))
def test_any_text_is_refused_or_fits(option, text):
    assert_refused_or_fits(*option, text)


def test_no_option_takes_any_number():
    """`int` and `float` have no limits."""
    assert [name for name, action in OPTIONS.items() if action.type in (int, float)] == []


def bounds(module: str, option: str) -> tuple[str, str]:
    """The smallest and the largest number that the option takes, from its own refusals."""
    found = []
    for text in ("-" + "9" * 40, "9" * 40):
        with pytest.raises(UserError) as caught:
            given_to(module, option, text)
        found.append(re.search(r"is not from (\S+) to (\S+)$", str(caught.value)).groups())
    assert found[0] == found[1]
    return found[0]


SEEDS = [0, 2**19, 20261128, 2**32 - 1, 2**53 + 1, 2**63 - 1]
TINY = "1e-300"
LOW, HIGH = "the lowest", "the highest"
# Option of unet/train.py → numbers to train with.
TRAINED = {
    "--print-freq": [LOW, HIGH],
    "--save-every": ["0", "999999999", "1e-300m", "999999999m"],
    "--dist-timeout": [LOW, HIGH],
    "--eval-freq": [HIGH],
    "--eval-steps": [LOW, HIGH],
    "--eval-tiles": [LOW, HIGH],
    "--batch-size": [LOW, HIGH],
    "--grad-accum": [HIGH],
    "--crop-size": [LOW, HIGH],
    "--scale-jitter": [LOW, TINY, HIGH],
    "--foreground": [LOW, TINY, HIGH],
    "--lr": [LOW, TINY, HIGH],
    "--warmup-steps": [LOW, HIGH],
    "--weight-decay": [LOW, TINY, HIGH],
    "--ema": [LOW, TINY, HIGH],
    "--clip-grad-norm": [LOW, HIGH],
    "--lr-encoder": [LOW, TINY, HIGH],
    "--epochs": [HIGH],
    "--decoder-channels": [LOW, HIGH],
}
PREDICTED = [
    ("--index", LOW),
    ("--index", HIGH),
    ("--batch-size", HIGH),
    ("--window", LOW),
    ("--overlap", LOW),
    ("--overlap", TINY),
    ("--overlap", HIGH),
    ("--min-area", HIGH),
    ("--max-area", HIGH),
    ("--join", TINY),
    ("--join", HIGH),
    ("--overlay-size", LOW),
    ("--overlay-size", HIGH),
    ("--crops", LOW),
    ("--crops", HIGH),
    ("--bands", LOW),
    ("--bands", HIGH),
    ("--stretch", (0, TINY)),
    ("--stretch", (0, 100)),
    ("--stretch", (99.999999, 100)),
    ("--range", (0, TINY)),
    ("--range", (0, 1e30)),
    ("--range", (1e30 - 1e14, 1e30)),
    ("--gsd", HIGH),
]
TILED = {
    "--tile-size": [16, 4096],
    "--num-workers": [1, 1024],
    "--min-visible": [0, TINY, 1],
    "--negatives": [0, TINY, 1000],
    "--seed": [0, 2**63 - 1],
    "--png-level": [0, 9],
}
REASONED = {
    "--max-steps": "`test_the_learning_rate_of_any_training_rises_and_falls`",
    "--workers": "`test_as_many_loader_processes_start_as_there_are_batches`",
    "--scenes": "`test_a_million_scenes_have_a_million_names`",
    "--test-fraction": "`test_any_share_of_test_scenes_leaves_some_to_train_on`",
    "--size": "the highest are 67 million pixels, which take a minute",
    "--limit": "it cuts a list; test_download.py gives the highest",
    "--retries": "test_download.py gives the highest",
    "--copies": "`test_chips_of_the_lowest_and_highest_numbers`, as are --jitter and --least-iou",
    "--jitter": "see --copies",
    "--least-iou": "see --copies",
    "--score-threshold": "scores are compared to it",
    "--max-detections": "`topk` takes at most as many as there are; 1 is tested in test_rcnn.py",
}
OF_A_MODEL = [
    ("fcn", "--dropout", LOW),
    ("DeepLabV3", "--dropout", HIGH),
    *[("mask", option, n) for option in ("--proposals", "--mask-rois") for n in (LOW, HIGH)],
    *[("mask", "--max-aircraft", number) for number in (LOW, HIGH)],
]
cases = [("unet", option, number) for option, numbers in TRAINED.items() for number in numbers]


def values_of(module, option, number):
    action = OPTIONS[module, option]
    if number in (LOW, HIGH):
        number = bounds(module, option)[number == HIGH]
    return [number] * (action.nargs if isinstance(action.nargs, int) else 1)


def trains(folder, output, data, *words):
    """Train two steps: the weights are finite, or one sentence refuses the options."""
    train = importlib.import_module(f"{folder}.train")
    words = ["--max-steps", 2, "--eval-freq", 9, *words]
    _, sentence = outcome(train.main, training(data, output, *words, model=folder))
    assert "\n" not in sentence
    if sentence:
        return False
    content = checkpoint.load(output / "checkpoint.pth")
    assert all(v.isfinite().all() for v in content["model"].values() if v.is_floating_point())
    return True


def test_each_number_is_tried_or_reasoned_about():
    """Numbers of the benchmarks count rounds, or are handed to train.py."""
    tried = {*TRAINED, *TILED, *REASONED, *(option for option, _ in PREDICTED)}
    tried |= {option for _, option, _ in OF_A_MODEL}
    options = {name for module, name in OPTIONS if not module.startswith("benchmarks")}
    assert options - tried == set()


@pytest.mark.parametrize(("folder", "option", "number"), cases + OF_A_MODEL)
def test_the_extremes_train(thin, few, tmp_path, folder, option, number):
    words = values_of(f"{folder}.train", option, number)
    refused = (option, number) in {
        ("--batch-size", HIGH),
        ("--grad-accum", HIGH),
        ("--crop-size", HIGH),
        ("--crop-size", LOW),
        ("--decoder-channels", HIGH),
    }
    assert trains(folder, tmp_path / "run", few, option, *words) is not refused


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("folder", MODELS)
def test_every_seed_trains(thin, few, tmp_path, folder, seed):
    assert trains(folder, tmp_path / "run", few, "--seed", seed, "--ema", "0.9")


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("epoch", [0, 2**20, 2**31 - 1, 2**62])
def test_every_epoch_has_an_order_and_keys(seed, epoch):
    """`--epochs` and `--max-steps` can be so large; no test trains for as long."""
    batches = GlobalBatches(8, 2, Process(0, 1, torch.device("cpu")), seed)
    batches.set_epoch(epoch)
    assert sorted(tile for batch in batches for tile in batch) == list(range(8))
    tiles = torch.arange(2)
    ids = torch.zeros(2, 16, 16, dtype=torch.uint8)
    batch = Batch(torch.zeros(2, 16, 16, 3, dtype=torch.uint8), ids, torch.zeros(2, 256), tiles)
    args = argparse.Namespace(crop_size=8, seed=seed, augment="strong", max_aircraft=2)
    args.scale_jitter, args.foreground = 1.0, 0.5
    images, targets = training_views(args)(batch, epoch)
    assert images.isfinite().all()
    assert (targets.key - targets.key[0]).tolist() == [0, 1]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2**31 - 1, (2**31 - 1) ** 2])
@pytest.mark.parametrize("warmup", [0, 1, 2**31 - 1])
def test_the_learning_rate_of_any_training_rises_and_falls(steps, warmup, name):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    factor = rate_schedule(optimizer, name, steps, warmup).lr_lambdas[0]
    end = min(warmup, steps // 2)
    factors = [factor(step) for step in (0, end, (end + steps) // 2, steps - 1, steps)]
    assert all(0 <= value <= 1 for value in factors)
    assert factors[1:] == sorted(factors[1:], reverse=True)
    assert factors[-1] == (1 if name == "constant" else 0)
    assert factor(end) == 1
    if steps == 2**31 - 1 and warmup == 1:
        halfway = {"poly": 0.5**0.9, "constant": 1, "cosine": 0.5}[name]
        assert factor(2**30) == pytest.approx(halfway, abs=1e-6)


def test_as_many_loader_processes_start_as_there_are_batches(few, monkeypatch):
    """1024 are allowed, and would take some 300 GB."""
    tiles = Tiles(few / "val")
    process = Process(0, 1, torch.device("cpu"))
    assert loader.scoring_loader(tiles, 1, 1024, process).num_workers == len(tiles)
    assert loader.scoring_loader(tiles, len(tiles), 1024, process).num_workers == 1


def test_a_test_set_may_be_one_batch(trained, tiled, tmp_path):
    checkpoint = shutil.copy(trained / "checkpoint.pth", tmp_path)
    words = ["--test-only", "--resume", checkpoint, "-b", 2**31 - 1]
    importlib.import_module("unet.train").main(training(tiled, tmp_path, *words))
    assert (tmp_path / "test_scores.json").exists()


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """48x64 pixels of 0.5 m in 16 bits."""
    values = np.random.default_rng(0).integers(100, 3000, (3, 48, 64), dtype=np.uint16)
    where = {"crs": "EPSG:32631", "transform": Affine(0.5, 0, 500_000, 0, -0.5, 5_000_000)}
    return raster(tmp_path_factory.mktemp("scene") / "a.tif", values, **where)


@pytest.mark.parametrize(("option", "numbers"), PREDICTED)
def test_the_extremes_predict(trained, scene, tmp_path, option, numbers):
    words = numbers if isinstance(numbers, tuple) else values_of("unet.inference", option, numbers)
    images = scene.parent if option == "--index" else scene
    given = [trained / "checkpoint.pth", images, tmp_path / "out", option, *words]
    inference = importlib.import_module("unet.inference")
    if (option, numbers) in {("--index", HIGH), ("--bands", HIGH)}:
        with pytest.raises(UserError):
            inference.main(list(map(str, given)))
        return
    inference.main(list(map(str, given)))
    assert (tmp_path / "out/predictions.json").exists()


@pytest.mark.parametrize(("option", "numbers"), TILED.items())
def test_the_extremes_tile(tmp_path, option, numbers):
    assert [str(numbers[0]), str(numbers[-1])] == list(bounds("preprocessing.preprocess", option))
    sample = ["-o", tmp_path / "data", "-n", 2, "--size", 128, 128, "--seed", 2**63 - 1]
    importlib.import_module("rareplanes.sample").main(list(map(str, [*sample, "-j", 1024])))
    for number in numbers:
        words = [tmp_path / "data", "-o", tmp_path / str(number), option, number]
        importlib.import_module("preprocessing.preprocess").main(list(map(str, words)))
        assert (tmp_path / str(number) / "train/instances_tiled.json").exists()


@pytest.mark.parametrize("fraction", [0, 1e-300, 0.5, 0.99])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_share_of_test_scenes_leaves_some_to_train_on(count, fraction):
    scenes = schedule(count, 0, (128, 128), fraction)
    assert len({scene.stem for scene in scenes}) == count
    assert "train" in {scene.split for scene in scenes}


def test_a_million_scenes_have_a_million_names():
    count = int(bounds("rareplanes.sample", "--scenes")[1])
    assert len({scene.stem for scene in schedule(count, 0, (128, 128), 0.2)}) == count
