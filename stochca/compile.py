"""Compilation of a function that runs in a few distinct ways, each as often as there are layers."""

import itertools
import types
from collections.abc import Callable
from typing import Any

import torch

_NUMBERS = itertools.count()
_VALUES = (bool, str, int, type(None))


class CompiledPerCase:
    """A function compiled once for each case of its arguments, all layers sharing each case.

    A case is the values of the bools, strings, ints and Nones among the arguments, and the types of the
    others. torch limits how often one function is compiled, over everything in the process that calls it,
    and then runs it eagerly: each case of each instance is a function of its own, whose graphs differ in
    shapes alone.

    Args:
        function: What is compiled; a plain function.
        args: Go to `torch.compile`.
        kwargs: Go to `torch.compile`.
    """

    def __init__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        self._function = function
        self._compile = lambda copy: torch.compile(copy, *args, **kwargs)
        self._cases: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def __call__(self, *args: Any) -> Any:
        """Run the function; compile it if the case is new."""
        case = tuple([a if isinstance(a, _VALUES) else type(a) for a in args])
        compiled = self._cases.get(case)
        if compiled is None:
            compiled = self._cases[case] = self._compile(_copy(self._function))
        return compiled(*args)


def _copy(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with a code object and a name of its own.

    By the one torch counts compilations, by the other it remembers which sizes have changed.
    """
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_NUMBERS)}")
    return types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__)
