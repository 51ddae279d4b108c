"""The attention functions that the operator is compared with."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`q, k, v`, each `[B, H, N, D]`, to the output `[B, H, Nq, D]`."""


class Unsupported(Exception):
    """Raised by what does not run on these inputs or this device, with the reason."""


def sdpa(backend: SDPBackend) -> Attend:
    """Torch's SDPA on one backend alone."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return attend


SDPA: dict[str, Attend] = {
    "sdpa cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
    "sdpa flash": sdpa(SDPBackend.FLASH_ATTENTION),
    "sdpa efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "sdpa math": sdpa(SDPBackend.MATH),
}


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by its equation."""
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v


def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlexAttention without a mask, compiled for exactly these shapes."""
    if q.device.type != "cuda":
        raise Unsupported("FlexAttention is compared where it is compiled for a GPU")
    return _compiled_flex()(q, k, v)


@functools.cache
def _compiled_flex() -> Attend:
    # One compilation per shape, with and without a backward.
    torch._dynamo.config.recompile_limit = 64
    # A compiled backward otherwise frees what a second run of it needs.
    torch._functorch.config.donated_buffer = False
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    return compiled
