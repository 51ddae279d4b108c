"""Forward: flash attention whose programs choose their pair, and serve the source's queries as well."""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from stochca_kernels.launch import (
    MAX_KINDS,
    Launch,
    Layout,
    empty_token_major,
    launch_largest,
    layouts,
    stride_unit,
    strides_of,
)
from stochca_kernels.primitives import head_base, load_parts, where_each
from stochca_kernels.softmax import attend_resident, attend_streamed
from stochca_kernels.tiles import TilePlan, Tiles, cdiv, choose_tiles, dot_precision, query_lanes, tail_size


@triton.jit(
    do_not_specialize=["len_q", "len_kv", "len_source_q", "len_source_kv", "num_heads", "num_lanes"],
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
    len_q, len_kv, len_source_q, len_source_kv, num_heads, num_lanes,
    scale,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr, TAIL_N: tl.constexpr, WHOLE_ROW: tl.constexpr,
    SELECTOR: tl.constexpr, HAS_SOURCE_Q: tl.constexpr, HAS_SOURCE_KV: tl.constexpr, HAS_LSE: tl.constexpr,
    STRIDE_UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (batch * num_heads * num_lanes,). The lanes of a head share its blocks of queries."""
    # The lanes of one head are neighbours: they read the same keys and values from the cache.
    lane = tl.program_id(0) % num_lanes
    batch_head = tl.program_id(0) // num_lanes
    batch = (batch_head // num_heads).to(tl.int64)
    head = (batch_head % num_heads).to(tl.int64)

    # One coin for all rows of a program: it moves the pointers, and the other pair is never read.
    reads_source = False
    if SELECTOR != "none":
        reads_source = tl.load(use_source_ptr + batch)
    if SELECTOR == "skip":  # noqa: SIM102, the outer one is decided at compile time
        if reads_source:
            return

    # The source's rows follow the target's, in one count. A lane takes every `num_lanes`-th block of them;
    # where the two models read different pairs, even lanes serve the target and odd ones the source.
    start_row, end_row = lane * BLOCK_M, len_q
    if HAS_SOURCE_Q:
        end_row = len_q + len_source_q
        if HAS_SOURCE_KV:
            is_source_lane = lane % 2 == 1
            apart = lane // 2 * BLOCK_M + tl.where(is_source_lane, len_q, 0)
            start_row = tl.where(reads_source, start_row, apart)
            num_lanes = tl.where(reads_source, num_lanes, num_lanes // 2)
            reads_source = reads_source | is_source_lane
            end_row = tl.where(reads_source, end_row, len_q)
        source_q_ptr = head_base(source_q_ptr, stride_sqb, stride_sqh, batch, head, STRIDE_UNIT)
        source_out_ptr = head_base(source_out_ptr, stride_sob, stride_soh, batch, head, STRIDE_UNIT)
    q_ptr = head_base(q_ptr, stride_qb, stride_qh, batch, head, STRIDE_UNIT)
    out_ptr = head_base(out_ptr, stride_ob, stride_oh, batch, head, STRIDE_UNIT)
    k_ptr = head_base(k_ptr, stride_kb, stride_kh, batch, head, STRIDE_UNIT)
    v_ptr = head_base(v_ptr, stride_vb, stride_vh, batch, head, STRIDE_UNIT)
    if HAS_SOURCE_KV:
        source_k_ptr = head_base(source_k_ptr, stride_skb, stride_skh, batch, head, STRIDE_UNIT)
        source_v_ptr = head_base(source_v_ptr, stride_svb, stride_svh, batch, head, STRIDE_UNIT)
        k_ptr, stride_kn, v_ptr, stride_vn, len_kv = where_each(
            reads_source,
            (source_k_ptr, stride_skn, source_v_ptr, stride_svn, len_source_kv),
            (k_ptr, stride_kn, v_ptr, stride_vn, len_kv),
        )

    if len(PARTS) > 0:
        keys = load_parts(k_ptr, stride_kn, len_kv, PARTS, HEAD_DIM, BLOCK_D)
        values = load_parts(v_ptr, stride_vn, len_kv, PARTS, HEAD_DIM, BLOCK_D)
    for first_row in tl.range(start_row, end_row, num_lanes * BLOCK_M, disable_licm=True):
        # [BLOCK_M]
        rows = first_row + tl.arange(0, BLOCK_M)
        q_rows_ptr = q_ptr + rows.to(tl.int64) * stride_qn
        out_rows_ptr = out_ptr + rows.to(tl.int64) * stride_on
        if HAS_SOURCE_Q:
            source_rows = (rows - len_q).to(tl.int64)
            q_rows_ptr = tl.where(rows < len_q, q_rows_ptr, source_q_ptr + source_rows * stride_sqn)
            out_rows_ptr = tl.where(rows < len_q, out_rows_ptr, source_out_ptr + source_rows * stride_son)
        # [BLOCK_M, BLOCK_D]
        columns = tl.arange(0, BLOCK_D)
        mask = (rows[:, None] < end_row) & (columns[None, :] < HEAD_DIM)
        q = tl.load(q_rows_ptr[:, None] + columns[None, :], mask=mask, other=0.0)
        if len(PARTS) > 0:
            acc, row_max, row_sum = attend_resident(q, keys, values, len_kv, scale, WHOLE_ROW, PRECISION)
        else:
            acc, row_max, row_sum = attend_streamed(
                q, k_ptr, stride_kn, v_ptr, stride_vn, len_kv, scale, BLOCK_N, TAIL_N,
                HEAD_DIM, BLOCK_D, PRECISION,
            )  # fmt: skip
        out = (acc / row_sum[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_rows_ptr[:, None] + columns[None, :], out, mask=mask)
        if HAS_LSE:
            lse = row_max + tl.log2(row_sum)
            tl.store(lse_ptr + batch_head.to(tl.int64) * len_q + rows, lse, mask=rows < len_q)


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
        source_k: The source's keys `[B, H, Ns, D]`; None where all that is asked for reads `k` and `v`.
        source_v: The source's values.
        use_source: Coins `[B]`, or None.
        source_q: Queries of the source, `[B, H, Nsq, D]`, or None.
        scale: Factor on the scores.
        needs_lse: Whether a backward will follow.

    Returns:
        The output `[B, H, Nq, D]`; the log-sum-exp of the scores to base 2, float32 `[B, H, Nq]`; the
        source's output `[B, H, Nsq, D]`. The last two are empty where they are not asked for.
    """
    out, lse, source_out = empty_forward(q, 0 if source_q is None else source_q.shape[2], needs_lse)
    launch_forward(q, k, v, source_k, source_v, use_source, source_q, scale, out, lse, source_out)
    return out, lse, source_out


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    source_k: Tensor | None,
    source_v: Tensor | None,
    use_source: Tensor | None,
    source_q: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
    source_out: Tensor,
) -> None:
    """As `attention_forward`, into given tensors.

    With coins but no pair of the source, samples whose coin is true are left to another launch. An empty
    `lse` is not written.
    """
    has_source_q, has_source_kv = source_q is not None, source_k is not None
    source_q = q if source_q is None else source_q
    source_k = k if source_k is None else source_k
    source_v = v if source_v is None else source_v
    selector = "none" if use_source is None else "pair" if has_source_kv else "skip"
    coins = q if use_source is None else use_source
    strided = (q, k, v, source_q, source_k, source_v, out, source_out)
    sizes = (q.shape, k.shape[2], source_q.shape[2], source_k.shape[2], source_out.shape[2])
    asked = (selector, has_source_q, has_source_kv, lse.numel() > 0, stride_unit(*strided), dot_precision(q))

    def launch(tiles: Tiles) -> None:
        kind = _kind_of_launch(
            q.device, tiles, layouts(*strided), (lse.dtype, coins.dtype), sizes, scale, asked
        )
        kind(_attn_fwd_kernel, strided, (lse, coins))

    launch_largest(_attn_fwd_kernel, q, choose_tiles("fwd", q, k.shape[2], source_k.shape[2]), launch)


