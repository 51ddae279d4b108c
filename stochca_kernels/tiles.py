"""How each kernel cuts its work into tiles, by GPU, dtype, head size and length: one table for all."""

from functools import cache, lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Kernel = Literal["fwd", "dq", "dkdv", "dqkv", "projected_fwd", "projected_dq", "tokens_fwd", "tokens_bwd"]


class TilePlan:
    """An exact cut of a row of keys: powers of two, of which only the last is ragged.

    Args:
        length: N, the number of keys.
        block_n: Keys of a tile of the main loop; 0 where a program keeps all keys on chip, `parts` of them.
        smallest_part: Keys that every part has a multiple of.

    Examples:
        >>> TilePlan(197).parts, TilePlan(257).parts, TilePlan(197, smallest_part=64).parts
        ((128, 64, 16), (128, 128, 16), (128, 128))
        >>> TilePlan(785, 128).tail
        32
    """

    def __init__(self, length: int, block_n: int = 0, smallest_part: int = 16):
        self.length = length
        self.block_n = block_n
        self.smallest_part = smallest_part

    @property
    def parts(self) -> tuple[int, ...]:
        """Tiles that hold the whole row, largest first, at most three up to 384; empty in a main loop."""
        return () if self.block_n else _parts(self.length, self.smallest_part)

    @property
    def tail(self) -> int:
        """Rows of the masked tile that follows a main loop, 0 where none is needed."""
        return tail_size(self.block_n, self.length)

    @property
    def useful_share(self) -> float:
        """Keys over keys computed."""
        main = self.length // self.block_n * self.block_n if self.block_n else 0
        return self.length / (main + self.tail + sum(self.parts))


@cache
def _parts(length: int, smallest_part: int) -> tuple[int, ...]:
    padded = max(1, cdiv(length, smallest_part)) * smallest_part
    while len(parts := _powers_of_two(padded)) > 3 and parts[-1] < 128:
        padded += parts[-1]
    return parts


