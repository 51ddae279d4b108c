"""A source's keys and values, computed inside the attention kernel and never written to memory.

One program per head projects the source's tokens once and serves all queries that read them, the target's
and the source's own. Up to a few hundred tokens the result stays on chip; beyond, each resident program keeps
it in a slot of scratch memory of its own, which does not grow with the batch. The key bias shifts whole rows
of scores and cancels; the value bias is added once, to the output.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from stochca_kernels.launch import launch_largest, stride_unit, with_unit_stride
from stochca_kernels.primitives import append, head_base, load_rows, store_rows, where_each, zeros
from stochca_kernels.projection import Projection
from stochca_kernels.softmax import attend_resident, attend_streamed, dq_resident, dq_streamed
from stochca_kernels.tiles import TilePlan, Tiles, choose_tiles, dot_precision, resident_programs, tail_size


@triton.jit
def _load_tile(
    ptr, stride,
    first_row, length, first_column, channels,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, MASK_C: tl.constexpr,
):  # fmt: skip
    """A tile `[ROWS, BLOCK_C]` of `[length, channels]`, zero outside."""
    rows = first_row + tl.arange(0, ROWS)
    columns = first_column + tl.arange(0, BLOCK_C)
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    mask = rows[:, None] < length
    if MASK_C:
        mask = mask & (columns[None, :] < channels)
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def _project(
    sample,
    weights, stride_w,
    start, length, channels,
    PARTS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
    MASK_C: tl.constexpr, HAS_RSTD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Project the rows from `start` of a sample by each of the weights `[HEAD_DIM, channels]`, without bias.

    Returns float32 tiles `[PARTS[i], BLOCK_D]`, for each part those of all weights.
    """
    x_ptr, stride_xn, rstd_ptr = sample
    accs = ()
    for i in tl.static_range(len(PARTS) * len(weights)):
        accs = append(accs, zeros(BLOCK_D, PARTS[i // len(weights)]))
    for column in tl.range(0, channels, BLOCK_C, disable_licm=True):
        factors = ()
        for w in tl.static_range(len(weights)):
            # [BLOCK_D, BLOCK_C]
            weight = _load_tile(weights[w], stride_w, 0, HEAD_DIM, column, channels, BLOCK_D, BLOCK_C, MASK_C)
            factors = append(factors, weight)
        sums = ()
        first_row = start
        for i in tl.static_range(len(PARTS)):
            # [PARTS[i], BLOCK_C]
            x = _load_tile(x_ptr, stride_xn, first_row, length, column, channels, PARTS[i], BLOCK_C, MASK_C)
            for w in tl.static_range(len(weights)):
                # Tokens on the second axis, so that their number need not be a multiple of 64.
                acc = tl.dot(factors[w], tl.trans(x), accs[i * len(weights) + w], input_precision=PRECISION)
                sums = append(sums, acc)
            first_row += PARTS[i]
        accs = sums
    tiles = ()
    first_row = start
    for i in tl.static_range(len(PARTS)):
        for w in tl.static_range(len(weights)):
            acc = accs[i * len(weights) + w]
            if HAS_RSTD:
                rows = first_row + tl.arange(0, acc.shape[1])
                acc *= tl.load(rstd_ptr + rows, mask=rows < length, other=0.0)[None, :]
            tiles = append(tiles, tl.trans(acc))
        first_row += PARTS[i]
    return tiles


@triton.jit
def _keys_and_values(
    scratch_ptr,
    sample,
    weights, stride_w,
    length, channels,
    PARTS: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr, MASK_C: tl.constexpr, HAS_RSTD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All keys and values of a head: tiles on chip, or where they lie in this program's slot, row by row."""
    if len(PARTS) > 0:
        tiles = _project(
            sample, weights, stride_w, 0, length, channels,
            PARTS, HEAD_DIM, BLOCK_D, BLOCK_C, MASK_C, HAS_RSTD, PRECISION,
        )  # fmt: skip
        keys, values = (), ()
        for i in tl.static_range(len(PARTS)):
            keys = append(keys, tiles[2 * i].to(scratch_ptr.dtype.element_ty))
            values = append(values, tiles[2 * i + 1].to(scratch_ptr.dtype.element_ty))
        return keys, values
    else:
        values_ptr = scratch_ptr + length * HEAD_DIM
        # All threads are done with the last head's, then all see this one's.
        tl.debug_barrier()
        for start in range(0, length, BLOCK_N):
            k, v = _project(
                sample, weights, stride_w, start, length, channels,
                (BLOCK_N,), HEAD_DIM, BLOCK_D, BLOCK_C, MASK_C, HAS_RSTD, PRECISION,
            )  # fmt: skip
            store_rows(scratch_ptr, HEAD_DIM, start, length, k, BLOCK_N, HEAD_DIM, BLOCK_D)
            store_rows(values_ptr, HEAD_DIM, start, length, v, BLOCK_N, HEAD_DIM, BLOCK_D)
        tl.debug_barrier()
        return scratch_ptr, values_ptr


@triton.jit
def _attend(
    q, keys, values, length, scale,
    PARTS: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_N: tl.constexpr, WHOLE_ROW: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries over what `_keys_and_values` returned."""
    if len(PARTS) > 0:
        return attend_resident(q, keys, values, length, scale, WHOLE_ROW, PRECISION)
    else:
        return attend_streamed(
            q, keys, HEAD_DIM, values, HEAD_DIM, length, scale, BLOCK_N, TAIL_N, HEAD_DIM, BLOCK_D, PRECISION
        )


@triton.jit
def _load_bias(ptr, start, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr):
    """The part of a bias that one head adds, `[BLOCK_D]`; zeros where there is none."""
    columns = tl.arange(0, BLOCK_D)
    if HAS_BIAS:
        return tl.load(ptr + start + columns, mask=columns < HEAD_DIM, other=0.0).to(tl.float32)
    else:
        return tl.zeros([BLOCK_D], tl.float32)


@triton.jit(
    do_not_specialize=["len_q", "len_source_q", "len_source", "channels", "num_heads", "num_items"],
    do_not_specialize_on_alignment=["use_source_ptr"],
)
def _projected_fwd_kernel(
    q_ptr, stride_qb, stride_qh, stride_qn,
    source_q_ptr, stride_sqb, stride_sqh, stride_sqn,
    x_ptr, stride_xb, stride_xn,
    rstd_ptr, stride_rb,
    weight_ptr, stride_w,
    bias_ptr,
    q_weight_ptr, stride_qw,
    q_bias_ptr,
    out_ptr, stride_ob, stride_oh, stride_on,
    source_out_ptr, stride_sob, stride_soh, stride_son,
    lse_ptr,
    use_source_ptr,
    scratch_ptr,
    len_q, len_source_q, len_source, channels, num_heads, num_items,
    scale,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr, MASK_C: tl.constexpr,
    PARTS: tl.constexpr, TAIL_N: tl.constexpr, WHOLE_ROW: tl.constexpr,
    HAS_SELECTOR: tl.constexpr, SOURCE_Q: tl.constexpr,
    HAS_RSTD: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_Q_BIAS: tl.constexpr, HAS_LSE: tl.constexpr,
    STRIDE_UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (batch * num_heads,), or fewer programs with a slot of scratch memory each, which take turns."""
    scratch_ptr += tl.program_id(0).to(tl.int64) * 2 * len_source * HEAD_DIM
    turns = 1
    if len(PARTS) == 0:
        turns = tl.cdiv(num_items - tl.program_id(0), tl.num_programs(0))
    for turn in tl.range(0, turns, disable_licm=True):
        item = tl.program_id(0) + turn * tl.num_programs(0)
        batch = (item // num_heads).to(tl.int64)
        head = (item % num_heads).to(tl.int64)
        # One coin for all target rows of a head. Rows that do not read the source belong to another launch.
        num_blocks = tl.cdiv(len_q, BLOCK_M)
        if HAS_SELECTOR:
            num_blocks = tl.where(tl.load(use_source_ptr + batch), num_blocks, 0)
        last_block = num_blocks
        if SOURCE_Q != "none":
            last_block += tl.cdiv(len_source_q, BLOCK_M)
        if last_block > 0:
            sample = (x_ptr + batch * stride_xb, stride_xn, rstd_ptr + batch * stride_rb)
            first_k_row = head * HEAD_DIM
            first_v_row = (num_heads + head) * HEAD_DIM
            weights = (weight_ptr + first_k_row * stride_w, weight_ptr + first_v_row * stride_w)
            keys, values = _keys_and_values(
                scratch_ptr, sample, weights, stride_w, len_source, channels,
                PARTS, BLOCK_N, HEAD_DIM, BLOCK_D, BLOCK_C, MASK_C, HAS_RSTD, PRECISION,
            )  # fmt: skip
            q_rows = head_base(q_ptr, stride_qb, stride_qh, batch, head, STRIDE_UNIT)
            out_rows = head_base(out_ptr, stride_ob, stride_oh, batch, head, STRIDE_UNIT)
            source_q_rows = head_base(source_q_ptr, stride_sqb, stride_sqh, batch, head, STRIDE_UNIT)
            source_out_rows = head_base(source_out_ptr, stride_sob, stride_soh, batch, head, STRIDE_UNIT)
            # One loop for both models' queries, so that keys and values are kept in one place.
            for block in tl.range(0, last_block, num_stages=1, disable_licm=True):
                rows_ptr, stride_rows, rows_out_ptr, stride_out, first_row, len_rows = where_each(
                    block >= num_blocks,
                    (
                        source_q_rows,
                        stride_sqn,
                        source_out_rows,
                        stride_son,
                        (block - num_blocks) * BLOCK_M,
                        len_source_q,
                    ),
                    (q_rows, stride_qn, out_rows, stride_on, block * BLOCK_M, len_q),
                )
                # [BLOCK_M, BLOCK_D]
                if SOURCE_Q == "projected":
                    if block >= num_blocks:
                        q = _project(
                            sample, (q_weight_ptr + first_k_row * stride_qw,), stride_qw, first_row, len_rows,
                            channels, (BLOCK_M,), HEAD_DIM, BLOCK_D, BLOCK_C, MASK_C, HAS_RSTD, PRECISION,
                        )[0]  # fmt: skip
                        q_bias = _load_bias(q_bias_ptr, first_k_row, HEAD_DIM, BLOCK_D, HAS_Q_BIAS)
                        q = (q + q_bias[None, :]).to(q_ptr.dtype.element_ty)
                    else:
                        q = load_rows(
                            rows_ptr, stride_rows, first_row, len_rows, BLOCK_M, HEAD_DIM, BLOCK_D, True
                        )
                else:
                    q = load_rows(
                        rows_ptr, stride_rows, first_row, len_rows, BLOCK_M, HEAD_DIM, BLOCK_D, True
                    )
                acc, row_max, row_sum = _attend(
                    q, keys, values, len_source, scale,
                    PARTS, BLOCK_N, TAIL_N, WHOLE_ROW, HEAD_DIM, BLOCK_D, PRECISION,
                )  # fmt: skip
                bias = _load_bias(bias_ptr, first_v_row, HEAD_DIM, BLOCK_D, HAS_BIAS)
                out = acc / row_sum[:, None] + bias[None, :]
                store_rows(rows_out_ptr, stride_out, first_row, len_rows, out, BLOCK_M, HEAD_DIM, BLOCK_D)
                if HAS_LSE:
                    # The source's rows lie behind the target's, where nothing is stored.
                    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
                    lse = row_max + tl.log2(row_sum)
                    mask = (rows < len_q) & (block < num_blocks)
                    tl.store(lse_ptr + item.to(tl.int64) * len_q + rows, lse, mask=mask)


@triton.jit(
    do_not_specialize=["len_q", "len_source", "channels", "num_heads", "num_items"],
    do_not_specialize_on_alignment=["use_source_ptr"],
)
def _projected_dq_kernel(
    grad_ptr, stride_gb, stride_gh, stride_gn,
    q_ptr, stride_qb, stride_qh, stride_qn,
    x_ptr, stride_xb, stride_xn,
    rstd_ptr, stride_rb,
    weight_ptr, stride_w,
    bias_ptr,
    out_ptr, stride_ob, stride_oh, stride_on,
    dq_ptr, stride_dqb, stride_dqh, stride_dqn,
    lse_ptr,
    use_source_ptr,
    scratch_ptr,
    len_q, len_source, channels, num_heads, num_items,
    scale,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr, MASK_C: tl.constexpr,
    PARTS: tl.constexpr, TAIL_N: tl.constexpr,
    HAS_SELECTOR: tl.constexpr, HAS_RSTD: tl.constexpr, HAS_BIAS: tl.constexpr,
    STRIDE_UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (batch * num_heads,), or fewer programs with a slot of scratch memory each, which take turns."""
    scratch_ptr += tl.program_id(0).to(tl.int64) * 2 * len_source * HEAD_DIM
    turns = 1
    if len(PARTS) == 0:
        turns = tl.cdiv(num_items - tl.program_id(0), tl.num_programs(0))
    for turn in tl.range(0, turns, disable_licm=True):
        item = tl.program_id(0) + turn * tl.num_programs(0)
        batch = (item // num_heads).to(tl.int64)
        head = (item % num_heads).to(tl.int64)
        # Rows that do not read the source belong to another launch.
        reads_source = True
        if HAS_SELECTOR:
            reads_source = tl.load(use_source_ptr + batch)
        if reads_source:
            sample = (x_ptr + batch * stride_xb, stride_xn, rstd_ptr + batch * stride_rb)
            first_k_row = head * HEAD_DIM
            first_v_row = (num_heads + head) * HEAD_DIM
            weights = (weight_ptr + first_k_row * stride_w, weight_ptr + first_v_row * stride_w)
            keys, values = _keys_and_values(
                scratch_ptr, sample, weights, stride_w, len_source, channels,
                PARTS, BLOCK_N, HEAD_DIM, BLOCK_D, BLOCK_C, MASK_C, HAS_RSTD, PRECISION,
            )  # fmt: skip
            grad_rows_ptr = head_base(grad_ptr, stride_gb, stride_gh, batch, head, STRIDE_UNIT)
            out_rows_ptr = head_base(out_ptr, stride_ob, stride_oh, batch, head, STRIDE_UNIT)
            q_rows_ptr = head_base(q_ptr, stride_qb, stride_qh, batch, head, STRIDE_UNIT)
            dq_rows_ptr = head_base(dq_ptr, stride_dqb, stride_dqh, batch, head, STRIDE_UNIT)
            for block in tl.range(0, tl.cdiv(len_q, BLOCK_M), num_stages=1, disable_licm=True):
                first_row = block * BLOCK_M
                # [BLOCK_M, BLOCK_D]
                grad = load_rows(grad_rows_ptr, stride_gn, first_row, len_q, BLOCK_M, HEAD_DIM, BLOCK_D, True)
                out = load_rows(out_rows_ptr, stride_on, first_row, len_q, BLOCK_M, HEAD_DIM, BLOCK_D, True)
                q = load_rows(q_rows_ptr, stride_qn, first_row, len_q, BLOCK_M, HEAD_DIM, BLOCK_D, True)
                # [BLOCK_M]. The values have no bias here, so `out` must have none either.
                bias = _load_bias(bias_ptr, first_v_row, HEAD_DIM, BLOCK_D, HAS_BIAS)
                delta = tl.sum((out.to(tl.float32) - bias[None, :]) * grad.to(tl.float32), 1)
                rows = first_row + tl.arange(0, BLOCK_M)
                # A row outside has no probabilities: exp2(logits - inf) = 0.
                lse_rows_ptr = lse_ptr + item.to(tl.int64) * len_q + rows
                lse = tl.load(lse_rows_ptr, mask=rows < len_q, other=float("inf"))
                if len(PARTS) > 0:
                    dq = dq_resident(q, grad, lse, delta, keys, values, len_source, scale, PRECISION)
                else:
                    dq = dq_streamed(
                        q, grad, lse, delta, keys, HEAD_DIM, values, HEAD_DIM, len_source, scale,
                        BLOCK_N, TAIL_N, HEAD_DIM, BLOCK_D, PRECISION,
                    )  # fmt: skip
                store_rows(dq_rows_ptr, stride_dqn, first_row, len_q, dq * scale, BLOCK_M, HEAD_DIM, BLOCK_D)


def launch_projected_forward(
    q: Tensor,
    source: Projection,
    use_source: Tensor | None,
    source_q: Tensor | Projection | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
    source_out: Tensor,
) -> None:
    """Launch the forward into given tensors.

    Args:
        q: Queries `[B, H, Nq, D]`; Nq may be 0 where only the source asks.
        source: Tokens `[B, Ns, C]` and the weight of their keys and values.
        use_source: Coins `[B]`, or None where all samples read the source. The others' `out` is not written.
        source_q: The source's own queries `[B, H, Nsq, D]`, a `Projection` of the same tokens, or None.
        scale: Factor on the scores.
        out: `[B, H, Nq, D]`.
        lse: Base-2 log-sum-exp `[B, H, Nq]`; where empty, it is not written.
        source_out: `[B, H, Nsq, D]`, empty without `source_q`.
    """
    batch, heads, len_q, head_dim = q.shape
    x, weight, bias, rstd = source = _contiguous_factor(source)
    kind = "none" if source_q is None else "projected" if isinstance(source_q, Projection) else "given"
    own = source_q if isinstance(source_q, Projection) else Projection(x, weight, bias)
    source_rows = source_q if isinstance(source_q, Tensor) else q
    num_items = batch * heads
    if num_items == 0 or len_q + source_out.shape[2] == 0:
        return

    def launch(tiles: Tiles) -> None:
        programs, scratch = _programs(tiles, source, num_items, head_dim)
        _projected_fwd_kernel[(programs,)](
            q, *q.stride()[:3],
            source_rows, *source_rows.stride()[:3],
            x, *x.stride()[:2],
            x if rstd is None else rstd, 0 if rstd is None else rstd.stride(0),
            weight, weight.stride(0),
            weight if bias is None else bias,
            own.weight, own.weight.stride(0),
            own.weight if own.bias is None else own.bias,
            out, *out.stride()[:3],
            source_out, *source_out.stride()[:3],
            lse,
            q if use_source is None else use_source,
            scratch,
            len_q, source_out.shape[2], x.shape[1], x.shape[2], heads, num_items,
            scale,
            BLOCK_M=tiles.block_m,
            WHOLE_ROW=tiles.whole_row,
            HAS_SELECTOR=use_source is not None, SOURCE_Q=kind,
            HAS_Q_BIAS=own.bias is not None, HAS_LSE=lse.numel() > 0,
            STRIDE_UNIT=stride_unit(q, source_rows, out, source_out),
            **_constants(tiles, source, head_dim),
        )  # fmt: skip

    launch_largest(_projected_fwd_kernel, q, choose_tiles("projected_fwd", q, x.shape[1]), launch)


def launch_projected_dq(
    grad: Tensor,
    q: Tensor,
    source: Projection,
    use_source: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    dq: Tensor,
) -> None:
    """Launch the backward into `dq`, computing keys and values once more.

    Args:
        grad: Gradient of the output, `[B, H, Nq, D]`.
        q: As in `launch_projected_forward`, and so the next two.
        source: As there.
        use_source: As there; the others' `dq` is not written.
        out: What the forward wrote.
        lse: What the forward wrote.
        scale: Factor on the scores.
        dq: `[B, H, Nq, D]`.
    """
    batch, heads, len_q, head_dim = q.shape
    x, weight, bias, rstd = source = _contiguous_factor(source)
    grad = with_unit_stride(grad)
    num_items = batch * heads
    if num_items * len_q == 0:
        return

    def launch(tiles: Tiles) -> None:
        programs, scratch = _programs(tiles, source, num_items, head_dim)
        _projected_dq_kernel[(programs,)](
            grad, *grad.stride()[:3],
            q, *q.stride()[:3],
            x, *x.stride()[:2],
            x if rstd is None else rstd, 0 if rstd is None else rstd.stride(0),
            weight, weight.stride(0),
            weight if bias is None else bias,
            out, *out.stride()[:3],
            dq, *dq.stride()[:3],
            lse,
            q if use_source is None else use_source,
            scratch,
            len_q, x.shape[1], x.shape[2], heads, num_items,
            scale,
            BLOCK_M=tiles.block_m,
            HAS_SELECTOR=use_source is not None,
            STRIDE_UNIT=stride_unit(grad, q, out, dq),
            **_constants(tiles, source, head_dim),
        )  # fmt: skip

    launch_largest(_projected_dq_kernel, q, choose_tiles("projected_dq", q, x.shape[1]), launch)


def _contiguous_factor(source: Projection) -> Projection:
    """The kernels take the factors of neighbouring tokens for neighbours in memory."""
    return source if source.rstd is None else source._replace(rstd=source.rstd.contiguous())


def _programs(tiles: Tiles, source: Projection, num_items: int, head_dim: int) -> tuple[int, Tensor]:
    """How many programs run, and the scratch memory they share: none where keys and values stay on chip."""
    if tiles.block_n == 0:
        return num_items, source.x
    programs = min(num_items, resident_programs(source.x.device))
    return programs, source.x.new_empty(programs, 2, source.x.shape[1], head_dim)


def _constants(tiles: Tiles, source: Projection, head_dim: int) -> dict[str, Any]:
    """What both kernels are compiled for."""
    length, channels = source.x.shape[1:]
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "BLOCK_N": tiles.block_n,
        "BLOCK_C": tiles.block_c,
        "MASK_C": channels % tiles.block_c != 0,
        "PARTS": TilePlan(length, tiles.block_n).parts,
        "TAIL_N": tail_size(tiles.block_n, length),
        "HAS_RSTD": source.rstd is not None,
        "HAS_BIAS": source.bias is not None,
        "PRECISION": dot_precision(source.x),
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }
