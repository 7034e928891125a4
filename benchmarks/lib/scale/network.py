"""What collectives cost on a network, and how much of it a backward pass hides."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Network:
    """`world_size` GPUs, one link each.

    A collective takes `alpha` for each message that waits for the one before, plus its bytes over
    `bandwidth` (the alpha-beta model; Thakur, Rabenseifner and Gropp 2005).
    """

    world_size: int
    bandwidth: float  # bytes/s of a link, each way
    alpha: float  # seconds per message, in addition

    def ring(self, size: float) -> float:
        """Seconds of an all-reduce of `size` bytes: once round to add up, once to distribute.

        No algorithm sends less than its 2(N-1)/N·size (Patarasuk and Yuan 2009).
        """
        N = self.world_size
        return 2 * (N - 1) / N * size / self.bandwidth + 2 * (N - 1) * self.alpha

    def tree(self, size: float) -> float:
        """The same bytes up and down two binary trees, each with half the data.

        Nearly the ring's bandwidth with log2 of its latency (Sanders, Speck and Träff 2009); NCCL
        takes whichever it expects to be faster.
        """
        N = self.world_size
        return 2 * (N - 1) / N * size / self.bandwidth + 2 * math.log2(N) * self.alpha

    def sync_bn_bytes(self, channels: int) -> int:
        """Bytes that each GPU receives for a SyncBatchNorm layer in a step, all of them float32.

        Forward: means, deviations and a count of every other GPU. Backward: an all-reduce of two
        sums per channel.
        """
        return 4 * (2 * channels + 1) * (self.world_size - 1) + 4 * 2 * channels

    def sync_bn(self, channels: int) -> float:
        """Seconds of both. The next layer waits for them, so nothing of it is hidden."""
        gathered = 4 * (2 * channels + 1) * (self.world_size - 1)
        gather = gathered / self.bandwidth + math.log2(self.world_size) * self.alpha
        return gather + self.tree(4 * 2 * channels)


def exposed(costs: list[float], ready: list[float]) -> float:
    """Seconds between the end of the backward pass and the end of the last all-reduce.

    They run one at a time, in order, none before its bucket is complete: the last one ends at the
    maximum over j of ready[j] + costs[j] + … + costs[-1]. The last bucket is complete only when the
    backward pass ends, so costs[-1] is always exposed.

    Args:
        costs: Seconds of each bucket's all-reduce.
        ready: Seconds from the start of the backward pass to each bucket; the last is its end.
    """
    return max(at + sum(costs[j:]) for j, at in enumerate(ready)) - ready[-1]


def hidden_from(costs: list[float], ready: list[float]) -> int:
    """Smallest batch at which nothing but the last bucket's all-reduce is exposed.

    Args:
        costs: Seconds of each bucket's all-reduce.
        ready: As of `exposed`, for a batch of one.
    """
    batches = (sum(costs[j:-1]) / (ready[-1] - at) for j, at in enumerate(ready[:-1]))
    return max([1, *map(math.ceil, batches)])
