"""A small tiled dataset, rendered and cut by the repository's own commands."""

import json
import os
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

# Torch's cache of compiled code ignores ATEN_CPU_CAPABILITY, and AVX-512 code of an earlier run
# crashes in a process that is limited to AVX2 (seen with 2.14.1).
CACHE = Path(tempfile.gettempdir()) / f"inductor-{torch.backends.cpu.get_cpu_capability()}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHE))

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers.commands import training

from benchmarks.lib.standins import narrow, use_cpu_graphs
from common import augment
from preprocessing import preprocess
from rareplanes import sample

# A limit of time is for what hangs.
TOO_SLOW = [HealthCheck.too_slow]
settings.register_profile("suite", settings(), deadline=None, suppress_health_check=TOO_SLOW)
settings.load_profile("suite")

# On a busy machine, threads that wait for each other cost more time than they save.
torch.set_num_threads(1)


def pytest_sessionfinish(session, exitstatus):
    """`make test-gpu` without a GPU, or `make test-hosts` without root, has tested nothing.

    A session that was interrupted before the end of its first test says so itself.
    """
    if exitstatus == pytest.ExitCode.INTERRUPTED:
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    ran = [reporter.stats.get(result) for result in ("passed", "failed", "error")]
    if session.config.option.markexpr in ("gpu", "hosts") and not any(ran):
        reporter.write_line(f"all tests were skipped: -m {session.config.option.markexpr}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def tiled(tmp_path_factory) -> Path:
    """24 scenes of 384x256 in 128-pixel tiles: train/, val/ and test/. Do not write into it."""
    root = tmp_path_factory.mktemp("tiled")
    sample.main(["-o", str(root), "-n", "24", "--seed", "8", "--size", "384", "256"])
    preprocess.main([str(root), "-s", "128", "-n", "1"])
    return root


@pytest.fixture(scope="session")
def few(tiled, tmp_path_factory) -> Path:
    """`tiled` with two validation tiles: scoring all of them can take longer than the steps."""
    root = shutil.copytree(tiled, tmp_path_factory.mktemp("few") / "tiled")
    index = root / "val/instances_tiled.json"
    coco = json.loads(index.read_text())
    shown = {a["image_id"] for a in coco["annotations"] if not a["iscrowd"]}
    coco["images"] = [image for image in coco["images"] if image["id"] in shown][:2]
    kept = {image["id"] for image in coco["images"]}
    coco["annotations"] = [a for a in coco["annotations"] if a["image_id"] in kept]
    index.write_text(json.dumps(coco))
    return root


@pytest.fixture
def tiled_copy(tiled, tmp_path) -> Path:
    """A copy of `tiled` that a test may damage."""
    shutil.copytree(tiled, tmp_path / "tiled")
    return tmp_path / "tiled"


@pytest.fixture(scope="session")
def trained(tiled, tmp_path_factory) -> Path:
    """The output folder of a short UNet training."""
    from unet import train

    output = tmp_path_factory.mktemp("trained") / "run"
    train.main(training(tiled, output, "--max-steps", 8))
    return output


@pytest.fixture(scope="module")
def thin():
    """Narrow networks, for modules that do not depend on the width.

    With emulated bf16 a step of the full ones takes minutes.
    """
    with pytest.MonkeyPatch.context() as patch:
        narrow(patch.setattr)
        yield


@pytest.fixture
def fake(monkeypatch):
    """Tensors without values, so that no value can be read."""
    for name in ("_statistics", "_noise_field"):
        monkeypatch.setattr(augment, name, cache(getattr(augment, name).__wrapped__))
    # Fake parameters cannot be moved; the tests build them on the right device.
    monkeypatch.setattr(nn.Module, "to", lambda self, *args, **kwargs: self)
    with FakeTensorMode() as mode:
        yield mode


@pytest.fixture
def standin(monkeypatch):
    """CUDA graphs that record and replay on the CPU, soon; the list of those made."""
    return use_cpu_graphs(monkeypatch.setattr)
