"""Count what makes a training step, and a prediction, wait for the device, and where.

    python benchmarks/syncs.py
    python benchmarks/syncs.py --models fcn --grad-accum 2

A step of each model runs on the CPU under a dispatch mode that sees every operator. Some operators
need to know a value (`.item()`, `nonzero`, a boolean index, …): on a GPU each of them makes the CPU
wait for the device, and a CUDA graph cannot capture them.
"""

import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.lib.models import MODELS
from benchmarks.lib.synthetic import noise_tiles, training_step
from common.args import Speedups
from common.augment import normalise
from common.cli import Parser, number, positive, run
from common.distributed import Process

ROOT = Path(__file__).resolve().parents[1]

# Operators whose result's shape, or the next Python line, depends on values.
SYNCS = {
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::repeat_interleave.Tensor",
    "aten::bincount",
    "torchvision::nms",
}
# Calls that make a tensor from Python numbers: on a GPU a copy that the CPU waits for.
CONSTANTS = {torch.tensor: "torch.tensor", torch.as_tensor: "torch.as_tensor"}
# Calls that copy a tensor from the device and wait for it.
READS = {Tensor.tolist: "Tensor.tolist", Tensor.cpu: "Tensor.cpu", Tensor.numpy: "Tensor.numpy"}


class SyncCensus(TorchDispatchMode):
    """Counts, while active, the operators that force a sync, by operator and calling line."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = func.name()
        if name in SYNCS or (name.startswith("aten::index") and _by_mask(args)):
            self.found[name, _caller()] += 1
        return func(*args, **(kwargs or {}))


class CopyCensus(TorchFunctionMode):
    """Counts, while active, constants that are made and results that are read, into `found`."""

    def __init__(self, found: Counter[tuple[str, str]]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func in CONSTANTS and not isinstance(args[0], Tensor):
            self.found[CONSTANTS[func], _caller()] += 1
        if func in READS:
            self.found[READS[func], _caller()] += 1
        return func(*args, **(kwargs or {}))


def _by_mask(args: tuple) -> bool:
    """Whether a boolean index has to be counted before the result can be allocated.

    Not if one number is assigned to all elements: PyTorch then fills by the mask.
    """
    filled = len(args) > 2 and isinstance(args[2], Tensor) and args[2].ndim == 0
    masks = (isinstance(x, Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1:2]))
    return any(masks) and not filled


def _caller() -> str:
    """The innermost line outside torch itself; autograd's own threads have none."""
    for frame in reversed(traceback.extract_stack()[:-2]):
        inside = "/torch/" in frame.filename or frame.filename.endswith("benchmarks/syncs.py")
        if not inside:
            path = Path(frame.filename)
            name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path(*path.parts[-3:])
            return f"{name}:{frame.lineno}"
    return "?"


def census(step: Callable[[], Any]) -> Counter[tuple[str, str]]:
    """The syncs of `step()`: (operator, file:line) → count."""
    with SyncCensus() as mode, CopyCensus(mode.found):
        step()
    return mode.found


def waits(step: Callable[[], Any]) -> int:
    """How often the CPU waits for the GPU in `step()`, as CUDA's own calls count it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")  # it warns of itself, too
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(w.message) for w in caught)


def show(name: str, part: str, syncs: Counter[tuple[str, str]]) -> None:
    print(f"{name}: {syncs.total()} syncs in {part}")
    for (operator, line), count in syncs.most_common():
        print(f"  {count:5} {operator}  {line}")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--amp-dtype", choices=("bf16", "fp16"), help="default: float32")
    parser.add_argument("--grad-accum", type=positive, default=1)
    parser.add_argument("--clip-grad-norm", type=number(float, 1e-9))
    args = parser.parse(argv)
    dtypes = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}
    speedups = Speedups(amp_dtype=dtypes[args.amp_dtype], grad_accum=args.grad_accum)
    process = Process(0, 1, torch.device("cpu"))
    for name in args.models:
        model, step = training_step(name, process, speedups, 64, clip_grad_norm=args.clip_grad_norm)
        batch = noise_tiles(2 * args.grad_accum, 96, process.device)
        step(batch)  # the first step makes constants and the optimizer's state
        show(name, "a step", census(partial(step, batch)))
        predict = partial(MODELS[name].module.predict, model.eval(), normalise(batch.images))
        with torch.inference_mode():
            show(name, "a prediction", census(predict))


if __name__ == "__main__":
    run(main)
