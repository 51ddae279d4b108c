"""What a step will do, decided on the host before anything runs: the coins of all blocks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from stochca.attention import Blend, Coin

Per = Literal["batch", "sample"]
Mode = Literal["stochastic", "mix", "sum", "concat"]
Rng = Literal["counter", "official"]

Probability: TypeAlias = float | Sequence[float] | None
Schedule: TypeAlias = Probability | Callable[[int], Probability]


@dataclass(frozen=True)
class StepPlan:
    """The coins of one step, what its losses read besides the logits, and what follows from both.

    Args:
        coins: What each block reads, from the first to the last.
        taps: After how many blocks the tokens of both models are read, 0 for those before the first block.
        whole_source: Whether the logits of the source are read.
    """

    coins: tuple[Coin, ...]
    taps: tuple[int, ...] = ()
    whole_source: bool = False

    @property
    def source_blocks(self) -> int:
        """How many blocks of the source are needed; of the last K and V alone, unless `advances_source`."""
        return max(self._read_blocks, self._source_depth)

    def advances_source(self, i: int) -> bool:
        """Whether the source's tokens after block `i` are needed, not only its keys and values."""
        return i + 1 < self._read_blocks or i < self._source_depth

    @property
    def _read_blocks(self) -> int:
        """Up to the last block of which the target reads keys and values."""
        return max((i + 1 for i, coin in enumerate(self.coins) if coin is not False), default=0)

    @property
    def _source_depth(self) -> int:
        """Up to the last block of which tokens are read."""
        return len(self.coins) if self.whole_source else max(self.taps, default=0)

    @property
    def source_fraction(self) -> float:
        """`source_blocks` over the depth."""
        return self.source_blocks / len(self.coins)

    @property
    def first_class_row_block(self) -> int:
        """The first block after which only the class rows are read, if the head reads nothing else.

        It is the last block that reads its own tokens: every block after it asks the source alone, so that
        the other tokens are neither queries, keys nor values of anything. The first block if there is none.
        No block before a tap.
        """
        last = max((i for i, coin in enumerate(self.coins) if coin is not True), default=0)
        return max(last, *self.taps) if self.taps else last


