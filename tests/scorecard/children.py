"""The command line in processes of their own, forked from one that has imported everything."""

import atexit
import contextlib
import functools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.digest import ROOT
from tests.train.image_folder import TINY, write_images

# What goes wrong in a child: called in it with its end of a pipe, before the command.
Fault = Callable[[Any], object]

# Everything that has a state: dropout, stochastic depth, augmentation, mixing, coins and their schedule, the
# learned variances of a loss, accumulation, averages. 18 images in batches of 2, two to a step: 2 epochs of 5
# steps, and a checkpoint after each.
STATEFUL = {
    "model": "vit_tiny_patch16_224", "pretrained": False, "img_size": 32,
    "model_kwargs": {**TINY, "proj_drop_rate": 0.1}, "drop_path": 0.2, "p_schedule": [0.3, 0.7],
    "per": "sample", "losses": [{"miro": {"weight": 0.5}}, "l2_sp"], "reprob": 0.3, "aa": "rand-m5",
    "mixup": 0.3, "model_ema": True, "model_ema_decay": 0.5, "swad": True, "swad_converge": 1,
    "swad_tolerance": 1, "batch_size": 2, "grad_accum_steps": 2, "epochs": 2, "lr": 1e-3, "device": "cpu",
    "test_split": "validation", "recovery_interval": 1, "workers": 0,
}  # fmt: skip
STEPS = 10


class Child:
    """The command line in a process that leads a session of its own, as a shell's job does.

    Args:
        arguments: Of the command.
        log: File for what it prints.
        fault: What goes wrong in it.
    """

    def __init__(self, arguments: Sequence[str], log: Path, fault: Fault | None = None) -> None:
        self.log = log
        self.process, self.events = forked(_command, list(arguments), log, fault)
        self.pid = self.process.pid

    def next_event(self, seconds: float = 120) -> Any:
        """What the fault in the child sends next; None where the child has ended, or sends nothing."""
        try:
            return self.events.recv() if self.events.poll(seconds) else None
        except EOFError:
            return None

    def end(self, seconds: float = 120) -> int:
        """Wait for the end; the exit code, negative for a signal.

        Raises:
            AssertionError: It takes longer, and is killed.
        """
        code = self.join(seconds)
        if code is None:
            self.signal_all(signal.SIGKILL)
            self.join(seconds)
            raise AssertionError(f"still running after {seconds} s: {self.said()}")
        return code

    def join(self, seconds: float) -> int | None:
        """Wait for the end, at most so long; the exit code if it came."""
        self.process.join(seconds)
        return self.process.exitcode

    def signal(self, signum: int) -> None:
        os.kill(self.pid, signum)

    def signal_all(self, signum: int) -> None:
        """Signal the processes that load images too, as a terminal does."""
        os.killpg(self.pid, signum)

    def is_alone(self, seconds: float = 15) -> bool:
        """Whether the processes that it started end with it, within some time."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                self.signal_all(0)
            except ProcessLookupError:
                return True
            time.sleep(0.05)
        return False

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


class Command(Child):
    """A process that nothing was imported for; arguments as of `Child`."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        self.log = log
        command = [sys.executable, "-m", "stochca.cli", *arguments]
        # Sums depend on the number of threads.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with log.open("a") as file:
            self.process: Any = subprocess.Popen(
                command, stdout=file, stderr=file, cwd=ROOT, env=environment, start_new_session=True
            )
        self.pid = self.process.pid

    def join(self, seconds: float) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        return self.process.returncode


def forked(function: Callable[..., object], *arguments: Any) -> tuple[Any, Any]:
    """A process that calls a function; the last argument that it gets sends to what is returned beside it."""
    receiver, sender = _server().Pipe(duplex=False)
    process = _server().Process(target=function, args=(*arguments, sender))
    process.start()
    sender.close()
    return process, receiver


@functools.cache
def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.scorecard.preload"])
    return context


def _command(arguments: list[str], log: Path, fault: Fault | None, events: Any) -> None:
    import stochca.cli

    multiprocessing.set_start_method("fork", force=True)  # of the processes that load images
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    if fault is not None:
        fault(events)
    sys.exit(stochca.cli.main(arguments))


@functools.cache
def workspace() -> Path:
    """A folder with images, which goes with this process."""
    root = Path(tempfile.mkdtemp(prefix="stochca-runs-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    write_images(root / "images", {"train": 6, "validation": 3})
    return root


def arguments_of(output: Path, **changes: Any) -> list[str]:
    """The command of a run: its options in a file beside its folder."""
    import yaml

    options = {**STATEFUL, "data_dir": str(workspace() / "images"), "output": str(output), **changes}
    config = output.with_name(f"{output.name}.yaml")
    config.write_text(yaml.safe_dump(options))
    return ["finetune", "--config", str(config)]


def again(output: Path, arguments: list[str], workers: int = 0) -> list[str]:
    """What goes on with a run that ended: `--resume` where there is a state, else the same command."""
    if (output / "trainer_state.pt").exists():
        return ["finetune", "--resume", str(output), "--workers", str(workers)]
    return arguments
