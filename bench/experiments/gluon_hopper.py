"""Question: does a warp that only loads, written by hand in Gluon, beat what Triton schedules itself?

One warp of a program copies keys and values with TMA into a ring of buffers; the others multiply. Barriers in
shared memory say which buffer is full and which may be filled again. Triton's own loop has the same copies
and products, but all warps issue the copies, and wait for them together.

On a GPU: `python -m bench.experiments --only Gluon`, against the streamed kernel in the same run.
"""

from typing import Any

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from bench.experiments.request import Request
from stochca_kernels.launch import empty_token_major
from stochca_kernels.tiles import Tiles

LOG2_E = gl.constexpr(1.4426950408889634)
# Registers of a thread of the warp that loads.
LOADER_REGISTERS = gl.constexpr(24)


@gluon.jit
def _load_partition(keys, values, k_buffers, v_buffers, full, empty, len_kv, BLOCK_N: gl.constexpr):
    """Fill the ring: K and V have a barrier each, so that a product waits for no more than it needs."""
    STAGES: gl.constexpr = k_buffers.shape[0]
    for i in range(0, gl.cdiv(len_kv, BLOCK_N)):
        stage = i % STAGES
        mbarrier.wait(empty.index(stage), (i // STAGES & 1) ^ 1)
        mbarrier.expect(full.index(2 * stage), keys.block_type.nbytes)
        tma.async_copy_global_to_shared(keys, [i * BLOCK_N, 0], full.index(2 * stage), k_buffers.index(stage))
        mbarrier.expect(full.index(2 * stage + 1), values.block_type.nbytes)
        tma.async_copy_global_to_shared(
            values, [i * BLOCK_N, 0], full.index(2 * stage + 1), v_buffers.index(stage)
        )


@gluon.jit
def _attend_partition(
    q, k_buffers, v_buffers, full, empty,
    out_ptr, stride_on, first_row, len_q, len_kv,
    scale,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr,
):  # fmt: skip
    """Flash attention of one tile of queries over the ring."""
    STAGES: gl.constexpr = k_buffers.shape[0]
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_N, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, HEAD_DIM, 16])
    probs_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)

    acc = gl.zeros([BLOCK_M, HEAD_DIM], gl.float32, out_layout)
    row_max = gl.full([BLOCK_M], float("-inf"), gl.float32, row_layout)
    row_sum = gl.zeros([BLOCK_M], gl.float32, row_layout)
    for i in range(0, gl.cdiv(len_kv, BLOCK_N)):
        stage = i % STAGES
        phase = i // STAGES & 1
        mbarrier.wait(full.index(2 * stage), phase)
        # [BLOCK_M, BLOCK_N]
        logits = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, scores_layout)
        logits = warpgroup_mma(
            q, k_buffers.index(stage).permute((1, 0)), logits, use_acc=False, is_async=True
        )
        logits = warpgroup_mma_wait(0, deps=(logits,)) * (scale * LOG2_E)
        columns = i * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, scores_layout))
        logits = gl.where((columns < len_kv)[None, :], logits, float("-inf"))
        new_max = gl.maximum(row_max, gl.max(logits, 1))
        rescale = gl.exp2(row_max - new_max)
        probs = gl.exp2(logits - new_max[:, None])
        row_sum = row_sum * rescale + gl.sum(probs, 1)
        row_max = new_max
        acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, out_layout))[:, None]
        probs = gl.convert_layout(probs.to(out_ptr.dtype.element_ty), probs_layout)
        mbarrier.wait(full.index(2 * stage + 1), phase)
        acc = warpgroup_mma(probs, v_buffers.index(stage), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index(stage), count=1)

    out = acc / gl.convert_layout(row_sum, gl.SliceLayout(1, out_layout))[:, None]
    rows = first_row + gl.arange(0, BLOCK_M, gl.SliceLayout(1, out_layout))
    columns = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, out_layout))
    pointers = out_ptr + rows.to(gl.int64)[:, None] * stride_on + columns[None, :]
    gl.store(pointers, out.to(out_ptr.dtype.element_ty), mask=(rows < len_q)[:, None])


