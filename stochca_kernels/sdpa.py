"""The portable implementation, on torch's `scaled_dot_product_attention` and matrix products.

It runs wherever torch runs. To SDPA it adds the choice of the pair, and that few query rows never compute
keys or values at all: by associativity `q (x W_k')' = (q W_k) x'` and `P (x W_v' + b_v) = (P x) W_v' + b_v`,
since the rows of `P` sum to one. The key bias shifts a whole row of scores and cancels.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from stochca_kernels.projection import KV, Projection, pair_of, project, zero_where


def attention_sdpa(
    q: Tensor,
    kv: KV,
    source_kv: KV,
    use_source: bool | Tensor,
    source_q: Tensor | Projection | None,
    scale: float,
) -> tuple[Tensor, Tensor | None]:
    """Attend with each sample's queries to its own pair, or to the source's where its coin says so.

    Args:
        q: `[B, H, Nq, D]`.
        kv: A pair of `[B, H, N, D]`, a `Projection`, or None where no sample needs it.
        source_kv: The same of the source.
        use_source: One coin, or a bool tensor `[B]`.
        source_q: The source's own queries `[B, H, Ns, D]`, a `Projection`, or None.
        scale: Factor on the scores.

    Returns:
        The output `[B, H, Nq, D]`, and the source's own output `[B, H, Ns, D]` or None.
    """
    if source_q is not None and isinstance(source_kv, Projection):
        source_kv = pair_of(source_kv, q.shape[1])  # two readers: project once
    if isinstance(source_q, Projection):
        source_q = project(source_q, q.shape[1], parts=1)[0]
    source_out = None if source_q is None else _attend(source_q, source_kv, scale)
    if isinstance(use_source, bool):
        return _attend(q, source_kv if use_source else kv, scale), source_out
    coin = use_source[:, None, None, None]
    if not isinstance(kv, Projection) and not isinstance(source_kv, Projection):
        assert kv is not None
        assert source_kv is not None
        if kv[0].shape == source_kv[0].shape:
            pair = torch.where(coin, source_kv[0], kv[0]), torch.where(coin, source_kv[1], kv[1])
            return _attend(q, pair, scale), source_out
    # Queries too: NaN in those of other samples would reach a weight's gradient as 0 * NaN, and the reverse.
    own = _attend(q.masked_fill(coin, 0), zero_where(kv, use_source), scale)
    source = _attend(q.masked_fill(~coin, 0), zero_where(source_kv, ~use_source), scale)
    return torch.where(coin, source, own), source_out


def _attend(q: Tensor, kv: KV, scale: float) -> Tensor:
    """Attend to one side, over the tokens themselves where that is cheaper than projecting them."""
    assert kv is not None
    if isinstance(kv, Projection):
        if q.shape[2] < q.shape[3]:
            return _attend_tokens(q, kv, scale)
        kv = pair_of(kv, q.shape[1])
    return F.scaled_dot_product_attention(q, *kv, scale=scale)


def _attend_tokens(q: Tensor, kv: Projection, scale: float) -> Tensor:
    """Attend to `kv.x` without computing a key or a value. Cheaper while `Nq < D`."""
    _, heads, len_q, head_dim = q.shape
    weight_k, weight_v = kv.weight.reshape(2, heads, head_dim, -1)
    # [B, H * Nq, C]: each head's query, expressed in the space of the tokens
    queries = torch.einsum("bhqd,hdc->bhqc", q * scale, weight_k).flatten(1, 2)
    logits = queries @ kv.x.transpose(1, 2)
    if kv.rstd is not None:
        logits = (logits * kv.rstd[:, None]).to(q.dtype)
    probs = torch.softmax(logits, dim=-1)
    if kv.rstd is not None:
        probs = (probs * kv.rstd[:, None]).to(q.dtype)
    mixed = (probs @ kv.x).unflatten(1, (heads, len_q))
    out = torch.einsum("bhqc,hdc->bhqd", mixed, weight_v)
    return out if kv.bias is None else out + kv.bias.view(2, heads, 1, head_dim)[1]
