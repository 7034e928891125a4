"""A graph that records and replays on the CPU: what a CUDA graph does, without CUDA."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.syncs import SYNCS


class CpuGraph:
    """Records every operator of a function with the tensors it used, and replays them.

    As with CUDA: capturing changes no tensor that existed before, Python runs only once, replaying
    works on the same addresses, and an operator that reads a value back is refused.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[Any, tuple, dict, list[Tensor]]] = []
        self.captures = self.replays = 0

    def capture(self, function):
        self.capture_begin()
        try:
            return function()
        finally:
            self.capture_end()

    # The names of `torch.cuda.CUDAGraph`, for which it can stand in, too.
    def capture_begin(self, *_, **__):
        self.captures += 1
        self.recorder = _Recorder(self.calls)
        self.recorder.__enter__()

    def capture_end(self):
        self.recorder.__exit__(None, None, None)
        for tensor, before in self.recorder.before.values():
            tensor.copy_(before)

    def reset(self):
        self.calls.clear()

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for func, args, kwargs, outputs in self.calls:
            found = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
            for place, value in zip(outputs, found, strict=True):
                if place.data_ptr() != value.data_ptr():
                    place.copy_(value)


class _Recorder(TorchDispatchMode):
    @classmethod
    def ignore_compile_internals(cls):
        return True  # else torch.compile refuses to run; what it compiled is recorded

    def __init__(self, calls):
        super().__init__()
        self.calls = calls
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.made: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.name() in SYNCS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func.name()}")
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        for tensor in inputs:
            key = tensor.untyped_storage().data_ptr()
            if key not in self.made and key not in self.before:
                with torch.no_grad():
                    self.before[key] = (_whole(tensor), _whole(tensor).clone())
        result = func(*args, **kwargs)
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        for tensor in outputs:
            key = tensor.untyped_storage().data_ptr()
            if key not in self.before:
                self.made[key] = tensor  # kept alive, so that no other tensor gets its address
        held = tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, (args, kwargs))
        self.calls.append((func, *held, [t.detach() for t in outputs]))
        return result


def _whole(tensor: Tensor) -> Tensor:
    """All of the memory that a tensor is a part of."""
    storage = tensor.untyped_storage()
    count = storage.nbytes() // tensor.element_size()
    return torch.empty(0, dtype=tensor.dtype).set_(storage, 0, (count,), (1,))
