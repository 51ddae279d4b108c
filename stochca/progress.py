"""What surrounds the loop of a run: its running means, its log, and the signals that stop it."""

import contextlib
import os
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Log = Callable[[dict[str, Any]], None]


class Interrupted(Exception):
    """A signal stopped the run, which can be resumed.

    Args:
        signum: The signal.
        step: Steps done.
        output: Folder of the run.
    """

    def __init__(self, signum: int, step: int, output: Path) -> None:
        self.signum, self.output = signum, output
        super().__init__(
            f"stopped by {signal.Signals(signum).name} after step {step}; "
            f"continue with: stochca finetune --resume {shlex.quote(str(output))}"
        )


class StopRequest:
    """Notes SIGINT and SIGTERM, while it is entered, instead of dying of them; a second one acts at once.

    Attributes:
        signum: The signal that came, 0 before.
    """

    def __init__(self) -> None:
        self.signum = 0

    def __bool__(self) -> bool:
        return self.signum != 0

    def __enter__(self) -> "StopRequest":
        # Python leaves signals to the main thread.
        is_main = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGINT, signal.SIGTERM) if is_main else ()
        self._previous = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, signum: int, _frame: object) -> None:
        self.signum = signum
        number = signal.Signals(signum)
        signal.signal(number, self._previous[number])
        # To the descriptor of stderr: the signal may have come in the middle of a print.
        os.write(2, f"\n{number.name}: saving after the step at work\n".encode())


class RunningMeans:
    """Sums since the last evaluation; the loss is added up on the device, which nobody waits for."""

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros((), device=device)
        self.images = 0
        self.batches = 0
        self.source = 0.0
        self.seconds = 0.0

    def add(self, loss: Tensor, images: int, source_fraction: float) -> None:
        """Count a batch by its mean loss, its images and the share of the source's blocks that ran."""
        self.loss += loss * images
        self.images += images
        self.batches += 1
        self.source += source_fraction

    def means(self) -> dict[str, float]:
        """Means per image or batch, and the seconds that they took."""
        start = time.perf_counter()
        loss = self.loss.item()  # waits for the device
        self.seconds += time.perf_counter() - start
        return {
            "loss": loss / max(self.images, 1),
            "source_fraction": self.source / max(self.batches, 1),
            "images_per_second": self.images / max(self.seconds, 1e-9),
            "seconds": self.seconds,
        }

    def state(self) -> dict[str, Any]:
        """What `restore` takes, in Python's own types."""
        return {**vars(self), "loss": self.loss.item()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        vars(self).update({**state, "loss": torch.full_like(self.loss, state["loss"])})


@contextlib.contextmanager
def tensorboard(folder: Path | None, step: int) -> Iterator[Log]:
    """Log evaluations to TensorBoard.

    Args:
        folder: Where to; None logs nothing.
        step: Where the run starts: what an interrupted run logged after it is dropped.

    Raises:
        ValueError: TensorBoard is not installed.
    """
    if folder is None:
        yield lambda row: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            f"--log-tensorboard needs TensorBoard: pip install stochca[tensorboard] ({error})"
        ) from error

    def log(row: dict[str, Any]) -> None:
        for name, value in row.items():
            writer.add_scalar(name, value, row["step"])
        writer.flush()

    with SummaryWriter(folder, purge_step=step + 1) as writer:
        yield log
