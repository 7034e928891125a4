"""Which tile goes to which process and step, the loader processes, and batches on the device."""

import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import cv2
import torch
from torch.utils.data import DataLoader, Sampler

from common.cli import UserError
from common.data import Batch, Tiles
from common.distributed import SIGNALS, Process

PATIENCE = 120  # seconds the loop waits for a loader process
# Not "forkserver": torch's SIGCHLD handler would not see these workers die.
START = "spawn"


class GlobalBatches(Sampler[list[int]]):
    """Which tiles this rank trains on, step by step.

    Step s of an epoch takes the entries s·G … (s+1)·G of the permutation, where G is the global
    batch; rank r takes the r-th part of them. So the tiles of a step do not depend on the number of
    processes. The permutation is a function of seed and epoch. A partial last batch is dropped.
    """

    def __init__(self, length: int, batch_size: int, process: Process, seed: int) -> None:
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world_size = process.rank, process.world_size
        self.epoch = self.first_step = 0
        if len(self) == 0:
            raise UserError(
                f"a global batch takes {batch_size * process.world_size} tiles and the training "
                f"set has {length}; lower --batch-size."
            )

    def __len__(self) -> int:
        return self.length // (self.batch_size * self.world_size)

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        self.epoch, self.first_step = epoch, first_step

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**64)
        order = torch.randperm(self.length, generator=generator)
        steps = order[: len(self) * self.batch_size * self.world_size]
        of_rank = steps.view(len(self), self.world_size, self.batch_size)[:, self.rank]
        yield from of_rank[self.first_step :].tolist()


def shard(length: int, batch_size: int, process: Process) -> list[list[int]]:
    """This rank's batches of an evaluation: every tile exactly once over all ranks, no padding."""
    tiles = range(process.rank, length, process.world_size)
    return [list(tiles[i : i + batch_size]) for i in range(0, len(tiles), batch_size)]


def training_loader(
    tiles: Tiles, batch_size: int, workers: int, process: Process, seed: int
) -> DataLoader:
    """Shuffled global batches, split over the processes: one batch of a loader is one step."""
    batches = GlobalBatches(len(tiles), batch_size, process, seed)
    return _loader(tiles, batches, workers, process.device)


def scoring_loader(tiles: Tiles, batch_size: int, workers: int, process: Process) -> DataLoader:
    """Every tile once, in order, split over the processes."""
    return _loader(tiles, shard(len(tiles), batch_size, process), workers, process.device)


def _loader(tiles: Tiles, batches: Any, workers: int, device: torch.device) -> DataLoader:
    """Nothing in the workers is random, so they need no seeds.

    They are spawned, because a forked worker inherits the locks of OpenCV's and torch's threads. A
    worker that hangs (on a dead network disk, say) ends the run after `PATIENCE`.
    """
    workers = min(workers, len(batches))
    return DataLoader(
        tiles,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        multiprocessing_context=START if workers else None,
        persistent_workers=workers > 0,
        timeout=PATIENCE if workers else 0,
        worker_init_fn=_at_start,
        collate_fn=_as_it_is,
        # A loader draws a seed each time it starts. Drawn from the global generator, it would
        # change the dropout of a run that is resumed within an epoch.
        generator=torch.Generator(),
    )


def _as_it_is(batch: Any) -> Batch:
    return batch  # `Tiles.__getitems__` has already made the batch


def _at_start(_worker: int) -> None:
    cv2.setNumThreads(0)  # torch's own threads are already set to one by the DataLoader
    for number in SIGNALS:  # a scheduler sends them to all processes; only the run handles them
        signal.signal(number, signal.SIG_IGN)


def names(tiles: Any, indices: list[int]) -> str:
    """The file names of some tiles, for a message; negative indices are left out."""
    return ", ".join(repr(tiles.images[i]["file_name"]) for i in indices if i >= 0)


def end_loaders() -> None:
    """Kill the loader processes and wait for them.

    Torch's handler of SIGCHLD raises, wherever the program is, for a dead loader process that
    nobody has waited for, at the latest at the next SIGCHLD.
    """
    while True:
        try:
            for worker in multiprocessing.active_children():
                worker.kill()
                worker.join(5)  # with a limit: a process that waits for a dead disk may survive
            return
        except RuntimeError as error:  # from the handler, once for each loader
            if not str(error).startswith("DataLoader worker"):
                raise


def lost_worker(error: Exception, where: str = "") -> UserError:
    """The error for a loader process that died or hung; torch raises wherever the loop is."""
    end_loaders()  # otherwise the program's end would wait for one that hangs
    what, text = "died (out of memory?)", f"{error} {error.__cause__}"
    if "timed out" in text:
        what = f"hung for {PATIENCE} s"
    elif "shared memory" in text:  # docker gives 64 MB; eight batches of 8 tiles of 512 need more
        what = "ran out of shared memory (in a container start it with --shm-size=8g or --ipc=host)"
    near = f" at or soon after the tiles {where}; check them, or" if where else ";"
    return UserError(
        f"a loader process {what}{near} lower --workers. The last checkpoint is untouched: "
        "--resume continues from it."
    )


@contextmanager
def loader_deaths() -> Iterator[None]:
    """Turn the error of torch's signal handler, wherever it is raised, into one sentence."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise lost_worker(error) from error


def _delivered(batches: DataLoader) -> Iterator[Batch]:
    """The batches of a loader; if its processes fail, one sentence that names the tiles.

    Raises:
        UserError: A loader process died or hung, or met a damaged tile.
    """
    order = iter(batches.batch_sampler or ())
    delivered = iter(batches)
    while True:
        following = next(order, [])
        try:
            batch = next(delivered)
        except StopIteration:
            return
        except UserError as error:  # from a loader process it comes with a traceback
            sentence = str(error).strip().splitlines()[-1]
            raise UserError(sentence.removeprefix("common.cli.UserError: ")) from None
        except (RuntimeError, OSError, EOFError) as error:
            if not batches.num_workers:
                raise
            raise lost_worker(error, names(batches.dataset, following[:4])) from error
        yield batch


def prefetch(batches: DataLoader, device: torch.device) -> Iterator[Batch]:
    """The batches of a loader on `device`, each copied there while the previous step computes."""
    if device.type != "cuda":
        yield from _delivered(batches)
        return
    copies = _copying(device)
    for batch in _delivered(batches):
        # The step before is queued by now, and computes while this is copied.
        with torch.cuda.stream(copies):
            batch = batch.to(device)
        torch.cuda.current_stream(device).wait_stream(copies)
        for tensor in batch:
            tensor.record_stream(torch.cuda.current_stream(device))
        yield batch


@cache
def _copying(device: torch.device) -> torch.cuda.Stream:
    """One stream for all epochs: memory is pooled per stream, and the 33rd is the first again."""
    return torch.cuda.Stream(device)