def cdiv(a: int, b: int) -> int:
    """`a / b`, rounded up."""
    return -(-a // b)


def _powers_of_two(length: int, largest: int = 128) -> tuple[int, ...]:
    bits = (1 << i for i in reversed(range(largest.bit_length() - 1)))
    return (largest,) * (length // largest) + tuple(bit for bit in bits if length % largest & bit)


class Tiles(NamedTuple):
    """One program's work.

    Args:
        block_m: Query rows of a tile.
        block_n: Key rows of a tile of the main loop. 0: a program keeps all keys on chip.
        num_warps: Warps of a program.
        num_stages: Tiles in flight in the innermost loop.
        origin: "compiled" where registers and shared memory were read from the compiled program
            (Triton 3.6.0, `python -m bench.programs`); the GPU and the commit where it was timed.
        max_keys: Most keys this row is for, None for any number.
        whole_row: Softmax over the whole row of scores at once, without rescaling.
        smallest_part: Keys of the smallest tile of a program that keeps all keys on chip.
        block_c: Channels of a tile of the projection, where there is one.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    origin: str
    max_keys: int | None = None
    whole_row: bool = False
    smallest_part: int = 16
    block_c: int = 0


# (kernel, GPU, arithmetic): rows for head sizes up to 64, and up to 128. The first that fits is used.
_TABLE: dict[tuple[str, str, str], tuple[tuple[Tiles, ...], tuple[Tiles, ...]]] = {
    ("fwd", "sm_80", "half"): (
        (
            Tiles(64, 0, 4, 1, "compiled", max_keys=208, whole_row=True),
            Tiles(64, 0, 4, 1, "compiled", max_keys=272),
            Tiles(64, 64, 4, 2, "compiled"),
        ),
        (Tiles(32, 64, 4, 2, "compiled"),),
    ),
    ("fwd", "sm_90", "half"): (
        (
            Tiles(64, 0, 4, 1, "compiled", max_keys=208, whole_row=True),
            Tiles(64, 0, 4, 1, "compiled", max_keys=272),
            Tiles(64, 64, 4, 2, "compiled"),
        ),
        (Tiles(64, 64, 4, 2, "compiled"),),
    ),
    ("fwd", "sm_100", "half"): (
        (Tiles(64, 0, 4, 1, "compiled", max_keys=272), Tiles(64, 64, 4, 3, "compiled")),
        (Tiles(64, 32, 4, 2, "compiled"),),
    ),
    ("fwd", "sm_120", "half"): (
        (
            Tiles(64, 0, 4, 2, "compiled", max_keys=272),
            Tiles(64, 64, 8, 2, "compiled"),
        ),
        (Tiles(32, 64, 4, 2, "compiled"),),
    ),
    ("fwd", "gfx942", "half"): (
        (Tiles(64, 64, 4, 2, "compiled"),),
        (Tiles(64, 32, 4, 2, "compiled"),),
    ),
    ("fwd", "nvidia", "tf32"): ((Tiles(64, 32, 4, 2, "compiled"),), (Tiles(16, 32, 4, 2, "compiled"),)),
    ("fwd", "nvidia", "ieee"): ((Tiles(32, 16, 8, 1, "compiled"),), (Tiles(16, 16, 8, 1, "compiled"),)),
    ("fwd", "gfx942", "ieee"): ((Tiles(32, 32, 4, 1, "compiled"),), (Tiles(32, 16, 4, 1, "compiled"),)),
    ("dq", "sm_80", "half"): ((Tiles(64, 32, 4, 2, "compiled"),), (Tiles(32, 64, 8, 2, "compiled"),)),
    ("dq", "sm_90", "half"): (
        (Tiles(64, 0, 4, 1, "compiled", max_keys=272), Tiles(64, 64, 4, 2, "compiled")),
        (Tiles(64, 64, 4, 2, "compiled"),),
    ),
    ("dq", "sm_100", "half"): (
        (
            Tiles(64, 0, 4, 1, "compiled", max_keys=272),
            Tiles(64, 64, 4, 3, "compiled"),
        ),
        (Tiles(64, 64, 4, 2, "compiled"),),
    ),
    ("dq", "sm_120", "half"): ((Tiles(64, 32, 4, 2, "compiled"),), (Tiles(32, 64, 8, 2, "compiled"),)),
    ("dq", "gfx942", "half"): ((Tiles(64, 32, 4, 2, "compiled"),), (Tiles(64, 32, 8, 2, "compiled"),)),
    ("dq", "nvidia", "tf32"): ((Tiles(32, 32, 8, 2, "compiled"),), (Tiles(16, 16, 8, 2, "compiled"),)),
    ("dq", "nvidia", "ieee"): ((Tiles(16, 16, 8, 1, "compiled"),), (Tiles(8, 16, 8, 1, "compiled"),)),
    ("dq", "gfx942", "ieee"): ((Tiles(32, 32, 4, 1, "compiled"),), (Tiles(32, 16, 4, 1, "compiled"),)),
    ("dkdv", "sm_80", "half"): ((Tiles(32, 64, 4, 2, "compiled"),), (Tiles(32, 32, 8, 2, "compiled"),)),
    ("dkdv", "sm_90", "half"): ((Tiles(64, 64, 4, 2, "compiled"),), (Tiles(64, 64, 8, 2, "compiled"),)),
    ("dkdv", "sm_100", "half"): ((Tiles(64, 64, 4, 2, "compiled"),), (Tiles(64, 64, 4, 2, "compiled"),)),
    ("dkdv", "sm_120", "half"): ((Tiles(32, 64, 4, 2, "compiled"),), (Tiles(32, 32, 8, 2, "compiled"),)),
    ("dkdv", "gfx942", "half"): ((Tiles(32, 64, 4, 2, "compiled"),), (Tiles(32, 32, 4, 2, "compiled"),)),
    ("dkdv", "nvidia", "tf32"): ((Tiles(16, 32, 4, 2, "compiled"),), (Tiles(16, 16, 8, 2, "compiled"),)),
    ("dkdv", "nvidia", "ieee"): ((Tiles(16, 16, 8, 1, "compiled"),), (Tiles(16, 8, 8, 1, "compiled"),)),
    ("dkdv", "gfx942", "ieee"): ((Tiles(16, 32, 4, 1, "compiled"),), (Tiles(16, 32, 4, 1, "compiled"),)),
    ("projected_fwd", "sm_80", "half"): (
        (Tiles(64, 64, 4, 2, "compiled", block_c=64),),
        (Tiles(32, 32, 4, 2, "compiled", block_c=32),),
    ),
    ("projected_fwd", "sm_90", "half"): (
        (
            Tiles(64, 0, 8, 2, "compiled", max_keys=208, block_c=64),
            Tiles(64, 0, 8, 2, "compiled", max_keys=272, block_c=32),
            Tiles(128, 128, 8, 2, "compiled", block_c=64),
        ),
        (Tiles(64, 64, 8, 2, "compiled", block_c=64),),
    ),
    ("projected_fwd", "sm_100", "half"): (
        (
            Tiles(64, 0, 8, 2, "compiled", max_keys=272, block_c=32),
            Tiles(64, 64, 4, 2, "compiled", block_c=64),
        ),
        (Tiles(64, 32, 4, 2, "compiled", block_c=32),),
    ),
    ("projected_fwd", "sm_120", "half"): (
        (Tiles(64, 64, 4, 2, "compiled", block_c=64),),
        (Tiles(32, 32, 4, 2, "compiled", block_c=32),),
    ),
    ("projected_fwd", "gfx942", "half"): (
        (Tiles(64, 64, 4, 2, "compiled", block_c=64),),
        (Tiles(64, 64, 4, 2, "compiled", block_c=64),),
    ),
    ("projected_fwd", "nvidia", "tf32"): (
        (Tiles(32, 32, 4, 2, "compiled", block_c=32),),
        (Tiles(16, 32, 8, 2, "compiled", block_c=32),),
    ),
    ("projected_fwd", "nvidia", "ieee"): (
        (Tiles(32, 32, 8, 1, "compiled", block_c=16),),
        (Tiles(16, 16, 8, 1, "compiled", block_c=16),),
    ),
    ("projected_fwd", "gfx942", "ieee"): (
        (Tiles(32, 32, 8, 1, "compiled", block_c=16),),
        (Tiles(32, 32, 8, 1, "compiled", block_c=16),),
    ),
    ("projected_dq", "sm_80", "half"): (
        (Tiles(64, 32, 4, 2, "compiled", block_c=32),),
        (Tiles(32, 32, 8, 2, "compiled", block_c=32),),
    ),
    ("projected_dq", "sm_90", "half"): (
        (
            Tiles(64, 0, 8, 2, "compiled", max_keys=272, block_c=64),
            Tiles(64, 64, 4, 2, "compiled", block_c=64),
        ),
        (Tiles(64, 64, 8, 2, "compiled", block_c=64),),
    ),
    ("projected_dq", "sm_100", "half"): (
        (
            Tiles(64, 0, 8, 2, "compiled", max_keys=272, block_c=32),
            Tiles(64, 64, 4, 2, "compiled", block_c=32),
        ),
        (Tiles(64, 32, 4, 2, "compiled", block_c=32),),
    ),
    ("projected_dq", "sm_120", "half"): (
        (Tiles(64, 32, 4, 2, "compiled", block_c=32),),
        (Tiles(32, 32, 8, 2, "compiled", block_c=32),),
    ),
    ("projected_dq", "gfx942", "half"): (
        (Tiles(64, 64, 4, 2, "compiled", block_c=64),),
        (Tiles(64, 32, 4, 2, "compiled", block_c=32),),
    ),
    ("projected_dq", "nvidia", "tf32"): (
        (Tiles(16, 32, 4, 2, "compiled", block_c=32),),
        (Tiles(16, 32, 8, 2, "compiled", block_c=32),),
    ),
    ("projected_dq", "nvidia", "ieee"): (
        (Tiles(16, 16, 8, 1, "compiled", block_c=16),),
        (Tiles(8, 16, 8, 1, "compiled", block_c=16),),
    ),
    ("projected_dq", "gfx942", "ieee"): (
        (Tiles(32, 32, 8, 1, "compiled", block_c=16),),
        (Tiles(32, 32, 8, 1, "compiled", block_c=16),),
    ),
    # Keys are the rows of its tiles, which Hopper's matrix instruction takes by 64.
    ("dqkv", "sm_90", "half"): (
        (
            Tiles(32, 0, 4, 2, "compiled", max_keys=128, smallest_part=64),
            Tiles(32, 0, 8, 2, "compiled", max_keys=256, smallest_part=64),
        ),
        (),
    ),
    # Tokens: columns are for up to 768 channels, and for more. One stage: nothing stays on chip, which fits
    # whatever the number of channels.
    ("tokens_fwd", "sm_80", "half"): (
        (Tiles(16, 32, 4, 3, "compiled"),),
        (Tiles(16, 16, 8, 3, "compiled"), Tiles(16, 16, 8, 1, "compiled")),
    ),
    ("tokens_fwd", "sm_90", "half"): (
        (Tiles(16, 64, 8, 3, "compiled"),),
        (Tiles(16, 32, 8, 3, "compiled"), Tiles(16, 16, 8, 3, "compiled"), Tiles(16, 16, 8, 1, "compiled")),
    ),
    ("tokens_fwd", "sm_100", "half"): (
        (Tiles(16, 64, 8, 3, "compiled"),),
        (Tiles(16, 32, 8, 3, "compiled"), Tiles(16, 16, 8, 3, "compiled"), Tiles(16, 16, 8, 1, "compiled")),
    ),
    ("tokens_fwd", "sm_120", "half"): (
        (Tiles(16, 16, 8, 3, "compiled"),),
        (Tiles(16, 16, 8, 2, "compiled"), Tiles(16, 16, 8, 1, "compiled")),
    ),
    ("tokens_fwd", "gfx942", "half"): (
        (Tiles(16, 16, 8, 1, "compiled"),),
        (Tiles(16, 16, 8, 1, "compiled"),),
    ),
    ("tokens_fwd", "gfx942", "ieee"): (
        (Tiles(16, 16, 8, 1, "compiled"),),
        (Tiles(16, 16, 8, 1, "compiled"),),
    ),
    ("tokens_bwd", "sm_80", "half"): (
        (Tiles(16, 32, 8, 3, "compiled"),),
        (Tiles(16, 16, 8, 2, "compiled"), Tiles(16, 16, 8, 1, "compiled")),
    ),
    ("tokens_bwd", "sm_90", "half"): (
        (Tiles(16, 32, 8, 3, "compiled"),),
        (Tiles(16, 16, 8, 3, "compiled"), Tiles(16, 16, 8, 1, "compiled")),
    ),
    ("tokens_bwd", "sm_100", "half"): (
        (Tiles(16, 32, 8, 3, "compiled"),),
        (Tiles(16, 16, 8, 3, "compiled"), Tiles(16, 16, 8, 1, "compiled")),
    ),
    ("tokens_bwd", "sm_120", "half"): (
        (Tiles(16, 16, 4, 2, "compiled"),),
        (Tiles(16, 16, 8, 1, "compiled"),),
    ),
    ("tokens_bwd", "gfx942", "half"): (
        (Tiles(16, 16, 8, 1, "compiled"),),
        (Tiles(16, 16, 8, 1, "compiled"),),
    ),
    ("tokens_bwd", "gfx942", "ieee"): (
        (Tiles(16, 16, 8, 1, "compiled"),),
        (Tiles(16, 16, 8, 1, "compiled"),),
    ),
}

# Most programs that share the tokens of a sample.
MAX_SPLITS = 32

# Parts without shared memory limits of their own use the rows of one with the same matrix unit.
_LIKE = {"sm_89": "sm_120"}


def choose_tiles(kernel: Kernel, q: Tensor, *lengths: int) -> tuple[Tiles, ...]:
    """Choose the tiles of a launch on `q`'s device: the preferred ones first, then smaller ones."""
    # The interpreter has no registers to spare, and the largest tiles are the fastest there.
    half = q.itemsize == 2 or q.device.type == "cpu"
    return _chosen(kernel, gpu_of(q.device), "half" if half else dot_precision(q), q.shape[-1], lengths)


@lru_cache(maxsize=4096)
def _chosen(
    kernel: Kernel, gpu: str, arithmetic: str, head_dim: int, lengths: tuple[int, ...]
) -> tuple[Tiles, ...]:
    rows = plans(kernel, gpu, arithmetic, head_dim, max(lengths))
    if len({TilePlan(length).parts for length in lengths}) == 1:
        return rows
    return tuple(row for row in rows if row.block_n)  # one cut of the keys does not fit all


def plans(kernel: Kernel, gpu: str, arithmetic: str, head_dim: int, length: int) -> tuple[Tiles, ...]:
    """Look up the rows of the table, for "dqkv" perhaps none.

    Args:
        kernel: Which kernel.
        gpu: "sm_80", "sm_89", "sm_90", "sm_100", "sm_120" or "gfx942".
        arithmetic: "half" for 16-bit inputs; "tf32" or "ieee" for float32.
        head_dim: D, or the channels of the tokens.
        length: Rows of the loop: keys, or queries for "dkdv".
    """
    gpu = "nvidia" if arithmetic != "half" and gpu != "gfx942" else _LIKE.get(gpu, gpu)
    narrow, wide = _TABLE.get((kernel, gpu, arithmetic), ((), ()))
    rows = wide if head_dim > (768 if kernel.startswith("tokens") else 64) else narrow
    if kernel.startswith("projected") and head_dim <= 32:
        # A head is the rows of a projection on chip, where a matrix instruction takes 64: smaller ones spill.
        rows = tuple(row for row in rows if row.block_n)
    return tuple(row for row in rows if row.max_keys is None or length <= row.max_keys)


def tail_size(block: int, *lengths: int) -> int:
    """Rows of the masked tile that follows the full tiles of `block` rows, 0 where no length leaves any."""
    tail = max(length % block for length in lengths) if block else 0
    return max(16, 1 << (tail - 1).bit_length()) if tail else 0


def channel_chunks(channels: int, largest: int = 256) -> tuple[int, ...]:
    """Cut a row of channels into powers of two up to `largest`, of which only the last is ragged.

    Examples:
        >>> channel_chunks(768), channel_chunks(1152), channel_chunks(100)
        ((256, 256, 256), (256, 256, 256, 256, 128), (64, 32, 16))
    """
    return _powers_of_two(max(16, -(-channels // 16) * 16), largest)


def token_splits(programs: int, tokens: int, device: torch.device) -> int:
    """How many programs share the tokens of a sample: enough to fill the GPU, each with 64 tokens or more."""
    return max(1, min(-(-tokens // 64), _multiprocessors(device) // max(1, programs), MAX_SPLITS))


def query_lanes(heads: int, blocks: int, device: torch.device) -> int:
    """How many programs share the query blocks of a head whose keys each of them keeps on chip.

    One would read every key once; more are needed where `heads`, over the whole batch, do not fill the GPU.
    """
    slots = 3 * _multiprocessors(device)
    return max(1, min(blocks, slots // max(1, heads)))


def resident_programs(device: torch.device) -> int:
    """How many programs run at a time, at least: a slot of scratch memory each."""
    return 2 * _multiprocessors(device)


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def dot_precision(x: Tensor) -> str:
    """Precision of float32 products: TF32 where torch's own may use it, else exact."""
    if x.dtype != torch.float32 or torch.version.hip:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@lru_cache
def gpu_of(device: torch.device) -> str:
    """Name the table's GPU that is nearest to `device`: the same matrix unit, and no more shared memory."""
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    if (major, minor) in ((8, 0), (8, 7)):
        return "sm_80"
    return {8: "sm_89", 9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_120")
