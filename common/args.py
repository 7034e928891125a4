"""The options that all train.py share, what cannot work together, and what the speed-ups mean."""

import argparse
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch.amp import GradScaler

from common import cli, graphs
from common.augment import SCALE_JITTER
from common.cli import Parser, UserError, fraction, interval, loaders, number, positive, seeds
from common.distributed import Process, pick_device

# Share of the peak rate, by the share of the steps after the warm-up that is left.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "poly": lambda left: left**0.9,  # DeepLab's
    "constant": lambda _: 1.0,
    "cosine": lambda left: (1 - math.cos(math.pi * left)) / 2,
}


def train_parser(description: str, output_dir: str = "runs") -> Parser:
    """The options that every train.py has; `output_dir` is this model's default."""
    parser = Parser(description=description)
    add = parser.add_argument
    add("--config", metavar="FILE.yaml", help="sets any option; the command line overrides it")
    add("--data-path", type=Path, default="data", help="folder with the tiled train/ and val/")
    add("--extra-data", nargs="+", default=(), help="folders whose train/ is trained on, too")
    add("--output-dir", type=Path, default=output_dir, help="checkpoints, log and pictures")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    workers = min(4, os.cpu_count() or 1)
    add("-j", "--workers", type=loaders, default=workers, help="loader processes per rank")
    add("--seed", type=seeds, default=0, help="seed of weights, order and augmentation")
    add("--print-freq", type=positive, default=20, help="steps between log lines")
    help = "continue the run that wrote this file; auto or no name: the run in --output-dir"
    add("--resume", type=Path, nargs="?", const="auto", metavar="CHECKPOINT", help=help)
    help = "save within epochs: 500 (steps), 10m (minutes), 0 (only after epochs)"
    add("--save-every", type=interval, default="10m", metavar="STEPS|MINUTES", help=help)
    help = "end the run when a process has been silent for this long"
    add("--dist-timeout", type=number(float, 1), default=300, metavar="SECONDS", help=help)
    help = "score --resume on data-path/test (or val) and draw a sheet; no training"
    add("--test-only", nargs="?", const="test", choices=("test", "val"), help=help)

    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--epochs", type=positive, default=20, help="passes over the training tiles")
    add("--max-steps", type=positive, help="train for this many steps, whatever --epochs says")
    add("--eval-freq", type=positive, default=1, help="epochs between validations and checkpoints")
    help = "steps between validations and checkpoints, instead of --eval-freq"
    add("--eval-steps", type=positive, metavar="STEPS", help=help)
    help = "validate on this many tiles, spread evenly over val/; default: all"
    add("--eval-tiles", type=positive, metavar="TILES", help=help)
    add("-b", "--batch-size", type=positive, default=8, help="tiles per process and forward pass")
    add("--grad-accum", type=positive, default=1, metavar="K", help="forward passes per step")
    add("--crop-size", type=positive, default=512, help="side of a training crop, pixels")
    help = "views of a tile: pixels only moved (none), in another light, or as of another camera"
    add("--augment", choices=list(SCALE_JITTER), default="light", help=help)
    help = "crop at scales from 1/(1+j) to 1+j; default: 0, with --augment strong 1"
    add("--scale-jitter", type=fraction, metavar="J", help=help)
    help = "share of the crops that are drawn to contain an aircraft, of tiles that show one"
    add("--foreground", type=fraction, default=0.0, metavar="SHARE", help=help)
    add("--lr", type=number(float, 0), default=1e-3, help="peak rate, for the global batch")
    help = "from --lr to 0 as (1 - t)^0.9 (poly) or as a cosine, or constant, best with --ema"
    add("--lr-schedule", choices=list(SCHEDULES), default="poly", help=help)
    add("--warmup-steps", type=number(int, 0), default=50, help="steps of linear rise to --lr")
    add("--weight-decay", type=number(float, 0), default=1e-2)
    help = "score and predict with a moving average of the weights: 0.99 for runs of some hundred "
    help += "steps, 0.999 for longer ones; default: none"
    add("--ema", type=number(float, 0, 0.99999), metavar="DECAY", help=help)
    add("--clip-grad-norm", type=number(float, 1e-9), metavar="NORM", help="default: no clipping")
    norms = ("batch", "group")
    add("--norm", choices=norms, default="batch", help="group: for few tiles per process")
    add("--weights-backbone", default="imagenet", help="imagenet, none or a file of weights")
    help = "start from the weights of this file; if the number of classes differs, the layers that "
    help += "depend on it are re-initialised"
    add("--init-from", type=Path, metavar="CHECKPOINT", help=help)
    help = "the encoder (backbone) learns at FACTOR times --lr"
    add("--lr-encoder", type=number(float, 0), default=1.0, metavar="FACTOR", help=help)
    help = "the encoder keeps its weights and BatchNorm statistics: --lr-encoder 0"
    add("--freeze-encoder", dest="lr_encoder", action="store_const", const=0.0, help=help)

    group = parser.add_argument_group("speed-ups", "DDP has no flag: start with torchrun.")
    cli.add_precision(group)
    switch, help = argparse.BooleanOptionalAction, "launch the whole step at once"
    group.add_argument("--cuda-graphs", action=switch, default=False, help=help)
    return parser


