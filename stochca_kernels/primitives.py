"""What several kernels share: whole rows in and out, where a head lies, and products of rows."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(
    ptr,
    stride,
    start,
    length,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IS_TAIL: tl.constexpr,
):
    """Rows `start` to `start + ROWS` of `[length, HEAD_DIM]`, zero outside. Only a tail has rows outside."""
    rows = start + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    # [ROWS, BLOCK_D]
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    if IS_TAIL and HEAD_DIM < BLOCK_D:
        return tl.load(ptrs, mask=(rows[:, None] < length) & (cols[None, :] < HEAD_DIM), other=0.0)
    elif IS_TAIL:
        return tl.load(ptrs, mask=rows[:, None] < length, other=0.0)
    elif HEAD_DIM < BLOCK_D:
        return tl.load(ptrs, mask=cols[None, :] < HEAD_DIM, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def load_queries(
    ptr, stride, start, length, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """As `load_rows` of a tail, but rows outside repeat the last one.

    For sums over queries: the zero scores of rows of zeros would be NaN where a key is infinite.
    """
    rows = tl.minimum(start + tl.arange(0, ROWS), length - 1)
    cols = tl.arange(0, BLOCK_D)
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    if HEAD_DIM < BLOCK_D:
        return tl.load(ptrs, mask=cols[None, :] < HEAD_DIM, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def store_rows(
    ptr,
    stride,
    start,
    length,
    tile,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write `tile [ROWS, BLOCK_D]` to the rows from `start` that lie inside `[length, HEAD_DIM]`."""
    rows = start + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    mask = (rows[:, None] < length) & (cols[None, :] < HEAD_DIM)
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def head_base(ptr, stride_batch, stride_head, batch, head, STRIDE_UNIT: tl.constexpr = 1):
    """Where one head starts. `batch` and `head` are int64: tensors may exceed 2^31 elements.

    Both strides are multiples of `STRIDE_UNIT`, which the division tells the compiler (`launch.stride_unit`).
    """
    return ptr + (batch * stride_batch + head * stride_head) // STRIDE_UNIT * STRIDE_UNIT


@triton.jit
def dot_rows(a, b, PRECISION: tl.constexpr):
    """`a b'`: the products of all rows of `a [M, D]` with all rows of `b [N, D]`."""
    CHUNKS: tl.constexpr = a.shape[1] // 16
    if PRECISION == "ieee" and a.dtype == tl.float32 and CHUNKS > 1:
        # Without tensor cores a thread holds whole rows of both operands: give it 16 columns of them instead.
        # [CHUNKS, M, 16] and [CHUNKS, 16, N]
        a = tl.permute(tl.reshape(a, [a.shape[0], CHUNKS, 16]), [1, 0, 2])
        b = tl.permute(tl.reshape(b, [b.shape[0], CHUNKS, 16]), [1, 2, 0])
        return tl.sum(tl.dot(a, b, input_precision=PRECISION), 0)
    else:
        return tl.dot(a, tl.trans(b), input_precision=PRECISION)


@triton.jit
def append(tiles, tile):
    """A tuple of tiles with one more at its end."""
    return tiles + (tile,)  # noqa: RUF005, Triton unpacks none


@triton.jit
def zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A float32 tile of zeros; sizes may be elements of a tuple, which `tl.zeros` does not take."""
    return tl.zeros([ROWS, COLUMNS], tl.float32)


@triton.jit
def where_each(condition, chosen, otherwise):
    """`tl.where` of each pair of pointers and numbers: a whole program takes one side."""
    result = ()
    for i in tl.static_range(len(chosen)):
        result = append(result, tl.where(condition, chosen[i], otherwise[i]))
    return result


@triton.jit
def load_parts(ptr, stride, length, PARTS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """All rows of `[length, HEAD_DIM]` as tiles of `PARTS` rows; only the last has rows outside."""
    tiles = ()
    start = 0
    for i in tl.static_range(len(PARTS)):
        tile = load_rows(ptr, stride, start, length, PARTS[i], HEAD_DIM, BLOCK_D, i == len(PARTS) - 1)
        tiles = append(tiles, tile)
        start += PARTS[i]
    return tiles
