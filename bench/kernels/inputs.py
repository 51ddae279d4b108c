"""Random inputs of every path, laid out as a ViT lays them out."""

import torch
from torch import Tensor

from bench.kernels.shapes import Shape


class Draw:
    """Normal tensors of one shape, made on the device where they are used.

    Args:
        shape: Size of the attention.
        dtype: Of all tensors.
        device: Where they are made.
        seed: Equal seeds draw equal tensors.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *size: int, std: float = 1.0) -> Tensor:
        """Normal numbers with a standard deviation of `std`."""
        x = torch.randn(size, generator=self.generator, device=self.device)
        return x.mul_(std).to(self.dtype)

    def packed(self) -> Tensor:
        """What the QKV layer returns, `[B, N, 3, H, D]`."""
        shape = self.shape
        return self.normal(shape.batch, shape.length, 3, shape.heads, shape.head_dim)

    def rows(self, length: int) -> Tensor:
        """`[B, H, length, D]`, token-major in memory."""
        shape = self.shape
        return self.normal(shape.batch, length, shape.heads, shape.head_dim).transpose(1, 2)

    def projection(self) -> dict[str, Tensor]:
        """Tokens `[B, N, C]`, a packed weight `[2C, C]` and bias `[2C]`: K and V have about unit scale."""
        shape, width = self.shape, self.shape.width
        return {
            "x": self.normal(shape.batch, shape.length, width),
            "weight": self.normal(2 * width, width, std=width**-0.5),
            "bias": self.normal(2 * width, std=0.1),
        }


def split(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views q, k, v `[B, H, N, D]` of a packed `[B, N, 3, H, D]`."""
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def own(draw: Draw) -> dict[str, Tensor]:
    """The target's q, k and v."""
    q, k, v = split(draw.packed())
    return {"q": q, "k": k, "v": v, "grad": draw.rows(draw.shape.length)}


def own_packed(draw: Draw) -> dict[str, Tensor]:
    """The same in one tensor."""
    return {"qkv": draw.packed(), "grad": draw.rows(draw.shape.length)}


def source(draw: Draw) -> dict[str, Tensor]:
    """The source's q, k and v."""
    q, k, v = split(draw.packed())
    return {"source_q": q, "source_k": k, "source_v": v}


def own_and_source(draw: Draw) -> dict[str, Tensor]:
    """Both."""
    return {**own(draw), **source(draw)}


def coins(draw: Draw) -> dict[str, Tensor]:
    """Both pairs, and coins that choose the source's in every other sample."""
    tensors = own_and_source(draw)
    del tensors["source_q"]
    return {**tensors, "coins": torch.arange(draw.shape.batch, device=draw.device) % 2 == 1}


def cross(draw: Draw) -> dict[str, Tensor]:
    """The target's q, the source's k and v."""
    tensors = {**cross_with_source(draw), "grad": draw.rows(draw.shape.length)}
    del tensors["source_q"]
    return tensors


def cross_with_source(draw: Draw) -> dict[str, Tensor]:
    """The target's q, the source's q, k and v."""
    return {"q": split(draw.packed())[0], **source(draw)}


def class_row(draw: Draw) -> dict[str, Tensor]:
    """One query per head, and the tokens that it attends to."""
    return {"q": draw.rows(1), **draw.projection(), "grad": draw.rows(1)}


def projection_with_source(draw: Draw) -> dict[str, Tensor]:
    """The target's q, the source's q, and the tokens that make its k and v."""
    q, source_q = (split(draw.packed())[0] for _ in range(2))
    return {"q": q, "source_q": source_q, **draw.projection(), "grad": draw.rows(draw.shape.length)}
