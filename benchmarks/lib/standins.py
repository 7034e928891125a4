"""What a dry run and the tests train in place of a GPU's graphs and of the full networks.

`narrow` and `use_cpu_graphs` replace names in modules until the process ends, or by pytest's
`monkeypatch.setattr` until the test does.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torchvision.models import resnet
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.models.segmentation.deeplabv3 import DeepLabHead, DeepLabV3
from torchvision.models.segmentation.fcn import FCN, FCNHead

from benchmarks.syncs import SYNCS
from common import graphs
from DeepLabV3 import model as deeplab
from fcn import model as fcn
from mask import model as mask

Replace = Callable[[Any, str, Any], None]
THIN = 32  # channels of Mask R-CNN's pyramid and heads, which has 256


class Thin(Bottleneck):
    expansion = 1


def thin_backbone() -> IntermediateLayerGetter:
    """Dilated stages of which `out` has 512 channels and `aux` 256."""
    dilated = [False, True, True]
    network = ResNet(Thin, [1, 1, 1, 1], width_per_group=16, replace_stride_with_dilation=dilated)
    return IntermediateLayerGetter(network, {"layer4": "out", "layer3": "aux"})


def thin_fcn(weights: None, weights_backbone: None, num_classes: int, aux_loss: bool) -> nn.Module:
    """Like torchvision's `fcn_resnet50`, dilated stages and both heads: 1.3 million weights."""
    return FCN(thin_backbone(), FCNHead(512, num_classes), FCNHead(256, num_classes))


def thin_deeplab(
    weights: None, weights_backbone: None, num_classes: int, aux_loss: bool
) -> nn.Module:
    """DeepLabV3's heads on the same backbone."""
    return DeepLabV3(thin_backbone(), DeepLabHead(512, num_classes), FCNHead(256, num_classes))


def shallow_resnet18(weights: None, norm_layer: type[nn.Module]) -> ResNet:
    """With one block in each stage instead of two."""
    return ResNet(BasicBlock, [1, 1, 1, 1], norm_layer=norm_layer)


def narrow(replace: Replace = setattr) -> None:
    """Build narrow networks of the light backbones, for what does not depend on the width."""
    replace(fcn, "BACKBONES", fcn.BACKBONES | {"resnet50": thin_fcn})
    replace(deeplab, "BACKBONES", deeplab.BACKBONES | {"mobilenet_v3_large": thin_deeplab})
    replace(resnet, "resnet18", shallow_resnet18)
    replace(mask, "CHANNELS", THIN)


def use_cpu_graphs(replace: Replace = setattr) -> "list[CpuGraph]":
    """Capture steps into graphs that replay on the CPU, after two steps; the list of those made."""
    made: list[CpuGraph] = []

    def make() -> CpuGraph:
        made.append(CpuGraph())
        return made[-1]

    replace(graphs, "WARMUP_STEPS", 2)
    replace(graphs, "CudaGraph", make)
    replace(graphs, "available", lambda device: True)
    replace(graphs, "own_stream", lambda device: None)
    return made


class CpuGraph:
    """Records every operator of a function with the tensors it used, and replays them.

    As with CUDA: capturing changes no tensor that existed before, Python runs only once, replaying
    works on the same addresses, and an operator that reads a value back is refused.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[Any, tuple, dict, list[Tensor]]] = []
        self.captures = self.replays = 0

    def capture(self, function: Callable[[], Tensor]) -> Tensor:
        self.capture_begin()
        try:
            return function()
        finally:
            self.capture_end()

    # The names of `torch.cuda.CUDAGraph`, for which it can stand in, too.
    def capture_begin(self, *_: Any, **__: Any) -> None:
        self.captures += 1
        self.recorder = _Recorder(self.calls)
        self.recorder.__enter__()

    def capture_end(self) -> None:
        self.recorder.__exit__(None, None, None)
        for tensor, before in self.recorder.before.values():
            tensor.copy_(before)

    def reset(self) -> None:
        self.calls.clear()

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, outputs in self.calls:
            computed = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
            for output, value in zip(outputs, computed, strict=True):
                if output.data_ptr() != value.data_ptr():
                    output.copy_(value)


class _Recorder(TorchDispatchMode):
    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # else torch.compile refuses to run; what it compiled is recorded

    def __init__(self, calls: list[tuple[Any, tuple, dict, list[Tensor]]]) -> None:
        super().__init__()
        self.calls = calls
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.made: dict[int, Tensor] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
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
