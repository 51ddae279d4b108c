"""What is tuned together: a kernel, the row of the table to find, and shapes that decide it."""

from typing import NamedTuple, get_args

from bench.kernels.shapes import DINOV2_B, SHAPES, VIT_B_224, VIT_B_448, VIT_L_14, Shape
from stochca_kernels.tiles import Kernel, Tiles, plans

KERNELS: tuple[Kernel, ...] = get_args(Kernel)
VIT_H_14 = SHAPES[-1]
# No ViT of ours has such heads, but the same row serves them: it has to compile.
WIDEST = Shape("none, head size 128", 16, 785, 12, 128)


class Group(NamedTuple):
    """One row of the table.

    Args:
        kernel: Which kernel.
        column: 0 for head sizes up to 64 or up to 768 channels, 1 for larger ones.
        most_keys: The row's `max_keys`.
        shapes: Those that decide it.
        also: Those that it has to compile for as well.
    """

    kernel: Kernel
    column: int
    most_keys: int | None
    shapes: tuple[Shape, ...]
    also: tuple[Shape, ...] = ()

    @property
    def name(self) -> str:
        """As in `fwd column 0 up to 208 keys`."""
        keys = "any number of keys" if self.most_keys is None else f"up to {self.most_keys} keys"
        return f"{self.kernel} column {self.column} {keys}"

    def present(self, gpu: str, arithmetic: str) -> Tiles | None:
        """What the table has for the longest of its shapes."""
        shape = max(self.shapes, key=lambda shape: shape.length)
        size = shape.width if self.kernel.startswith("tokens") else shape.head_dim
        return next(iter(plans(self.kernel, gpu, arithmetic, size, shape.length)), None)


def groups(kernel: Kernel, quick: bool) -> list[Group]:
    """The rows of one kernel; `quick` leaves one shape to each."""
    if kernel == "dqkv":
        found = [Group(kernel, 0, 256, (VIT_B_224,))]
    elif kernel.startswith("tokens"):
        found = [
            Group(kernel, 0, None, (VIT_B_448, VIT_B_224, DINOV2_B)),
            Group(kernel, 1, None, (VIT_H_14, VIT_L_14)),
        ]
    else:
        found = [
            Group(kernel, 0, 208, (VIT_B_224,)),
            Group(kernel, 0, 272, (VIT_L_14,)),
            Group(kernel, 0, None, (VIT_B_448, DINOV2_B)),
            Group(kernel, 1, None, (VIT_H_14,), (WIDEST,)),
        ]
    return [group._replace(shapes=group.shapes[:1]) if quick else group for group in found]
