"""Real steps of StochCA on two processes, one thread each: what coins that differ between ranks cost there.

Each process trains under `DistributedDataParallel` with coins that both draw alike, and with coins that each
draws from a seed of its own; and it trains a copy alone. From those times `bench.scaling.waiting`'s law for
DDP predicts what the ranks wait for each other: in each step, for the slower one. Each rank needs a core of
its own: where others keep the cores busy, a rank that waits gives its time to the one it waits for.
"""

import gc
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from stochca import StochCA
from stochca.plan import CoinSampler

RANKS = 2
WARM_UP_STEPS = 2
NUM_CLASSES = 10


@dataclass(frozen=True)
class Training:
    """What the processes train.

    Args:
        model: timm's name.
        image_size: Height and width in pixels.
        depth: Number of blocks.
        batch: Images of each rank.
        p: Probability that a block reads the source.
        steps: Different draws of coins.
        repeats: How often each is timed; the least time counts.
    """

    model: str
    image_size: int
    depth: int
    batch: int
    p: float
    steps: int
    repeats: int

    def sampler(self, seed: int) -> CoinSampler:
        """Draws the coins of all steps."""
        return CoinSampler(self.p, self.depth, seed=seed)


def measure(training: Training) -> dict[str, Any]:
    """Train on all ranks; return mean times of a step in ms, and what independent coins cost, as ratios."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_run_rank, (training, folder), nprocs=RANKS)
        seconds = np.load(Path(folder) / "seconds.npy")
    return {**asdict(training), "ranks": RANKS, "cores": os.cpu_count(), **compare(seconds)}


def compare(seconds: np.ndarray) -> dict[str, float]:
    """What independent coins cost, measured and predicted.

    Args:
        seconds: Of steps `[kind, rank, repeat, step]`: first of every rank alone with the coins of rank 0,
            of rank 1 and so on, then of all together, with equal coins and with independent ones.
    """
    of_step = seconds.min(2)  # others who use the machine make steps longer, never shorter
    ranks = seconds.shape[1]
    alone = of_step[:ranks].mean(1)  # what a draw takes does not depend on who computes it
    equal, independent = (float(times.max(0).mean()) for times in of_step[ranks:])
    waiting = float((alone.max(0) - alone[0]).mean())
    return {
        "alone_ms": 1e3 * float(alone[0].mean()),
        "equal_ms": 1e3 * equal,
        "independent_ms": 1e3 * independent,
        "measured_ratio": independent / equal,
        "predicted_ratio": (equal + waiting) / equal,
    }


def _run_rank(rank: int, training: Training, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    seconds = _time_steps(rank, training)
    gathered = [torch.empty_like(seconds) for _ in range(RANKS)]
    distributed.all_gather(gathered, seconds)
    if rank == 0:
        np.save(Path(folder) / "seconds.npy", torch.stack(gathered, 1).numpy())
    # The group must not be left to DDP to take down, which waits for gloo's thread while that waits for it.
    gc.collect()
    distributed.destroy_process_group()


def _time_steps(rank: int, training: Training) -> Tensor:
    """Seconds of each kind of step `[kind, repeat, step]`, float64."""
    torch.manual_seed(rank)
    images = torch.randn(training.batch, 3, training.image_size, training.image_size)
    labels = torch.randint(NUM_CLASSES, (training.batch,))
    alone, parallel = _model(training), DistributedDataParallel(_model(training))
    # The draws of rank 0 are also those that all ranks share.
    kinds = [
        *(_stepper(alone, training.sampler(seed), images, labels) for seed in range(RANKS)),
        _stepper(parallel, training.sampler(0), images, labels),
        _stepper(parallel, training.sampler(rank), images, labels),
    ]
    for step in range(WARM_UP_STEPS):
        for run in kinds:
            run(step)
    seconds = torch.zeros(len(kinds), training.repeats, training.steps, dtype=torch.float64)
    for repeat in range(training.repeats):
        for step in range(training.steps):
            for kind, run in enumerate(kinds):
                seconds[kind, repeat, step] = run(step)
    return seconds


def _model(training: Training) -> StochCA:
    torch.manual_seed(0)
    target = timm.create_model(
        training.model, img_size=training.image_size, depth=training.depth, num_classes=NUM_CLASSES
    )
    return StochCA(target).train()


def _stepper(
    model: nn.Module, sampler: CoinSampler, images: Tensor, labels: Tensor
) -> Callable[[int], float]:
    """A function that trains the step of that number with a sampler's coins, and returns its seconds."""
    stochca = model.module if isinstance(model, DistributedDataParallel) else model
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, fused=True)

    def run(step: int) -> float:
        sampler.step, stochca.coins = step, sampler
        distributed.barrier()
        start = time.perf_counter()
        cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    return run
