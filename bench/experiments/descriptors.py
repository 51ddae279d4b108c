"""Question: are keys and values faster by the tensor memory accelerator (TMA) than by asynchronous copies?

A descriptor of a head's keys turns each load into one instruction of one thread, without pointers in
registers, and fills rows outside with zeros. What it costs is the descriptor: two per program, and two more
for a tail, written to global memory. `specialized.py` asks more of the same kernel.

On a GPU: `python -m bench.experiments --only TMA`, against the streamed kernel in the same run.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.experiments.request import Request
from stochca_kernels.launch import empty_token_major
from stochca_kernels.primitives import LOG2_E, dot_rows, head_base, load_rows, store_rows
from stochca_kernels.softmax import _add_values, _empty_state
from stochca_kernels.tiles import Tiles, tail_size


@triton.jit
def _attend_tile(
    state, q, keys, values, start, len_kv, scale,
    ROWS: tl.constexpr, IS_TAIL: tl.constexpr,
):  # fmt: skip
    # [ROWS, HEAD_DIM]
    k = keys.load([start, 0])
    # [M, ROWS]
    logits = dot_rows(q, k, "ieee") * (scale * LOG2_E)
    if IS_TAIL:
        logits = tl.where((start + tl.arange(0, ROWS))[None, :] < len_kv, logits, float("-inf"))
    v = values.load([start, 0])
    return _add_values(state, logits, v, "ieee")


@triton.jit(do_not_specialize=["len_q", "len_kv", "num_heads"])
def _tma_fwd_kernel(
    q_ptr, stride_qb, stride_qh, stride_qn,
    k_ptr, stride_kb, stride_kh, stride_kn,
    v_ptr, stride_vb, stride_vh, stride_vn,
    out_ptr, stride_ob, stride_oh, stride_on,
    len_q, len_kv, num_heads,
    scale,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_N: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """Grid: (batch * num_heads * cdiv(len_q, BLOCK_M),). HEAD_DIM is a power of two."""
    num_blocks = tl.cdiv(len_q, BLOCK_M)
    first_row = tl.program_id(0) % num_blocks * BLOCK_M
    batch = (tl.program_id(0) // num_blocks // num_heads).to(tl.int64)
    head = (tl.program_id(0) // num_blocks % num_heads).to(tl.int64)
    k_ptr = head_base(k_ptr, stride_kb, stride_kh, batch, head)
    v_ptr = head_base(v_ptr, stride_vb, stride_vh, batch, head)
    keys = tl.make_tensor_descriptor(k_ptr, [len_kv, HEAD_DIM], [stride_kn, 1], [BLOCK_N, HEAD_DIM])
    values = tl.make_tensor_descriptor(v_ptr, [len_kv, HEAD_DIM], [stride_vn, 1], [BLOCK_N, HEAD_DIM])
    # [BLOCK_M, HEAD_DIM]
    q_ptr = head_base(q_ptr, stride_qb, stride_qh, batch, head)
    q = load_rows(q_ptr, stride_qn, first_row, len_q, BLOCK_M, HEAD_DIM, HEAD_DIM, True)

    state = _empty_state(BLOCK_M, HEAD_DIM)
    len_main = len_kv // BLOCK_N * BLOCK_N
    for start in tl.range(0, len_main, BLOCK_N, warp_specialize=WARP_SPECIALIZE):
        state = _attend_tile(state, q, keys, values, start, len_kv, scale, BLOCK_N, False)
    if TAIL_N > 0:
        keys = tl.make_tensor_descriptor(k_ptr, [len_kv, HEAD_DIM], [stride_kn, 1], [TAIL_N, HEAD_DIM])
        values = tl.make_tensor_descriptor(v_ptr, [len_kv, HEAD_DIM], [stride_vn, 1], [TAIL_N, HEAD_DIM])
        state = _attend_tile(state, q, keys, values, len_main, len_kv, scale, TAIL_N, True)
    acc, _, row_sum = state
    out_ptr = head_base(out_ptr, stride_ob, stride_oh, batch, head)
    store_rows(out_ptr, stride_on, first_row, len_q, acc / row_sum[:, None], BLOCK_M, HEAD_DIM, HEAD_DIM)


def request(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, warp_specialize: bool = False) -> Request:
    """A launch over `[B, H, N, D]`."""
    batch, heads, len_q, head_dim = q.shape
    out = empty_token_major(q, (batch, heads, len_q, head_dim))
    arguments: tuple[Any, ...] = (
        q, *q.stride()[:3], k, *k.stride()[:3], v, *v.stride()[:3], out, *out.stride()[:3],
        len_q, k.shape[2], heads, head_dim**-0.5,
    )  # fmt: skip
    constants = {
        "HEAD_DIM": head_dim, "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n,
        "TAIL_N": tail_size(tiles.block_n, k.shape[2]), "WARP_SPECIALIZE": warp_specialize,
        "num_warps": tiles.num_warps, "num_stages": tiles.num_stages,
    }  # fmt: skip
    programs = batch * heads * triton.cdiv(len_q, tiles.block_m)
    return Request(_tma_fwd_kernel, programs, arguments, constants, out)


def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for the descriptors that programs write."""
    return torch.empty(size, dtype=torch.int8, device="cuda")
