"""This process's rank, world size and device, and the few collectives that the loops need.

`torchrun` sets RANK, WORLD_SIZE and LOCAL_RANK. Without them the world size is 1 and no process
group is made, so that it costs a single process nothing.
"""

import ctypes
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common import graphs
from common.cli import UserError

# What a scheduler sends before it ends a run, and Ctrl-C: all processes then save and exit.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
DRIVER = Path("/proc/driver/nvidia/version")  # on Linux; missing without a driver


@dataclass(frozen=True)
class Process:
    """One process of the run: its rank, the world size and the device that it owns."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def print(self, *words: object) -> None:
        """Print on rank 0 only."""
        if self.is_main:
            print(*words, flush=True)


@contextmanager
def process_group(
    device: str, cuda_graphs: bool = False, timeout_seconds: float = 300
) -> Iterator[Process]:
    """Join the process group that torchrun announces, if any, and leave it at the end.

    When its launcher ends, a process ends too.

    Args:
        device: `auto`, `cpu`, `cuda` or `cuda:N`. With several processes on one machine each takes
            the GPU of its local rank.
        cuda_graphs: Whether NCCL's collectives will be captured.
        timeout_seconds: How long a collective may wait for a silent peer.
    """
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    where = pick_device(device, int(os.environ.get("LOCAL_RANK", 0)), world_size)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    if world_size == 1:
        yield Process(0, 1, where)
        return
    if cuda_graphs:
        # PyTorch's first condition for capturing collectives (notes/cuda.html, "Usage with
        # DistributedDataParallel"): NCCL's watchdog must not query events during a capture.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    dist.init_process_group(
        # Gloo carries tensors on the CPU: flags, counts, states. None of them waits for the GPU.
        "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo",
        timeout=timedelta(seconds=timeout_seconds),
        device_id=where if where.type == "cuda" else None,
    )
    try:
        yield Process(rank, world_size, where)
    finally:
        graphs.release()  # NCCL would wait for them at the end
    # Only after success: with NCCL this is a collective. A process that fails alone would wait in
    # it for peers that wait for the process. torchrun ends them when this process has ended.
    dist.destroy_process_group()


def die_with_parent() -> None:
    """Have the kernel kill this process when its launcher ends (Linux; elsewhere nothing happens).

    Otherwise torchrun's workers survive it and write into the files of the next torchrun's.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def pick_device(name: str, local_rank: int = 0, world_size: int = 1) -> torch.device:
    """The device that `--device NAME` means for this process.

    Raises:
        UserError: The device is unknown or not on this machine, or for `auto` there is an NVIDIA
            driver that torch cannot use: on the CPU a training would take days.
    """
    if name == "auto":
        if reason := _unusable_driver():
            raise UserError(
                f"this machine has an NVIDIA driver that torch {torch.__version__} cannot use "
                f"({reason}); update the driver, install torch for an older CUDA "
                "(https://pytorch.org/get-started), or use --device cpu."
            )
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not re.fullmatch(r"cuda(:[0-9]{1,3})?", name):
        raise UserError(f"--device {name!r} is not supported; use auto, cpu, cuda or cuda:N.")
    device = torch.device(name)
    count = torch.cuda.device_count()
    index = local_rank if world_size > 1 else (device.index or 0)
    if index >= count:
        raise UserError(
            f"--device {name}: GPU {index} was asked for and torch sees {count} on this machine; "
            f"use --device cpu or start at most {count} processes per machine."
        )
    return torch.device("cuda", index)


def _unusable_driver() -> str:
    """Why torch cannot use this machine's NVIDIA driver; '' if it can, or is not meant to."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if hidden or not torch.version.cuda or not DRIVER.exists() or torch.cuda.is_available():
        return ""
    try:
        torch.cuda.init()
    except RuntimeError as error:
        return str(error).partition(". ")[0]
    return "torch.cuda.is_available() is False"


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum `tensor` over all processes, in place; with one process it stays as it is."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather(process: Process, tensor: Tensor) -> list[Tensor]:
    """`tensor` of every process, by rank, on the CPU; all have the same shape and dtype."""
    local = tensor.detach().cpu()
    if process.world_size == 1:
        return [local]
    by_rank = [torch.empty_like(local) for _ in range(process.world_size)]
    if local.numel():
        dist.all_gather(by_rank, local)
    return by_rank


def check_equal(process: Process, **values: int) -> None:
    """Refuse to start if processes differ in `values`: the first collective would hang.

    Raises:
        UserError: On all processes; names the value and two ranks that differ.
    """
    by_rank = gather(process, torch.tensor(list(values.values())))
    for name, counts in zip(values, torch.stack(by_rank, 1).tolist(), strict=True):
        if len(set(counts)) > 1:
            other = next(rank for rank, count in enumerate(counts) if count != counts[0])
            raise UserError(
                f"the processes disagree about the number of {name}: {counts[0]} on rank 0, "
                f"{counts[other]} on rank {other}; give all the same data and options."
            )


@torch.no_grad()
def average_buffers(model: nn.Module) -> None:
    """Give all ranks the mean of their BatchNorm statistics.

    Once, before each validation. DDP itself would broadcast rank 0's before every forward pass.
    """
    if not dist.is_initialized():
        return
    for buffer in model.buffers():
        if buffer.is_floating_point():
            dist.all_reduce(buffer)
            buffer /= dist.get_world_size()
