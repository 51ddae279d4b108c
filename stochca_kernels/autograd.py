"""The gradients of the Triton operators, and the entry points that choose among them."""

import torch
from torch import Tensor

import stochca_kernels.ops  # noqa: F401, registers torch.ops.stochca
from stochca_kernels.projection import Projection, project, unpack


class _Attention(torch.autograd.Function):
    """Where `k` and `v` are None, `q` is the packed projection of all three."""

    @staticmethod
    def forward(ctx, q, k, v, source_k, source_v, use_source, source_q, scale):
        own = unpack(q) if k is None else (q, k, v)
        out, lse, source_out = torch.ops.stochca.attention_forward(
            *own, source_k, source_v, use_source, source_q, scale, True
        )
        if use_source is None:  # only `source_q` reads the source
            source_k = source_v = None
        ctx.save_for_backward(q, k, v, source_k, source_v, use_source, out, lse)
        ctx.scale = scale
        ctx.mark_non_differentiable(source_out)
        return out, source_out

    @staticmethod
    def backward(ctx, grad, _):
        refuse_second_derivative()
        q, k, v, *rest = ctx.saved_tensors
        if k is None:
            dqkv = torch.ops.stochca.packed_attention_backward(grad, q, *rest, ctx.scale)
            return dqkv, *(None,) * 7
        needs_dkdv = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        dq, dk, dv = torch.ops.stochca.attention_backward(grad, q, k, v, *rest, ctx.scale, needs_dkdv)
        return dq, dk if needs_dkdv else None, dv if needs_dkdv else None, *(None,) * 5


def attention_triton(
    q: Tensor,
    kv: tuple[Tensor, Tensor] | None,
    source_kv: tuple[Tensor, Tensor] | None,
    use_source: bool | Tensor,
    source_q: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor | None]:
    """Attend with each sample's queries to its own pair, or to the source's where its coin says so.

    Args:
        q: `[B, H, Nq, D]`, or a packed projection `[B, N, 3, H, D]` of queries and the own pair.
        kv: A pair of `[B, H, N, D]`, or None where no sample needs it, or `q` is packed.
        source_kv: The same of the source.
        use_source: One coin, or a bool tensor `[B]`.
        source_q: The source's own queries `[B, H, Ns, D]`, or None.
        scale: Factor on the scores.

    Returns:
        The output `[B, H, Nq, D]`, and the source's own output `[B, H, Ns, D]` or None.

    Raises:
        RuntimeError: Called under a transform of `torch.func`, which the kernels do not have.
    """
    refuse_functorch()
    # Without a coin per sample, the chosen pair takes the first place: the kernels need not choose.
    pair = source_kv if use_source is True else kv
    own = (q, *(pair or (None, None)))
    coins = use_source if isinstance(use_source, Tensor) else None
    needs_source = coins is not None or (source_q is not None and use_source is False)
    source_k, source_v = source_kv if source_kv is not None and needs_source else (None, None)
    rest = (source_k, source_v, coins, source_q, scale)
    if _need_gradient(*own):
        out, source_out = _Attention.apply(*own, *rest)
    else:
        own = unpack(q) if q.ndim == 5 else own
        out, _, source_out = torch.ops.stochca.attention_forward(*own, *rest, False)
    return out, None if source_q is None else source_out


def attention_projected(
    q: Tensor,
    kv: tuple[Tensor, Tensor] | None,
    source_kv: Projection,
    use_source: bool | Tensor,
    source_q: Tensor | Projection | None,
    scale: float,
) -> tuple[Tensor, Tensor | None]:
    """As `attention_triton`, with the source's keys and values computed inside the kernel.

    Args:
        q: As there.
        kv: As there.
        source_kv: Tokens of the source, and the weight of their keys and values.
        use_source: As there.
        source_q: The source's own queries `[B, H, Ns, D]`, a `Projection`, or None. One of the same tokens is
            computed inside the kernel as well.
        scale: As there.
    """
    refuse_functorch()
    own_q = source_q if isinstance(source_q, Projection) else None
    if own_q is not None and (own_q.x is not source_kv.x or own_q.rstd is not source_kv.rstd):
        source_q, own_q = project(own_q, q.shape[-2 if q.ndim == 5 else 1], parts=1)[0], None
    coins = use_source if isinstance(use_source, Tensor) else None
    own = (q, *(kv or (None, None)))
    source = (*source_kv, coins)
    asking = (None, own_q.weight, own_q.bias) if own_q is not None else (source_q, None, None)
    is_packed = q.ndim == 5
    if _need_gradient(*own):
        out, source_out = _ProjectedAttention.apply(*own, *source, *asking, scale, is_packed)
    else:
        own = unpack(q) if is_packed else own
        out, _, source_out = torch.ops.stochca.projected_attention_forward(
            *own, *source, *asking, scale, False
        )
    return out, None if source_q is None else source_out


class _ProjectedAttention(torch.autograd.Function):
    """Where `is_packed`, `q` is the packed projection of the target's own queries, keys and values."""

    @staticmethod
    def forward(
        ctx, q, k, v, x, weight, bias, rstd, use_source, source_q, q_weight, q_bias, scale, is_packed
    ):
        own = unpack(q) if is_packed else (q, k, v)
        source = (x, weight, bias, rstd, use_source)
        out, lse, source_out = torch.ops.stochca.projected_attention_forward(
            *own, *source, source_q, q_weight, q_bias, scale, True
        )
        if use_source is None and (is_packed or k is not None):  # only the source's queries read it
            source = (None,) * 5
        ctx.save_for_backward(q, k, v, *source, out, lse)
        ctx.scale, ctx.is_packed = scale, is_packed
        ctx.mark_non_differentiable(source_out)
        return out, source_out

    @staticmethod
    def backward(ctx, grad, _):
        refuse_second_derivative()
        ops = torch.ops.stochca
        q, k, v, x, *rest = ctx.saved_tensors
        if ctx.is_packed:
            if x is None:
                dqkv = ops.packed_attention_backward(grad, q, None, None, None, *rest[-2:], ctx.scale)
            else:
                dqkv = ops.packed_projected_attention_backward(grad, q, x, *rest, ctx.scale)
            return dqkv, *(None,) * 12
        needs_dkdv = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        if x is None:
            dq, dk, dv = ops.attention_backward(
                grad, q, k, v, None, None, None, *rest[-2:], ctx.scale, needs_dkdv
            )
        else:
            dq, dk, dv = ops.projected_attention_backward(grad, q, k, v, x, *rest, ctx.scale, needs_dkdv)
        return dq, dk if needs_dkdv else None, dv if needs_dkdv else None, *(None,) * 10


def _need_gradient(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def refuse_second_derivative() -> None:
    """Raise in a backward that is itself differentiated."""
    # `once_differentiable` would silently take a gradient for a constant where what it is of is none.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError('impl="triton" has no second derivative (create_graph=True): use impl="reference"')


def refuse_functorch() -> None:
    """Raise under a transform of `torch.func`, and under forward-mode differentiation."""
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError('impl="triton" has no torch.func transforms (vmap, grad, jvp): use impl="sdpa"')
    # Without a gradient to give, the operator would silently take tangents for zero.
    if torch.autograd.forward_ad._current_level >= 0:
        raise RuntimeError('impl="triton" has no forward-mode differentiation: use impl="reference"')
