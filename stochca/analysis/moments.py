"""Means and standard deviations over images, batch by batch."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """Mean over images, and how far the images lie apart.

    Args:
        mean: Any shape.
        deviation: Sample standard deviation (n - 1) over the images, of the same shape; NaN for one image.
    """

    mean: np.ndarray
    deviation: np.ndarray


class Moments:
    """Mean and standard deviation over the first axis of batches that come one after the other.

    Batches are merged by Chan, Golub and LeVeque's update, in which nothing cancels where all values are
    nearly the same, as similarities early in training are.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: Tensor | float = 0.0
        self._squares: Tensor | float = 0.0

    def add(self, values: Tensor) -> None:
        """Take a batch `[B, ...]` of float64, B at least 1."""
        count, mean = len(values), values.mean(0)
        total = self.count + count
        shift = mean - self._mean
        self._squares = self._squares + (values - mean).square().sum(0)
        self._squares = self._squares + shift.square() * (self.count * count / total)
        self._mean = self._mean + shift * (count / total)
        self.count = total

    def estimate(self) -> Estimate:
        """Of all values so far, at least one batch."""
        mean, squares = torch.as_tensor(self._mean), torch.as_tensor(self._squares)
        if self.count == 1:
            return Estimate(mean.numpy(), torch.full_like(squares, torch.nan).numpy())
        return Estimate(mean.numpy(), (squares / (self.count - 1)).sqrt().numpy())
