"""The short form of the scorecard: a few cases of each row."""

import os
from collections.abc import Iterator

import pytest
import torch

from tests.scorecard.row import Case, Row
from tests.scorecard.rows import ROWS

GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
)
# Rows that kill, compile or measure by themselves, which a measurement of lines would be in the way of.
UNMEASURED = ("R4", "R7", "R9", "R10", "R14", "R15", "R16", "R18", "R19", "R20")
NO_LINES = pytest.mark.skipif("COVERAGE_FILE" in os.environ, reason="lines of this row are not measured")
OURS = ("bench", "stochca", "stochca_kernels", "tests")


def short(row: Row) -> Iterator:
    """The cases of one row, or why there are none."""
    marks = [*(GPU if row.device == "gpu" else ()), *([NO_LINES] if row.id in UNMEASURED else ())]
    try:
        cases = row.list(long=False)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in OURS:
            raise
        missing = pytest.mark.skip(reason=f"needs {error.name}")
        yield pytest.param(None, id=row.id, marks=[*marks, missing])
        return
    for case in cases:
        yield pytest.param(case, id=f"{row.id}-{case.name}", marks=marks)


# Tracing looks at the .grad of tensors that have none, and makes an instance of autograd functions.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("case", [case for row in ROWS for case in short(row)])
def test_a_case_holds(case: Case):
    case.check()
