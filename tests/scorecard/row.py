"""What a row of the scorecard is: a figure, its target and the cases that it counts."""

import importlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

Figures = Mapping[str, float]
Check = Callable[[], Figures | None]


class NotMeasuredError(Exception):
    """What a case needs is not here, such as the internet: it tells nothing of the code."""


class Case(NamedTuple):
    """One thing that is tried.

    Args:
        name: Of its own within the row; a run that is resumed leaves out the names that it has done.
        check: Raises where the case is off, and tells why; `NotMeasuredError` where that cannot be told.
            Returns figures with their units in their names, of which a row shows the largest of all cases.
            "cases" is how many it tried, 1 where absent.
    """

    name: str
    check: Check


@dataclass(frozen=True)
class Row:
    """A row of the scorecard.

    Args:
        id: "R1", or "R1-gpu" for what only a GPU can tell.
        figure: What is counted, as the page says it.
        target: What it should be, as the page says it.
        cases: "module.function" below `tests.scorecard`. The function takes whether the long form is wanted,
            and gives the cases; it is cheap, the work is in the cases.
        measures: Files and folders that the figure depends on, apart from the module of its cases.
        at_least: How many cases the long form has to count.
        allowed: Share of the cases that may be off.
    """

    id: str
    figure: str
    target: str
    cases: str
    measures: tuple[str, ...] = ("stochca", "stochca_kernels")
    at_least: int = 1
    allowed: float = 0.0

    @property
    def device(self) -> Literal["cpu", "gpu"]:
        return "gpu" if self.id.endswith("-gpu") else "cpu"

    @property
    def code(self) -> tuple[str, ...]:
        """What the figure depends on: once it changes, the figure is stale."""
        return (*self.measures, f"tests/scorecard/{self.cases.split('.')[0]}.py")

    def list(self, long: bool) -> list[Case]:
        """The cases of one form.

        Raises:
            ValueError: Two of them have one name.
        """
        module, function = self.cases.split(".")
        cases: Callable[[bool], Iterable[Case]] = getattr(
            importlib.import_module(f"tests.scorecard.{module}"), function
        )
        listed = list(cases(long))
        for name, count in Counter(case.name for case in listed).items():
            if count > 1:
                raise ValueError(f"{self.id} has {'two' if count == 2 else count} cases named {name}")
        return listed
