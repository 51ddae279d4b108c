"""Question: does `tl.range(..., warp_specialize=True)` split loads from products without Gluon?

It is asked of the loop over descriptors: the compiler may then give the loads, which are one instruction
each, and the products warps of their own.

On a GPU: `python -m bench.experiments --only specialized`, against the streamed kernel in the same run.
"""

from torch import Tensor

from bench.experiments import descriptors
from bench.experiments.request import Request
from stochca_kernels.tiles import Tiles


def request(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles) -> Request:
    """A launch over `[B, H, N, D]`."""
    return descriptors.request(q, k, v, tiles, warp_specialize=True)
