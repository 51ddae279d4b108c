"""Equality with the definition of a step: nobody is timed who fails it."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.step.reference import Outcome

# How many times the error of the eager rival written by hand, in the same precision, is allowed.
ALLOWED = {"logits": 2.0, "gradients": 3.0}
# What that error itself may be, relative to the result.
LARGEST_UNIT = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# TF32 rounds to as many bits as float16 has.
LARGEST_UNIT_TF32 = LARGEST_UNIT[torch.float16]

Coins = tuple[bool, ...]
Errors = dict[str, float]
"""Of "logits" and "gradients"."""


class Wrong(Exception):
    """Raised where a step computes something else than the definition."""


@dataclass(frozen=True)
class Check:
    """Compares outcomes with the definition in float64, on the batch that is timed.

    Args:
        exact: The definition.
        eager: The rival whose error is the unit, in a precision.
    """

    exact: Callable[[Coins], Outcome]
    eager: Callable[[torch.dtype, Coins], Outcome]

    @functools.cached_property
    def _exact(self) -> dict[Coins, Outcome]:
        return {}

    @functools.cached_property
    def _units(self) -> dict[tuple[torch.dtype, Coins], Errors]:
        return {}

    def unit(self, precision: torch.dtype, coins: Coins) -> tuple[Outcome, Errors]:
        """The exact outcome, and the relative error of the eager rival.

        Raises:
            Wrong: That error is no rounding.
        """
        if coins not in self._exact:
            self._exact[coins] = self.exact(coins)
        exact, key = self._exact[coins], (precision, coins)
        if key not in self._units:
            self._units[key] = relative_errors(self.eager(precision, coins), exact)
        errors = self._units[key]
        for name, error in errors.items():
            if not error <= largest_unit(precision, exact.logits.device):
                raise Wrong(f"{name} of the unit, the eager rival in {precision}: relative error {error:.1e}")
        return exact, errors

    def __call__(
        self,
        outcome: Outcome,
        precision: torch.dtype,
        coins: Coins,
        allowed: Mapping[str, float] = ALLOWED,
    ) -> Errors:
        """Errors relative to the unit.

        Raises:
            Wrong: One is larger than allowed, or not a number.
        """
        exact, unit = self.unit(precision, coins)
        errors = relative_errors(outcome, exact)
        ratios = {name: errors[name] / max(unit[name], math.ulp(0.0)) for name in errors}
        for name, ratio in ratios.items():
            if not ratio <= allowed[name]:
                raise Wrong(
                    f"{name}: relative error {errors[name]:.1e} is {ratio:.2f} times that of the "
                    f"eager rival, allowed are {allowed[name]:g}"
                )
        return ratios


def largest_unit(precision: torch.dtype, device: torch.device) -> float:
    """What the error of the eager rival may be; its patch embedding is a convolution, on a GPU in TF32."""
    if precision == torch.float32 and device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        return LARGEST_UNIT_TF32
    return LARGEST_UNIT[precision]


def relative_errors(outcome: Outcome, exact: Outcome) -> Errors:
    """L2 norm of the difference over that of the exact result; infinite where there is no comparing them."""
    return {
        name: _relative(actual, wanted)
        for name, actual, wanted in zip(Outcome._fields, outcome, exact, strict=True)
    }


def require_finite(outcome: Outcome, coins: Coins) -> None:
    """Refuse what would spoil the weights that all share.

    Raises:
        Wrong: A logit or a gradient is not finite.
    """
    for name, values in outcome._asdict().items():
        if not values.isfinite().all():
            drawn = "".join(str(int(coin)) for coin in coins)
            raise Wrong(f"{name}: not all are finite under coins {drawn}")


def draws_to_check(draws: Sequence[Coins]) -> list[Coins]:
    """Those of a set that read the source in the most blocks, and in the fewest."""
    return list(dict.fromkeys((max(draws, key=sum), min(draws, key=sum))))


def _relative(actual: Tensor, wanted: Tensor) -> float:
    if actual.shape != wanted.shape:
        return math.inf
    return (torch.linalg.vector_norm(actual - wanted) / torch.linalg.vector_norm(wanted)).item()
