"""Rows of many channels as tiles of a few hundred: loaded, multiplied and stored chunk by chunk."""

import triton
import triton.language as tl

from stochca_kernels.primitives import append, dot_rows, load_rows, store_rows, zeros


@triton.jit
def load_chunks(
    ptr, stride, start, length,
    ROWS: tl.constexpr, CHUNKS: tl.constexpr, WIDTHS: tl.constexpr,
):  # fmt: skip
    """Rows `start` to `start + ROWS` of `[length, C]` as tiles of `CHUNKS` channels, zero outside."""
    tiles = ()
    first = 0
    for i in tl.static_range(len(CHUNKS)):
        tile = load_rows(ptr + first, stride, start, length, ROWS, WIDTHS[i], CHUNKS[i], True)
        tiles = append(tiles, tile)
        first += CHUNKS[i]
    return tiles


@triton.jit
def store_chunks(
    ptr, stride, start, length, tiles, factor,
    ROWS: tl.constexpr, CHUNKS: tl.constexpr, WIDTHS: tl.constexpr,
):  # fmt: skip
    """Write tiles `[ROWS, CHUNKS]`, times one factor `[ROWS]` per row, to rows of `[length, C]`."""
    first = 0
    for i in tl.static_range(len(CHUNKS)):
        tile = tiles[i] * factor[:, None]
        store_rows(ptr + first, stride, start, length, tile, ROWS, WIDTHS[i], CHUNKS[i])
        first += CHUNKS[i]


@triton.jit
def zero_chunks(ROWS: tl.constexpr, CHUNKS: tl.constexpr):
    """Float32 tiles `[ROWS, CHUNKS]` of zeros."""
    tiles = ()
    for i in tl.static_range(len(CHUNKS)):
        tiles = append(tiles, zeros(ROWS, CHUNKS[i]))
    return tiles


@triton.jit
def dot_chunks(rows, x, PRECISION: tl.constexpr):
    """`rows x'`: products over all channels, `[ROWS, BLOCK_N]`."""
    product = zeros(rows[0].shape[0], x[0].shape[0])
    for i in tl.static_range(len(x)):
        product += dot_rows(rows[i], x[i], PRECISION)
    return product


@triton.jit
def dot_streamed(
    rows_ptr, stride_rows, first_row, len_rows,
    more_ptr, stride_more,
    x_ptr, stride_xn, start, last,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr, WIDTHS: tl.constexpr,
    HAS_MORE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `_dot_chunks` of one set of rows or of two, from memory: one chunk of each is on chip at a time."""
    product, more_product = zeros(ROWS, BLOCK_N), zeros(ROWS, BLOCK_N)
    first = 0
    for i in tl.static_range(len(CHUNKS)):
        x = load_again(x_ptr + first, stride_xn, start, last, BLOCK_N, WIDTHS[i], CHUNKS[i])
        rows = load_again(rows_ptr + first, stride_rows, first_row, len_rows, ROWS, WIDTHS[i], CHUNKS[i])
        product += dot_rows(rows, x, PRECISION)
        if HAS_MORE:
            more = load_again(more_ptr + first, stride_more, first_row, len_rows, ROWS, WIDTHS[i], CHUNKS[i])
            more_product += dot_rows(more, x, PRECISION)
        first += CHUNKS[i]
    return product, more_product


@triton.jit
def load_again(
    ptr, stride, start, length,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """As `load_rows`, of what is read once more soon after."""
    rows = start + tl.arange(0, ROWS)
    cols = tl.arange(0, CHUNK)
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    mask = (rows[:, None] < length) & (cols[None, :] < WIDTH)
    return tl.load(ptrs, mask=mask, other=0.0, eviction_policy="evict_last")


@triton.jit
def chunk(
    tiles, i: tl.constexpr,
    ptr, stride, start, length,
    ROWS: tl.constexpr, CHUNKS: tl.constexpr, WIDTHS: tl.constexpr, STREAMS: tl.constexpr,
):  # fmt: skip
    """Tile `i` of those on chip, or from memory."""
    if STREAMS:
        return load_rows(ptr, stride, start, length, ROWS, WIDTHS[i], CHUNKS[i], True)
    else:
        return tiles[i]


@triton.jit
def row_products(
    a_ptr, stride_a,
    b_ptr, stride_b,
    start, length,
    ROWS: tl.constexpr, CHUNKS: tl.constexpr, WIDTHS: tl.constexpr,
):  # fmt: skip
    """The product `[ROWS]` of each row of `a` with the same row of `b`."""
    products = tl.zeros([ROWS], tl.float32)
    first = 0
    for i in tl.static_range(len(CHUNKS)):
        # [ROWS, CHUNK]
        a = load_rows(a_ptr + first, stride_a, start, length, ROWS, WIDTHS[i], CHUNKS[i], True)
        b = load_rows(b_ptr + first, stride_b, start, length, ROWS, WIDTHS[i], CHUNKS[i], True)
        products += tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)
        first += CHUNKS[i]
    return products


@triton.jit
def write_dx(
    dx_ptr, stride_dxn, start, length,
    queries, grad, probs, dlogits,
    scale,
    BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr,
    ADDS_DX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`dx` of the tokens as keys, `scale * dlogits' queries`, and as values, `probs' grad`."""
    # [BLOCK_N, CHUNK]
    dx = tl.dot(tl.trans(dlogits), queries, input_precision=PRECISION) * scale
    dx = tl.dot(tl.trans(probs), grad, dx, input_precision=PRECISION)
    if ADDS_DX:
        dx += load_rows(dx_ptr, stride_dxn, start, length, BLOCK_N, WIDTH, CHUNK, True)
    store_rows(dx_ptr, stride_dxn, start, length, dx, BLOCK_N, WIDTH, CHUNK)


@triton.jit
def load_factor(rstd_ptr, tokens, last, is_scaled):
    """The factor `[BLOCK_N]` of each token, 1 where the side has none."""
    return tl.load(rstd_ptr + tokens, mask=(tokens < last) & is_scaled, other=1.0)
