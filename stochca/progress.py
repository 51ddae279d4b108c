"""What surrounds the loop of a run: its running means, its log, and the signals that stop it."""

import contextlib
import dataclasses
import os
import secrets
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stochca.checkpoint import write_atomically
from stochca.config import RunOptions
from stochca.distributed import World
from stochca.signals import Noted, say

Log = Callable[[dict[str, Any]], None]

WANDB_ID = "wandb_id.txt"


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


class StopRequest(Noted):
    """A signal that ends the run after the step at work; a later one acts at once.

    One within a second is the same request: a scheduler signals a process, and its parent passes that on.

    Attributes:
        signum: The signal that came, 0 before.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._came_at = 0.0

    def __bool__(self) -> bool:
        return self.signum != 0

    def note(self, signum: int) -> None:
        """Remember the signal, or let a later one act."""
        if not self:
            self.signum, self._came_at = signum, time.monotonic()
            say(signum, "saving after the step at work")
        elif time.monotonic() - self._came_at > 1:
            signal.signal(signum, self.previous[signal.Signals(signum)])
            os.kill(os.getpid(), signum)


class RunningMeans:
    """Sums since the last evaluation; losses are added up on the device, which nobody waits for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.terms: dict[str, Tensor] = {}
        self.images = 0
        self.batches = 0
        self.source = 0.0
        self.seconds = 0.0

    def add(self, terms: Mapping[str, Tensor], images: int, source_fraction: float) -> None:
        """Count a batch by its mean loss and its terms, its images and the source's blocks that ran."""
        for name, term in terms.items():
            self.terms[name] = self.terms.get(name, 0) + term.detach().float() * images
        self.images += images
        self.batches += 1
        self.source += source_fraction

    def means(self, world: World) -> dict[str, float]:
        """Means per image or batch over all processes, and the seconds that they took."""
        start = time.perf_counter()
        # One transfer, which waits for the device.
        sums = torch.stack([*self.terms.values()]).double().cpu() if self.terms else torch.zeros(0)
        self.seconds += time.perf_counter() - start
        counts = torch.tensor([self.images, self.batches, self.source], dtype=torch.float64)
        *losses, images, batches, source = world.sum(torch.cat([sums.double(), counts])).tolist()
        return {
            **{name: loss / max(images, 1) for name, loss in zip(self.terms, losses, strict=True)},
            "source_fraction": source / max(batches, 1),
            "images_per_second": images / max(self.seconds, 1e-9),
            "seconds": self.seconds,
        }

    def state(self) -> dict[str, Any]:
        """What `restore` takes, in Python's own types."""
        terms = {name: term.item() for name, term in self.terms.items()}
        return {
            "terms": terms,
            **{name: vars(self)[name] for name in ("images", "batches", "source", "seconds")},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        vars(self).update(state)
        self.terms = {
            name: torch.tensor(term, dtype=torch.float32, device=self.device)
            for name, term in state["terms"].items()
        }


@contextlib.contextmanager
def loggers(options: RunOptions, output: Path, last_step: int) -> Iterator[Log]:
    """Log evaluations to TensorBoard and to Weights & Biases, where they are asked for.

    Args:
        options: Of the run.
        output: Its folder.
        last_step: Of the last evaluation before this start, -1 if there was none: what an interrupted run
            logged after it is dropped, or not logged again.

    Raises:
        ValueError: A package is not installed, or Weights & Biases lets nobody in.
    """
    with contextlib.ExitStack() as stack:
        logs = []
        if options.log_tensorboard:
            logs.append(stack.enter_context(_tensorboard(output / "tensorboard", last_step)))
        if options.log_wandb:
            logs.append(stack.enter_context(_wandb(options, output)))

        def log(row: dict[str, Any]) -> None:
            for each in logs:
                each(row)

        yield log


@contextlib.contextmanager
def _tensorboard(folder: Path, last_step: int) -> Iterator[Log]:
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

    with SummaryWriter(folder, purge_step=last_step + 1) as writer:
        yield log


@contextlib.contextmanager
def _wandb(options: RunOptions, output: Path) -> Iterator[Log]:
    try:
        import wandb
    except ImportError as error:
        raise ValueError(
            f"--log-wandb needs Weights & Biases: pip install stochca[wandb] ({error})"
        ) from error
    # Of a run of its own for each run of ours, which a resumed one goes on in.
    id_file = output / WANDB_ID
    if options.resume is None or not id_file.is_file():

        def write(file: Path) -> None:
            file.write_text(secrets.token_hex(8))

        write_atomically(id_file, write)
    try:
        run = wandb.init(
            project=options.wandb_project or "stochca",
            name=output.name,
            id=id_file.read_text(),
            resume="allow",
            dir=output,
            config=dataclasses.asdict(options),
        )
    except wandb.Error as error:
        raise ValueError(f"--log-wandb: {error}") from error
    with run:
        yield lambda row: run.log(row, step=row["step"])
