"""Stochastic cross-attention as one operator: attend to one's own keys and values, or a source's."""

from stochca_kernels.attention import Projection, stochca_attention
from stochca_kernels.compilation import warmup

__all__ = ["Projection", "stochca_attention", "warmup"]
