"""Nothing depends on which program runs first: repeats are equal bit by bit, whatever else the GPU does."""

import pytest
import torch

from tests.gpu.paths import DEVICE, PATHS, Case, draw, gpu, run

pytestmark = [*gpu, pytest.mark.usefixtures("poisoned")]

REPEATS = 100
CASES = [
    *(case._replace(batch=16) for case in PATHS),
    Case("pair", length=785, batch=16),
    # Programs that take turns share a slot of scratch memory.
    Case("fused", length=785, batch=96),
    # Parts of a sum by several programs, and gradients that several launches add up.
    Case("tokens", length=785, heads=12, channels=768, rows=2),
    *(case._replace(arithmetic="ieee") for case in PATHS if case.path in ("pair", "tokens")),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("busy", [False, True], ids=["alone", "beside_other_work"])
def test_a_hundred_repeats_are_bitwise_equal(case, busy):
    tensors = draw(case)
    first = run(case, tensors)
    assert all(t.isfinite().all() for t in first.values())
    work = torch.ones(4096, 4096, dtype=torch.bfloat16, device=DEVICE) if busy else None
    beside = torch.cuda.Stream() if busy else None
    differs = {name: torch.zeros((), dtype=torch.bool, device=DEVICE) for name in first}
    for _ in range(REPEATS):
        if work is not None:
            with torch.cuda.stream(beside):
                work @ work
        for name, t in run(case, tensors).items():
            differs[name] |= (t != first[name]).any()
    assert [name for name, differ in differs.items() if differ] == []
