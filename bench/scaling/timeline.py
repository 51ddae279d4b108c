"""When a step ends on several ranks whose collectives wait for the slowest: DDP and FSDP, stage by stage."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np

from bench.scaling.cluster import Cluster
from bench.scaling.stages import Stages
from bench.step_times import STATE_BYTES

# DDP sums gradients in float32, in buckets of at least so many bytes (torch's `bucket_cap_mb=25`).
GRADIENT_BYTES = 4
BUCKET_BYTES = 25 * 2**20
# FSDP gathers parameters in bf16, before the forward and again before the backward, and sums in float32.
GATHERED_BYTES = 2
# Every GPU holds the whole frozen source in bf16: it needs no messages.
SOURCE_BYTES = 2

Strategy: TypeAlias = Callable[[Stages, "Messages"], np.ndarray]
"""From the stages of all ranks `[..., ranks, L + 1]` to when the step ends `[...]`, in seconds."""


class Messages(NamedTuple):
    """Seconds of the collectives of a step.

    Args:
        all_reduce: Of each bucket of gradients `[L + 1]`, at the stage whose backward completes it, else 0.
        gather: Of each stage's parameters `[L + 1]`.
        scatter: Of each stage's gradients `[L + 1]`.
    """

    all_reduce: np.ndarray
    gather: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, parameters: np.ndarray, gpus: int, cluster: Cluster) -> "Messages":
        """Messages of a model with `parameters [L + 1]` in its stages, on so many GPUs."""
        return cls(
            np.array([cluster.all_reduce(size, gpus) if size else 0.0 for size in _buckets(parameters)]),
            np.array([cluster.gather(GATHERED_BYTES * count, gpus) for count in parameters]),
            np.array([cluster.gather(GRADIENT_BYTES * count, gpus) for count in parameters]),
        )


def ddp(stages: Stages, messages: Messages) -> np.ndarray:
    """Each bucket is summed when the last rank has it, while the backward goes on; the optimizer waits."""
    backward = np.flip(np.cumsum(np.flip(stages.backward, -1), -1), -1)
    ready = (stages.forward.sum(-1, keepdims=True) + backward).max(-2)
    link = np.zeros(ready.shape[:-1])
    for stage in reversed(range(ready.shape[-1])):
        if messages.all_reduce[stage]:
            link = np.maximum(link, ready[..., stage]) + messages.all_reduce[stage]
    return np.maximum(link, ready[..., 0]) + stages.rest


def fsdp(stages: Stages, messages: Messages) -> np.ndarray:
    """A stage's parameters are gathered while the one before it computes, its gradients summed after it.

    Collectives take turns on one link, and each starts when all ranks have come to it.
    """
    last = stages.forward.shape[-1] - 1
    clock = np.zeros(stages.forward.shape[:-1])  # of each rank
    gathered = link = np.full(clock.shape[:-1], messages.gather[0])
    for stage in range(last + 1):
        clock = np.maximum(clock, gathered[..., None])
        following = stage + 1 if stage < last else last  # the backward begins with the last stage again
        gathered = link = np.maximum(link, clock.max(-1)) + messages.gather[following]
        clock = clock + stages.forward[..., stage]
    for stage in reversed(range(last + 1)):
        clock = np.maximum(clock, gathered[..., None])
        if stage:
            gathered = link = np.maximum(link, clock.max(-1)) + messages.gather[stage - 1]
        clock = clock + stages.backward[..., stage]
        link = np.maximum(link, clock.max(-1)) + messages.scatter[stage]
    return link + stages.rest


def states_bytes(strategy: str, parameters: int, gpus: int) -> float:
    """Bytes on each GPU of weights, gradients and moments, which FSDP shards, and of the whole source."""
    shards = gpus if strategy == "FSDP" else 1
    return parameters * (STATE_BYTES + GRADIENT_BYTES) / shards + parameters * SOURCE_BYTES


STRATEGIES: dict[str, Strategy] = {"DDP": ddp, "FSDP": fsdp}


def _buckets(parameters: np.ndarray) -> np.ndarray:
    """Bytes of the bucket that each stage's backward completes, 0 where it completes none."""
    sizes, pending = np.zeros(len(parameters)), 0.0
    for stage in reversed(range(len(parameters))):
        pending += GRADIENT_BYTES * parameters[stage]
        if pending >= BUCKET_BYTES or stage == 0:
            sizes[stage], pending = pending, 0.0
    return sizes
