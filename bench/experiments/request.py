"""A launch that has not happened: it can be run, or compiled for a GPU that is not there."""

import re
from typing import Any, NamedTuple

from torch import Tensor

from bench.ahead import compile_launch


class Request(NamedTuple):
    """What a launcher asks for.

    Args:
        kernel: A Triton or Gluon kernel.
        programs: How many run.
        arguments: Tensors, strides, sizes and scalars.
        constants: What it is compiled for, with warps and stages.
        out: Where the result will be.
    """

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    out: Tensor

    def run(self) -> Tensor:
        """Launch it."""
        self.kernel[(self.programs,)](*self.arguments, **self.constants)
        return self.out

    def figures(self, gpu: str) -> dict[str, int]:
        """Compile it for `gpu`, as in "sm_90", and count what matters in its program."""
        figures, text = compile_launch(self.kernel, self.arguments, self.constants, gpu)
        counted = {
            "tcgen05": r"tcgen05\.mma",
            "cp_async": r"cp\.async\.c[ag]",
            "tma": r"cp\.async\.bulk\.tensor",
        }
        # What the warps that multiply may have, where registers are handed out while the program runs.
        later = max(map(int, re.findall(r"setmaxnreg\S+\s+(\d+)", text)), default=0)
        return {
            **figures,
            "registers_later": later,
            **{name: len(re.findall(pattern, text)) for name, pattern in counted.items()},
        }