def check(args: argparse.Namespace, stride: int, tile_size: int, min_batch: int = 1) -> None:
    """Refuse what cannot work, before a process group, a download or an allocation starts.

    Args:
        stride: Sides of a crop must be multiples of it.
        tile_size: Side of the smallest training tile, pixels.
        min_batch: Tiles that the network's BatchNorm needs in a forward pass, for any crop.

    Raises:
        UserError: The sentence ends with what to type instead.
    """
    if args.crop_size > tile_size:
        raise UserError(
            f"--crop-size {args.crop_size} is larger than the tiles of {str(args.data_path)!r} "
            f"({tile_size} pixels); use --crop-size {tile_size // stride * stride} or preprocess "
            f"with -s {args.crop_size}."
        )
    if args.crop_size % stride:
        raise UserError(
            f"--crop-size {args.crop_size} is not a multiple of {stride}, the network's stride; "
            f"use {max(stride, args.crop_size // stride * stride)}."
        )
    if args.crop_size == stride:  # the deepest feature map has one pixel
        min_batch = 2
    if args.batch_size < min_batch and args.norm == "batch":
        raise UserError(
            f"--batch-size {args.batch_size} leaves one value per channel in a layer of this "
            f"network, and one value has no variance; use -b {min_batch} or --norm group."
        )
    check_speedups(args, pick_device(args.device))


def check_speedups(args: argparse.Namespace, device: torch.device) -> None:
    """Refuse speed-ups that cannot work on `device`."""
    if args.amp_dtype and not args.amp:
        raise UserError(f"--amp-dtype {args.amp_dtype} does nothing without --amp; add --amp.")
    if args.cuda_graphs and not graphs.available(device):
        raise UserError(
            f"--cuda-graphs needs a CUDA device and this run is on the {device.type}; leave it "
            "out, or try --compile."
        )
    if args.compile and device.type == "cpu" and not (shutil.which("g++") or os.getenv("CXX")):
        raise UserError("--compile on a CPU needs a C++ compiler; install g++ or leave it out.")


@dataclass(frozen=True)
class Speedups:
    """What is switched on. DDP is not here: it is on when there is a process group."""

    amp_dtype: torch.dtype | None = None
    channels_last: bool = False
    cuda_graphs: bool = False
    compile: bool = False
    grad_accum: int = 1

    @property
    def layout(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, self.amp_dtype, self.amp_dtype is not None)

    def scaler(self, device: torch.device) -> GradScaler:
        """fp16 has five exponent bits and loses small gradients unscaled; bf16 has fp32's range."""
        return GradScaler(device.type, enabled=self.amp_dtype == torch.float16)

    def banner(self, process: Process, batch_size: int | None = None) -> str:
        """The first line of a run: what its flags mean; `batch_size` is that of a forward pass."""
        device, world = process.device, process.world_size
        where = f"cpu, {torch.get_num_threads()} threads"
        number = str(self.amp_dtype or torch.float32).removeprefix("torch.")
        if device.type == "cuda":
            where = torch.cuda.get_device_name(device)
            if torch.backends.cudnn.conv.fp32_precision == "tf32":  # type: ignore[attr-defined]
                number += " (float32 convolutions in TF32)"
        items = [where, number, "channels-last" if self.channels_last else "contiguous"]
        items += ["compiled"] * self.compile
        items += [f"CUDA graph after {graphs.WARMUP_STEPS} steps"] * self.cuda_graphs
        items += [f"world size {world}", f"torch {torch.__version__}"]
        items.append(f"torchvision {torchvision.__version__}")
        if batch_size:
            parts = f"{batch_size} tiles x {world} processes x {self.grad_accum} passes"
            items.append(f"global batch {batch_size * world * self.grad_accum} ({parts})")
        return "device " + ", ".join(items)


def amp_dtype(args: argparse.Namespace, device: torch.device) -> torch.dtype | None:
    """What `--amp` and `--amp-dtype` mean on `device`; None without `--amp`."""
    if not args.amp:
        return None
    native = device.type == "cpu" or has_native_bf16(device)
    name = args.amp_dtype or ("bf16" if native else "fp16")
    return torch.bfloat16 if name == "bf16" else torch.float16


def resolve_speedups(args: argparse.Namespace, process: Process) -> Speedups:
    """What the speed-up flags mean on the device of `process`."""
    device, dtype = process.device, amp_dtype(args, process.device)
    if dtype and device.type == "cpu" and (dtype == torch.float16 or not has_native_bf16(device)):
        process.print(
            f"warning: this processor has no {str(dtype).removeprefix('torch.')} arithmetic and "
            "emulates it, which is slower than float32; leave out --amp."
        )
    return Speedups(dtype, args.channels_last, args.cuda_graphs, args.compile, args.grad_accum)


def has_native_bf16(device: torch.device) -> bool:
    """Whether `device` multiplies bf16 itself; others convert to float32 and back."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        return False
    if not hasattr(torch.cpu, "get_capabilities"):  # torch before 2.12
        return torch.cpu._is_avx512_bf16_supported()
    can = torch.cpu.get_capabilities()
    return any(can.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def plain(args: argparse.Namespace) -> dict[str, Any]:
    """The options as a checkpoint holds them: numbers, strings, booleans and None."""
    texts = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in texts.items()}


def of_the_model(options: dict[str, Any]) -> dict[str, Any]:
    """Those of `options` that a model's own train.py adds, and `norm`; they make the network."""
    shared = vars(train_parser("").parse([])).keys() - {"norm"} | {"labels"}
    return {name: value for name, value in options.items() if name not in shared}
