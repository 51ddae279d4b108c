"""Attention whose keys and values are both the tokens themselves: few rows of queries, each token read once.

Rows of all heads of a sample, `H * Nq` of them, are taken together, so `x [N, C]` is read once for all heads.
Tokens stay in shared memory as they came, and serve all products from there. Where a tile of tokens with all
their channels does not fit, it is read again for the second product, from the cache.
"""

from itertools import chain
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from stochca_kernels.chunks import (
    chunk,
    dot_chunks,
    dot_streamed,
    load_chunks,
    load_factor,
    row_products,
    store_chunks,
    write_dx,
    zero_chunks,
)
from stochca_kernels.launch import launch_largest, with_unit_stride
from stochca_kernels.primitives import LOG2_E, append, where_each
from stochca_kernels.tiles import (
    MAX_SPLITS,
    Tiles,
    cdiv,
    channel_chunks,
    choose_tiles,
    dot_precision,
    token_splits,
)


@triton.jit(
    do_not_specialize=[
        "stride_rb",
        "stride_srb",
        "len_rows",
        "len_x",
        "len_source",
        "num_blocks",
        "num_splits",
    ],
    do_not_specialize_on_alignment=["use_source_ptr"],
)
def _tokens_fwd_kernel(
    queries_ptr, stride_qb, stride_qr,
    x_ptr, stride_xb, stride_xn,
    source_x_ptr, stride_sxb, stride_sxn,
    rstd_ptr, stride_rb,
    source_rstd_ptr, stride_srb,
    mixed_ptr, stride_mb, stride_mr,
    parts_ptr,
    lse_ptr,
    use_source_ptr,
    len_rows, len_x, len_source, num_blocks, num_splits,
    scale,
    CHUNKS: tl.constexpr, WIDTHS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_SELECTOR: tl.constexpr, HAS_RSTD: tl.constexpr, HAS_SOURCE_RSTD: tl.constexpr,
    STREAMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (batch * num_splits * num_blocks,). A program owns a run of a sample's tokens, and ROWS rows.

    It writes `mixed`, or float32 parts where there are several runs. That depends on the batch, which must
    not compile another program, so it is decided here and not by the launcher.
    """
    # The blocks of rows of one run of tokens are neighbours: they read the same tokens from the cache.
    first_row = tl.program_id(0) % num_blocks * ROWS
    split = tl.program_id(0) // num_blocks % num_splits
    batch = (tl.program_id(0) // num_blocks // num_splits).to(tl.int64)

    x_ptr += batch * stride_xb
    rstd_ptr += batch * stride_rb
    is_scaled = HAS_RSTD
    if HAS_SELECTOR:
        # One coin per program: it moves the pointers, and the other side's tokens are never read.
        x_ptr, stride_xn, len_x, rstd_ptr, is_scaled = where_each(
            tl.load(use_source_ptr + batch),
            (
                source_x_ptr + batch * stride_sxb,
                stride_sxn,
                len_source,
                source_rstd_ptr + batch * stride_srb,
                HAS_SOURCE_RSTD,
            ),
            (x_ptr, stride_xn, len_x, rstd_ptr, HAS_RSTD),
        )
    first = split * tl.cdiv(len_x, num_splits)
    last = tl.minimum(first + tl.cdiv(len_x, num_splits), len_x)

    # Tiles [ROWS, CHUNKS]
    queries_ptr += batch * stride_qb
    if not STREAMS:
        queries = load_chunks(queries_ptr, stride_qr, first_row, len_rows, ROWS, CHUNKS, WIDTHS)
    acc = zero_chunks(ROWS, CHUNKS)
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    for start in tl.range(first, last, BLOCK_N, disable_licm=STREAMS):
        # [ROWS, BLOCK_N]
        if STREAMS:
            x = ()
            logits, _ = dot_streamed(
                queries_ptr, stride_qr, first_row, len_rows, queries_ptr, stride_qr,
                x_ptr, stride_xn, start, last, ROWS, BLOCK_N, CHUNKS, WIDTHS, False, PRECISION,
            )  # fmt: skip
        else:
            # Tiles [BLOCK_N, CHUNKS]
            x = load_chunks(x_ptr, stride_xn, start, last, BLOCK_N, CHUNKS, WIDTHS)
            logits = dot_chunks(queries, x, PRECISION)
        tokens = start + tl.arange(0, BLOCK_N)
        logits *= scale * LOG2_E
        if HAS_RSTD or HAS_SOURCE_RSTD:
            factor = load_factor(rstd_ptr, tokens, last, is_scaled)
            logits *= factor[None, :]
        logits = tl.where(tokens[None, :] < last, logits, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(logits, 1))
        rescale = tl.exp2(row_max - new_max)
        probs = tl.exp2(logits - new_max[:, None])
        row_sum = row_sum * rescale + tl.sum(probs, 1)
        row_max = new_max
        if HAS_RSTD or HAS_SOURCE_RSTD:
            probs *= factor[None, :]
        probs = probs.to(x_ptr.dtype.element_ty)
        column = 0
        new_acc = ()
        for i in tl.static_range(len(CHUNKS)):
            # [BLOCK_N, CHUNK]
            tile = chunk(x, i, x_ptr + column, stride_xn, start, last, BLOCK_N, CHUNKS, WIDTHS, STREAMS)
            tile = tl.dot(probs, tile, acc[i] * rescale[:, None], input_precision=PRECISION)
            new_acc = append(new_acc, tile)
            column += CHUNKS[i]
        acc = new_acc

    # A run without tokens has a sum of 0 and weighs nothing: log2(0) = -inf.
    inverse = 1 / tl.where(row_sum > 0, row_sum, 1.0)
    # Parts lie as the result does, those of all samples one after the other.
    part = split * (tl.num_programs(0) // num_blocks // num_splits) + batch
    if num_splits == 1:
        mixed_ptr += batch * stride_mb
        store_chunks(mixed_ptr, stride_mr, first_row, len_rows, acc, inverse, ROWS, CHUNKS, WIDTHS)
    else:
        parts_ptr += part * stride_mb
        store_chunks(parts_ptr, stride_mr, first_row, len_rows, acc, inverse, ROWS, CHUNKS, WIDTHS)
    rows = first_row + tl.arange(0, ROWS)
    lse_ptr += part * len_rows
    tl.store(lse_ptr + rows, row_max + tl.log2(row_sum), mask=rows < len_rows)


@triton.jit(
    do_not_specialize=[
        "stride_rb",
        "stride_srb",
        "first_row",
        "len_rows",
        "len_x",
        "len_source",
        "num_splits",
    ],
    do_not_specialize_on_alignment=["use_source_ptr"],
)
def _tokens_bwd_kernel(
    grad_ptr, stride_gb, stride_gr,
    queries_ptr, stride_qb, stride_qr,
    x_ptr, stride_xb, stride_xn,
    source_x_ptr, stride_sxb, stride_sxn,
    rstd_ptr, stride_rb,
    source_rstd_ptr, stride_srb,
    mixed_ptr, stride_mb, stride_mr,
    dqueries_ptr, stride_dqb, stride_dqr,
    parts_ptr,
    dx_ptr, stride_dxb, stride_dxn,
    lse_ptr,
    use_source_ptr,
    first_row, len_rows, len_x, len_source, num_splits,
    scale,
    CHUNKS: tl.constexpr, WIDTHS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_SELECTOR: tl.constexpr, HAS_RSTD: tl.constexpr, HAS_SOURCE_RSTD: tl.constexpr,
    HAS_DX: tl.constexpr, ADDS_DX: tl.constexpr,
    STREAMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (batch * num_splits,). A program owns a run of a sample's tokens, and writes their `dx` once.

    One launch serves the rows `first_row` to `first_row + ROWS`; with ADDS_DX it adds to what `dx` holds.
    """
    split = tl.program_id(0) % num_splits
    batch = (tl.program_id(0) // num_splits).to(tl.int64)

    x_ptr += batch * stride_xb
    rstd_ptr += batch * stride_rb
    is_scaled = HAS_RSTD
    len_dx = len_x
    if HAS_SELECTOR:
        reads_source = tl.load(use_source_ptr + batch)
        if HAS_DX:
            # The source is a constant: its samples give zeros to all their own tokens, and nothing below.
            len_dx = tl.where(reads_source, 0, len_x)
            if not ADDS_DX:
                first = split * tl.cdiv(len_x, num_splits)
                last = tl.where(reads_source, tl.minimum(first + tl.cdiv(len_x, num_splits), len_x), first)
                for start in tl.range(first, last, BLOCK_N):
                    zeros = zero_chunks(BLOCK_N, CHUNKS)
                    ones = tl.full([BLOCK_N], 1.0, tl.float32)
                    store_chunks(
                        dx_ptr + batch * stride_dxb, stride_dxn, start, last, zeros, ones,
                        BLOCK_N, CHUNKS, WIDTHS,
                    )  # fmt: skip
        # One coin per program: it moves the pointers, and the other side's tokens are never read.
        x_ptr, stride_xn, len_x, rstd_ptr, is_scaled = where_each(
            reads_source,
            (
                source_x_ptr + batch * stride_sxb,
                stride_sxn,
                len_source,
                source_rstd_ptr + batch * stride_srb,
                HAS_SOURCE_RSTD,
            ),
            (x_ptr, stride_xn, len_x, rstd_ptr, HAS_RSTD),
        )
    dx_ptr += batch * stride_dxb
    first = split * tl.cdiv(len_x, num_splits)
    last = tl.minimum(first + tl.cdiv(len_x, num_splits), len_x)

    # [ROWS]
    rows = first_row + tl.arange(0, ROWS)
    # A row outside has no probabilities: exp2(logits - inf) = 0.
    lse = tl.load(lse_ptr + batch * len_rows + rows, mask=rows < len_rows, other=float("inf"))
    queries_ptr += batch * stride_qb
    grad_ptr += batch * stride_gb
    mixed_ptr += batch * stride_mb
    delta = row_products(mixed_ptr, stride_mr, grad_ptr, stride_gr, first_row, len_rows, ROWS, CHUNKS, WIDTHS)
    # Tiles [ROWS, CHUNKS]
    queries, grads = (), ()
    if not STREAMS:
        queries = load_chunks(queries_ptr, stride_qr, first_row, len_rows, ROWS, CHUNKS, WIDTHS)
        grads = load_chunks(grad_ptr, stride_gr, first_row, len_rows, ROWS, CHUNKS, WIDTHS)
    dqueries = zero_chunks(ROWS, CHUNKS)
    for start in tl.range(first, last, BLOCK_N, disable_licm=STREAMS):
        # [ROWS, BLOCK_N]
        if STREAMS:
            x = ()
            logits, dprobs = dot_streamed(
                queries_ptr, stride_qr, first_row, len_rows, grad_ptr, stride_gr,
                x_ptr, stride_xn, start, last, ROWS, BLOCK_N, CHUNKS, WIDTHS, True, PRECISION,
            )  # fmt: skip
        else:
            # Tiles [BLOCK_N, CHUNKS]
            x = load_chunks(x_ptr, stride_xn, start, last, BLOCK_N, CHUNKS, WIDTHS)
            logits = dot_chunks(queries, x, PRECISION)
            dprobs = dot_chunks(grads, x, PRECISION)
        tokens = start + tl.arange(0, BLOCK_N)
        logits *= scale * LOG2_E
        if HAS_RSTD or HAS_SOURCE_RSTD:
            factor = load_factor(rstd_ptr, tokens, last, is_scaled)
            logits *= factor[None, :]
            dprobs *= factor[None, :]
        # After exp2, not before: a masked token may overflow it, and inf * 0 would be NaN.
        probs = tl.where(tokens[None, :] < last, tl.exp2(logits - lse[:, None]), 0.0)
        dlogits = probs * (dprobs - delta[:, None])
        if HAS_RSTD or HAS_SOURCE_RSTD:
            dlogits *= factor[None, :]
        probs, dlogits = probs.to(x_ptr.dtype.element_ty), dlogits.to(x_ptr.dtype.element_ty)
        column = 0
        new_dqueries = ()
        for i in tl.static_range(len(CHUNKS)):
            # [BLOCK_N, CHUNK]
            tile = chunk(x, i, x_ptr + column, stride_xn, start, last, BLOCK_N, CHUNKS, WIDTHS, STREAMS)
            tile = tl.dot(dlogits, tile, dqueries[i], input_precision=PRECISION)
            new_dqueries = append(new_dqueries, tile)
            if HAS_DX:
                write_dx(
                    dx_ptr + column, stride_dxn, start, tl.minimum(last, len_dx),
                    chunk(
                        queries, i, queries_ptr + column, stride_qr, first_row, len_rows,
                        ROWS, CHUNKS, WIDTHS, STREAMS,
                    ),
                    chunk(
                        grads, i, grad_ptr + column, stride_gr, first_row, len_rows,
                        ROWS, CHUNKS, WIDTHS, STREAMS,
                    ),
                    probs, dlogits, scale, BLOCK_N, CHUNKS[i], WIDTHS[i], ADDS_DX, PRECISION,
                )  # fmt: skip
            column += CHUNKS[i]
        dqueries = new_dqueries
    factor = tl.full([ROWS], 1.0, tl.float32) * scale
    if num_splits == 1:
        dqueries_ptr += batch * stride_dqb
        store_chunks(dqueries_ptr, stride_dqr, first_row, len_rows, dqueries, factor, ROWS, CHUNKS, WIDTHS)
    else:
        parts_ptr += (split * (tl.num_programs(0) // num_splits) + batch) * stride_dqb
        store_chunks(parts_ptr, stride_dqr, first_row, len_rows, dqueries, factor, ROWS, CHUNKS, WIDTHS)


@triton.jit(do_not_specialize=["num_rows", "num_splits", "channels"])
def _sum_splits_kernel(
    parts_ptr,
    parts_lse_ptr,
    out_ptr,
    lse_ptr,
    num_rows, num_splits, channels,
    SPLITS: tl.constexpr, BLOCK_C: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """Grid: (num_rows, cdiv(channels, BLOCK_C)). Sum parts `[num_splits, num_rows, channels]` of each row.

    With a log-sum-exp of each part they are averages, and weigh what their sums of exponentials do.
    """
    row = tl.program_id(0).to(tl.int64)
    splits = tl.arange(0, SPLITS)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    part_rows = splits.to(tl.int64) * num_rows + row
    mask = (splits[:, None] < num_splits) & (columns[None, :] < channels)
    # [SPLITS, BLOCK_C]
    parts = tl.load(parts_ptr + part_rows[:, None] * channels + columns[None, :], mask=mask, other=0.0)
    if HAS_LSE:
        # [SPLITS]
        lse = tl.load(parts_lse_ptr + part_rows, mask=splits < num_splits, other=float("-inf"))
        largest = tl.max(lse, 0)
        weights = tl.exp2(lse - largest)
        total = tl.sum(weights, 0)
        parts *= (weights / total)[:, None]
        tl.store(lse_ptr + row, largest + tl.log2(total))
    out = tl.sum(parts, 0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * channels + columns, out, mask=columns < channels)


def tokens_forward(
    queries: Tensor,
    x: Tensor,
    rstd: Tensor | None,
    source_x: Tensor | None,
    source_rstd: Tensor | None,
    use_source: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Launch the forward: `softmax(scale * queries (rstd * x)') (rstd * x)`.

    Args:
        queries: Rows of all heads, in the space of the tokens: `[B, R, C]`.
        x: Tokens `[B, N, C]` of the samples whose coin is false; of all samples without coins.
        rstd: A factor of each token, float32 `[B, N]`, or None for one.
        source_x: The source's tokens `[B, Ns, C]`; None without coins.
        source_rstd: Their factor, float32 `[B, Ns]`, or None for one.
        use_source: Coins `[B]`, or None.
        scale: Factor on the scores.

    Returns:
        The mixed tokens `[B, R, C]`; the log-sum-exp of the scores to base 2, float32 `[B, R]`.
    """
    mixed, lse = empty_forward(queries)
    batch, len_rows, _ = queries.shape
    queries = with_unit_stride(queries)
    pointers, constants = _sides(x, rstd, source_x, source_rstd, use_source)
    len_source = x.shape[1] if source_x is None else source_x.shape[1]
    length = max(x.shape[1], len_source)

    def launch(tiles: Tiles) -> None:
        rows = max(16, min(tiles.block_m, triton.next_power_of_2(len_rows)))
        blocks = cdiv(len_rows, rows)
        if batch * blocks == 0:
            return
        splits = token_splits(batch * blocks, length, x.device)
        parts = _parts(mixed, splits, lse)
        parts_lse = _parts(lse, splits, lse)
        _tokens_fwd_kernel[(batch * splits * blocks,)](
            queries, *queries.stride()[:2],
            *pointers,
            mixed, *mixed.stride()[:2],
            parts,
            parts_lse,
            x if use_source is None else use_source,
            len_rows, x.shape[1], len_source, blocks, splits,
            scale,
            ROWS=rows, BLOCK_N=tiles.block_n,
            **_cut(x.shape[2], tiles),
            **constants,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
        if splits > 1:
            _sum_splits(parts, mixed, parts_lse, lse)

    launch_largest(_tokens_fwd_kernel, x, choose_tiles("tokens_fwd", queries, length), launch)
    return mixed, lse


def tokens_backward(
    grad: Tensor,
    queries: Tensor,
    x: Tensor,
    rstd: Tensor | None,
    source_x: Tensor | None,
    source_rstd: Tensor | None,
    use_source: Tensor | None,
    mixed: Tensor,
    lse: Tensor,
    scale: float,
    needs_dx: bool,
) -> tuple[Tensor, Tensor]:
    """Launch the backward.

    Args:
        grad: Gradient of the mixed tokens, `[B, R, C]`.
        queries: As in `tokens_forward`, like all arguments up to `use_source`.
        x: `[B, N, C]`.
        rstd: `[B, N]`, or None.
        source_x: `[B, Ns, C]`, or None without coins.
        source_rstd: `[B, Ns]`, or None.
        use_source: `[B]`, or None.
        mixed: The output of the forward.
        lse: Its log-sum-exp to base 2, float32 `[B, R]`.
        scale: Factor on the scores.
        needs_dx: Whether `x` needs a gradient, which it may not together with `rstd`.

    Returns:
        The gradient of `queries` `[B, R, C]`; that of `x` `[B, N, C]`, zero in samples whose coin is true, or
        empty.
    """
    assert not (needs_dx and rstd is not None), "tokens with a factor are a constant"
    dqueries, dx = empty_backward(queries, x, needs_dx)
    batch, len_rows, _ = queries.shape
    queries, grad = with_unit_stride(queries), with_unit_stride(grad)
    pointers, constants = _sides(x, rstd, source_x, source_rstd, use_source)
    len_source = x.shape[1] if source_x is None else source_x.shape[1]
    length = max(x.shape[1], len_source)

    def launch(tiles: Tiles) -> None:
        rows = max(16, min(tiles.block_m, triton.next_power_of_2(len_rows)))
        if batch == 0:
            return
        splits = token_splits(batch, length, x.device)
        parts = _parts(dqueries, splits, lse)
        # Several blocks of rows add to dx one after the other.
        sum_dx = dx if len_rows <= rows else torch.empty_like(dx, dtype=torch.float32)
        for first_row in range(0, max(1, len_rows), rows):
            _tokens_bwd_kernel[(batch * splits,)](
                grad, *grad.stride()[:2],
                queries, *queries.stride()[:2],
                *pointers,
                mixed, *mixed.stride()[:2],
                dqueries, *dqueries.stride()[:2],
                parts,
                sum_dx, *sum_dx.stride()[:2],
                lse,
                x if use_source is None else use_source,
                first_row, len_rows, x.shape[1], len_source, splits,
                scale,
                ROWS=rows, BLOCK_N=tiles.block_n,
                HAS_DX=needs_dx, ADDS_DX=first_row > 0,
                **_cut(x.shape[2], tiles),
                **constants,
                num_warps=tiles.num_warps, num_stages=tiles.num_stages,
            )  # fmt: skip
        if splits > 1:
            _sum_splits(parts, dqueries)
        if sum_dx is not dx:
            dx.copy_(sum_dx)

    launch_largest(_tokens_bwd_kernel, x, choose_tiles("tokens_bwd", queries, length), launch)
    return dqueries, dx


def empty_forward(queries: Tensor) -> tuple[Tensor, Tensor]:
    """Allocate what `tokens_forward` returns."""
    return queries.new_empty(queries.shape), queries.new_empty(queries.shape[:2], dtype=torch.float32)


def empty_backward(queries: Tensor, x: Tensor, needs_dx: bool) -> tuple[Tensor, Tensor]:
    """Allocate what `tokens_backward` returns."""
    return queries.new_empty(queries.shape), x.new_empty(x.shape if needs_dx else (0, 0, 0))


def _sides(
    x: Tensor,
    rstd: Tensor | None,
    source_x: Tensor | None,
    source_rstd: Tensor | None,
    use_source: Tensor | None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What both kernels are told of the tokens: pointers with their strides, and constants.

    What is not given is replaced by a tensor that no program reads.
    """
    source = x if source_x is None else source_x
    factors = [t if t is None else t.contiguous() for t in (rstd, source_rstd)]
    unread = next((t for t in factors if t is not None), x)  # both pointers are of one type
    placed = ((unread, 0) if t is None else (t, t.stride(0)) for t in factors)
    pointers = (x, *x.stride()[:2], source, *source.stride()[:2], *chain.from_iterable(placed))
    constants = {
        "HAS_SELECTOR": use_source is not None,
        "HAS_RSTD": rstd is not None,
        "HAS_SOURCE_RSTD": source_rstd is not None,
        "PRECISION": dot_precision(x),
    }
    return pointers, constants


def _cut(channels: int, tiles: Tiles) -> dict[str, Any]:
    """How the channels are cut, and whether a program reads a tile again rather than keep it on chip."""
    streams = tiles.num_stages == 1
    chunks = channel_chunks(channels, 128 if streams else 256)
    return {"CHUNKS": chunks, "WIDTHS": (*chunks[:-1], channels - sum(chunks[:-1])), "STREAMS": streams}


def _parts(out: Tensor, splits: int, unwritten: Tensor) -> Tensor:
    """What splits write, `[splits, *out.shape]` in float32; `unwritten` where one writes `out` itself."""
    return unwritten if splits == 1 else out.new_empty((splits, *out.shape), dtype=torch.float32)


def _sum_splits(
    parts: Tensor, out: Tensor, parts_lse: Tensor | None = None, lse: Tensor | None = None
) -> None:
    """Add up `parts`, always in the same order; averages where their log-sum-exp is given."""
    splits, (batch, len_rows, channels) = parts.shape[0], out.shape
    _sum_splits_kernel[(batch * len_rows, cdiv(channels, 128))](
        parts,
        parts if parts_lse is None else parts_lse,
        out,
        parts if lse is None else lse,
        batch * len_rows, splits, channels,
        SPLITS=MAX_SPLITS, BLOCK_C=128, HAS_LSE=lse is not None,
    )  # fmt: skip
