"""The Triton kernels as operators that torch differentiates, and that its compilers leave whole."""

import torch
from torch import Tensor

from stochca_kernels.backward import attention_backward, empty_backward
from stochca_kernels.forward import attention_forward, empty_forward

_library = torch.library.Library("stochca", "FRAGMENT")
_library.define(
    "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? source_k, Tensor? source_v, Tensor? use_source, "
    "Tensor? source_q, float scale, bool needs_lse) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? source_k, Tensor? source_v, "
    "Tensor? use_source, Tensor out, Tensor lse, float scale, bool needs_dkdv) -> (Tensor, Tensor, Tensor)"
)
_library.impl("attention_forward", attention_forward, "CompositeExplicitAutograd")
_library.impl("attention_backward", attention_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("stochca::attention_forward", lib=_library)
def _(q, k, v, source_k, source_v, use_source, source_q, scale, needs_lse):
    return empty_forward(q, source_q, needs_lse)


@torch.library.register_fake("stochca::attention_backward", lib=_library)
def _(grad, q, k, v, source_k, source_v, use_source, out, lse, scale, needs_dkdv):
    return empty_backward(q, k, needs_dkdv)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, source_k, source_v, use_source, source_q, scale):
        out, lse, source_out = torch.ops.stochca.attention_forward(
            q, k, v, source_k, source_v, use_source, source_q, scale, True
        )
        if use_source is None:  # only `source_q` reads the source
            source_k = source_v = None
        ctx.save_for_backward(q, k, v, source_k, source_v, use_source, out, lse)
        ctx.scale = scale
        ctx.mark_non_differentiable(source_out)
        return out, source_out

    @staticmethod
    def backward(ctx, grad, _):
        # `once_differentiable` would silently take this gradient for a constant where `grad` is one.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                'impl="triton" has no second derivative (create_graph=True): use impl="reference"'
            )
        q, k, v, source_k, source_v, use_source, out, lse = ctx.saved_tensors
        needs_dkdv = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        dq, dk, dv = torch.ops.stochca.attention_backward(
            grad, q, k, v, source_k, source_v, use_source, out, lse, ctx.scale, needs_dkdv
        )
        return dq, dk if needs_dkdv else None, dv if needs_dkdv else None, None, None, None, None, None


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
        q: `[B, H, Nq, D]`.
        kv: A pair of `[B, H, N, D]`, or None where no sample needs it.
        source_kv: The same of the source.
        use_source: One coin, or a bool tensor `[B]`.
        source_q: The source's own queries `[B, H, Ns, D]`, or None.
        scale: Factor on the scores.

    Returns:
        The output `[B, H, Nq, D]`, and the source's own output `[B, H, Ns, D]` or None.

    Raises:
        RuntimeError: Called under a transform of `torch.func`, which the kernels do not have.
    """
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError('impl="triton" has no torch.func transforms (vmap, grad, jvp): use impl="sdpa"')
    # Without a coin per sample, the chosen pair takes the first place: the kernels need not choose.
    pair = source_kv if use_source is True else kv
    assert pair is not None
    coins = use_source if isinstance(use_source, Tensor) else None
    needs_source = coins is not None or (source_q is not None and use_source is False)
    source_k, source_v = source_kv if source_kv is not None and needs_source else (None, None)
    args = (q, *pair, source_k, source_v, coins, source_q)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, *pair)):
        out, source_out = _Attention.apply(*args, scale)
    else:
        out, _, source_out = torch.ops.stochca.attention_forward(*args, scale, False)
    return out, None if source_q is None else source_out
