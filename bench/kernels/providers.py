"""Who does the work of a path: the operator, and everybody that it is compared with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.kernels import attend
from bench.kernels.attend import Attend
from bench.kernels.paths import Pass, Path, Run, Tensors
from bench.kernels.shapes import FLEX_SHAPES, Shape

Results = dict[str, Tensor]
"""By name: "out", "source_out", and for a gradient "dq", "dweight" and so on."""

OURS, EAGER = "ours", "eager"


@dataclass(frozen=True)
class Provider:
    """Somebody who does the work of a path.

    Args:
        name: As in the results; that of the operator is `OURS`.
        run: From inputs to outputs.
        factor: How many times the error of eager torch is allowed.
    """

    name: str
    run: Run
    factor: float = 4.0


def providers(path: Path, shape: Shape) -> list[Provider]:
    """All of a path, the operator first."""
    rivals: dict[str, Attend] = {**attend.SDPA, EAGER: attend.eager}
    if path.flex and shape in FLEX_SHAPES:
        rivals["flex"] = attend.flex
    return [
        Provider(OURS, path.ours_with(path.impl), factor=2.0),
        *(Provider(name, run) for name, run in path.others.items()),
        *(Provider(name, path.rival_with(rival)) for name, rival in rivals.items()),
    ]


def bind(run: Run, tensors: Tensors, leaves: Sequence[str], which: Pass) -> Callable[[], Results]:
    """Make one pass a function without arguments, which can be repeated.

    Args:
        run: From inputs to outputs.
        tensors: The inputs, and "grad".
        leaves: Names of the inputs whose gradients are asked for.
        which: The pass. The forward that a "backward" needs runs here, once.
    """
    tensors = {name: t.detach().requires_grad_(name in leaves) for name, t in tensors.items()}

    def forward() -> Results:
        return dict(zip(("out", "source_out"), run(tensors), strict=False))

    def backward(out: Tensor) -> Results:
        wanted = [tensors[name] for name in leaves]
        grads = torch.autograd.grad(out, wanted, tensors["grad"], retain_graph=which == "backward")
        return {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}

    def both() -> Results:
        results = forward()
        grads = backward(results["out"])
        return {**{name: t.detach() for name, t in results.items()}, **grads}

    if which == "forward":
        return torch.no_grad()(forward)
    return both if which == "forward+backward" else partial(backward, forward()["out"])
