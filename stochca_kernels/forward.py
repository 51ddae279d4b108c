"""Forward: flash attention whose programs choose their pair, and serve the source's queries as well."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stochca_kernels.launch import empty_token_major, on_device_of
from stochca_kernels.primitives import LOG2_E, dot_rows, head_base, load_rows, store_rows
from stochca_kernels.tiles import choose_tiles, dot_precision, tail_size


@triton.jit
def _attend_tile(
    acc, row_max, row_sum, q,
    k_ptr, stride_kn,
    v_ptr, stride_vn,
    start, len_kv,
    scale,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    IS_TAIL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the keys `start` to `start + ROWS` to the running softmax."""
    # [ROWS, BLOCK_D]
    k = load_rows(k_ptr, stride_kn, start, len_kv, ROWS, HEAD_DIM, BLOCK_D, IS_TAIL)
    # [BLOCK_M, ROWS]
    logits = dot_rows(q, k, PRECISION) * (scale * LOG2_E)
    if IS_TAIL:
        logits = tl.where((start + tl.arange(0, ROWS))[None, :] < len_kv, logits, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(logits, 1))
    rescale = tl.exp2(row_max - new_max)
    probs = tl.exp2(logits - new_max[:, None])
    row_sum = row_sum * rescale + tl.sum(probs, 1)
    # [ROWS, BLOCK_D]
    v = load_rows(v_ptr, stride_vn, start, len_kv, ROWS, HEAD_DIM, BLOCK_D, IS_TAIL)
    acc = tl.dot(probs.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
    return acc, new_max, row_sum


@triton.jit(
    do_not_specialize=["len_q", "len_kv", "len_source_q", "len_source_kv", "num_heads"],
    do_not_specialize_on_alignment=["use_source_ptr"],
)
def _attn_fwd_kernel(
    q_ptr, stride_qb, stride_qh, stride_qn,
    k_ptr, stride_kb, stride_kh, stride_kn,
    v_ptr, stride_vb, stride_vh, stride_vn,
    source_q_ptr, stride_sqb, stride_sqh, stride_sqn,
    source_k_ptr, stride_skb, stride_skh, stride_skn,
    source_v_ptr, stride_svb, stride_svh, stride_svn,
    out_ptr, stride_ob, stride_oh, stride_on,
    source_out_ptr, stride_sob, stride_soh, stride_son,
    lse_ptr,
    use_source_ptr,
    len_q, len_kv, len_source_q, len_source_kv, num_heads,
    scale,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    TAIL_N: tl.constexpr,
    HAS_SELECTOR: tl.constexpr, HAS_SOURCE_Q: tl.constexpr, HAS_LSE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (batch * num_heads * (cdiv(len_q, BLOCK_M) + cdiv(len_source_q, BLOCK_M)),)."""
    num_blocks = tl.cdiv(len_q, BLOCK_M)
    if HAS_SOURCE_Q:
        num_blocks += tl.cdiv(len_source_q, BLOCK_M)
    # The blocks of one head are neighbours: they read the same keys and values from the cache.
    block = tl.program_id(0) % num_blocks
    batch_head = tl.program_id(0) // num_blocks
    batch = (batch_head // num_heads).to(tl.int64)
    head = (batch_head % num_heads).to(tl.int64)

    q_ptr = head_base(q_ptr, stride_qb, stride_qh, batch, head)
    k_ptr = head_base(k_ptr, stride_kb, stride_kh, batch, head)
    v_ptr = head_base(v_ptr, stride_vb, stride_vh, batch, head)
    out_ptr = head_base(out_ptr, stride_ob, stride_oh, batch, head)
    if HAS_LSE:
        lse_ptr += batch_head.to(tl.int64) * len_q
    if HAS_SELECTOR or HAS_SOURCE_Q:
        # One coin for all rows of a program: it moves the pointers, and the other pair is never read.
        reads_source = False
        if HAS_SELECTOR:
            reads_source = tl.load(use_source_ptr + batch)
        if HAS_SOURCE_Q:
            is_source = block >= tl.cdiv(len_q, BLOCK_M)
            reads_source = reads_source | is_source
            block = tl.where(is_source, block - tl.cdiv(len_q, BLOCK_M), block)
            source_q_ptr = head_base(source_q_ptr, stride_sqb, stride_sqh, batch, head)
            source_out_ptr = head_base(source_out_ptr, stride_sob, stride_soh, batch, head)
            q_ptr = tl.where(is_source, source_q_ptr, q_ptr)
            out_ptr = tl.where(is_source, source_out_ptr, out_ptr)
            stride_qn = tl.where(is_source, stride_sqn, stride_qn)
            stride_on = tl.where(is_source, stride_son, stride_on)
            len_q = tl.where(is_source, len_source_q, len_q)
        source_k_ptr = head_base(source_k_ptr, stride_skb, stride_skh, batch, head)
        source_v_ptr = head_base(source_v_ptr, stride_svb, stride_svh, batch, head)
        k_ptr = tl.where(reads_source, source_k_ptr, k_ptr)
        v_ptr = tl.where(reads_source, source_v_ptr, v_ptr)
        stride_kn = tl.where(reads_source, stride_skn, stride_kn)
        stride_vn = tl.where(reads_source, stride_svn, stride_vn)
        len_kv = tl.where(reads_source, len_source_kv, len_kv)

    # [BLOCK_M, BLOCK_D]
    q = load_rows(q_ptr, stride_qn, block * BLOCK_M, len_q, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)

    len_main = len_kv // BLOCK_N * BLOCK_N
    for start in range(0, len_main, BLOCK_N):
        acc, row_max, row_sum = _attend_tile(
            acc, row_max, row_sum, q, k_ptr, stride_kn, v_ptr, stride_vn, start, len_kv, scale,
            BLOCK_N, HEAD_DIM, BLOCK_D, False, PRECISION,
        )  # fmt: skip
    if TAIL_N > 0:
        acc, row_max, row_sum = _attend_tile(
            acc, row_max, row_sum, q, k_ptr, stride_kn, v_ptr, stride_vn, len_main, len_kv, scale,
            TAIL_N, HEAD_DIM, BLOCK_D, True, PRECISION,
        )  # fmt: skip

    out = acc / row_sum[:, None]
    store_rows(out_ptr, stride_on, block * BLOCK_M, len_q, out, BLOCK_M, HEAD_DIM, BLOCK_D)
    if HAS_LSE:
        rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = rows < len_q
        if HAS_SOURCE_Q:
            mask = mask & (is_source == 0)
        tl.store(lse_ptr + rows, row_max + tl.log2(row_sum), mask=mask)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    source_k: Tensor | None,
    source_v: Tensor | None,
    use_source: Tensor | None,
    source_q: Tensor | None,
    scale: float,
    needs_lse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward.

    Args:
        q: Queries `[B, H, Nq, D]`.
        k: Keys `[B, H, N, D]` of the samples whose coin is false; of all samples without coins.
        v: Values `[B, H, N, D]`.
        source_k: The source's keys `[B, H, Ns, D]`; None where neither a coin nor `source_q` reads them.
        source_v: The source's values.
        use_source: Coins `[B]`, or None.
        source_q: Queries of the source, `[B, H, Nsq, D]`, or None.
        scale: Factor on the scores.
        needs_lse: Whether a backward will follow.

    Returns:
        The output `[B, H, Nq, D]`; the log-sum-exp of the scores to base 2, float32 `[B, H, Nq]`; the
        source's output `[B, H, Nsq, D]`. The last two are empty where they are not asked for.
    """
    batch, heads, len_q, head_dim = q.shape
    out, lse, source_out = empty_forward(q, source_q, needs_lse)
    has_source_q = source_q is not None
    source_q = q if source_q is None else source_q
    source_k = k if source_k is None else source_k
    source_v = v if source_v is None else source_v

    tiles = choose_tiles("fwd", q)
    blocks = triton.cdiv(len_q, tiles.block_m) + triton.cdiv(source_out.shape[2], tiles.block_m)
    if batch * heads * blocks == 0:
        return out, lse, source_out
    with on_device_of(q):
        _attn_fwd_kernel[(batch * heads * blocks,)](
            q, *q.stride()[:3],
            k, *k.stride()[:3],
            v, *v.stride()[:3],
            source_q, *source_q.stride()[:3],
            source_k, *source_k.stride()[:3],
            source_v, *source_v.stride()[:3],
            out, *out.stride()[:3],
            source_out, *source_out.stride()[:3],
            lse,
            q if use_source is None else use_source,
            len_q, k.shape[2], source_q.shape[2], source_k.shape[2], heads,
            scale,
            HEAD_DIM=head_dim, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n,
            BLOCK_D=triton.next_power_of_2(head_dim),
            TAIL_N=tail_size(tiles.block_n, k.shape[2], source_k.shape[2]),
            HAS_SELECTOR=use_source is not None, HAS_SOURCE_Q=has_source_q, HAS_LSE=needs_lse,
            PRECISION=dot_precision(q),
            num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
    return out, lse, source_out


def empty_forward(q: Tensor, source_q: Tensor | None, needs_lse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate what `attention_forward` returns."""
    batch, heads, len_q, head_dim = q.shape
    len_source = 0 if source_q is None else source_q.shape[2]
    return (
        empty_token_major(q, (batch, heads, len_q, head_dim)),
        q.new_empty((batch, heads, len_q) if needs_lse else (0,), dtype=torch.float32),
        empty_token_major(q, (batch, heads, len_source, head_dim)),
    )
