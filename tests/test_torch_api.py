"""Every call of torch, also those that only a GPU reaches, fits the torch that is installed."""

import ast
import inspect

import pytest
import torch
from helpers.commands import ROOT
from test_house import product

ROOTS = {
    "torch": torch,
    "nn": torch.nn,
    "F": torch.nn.functional,
    "dist": torch.distributed,
    "DistributedDataParallel": torch.nn.parallel.DistributedDataParallel,
    "GradScaler": torch.amp.GradScaler,
}
# Either the one or the other exists, and common/speedups.py asks which.
EITHER = {"torch.cpu.get_capabilities", "torch.cpu._is_avx512_bf16_supported"}


def name_of(node):
    """`torch.cuda.graph` of the node for it; '' if it does not begin with one of `ROOTS`."""
    if isinstance(node, ast.Attribute):
        outer = name_of(node.value)
        return f"{outer}.{node.attr}" if outer else ""
    return node.id if isinstance(node, ast.Name) and node.id in ROOTS else ""


def resolved(name):
    first, *rest = name.split(".")
    found = ROOTS[first]
    for part in rest:
        found = getattr(found, part)
    return found


def misfits(source):
    """What of torch `source` names and is not there, or calls with other arguments."""
    found = []
    for node in ast.walk(ast.parse(source)):
        name = name_of(node.func if isinstance(node, ast.Call) else node)
        if not name or name in EITHER:
            continue
        try:
            value = resolved(name)
            if isinstance(node, ast.Call):
                count, names = len(node.args), [keyword.arg for keyword in node.keywords]
                if not any(isinstance(a, ast.Starred) for a in node.args) and None not in names:
                    inspect.signature(value).bind(*[None] * count, **dict.fromkeys(names))
        except ValueError:  # written in C, without a signature
            continue
        except (AttributeError, TypeError) as error:
            found.append(f"line {node.lineno}: {name}: {error}")
    return found


def test_every_call_fits_the_installed_torch():
    wrong = {}
    for path in (*product(), ROOT / "tests/test_gpu.py"):
        if misfit := misfits(path.read_text()):
            wrong[str(path.relative_to(ROOT))] = misfit
    assert wrong == {}


@pytest.mark.parametrize(
    "line",
    [
        "torch.cuda.make_graphed_callables(model, inputs, capture_mode='relaxed')",
        "torch.cuda.no_such_thing()",
        "dist.init_process_group(None, device=0)",
        "if torch.backends.cudnn.conv.fp16_precision: pass",
    ],
)
def test_a_call_that_does_not_fit_is_seen(line):
    assert misfits(line)
