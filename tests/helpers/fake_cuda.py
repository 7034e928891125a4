"""A CUDA device of fake tensors: shapes, dtypes, devices and strides of a step, without a GPU."""

from collections import Counter
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common import augment

CUDA = torch.device("cuda", 0)
# They leave channels-last on logits of two channels, and in sums of gradients with that of a mean
# over the image.
SMALL = {"aten::upsample_bilinear2d", "aten::_log_softmax", "aten::add.Tensor"}


@contextmanager
def fake_cuda(patch):
    """Tensors on `CUDA` without values, and all that asks for a driver answered.

    Args:
        patch: pytest's MonkeyPatch.
    """
    patch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    # `torch.amp`'s autocast and GradScaler ask this function.
    patch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    patch.setattr(Tensor, "backward", backward)
    patch.setattr(nn.Module, "to", _in_layout)
    for name in ("_statistics", "_noise_field"):
        patch.setattr(augment, name, cache(getattr(augment, name).__wrapped__))
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def _in_layout(module, *_, memory_format=None):
    """`nn.Module.to` for fake parameters, which cannot be moved and are on the device already."""
    for parameter in module.parameters():
        if memory_format and parameter.ndim == 4:
            parameter.data = parameter.data.to(memory_format=memory_format)
    return module


@torch.no_grad()
def backward(loss):
    """What autograd's engine does, which asks a driver for the device's streams."""
    order, state = [], {loss.grad_fn}
    path = [(loss.grad_fn, iter(loss.grad_fn.next_functions))]
    while path:
        node, following = path[-1]
        other = next((n for n, _ in following if n is not None and n not in state), None)
        if other is None:
            order.append(path.pop()[0])
        else:
            state.add(other)
            path.append((other, iter(other.next_functions)))
    gradients = {node: [None] * len(node._input_metadata) for node in order}
    gradients[loss.grad_fn][0] = torch.ones_like(loss)
    for node in reversed(order):
        own = gradients.pop(node)
        if hasattr(node, "variable"):
            leaf = node.variable
            leaf.grad = own[0] if leaf.grad is None else leaf.grad.add_(own[0])
            continue
        found = node(*own) if callable(node) else _contiguous(node)
        found = found if isinstance(found, tuple) else (found,)
        for (other, i), gradient in zip(node.next_functions, found, strict=True):
            if other is not None and gradient is not None:
                expected = other._input_metadata[i]
                gradient = gradient.to(expected.dtype).sum_to_size(expected.shape)
                before = gradients[other][i]
                gradients[other][i] = gradient if before is None else before + gradient


def _contiguous(node):
    """The gradients of torchvision's RoIAlign, whose node only the engine can call."""
    wanted = [other and other._input_metadata[i] for other, i in node.next_functions]
    return tuple(w and torch.empty(w.shape, dtype=w.dtype, device=w.device) for w in wanted)


class Census(TorchDispatchMode):
    """Counts operators that see tensors on two devices, and those that leave channels-last."""

    def __init__(self):
        super().__init__()
        self.mixed, self.left = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        # A slice is filled with a number, which torch hands over as a tensor on the CPU.
        if len({t.device for t in (*given, *made)}) > 1 and func.name() != "aten::fill_.Tensor":
            self.mixed[func.name()] += 1
        if any(map(only_channels_last, given)) and any(map(only_contiguous, made)):
            self.left[func.name()] += 1
        return result


def copied_by_group_norm(census):
    """How many layers left channels-last; in torch 2.11 they copied their input first."""
    return census.left["aten::native_group_norm"] or census.left["aten::clone"]


def only_channels_last(tensor):
    return _is(tensor, torch.channels_last) and not _is(tensor, torch.contiguous_format)


def only_contiguous(tensor):
    return _is(tensor, torch.contiguous_format) and not _is(tensor, torch.channels_last)


def _is(tensor, layout):
    return tensor.ndim == 4 and tensor.is_contiguous(memory_format=layout)
