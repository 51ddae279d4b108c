"""Errors on a GPU, in every arithmetic, against float64 and by the measure of eager torch."""

from itertools import product

import pytest
import torch

from tests.gpu.paths import Case, assert_accurate, cast, draw, gpu, run
from tests.kernels.test_triton import inside_nan

pytestmark = [*gpu, pytest.mark.usefixtures("poisoned")]

COINS = ("self", "cross", "mixed")

# Resident and streamed rows of keys, of one kind of program each: N = 50; 197; 257 and 272; and all above.
BF16 = [
    *(Case("pair", coin, length) for length, coin in product((50, 197, 257, 785), COINS)),
    *(Case("pair", "mixed", length) for length in (272, 273, 1370)),
    *(Case("split", coin) for coin in COINS),
    *(Case("packed", coin) for coin in COINS),
    Case("packed", "mixed", 785),
    *(Case("fused", coin, length) for length, coin in product((197, 785), COINS)),
    *(Case("fused", "mixed", length) for length in (50, 257, 272, 273, 1370)),
    # More heads than programs with a slot of scratch memory: each takes several.
    Case("fused", "mixed", 785, batch=96),
    *(Case("tokens", coin) for coin in COINS),
    *(Case("tokens", "mixed", length) for length in (50, 272, 785, 1370)),
    Case("tokens", "mixed", heads=12, channels=768),
    # More rows of all heads than one block.
    Case("tokens", "self", heads=12, channels=768, rows=2),
    Case("tokens", "mixed", heads=12, channels=768, rows=2),
]
HEAD_SIZES = [
    *(Case("pair", "mixed", head_dim=size) for size in (16, 72, 80, 88, 128)),
    *(Case("fused", "mixed", head_dim=size) for size in (16, 80, 128)),
    *(Case("tokens", "mixed", head_dim=size) for size in (16, 80)),
]
FP16 = [
    *(Case("pair", "mixed", length, arithmetic="fp16") for length in (197, 785)),
    *(Case(path, "mixed", arithmetic="fp16") for path in ("fused", "tokens")),
]
FP32 = [
    case
    for arithmetic in ("ieee", "tf32")
    for case in (
        Case("pair", "mixed", arithmetic=arithmetic),
        Case("packed", "mixed", 273, 80, arithmetic=arithmetic),
        Case("fused", "mixed", arithmetic=arithmetic),
        Case("tokens", "mixed", arithmetic=arithmetic),
    )
]


@pytest.mark.parametrize("case", [*BF16, *HEAD_SIZES, *FP16, *FP32], ids=str)
def test_error_is_at_most_twice_that_of_eager_torch(case):
    tensors = {name: t if name == "coins" else inside_nan(t) for name, t in draw(case).items()}
    actual = run(case, tensors)
    assert all(t.isfinite().all() for t in actual.values())
    assert_accurate(case, actual, tensors)


@pytest.mark.parametrize("path", ["pair", "fused", "tokens"])
def test_tf32_is_used_where_torch_may_use_it_and_nowhere_else(path):
    errors = {}
    for arithmetic in ("ieee", "tf32"):
        case = Case(path, arithmetic=arithmetic)
        tensors = draw(case)
        actual, exact = run(case, tensors), run(case, cast(tensors, torch.float64), "reference")
        errors[arithmetic] = max(
            ((actual[name] - t).abs().max() / t.abs().max()).item() for name, t in exact.items()
        )
    assert errors["ieee"] < 1e-5
    assert 10 * errors["ieee"] < errors["tf32"] < 1e-1