class CoinSampler:
    """Draws the coins of each step.

    With `rng="counter"` they depend on the seed and the step alone: nothing needs saving but the step, a
    resumed run continues exactly, and all ranks of a distributed run draw the same.

    Args:
        p: Probability that a block reads the source: a number, one per block, or a function of the step that
            returns either. None means 0. In mode "mix" it is the source's share instead.
        depth: Number of blocks.
        per: "batch" draws one coin per block, as the paper does; "sample" one per block and sample.
        mode: "stochastic" is the paper's; "mix", "sum" and "concat" read both pairs in every block.
        seed: Non-negative.
        rng: "counter", or "official" for torch's default CPU generator in the order of the blocks, which
            gives the coin stream of the authors' code for the same torch seed.

    Attributes:
        step: The next step to draw, counted from 0. Set it to resume a run.

    Raises:
        ValueError: A probability is outside [0, 1], or an option is unknown or does not fit the others.
    """

    def __init__(
        self,
        p: Schedule,
        depth: int,
        *,
        per: Per = "batch",
        mode: Mode = "stochastic",
        seed: int = 0,
        rng: Rng = "counter",
    ) -> None:
        for name, value, options in (("per", per, Per), ("mode", mode, Mode), ("rng", rng, Rng)):
            if value not in get_args(options):
                raise ValueError(f"{name} must be one of {get_args(options)}, got {value!r}")
        if rng == "official" and per == "sample":
            raise ValueError('rng="official" draws one coin per block: use per="batch"')
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.p, self.depth, self.per, self.mode, self.seed, self.rng = p, depth, per, mode, seed, rng
        self.step = 0
        self._rank, self._world_size, self._is_own = 0, 1, False
        self.probabilities(0)

    def spread(self, rank: int, world_size: int, *, independent: bool = False) -> None:
        """Draw for one of several processes.

        Args:
            rank: Of this process.
            world_size: How many there are.
            independent: Each process draws coins of its own. Otherwise all have the same coins per batch, so
                that all need as much of the source, and W processes with B samples the coins per sample of
                one with W * B.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be from 0 to {world_size - 1}, got {rank}")
        self._rank, self._world_size, self._is_own = rank, world_size, independent and world_size > 1

    def __repr__(self) -> str:
        return (
            f"CoinSampler(p={self.p}, per={self.per!r}, mode={self.mode!r}, seed={self.seed}, "
            f"rng={self.rng!r}, step={self.step})"
        )

    def probabilities(self, step: int) -> np.ndarray:
        """The probability of each block at a step, float64 `[depth]`."""
        p = self.p(step) if callable(self.p) else self.p
        values = np.asarray(0.0 if p is None else p)
        if values.dtype.kind not in "biuf":
            raise ValueError(f"p must be a number or one per block ({self.depth}), got {p!r}")
        values = values.astype(np.float64)
        if values.ndim > 1 or (values.ndim == 1 and len(values) != self.depth):
            raise ValueError(f"p must be a number or one per block ({self.depth}), got shape {values.shape}")
        if not ((values >= 0) & (values <= 1)).all():
            raise ValueError(f"p must be between 0 and 1, got {p}")
        return np.broadcast_to(values, (self.depth,))

    def draw(self, batch_size: int, device: torch.device | str = "cpu") -> StepPlan:
        """Draw the next step's plan and advance `step`.

        Args:
            batch_size: B.
            device: Where coins `[B]` are needed.
        """
        p = self.probabilities(self.step)
        if self.mode == "stochastic":
            plan = StepPlan(self._flip(p, batch_size, device))
        else:
            plan = StepPlan(tuple(_blend(self.mode, share) for share in p.tolist()))
        self.step += 1
        return plan

    def _flip(self, p: np.ndarray, batch_size: int, device: torch.device | str) -> tuple[Coin, ...]:
        if self.rng == "official":
            return tuple((torch.rand(self.depth) < torch.tensor(p, dtype=torch.float32)).tolist())
        own = [self._rank + 1] if self._is_own else []
        generator = np.random.default_rng([self.seed, self.step, *own])
        if self.per == "batch":
            return tuple((generator.random(self.depth) < p).tolist())
        start, samples = (0, batch_size) if own else (self._rank * batch_size, self._world_size * batch_size)
        numbers = generator.random((self.depth, samples))[:, start : start + batch_size]
        coins = numbers < p[:, None]
        on_device = torch.from_numpy(coins)
        if torch.device(device).type == "cuda":
            on_device = on_device.pin_memory().to(device, non_blocking=True)  # the step waits for nothing
        else:
            on_device = on_device.to(device)
        # A block whose samples agree is an ordinary one, with all that can be left out there.
        return tuple(
            bool(row.any()) if row.any() == row.all() else tensor
            for row, tensor in zip(coins, on_device, strict=True)
        )


def replay(coins: Sequence[Coin], depth: int, batch_size: int) -> StepPlan:
    """Check a given draw: one bool, one bool tensor `[B]` or one `Blend` per block."""
    if len(coins) != depth:
        raise ValueError(f"coins must have one entry per block ({depth}), got {len(coins)}")
    for i, coin in enumerate(coins):
        if isinstance(coin, Tensor):
            if coin.dtype != torch.bool or coin.shape != (batch_size,):
                raise ValueError(
                    f"coins[{i}] must be a bool or a torch.bool tensor of shape ({batch_size},), got "
                    f"{coin.dtype} of shape {tuple(coin.shape)}"
                )
        elif isinstance(coin, Blend):
            if coin.kind not in get_args(Mode)[1:] or not 0 <= coin.alpha <= 1:
                raise ValueError(f"coins[{i}] must mix, sum or concat with alpha from 0 to 1, got {coin}")
        elif not isinstance(coin, bool | np.bool_):
            raise TypeError(f"coins[{i}] must be a bool or a bool tensor, got {type(coin).__name__}")
    return StepPlan(tuple(bool(coin) if isinstance(coin, np.bool_) else coin for coin in coins))


def _blend(mode: Literal["mix", "sum", "concat"], share: float) -> Coin:
    if mode == "mix" and share in (0.0, 1.0):
        return share == 1.0
    return Blend(mode, share if mode == "mix" else 1.0)
