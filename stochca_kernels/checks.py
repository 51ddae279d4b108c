"""What the operator accepts, and the errors that say what was wanted and what came."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stochca_kernels.projection import KV, Projection, unpack

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_head_size(size: int) -> bool:
    """Whether the kernels take heads of this size. A compiler may not know it, so no `in range(...)`."""
    return 16 <= size <= 128 and size % 8 == 0


def _name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def check_coin(q: Tensor, use_source: bool | Tensor) -> None:
    """Check the coin, for the batch or for each of `q`'s samples."""
    if isinstance(use_source, bool):
        return
    if not isinstance(use_source, Tensor):
        raise TypeError(f"use_source must be a bool or a bool tensor, got {_name(use_source)}")
    if use_source.dtype != torch.bool or use_source.shape != q.shape[:1] or use_source.device != q.device:
        raise ValueError(
            f"use_source must be a torch.bool tensor of shape ({q.shape[0]},) on {q.device}, got "
            f"{use_source.dtype} of shape {tuple(use_source.shape)} on {use_source.device}"
        )


def check_packed(qkv: Tensor, kv: KV) -> None:
    """Check a packed projection, which brings the target's own pair with it."""
    if qkv.shape[2] != 3:
        raise ValueError(f"a packed q must have shape (B, N, 3, H, D), got {tuple(qkv.shape)}")
    if kv is not None:
        raise ValueError("kv must be None where q is packed: q holds the target's own keys and values")


class _Queries(NamedTuple):
    """What every other tensor is compared with."""

    batch: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device


def check_inputs(
    q: Tensor,
    kv: KV,
    source_kv: KV,
    use_source: bool | Tensor,
    source_q: Tensor | Projection | None,
) -> None:
    """Check everything that the implementations rely on. A packed `q` stands for `kv` as well."""
    if q.ndim == 5:
        batch, length, _, heads, head_dim = q.shape
    else:
        batch, heads, length, head_dim = q.shape
    like = _Queries(batch, heads, head_dim, q.dtype, q.device)
    if heads < 1:
        raise ValueError("q must have at least one head, got none")
    if like.dtype not in DTYPES:
        raise ValueError(f"q must be one of {', '.join(map(str, DTYPES))}, got {q.dtype}")
    if not is_head_size(head_dim):
        raise ValueError(f"the head size must be 16 to 128 in steps of 8, got {head_dim}")
    if q.stride(-1) != 1:
        strides = unpack(q)[0].stride() if q.ndim == 5 else q.stride()
        raise ValueError(f"q must have a unit last stride, got strides {strides}")
    if use_source is not True and kv is None and q.ndim == 4:
        raise ValueError("kv is None, but use_source is not True: some sample needs the target's own pair")
    if kv is not None:
        _check_side("kv", like, kv)
    elif q.ndim == 5 and length < 1:
        raise ValueError("kv must have at least one token to attend to, got none")
    if source_kv is None:
        if use_source is not False:
            raise ValueError(
                "source_kv is None, but use_source is not False: some sample needs the source's pair"
            )
        if source_q is not None:
            raise ValueError(
                "source_q is given, but source_kv is None: the source needs keys and values to attend to"
            )
    else:
        _check_side("source_kv", like, source_kv)
    if isinstance(source_q, Projection):
        _check_projection("source_q", like, source_q, parts=1)
    elif source_q is not None:
        _check_tensor("source_q", like, source_q, (batch, heads, None, head_dim))
    for tensor in (*(source_kv or ()), *(source_q if isinstance(source_q, Projection) else (source_q,))):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                "the source is a constant, but one of its tensors requires grad: detach it, or use no_grad"
            )


def _check_side(name: str, like: _Queries, side: KV) -> None:
    if isinstance(side, Projection):
        _check_projection(name, like, side, parts=2)
        tokens = side.x.shape[1]
    elif isinstance(side, tuple) and len(side) == 2:
        k, v = side
        _check_tensor(f"{name}[0] (k)", like, k, (like.batch, like.heads, None, like.head_dim))
        shape = k.shape
        _check_tensor(f"{name}[1] (v)", like, v, shape)
        tokens = shape[2]
    else:
        raise TypeError(f"{name} must be a pair (k, v), a Projection or None, got {type(side).__name__}")
    if tokens < 1:
        raise ValueError(f"{name} must have at least one token to attend to, got none")


def _check_projection(name: str, like: _Queries, projection: Projection, parts: int) -> None:
    x, weight, bias, rstd = projection
    rows = parts * like.heads * like.head_dim
    _check_tensor(f"{name}.x", like, x, (like.batch, None, None))
    _check_tensor(f"{name}.weight", like, weight, (rows, x.shape[2]))
    if bias is not None:
        _check_tensor(f"{name}.bias", like, bias, (rows,))
    if rstd is not None:
        if name == "kv":
            raise ValueError("kv.rstd must be None: a norm folds into a frozen projection alone")
        if not isinstance(rstd, Tensor) or rstd.dtype != torch.float32 or rstd.shape != x.shape[:2]:
            got = f"{rstd.dtype} of shape {tuple(rstd.shape)}" if isinstance(rstd, Tensor) else _name(rstd)
            raise ValueError(f"{name}.rstd must be float32 of shape {tuple(x.shape[:2])}, got {got}")
        if rstd.device != like.device:
            raise ValueError(f"{name}.rstd must be on q's device {like.device}, got {rstd.device}")


def _check_tensor(name: str, like: _Queries, tensor: Tensor, shape: Sequence[int | None]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    got = tensor.shape
    if not _fits(got, shape):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} must have shape ({wanted}), got {tuple(got)}")
    if tensor.dtype != like.dtype:
        raise ValueError(f"{name} must have q's dtype {like.dtype}, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on q's device {like.device}, got {tensor.device}")
    if tensor.stride(-1) != 1 and got[-1] > 1:
        raise ValueError(f"{name} must have a unit last stride, got strides {tensor.stride()}")


def _fits(got: Sequence[int], wanted: Sequence[int | None]) -> bool:
    if len(got) != len(wanted):
        return False
    for n, want in zip(got, wanted, strict=True):  # noqa: SIM110, a generator takes longer
        if want is not None and n != want:
            return False
    return True
