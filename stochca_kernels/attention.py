"""The operator's contract: what it computes, and for whom."""

import os
from typing import Any, get_args, overload

import torch
from torch import Tensor

from stochca_kernels.checks import check_coin, check_inputs, check_packed
from stochca_kernels.dispatch import HAS_TRITON, Impl, Kind, fuses_projection, has_token_kernels, select_impl
from stochca_kernels.projection import KV, Projection, pair_of, project, unpack, zero_where
from stochca_kernels.reference import attention_reference
from stochca_kernels.sdpa import attention_sdpa

_IMPLS = get_args(Impl)
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
    source_q: Tensor | Projection,
    scale: float | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]: ...
def stochca_attention(
    q: Tensor,
    kv: KV,
    source_kv: KV,
    use_source: bool | Tensor,
    *,
    source_q: Tensor | Projection | None = None,
    scale: float | None = None,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attend to one's own keys and values, or to those of a frozen source.

    For each sample with coin :math:`\beta`, and :math:`(k_0, v_0)` of the source,

    :math:`(1 - \beta)\,\mathrm{softmax}(s\,q k')\,v + \beta\,\mathrm{softmax}(s\,q k_0')\,v_0`

    where only the selected term is computed and the other pair is never read.

    Args:
        q: Queries `[B, H, Nq, D]`, D from 16 to 128 in steps of 8. Any strides with a unit last one, so
            views of a packed projection need no copy. Or the packed projection `[B, N, 3, H, D]` itself:
            it holds the target's own pair as well, `kv` is None, and the gradient is written packed.
        kv: The target's own keys and values: a pair `(k, v)`, each `[B, H, N, D]`; or a `Projection` of
            `x [B, N, C]`; or None where no sample needs it.
        source_kv: The same of the frozen source. Its N may differ from the target's.
        use_source: The coin. A Python bool for the whole batch, or a bool tensor `[B]` on `q`'s device with
            one coin per sample.
        source_q: The source's own queries `[B, H, Ns, D]`, or a `Projection` to them. Given, the source's
            self-attention over `source_kv` is returned as well.
        scale: Factor on the scores; None means `D ** -0.5`.
        impl: "triton", "sdpa" or "reference". An explicit choice is never replaced by another. "auto" picks
            by `dispatch.select_impl`. Where fewer query rows than D meet a `Projection`, "triton" and "sdpa"
            compute neither keys nor values.

    Returns:
        `[B, H, Nq, D]` in `q`'s dtype, token-major in memory, so that merging the heads is a view. With
        `source_q` also the source's output `[B, H, Ns, D]`.

        Gradients reach `q`, and the tensors of `kv` where the coin is false; elsewhere they are exactly
        zero. The source is a constant. Under autocast, inputs are cast to the autocast dtype. Softmax and
        its log-sum-exp are float32 or better. Where few query rows meet a `Projection`, the queries in the
        space of its tokens are rounded to the inputs' dtype, and with "sdpa" the scores too.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: A shape, dtype, device or layout does not fit, a side that a sample needs is None, a
            source tensor requires grad, or `impl` cannot run these inputs.

    Source: Seo, Lee and Hwang, "StochCA: A Novel Approach for Exploiting Pretrained Models with
    Cross-Attention", arXiv 2402.16092.
    """
    if impl not in _IMPLS:
        raise ValueError(f"impl must be one of {_IMPLS}, got {impl!r}")
    if not isinstance(q, Tensor):
        raise TypeError(f"q must be a tensor, got {type(q).__name__}")
    if q.ndim not in (4, 5):
        raise ValueError(f"q must have shape (B, H, Nq, D) or (B, N, 3, H, D), got {tuple(q.shape)}")
    check_coin(q, use_source)
    if q.device.type != "meta" and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, kv = _cast(q, dtype), _cast(kv, dtype)
        source_kv, source_q = _cast_source(source_kv, source_q, dtype)
    if q.ndim == 5:
        check_packed(q, kv)
    check_inputs(q, kv, source_kv, use_source, source_q)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if impl == "auto":
        kind = _kind(q, kv, source_kv, use_source, source_q)
        impl = select_impl(q.device, q.dtype, q.shape[-1], _length(q, kv, source_kv, use_source), kind)[0]

    unused: list[Tensor] = []
    if use_source is True or impl == "reference":  # which takes the samples one by one
        unused = [t for t in kv or () if t is not None and t.requires_grad]
    if q.ndim == 5 and (use_source is True or impl != "triton"):  # whose gradient alone is written packed
        q, own_k, own_v = unpack(q)
        kv = (own_k, own_v)
    if use_source is True:
        kv = None
    elif use_source is False and source_q is None:
        source_kv = None
    if impl == "triton":
        out, source_out = _attention_triton(q, kv, source_kv, use_source, source_q, scale)
    else:
        implementation = attention_sdpa if impl == "sdpa" else attention_reference
        out, source_out = implementation(q, kv, source_kv, use_source, source_q, scale)
    out = _token_major(keep_in_graph(out, *unused) if unused else out)
    return out if source_out is None else (out, _token_major(source_out))


def _attention_triton(
    q: Tensor,
    kv: KV,
    source_kv: KV,
    use_source: bool | Tensor,
    source_q: Tensor | Projection | None,
    scale: float,
) -> tuple[Tensor, Tensor | None]:
    if not HAS_TRITON:
        raise ValueError('impl="triton" needs the package triton, which is not installed: pip install triton')
    if q.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f'impl="triton" needs tensors on a GPU, or TRITON_INTERPRET=1; q is on {q.device}')
    if q.dtype not in _TRITON_DTYPES:
        raise ValueError(f'impl="triton" needs float16, bfloat16 or float32, got {q.dtype}')
    if isinstance(use_source, Tensor):
        use_source = use_source.contiguous()  # the kernels read it as an array
    from stochca_kernels.autograd import attention_projected, attention_triton
    from stochca_kernels.few_rows import attention_tokens

    if _few_rows(q, kv, source_kv, use_source, source_q) and has_token_kernels(q.device, q.dtype):
        widths = {side.x.shape[2] for side in (kv, source_kv) if isinstance(side, Projection)}
        if len(widths) == 1:
            return attention_tokens(q, kv, source_kv, use_source, scale), None
    num_heads = q.shape[-3 if q.ndim == 4 else -2]
    if isinstance(kv, Projection):
        if isinstance(use_source, Tensor):
            kv = zero_where(kv, use_source)
        kv = pair_of(kv, num_heads)
    if isinstance(source_kv, Projection):
        if fuses_projection(q.device, source_kv.x.shape[1]):
            return attention_projected(q, kv, source_kv, use_source, source_q, scale)
        source_kv = pair_of(source_kv, num_heads)
    if isinstance(source_q, Projection):
        source_q = project(source_q, num_heads, parts=1)[0]
    return attention_triton(q, kv, source_kv, use_source, source_q, scale)


def _few_rows(
    q: Tensor, kv: KV, source_kv: KV, use_source: bool | Tensor, source_q: Tensor | Projection | None
) -> bool:
    """Whether keys and values are never computed: cheaper by associativity while `Nq < D`."""
    len_q = q.shape[2 if q.ndim == 4 else 1]
    if source_q is not None or len_q >= q.shape[-1]:
        return False
    return (use_source is True or isinstance(kv, Projection)) and (
        use_source is False or isinstance(source_kv, Projection)
    )


def _kind(
    q: Tensor, kv: KV, source_kv: KV, use_source: bool | Tensor, source_q: Tensor | Projection | None
) -> Kind:
    """What the choice of an implementation depends on."""
    if _few_rows(q, kv, source_kv, use_source, source_q):
        return "few rows"
    if not torch.is_grad_enabled():
        return "attention without gradient"
    if use_source is not True:
        own = (q,) if q.ndim == 5 else kv or ()
        for t in own:
            if t is not None and t.requires_grad:
                return "self-attention"
    return "cross-attention" if q.requires_grad else "attention without gradient"


def _length(q: Tensor, kv: KV, source_kv: KV, use_source: bool | Tensor) -> int:
    """Number of keys that are read, the larger where samples differ."""
    own = 0 if use_source is True else q.shape[1] if q.ndim == 5 else _tokens(kv)
    return own if use_source is False else max(own, _tokens(source_kv))


def _tokens(side: KV) -> int:
    return 0 if side is None else side.x.shape[1] if isinstance(side, Projection) else side[0].shape[2]


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
    """`[B, H, N, D]` as it lies where merging the heads is a view: as the kernels write it."""
    _, heads, length, head_dim = x.shape
    if x.stride() == (length * heads * head_dim, head_dim, heads * head_dim, 1):
        return x
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _cast(side: Tensor | KV, dtype: torch.dtype) -> Any:
    """Cast the tensors of one side as autocast does; the factors of a `Projection` stay float32."""
    if isinstance(side, Tensor):
        if side.dtype == dtype:
            return side
        return side.to(dtype) if side.is_floating_point() and side.dtype != torch.float64 else side
    if isinstance(side, Projection):
        x, weight, bias = (_cast(t, dtype) for t in side[:3])
        return Projection(x, weight, bias, side.rstd)
    return side if side is None else (_cast(side[0], dtype), _cast(side[1], dtype))


def _cast_source(source_kv: KV, source_q: Any, dtype: torch.dtype) -> tuple[KV, Any]:
    """Cast both. Tokens that both project stay one tensor, which a kernel reads once."""
    cast_kv, cast_q = _cast(source_kv, dtype), _cast(source_q, dtype)
    if isinstance(source_kv, Projection) and isinstance(source_q, Projection) and source_q.x is source_kv.x:
        cast_q = cast_q._replace(x=cast_kv.x)
    return cast_kv, cast_q
