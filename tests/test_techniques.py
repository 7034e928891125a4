"""Every technique with every model, through train.py: the same losses as without it.

The front page's table says what was tried; each test looks its own cell up when it has passed.
"""

import importlib
import json
import shutil
from functools import cache, partial
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import torch
from helpers.commands import NETWORKS, ROOT, TORCHRUN, run_script
from helpers.networks import train_thin, train_without_dropout
from torch import nn
from torture import children

from benchmarks.lib.models import MODELS
from benchmarks.lib.standins import use_cpu_graphs
from common.run import checkpoint
from common.session import Session

pytestmark = pytest.mark.usefixtures("thin")
STEPS, WARMUP = 4, 2  # `use_cpu_graphs` captures after two steps
FOLDERS = {model.title: model.folder for model in MODELS.values()}
# Flags, and how far the losses of all steps may be from the plain run's: the mean distance as a
# share of the mean loss. Later steps multiply a difference in rounding, so a single step shows more
# of the processor's bf16, which has three digits, than of the technique.
TECHNIQUES = {
    "AMP": (["--amp", "--amp-dtype", "bf16"], 0.05),
    "channels-last": (["--channels-last"], 0.01),
    "CUDA graphs": (["--cuda-graphs"], 0.01),
    "torch.compile": (["--compile"], 0.01),
    "accumulation": (["-b", "2", "--grad-accum", "2"], 0.01),
    "DDP": (["-b", "2"], 0.01),
    "EMA": (["--ema", "0.9"], 1e-6),
    "all": (["--amp", "--amp-dtype", "bf16", "--channels-last", "--cuda-graphs"], 0.05),
    "all, compiled": (["--amp", "--amp-dtype", "bf16", "--channels-last", "--compile"], 0.05),
}
for name in ("all", "all, compiled"):
    TECHNIQUES[name][0].extend(["-b", "2", "--grad-accum", "2", "--ema", "0.9"])


def words_of(model: str, data: Path, output: Path) -> list[str]:
    """GroupNorm, because BatchNorm depends on how a batch is split; so does dropout."""
    words = ["--data-path", data, "--output-dir", output, "--max-steps", STEPS, "-b", 4, "-j", 0]
    words += ["--crop-size", 32, "--norm", "group", "--weights-backbone", "none"]
    words += ["--lr-schedule", "cosine", "--foreground", 0.5]
    words += ["--print-freq", 1, "--eval-freq", 99, "--device", "cpu", *NETWORKS[FOLDERS[model]]]
    return list(map(str, words))


def losses_and_score(output: Path) -> tuple[list[float], float]:
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    (score,) = {"mIoU", "mask_AP"} & lines[-1].keys()
    return [x["loss"] for x in lines if "loss" in x], lines[-1][score]


@pytest.fixture(scope="module", autouse=True)
def no_dropout(thin):
    with pytest.MonkeyPatch.context() as patch:
        train_without_dropout(patch.setattr)
        yield


@pytest.fixture(scope="module")
def plain(few, tmp_path_factory):
    """The plain run of a model: its losses and its score."""

    @cache
    def run(model):
        output = tmp_path_factory.mktemp("plain") / "run"
        train = importlib.import_module(f"{FOLDERS[model]}.train")
        train.main(words_of(model, few, output))
        return losses_and_score(output)

    return run


@pytest.mark.parametrize("model", FOLDERS)
def test_no_random_number_is_drawn_without_dropout(few, tmp_path, monkeypatch, plain, model):
    """If it fails, extend `without_dropout` of tests/helpers/networks.py."""
    start = Session.start
    seeded = lambda *given: start(*given) or torch.manual_seed(9)  # noqa: E731
    monkeypatch.setattr(Session, "start", seeded)
    importlib.import_module(f"{FOLDERS[model]}.train").main(words_of(model, few, tmp_path / "run"))
    assert losses_and_score(tmp_path / "run")[0] == pytest.approx(plain(model)[0], rel=1e-5)


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_code_learns_the_same(few, tmp_path, monkeypatch):
    """With the real compiler, which spends half a second on each of two hundred kernels."""
    torch.compiler.reset()
    unet, shallow = smp.Unet, {"encoder_depth": 3, "decoder_channels": (64, 32, 16)}
    monkeypatch.setattr(smp, "Unet", lambda *given, **more: unet(*given, **more | shallow))
    found = []
    for flags in ([], ["--compile"]):
        output = tmp_path / "_".join(["run", *flags])
        importlib.import_module("unet.train").main([*words_of("UNet", few, output), *flags])
        found.append(losses_and_score(output)[0])
    assert found[1] == pytest.approx(found[0], rel=0.01)


@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("model", FOLDERS)
def test_the_same_is_learnt(few, tmp_path, monkeypatch, plain, model, technique):
    flags, tolerance = TECHNIQUES[technique]
    folder, output = FOLDERS[model], tmp_path / "run"
    words = [*words_of(model, few, output), *flags]
    made = use_cpu_graphs(monkeypatch.setattr) if "--cuda-graphs" in flags else []
    if "--compile" in flags:
        torch.compiler.reset()  # it compiles one function for a few networks at most
        # The whole graph is only traced and differentiated; compiling the code takes minutes.
        compile_ = nn.Module.compile
        monkeypatch.setattr(shutil, "which", lambda name: name)
        monkeypatch.setattr(
            nn.Module, "compile", lambda self, **how: compile_(self, backend="aot_eager", **how)
        )
    if (model, technique) == ("UNet", "DDP"):
        done = run_script(ROOT / folder / "train.py", *words, cwd=tmp_path, launcher=TORCHRUN)
        assert done.returncode == 0, done.stderr
        assert "world size 2" in done.stdout
    elif technique == "DDP":
        logs = [tmp_path / f"{rank}.log" for rank in range(2)]
        ranks = children.start_ranks(partial(train_thin, folder, words), logs)
        assert [children.end(rank) for rank in ranks] == [0, 0], logs[0].read_text()
        assert "world size 2" in logs[0].read_text()
    else:
        importlib.import_module(f"{folder}.train").main(words)
    assert [(g.captures, g.replays) for g in made] == [(1, STEPS - WARMUP)] * len(made)
    assert len(made) == ("--cuda-graphs" in flags)
    losses, score = losses_and_score(output)
    expected, expected_score = plain(model)
    if (model, flags[0]) == ("Mask R-CNN", "--amp"):
        tolerance *= 2  # rounding changes which boxes are proposed, and so what is trained on
    distance = sum(abs(a - b) for a, b in zip(losses, expected, strict=True)) / sum(expected)
    assert distance < tolerance
    assert score == pytest.approx(expected_score, abs=0.1)
    saved = checkpoint.load(output / "checkpoint.pth")
    for names in saved["model"], saved["ema"].get("sums", {}):
        assert not any(name.startswith(("module.", "_orig_mod.", "model.")) for name in names)
    if "--ema" in flags:  # every step is in the average, also a replayed one
        assert float(saved["ema"]["factors"]) == pytest.approx(1 - 0.9**STEPS)
