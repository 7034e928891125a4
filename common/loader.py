"""Which tiles each process takes, step by step."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from common.cli import UserError
from common.distributed import Process


class GlobalBatches(Sampler[list[int]]):
    """Which tiles this rank trains on, step by step.

    Step s of an epoch takes the permutation's entries s·G … (s+1)·G, G the global batch, and rank r
    the r-th part of them: the tiles of a step do not depend on how many processes share them. The
    permutation is a function of seed and epoch. A last, partial global batch is dropped.
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
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.length, generator=generator)
        steps = order[: len(self) * self.batch_size * self.world_size]
        mine = steps.view(len(self), self.world_size, self.batch_size)[:, self.rank]
        yield from mine[self.first_step :].tolist()


class Shard(Sampler[list[int]]):
    """This rank's share of an evaluation: every tile exactly once over all ranks, no padding."""

    def __init__(self, length: int, batch_size: int, process: Process) -> None:
        mine = range(process.rank, length, process.world_size)
        self.batches = [list(mine[i : i + batch_size]) for i in range(0, len(mine), batch_size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)
