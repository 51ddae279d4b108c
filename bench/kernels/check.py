"""Equality with the definition of the operator: nobody is timed who fails it."""

import contextlib

import torch
from torch import Tensor

from bench.kernels.paths import Pass, Path, Tensors
from bench.kernels.providers import Results, bind
from bench.kernels.shapes import Shape
from stochca_kernels.testing import assert_close_to_exact

# Scores that the float64 reference may hold, several times over.
MAX_SCORES = 2**28
_OF_ALL_SAMPLES = {"weight", "bias", "dweight", "dbias"}


class Wrong(Exception):
    """Raised where results differ from the definition by more than is allowed."""


class Check:
    """Compares results of one pass with the definition in float64.

    Args:
        path: Whose results.
        shape: Size of the attention.
        which: The pass.
        tensors: The inputs, and "grad".
        eager: Results of eager torch in their dtype, whose error is the unit.
    """

    def __init__(self, path: Path, shape: Shape, which: Pass, tensors: Tensors, eager: Results) -> None:
        self.samples, self.eager = checked_samples(path, shape), eager
        double = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
        taken = {name: self._take(name, t) for name, t in double.items()}
        self.exact = bind(path.ours_with("reference"), taken, path.leaves, which)()

    def __call__(self, results: Results, allowed: float) -> float:
        """How many times the error of eager torch those of `results` stay within: 2, or what is allowed.

        Raises:
            Wrong: An error is larger, not a number, or a result has another shape or dtype.
        """
        got, wanted = (
            {name: f"{t.dtype} {list(t.shape)}" for name, t in x.items()} for x in (results, self.eager)
        )
        if got != wanted:
            raise Wrong(f"results must be {wanted}, got {got}")
        if allowed > 2.0:
            with contextlib.suppress(Wrong):
                return self(results, 2.0)
        for name in results:
            actual, eager = (self._take(name, t) for t in (results[name], self.eager[name]))
            try:
                assert_close_to_exact(actual, eager, self.exact[name], factor=allowed)
            except AssertionError as error:
                raise Wrong(f"{name}: {error}") from error
        return allowed

    def _take(self, name: str, tensor: Tensor) -> Tensor:
        return tensor if name in _OF_ALL_SAMPLES else tensor[self.samples]


def checked_samples(path: Path, shape: Shape) -> list[int]:
    """Which samples are compared: all, or as many as the reference can hold, the first and last included."""
    if _OF_ALL_SAMPLES & set(path.leaves):
        return list(range(shape.batch))
    count = min(shape.batch, max(2, MAX_SCORES // (shape.heads * shape.length**2)))
    return torch.linspace(0, shape.batch - 1, count).round().int().tolist()
