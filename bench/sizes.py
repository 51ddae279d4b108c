"""Sizes of what `bench.step` trains, without its memory, for whoever does arithmetic about it."""

from functools import cache
from typing import Any

import timm
import torch

from bench.cost import Size
from bench.step.workloads import NUM_CLASSES, Workload


def title(workload: Workload) -> str:
    """As in the tables."""
    return f"{workload.title}, B={workload.batch}"


def size_of(workload: Workload) -> Size:
    """Sizes of the model."""
    return _size(workload.model, workload.image_size, tuple(sorted(workload.kwargs.items())))


@cache
def _size(model: str, image_size: int | None, kwargs: tuple[tuple[str, Any], ...]) -> Size:
    options = {} if image_size is None else {"img_size": image_size}
    with torch.device("meta"):
        return Size.of(timm.create_model(model, num_classes=NUM_CLASSES, **options, **dict(kwargs)))
