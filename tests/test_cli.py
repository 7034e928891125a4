"""What every script does before its own work."""

import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from helpers.commands import ROOT
from hypothesis import given
from hypothesis import strategies as st
from torture import children

from benchmarks.lib.models import MODELS
from common import distributed
from common.args import train_parser
from common.cli import UserError

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


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_recipe_changes_options_and_the_command_line_overrides_it(recipe):
    recipe = ["--config", str(recipe)]
    options, defaults = (vars(train_parser("").parse(w)) | {"config": 0} for w in (recipe, []))
    changed = {name for name in options if options[name] != defaults[name]}
    lines = [line.partition(":")[0] for line in Path(recipe[1]).read_text().splitlines()]
    assert changed == {line.replace("-", "_") for line in lines if line[:1] != "#"}
    assert train_parser("").parse([*recipe, "--ema", "0.5"]).ema == 0.5


def configured(folder, text):
    (folder / "c.yaml").write_text(text)
    return train_parser("").parse(["--config", str(folder / "c.yaml")])


@pytest.mark.parametrize("key", ["b", "-b", "batch", "batch_sise", "Batch-size"])
def test_a_key_of_a_config_file_is_answered_by_a_key(tmp_path, key):
    with pytest.raises(UserError, match=r"unknown key .*; did you mean batch-size\?$"):
        configured(tmp_path, f"{key}: 2\n")


ACTIONS = {
    next(option for option in action.option_strings if option.startswith("--"))[2:]: action
    for action in train_parser("")._actions
}
NAMES = sorted(ACTIONS.keys() - {"help", "config"})


@pytest.mark.parametrize("name", NAMES)
def test_every_option_can_be_set_in_a_file(tmp_path, name):
    """To what it is on the command line; null is the default."""
    assert vars(configured(tmp_path, f"{name}: null\n")) == vars(defaults(tmp_path))
    action = ACTIONS[name]
    if action.nargs == 0:  # a switch
        given, text = [f"--{name}"], "true"
        assert vars(configured(tmp_path, f"{name}: false\n")) == vars(defaults(tmp_path))
    else:
        text = action.choices[-1] if action.choices else "0.5" if name == "ema" else "1"
        given = [f"--{name}", text]
    expected = train_parser("").parse(["--config", str(tmp_path / "c.yaml"), *given])
    assert vars(configured(tmp_path, f"{name}: {text}\n")) == vars(expected)


def defaults(folder):
    (folder / "c.yaml").write_text("")
    return train_parser("").parse(["--config", str(folder / "c.yaml")])


def test_an_option_that_may_lack_its_value_is_a_switch_in_a_file(tmp_path):
    assert configured(tmp_path, "resume: true\namp: true\n").resume == Path("auto")
    assert configured(tmp_path, "resume: false\namp: false\n").resume is None
    assert configured(tmp_path, "resume: --odd name\n").resume == Path("--odd name")


simple_values = st.none() | st.booleans() | st.integers() | st.text("a-: ", max_size=4)


@given(
    st.dictionaries(
        st.sampled_from([*NAMES, "max_steps", "b", "", "-", "config"]),
        simple_values | st.lists(simple_values, max_size=3) | st.just({"a": 1}),
        max_size=5,
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


def test_tests_that_were_interrupted_are_not_said_to_be_skipped(tmp_path):
    run = partial(run_gpu_tests, Interrupted())
    assert children.end(children.start(run, tmp_path / "log")) == pytest.ExitCode.INTERRUPTED
    assert "were skipped" not in (tmp_path / "log").read_text()


class Interrupted:
    """A plugin: Ctrl-C at the first test."""

    def pytest_runtest_protocol(self):
        raise KeyboardInterrupt


def run_gpu_tests(*plugins):
    os.chdir(ROOT)
    words = ["-q", "-p", "no:cacheprovider", "tests/test_gpu.py", "-m", "gpu"]
    sys.exit(pytest.main(words, plugins))


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


WITHOUT_TORCH = """
import runpy, sys
script, *sys.argv[1:] = sys.argv[1:]
try:
    runpy.run_path(script, run_name="__main__")
finally:
    print(sorted({"torch", "torchvision", "cv2", "matplotlib"} & sys.modules.keys()))
"""


@pytest.mark.parametrize(
    ("model", "script"),
    [*product(MODELS, ("inference.py", "export.py")), ("unet", "label.py")],
)
def test_help_and_a_wrong_path_are_answered_without_torch(model, script):
    """Its import takes seconds and most of a gigabyte."""
    nowhere = "nowhere.pth", ".", *(["out"] * (script == "inference.py"))
    no_scene = ("README.md", "nowhere.tif", "out") if script == "inference.py" else nowhere
    for words, code, said in (
        (["--help"], 0, ""),
        (nowhere, 2, "error: there is no file or folder 'nowhere.pth'; check the path."),
        (
            no_scene,
            2,
            f"error: there is no file or folder {no_scene[script == 'inference.py']!r}; check",
        ),
        (["README.md", ".", "--wndow", "64", "out"], 2, "error: unknown option --wndow; did you"),
    ):
        command = [sys.executable, "-c", WITHOUT_TORCH, f"{model}/{script}", *words]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert (result.returncode, result.stdout.splitlines()[-1]) == (code, "[]"), result.stderr
        assert said in result.stderr
