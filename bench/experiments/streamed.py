"""What the experiments are compared with: the operator's own kernel, where keys stream."""

from typing import Any
from unittest import mock

from torch import Tensor

from bench.experiments.request import Request
from bench.tune.uses import forced
from stochca_kernels import forward, launch
from stochca_kernels.tiles import Tiles


def request(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles) -> Request:
    """A launch over `[B, H, N, D]`, as its launcher asks for it."""
    found: list[Request] = []
    kernel = forward._attn_fwd_kernel

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def record(*arguments: Any, **constants: Any) -> None:
                out = arguments[kernel.arg_names.index("out_ptr")]
                found.append(Request(kernel, grid[0], arguments, constants, out))

            return record

    with (
        mock.patch.object(forward, "_attn_fwd_kernel", Recorder()),
        mock.patch.object(launch, "_TOO_LARGE", set()),
        forced("fwd", tiles),
    ):
        forward.attention_forward(q, k, v, None, None, None, None, q.shape[-1] ** -0.5, False)
    return found[0]
