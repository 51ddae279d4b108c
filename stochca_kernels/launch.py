"""What every launcher needs beside its kernel."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.errors import OutOfResources

from stochca_kernels.tiles import Tiles

Layout = tuple[torch.dtype, tuple[int, ...]]

# Rows of the table that turned out to need more than a GPU has.
_TOO_LARGE: set[tuple[Any, ...]] = set()
# Most kinds of launches that each launcher remembers. A kind is small, and a training meets a few dozen.
MAX_KINDS = 512
# AMD's compiler also asks for the size of each tensor's memory, which is no part of a kind.
_REMEMBERS = not torch.version.hip
_HERE = contextlib.nullcontext()


def launch_largest(kernel: Any, q: Tensor, rows: Sequence[Tiles], launch: Callable[[Tiles], None]) -> None:
    """Call `launch` with the first of `rows` whose program fits the GPU of `q`.

    Raises:
        ValueError: There is no row: the table has no tiles for this GPU and dtype.
        OutOfResources: Not even the last one fits.
    """
    if not rows:
        raise ValueError(
            f'impl="triton" has no tiles of {kernel} for {q.dtype} on {q.device}: use impl="sdpa"'
        )
    for tiles in rows:
        if _TOO_LARGE and tiles is not rows[-1] and _program(kernel, q, tiles) in _TOO_LARGE:
            continue
        try:
            with on_device_of(q.device):
                return launch(tiles)
        except OutOfResources:
            if tiles is rows[-1]:
                raise
            _TOO_LARGE.add(_program(kernel, q, tiles))


def _program(kernel: Any, q: Tensor, tiles: Tiles) -> tuple[Any, ...]:
    return kernel, q.device, q.dtype, q.shape[-1], tiles


class Launch:
    """One kind of launch: all that a kernel is told beside its tensors, and the program that Triton found.

    Before every launch Triton works out from some fifty arguments which program they need, which takes the
    host longer than the launch itself. Here it is asked once for each kind. Launchers make kinds in functions
    with a `functools.lru_cache`, whose arguments are therefore all that the program and its grid depend on:
    dtypes and strides (`layouts`), and every number. Whether 16 divides an address stays Triton's question:
    a program is kept for tensors that are all so aligned.

    `triton.knobs` act on the first launch of a kind; hooks on launches act on all.

    Args:
        programs: How many are launched, perhaps none.
        strides: Of each tensor that has some: of samples, heads and rows.
        num_others: Number of tensors that follow without strides.
        numbers: What follows the tensors in the kernel's signature.
        constants: What the kernel is compiled for.
    """

    def __init__(
        self,
        programs: int,
        strides: Sequence[tuple[int, ...]],
        num_others: int,
        numbers: Sequence[float],
        constants: Mapping[str, Any],
    ) -> None:
        self._programs = programs
        self._others = slice(4 * len(strides), 4 * len(strides) + num_others)
        strided: list[Any] = [part for of_one in strides for part in (None, *of_one)]
        self._arguments: list[Any] = [*strided, *[None] * num_others, *numbers]
        self._constants = constants
        self._found: tuple[Any, Callable[..., None], tuple[Any, ...]] | None = None

    def __call__(self, kernel: Any, strided: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        """Launch `kernel`.

        Args:
            kernel: What is launched.
            strided: Tensors that are followed by their strides in its signature.
            others: Tensors that are not; the last one, the coins, may have any address.
        """
        if self._programs == 0:
            return
        arguments = self._arguments.copy()
        arguments[: self._others.start : 4] = strided
        arguments[self._others] = others
        aligned = _REMEMBERS and _all_aligned(strided) and _all_aligned(others[:-1])
        found = self._found
        if aligned and found is not None and found[0] is kernel and not kernel.pre_run_hooks:
            _, run, constants = found
            run(*arguments, *constants)
            return
        program = kernel[(self._programs,)](*arguments, **self._constants)
        if aligned and isinstance(program, CompiledKernel):  # which the interpreter has none of
            constants = tuple(self._constants[name] for name in kernel.arg_names[len(arguments) :])
            self._found = kernel, program[self._programs, 1, 1], constants


def layouts(*tensors: Tensor) -> tuple[Layout, ...]:
    """What a program depends on in tensors, apart from their addresses: dtypes and strides."""
    return tuple([(t.dtype, t.stride()) for t in tensors])


def strides_of(tensors: Sequence[Layout]) -> list[tuple[int, ...]]:
    """What kernels take of them: the strides of samples, heads and rows."""
    return [strides[:3] for _, strides in tensors]


def _all_aligned(tensors: Sequence[Tensor]) -> bool:
    for tensor in tensors:  # noqa: SIM110, a generator takes longer
        if tensor.data_ptr() % 16:
            return False
    return True


def empty_token_major(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Allocate `[B, H, N, D]` that lies as `[B, N, H, D]` in memory, so that merging heads is a view."""
    _, heads, length, head_dim = shape
    row = heads * head_dim
    return like.new_empty_strided(shape, (max(length, 1) * row, head_dim, row, 1))


def stride_unit(*tensors: Tensor) -> int:
    """What the strides of samples and heads are multiples of: 8 elements where that must be said, else 1.

    Of an argument Triton asks only whether 16 divides it. Heads of 72 or 88 start at multiples of 16 bytes,
    but it would load them element by element.
    """
    if tensors[0].shape[-1] % 16 == 0:
        return 1
    strides = (stride for t in tensors if t.numel() > 0 for stride in t.stride()[:2])
    return 8 if all(stride % 8 == 0 for stride in strides) else 1


def with_unit_stride(x: Tensor) -> Tensor:
    """`x`, copied where its last stride is not one, as that of an expanded gradient."""
    return x if x.stride(-1) == 1 else x.contiguous()


def on_device_of(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make the GPU the current one: Triton launches there."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)