@lru_cache(maxsize=MAX_KINDS)
def _kind_of_launch(
    device: torch.device,
    tiles: Tiles,
    strided: tuple[Layout, ...],
    other_dtypes: tuple[torch.dtype, ...],
    sizes: tuple[Any, ...],
    scale: float,
    asked: tuple[Any, ...],
) -> Launch:
    """Everything about a launch of the forward that the content and the address of tensors do not change."""
    (batch, heads, len_q, head_dim), len_kv, len_source_q, len_source_kv, source_rows = sizes
    selector, has_source_q, has_source_kv, has_lse, unit, precision = asked
    groups = 2 if has_source_q and has_source_kv else 1
    rows = max(len_q, source_rows) if groups == 2 else len_q + source_rows
    lanes = cdiv(rows, tiles.block_m)
    if tiles.block_n == 0:
        lanes = query_lanes(batch * heads * groups, lanes, device)
    return Launch(
        batch * heads * lanes * groups,
        strides_of(strided),
        2,
        (len_q, len_kv, len_source_q, len_source_kv, heads, lanes * groups, scale),
        {
            "HEAD_DIM": head_dim,
            "BLOCK_M": tiles.block_m,
            "BLOCK_N": tiles.block_n,
            "BLOCK_D": triton.next_power_of_2(head_dim),
            "PARTS": TilePlan(len_kv, tiles.block_n).parts,
            "TAIL_N": tail_size(tiles.block_n, len_kv, len_source_kv),
            "WHOLE_ROW": tiles.whole_row,
            "SELECTOR": selector,
            "HAS_SOURCE_Q": has_source_q,
            "HAS_SOURCE_KV": has_source_kv,
            "HAS_LSE": has_lse,
            "STRIDE_UNIT": unit,
            "PRECISION": precision,
            "num_warps": tiles.num_warps,
            "num_stages": tiles.num_stages,
        },
    )


def empty_forward(q: Tensor, len_source_q: int, needs_lse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate what `attention_forward` returns."""
    batch, heads, len_q, head_dim = q.shape
    return (
        empty_token_major(q, (batch, heads, len_q, head_dim)),
        q.new_empty((batch, heads, len_q) if needs_lse else (0,), dtype=torch.float32),
        empty_token_major(q, (batch, heads, len_source_q, head_dim)),
    )
