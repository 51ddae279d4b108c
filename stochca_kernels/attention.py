"""The operator's contract: what it computes, what it accepts, and which implementation runs it."""

import importlib.util
import os
from typing import Literal, get_args, overload

import torch
from torch import Tensor

from stochca_kernels.projection import KV, Projection, project, zero_where
from stochca_kernels.reference import attention_reference
from stochca_kernels.sdpa import attention_sdpa

Impl = Literal["auto", "triton", "sdpa", "reference"]

HEAD_DIMS = range(16, 129, 8)
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@overload
def stochca_attention(
    q: Tensor,
    kv: KV,
    source_kv: KV,
    use_source: bool | Tensor,
    *,
    source_q: None = None,
    scale: float | None = None,
    impl: Impl = "auto",
) -> Tensor: ...
@overload
def stochca_attention(
    q: Tensor,
    kv: KV,
    source_kv: KV,
    use_source: bool | Tensor,
    *,
    source_q: Tensor,
    scale: float | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]: ...
def stochca_attention(
    q: Tensor,
    kv: KV,
    source_kv: KV,
    use_source: bool | Tensor,
    *,
    source_q: Tensor | None = None,
    scale: float | None = None,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attend to one's own keys and values, or to those of a frozen source.

    For each sample with coin :math:`\beta`, and :math:`(k_0, v_0)` of the source,

    .. math:: (1 - \beta)\,\mathrm{softmax}(s\,q k')\,v + \beta\,\mathrm{softmax}(s\,q k_0')\,v_0

    where only the selected term is computed and the other pair is never read.

    Args:
        q: Queries `[B, H, Nq, D]`, D from 16 to 128 in steps of 8. Any strides with a unit last one, so
            views of a packed `[B, N, 3, H, D]` projection need no copy.
        kv: The target's own keys and values: a pair `(k, v)`, each `[B, H, N, D]`; or a `Projection` of
            `x [B, N, C]`; or None where no sample needs it.
        source_kv: The same of the frozen source. Its N may differ from the target's.
        use_source: The coin. A Python bool for the whole batch, or a bool tensor `[B]` on `q`'s device with
            one coin per sample.
        source_q: The source's own queries `[B, H, Ns, D]`. Given, its self-attention over `source_kv` is
            returned as well.
        scale: Factor on the scores; None means `D ** -0.5`.
        impl: "triton", "sdpa" or "reference". An explicit choice is never replaced by another. "auto" picks
            by `select_impl`, and "sdpa" where few query rows meet a `Projection`, which it need not compute.

    Returns:
        `[B, H, Nq, D]` in `q`'s dtype, token-major in memory, so that merging the heads is a view. With
        `source_q` also the source's output `[B, H, Ns, D]`.

        Gradients reach `q`, and the tensors of `kv` where the coin is false; elsewhere they are exactly
        zero. The source is a constant. Under autocast, inputs are cast to the autocast dtype. Softmax and
        its log-sum-exp are float32 or better; where few query rows meet a `Projection`, scores are rounded
        to the inputs' dtype first, as in eager torch.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: A shape, dtype, device or layout does not fit, a side that a sample needs is None, a
            source tensor requires grad, or `impl` cannot run these inputs.

    Source: Seo, Lee and Hwang, "StochCA: A Novel Approach for Exploiting Pretrained Models with
    Cross-Attention", arXiv 2402.16092.
    """
    if impl not in get_args(Impl):
        raise ValueError(f"impl must be one of {get_args(Impl)}, got {impl!r}")
    if not isinstance(q, Tensor):
        raise TypeError(f"q must be a tensor, got {type(q).__name__}")
    if q.ndim != 4:
        raise ValueError(f"q must have shape (B, H, Nq, D), got {tuple(q.shape)}")
    _check_coin(q, use_source)
    if q.device.type != "meta" and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, source_q = _cast(q, dtype), None if source_q is None else _cast(source_q, dtype)
        kv, source_kv = _cast_side(kv, dtype), _cast_side(source_kv, dtype)
    _check(q, kv, source_kv, use_source, source_q)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if impl == "auto":
        impl = _select_for(q, kv, source_kv, use_source)

    unused: list[Tensor] = []
    if use_source is True or impl == "reference":  # which takes the samples one by one
        unused = [t for t in _tensors(kv) if t.requires_grad]
    if use_source is True:
        kv = None
    elif use_source is False and source_q is None:
        source_kv = None
    implementation = {"triton": _attention_triton, "sdpa": attention_sdpa, "reference": attention_reference}
    out, source_out = implementation[impl](q, kv, source_kv, use_source, source_q, scale)
    out = _token_major(keep_in_graph(out, *unused))
    return out if source_out is None else (out, _token_major(source_out))


def select_impl(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, str]:
    """Say which implementation "auto" runs, and why.

    Args:
        device: Where the inputs are.
        dtype: Their dtype.
        head_dim: D.

    Returns:
        "triton" or "sdpa", and the reason in words.
    """
    if device.type != "cuda" or torch.version.hip:
        return "sdpa", f"the Triton kernels are selected on NVIDIA GPUs alone, the device is {device}"
    if not _HAS_TRITON:
        return "sdpa", "triton is not installed"
    if (capability := _compute_capability(device)) < (8, 0):
        return "sdpa", f"the Triton kernels need compute capability 8.0, {device} has {capability}"
    if dtype not in (torch.float16, torch.bfloat16):
        return "sdpa", f"the Triton kernels are selected for 16-bit inputs alone, the dtype is {dtype}"
    if head_dim not in HEAD_DIMS:
        return "sdpa", f"the Triton kernels take head sizes 16 to 128 in steps of 8, got {head_dim}"
    return "triton", f"{device} has compute capability {capability}, inputs are {dtype}"


@torch.compiler.assume_constant_result
def _compute_capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _select_for(q: Tensor, kv: KV, source_kv: KV, use_source: bool | Tensor) -> Impl:
    read = [] if use_source is True else [kv]
    read += [] if use_source is False else [source_kv]
    if q.shape[2] < q.shape[3] and all(isinstance(side, Projection) for side in read):
        return "sdpa"
    return "triton" if select_impl(q.device, q.dtype, q.shape[3])[0] == "triton" else "sdpa"


def _attention_triton(
    q: Tensor, kv: KV, source_kv: KV, use_source: bool | Tensor, source_q: Tensor | None, scale: float
) -> tuple[Tensor, Tensor | None]:
    if not _HAS_TRITON:
        raise ValueError('impl="triton" needs the package triton, which is not installed: pip install triton')
    if q.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f'impl="triton" needs tensors on a GPU, or TRITON_INTERPRET=1; q is on {q.device}')
    if q.dtype not in _TRITON_DTYPES:
        raise ValueError(f'impl="triton" needs float16, bfloat16 or float32, got {q.dtype}')
    from stochca_kernels.autograd import attention_triton

    if isinstance(kv, Projection) and isinstance(use_source, Tensor):
        kv = zero_where(kv, use_source)
    own, source = (
        project(side, q.shape[1]) if isinstance(side, Projection) else side for side in (kv, source_kv)
    )
    return attention_triton(q, own, source, use_source, source_q, scale)


def keep_in_graph(x: Tensor, *unused: Tensor) -> Tensor:
    """Return `x` so that the backward also reaches the `unused` tensors, with gradients of exactly zero.

    `DistributedDataParallel` needs every parameter to receive a gradient, and an optimizer's weight decay
    acts only on parameters that have one.
    """
    return _KeepInGraph.apply(x, *unused) if unused else x


class _KeepInGraph(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *unused):
        ctx.like = [(t.shape, t.dtype, t.device) for t in unused]
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        zeros = (torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like)
        return grad, *zeros


def _token_major(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x


def _cast_side(side: KV, dtype: torch.dtype) -> KV:
    if isinstance(side, Projection):
        bias = None if side.bias is None else _cast(side.bias, dtype)
        return Projection(_cast(side.x, dtype), _cast(side.weight, dtype), bias)
    return side if side is None else (_cast(side[0], dtype), _cast(side[1], dtype))


def _tensors(side: KV) -> list[Tensor]:
    return [t for t in side or () if t is not None]


def _name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _check_coin(q: Tensor, use_source: bool | Tensor) -> None:
    if isinstance(use_source, bool):
        return
    if not isinstance(use_source, Tensor):
        raise TypeError(f"use_source must be a bool or a bool tensor, got {_name(use_source)}")
    if use_source.dtype != torch.bool or use_source.shape != q.shape[:1] or use_source.device != q.device:
        raise ValueError(
            f"use_source must be a torch.bool tensor of shape ({q.shape[0]},) on {q.device}, got "
            f"{use_source.dtype} of shape {tuple(use_source.shape)} on {use_source.device}"
        )


def _check(q: Tensor, kv: KV, source_kv: KV, use_source: bool | Tensor, source_q: Tensor | None) -> None:
    if q.shape[1] < 1:
        raise ValueError("q must have at least one head, got none")
    if not q.is_floating_point():
        raise ValueError(f"q must be floating point, got {q.dtype}")
    if q.shape[3] not in HEAD_DIMS:
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
        _check_tensor("source_q", q, source_q, (q.shape[0], q.shape[1], None, q.shape[3]))
    for tensor in (*_tensors(source_kv), source_q):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                "the source is a constant, but one of its tensors requires grad: detach it, or use no_grad"
            )


def _check_side(name: str, q: Tensor, side: KV) -> None:
    batch, heads, _, head_dim = q.shape
    if isinstance(side, Projection):
        x, weight, bias = side
        _check_tensor(f"{name}.x", q, x, (batch, None, None))
        _check_tensor(f"{name}.weight", q, weight, (2 * heads * head_dim, x.shape[2]))
        if bias is not None:
            _check_tensor(f"{name}.bias", q, bias, (2 * heads * head_dim,))
        tokens = x.shape[1]
    elif isinstance(side, tuple) and len(side) == 2:
        k, v = side
        _check_tensor(f"{name}[0] (k)", q, k, (batch, heads, None, head_dim))
        _check_tensor(f"{name}[1] (v)", q, v, k.shape)
        tokens = k.shape[2]
    else:
        raise TypeError(f"{name} must be a pair (k, v), a Projection or None, got {type(side).__name__}")
    if tokens < 1:
        raise ValueError(f"{name} must have at least one token to attend to, got none")


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
