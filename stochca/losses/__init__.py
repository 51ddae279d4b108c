"""Losses beside cross-entropy, by name: composable, and each says what it reads of target and source."""

import difflib
import inspect
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from stochca.losses.base import Companion, Step
from stochca.losses.bss import BSS
from stochca.losses.cotuning import CoTuning
from stochca.losses.distillation import Distillation, FeatureDistillation
from stochca.losses.l2sp import L2SP
from stochca.losses.miro import MIRO
from stochca.model import StochCA

__all__ = [
    "BSS",
    "L2SP",
    "LOSSES",
    "MIRO",
    "CoTuning",
    "Companion",
    "Distillation",
    "FeatureDistillation",
    "Step",
    "create_losses",
    "read_source_head",
]

LOSSES: dict[str, type[Companion]] = {
    loss.name: loss for loss in (L2SP, BSS, CoTuning, MIRO, Distillation, FeatureDistillation)
}


def create_losses(specs: Sequence[str | dict[str, dict[str, Any] | None]], model: StochCA) -> nn.ModuleList:
    """Create losses from their names and options.

    Args:
        specs: For each loss its name, or its name with its options: `["bss", {"miro": {"weight": 1.0}}]`.
        model: Target and source, before the first step; the source has its pretrained head where a loss asks
            for its logits.

    Returns:
        The `Companion`s, in the order of `specs`.

    Raises:
        ValueError: A loss or an option is unknown, out of range or given twice, or the model cannot serve it.
        ImportError: A loss needs a package that is missing.
    """
    if isinstance(specs, str) or not isinstance(specs, Sequence):
        raise ValueError(f"losses must be a list, got {specs!r}")
    losses: dict[str, Companion] = {}
    for spec in specs:
        name, options = _name_and_options(spec)
        if name not in LOSSES:
            raise ValueError(f"unknown loss {name!r}{_nearest(name, LOSSES)}")
        if name in losses:
            raise ValueError(f"losses must differ, got {name} twice")
        _, *valid = inspect.signature(LOSSES[name]).parameters
        for option in options:
            if option not in valid:
                raise ValueError(f"{name} has no option {option!r}{_nearest(option, valid)}")
        losses[name] = LOSSES[name](model, **options)
    return nn.ModuleList(losses.values())


def read_source_head(specs: Sequence[str | dict[str, dict[str, Any] | None]]) -> bool:
    """Whether any of these losses reads what the source's own head says, which it then has to have kept."""
    found = [LOSSES.get(_name_and_options(spec)[0], Companion) for spec in specs]
    return any(loss.reads_source_logits or loss.fits_source_logits for loss in found)


def _name_and_options(spec: Any) -> tuple[Any, dict[Any, Any]]:
    if isinstance(spec, str):
        return spec, {}
    if not isinstance(spec, dict) or len(spec) != 1:
        raise ValueError(f"a loss must be a name, or one name with its options, got {spec!r}")
    ((name, options),) = spec.items()
    if options is not None and not isinstance(options, dict):
        raise ValueError(f"the options of {name} must be names with values, got {options!r}")
    return name, options or {}


def _nearest(name: Any, valid: Iterable[str]) -> str:
    valid = list(valid)
    near = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.0)
    return f": did you mean {near[0]!r}? Valid are {', '.join(valid)}"
