"""The short form of the scorecard: a few cases of each row."""

import pytest

from tests.scorecard.row import Case
from tests.scorecard.rows import ROWS

SHORT = [
    pytest.param(case, id=f"{row.id}-{case.name}", marks=[pytest.mark.gpu] if row.device == "gpu" else [])
    for row in ROWS
    for case in row.list(long=False)
]


@pytest.mark.parametrize("case", SHORT)
def test_a_case_holds(case: Case):
    case.check()
