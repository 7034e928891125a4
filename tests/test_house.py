"""The structure of the repository: who imports whom, and how much there is to read."""

import ast
import os
import re
import tomllib
from pathlib import Path

import pytest
from helpers.commands import ROOT
from hypothesis import HealthCheck, settings

from benchmarks.lib.models import MODELS as ROWS

MODELS = sorted(path.parent.name for path in ROOT.glob("*/model.py"))
COMMON = ("cli", "io", "graphs", "distributed", "run")
# The rooms, lowest first, and what each may import besides itself. `common` is what a train.py
# names; `common.distributed` and `common.graphs` are below `common.run`, which needs them.
MAY_IMPORT: dict[str, set[str]] = {
    "common.cli": set(),
    "common.io": {"common.cli"},
    "common.graphs": {"common.cli"},
    "common.distributed": {"common.cli", "common.graphs"},
    "common.run": {"common.cli", "common.io", "common.distributed"},
    "common": {f"common.{room}" for room in COMMON},
    "common.predict": {"common", *(f"common.{room}" for room in COMMON)},
    "rareplanes": {"common.cli", "common.io"},
    "preprocessing": {"common.cli", "common.io", "rareplanes"},
}
MAY_IMPORT |= {model: set(MAY_IMPORT) - {"rareplanes", "preprocessing"} for model in MODELS}
MAY_IMPORT["benchmarks"] = set(MAY_IMPORT)
# Lines for a change of your own. `.ci/run` checks the repository itself, without them.
ROOM = 0 if os.environ.get("EXACT_BUDGET") else 150
NO_TORCH = ("common.cli", "common.io", "rareplanes", "preprocessing")


def room_of(module: str) -> str:
    """The room that a module such as `common.io.files` is in; '' for a foreign module."""
    parts = module.split(".")
    while parts and ".".join(parts) not in MAY_IMPORT:
        parts.pop()
    return ".".join(parts)


def product() -> list[Path]:
    folders = ("common", "rareplanes", "preprocessing", *MODELS, "benchmarks")
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def path_of(module: str) -> Path:
    return (ROOT / module.replace(".", "/")).with_suffix(".py")


def length(path: Path) -> int:
    return len(path.read_text().splitlines())


def imports(path: Path) -> set[str]:
    """The modules that a file imports, also inside functions and by `importlib`.

    `from common import args` is `common.args`. A name that is made at run time is left out.
    """
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                modules.add(inner if path_of(inner).exists() else node.module)
        elif isinstance(node, ast.Call) and node.args and "import" in ast.unparse(node.func):
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                modules.add(name.value)
    return modules


def closure(script: str) -> set[Path]:
    """The files of the repository that a script loads."""
    loaded: set[Path] = set()
    waiting = [ROOT / script]
    while waiting:
        path = waiting.pop()
        if path not in loaded:
            loaded.add(path)
            waiting += [path_of(m) for m in imports(path) if path_of(m).exists()]
    return loaded


def test_each_model_has_its_row_and_its_types_are_checked():
    mypy = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["files"]
    assert set(ROWS) == set(MODELS), "edit MODELS in benchmarks/lib/models.py"
    assert set(MODELS) <= set(mypy), "edit [tool.mypy] in pyproject.toml"


def test_no_room_may_import_one_above_it():
    """So there is no circle of rooms."""
    order = list(MAY_IMPORT)
    for room, others in MAY_IMPORT.items():
        assert all(order.index(other) < order.index(room) for other in others), room


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_run_downwards(room):
    upwards = []
    for path in product():
        if room_of(module_of(path)) != room:
            continue
        for module in imports(path):
            other = room_of(module)
            if other not in ("", room) and other not in MAY_IMPORT[room]:
                upwards.append(f"{path.relative_to(ROOT)} imports {module}")
    assert upwards == []


def test_no_circle_of_modules():
    edges = {module_of(path): imports(path) for path in product()}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " imports ".join((*way, module))
        if module in done or module not in edges:
            return
        for other in edges[module]:
            visit(other, (*way, module))
        done.add(module)

    for module in edges:
        visit(module, ())


def test_the_product_does_not_import_tests():
    tests = {path.stem for path in (ROOT / "tests").iterdir()} | {"pytest", "tests"}
    for path in product():
        assert not {module.split(".")[0] for module in imports(path)} & tests, path


@pytest.mark.parametrize("room", NO_TORCH)
def test_rooms_without_torch(room):
    """Downloading and tiling must not wait for its import."""
    for path in product():
        if room_of(module_of(path)) == room:
            heavy = {m for m in imports(path) if m.split(".")[0] in ("torch", "torchvision")}
            assert not heavy, path


def test_a_training_can_be_read_in_an_afternoon():
    """Files stay whole and few. Cutting a file into fragments does not help here."""
    loaded = closure("unet/train.py")
    assert len(loaded) <= 28
    assert sum(map(length, loaded)) <= 4600 + ROOM
    assert sum(map(length, (ROOT / "common").glob("*.py"))) <= 2400 + ROOM


def test_a_limit_of_time_in_a_test_is_for_what_hangs():
    """So the suite passes on a busy machine. There is one such limit, `PATIENCE`."""
    assert settings.default.deadline is None
    assert HealthCheck.too_slow in settings.default.suppress_health_check
    for path in (ROOT / "tests").rglob("*.py"):
        numbers = r"(\bdeadline=|\btimeout=|\btimeout\(|\.wait\(|\.join\(|communicate\()\d"
        assert not re.findall(numbers, path.read_text()), path


def test_no_file_is_longer_than_400_lines():
    assert {
        str(path.relative_to(ROOT)): length(path) for path in product() if length(path) > 400
    } == {}
