"""Faults planted on purpose, each of which the ordinary tests have to notice."""

import atexit
import functools
from collections.abc import Callable, Iterator

from tests.mutants.__main__ import MUTANTS
from tests.mutants.mutant import Mutant, Workshop
from tests.scorecard.row import Case, Figures

SHORT, ITS_TEST = "fastest_rank_is_waited_for", ("tests/test_scaling.py", "-k", "expected_maximum")


def cases(long: bool) -> Iterator[Case]:
    if not long:
        yield Case("one fault and none", _one_and_none)
        return
    for tests in dict.fromkeys(mutant.tests for mutant in MUTANTS):
        yield Case(f"no fault, {' '.join(tests)}", _unharmed(tests))
    for mutant in MUTANTS:
        yield Case(mutant.name, _planted(mutant))


@functools.cache
def _workshop() -> Workshop:
    """One for all cases of a process."""
    workshop = Workshop()
    atexit.register(workshop.close)
    return workshop


def _planted(mutant: Mutant) -> Callable[[], Figures]:
    def check() -> Figures:
        assert _workshop().noticed(mutant), f"no test of {' '.join(mutant.tests)} fails"
        return {}

    return check


def _unharmed(tests: tuple[str, ...]) -> Callable[[], Figures]:
    """Tests that fail in the copy whatever is planted would count every fault as noticed."""

    def check() -> Figures:
        failure = _workshop().failure(tests)
        assert failure is None, f"{failure} where nothing is planted"
        return {"cases": 0}

    return check


def _one_and_none() -> Figures:
    """A fault is noticed by its tests; what changes nothing, planted in its place after it, is not."""
    mutant = next(mutant for mutant in MUTANTS if mutant.name == SHORT)._replace(tests=ITS_TEST)
    with Workshop(preloaded=("pytest", "torch")) as workshop:
        assert workshop.noticed(mutant)
        assert workshop.noticed(mutant._replace(new=f"({mutant.old})")) is None
    return {"cases": 2}
