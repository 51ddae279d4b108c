"""Backward of self-attention in one program per head: dQ, dK and dV from one pass, nothing computed twice.

The split kernels compute the probabilities twice, once for dQ and once for dK and dV: seven products. Where
all keys of a head fit on chip, with the float32 sums of dK and dV in registers, five are enough.
"""

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
    launch_largest,
    layouts,
    stride_unit,
    strides_of,
)
from stochca_kernels.primitives import (
    LOG2_E,
    append,
    dot_rows,
    head_base,
    load_parts,
    load_queries,
    store_rows,
    zeros,
)
from stochca_kernels.tiles import TilePlan, Tiles, choose_tiles, dot_precision


@triton.jit(
    do_not_specialize=["len_q", "len_kv", "num_heads"],
    do_not_specialize_on_alignment=["use_source_ptr"],
)
def _attn_bwd_joint_kernel(
    grad_ptr, stride_gb, stride_gh, stride_gn,
    q_ptr, stride_qb, stride_qh, stride_qn,
    k_ptr, stride_kb, stride_kh, stride_kn,
    v_ptr, stride_vb, stride_vh, stride_vn,
    out_ptr, stride_ob, stride_oh, stride_on,
    dq_ptr, stride_dqb, stride_dqh, stride_dqn,
    dk_ptr, stride_dkb, stride_dkh, stride_dkn,
    dv_ptr, stride_dvb, stride_dvh, stride_dvn,
    lse_ptr,
    use_source_ptr,
    len_q, len_kv, num_heads,
    scale,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_SELECTOR: tl.constexpr,
    STRIDE_UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (batch * num_heads,)."""
    batch = (tl.program_id(0) // num_heads).to(tl.int64)
    head = (tl.program_id(0) % num_heads).to(tl.int64)

    dk_ptr = head_base(dk_ptr, stride_dkb, stride_dkh, batch, head, STRIDE_UNIT)
    dv_ptr = head_base(dv_ptr, stride_dvb, stride_dvh, batch, head, STRIDE_UNIT)
    dk = _zero_parts(PARTS, BLOCK_D)
    dv = _zero_parts(PARTS, BLOCK_D)
    if HAS_SELECTOR:  # noqa: SIM102, the outer one is decided at compile time
        # The sample attended to the source, which is a constant: dQ is another kernel's.
        if tl.load(use_source_ptr + batch):
            _store_parts(dk_ptr, stride_dkn, len_kv, dk, 1.0, HEAD_DIM, BLOCK_D)
            _store_parts(dv_ptr, stride_dvn, len_kv, dv, 1.0, HEAD_DIM, BLOCK_D)
            return

    k_ptr = head_base(k_ptr, stride_kb, stride_kh, batch, head, STRIDE_UNIT)
    keys = load_parts(k_ptr, stride_kn, len_kv, PARTS, HEAD_DIM, BLOCK_D)
    v_ptr = head_base(v_ptr, stride_vb, stride_vh, batch, head, STRIDE_UNIT)
    values = load_parts(v_ptr, stride_vn, len_kv, PARTS, HEAD_DIM, BLOCK_D)
    grad_ptr = head_base(grad_ptr, stride_gb, stride_gh, batch, head, STRIDE_UNIT)
    out_ptr = head_base(out_ptr, stride_ob, stride_oh, batch, head, STRIDE_UNIT)
    q_ptr = head_base(q_ptr, stride_qb, stride_qh, batch, head, STRIDE_UNIT)
    dq_ptr = head_base(dq_ptr, stride_dqb, stride_dqh, batch, head, STRIDE_UNIT)
    lse_ptr += tl.program_id(0).to(tl.int64) * len_q

    # What does not change would fill registers that the sums need: it is computed again instead.
    for first_row in tl.range(0, len_q, BLOCK_M, disable_licm=True):
        # [BLOCK_M, BLOCK_D]
        grad = load_queries(grad_ptr, stride_gn, first_row, len_q, BLOCK_M, HEAD_DIM, BLOCK_D)
        out = load_queries(out_ptr, stride_on, first_row, len_q, BLOCK_M, HEAD_DIM, BLOCK_D)
        q = load_queries(q_ptr, stride_qn, first_row, len_q, BLOCK_M, HEAD_DIM, BLOCK_D)
        # [BLOCK_M]
        rows = first_row + tl.arange(0, BLOCK_M)
        delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
        # A row outside has no probabilities: exp2(logits - inf) = 0.
        lse = tl.load(lse_ptr + rows, mask=rows < len_q, other=float("inf"))
        dq, dk, dv = _add_block(q, grad, lse, delta, keys, values, dk, dv, len_kv, scale, PRECISION)
        store_rows(dq_ptr, stride_dqn, first_row, len_q, dq * scale, BLOCK_M, HEAD_DIM, BLOCK_D)
    _store_parts(dk_ptr, stride_dkn, len_kv, dk, scale, HEAD_DIM, BLOCK_D)
    _store_parts(dv_ptr, stride_dvn, len_kv, dv, 1.0, HEAD_DIM, BLOCK_D)


@triton.jit
def _add_block(q, grad, lse, delta, keys, values, dk, dv, len_kv, scale, PRECISION: tl.constexpr):
    """Compute dQ of a block of queries, and add to dK and dV; dQ and dK up to the scale.

    Everything is transposed, keys by queries: the probabilities and their gradient are then left operands
    of dV and dK, which matrix units read from registers.
    """
    # [BLOCK_D, BLOCK_M], transposed as well: a block of queries has fewer rows than the matrix unit
    dq = tl.zeros([q.shape[1], q.shape[0]], tl.float32)
    new_dk = ()
    new_dv = ()
    start = 0
    for i in tl.static_range(len(keys)):
        # [rows of the part, BLOCK_M]
        logits = dot_rows(keys[i], q, PRECISION) * (scale * LOG2_E)
        probs = tl.exp2(logits - lse[None, :])
        if i == len(keys) - 1:
            # After exp2, not before: a masked key may overflow it, and inf * 0 would be NaN.
            probs = tl.where((start + tl.arange(0, keys[i].shape[0]))[:, None] < len_kv, probs, 0.0)
        # [rows of the part, BLOCK_D]
        part_dv = tl.dot(probs.to(grad.dtype), grad, dv[i], input_precision=PRECISION)
        dprobs = dot_rows(values[i], grad, PRECISION)
        dlogits = (probs * (dprobs - delta[None, :])).to(q.dtype)
        part_dk = tl.dot(dlogits, q, dk[i], input_precision=PRECISION)
        dq = tl.dot(tl.trans(keys[i]), dlogits, dq, input_precision=PRECISION)
        new_dk = append(new_dk, part_dk)
        new_dv = append(new_dv, part_dv)
        start += keys[i].shape[0]
    return tl.trans(dq), new_dk, new_dv


@triton.jit
def _zero_parts(PARTS: tl.constexpr, BLOCK_D: tl.constexpr):
    tiles = ()
    for i in tl.static_range(len(PARTS)):
        tiles = append(tiles, zeros(PARTS[i], BLOCK_D))
    return tiles


@triton.jit
def _store_parts(ptr, stride, length, tiles, factor, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write `factor` times what `load_parts` would read from there."""
    start = 0
    for i in tl.static_range(len(tiles)):
        store_rows(ptr, stride, start, length, tiles[i] * factor, tiles[i].shape[0], HEAD_DIM, BLOCK_D)
        start += tiles[i].shape[0]


def launch_joint_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    use_source: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Launch the backward of the samples that attend to their own pair, into given tensors.

    The table must have a row for it, see `has_joint_backward`.

    Args:
        grad: Gradient of the output, `[B, H, Nq, D]`. The last stride of this and of every other is one.
        q: Queries `[B, H, Nq, D]`.
        k: Keys `[B, H, N, D]`.
        v: Values `[B, H, N, D]`.
        use_source: Coins `[B]`, or None. Where one is true, dK and dV become zero and dQ is not written.
        out: The output of the forward.
        lse: Its log-sum-exp to base 2, float32 `[B, H, Nq]`.
        scale: Factor on the scores.
        dq: Where dQ is written, `[B, H, Nq, D]`.
        dk: Where dK is written, `[B, H, N, D]`.
        dv: Where dV is written, `[B, H, N, D]`.
    """
    rows = choose_tiles("dqkv", q, k.shape[2])
    assert rows
    coins = q if use_source is None else use_source
    strided = (grad, q, k, v, out, dq, dk, dv)
    asked = (use_source is not None, stride_unit(*strided), dot_precision(q))

    def launch(tiles: Tiles) -> None:
        kind = _kind_of_launch(
            q.device, tiles, layouts(*strided), (lse.dtype, coins.dtype), (q.shape, k.shape[2]), scale, asked
        )
        kind(_attn_bwd_joint_kernel, strided, (lse, coins))

    launch_largest(_attn_bwd_joint_kernel, q, rows, launch)


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
    """Everything about a launch that the content and the address of tensors do not change."""
    (batch, heads, len_q, head_dim), len_kv = sizes
    has_selector, unit, precision = asked
    return Launch(
        batch * heads,
        strides_of(strided),
        2,
        (len_q, len_kv, heads, scale),
        {
            "HEAD_DIM": head_dim,
            "BLOCK_M": tiles.block_m,
            "BLOCK_D": triton.next_power_of_2(head_dim),
            "PARTS": TilePlan(len_kv, smallest_part=tiles.smallest_part).parts,
            "HAS_SELECTOR": has_selector,
            "STRIDE_UNIT": unit,
            "PRECISION": precision,
            "num_warps": tiles.num_warps,
            "num_stages": tiles.num_stages,
        },
    )


def has_joint_backward(q: Tensor, len_kv: int) -> bool:
    """Whether the table has a row for `launch_joint_backward`."""
    return len(choose_tiles("dqkv", q, len_kv)) > 0
