"""What every script does before its own work."""

import argparse
import json
import os
import re
import subprocess
import sys
from contextlib import suppress

import pytest
import torch
from helpers.commands import ROOT
from hypothesis import given
from hypothesis import strategies as st
from torture import children

from common import distributed
from common.args import train_parser
from common.cli import Parser, UserError, positive

FAULTS = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from common.cli import keep_freed_memory
if sys.argv[2] == "kept":
    keep_freed_memory()
for _ in range(20):
    np.ones(64 << 20, np.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


# By default numpy asks for huge pages, and each of them is a single fault.
ENVIRONMENT = {"NUMPY_MADVISE_HUGEPAGE": "0"}


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_large_blocks_are_faulted_in_once():
    def page_faults(how):
        words = [sys.executable, "-c", FAULTS, str(ROOT), how]
        done = subprocess.run(words, capture_output=True, text=True, check=True, env=ENVIRONMENT)
        return int(done.stdout)

    assert page_faults("kept") < page_faults("returned") / 3


def parser():
    made = Parser()
    made.add_argument("--config")
    made.add_argument("-b", "--batch-size", type=positive, default=8)
    made.add_argument("--max-steps", type=positive)
    made.add_argument("--resume", nargs="?", const="auto")
    made.add_argument("--channels", type=positive, nargs=2, default=[1, 2])
    made.add_argument("--amp", action=argparse.BooleanOptionalAction, default=False)
    return made


def configured(folder, text):
    (folder / "c.yaml").write_text(text)
    return parser().parse(["--config", str(folder / "c.yaml")])


@pytest.mark.parametrize("key", ["b", "-b", "batch", "batch_sise", "Batch-size"])
def test_a_key_of_a_config_file_is_answered_by_a_key(tmp_path, key):
    with pytest.raises(UserError, match=r"unknown key .*; did you mean batch-size\?$"):
        configured(tmp_path, f"{key}: 2\n")


def test_null_in_a_config_file_is_the_default(tmp_path):
    for name in ("max-steps", "batch-size", "resume", "channels", "amp"):
        args = configured(tmp_path, f"{name}: null\n")
        assert vars(args) | {"config": None} == vars(parser().parse([]))


def test_values_of_a_config_file(tmp_path):
    args = configured(tmp_path, "resume: true\namp: true\nchannels: [3, 4]\nbatch-size: 2\n")
    assert (args.resume, args.amp, args.channels, args.batch_size) == ("auto", True, [3, 4], 2)
    args = configured(tmp_path, "resume: false\namp: false\n")
    assert (args.resume, args.amp) == (None, False)
    assert configured(tmp_path, "resume: --odd name\n").resume == "--odd name"


simple_values = st.none() | st.booleans() | st.integers() | st.text("a-: ", max_size=4)


@given(
    st.dictionaries(
        st.sampled_from(["batch-size", "max_steps", "resume", "channels", "amp", "b", "", "-"]),
        simple_values | st.lists(simple_values, max_size=3) | st.just({"a": 1}),
    )
)
def test_any_config_file_is_read_or_answered(tmp_path_factory, settings):
    with suppress(UserError):
        configured(tmp_path_factory.getbasetemp(), json.dumps(settings))


def test_a_driver_that_torch_cannot_use_is_no_reason_to_train_on_the_cpu(tmp_path, monkeypatch):
    def too_old():
        raise RuntimeError("The NVIDIA driver is too old (found version 12080). Please update it.")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", too_old)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(distributed, "DRIVER", tmp_path)  # it exists
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(UserError, match=r"found version 12080.*; update .* or use --device cpu"):
        distributed.pick_device("auto")
    assert distributed.pick_device("cpu").type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    assert distributed.pick_device("auto").type == "cpu"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.version, "cuda", None)  # a build for CPUs was chosen
    assert distributed.pick_device("auto").type == "cpu"


def test_tests_that_were_asked_for_and_all_skipped_are_no_success(tmp_path, monkeypatch):
    """`make test-gpu` on a machine without a usable GPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert children.end(children.start(run_gpu_tests, tmp_path / "log")) == 1
    assert "all tests were skipped: -m gpu" in (tmp_path / "log").read_text()


def run_gpu_tests():
    os.chdir(ROOT)
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "tests/test_gpu.py", "-m", "gpu"]))


def test_the_readme_names_every_option_that_all_trainings_share():
    readme = (ROOT / "common/README.md").read_text()
    cells = re.findall(
        r"^\| (`-.*?) \|", readme, re.MULTILINE
    )  # the first cell of each option's row
    named = re.findall(r"`(-[\w-]+)`", " ".join(cells))
    actions = train_parser("")._actions
    options = {option for action in actions for option in action.option_strings}
    options -= {"-h", "--help"} | {o for o in options if o.startswith("--no-")}
    assert sorted(named) == sorted(options)
