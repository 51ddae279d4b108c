"""Mistakes in calls of `stochca_attention`."""

from collections.abc import Iterator
from typing import Any

import torch

from stochca_kernels import Projection, stochca_attention
from tests.scorecard.mistakes import Mistake


def mistakes() -> Iterator[Mistake]:
    """Kinds, shapes, dtypes, devices, layouts and sides that do not fit."""
    q, pair, source = _tensor(19), (_tensor(19), _tensor(19)), (_tensor(23), _tensor(23))
    x, weight = torch.ones(2, 19, 48), torch.ones(96, 48)

    def mistake(name: str, error: type[Exception], message: str, **changes: Any) -> Mistake:
        arguments = {"q": q, "kv": pair, "source_kv": source, "use_source": True, **changes}
        return Mistake(name, lambda: stochca_attention(**arguments), error, message)

    wrong, kind = ValueError, TypeError
    yield mistake("q is a list", kind, "q must be a tensor, got list", q=[1, 2])
    yield mistake("q has three axes", wrong, r"q must have shape \(B, H, Nq, D\).*got \(3, 19, 16\)", q=q[0])
    yield mistake("q of integers", wrong, r"q must be one of torch.float16.* got torch.int64", q=q.long())
    yield mistake("head size", wrong, "16 to 128 in steps of 8, got 12", q=q[..., :12])
    yield mistake("no heads", wrong, "q must have at least one head, got none", q=q[:, :0])
    yield mistake("stride", wrong, "q must have a unit last stride, got strides", q=_tensor(16).mT)
    yield mistake(
        "packed q of two", wrong, r"\(B, N, 3, H, D\), got \(2, 19, 2, 3, 16\)", q=torch.ones(2, 19, 2, 3, 16)
    )
    yield mistake(
        "packed q and kv", wrong, "kv must be None where q is packed", q=torch.ones(2, 19, 3, 3, 16)
    )
    yield mistake("kv is missing", wrong, "kv is None, but use_source is not True", kv=None, use_source=False)
    yield mistake(
        "source_kv is missing", wrong, "source_kv is None, but use_source is not False", source_kv=None
    )
    yield mistake(
        "kv is a list", kind, r"kv must be a pair \(k, v\), a Projection or None, got list", kv=[*pair]
    )
    yield mistake("kv of three", kind, "kv must be a pair .* got tuple", kv=(*pair, q))
    yield mistake("v is None", kind, r"kv\[1\] \(v\) must be a tensor, got NoneType", kv=(pair[0], None))
    yield mistake(
        "k of other heads",
        wrong,
        r"kv\[0\] \(k\) must have shape \(2, 3, any, 16\), got \(2, 2, 19, 16\)",
        kv=(pair[0][:, :2], pair[1]),
    )
    yield mistake(
        "v of other tokens",
        wrong,
        r"kv\[1\] \(v\) must have shape \(2, 3, 19, 16\), got \(2, 3, 18, 16\)",
        kv=(pair[0], pair[1][:, :, :18]),
    )
    yield mistake(
        "source of another batch",
        wrong,
        r"source_kv\[0\] \(k\) must have shape \(2, 3, any, 16\), got \(1, 3, 23, 16\)",
        source_kv=(source[0][:1], source[1][:1]),
    )
    yield mistake(
        "source of another head size",
        wrong,
        r"source_kv\[0\].* \(2, 3, any, 16\), got \(2, 3, 23, 8\)",
        source_kv=(source[0][..., :8], source[1]),
    )
    yield mistake(
        "no tokens",
        wrong,
        "source_kv must have at least one token to attend to, got none",
        source_kv=(source[0][:, :, :0], source[1][:, :, :0]),
    )
    yield mistake(
        "dtypes mixed",
        wrong,
        "source_kv.* must have q's dtype torch.float32, got torch.float16",
        source_kv=(source[0].half(), source[1].half()),
    )
    yield mistake(
        "devices mixed", wrong, "kv.* must be on q's device cpu, got meta", kv=(pair[0].to("meta"), pair[1])
    )
    yield mistake(
        "source requires grad",
        wrong,
        "the source is a constant, but one of its tensors requires grad: detach it",
        source_kv=(_tensor(23).requires_grad_(), source[1]),
    )
    yield mistake(
        "coin is a number", kind, "use_source must be a bool or a bool tensor, got builtins.int", use_source=1
    )
    yield mistake("coin is None", kind, "use_source must be a bool .* got builtins.NoneType", use_source=None)
    yield mistake(
        "coins of numbers",
        wrong,
        r"torch.bool tensor of shape \(2,\) on cpu, got torch.float32",
        use_source=torch.ones(2),
    )
    yield mistake(
        "coins of another batch",
        wrong,
        r"of shape \(2,\) on cpu, got torch.bool of shape \(3,\)",
        use_source=torch.ones(3, dtype=torch.bool),
    )
    yield mistake(
        "coins elsewhere",
        wrong,
        r"on cpu, got torch.bool of shape \(2,\) on meta",
        use_source=torch.ones(2, dtype=torch.bool, device="meta"),
    )
    yield mistake(
        "source_q without a pair",
        wrong,
        "source_q is given, but source_kv is None",
        source_kv=None,
        source_q=q,
        use_source=False,
    )
    yield mistake(
        "weight of a projection",
        wrong,
        r"kv.weight must have shape \(96, 48\), got \(48, 48\)",
        kv=Projection(x, weight[:48]),
    )
    yield mistake(
        "bias of a projection",
        wrong,
        r"kv.bias must have shape \(96\), got \(9,\)",
        kv=Projection(x, weight, torch.ones(9)),
    )
    yield mistake(
        "norm in an own projection",
        wrong,
        "kv.rstd must be None",
        kv=Projection(x, weight, None, torch.ones(2, 19)),
    )
    yield mistake("implementation", wrong, "impl must be one of .* got 'fastest'", impl="fastest")


def _tensor(tokens: int) -> torch.Tensor:
    return torch.ones(2, 3, tokens, 16)
