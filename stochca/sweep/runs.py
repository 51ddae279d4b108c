"""Running a plan: each run a process of its own, several at once."""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from stochca.checkpoint import CONFIG, STATE, SUMMARY, save_config
from stochca.signals import Noted, say
from stochca.sweep.plan import Run

LOG = "log.txt"

# Lines of the log of a failed run that are shown.
SHOWN_LINES = 5

# Seconds between two looks at the processes.
PAUSE = 0.1


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Args:
        status: Interrupted runs were stopped with the sweep; waiting ones had not begun.
        summary: Of a complete run, as it wrote it.
        message: Why a run failed.
    """

    status: Literal["complete", "failed", "interrupted", "waiting"]
    summary: dict[str, Any] = field(default_factory=dict)
    message: str = ""


class Signals(Noted):
    """The signals that came, for the processes to be told.

    Attributes:
        numbers: Those that came, in order.
    """

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def note(self, signum: int) -> None:
        """Remember the signal."""
        self.numbers.append(signum)
        say(signum, "the runs at work save and stop")


def places(devices: Sequence[str], jobs: int | None) -> list[dict[str, str]]:
    """What each of the runs that go on at once has of the machine, as environment variables.

    Args:
        devices: That the runs ask for.
        jobs: Runs at once; None for one per GPU, or one per two cores of the CPU.

    Returns:
        One mapping per place: the GPU, taken in turns if there are fewer, or its share of the CPU's threads.

    Raises:
        ValueError: A run asks for one GPU by its number.
    """
    if gpus := _gpus(devices):
        count = jobs or len(gpus)
        return [{"CUDA_VISIBLE_DEVICES": gpus[place % len(gpus)]} for place in range(count)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = int(os.environ.get("OMP_NUM_THREADS", cores))
    count = jobs or max(1, cores // 2)
    return [{"OMP_NUM_THREADS": str(max(1, threads // count))} for _ in range(count)]


def _gpus(devices: Sequence[str]) -> list[str]:
    """The GPUs that this process sees, by the names that another one is told; none if no run wants one."""
    import torch

    if numbered := [device for device in devices if device.startswith("cuda:")]:
        raise ValueError(
            f"device must be cuda, auto or cpu, as each run gets a GPU of its own, got {numbered[0]}; "
            "set CUDA_VISIBLE_DEVICES to choose among GPUs"
        )
    if not {"auto", "cuda"}.intersection(devices):
        return []
    count = torch.cuda.device_count()
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return visible.split(",")[:count]
    return [str(index) for index in range(count)]


@contextlib.contextmanager
def locked(output: Path) -> Iterator[int]:
    """Hold the folder of a sweep; its runs hold it as well, should they outlive the sweep.

    Yields:
        The descriptor that the runs inherit.

    Raises:
        ValueError: Another sweep, or a run of one, is at work in it.
    """
    with open(output / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another sweep is at work in {output}, or runs that outlived one: wait for them or stop them"
            ) from error
        yield file.fileno()


def summary_of(run: Run) -> dict[str, Any] | None:
    """What a run wrote when it was complete, None before."""
    path = run.folder / SUMMARY
    return json.loads(path.read_text()) if path.is_file() else None


def execute(
    runs: Sequence[Run], places: Sequence[dict[str, str]], lock: int
) -> tuple[dict[Run, Outcome], int]:
    """Run what is not complete, and go on where one fails.

    A signal is passed to the runs at work, which save themselves and stop, and none is begun after it.

    Args:
        runs: In the order in which they begin.
        places: As many go on at once, each with the environment variables of its place.
        lock: Descriptor of the lock that the runs inherit.

    Returns:
        What came of each run, and the number of the first signal, 0 for none.
    """
    outcomes: dict[Run, Outcome] = {}
    for run in runs:
        if (summary := summary_of(run)) is not None:
            outcomes[run] = Outcome("complete", summary)
    waiting = deque(run for run in runs if run not in outcomes)
    free = deque(places)
    active: list[_Process] = []
    # disable=None: no bar where nobody looks, as in a log file.
    bar = tqdm(total=len(runs), initial=len(outcomes), unit="run", dynamic_ncols=True, disable=None)
    with Signals() as signals, bar:
        try:
            while active or (waiting and not signals.numbers):
                while waiting and free and not signals.numbers:
                    active.append(_Process(waiting.popleft(), free.popleft(), lock))
                bar.set_postfix_str(f"at work: {'; '.join(str(process.run) for process in active)}")
                time.sleep(PAUSE)
                for process in active:
                    process.pass_on(signals.numbers)
                for process in [process for process in active if process.has_ended()]:
                    active.remove(process)
                    free.append(process.place)
                    outcomes[process.run] = outcome = process.outcome()
                    bar.update()
                    tqdm.write(f"{process.run}: {_in_words(outcome)}")
        finally:
            for process in active:
                process.end()
    outcomes |= {run: Outcome("waiting") for run in waiting}
    return {run: outcomes[run] for run in runs}, signals.numbers[0] if signals.numbers else 0


class _Process:
    """`stochca finetune` for one run, begun or resumed; what it prints goes to the log in its folder."""

    def __init__(self, run: Run, place: dict[str, str], lock: int) -> None:
        self.run, self.place = run, place
        run.folder.mkdir(parents=True, exist_ok=True)
        config = run.folder / CONFIG
        save_config(config, vars(run.options))
        arguments = ["--resume", str(run.folder)] if (run.folder / STATE).is_file() else []
        self._log = run.folder / LOG
        self._signals_passed = 0
        with open(self._log, "ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "stochca.cli", "finetune", "--config", str(config), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **place},
                pass_fds=[lock],
                # A terminal sends its signals to the whole session. The second one ends a run without saving,
                # so that they come from here alone.
                start_new_session=True,
            )

    def pass_on(self, numbers: Sequence[int]) -> None:
        """Send the signals that came since the last call."""
        for number in numbers[self._signals_passed :]:
            self._process.send_signal(number)
        self._signals_passed = len(numbers)

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def outcome(self) -> Outcome:
        """What came of the run, whose process has ended."""
        if (summary := summary_of(self.run)) is not None:
            return Outcome("complete", summary)
        code = self._process.returncode
        if self._signals_passed:
            return Outcome("interrupted")
        with open(self._log, "rb") as log:
            log.seek(self._log_start)
            lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        ending = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return Outcome("failed", message="\n".join([ending, *lines[-SHOWN_LINES:]]))

    def end(self) -> None:
        """Have the process save and stop, whatever came up here."""
        self._process.terminate()
        self._process.wait()


def _in_words(outcome: Outcome) -> str:
    if outcome.status == "complete":
        return f"best top-1 {outcome.summary['best_top1']:.2f} %, last {outcome.summary['last_top1']:.2f} %"
    return f"{outcome.status}: {outcome.message}".removesuffix(": ")
