"""Proof that a technique engaged: what ran, seen from outside the training's own code."""

import ctypes
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ExecutionTraceObserver

from benchmarks.lib.techniques import DEFAULT_MALLOC, FLAGS
from common import graphs

CONVOLUTIONS = ("conv_x", "conv_backward_x", "conv_backward_grad")
COLUMNS = ("replays", "compiled_graphs", "graph_breaks", *CONVOLUTIONS, "freed_memory")


def count_replays() -> Counter[str]:
    """A counter whose entry `replays` grows from now on with each replay of a captured step."""
    counter: Counter[str] = Counter()
    make = graphs.CudaGraph

    def make_counted() -> graphs.CudaGraph:
        graph = make()
        replay = graph.replay

        def replay_and_count() -> None:
            counter["replays"] += 1
            replay()

        graph.replay = replay_and_count  # type: ignore[method-assign]
        return graph

    graphs.CudaGraph = make_counted  # type: ignore[assignment,misc]
    return counter


def compilations() -> dict[str, int]:
    """How many graphs torch.compile made in this process, and how often it gave a part up."""
    from torch._dynamo.utils import counters  # seconds, if nothing has been compiled

    breaks = sum(counters["graph_break"].values())
    return {"compiled_graphs": counters["stats"]["unique_graphs"], "graph_breaks": breaks}


class _Mallinfo(ctypes.Structure):
    """glibc's `struct mallinfo2`, ten numbers; the fifth is bytes in blocks mapped alone."""

    _fields_ = [(name, ctypes.c_size_t) for name in ("a", "b", "c", "d", "mapped", *"efghi")]


def freed_memory() -> str:
    """Whether glibc `kept` large blocks when they are freed, or `returned` them; '' without glibc.

    It returns those that it maps alone, and keeps those that are part of its heap. The block is so
    large that no free part of the heap holds it, and its half more than another thread frees
    meanwhile. It takes no memory: nothing is written to it.
    """
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        return ""
    mallinfo.restype = _Mallinfo
    before = mallinfo().mapped
    block = torch.empty(256 << 20, dtype=torch.uint8)
    return "returned" if mallinfo().mapped - before >= block.nbytes // 2 else "kept"


def watch_convolutions(step: Callable[[], Tensor]) -> tuple[Tensor, dict[str, str]]:
    """Run `step`, and tell dtype and layout of what its first convolution computed on.

    torch's execution trace sees each call of an operator with its tensors' strides, also those of
    compiled code, and needs no profiler. The first layer is the last in the backward pass.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        observer = ExecutionTraceObserver().register_callback(str(path))
        observer.start()
        loss = step()
        observer.stop()
        observer.unregister_callback()
        calls = sorted(json.loads(path.read_text())["nodes"], key=lambda call: call["id"])
    forward = [c["inputs"] for c in calls if c["name"] == "aten::convolution"]
    backward = [c["inputs"] for c in calls if c["name"] == "aten::convolution_backward"]
    seen = {}
    if forward and backward:
        seen = {"conv_x": _dtype_and_layout(forward[0], 0)}
        seen |= {"conv_backward_grad": _dtype_and_layout(backward[-1], 0)}
        seen |= {"conv_backward_x": _dtype_and_layout(backward[-1], 1)}
    return loss, seen


def _dtype_and_layout(inputs: dict[str, Any], i: int) -> str:
    """An operator's tensor as `bfloat16 channels-last`, or with its strides if it is neither."""
    kind = inputs["types"][i].removeprefix("Tensor(").removesuffix(")").removeprefix("c10::")
    dtype = {"float": "float32", "BFloat16": "bfloat16", "Half": "float16"}.get(kind, kind)
    sizes, strides = inputs["shapes"][i], inputs["strides"][i]
    tensor = torch.empty_strided(sizes, strides, device="meta")
    if tensor.is_contiguous():
        return f"{dtype} contiguous"
    if tensor.is_contiguous(memory_format=torch.channels_last):
        return f"{dtype} channels-last"
    return f"{dtype} {'x'.join(map(str, strides))}"


def missing(row: dict[str, Any], flags: tuple[str, ...], steps: int) -> str:
    """What a cell's flags promise and its report does not show; '' if the techniques engaged.

    Args:
        row: The cell's report, with `technique` and `world` as they were planned.
        flags: Of train.py.
        steps: How many were timed.
    """
    parts = row["technique"].split("+")
    for part in parts:
        if not set(FLAGS.get(part, "").split()) <= set(flags):
            return f"{part}: the flags lack {FLAGS[part]}"
    freed = row["freed_memory"]
    if freed and (freed == "returned") != (DEFAULT_MALLOC in parts):
        return f"{row['technique']}: freed memory was {freed}"
    seen = {name: row.get(name, "") for name in CONVOLUTIONS}
    shown = ", ".join(f"{name} is {value or 'unknown'}" for name, value in seen.items())
    dtypes = {value.split(" ")[0] for value in seen.values()}
    if dtypes != {row["dtype"]}:
        return f"the first convolution was to compute in {row['dtype']}: {shown}"
    # In a compiled step Inductor chooses the layout behind the input; the row says which.
    last = [seen["conv_x"]] if "--compile" in flags else list(seen.values())
    if "--channels-last" in flags and not all(v.endswith(" channels-last") for v in last):
        return f"--channels-last did not reach the first convolution: {shown}"
    if "--cuda-graphs" in flags and row["replays"] < steps:
        return f"--cuda-graphs: {row['replays']} replays in {steps} timed steps"
    if "--compile" in flags and (row["compiled_graphs"] < 1 or row["graph_breaks"]):
        return f"--compile: {row['compiled_graphs']} graphs, {row['graph_breaks']} graph breaks"
    if row["processes"] != row["world"]:
        return f"DDP: {row['processes']} processes of {row['world']}"
    return ""
