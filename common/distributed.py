"""Who this process is among its peers, and the few collectives the loops need.

`torchrun` sets RANK, WORLD_SIZE and LOCAL_RANK; without them this is a world of one and no
process group is made, so that a single process pays for nothing.
"""

import ctypes
import fcntl
import os
import signal
import socket
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
from common.run import heartbeat

# What a scheduler sends before it ends a run: all processes then save and leave.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True)
class Process:
    """One process of the run: its place in the world and the device it owns."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def print(self, *words: object) -> None:
        """Print on rank 0 alone."""
        if self.is_main:
            print(*words, flush=True)


@contextmanager
def process_group(
    device: str, cuda_graphs: bool = False, timeout_seconds: float = 300
) -> Iterator[Process]:
    """Join the process group torchrun announces, if any, and leave it on the way out.

    A process whose launcher ends, ends too. One that falls silent is named by its peers, see
    `common.run.heartbeat`.

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
        # Gloo carries what lives on the CPU: flags, counts, states. None of it waits for the GPU.
        "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo",
        timeout=timedelta(seconds=timeout_seconds),
        device_id=where if where.type == "cuda" else None,
    )
    try:
        with heartbeat.watched(rank, world_size, timeout_seconds):
            yield Process(rank, world_size, where)
    finally:
        graphs.release()  # on the way out NCCL waits for them
    # Only after success: NCCL's farewell is collective, and a process that fails alone would wait
    # in it for peers who wait for the process. torchrun ends them when this one has ended.
    dist.destroy_process_group()


def die_with_parent() -> None:
    """Have the kernel kill this process when its launcher ends (Linux; elsewhere nothing happens).

    torchrun's workers otherwise go on when it is killed, and write where its successor's do.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


@contextmanager
def locked(folder: Path, process: Process) -> Iterator[None]:
    """Be the only run that writes into `folder`; the lock ends with the process, however it ends.

    Raises:
        UserError: On rank 0, where another run holds it.
    """
    if not process.is_main:
        yield
        return
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise UserError(
                f"'{folder}' is being written to by another run ({file.read().strip() or error}); "
                "wait for its end or choose another --output-dir."
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def pick_device(name: str, local_rank: int = 0, world_size: int = 1) -> torch.device:
    """The device `--device NAME` means for this process.

    Raises:
        UserError: The device is unknown or not on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(
            f"--device {name!r} is no device of torch; use auto, cpu or cuda."
        ) from None
    if device.type != "cuda":
        return device
    found = torch.cuda.device_count()
    index = local_rank if world_size > 1 else (device.index or 0)
    if index >= found:
        raise UserError(
            f"--device {name}: GPU {index} was asked for and this machine shows {found} to torch; "
            f"use --device cpu or start at most {found} processes per machine."
        )
    return torch.device("cuda", index)


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum `tensor` over all processes, in place; a world of one returns it untouched."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather(process: Process, tensor: Tensor) -> list[Tensor]:
    """`tensor` of every process, by rank, on the CPU; all have the same shape and dtype."""
    mine = tensor.detach().cpu()
    if process.world_size == 1:
        return [mine]
    everyone = [torch.empty_like(mine) for _ in range(process.world_size)]
    if mine.numel():
        dist.all_gather(everyone, mine)
    return everyone


def wait_for_all(process: Process) -> None:
    """Return when every process has called this."""
    gather(process, torch.zeros(1))


def check_equal(process: Process, **values: int) -> None:
    """Refuse to start where processes differ in `values`: the first collective would hang.

    Raises:
        UserError: On all processes; names the value and who has which.
    """
    everyone = gather(process, torch.tensor(list(values.values())))
    for name, found in zip(values, torch.stack(everyone, 1).tolist(), strict=True):
        if len(set(found)) > 1:
            odd = next(rank for rank, value in enumerate(found) if value != found[0])
            raise UserError(
                f"the processes disagree about the number of {name}: {found[0]} on rank 0, "
                f"{found[odd]} on rank {odd}; give all the same data and options."
            )


@torch.no_grad()
def average_buffers(model: nn.Module) -> None:
    """Give all ranks the mean of their BatchNorm statistics.

    DDP's own answer is to broadcast rank 0's buffers before every forward: two collectives a step,
    and the statistics of one shard. Averaging once, before evaluation and saving, costs nothing
    per step and uses all shards.
    """
    if not dist.is_initialized():
        return
    for buffer in model.buffers():
        if buffer.is_floating_point():
            dist.all_reduce(buffer)
            buffer /= dist.get_world_size()
