"""Compile the kernels before the first step needs them."""

import torch
from torch import Tensor

from stochca_kernels.attention import stochca_attention
from stochca_kernels.projection import Projection, project


def warmup(
    num_heads: int,
    head_dim: int,
    length: int,
    *,
    per_sample: bool = False,
    class_rows: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
) -> None:
    """Run every call of the operator that fine-tuning a ViT of this shape makes, once, on two samples.

    Triton compiles a kernel for each new kind of call, and keeps it on disk. The batch size is no part of the
    kind, nor are the coins of a step, so that this is all that it will compile. Call it before a CUDA graph
    is captured, or to keep compilation out of a measurement.

    Args:
        num_heads: H.
        head_dim: D.
        length: N, prefix tokens included.
        per_sample: Coins are drawn for each sample.
        class_rows: The last blocks compute the class token alone.
        dtype: Of the inputs, or of autocast.
        device: Where training will run.

    Raises:
        ValueError: The kernels cannot run there, and why.
    """
    width = num_heads * head_dim

    def draw(*shape: int, requires_grad: bool = False) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device, requires_grad=requires_grad)

    def tokens(parts: int, requires_grad: bool = False) -> Projection:
        x = draw(2, length, width, requires_grad=requires_grad)
        weight = draw(parts * width, width, requires_grad=requires_grad)
        return Projection(x, weight, draw(parts * width, requires_grad=requires_grad))

    qkv = draw(2, length, 3, num_heads, head_dim, requires_grad=True)
    q = project(tokens(1, requires_grad=True), num_heads, parts=1)[0]
    source, source_q = tokens(2), project(tokens(1), num_heads, parts=1)[0]
    k, v = project(source, num_heads)
    coins = torch.tensor([False, True], device=device)

    outs = [
        stochca_attention(qkv, None, None, False, impl="triton"),
        stochca_attention(q, None, (k, v), True, impl="triton"),
        stochca_attention(q, None, source, True, impl="triton"),
    ]
    if per_sample:
        outs.append(stochca_attention(qkv, None, (k, v), coins, impl="triton"))
    if class_rows:
        row, own = q[:, :, :1], tokens(2, requires_grad=True)
        outs.append(stochca_attention(row, own, None, False, impl="triton"))
        outs.append(stochca_attention(row, None, source, True, impl="triton"))
        if per_sample:
            outs.append(stochca_attention(row, own, source, coins, impl="triton"))
    torch.stack([out.float().sum() for out in outs]).sum().backward()

    with torch.no_grad():
        stochca_attention(qkv, None, None, False, impl="triton")
        stochca_attention(source_q, (k, v), None, False, impl="triton")
