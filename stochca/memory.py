"""What would fit, where a step ran out of memory."""

import contextlib
import gc
from collections.abc import Sequence

import torch

from stochca.model import StochCA


def largest_fitting(model: StochCA, input_size: Sequence[int], batch_size: int) -> int:
    """Halve the batch until a step fits in memory.

    Args:
        model: Target and source, whose gradients are dropped.
        input_size: Of an image, `(3, H, W)`.
        batch_size: Images of the batch that did not fit.

    Returns:
        Images of a batch that fits, 0 if not even one does.
    """
    device, step = next(model.parameters()).device, model.coins.step
    try:
        while batch_size > 1:
            batch_size //= 2
            free_memory()
            model.coins.step = max(step - 1, 0)  # the coins of the step that did not fit
            with contextlib.suppress(torch.OutOfMemoryError):
                model(torch.zeros(batch_size, *input_size, device=device)).float().sum().backward()
                return batch_size
        return 0
    finally:
        model.coins.step = step
        model.zero_grad()


def free_memory() -> None:
    """Give back to the device what no tensor holds."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def advice(batch_size: int, fitting: int, accumulated: int) -> str:
    """What to change in a run that ran out of memory.

    Args:
        batch_size: Images of a batch, which were too many.
        fitting: As many fit, of `largest_fitting`.
        accumulated: Batches of a step.
    """
    less = "--recompute, --grad-checkpointing and --amp take less memory"
    if not fitting:
        return f"out of memory at --batch-size {batch_size}, and not even one image fits: {less}"
    batches = -(-batch_size // fitting) * accumulated
    return (
        f"out of memory at --batch-size {batch_size}; {fitting} fits: --batch-size {fitting} "
        f"--grad-accum-steps {batches} is a step of as many images; {less}"
    )
