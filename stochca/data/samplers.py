"""Which images a process reads, in which order: a function of seed, epoch and position alone."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


class EpochSampler(Sampler[int]):
    """Positions of one epoch, in an order that depends on (seed, epoch) alone, for one of several processes.

    The order is cut into global batches of `world_size * batch_size`, and those into a chunk per process: W
    processes with batches of B see the images of one process with batches of W * B. An incomplete global
    batch at the end is left out.

    Args:
        length: Images in the dataset.
        seed: Of the order.
        batch_size: Images per batch of a process.
        rank: Of the process.
        world_size: Processes.

    Attributes:
        epoch: The epoch that the next iteration runs.
        start: How many of its images, over all processes, the next iteration leaves out, to resume in the
            middle of it.
        global_batch_size: Images per batch over all processes.
    """

    def __init__(
        self, length: int, seed: int, batch_size: int = 1, rank: int = 0, world_size: int = 1
    ) -> None:
        self.length = length
        self.seed = seed
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.global_batch_size = world_size * batch_size
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        return (self.length - self.start) // self.global_batch_size * self.batch_size

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)[self.start :]
        complete = len(order) // self.global_batch_size * self.global_batch_size
        # [batches, world_size, batch_size]
        chunks = order[:complete].reshape(-1, self.world_size, self.batch_size)
        yield from (self.epoch * self.length + chunks[:, self.rank].ravel()).tolist()


class DomainSampler(Sampler[tuple[int, int]]):
    """Equally many positions of each domain in every batch, for one of several processes.

    Each domain is walked through in endless epochs of its own, in an order that depends on (seed, domain, its
    epoch) alone. Batch t of process r takes the positions `(t * world_size + r) * batch_size` onwards of each
    walk, so that what a step sees depends on its number alone.

    Args:
        lengths: Images in each domain.
        seed: Of the order.
        batch_size: Images per domain and batch of a process.
        rank: Of the process.
        world_size: Processes.

    Attributes:
        epoch: The epoch that the next iteration runs; one is as long as the largest domain.
        start: How many of its images, over all domains and processes, the next iteration leaves out: a
            multiple of `global_batch_size`.
        global_batch_size: Images per batch over all domains and processes.
        steps_per_epoch: Batches of an epoch.
    """

    def __init__(
        self, lengths: Sequence[int], seed: int, batch_size: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.lengths = list(lengths)
        self.seed = seed
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.global_batch_size = len(self.lengths) * world_size * batch_size
        self.steps_per_epoch = max(1, max(self.lengths) // (world_size * batch_size))
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        return (self.steps_per_epoch - self._done()) * len(self.lengths) * self.batch_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Pairs of a domain and `its epoch * its length + index`."""
        walks = [_Walk(self.seed, domain, length) for domain, length in enumerate(self.lengths)]
        for step in range(self._done(), self.steps_per_epoch):
            batch = (self.epoch * self.steps_per_epoch + step) * self.world_size + self.rank
            for domain, walk in enumerate(walks):
                for place in range(batch * self.batch_size, (batch + 1) * self.batch_size):
                    yield domain, walk[place]

    def _done(self) -> int:
        return self.start // self.global_batch_size


class _Walk:
    """The endless walk through one domain; keeps the order of the epoch that it is in."""

    def __init__(self, seed: int, domain: int, length: int) -> None:
        self.seed = seed
        self.domain = domain
        self.length = length
        self.epoch = -1

    def __getitem__(self, place: int) -> int:
        epoch, rest = divmod(place, self.length)
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = np.random.default_rng([self.seed, self.domain, epoch]).permutation(self.length)
        return epoch * self.length + int(self.order[rest])
