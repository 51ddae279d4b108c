"""What the operator accepts, and the errors that say what was wanted and what came."""

import torch
from torch import Tensor

from stochca_kernels.projection import KV, Projection

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


def check_inputs(
    q: Tensor,
    kv: KV,
    source_kv: KV,
    use_source: bool | Tensor,
    source_q: Tensor | Projection | None,
) -> None:
    """Check everything that the implementations rely on."""
    if q.shape[1] < 1:
        raise ValueError("q must have at least one head, got none")
    if q.dtype not in DTYPES:
        raise ValueError(f"q must be one of {', '.join(map(str, DTYPES))}, got {q.dtype}")
    if not is_head_size(q.shape[3]):
        raise ValueError(f"the head size must be 16 to 128 in steps of 8, got {q.shape[3]}")
    _check_tensor("q", q, q, (None, None, None, None))
    if use_source is not True and kv is None:
        raise ValueError("kv is None, but use_source is not True: some sample needs the target's own pair")
    if kv is not None:
        _check_side("kv", q, kv)
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
        _check_side("source_kv", q, source_kv)
    if source_q is not None:
        if isinstance(source_q, Projection):
            _check_projection("source_q", q, source_q, parts=1)
        else:
            _check_tensor("source_q", q, source_q, (q.shape[0], q.shape[1], None, q.shape[3]))
    for tensor in (*_tensors(source_kv), *_tensors(source_q)):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                "the source is a constant, but one of its tensors requires grad: detach it, or use no_grad"
            )


def _check_side(name: str, q: Tensor, side: KV) -> None:
    batch, heads, _, head_dim = q.shape
    if isinstance(side, Projection):
        _check_projection(name, q, side, parts=2)
        tokens = side.x.shape[1]
    elif isinstance(side, tuple) and len(side) == 2:
        k, v = side
        _check_tensor(f"{name}[0] (k)", q, k, (batch, heads, None, head_dim))
        _check_tensor(f"{name}[1] (v)", q, v, k.shape)
        tokens = k.shape[2]
    else:
        raise TypeError(f"{name} must be a pair (k, v), a Projection or None, got {type(side).__name__}")
    if tokens < 1:
        raise ValueError(f"{name} must have at least one token to attend to, got none")


def _check_projection(name: str, q: Tensor, projection: Projection, parts: int) -> None:
    x, weight, bias, rstd = projection
    rows = parts * q.shape[1] * q.shape[3]
    _check_tensor(f"{name}.x", q, x, (q.shape[0], None, None))
    _check_tensor(f"{name}.weight", q, weight, (rows, x.shape[2]))
    if bias is not None:
        _check_tensor(f"{name}.bias", q, bias, (rows,))
    if rstd is not None:
        if name == "kv":
            raise ValueError("kv.rstd must be None: a norm folds into a frozen projection alone")
        if not isinstance(rstd, Tensor) or rstd.dtype != torch.float32 or rstd.shape != x.shape[:2]:
            got = f"{rstd.dtype} of shape {tuple(rstd.shape)}" if isinstance(rstd, Tensor) else _name(rstd)
            raise ValueError(f"{name}.rstd must be float32 of shape {tuple(x.shape[:2])}, got {got}")
        if rstd.device != q.device:
            raise ValueError(f"{name}.rstd must be on q's device {q.device}, got {rstd.device}")


def _tensors(side: Tensor | KV) -> list[Tensor]:
    if isinstance(side, Tensor):
        return [side]
    return [t for t in side or () if t is not None]


def _check_tensor(name: str, q: Tensor, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.ndim != len(shape) or any(
        want is not None and want != got for want, got in zip(shape, tensor.shape, strict=True)
    ):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} must have shape ({wanted}), got {tuple(tensor.shape)}")
    if tensor.dtype != q.dtype:
        raise ValueError(f"{name} must have q's dtype {q.dtype}, got {tensor.dtype}")
    if tensor.device != q.device:
        raise ValueError(f"{name} must be on q's device {q.device}, got {tensor.device}")
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"{name} must have a unit last stride, got strides {tensor.stride()}")
