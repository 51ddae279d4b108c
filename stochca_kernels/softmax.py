"""One tile of queries against all keys, forward and dQ: keys that stream from memory, or that are on chip."""

import triton
import triton.language as tl

from stochca_kernels.primitives import LOG2_E, append, dot_rows, load_rows


@triton.jit
def attend_streamed(
    q,
    k_ptr, stride_kn,
    v_ptr, stride_vn,
    len_kv,
    scale,
    BLOCK_N: tl.constexpr, TAIL_N: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Softmax attention up to its denominator: `acc [M, D]`, and of each row the maximum and the sum."""
    state = _empty_state(q.shape[0], BLOCK_D)
    len_main = len_kv // BLOCK_N * BLOCK_N
    for start in range(0, len_main, BLOCK_N):
        state = _attend_tile(
            state, q, k_ptr, stride_kn, v_ptr, stride_vn, start, len_kv, scale,
            BLOCK_N, HEAD_DIM, BLOCK_D, False, PRECISION,
        )  # fmt: skip
    if TAIL_N > 0:
        state = _attend_tile(
            state, q, k_ptr, stride_kn, v_ptr, stride_vn, len_main, len_kv, scale,
            TAIL_N, HEAD_DIM, BLOCK_D, True, PRECISION,
        )  # fmt: skip
    return state


@triton.jit
def attend_resident(q, keys, values, len_kv, scale, WHOLE_ROW: tl.constexpr, PRECISION: tl.constexpr):
    """As `attend_streamed`, over tiles on chip: whole rows of scores at once, or a running softmax."""
    acc, row_max, row_sum = _empty_state(q.shape[0], values[0].shape[1])
    scores = ()
    start = 0
    for i in tl.static_range(len(keys)):
        # [M, rows of the tile]
        logits = dot_rows(q, keys[i], PRECISION) * (scale * LOG2_E)
        if i == len(keys) - 1:
            columns = start + tl.arange(0, keys[i].shape[0])
            logits = tl.where(columns[None, :] < len_kv, logits, float("-inf"))
        start += keys[i].shape[0]
        if WHOLE_ROW:
            row_max = tl.maximum(row_max, tl.max(logits, 1))
            scores = append(scores, logits)
        else:
            acc, row_max, row_sum = _add_values((acc, row_max, row_sum), logits, values[i], PRECISION)
    if WHOLE_ROW:
        for i in tl.static_range(len(keys)):
            probs = tl.exp2(scores[i] - row_max[:, None])
            row_sum += tl.sum(probs, 1)
            acc = tl.dot(probs.to(values[i].dtype), values[i], acc, input_precision=PRECISION)
    return acc, row_max, row_sum


@triton.jit
def dq_streamed(
    q, grad, lse, delta,
    k_ptr, stride_kn,
    v_ptr, stride_vn,
    len_kv,
    scale,
    BLOCK_N: tl.constexpr, TAIL_N: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`dQ [M, D]` up to the scale. Rows outside have `lse = inf`, and so no probabilities."""
    dq = tl.zeros([q.shape[0], BLOCK_D], tl.float32)
    len_main = len_kv // BLOCK_N * BLOCK_N
    for start in range(0, len_main, BLOCK_N):
        k = load_rows(k_ptr, stride_kn, start, len_kv, BLOCK_N, HEAD_DIM, BLOCK_D, False)
        v = load_rows(v_ptr, stride_vn, start, len_kv, BLOCK_N, HEAD_DIM, BLOCK_D, False)
        dq = _add_to_dq(dq, q, grad, lse, delta, k, v, start, len_kv, scale, False, PRECISION)
    if TAIL_N > 0:
        k = load_rows(k_ptr, stride_kn, len_main, len_kv, TAIL_N, HEAD_DIM, BLOCK_D, True)
        v = load_rows(v_ptr, stride_vn, len_main, len_kv, TAIL_N, HEAD_DIM, BLOCK_D, True)
        dq = _add_to_dq(dq, q, grad, lse, delta, k, v, len_main, len_kv, scale, True, PRECISION)
    return dq


@triton.jit
def dq_resident(q, grad, lse, delta, keys, values, len_kv, scale, PRECISION: tl.constexpr):
    """As `dq_streamed`, over tiles that are on chip."""
    dq = tl.zeros([q.shape[0], values[0].shape[1]], tl.float32)
    start = 0
    for i in tl.static_range(len(keys)):
        dq = _add_to_dq(
            dq, q, grad, lse, delta, keys[i], values[i], start, len_kv, scale, i == len(keys) - 1, PRECISION
        )
        start += keys[i].shape[0]
    return dq


@triton.jit
def _empty_state(ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    # The lowest float32, not -inf: scores of -inf may fill a tile, and their difference would be NaN.
    row_max = tl.full([ROWS], -3.4028234663852886e38, tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    return acc, row_max, row_sum


@triton.jit
def _attend_tile(
    state, q,
    k_ptr, stride_kn,
    v_ptr, stride_vn,
    start, len_kv,
    scale,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    IS_TAIL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # [ROWS, BLOCK_D]
    k = load_rows(k_ptr, stride_kn, start, len_kv, ROWS, HEAD_DIM, BLOCK_D, IS_TAIL)
    # [M, ROWS]
    logits = dot_rows(q, k, PRECISION) * (scale * LOG2_E)
    if IS_TAIL:
        logits = tl.where((start + tl.arange(0, ROWS))[None, :] < len_kv, logits, float("-inf"))
    # [ROWS, BLOCK_D]
    v = load_rows(v_ptr, stride_vn, start, len_kv, ROWS, HEAD_DIM, BLOCK_D, IS_TAIL)
    return _add_values(state, logits, v, PRECISION)


@triton.jit
def _add_values(state, logits, v, PRECISION: tl.constexpr):
    """Add a tile of scores and their values to the running softmax."""
    acc, row_max, row_sum = state
    new_max = tl.maximum(row_max, tl.max(logits, 1))
    rescale = tl.exp2(row_max - new_max)
    probs = tl.exp2(logits - new_max[:, None])
    row_sum = row_sum * rescale + tl.sum(probs, 1)
    acc = tl.dot(probs.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
    return acc, new_max, row_sum


@triton.jit
def _add_to_dq(
    dq, q, grad, lse, delta, k, v,
    start, len_kv,
    scale,
    IS_TAIL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # [M, ROWS]
    logits = dot_rows(q, k, PRECISION) * (scale * LOG2_E)
    probs = tl.exp2(logits - lse[:, None])
    if IS_TAIL:
        # After exp2, not before: a masked key may overflow it, and inf * 0 would be NaN.
        probs = tl.where((start + tl.arange(0, k.shape[0]))[None, :] < len_kv, probs, 0.0)
    dprobs = dot_rows(grad, v, PRECISION)
    dlogits = probs * (dprobs - delta[:, None])
    return tl.dot(dlogits.to(k.dtype), k, dq, input_precision=PRECISION)
