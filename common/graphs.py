"""CUDA graphs: a training step is recorded once and then launched as a whole.

A step of these networks is one to two thousand kernels. The CPU launches each in about five
microseconds; on a small crop or a fast GPU this takes longer than the kernels. Replaying a graph
launches all of them at once. In return nothing in it may change: no shape, no address and no number
that came from Python (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs). The random
views of a batch and the sums for the log stay outside, because they take such numbers.
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from common.cli import UserError

# DDP orders its buckets again after the first backward pass, and its logger times some of the first
# ten steps: PyTorch asks for eleven before a capture. A single process takes the same number, so
# that its losses are comparable.
WARMUP_STEPS = 11


class CudaGraph:
    """Records and replays, on the current stream, which must not be the default one.

    See `own_stream`. On a machine without CUDA the tests have a stand-in.
    """

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        _LIVE.add(self)

    def capture(self, function: Callable[[], Tensor]) -> Tensor:
        """Record what `function` does on the device, without effect; return its result's tensor."""
        # thread_local: meanwhile the loader's pinning thread and NCCL's watchdog make CUDA calls
        # of their own. In the default mode, global, those would be errors.
        stream = torch.cuda.current_stream()
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            return function()

    def replay(self) -> None:
        """Run what was recorded, on the values that its tensors hold now."""
        self._graph.replay()

    def release(self) -> None:
        self._graph.reset()


_LIVE: WeakSet[CudaGraph] = WeakSet()


def release() -> None:
    """Destroy all graphs; none can be replayed afterwards.

    NCCL waits before it frees a communicator while a graph holds one of its kernels
    (https://docs.nvidia.com/dl-cuda-graph/latest/troubleshooting/process-hang.html).
    """
    for graph in _LIVE:
        graph.release()


def available(device: torch.device) -> bool:
    """Whether work on `device` can be captured."""
    return device.type == "cuda"


def own_stream(device: torch.device) -> None:
    """Leave the default stream, which cannot be captured, for the rest of this thread's life.

    Everything from the construction of DDP through the warm-up to the capture then runs on one
    stream, and no gradient accumulation is tied to another stream.
    """
    default = torch.cuda.default_stream(device)
    if torch.cuda.current_stream(device) == default:
        own = torch.cuda.Stream(device)
        own.wait_stream(default)  # for work begun there, such as the initialisation of weights
        torch.cuda.set_stream(own)


class Graphed:
    """`function` on static inputs: called for its first steps, then captured and replayed.

    The warm-up is normal training on real batches. It fills the optimizer's state, DDP's buckets
    and cuDNN's choices. Every tensor that outlives a step (parameters, gradients, optimizer state,
    loss scale, learning rate) keeps its address from the capture on, because `function` is the
    whole step and nothing outside it replaces such a tensor.

    The returned loss is the graph's own memory: the next call overwrites it.
    """

    def __init__(self, function: Callable[..., Tensor], graph: CudaGraph, warmup: int) -> None:
        self.function, self.graph, self.warmup = function, graph, warmup
        self._inputs: list[Any] = []  # tensors, and constants that the graph holds
        self._form: Any = None
        self._output: Tensor | None = None

    def __call__(self, *inputs: Any) -> Tensor:
        values, form = tree_flatten(inputs)  # also of tuples of tensors, as some targets are
        if self._form is None:
            self._form = form
            self._inputs = [torch.empty_like(v) if isinstance(v, Tensor) else v for v in values]
        if form != self._form or list(map(_name, values)) != list(map(_name, self._inputs)):
            raise UserError(
                f"the CUDA graph was captured for {_names(self._inputs)} and was given "
                f"{_names(values)}; keep batch and crop size, or leave out --cuda-graphs."
            )
        # From the prefetched batch into the graph's memory. If the loader copied to here, it would
        # have to wait until the graph is done with the last batch.
        for static, given in zip(self._inputs, values, strict=True):
            if isinstance(static, Tensor):
                static.copy_(given)
        own = tree_unflatten(self._inputs, form)
        if self.warmup > 0:
            self.warmup -= 1
            return self.function(*own)
        if self._output is None:
            self._output = self.graph.capture(lambda: self.function(*own))
        self.graph.replay()
        return self._output


def _name(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def _names(values: list[Any]) -> str:
    return ", ".join(map(_name, values)) or "nothing"
