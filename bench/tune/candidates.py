"""Which tiles are tried: one small space per kernel. What does not compile is dropped before it is timed."""

from collections.abc import Callable, Iterable, Iterator
from itertools import product
from typing import NamedTuple

from bench.tune.groups import Group
from stochca_kernels.tiles import Kernel, Tiles

ORIGIN = "candidate"
# `dqkv` may lose to the two kernels that it replaces: then the table has no row for it.
Candidate = Tiles | None


class Space(NamedTuple):
    """What bounds a space.

    Args:
        half: 16-bit inputs, whose tiles take half the room.
        on_chip: Rows are short enough for a program to keep all keys on chip.
        quick: Fewer stages and rarer shapes of tiles are left out.
    """

    half: bool
    on_chip: bool
    quick: bool

    def either(self, usual: Iterable[int], more: Iterable[int]) -> tuple[int, ...]:
        """The usual values, and more of them where there is time."""
        return (*usual,) if self.quick else (*usual, *more)


def candidates(group: Group, arithmetic: str, present: Tiles | None, quick: bool) -> list[Candidate]:
    """What is tried for one row of the table: what stands there now comes first."""
    space = Space(arithmetic == "half", group.most_keys is not None, quick)
    now = [] if present is None else [present._replace(origin=ORIGIN, max_keys=None)]
    found: list[Candidate] = [*dict.fromkeys([*now, *_SPACES[group.kernel](space)])]
    return [*found, None] if group.kernel == "dqkv" else found


def _fwd(space: Space) -> Iterator[Tiles]:
    if space.on_chip:
        for tiles, whole_row in product(_resident(space), (True, False)):
            yield tiles._replace(whole_row=whole_row)
    yield from _streamed(space)


def _dq(space: Space) -> Iterator[Tiles]:
    if space.on_chip:
        yield from _resident(space)
    yield from _streamed(space)


def _dkdv(space: Space) -> Iterator[Tiles]:
    """Keys stay, and queries stream."""
    rows, keys = ((32, 64), (64, 128)) if space.half else ((16, 32), (8, 16, 32))
    for m, n, warps, stages in product(space.either(rows, (128,)), keys, (4, 8), _stages(space)):
        yield Tiles(m, n, warps, stages, ORIGIN)


def _dqkv(space: Space) -> Iterator[Tiles]:
    for m, warps, stages, part in product(
        space.either((32,), (16, 64)), (4, 8), space.either((2,), (1,)), space.either((64,), (16,))
    ):
        yield Tiles(m, 0, warps, stages, ORIGIN, smallest_part=part)


def _projected(space: Space) -> Iterator[Tiles]:
    channels = space.either((64,), (32, 128)) if space.half else (16, 32)
    if space.on_chip:
        for m, c, stages in product(space.either((64,), (128,)), channels, _stages(space)):
            yield Tiles(m, 0, 8, stages, ORIGIN, block_c=c)
    for tiles, c in product(_streamed(space._replace(quick=True)), channels):
        yield tiles._replace(block_c=c)


def _tokens(space: Space) -> Iterator[Tiles]:
    """One stage means that chunks of the tokens stream, with none of their rows kept on chip."""
    rows, keys = space.either((16,), (32,)), space.either((16, 32, 64), (128,))
    for m, n, warps, stages in product(rows, keys, (4, 8), space.either((2, 3), (1,))):
        yield Tiles(m, n, warps, stages, ORIGIN)


def _resident(space: Space) -> Iterator[Tiles]:
    """All keys on chip."""
    rows = ((64, 4), (128, 8)) if space.half else ((32, 4), (32, 8))
    more = () if space.quick else ((64, 8), (128, 4))
    for (m, warps), part in product((*rows, *more), space.either((16,), (64,))):
        yield Tiles(m, 0, warps, 1, ORIGIN, smallest_part=part)


def _streamed(space: Space) -> Iterator[Tiles]:
    """A main loop over tiles of keys."""
    rows = ((64, 4), (128, 8)) if space.half else ((16, 8), (32, 4))
    more = () if space.quick else ((64, 8), (128, 4))
    keys = space.either((64, 128), (32,)) if space.half else (16, 32)
    for (m, warps), n, stages in product((*rows, *more), keys, _stages(space)):
        yield Tiles(m, n, warps, stages, ORIGIN)


def _stages(space: Space) -> tuple[int, ...]:
    return space.either((2,), (3,) if space.half else (1,))


_SPACES: dict[Kernel, Callable[[Space], Iterable[Tiles]]] = {
    "fwd": _fwd,
    "dq": _dq,
    "dkdv": _dkdv,
    "dqkv": _dqkv,
    "projected_fwd": _projected,
    "projected_dq": _projected,
    "tokens_fwd": _tokens,
    "tokens_bwd": _tokens,
}
