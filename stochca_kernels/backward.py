"""Backward: one kernel for dQ, all that cross-attention needs, and one for dK and dV. No atomics.

Samples that attend to their own pair take the one kernel of `backward_joint.py` instead where it fits.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from stochca_kernels.backward_joint import has_joint_backward, launch_joint_backward
from stochca_kernels.launch import (
    MAX_KINDS,
    Launch,
    Layout,
    empty_token_major,
    launch_largest,
    layouts,
    stride_unit,
    strides_of,
    with_unit_stride,
)
from stochca_kernels.primitives import (
    LOG2_E,
    dot_rows,
    head_base,
    load_parts,
    load_queries,
    load_rows,
    store_rows,
    where_each,
)
from stochca_kernels.projection import unpack
from stochca_kernels.softmax import dq_resident, dq_streamed
from stochca_kernels.tiles import TilePlan, Tiles, cdiv, choose_tiles, dot_precision, query_lanes, tail_size


@triton.jit(
    do_not_specialize=["len_q", "len_kv", "len_source_kv", "num_heads", "num_lanes"],
    do_not_specialize_on_alignment=["use_source_ptr"],
)
def _attn_bwd_dq_kernel(
    grad_ptr, stride_gb, stride_gh, stride_gn,
    q_ptr, stride_qb, stride_qh, stride_qn,
    k_ptr, stride_kb, stride_kh, stride_kn,
    v_ptr, stride_vb, stride_vh, stride_vn,
    source_k_ptr, stride_skb, stride_skh, stride_skn,
    source_v_ptr, stride_svb, stride_svh, stride_svn,
    out_ptr, stride_ob, stride_oh, stride_on,
    dq_ptr, stride_dqb, stride_dqh, stride_dqn,
    lse_ptr,
    delta_ptr,
    use_source_ptr,
    len_q, len_kv, len_source_kv, num_heads, num_lanes,
    scale,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr, TAIL_N: tl.constexpr,
    SELECTOR: tl.constexpr, HAS_DELTA: tl.constexpr,
    STRIDE_UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (batch * num_heads * num_lanes,). The lanes of a head share its blocks of queries.

    `SELECTOR` says whose dQ is written: of all samples, from one pair ("none") or from that of their coin
    ("pair"); of those whose coin is false ("skip") or true ("source"), from the first pair.
    """
    lane = tl.program_id(0) % num_lanes
    batch_head = tl.program_id(0) // num_lanes
    batch = (batch_head // num_heads).to(tl.int64)
    head = (batch_head % num_heads).to(tl.int64)

    k_ptr = head_base(k_ptr, stride_kb, stride_kh, batch, head, STRIDE_UNIT)
    v_ptr = head_base(v_ptr, stride_vb, stride_vh, batch, head, STRIDE_UNIT)
    if SELECTOR != "none":
        # One coin for all rows of a program: it moves the pointers, and the other pair is never read.
        reads_source = tl.load(use_source_ptr + batch)
        if SELECTOR == "skip":
            if reads_source:
                return
        elif SELECTOR == "source":
            if reads_source == 0:
                return
        else:
            source_k_ptr = head_base(source_k_ptr, stride_skb, stride_skh, batch, head, STRIDE_UNIT)
            source_v_ptr = head_base(source_v_ptr, stride_svb, stride_svh, batch, head, STRIDE_UNIT)
            k_ptr, stride_kn, v_ptr, stride_vn, len_kv = where_each(
                reads_source,
                (source_k_ptr, stride_skn, source_v_ptr, stride_svn, len_source_kv),
                (k_ptr, stride_kn, v_ptr, stride_vn, len_kv),
            )
    grad_ptr = head_base(grad_ptr, stride_gb, stride_gh, batch, head, STRIDE_UNIT)
    out_ptr = head_base(out_ptr, stride_ob, stride_oh, batch, head, STRIDE_UNIT)
    q_ptr = head_base(q_ptr, stride_qb, stride_qh, batch, head, STRIDE_UNIT)
    dq_ptr = head_base(dq_ptr, stride_dqb, stride_dqh, batch, head, STRIDE_UNIT)
    lse_ptr += batch_head.to(tl.int64) * len_q
    if HAS_DELTA:
        delta_ptr += batch_head.to(tl.int64) * len_q

    if len(PARTS) > 0:
        keys = load_parts(k_ptr, stride_kn, len_kv, PARTS, HEAD_DIM, BLOCK_D)
        values = load_parts(v_ptr, stride_vn, len_kv, PARTS, HEAD_DIM, BLOCK_D)
    for block in tl.range(lane, tl.cdiv(len_q, BLOCK_M), num_lanes, disable_licm=True):
        first_row = block * BLOCK_M
        # [BLOCK_M, BLOCK_D]
        grad = load_rows(grad_ptr, stride_gn, first_row, len_q, BLOCK_M, HEAD_DIM, BLOCK_D, True)
        out = load_rows(out_ptr, stride_on, first_row, len_q, BLOCK_M, HEAD_DIM, BLOCK_D, True)
        q = load_rows(q_ptr, stride_qn, first_row, len_q, BLOCK_M, HEAD_DIM, BLOCK_D, True)
        # [BLOCK_M]
        rows = first_row + tl.arange(0, BLOCK_M)
        delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
        # A row outside has no probabilities: exp2(logits - inf) = 0.
        lse = tl.load(lse_ptr + rows, mask=rows < len_q, other=float("inf"))
        if HAS_DELTA:
            tl.store(delta_ptr + rows, delta, mask=rows < len_q)
        if len(PARTS) > 0:
            dq = dq_resident(q, grad, lse, delta, keys, values, len_kv, scale, PRECISION)
        else:
            dq = dq_streamed(
                q, grad, lse, delta, k_ptr, stride_kn, v_ptr, stride_vn, len_kv, scale, BLOCK_N, TAIL_N,
                HEAD_DIM, BLOCK_D, PRECISION,
            )  # fmt: skip
        store_rows(dq_ptr, stride_dqn, first_row, len_q, dq * scale, BLOCK_M, HEAD_DIM, BLOCK_D)


@triton.jit
def _dkdv_tile(
    dk, dv, k, v,
    q_ptr, stride_qn,
    grad_ptr, stride_gn,
    lse_ptr,
    delta_ptr,
    start, len_q,
    scale,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    IS_TAIL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what the queries `start` to `start + ROWS` contribute to dV, and to dK up to the scale."""
    # q and grad [ROWS, BLOCK_D], lse and delta [ROWS]
    rows = start + tl.arange(0, ROWS)
    if IS_TAIL:
        q = load_queries(q_ptr, stride_qn, start, len_q, ROWS, HEAD_DIM, BLOCK_D)
        grad = load_queries(grad_ptr, stride_gn, start, len_q, ROWS, HEAD_DIM, BLOCK_D)
        # A row outside has no probabilities: exp2(logits - inf) = 0.
        lse = tl.load(lse_ptr + rows, mask=rows < len_q, other=float("inf"))
        delta = tl.load(delta_ptr + rows, mask=rows < len_q, other=0.0)
    else:
        q = load_rows(q_ptr, stride_qn, start, len_q, ROWS, HEAD_DIM, BLOCK_D, False)
        grad = load_rows(grad_ptr, stride_gn, start, len_q, ROWS, HEAD_DIM, BLOCK_D, False)
        lse = tl.load(lse_ptr + rows)
        delta = tl.load(delta_ptr + rows)
    # [BLOCK_N, ROWS], transposed so that both products below take it as it is
    logits = dot_rows(k, q, PRECISION) * (scale * LOG2_E)
    probs = tl.exp2(logits - lse[None, :])
    dv = tl.dot(probs.to(grad.dtype), grad, dv, input_precision=PRECISION)
    dprobs = dot_rows(v, grad, PRECISION)
    dlogits = probs * (dprobs - delta[None, :])
    dk = tl.dot(dlogits.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(
    do_not_specialize=["len_q", "len_kv", "num_heads"],
    do_not_specialize_on_alignment=["use_source_ptr"],
)
def _attn_bwd_dkdv_kernel(
    grad_ptr, stride_gb, stride_gh, stride_gn,
    q_ptr, stride_qb, stride_qh, stride_qn,
    k_ptr, stride_kb, stride_kh, stride_kn,
    v_ptr, stride_vb, stride_vh, stride_vn,
    dk_ptr, stride_dkb, stride_dkh, stride_dkn,
    dv_ptr, stride_dvb, stride_dvh, stride_dvn,
    lse_ptr,
    delta_ptr,
    use_source_ptr,
    len_q, len_kv, num_heads,
    scale,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    TAIL_M: tl.constexpr,
    HAS_SELECTOR: tl.constexpr,
    STRIDE_UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (batch * num_heads * cdiv(len_kv, BLOCK_N),)."""
    num_blocks = tl.cdiv(len_kv, BLOCK_N)
    first_row = tl.program_id(0) % num_blocks * BLOCK_N
    batch_head = tl.program_id(0) // num_blocks
    batch = (batch_head // num_heads).to(tl.int64)
    head = (batch_head % num_heads).to(tl.int64)

    dk_ptr = head_base(dk_ptr, stride_dkb, stride_dkh, batch, head, STRIDE_UNIT)
    dv_ptr = head_base(dv_ptr, stride_dvb, stride_dvh, batch, head, STRIDE_UNIT)
    # [BLOCK_N, BLOCK_D]
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if HAS_SELECTOR:  # noqa: SIM102, the outer one is decided at compile time
        # The sample attended to the source, which is a constant.
        if tl.load(use_source_ptr + batch):
            store_rows(dk_ptr, stride_dkn, first_row, len_kv, dk, BLOCK_N, HEAD_DIM, BLOCK_D)
            store_rows(dv_ptr, stride_dvn, first_row, len_kv, dv, BLOCK_N, HEAD_DIM, BLOCK_D)
            return

    # Rows outside are not masked below: they reach only rows of dk and dv that are not stored.
    k_ptr = head_base(k_ptr, stride_kb, stride_kh, batch, head, STRIDE_UNIT)
    k = load_rows(k_ptr, stride_kn, first_row, len_kv, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    v_ptr = head_base(v_ptr, stride_vb, stride_vh, batch, head, STRIDE_UNIT)
    v = load_rows(v_ptr, stride_vn, first_row, len_kv, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    q_ptr = head_base(q_ptr, stride_qb, stride_qh, batch, head, STRIDE_UNIT)
    grad_ptr = head_base(grad_ptr, stride_gb, stride_gh, batch, head, STRIDE_UNIT)
    lse_ptr += batch_head.to(tl.int64) * len_q
    delta_ptr += batch_head.to(tl.int64) * len_q

    len_main = len_q // BLOCK_M * BLOCK_M
    for start in range(0, len_main, BLOCK_M):
        dk, dv = _dkdv_tile(
            dk, dv, k, v, q_ptr, stride_qn, grad_ptr, stride_gn, lse_ptr, delta_ptr, start, len_q, scale,
            BLOCK_M, HEAD_DIM, BLOCK_D, False, PRECISION,
        )  # fmt: skip
    if TAIL_M > 0:
        dk, dv = _dkdv_tile(
            dk, dv, k, v, q_ptr, stride_qn, grad_ptr, stride_gn, lse_ptr, delta_ptr, len_main, len_q, scale,
            TAIL_M, HEAD_DIM, BLOCK_D, True, PRECISION,
        )  # fmt: skip
    store_rows(dk_ptr, stride_dkn, first_row, len_kv, dk * scale, BLOCK_N, HEAD_DIM, BLOCK_D)
    store_rows(dv_ptr, stride_dvn, first_row, len_kv, dv, BLOCK_N, HEAD_DIM, BLOCK_D)


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    source_k: Tensor | None,
    source_v: Tensor | None,
    use_source: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    needs_dkdv: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward.

    Args:
        grad: Gradient of the output, `[B, H, Nq, D]`.
        q: As in `attention_forward`, like all arguments up to `use_source`.
        k: `[B, H, N, D]`.
        v: `[B, H, N, D]`.
        source_k: `[B, H, Ns, D]`, or None without coins.
        source_v: `[B, H, Ns, D]`, or None without coins.
        use_source: `[B]`, or None.
        out: The output of the forward.
        lse: Its log-sum-exp to base 2, float32 `[B, H, Nq]`.
        scale: Factor on the scores.
        needs_dkdv: Whether `k` or `v` needs a gradient; in cross-attention none does.

    Returns:
        dQ `[B, H, Nq, D]`; dK and dV `[B, H, N, D]`, zero in samples whose coin is true, or both empty.
    """
    dq, dk, dv = empty_backward(q, k, needs_dkdv)
    launch_backward(grad, q, k, v, source_k, source_v, use_source, out, lse, scale, dq, dk, dv)
    return dq, dk, dv


def packed_attention_backward(
    grad: Tensor,
    qkv: Tensor,
    source_k: Tensor | None,
    source_v: Tensor | None,
    use_source: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> Tensor:
    """As `attention_backward` of a packed projection `[B, N, 3, H, D]`, whose gradient is written packed."""
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    launch_backward(grad, *unpack(qkv), source_k, source_v, use_source, out, lse, scale, *unpack(dqkv))
    return dqkv


def launch_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    source_k: Tensor | None,
    source_v: Tensor | None,
    use_source: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """As `attention_backward`, into given tensors.

    One kernel where all keys of a head fit on chip; else dQ first, which also leaves `rowsum(out * grad)`.
    With coins but no pair of the source, dQ of the samples whose coin is true is left to another launch.
    An empty `dk` is not written.
    """
    needs_dkdv = dk.numel() > 0
    selector = "none" if use_source is None else "pair" if source_k is not None else "skip"
    grad = with_unit_stride(grad)
    source_k = k if source_k is None else source_k
    source_v = v if source_v is None else source_v
    if needs_dkdv and has_joint_backward(q, k.shape[2]):
        launch_joint_backward(grad, q, k, v, use_source, out, lse, scale, dq, dk, dv)
        if selector != "pair":
            return
        # What remains is dQ of the samples that read the source.
        selector, k, v, needs_dkdv = "source", source_k, source_v, False
    batch, heads, len_q, _ = q.shape
    len_kv = k.shape[2]
    delta = q.new_empty((batch, heads, len_q) if needs_dkdv else (0,), dtype=torch.float32)
    coins = q if use_source is None else use_source
    others = (lse, delta, coins)
    reading_dq = (grad, q, k, v, source_k, source_v, out, dq)
    writing_dkdv = (grad, q, k, v, dk, dv)
    sizes = (q.shape, len_kv, source_k.shape[2])
    shared = (stride_unit(*reading_dq, dk, dv), dot_precision(q))

    def launch_dq(tiles: Tiles) -> None:
        asked = (selector, needs_dkdv, *shared)
        kind = _kind_of_dq(
            q.device, tiles, layouts(*reading_dq), (lse.dtype, coins.dtype), sizes, scale, asked
        )
        kind(_attn_bwd_dq_kernel, reading_dq, others)

    def launch_dkdv(tiles: Tiles) -> None:
        asked = (use_source is not None, *shared)
        kind = _kind_of_dkdv(
            q.device, tiles, layouts(*writing_dkdv), (lse.dtype, coins.dtype), sizes, scale, asked
        )
        kind(_attn_bwd_dkdv_kernel, writing_dkdv, others)

    rows = choose_tiles("dq", q, len_kv, source_k.shape[2])
    launch_largest(_attn_bwd_dq_kernel, q, rows, launch_dq)
    if needs_dkdv:
        launch_largest(_attn_bwd_dkdv_kernel, q, choose_tiles("dkdv", q, len_q), launch_dkdv)


@lru_cache(maxsize=MAX_KINDS)
def _kind_of_dq(
    device: torch.device,
    tiles: Tiles,
    strided: tuple[Layout, ...],
    other_dtypes: tuple[torch.dtype, ...],
    sizes: tuple[Any, ...],
    scale: float,
    asked: tuple[Any, ...],
) -> Launch:
    """Everything about a launch for dQ that the content and the address of tensors do not change."""
    (batch, heads, len_q, head_dim), len_kv, len_source_kv = sizes
    selector, has_delta, unit, precision = asked
    lanes = cdiv(len_q, tiles.block_m)
    if tiles.block_n == 0:
        lanes = query_lanes(batch * heads, lanes, device)
    return Launch(
        batch * heads * lanes,
        strides_of(strided),
        3,
        (len_q, len_kv, len_source_kv, heads, lanes, scale),
        {
            **_constants(tiles, head_dim, unit, precision),
            "PARTS": TilePlan(len_kv, tiles.block_n).parts,
            "TAIL_N": tail_size(tiles.block_n, len_kv, len_source_kv),
            "SELECTOR": selector,
            "HAS_DELTA": has_delta,
        },
    )


@lru_cache(maxsize=MAX_KINDS)
def _kind_of_dkdv(
    device: torch.device,
    tiles: Tiles,
    strided: tuple[Layout, ...],
    other_dtypes: tuple[torch.dtype, ...],
    sizes: tuple[Any, ...],
    scale: float,
    asked: tuple[Any, ...],
) -> Launch:
    """As `_kind_of_dq`, for dK and dV."""
    (batch, heads, len_q, head_dim), len_kv, _ = sizes
    has_selector, unit, precision = asked
    return Launch(
        batch * heads * cdiv(len_kv, tiles.block_n),
        strides_of(strided),
        3,
        (len_q, len_kv, heads, scale),
        {
            **_constants(tiles, head_dim, unit, precision),
            "TAIL_M": tail_size(tiles.block_m, len_q),
            "HAS_SELECTOR": has_selector,
        },
    )


def _constants(tiles: Tiles, head_dim: int, unit: int, precision: str) -> dict[str, Any]:
    """What both kernels are compiled for."""
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "STRIDE_UNIT": unit,
        "PRECISION": precision,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


def empty_backward(q: Tensor, k: Tensor, needs_dkdv: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate what `attention_backward` returns."""
    shape = k.shape if needs_dkdv else torch.Size((0, 0, 0, 0))
    return empty_token_major(q, q.shape), empty_token_major(k, shape), empty_token_major(k, shape)
