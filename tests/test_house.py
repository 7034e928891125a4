"""The structure of the repository: who imports whom, what needs no torch, how long files are."""

import ast
from pathlib import Path

import pytest
from helpers.commands import ROOT

MODELS = ("fcn", "DeepLabV3", "unet", "mask")
# The packages, lowest first, and what each may import besides itself.
MAY_IMPORT = {
    "common.cli": set(),
    "common.io": {"common.cli"},
    "common.run": {"common.cli", "common.io", "common.distributed"},
    "common": {"common.cli", "common.io", "common.run"},
    "common.predict": {"common.cli", "common.io", "common.run", "common"},
    "rareplanes": {"common.cli", "common.io"},
    "preprocessing": {"common.cli", "common.io", "rareplanes"},
}
MAY_IMPORT |= {model: set(MAY_IMPORT) - {"rareplanes", "preprocessing"} for model in MODELS}
MAY_IMPORT["benchmarks"] = set(MAY_IMPORT)
NO_TORCH = ("common.cli", "common.io", "rareplanes", "preprocessing")
# What common/run needs of the process group; it uses nothing else of the training.
GROUND = {"common.distributed", "common.graphs"}


def room_of(module: str) -> str:
    """The package that a module such as `common.io.files` is in; '' for a foreign module."""
    parts = module.split(".")
    while parts and ".".join(parts) not in MAY_IMPORT:
        parts.pop()
    return ".".join(parts)


def product() -> list[Path]:
    folders = ("common", "rareplanes", "preprocessing", *MODELS, "benchmarks")
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports(path: Path) -> set[str]:
    """The modules that a file imports: `from common import args` is `common.args`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                is_module = (ROOT / inner.replace(".", "/")).with_suffix(".py").exists()
                found.add(inner if is_module else node.module)
    return found


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_run_downwards(room):
    upwards = []
    for path in product():
        if room_of(module_of(path)) != room:
            continue
        for module in imports(path):
            other = room_of(module)
            if other in ("", room) or other in MAY_IMPORT[room]:
                continue
            if module in GROUND and module in MAY_IMPORT[room]:
                continue
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


@pytest.mark.parametrize("room", NO_TORCH)
def test_rooms_without_torch(room):
    """Downloading and tiling must not wait for its import."""
    for path in product():
        if room_of(module_of(path)) == room:
            heavy = {m for m in imports(path) if m.split(".")[0] in ("torch", "torchvision")}
            assert not heavy, path


def test_no_file_is_longer_than_400_lines():
    lengths = {path: len(path.read_text().splitlines()) for path in product()}
    assert {str(p.relative_to(ROOT)): n for p, n in lengths.items() if n > 400} == {}
