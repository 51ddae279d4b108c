"""What the losses refuse, each with what was wanted and what came."""

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from stochca.model import StochCA


def check_number(loss: str, option: str, value: Any, *, positive: bool = False) -> None:
    """Refuse what is no finite number, or one below its range.

    Raises:
        ValueError: `value` is no number, or negative; or zero where it is to be `positive`.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value < 0 or (positive and value == 0):
        range_ = "above 0" if positive else "of at least 0"
        raise ValueError(f"{loss}: {option} must be a number {range_}, got {value!r}")


def check_count(loss: str, option: str, value: Any) -> None:
    """Refuse what is no whole number of at least 1.

    Raises:
        ValueError: It is none.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{loss}: {option} must be a whole number of at least 1, got {value!r}")


def check_choice(loss: str, option: str, value: Any, choices: Sequence[str]) -> None:
    """Refuse what is none of the choices.

    Raises:
        ValueError: It is none of them.
    """
    if value not in choices:
        raise ValueError(f"{loss}: {option} must be one of {', '.join(choices)}, got {value!r}")


def resolve_taps(loss: str, taps: Any, model: StochCA) -> tuple[int, ...]:
    """Check taps, or choose them: before the blocks and after each quarter of them.

    Args:
        loss: The name of the loss that reads them.
        taps: After how many blocks tokens are read; None for (0, 3, 6, 9, 12) where there are 12 blocks.
        model: Whose blocks they count.

    Returns:
        The taps in ascending order.

    Raises:
        ValueError: They are no whole numbers from 0 to the depth of the model, each of them once.
    """
    depth = len(model.target.blocks)
    if taps is None:
        return tuple(sorted({depth * quarter // 4 for quarter in range(5)}))
    is_list = isinstance(taps, list | tuple) and len(taps) > 0
    if not is_list or not all(isinstance(tap, int) and not isinstance(tap, bool) for tap in taps):
        raise ValueError(f"{loss}: taps must be a list of whole numbers, got {taps!r}")
    if not 0 <= min(taps) <= max(taps) <= depth or len(set(taps)) < len(taps):
        raise ValueError(
            f"{loss}: taps must be different numbers from 0 to the depth of the model ({depth}), got {taps}"
        )
    return tuple(sorted(taps))


def classifier_of(loss: str, model: StochCA, role: str, at_least: int = 1) -> nn.Module:
    """The one classifier of target or source.

    Args:
        loss: The name of the loss that reads it.
        model: Target and source.
        role: "target" or "source".
        at_least: How many classes it must have.

    Raises:
        ValueError: There is none, there are two, or it has fewer classes.
    """
    vit = getattr(model, role)
    classifier = vit.get_classifier()
    if isinstance(classifier, tuple):
        raise ValueError(f"{loss} needs a {role} with one classifier, got {len(classifier)}")
    if vit.num_classes < at_least or not list(classifier.parameters()):
        classes = "a class" if at_least == 1 else f"{at_least} classes"
        raise ValueError(
            f"{loss} needs a {role} with a classifier of at least {classes}, "
            f"got a {type(classifier).__name__} of {vit.num_classes}"
        )
    return classifier
