"""What torch asks of operators: to do as their schemas say, and to have the gradients of their results."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from tests.gpu import paths
from tests.gpu.paths import PATHS
from tests.scorecard.operator_calls import Call, attend, interpreted, lay, tensors_of
from tests.scorecard.row import Case, Figures

UTILITIES = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
OPERATORS = (
    "attention_forward", "attention_backward", "packed_attention_backward",
    "projected_attention_forward", "projected_attention_backward", "packed_projected_attention_backward",
    "tokens_forward", "tokens_backward",
)  # fmt: skip
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
REFUSED = {
    "triton": 'impl="triton" has no second derivative',
    "sdpa": "derivative for aten::.* is not implemented",
}
# Every form of either side, under every coin.
FORMS = [
    Call("reference", torch.float64, batch=2, heads=1, lengths=lengths, own=own, source=source, **more)
    for own, source, lengths, more in (
        ("pair", "none", (2, 3, 1, 1), {}),
        ("none", "pair", (2, 1, 3, 1), {"coins": True}),
        ("pair", "pair", (2, 3, 2, 1), {"coins": (True, False), "source_q": "given"}),
        ("pair", "pair", (2, 3, 2, 1), {"coins": True}),
        ("packed", "projection", (3, 3, 2, 1), {"coins": (True, False), "widths": (3, 3)}),
        ("projection", "pair", (2, 3, 2, 1), {"coins": (True, False), "widths": (3, 3)}),
        ("projection", "projection", (2, 3, 2, 1), {"widths": (3, 2), "source_q": "projected"}),
        ("projection", "none", (16, 2, 1, 1), {"widths": (3, 3), "has_bias": False}),
    )
]


def cases(long: bool) -> Iterator[Case]:
    layouts, dtypes = ("contiguous", "permuted"), tuple(DTYPES)
    for name in OPERATORS:
        for optional, layout, dtype in itertools.product((True, False), layouts, dtypes):
            if long or (name, optional, layout, dtype) == ("tokens_backward", True, "permuted", "fp16"):
                how = f"{'all' if optional else 'required'} arguments, {layout}, {dtype}"
                arguments = (name, optional, layout, DTYPES[dtype])
                yield Case(f"{name}: {how}", lambda arguments=arguments: _opcheck(*arguments))
    yield Case("every operator is checked", _every_operator_is_checked)
    for i, call in enumerate(FORMS):
        if long or i in (2, 5):
            yield Case(f"gradients of the reference, form {i}", lambda call=call: _gradcheck(call))
    for path in PATHS:
        case = path._replace(batch=2, heads=1, length=5, head_dim=16, channels=16, arithmetic="fp16")
        yield Case(f"second order of {path.path}, triton", lambda case=case: _refused(case, "triton"))
    case = PATHS[0]._replace(batch=2, heads=1, length=5, head_dim=16, arithmetic="ieee")
    yield Case("second order of pair, sdpa", lambda: _refused(case, "sdpa"))


def _every_operator_is_checked() -> None:
    import stochca_kernels.ops  # noqa: F401, registers them

    registered = [name.split("::") for name in torch._C._dispatch_get_all_op_names()]
    names = {name for namespace, name in registered if namespace == "stochca"}
    assert names == set(OPERATORS), f"registered are {sorted(names)}"


def _opcheck(name: str, optional: bool, layout: str, dtype: torch.dtype) -> Figures:
    """All four utilities, on tensors of which none requires a gradient: as the autograd functions call it.

    Which give the gradients, so that the operator itself has no formula for them.
    """
    import stochca_kernels.ops  # noqa: F401, registers them

    with interpreted():
        operator = getattr(torch.ops.stochca, name)
        arguments = _arguments(name, optional, layout, dtype)
        found = torch.library.opcheck(operator, arguments, test_utils=UTILITIES)
    assert set(found) == set(UTILITIES), found
    assert set(found.values()) == {"SUCCESS"}, found
    return {"cases": len(found)}


def _arguments(name: str, optional: bool, layout: str, dtype: torch.dtype) -> tuple[Any, ...]:
    """Of one operator, with everything that it may be given or with nothing that it need not be."""
    generator = torch.Generator().manual_seed(0)
    batch, heads, length, source_length, size, width = 2, 2, 5, 4, 16, 24

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return lay(torch.randn(shape, generator=generator).to(dtype), layout)

    def given(tensor: Tensor) -> Tensor | None:
        return tensor if optional else None

    coins = given(torch.tensor([True, False]))
    ops = torch.ops.stochca
    if name.startswith("tokens"):
        factors = given(draw(batch, source_length, dtype=torch.float32).abs())
        source = (given(draw(batch, source_length, width)), factors, coins)
        queries = draw(batch, 3, width)
        forward = (queries, draw(batch, length, width), None, *source, 0.25)
        if name == "tokens_forward":
            return forward
        return (draw(batch, 3, width), *forward[:-1], *ops.tokens_forward(*forward), 0.25, optional)
    qkv = draw(batch, length, 3, heads, size)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    if "projected" in name:
        rows = 2 * heads * size
        source = (
            draw(batch, source_length, width), draw(rows, width), given(draw(rows)),
            given(draw(batch, source_length, dtype=torch.float32).abs()), coins,
        )  # fmt: skip
        asking = (None, given(draw(heads * size, width)), given(draw(heads * size)))
        pair = (k, v) if optional or "packed" in name else (None, None)
        forward = (q, *pair, *source, *asking, 0.25, True)
        run = ops.projected_attention_forward
    else:
        source = (*(given(draw(batch, heads, source_length, size)) for _ in "kv"), coins)
        pair = k, v
        forward = (q, *pair, *source, given(draw(batch, heads, 3, size)), 0.25, True)
        run = ops.attention_forward
    if name.endswith("forward"):
        return forward
    out, lse, _ = run(*forward)
    grad = draw(batch, heads, length, size)
    if name.startswith("packed"):
        return (grad, qkv, *source, out, lse, 0.25)
    return (grad, q, *pair, *source, out, lse, 0.25, pair[0] is not None)


def _gradcheck(call: Call) -> Figures:
    tensors = tensors_of(call)
    leaves = [tensors[name].detach().clone().requires_grad_() for name in call.leaves]

    def function(*values: Tensor) -> Tensor:
        return attend(call, tensors | dict(zip(call.leaves, values, strict=True)), "reference")[0]

    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves, fast_mode=True)
    return {"cases": 2}


def _refused(case: paths.Case, impl: str) -> None:
    """A gradient that is to be differentiated again: an error names what cannot, whoever raises it."""
    with interpreted(), paths.settings(case):
        tensors = paths.with_leaves(case, paths.draw(case, "cpu"))
        leaves = [tensors[name] for name in case.leaves]
        out = paths.call(case, tensors, impl)["out"]

        def twice() -> None:
            first = torch.autograd.grad(out.sum(), leaves, create_graph=True)
            torch.autograd.grad(sum(t.square().sum() for t in first), leaves)

        with pytest.raises(RuntimeError, match=REFUSED[impl]):
            twice()
