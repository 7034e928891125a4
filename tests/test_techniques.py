"""Every technique with every model, through train.py: the same losses as without it.

Also the README's table of what these tests tried. To write it again after a change:
`python -m pytest tests/test_techniques.py --write-readme`.
"""

import importlib
import json
import shutil
from functools import cache, partial
from itertools import product
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
from helpers.commands import ENCODER, ROOT, TORCHRUN, run_script
from helpers.cpu_graph import CpuGraph
from helpers.networks import THIN, thin_fcn, train_thin
from torch import nn
from torture import children

from benchmarks.lib.readme import part, write_part
from common import graphs
from common.run import checkpoint
from fcn import model as fcn
from mask import model as mask

# A graph is captured after its warm-up and then replayed three times.
STEPS, GRAPH_STEPS = 6, graphs.WARMUP_STEPS + 3
MODELS = {
    "FCN": ("fcn", ["--backbone", "resnet50", "--dropout", "0"]),  # narrow, see `thin`
    "DeepLabV3": ("DeepLabV3", ["--backbone", "mobilenet_v3_large", "--dropout", "0"]),
    "UNet": ("unet", ["--encoder", ENCODER]),
    "Mask R-CNN": ("mask", ["--backbone", "resnet18", "--proposals", "40"]),
}
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
TRIED: set[tuple[str, str]] = set()


def words_of(model: str, data: Path, output: Path, steps: int) -> list[str]:
    """GroupNorm and no dropout: BatchNorm and dropout depend on how a batch is split."""
    words = ["--data-path", data, "--output-dir", output, "--max-steps", steps, "-b", 4, "-j", 0]
    words += ["--crop-size", 32, "--norm", "group", "--weights-backbone", "none"]
    words += ["--print-freq", 1, "--eval-freq", 99, "--device", "cpu", *MODELS[model][1]]
    return list(map(str, words))


def losses_and_score(output: Path) -> tuple[list[float], float]:
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    (score,) = {"mIoU", "mask_AP"} & lines[-1].keys()
    return [x["loss"] for x in lines if "loss" in x], lines[-1][score]


@pytest.fixture(scope="module", autouse=True)
def thin():
    """A narrow FCN with one block per stage, and a narrow pyramid for Mask R-CNN.

    With emulated bf16 a full step takes minutes.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(fcn.BACKBONES, "resnet50", thin_fcn)
        patch.setattr(mask, "CHANNELS", THIN)
        yield


@pytest.fixture(scope="module")
def plain(few, tmp_path_factory):
    """The plain run of a model for a number of steps: its losses and its score.

    A test that changes the network names the change, so that it does not share another's run.
    """

    @cache
    def run(model, steps, network=None):
        output = tmp_path_factory.mktemp("plain") / "run"
        train = importlib.import_module(f"{MODELS[model][0]}.train")
        train.main(words_of(model, few, output, steps))
        return losses_and_score(output)

    return run


@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("model", MODELS)
def test_the_same_is_learnt(few, tmp_path, monkeypatch, plain, model, technique):
    flags, tolerance = TECHNIQUES[technique]
    folder, output = MODELS[model][0], tmp_path / "run"
    steps = GRAPH_STEPS if "--cuda-graphs" in flags else STEPS
    words = [*words_of(model, few, output, steps), *flags]
    made = []
    if "--cuda-graphs" in flags:  # on a CPU, with the stand-in that records and replays
        monkeypatch.setattr(graphs, "available", lambda device: True)
        monkeypatch.setattr(graphs, "own_stream", lambda device: None)
        monkeypatch.setattr(graphs, "CudaGraph", lambda: made.append(CpuGraph()) or made[-1])
    real = (model, technique) == ("UNet", "torch.compile") and shutil.which("g++")
    if real:  # two seconds of compiling per kernel; three stages have the kernels of five
        unet, shallow = smp.Unet, {"encoder_depth": 3, "decoder_channels": (64, 32, 16)}
        monkeypatch.setattr(smp, "Unet", lambda *given, **more: unet(*given, **more | shallow))
    if "--compile" in flags and not real:
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
    assert [(g.captures, g.replays) for g in made] == [(1, 3)] * len(made)
    assert len(made) == ("--cuda-graphs" in flags)
    losses, score = losses_and_score(output)
    expected, expected_score = plain(model, steps, "shallow" if real else None)
    if (model, flags[0]) == ("Mask R-CNN", "--amp"):
        tolerance *= 2  # rounding changes which boxes are proposed, and so what is trained on
    distance = sum(abs(a - b) for a, b in zip(losses, expected, strict=True)) / sum(expected)
    assert distance < tolerance
    assert score == pytest.approx(expected_score, abs=0.1)
    saved = checkpoint.load(output / "checkpoint.pth")
    for names in saved["model"], saved["ema"].get("sums", {}):
        assert not any(name.startswith(("module.", "_orig_mod.", "model.")) for name in names)
    if "--ema" in flags:  # every step is in the average, also a replayed one
        assert float(saved["ema"]["factors"]) == pytest.approx(1 - 0.9**steps)
    TRIED.add((model, technique))


def table(tried: set[tuple[str, str]]) -> str:
    shown = [technique for technique in TECHNIQUES if not technique.startswith("all")]
    rows = [["model", *shown], ["---"] * (1 + len(shown))]
    for model in MODELS:
        rows.append([model, *("yes" if (model, t) in tried else "no" for t in shown)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def test_the_readme_says_what_is_tried(request):
    """A technique that fails is red above; the table holds what passed in this run."""
    if request.config.getoption("--write-readme"):
        write_part(ROOT / "README.md", "techniques", table(TRIED))
    every = set(product(MODELS, TECHNIQUES))
    assert part(ROOT / "README.md", "techniques") == table(every)
