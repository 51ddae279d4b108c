"""What one program of each kernel holds and loops over, read from the table of tiles."""

from collections.abc import Sequence

from bench.diagrams.matrix import Axis, Picture
from stochca_kernels.tiles import Kernel, TilePlan, Tiles, cdiv, channel_chunks, plans, tail_size

# The rows that are drawn: those of Hopper for 16-bit inputs and head size 64, of a model of 12 heads.
GPU, ARITHMETIC, HEAD_DIM, HEADS = "sm_90", "half", 64, 12
SHORT, LONG = 197, 785


def forward_resident() -> Picture:
    """All keys of a head on chip."""
    tiles = _row("fwd", SHORT)
    plan = TilePlan(SHORT)
    whole = "a whole row at once, without rescaling" if tiles.whole_row else "over the parts, rescaled"
    return Picture(
        f"attn_fwd, {SHORT} keys: {_described(tiles)}",
        Axis("queries", SHORT, _blocks(SHORT, tiles.block_m), [0]),
        Axis("keys", SHORT, plan.parts, range(len(plan.parts))),
        "down",
        (
            ("stays on chip", f"keys and values of a head, in parts of {_joined(plan.parts)} rows"),
            ("loop", f"blocks of {tiles.block_m} queries: the target's, then the source's if both read them"),
            ("softmax", whole),
            ("lanes", "several programs share the blocks of a head where heads alone do not fill the GPU"),
            ("computed", f"{sum(plan.parts)} keys for {SHORT}: {plan.useful_share:.0%} of them useful"),
        ),
    )


def forward_streamed() -> Picture:
    """Queries stay, keys stream."""
    tiles = _row("fwd", LONG)
    plan = TilePlan(LONG, tiles.block_n)
    return Picture(
        f"attn_fwd, {LONG} keys: {_described(tiles)}",
        Axis("queries", LONG, _blocks(LONG, tiles.block_m), [2]),
        Axis("keys", LONG, _streamed(LONG, tiles.block_n), [0]),
        "right",
        (
            ("stays on chip", f"{tiles.block_m} queries, their sums, maxima and output"),
            ("loop", f"tiles of {tiles.block_n} keys and values, {tiles.num_stages} in flight, none masked"),
            ("tail", f"one masked tile of {plan.tail} rows for the last {LONG % tiles.block_n} keys"),
            ("softmax", "running, rescaled when a maximum grows"),
            ("computed", f"{plan.useful_share:.0%} of the keys are useful"),
        ),
    )


def backward_dq() -> Picture:
    """All that cross-attention needs."""
    tiles = _row("dq", SHORT)
    plan = TilePlan(SHORT, tiles.block_n)
    return Picture(
        f"attn_bwd_dq, {SHORT} keys: {_described(tiles)}",
        Axis("queries", SHORT, _blocks(SHORT, tiles.block_m), [0]),
        Axis("keys", SHORT, plan.parts, range(len(plan.parts))),
        "down",
        (
            ("stays on chip", f"keys and values of a head, in parts of {_joined(plan.parts)} rows"),
            ("loop", f"blocks of {tiles.block_m} queries, with output, its gradient and the log-sum-exp"),
            ("products", "three: scores, their gradient, dQ. The source is constant: no dK, no dV"),
            ("writes", "dQ, each row once; for dK and dV to follow, rowsum(out * grad) as well"),
        ),
    )


def backward_joint() -> Picture:
    """dQ, dK and dV from one pass."""
    tiles = _row("dqkv", SHORT)
    parts = TilePlan(SHORT, smallest_part=tiles.smallest_part).parts
    return Picture(
        f"attn_bwd_joint, {SHORT} keys: {_described(tiles)}",
        Axis("queries", SHORT, _blocks(SHORT, tiles.block_m), [0]),
        Axis("keys", SHORT, parts, range(len(parts))),
        "down",
        (
            (
                "stays on chip",
                f"keys and values in parts of {_joined(parts)} rows; sums of dK and dV in float32",
            ),
            ("loop", f"blocks of {tiles.block_m} queries; everything is transposed, keys by queries"),
            ("products", "five, where separate kernels for dQ and for dK, dV need seven"),
            ("writes", "dQ block by block, dK and dV at the end: no atomics"),
        ),
    )


def backward_dkdv() -> Picture:
    """Keys stay, queries stream."""
    tiles = _row("dkdv", LONG)
    tail = tail_size(tiles.block_m, LONG)
    return Picture(
        f"attn_bwd_dkdv, {LONG} keys: {_described(tiles)}",
        Axis("queries", LONG, _streamed(LONG, tiles.block_m), [0]),
        Axis("keys", LONG, _blocks(LONG, tiles.block_n), [2]),
        "down",
        (
            ("stays on chip", f"{tiles.block_n} keys and values, and the sums of their gradients in float32"),
            ("loop", f"tiles of {tiles.block_m} queries with gradient, log-sum-exp and rowsum(out * grad)"),
            ("tail", f"one masked tile of {tail} rows for the last {LONG % tiles.block_m} queries"),
            ("writes", "dK and dV once; zeros where the sample's coin chose the source"),
        ),
    )


def tokens() -> Picture:
    """Few rows: the tokens are keys and values."""
    channels = HEADS * HEAD_DIM
    tiles = _row("tokens_fwd", SHORT, channels)
    chunks = channel_chunks(channels)
    return Picture(
        f"tokens_fwd, {SHORT} tokens of {channels} channels: {_described(tiles)}",
        Axis("rows", HEADS, [tiles.block_m], [0]),
        Axis("tokens", SHORT, _blocks(SHORT, tiles.block_n), [0]),
        "right",
        (
            (
                "stays on chip",
                f"a row for each of the {HEADS} heads: its class query in the space of the tokens",
            ),
            (
                "loop",
                f"tiles of {tiles.block_n} tokens, each with all channels, in chunks of {_joined(chunks)}",
            ),
            ("read", "each token once from memory: it is key and value of all heads"),
            ("splits", "several programs share a sample's tokens where the batch does not fill the GPU"),
        ),
    )


def projected() -> Picture:
    """Keys and values are made inside the attention kernel."""
    tiles = _row("projected_fwd", SHORT)
    plan = TilePlan(SHORT)
    return Picture(
        f"projected_fwd, {SHORT} tokens: {_described(tiles)}",
        Axis("queries", SHORT, _blocks(SHORT, tiles.block_m), [0]),
        Axis("keys", SHORT, plan.parts, range(len(plan.parts))),
        "down",
        (
            ("first", f"K and V of a head from the source's tokens, over {tiles.block_c} channels at a time"),
            ("stays on chip", f"both, in parts of {_joined(plan.parts)} rows; they are never written"),
            ("loop", f"blocks of {tiles.block_m} queries: the target's, then the source's"),
            ("cost", "each head reads all tokens of its sample, and projects only for itself"),
        ),
    )


def _row(kernel: Kernel, length: int, width: int = HEAD_DIM) -> Tiles:
    return plans(kernel, GPU, ARITHMETIC, width, length)[0]


def _described(tiles: Tiles) -> str:
    return f"{tiles.block_m} x {tiles.block_n or 'all'}, {tiles.num_warps} warps, {GPU}"


def _blocks(length: int, block: int) -> list[int]:
    return [block] * cdiv(length, block)


def _streamed(length: int, block: int) -> list[int]:
    tail = tail_size(block, length)
    return [block] * (length // block) + ([tail] if tail else [])


def _joined(sizes: Sequence[int]) -> str:
    return " + ".join(map(str, sizes))