@gluon.jit(do_not_specialize=["len_q", "len_kv", "num_heads"])
def _gluon_fwd_kernel(
    q_ptr, stride_qb, stride_qh, stride_qn,
    k_ptr, stride_kb, stride_kh, stride_kn,
    v_ptr, stride_vb, stride_vh, stride_vn,
    out_ptr, stride_ob, stride_oh, stride_on,
    len_q, len_kv, num_heads,
    scale,
    HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Grid: (batch * num_heads * cdiv(len_q, BLOCK_M),)."""
    num_blocks = gl.cdiv(len_q, BLOCK_M)
    first_row = gl.program_id(0) % num_blocks * BLOCK_M
    batch = (gl.program_id(0) // num_blocks // num_heads).to(gl.int64)
    head = (gl.program_id(0) // num_blocks % num_heads).to(gl.int64)
    q_ptr += batch * stride_qb + head * stride_qh
    k_ptr += batch * stride_kb + head * stride_kh
    v_ptr += batch * stride_vb + head * stride_vh
    out_ptr += batch * stride_ob + head * stride_oh

    dtype: gl.constexpr = q_ptr.dtype.element_ty
    # Rows of 128 bytes, the widest swizzle.
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    keys = tma.make_tensor_descriptor(k_ptr, [len_kv, HEAD_DIM], [stride_kn, 1], [BLOCK_N, HEAD_DIM], shared)
    values = tma.make_tensor_descriptor(
        v_ptr, [len_kv, HEAD_DIM], [stride_vn, 1], [BLOCK_N, HEAD_DIM], shared
    )

    # [BLOCK_M, HEAD_DIM], eight numbers of a row to a thread
    rows_layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    rows = first_row + gl.arange(0, BLOCK_M, gl.SliceLayout(1, rows_layout))
    columns = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, rows_layout))
    pointers = q_ptr + rows.to(gl.int64)[:, None] * stride_qn + columns[None, :]
    tile = gl.load(pointers, mask=(rows < len_q)[:, None], other=0.0)
    q = gl.allocate_shared_memory(dtype, [BLOCK_M, HEAD_DIM], shared, tile)
    fence_async_shared()

    k_buffers = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], shared)
    v_buffers = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], shared)
    full = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(2 * i), count=1)
        mbarrier.init(full.index(2 * i + 1), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()

    gl.warp_specialize(
        [
            (
                _attend_partition,
                (
                    q, k_buffers, v_buffers, full, empty, out_ptr, stride_on, first_row, len_q, len_kv, scale,
                    BLOCK_M, BLOCK_N, HEAD_DIM,
                ),
            ),
            (_load_partition, (keys, values, k_buffers, v_buffers, full, empty, len_kv, BLOCK_N)),
        ],
        [1],
        [LOADER_REGISTERS],
    )  # fmt: skip


def request(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles) -> Request:
    """A launch over `[B, H, N, D]`, D a power of two."""
    batch, heads, len_q, head_dim = q.shape
    out = empty_token_major(q, (batch, heads, len_q, head_dim))
    arguments: tuple[Any, ...] = (
        q, *q.stride()[:3], k, *k.stride()[:3], v, *v.stride()[:3], out, *out.stride()[:3],
        len_q, k.shape[2], heads, head_dim**-0.5,
    )  # fmt: skip
    constants = {
        "HEAD_DIM": head_dim, "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n,
        "STAGES": tiles.num_stages, "num_warps": tiles.num_warps,
        # The warp that loads comes with three that do nothing. With four that multiply, two programs fit.
        "maxnreg": 128 if tiles.num_warps == 4 else None,
    }  # fmt: skip
    programs = batch * heads * triton.cdiv(len_q, tiles.block_m)
    return Request(_gluon_fwd_kernel, programs, arguments, constants, out)
