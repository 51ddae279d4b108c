"""How long each stage of a step takes on one GPU under given coins: first embedding and head, then blocks."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from bench.cost import Part, Size
from bench.sizes import size_of
from bench.step.workloads import Workload
from bench.step_times import OURS, expected_seconds, part_seconds, weights_seconds

# Of a part of the target forward and backward: products of the backward are twice those of the forward.
BACKWARD_SHARE = 2 / 3
OURS_MEASURED = "ours compiled"


class Stages(NamedTuple):
    """Seconds of the stages of steps, stage 0 the embedding and the head, stage i block i - 1.

    Args:
        forward: `[..., L + 1]`, the source's stages included.
        backward: `[..., L + 1]`.
        rest: Weights cast and updated, whatever the coins. It is not divided by the number of GPUs, though
            FSDP updates only its share.
    """

    forward: np.ndarray
    backward: np.ndarray
    rest: float


@dataclass(frozen=True)
class OneGpu:
    """Our step on one GPU.

    Args:
        workload: Model, and images for each GPU.
        size: Of the model.
        p: Probability that a block reads the source.
        factor: What predicted times are multiplied with: measured over predicted mean, 1 where none was
            measured.
        origin: "predicted", or where it was measured.
    """

    workload: Workload
    size: Size
    p: float
    factor: float = 1.0
    origin: str = "predicted"

    @property
    def mean(self) -> float:
        """Seconds of a step, expected over the coins."""
        return self.factor * expected_seconds(self.size, self.workload.batch, OURS, self.p)

    def stages(self, coins: np.ndarray) -> Stages:
        """Seconds of all stages under draws of coins `[..., L]`, bool."""
        source_after = _after(coins, np.logical_or, False)
        rows = _after(coins, np.logical_and, True) & (self.size.class_rows is not None)
        seconds = {
            part: self.factor * part_seconds(self.size, self.workload.batch, OURS, part) for part in Part
        }
        of_rows = np.where(coins, seconds[Part.CROSS_ROWS], seconds[Part.SELF_ROWS])
        target = np.where(rows, of_rows, np.where(coins, seconds[Part.CROSS], seconds[Part.SELF]))
        keys = np.where(coins & ~rows, seconds[Part.SOURCE_KV], 0.0)
        source = np.where(source_after, seconds[Part.SOURCE], keys)
        stem = np.where(coins.any(-1, keepdims=True), seconds[Part.SOURCE_STEM], 0.0)
        target = np.concatenate([np.full_like(stem, seconds[Part.ENDS]), target], -1)
        source = np.concatenate([stem, source], -1)
        rest = self.factor * weights_seconds(self.size, OURS)
        return Stages((1 - BACKWARD_SHARE) * target + source, BACKWARD_SHARE * target, rest)

    def stage_parameters(self) -> np.ndarray:
        """Parameters of the target's stages `[L + 1]`."""
        of_blocks = np.full(self.size.depth, self.size.block_parameters)
        return np.concatenate([[self.size.parameters - of_blocks.sum()], of_blocks])


def one_gpu(workload: Workload, p: float, measured: Mapping[str, Any] | None) -> OneGpu:
    """Our step of a workload: the predicted one, scaled to the mean that was measured where there is one.

    Args:
        workload: Model and batch.
        p: Probability that a block reads the source.
        measured: The result of `bench.step`, or None.
    """
    predicted = OneGpu(workload, size_of(workload), p)
    case = next((case for case in (measured or {}).get("cases", ()) if _is_that(case, workload, p)), None)
    if measured is None or measured["device"] != "cuda" or case is None:
        return predicted
    factor = case["providers"][OURS_MEASURED]["mean_ms"] / 1e3 / predicted.mean
    return replace(predicted, factor=factor, origin=f"measured, {measured['gpu']['name']}")


def _is_that(case: Mapping[str, Any], workload: Workload, p: float) -> bool:
    ours = case["providers"].get(OURS_MEASURED, {})
    return (case["workload"]["name"], case["p"], case["dtype"]) == (
        workload.name,
        p,
        "bfloat16",
    ) and ours.get("status") == "timed"


def _after(coins: np.ndarray, combine: np.ufunc, of_none: bool) -> np.ndarray:
    """Combine for each block the coins of all blocks after it."""
    later = np.concatenate([coins[..., 1:], np.full_like(coins[..., :1], of_none)], -1)
    return np.flip(combine.accumulate(np.flip(later, -1), -1), -1)
