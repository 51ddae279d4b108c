"""Training runs that are killed at random moments, and resumed until they end."""

import contextlib
import functools
import io
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tests.scorecard.children import STEPS, Child, Command, again, arguments_of, workspace
from tests.scorecard.row import Case, Figures
from tests.scorecard.same_run import check_same_run

TRIALS, TRIALS_PER_CASE = 100, 5

# How a trial is killed: at any moment, after a save began, or at a call that touches a file in a save.
KINDS = ("anywhere", "call", "anywhere", "call", "save")

# Functions written in C that touch files. Their calls and their returns are moments to be killed at.
TOUCHING = {
    "open", "write", "write_end_of_file", "fsync", "close", "replace", "unlink", "writerows",
}  # fmt: skip


def cases(long: bool) -> Iterable[Case]:
    if not long:
        return [
            Case(f"a run killed at {kind} ends as one that was not", functools.partial(trial, number, kind))
            for number, kind in ((TRIALS, "call"), (TRIALS + 1, "anywhere"))
        ]
    return [
        Case(f"trials {first} to {first + TRIALS_PER_CASE - 1}", functools.partial(trials, first))
        for first in range(0, TRIALS, TRIALS_PER_CASE)
    ]


def trials(first: int) -> Figures:
    for number in range(first, first + TRIALS_PER_CASE):
        # Five of them are processes that nothing was imported for.
        kind = "command" if number % 20 == 0 else KINDS[number % TRIALS_PER_CASE]
        try:
            trial(number, kind)
        except Exception as error:
            raise AssertionError(f"trial {number}, killed at {kind}: {error}") from error
    return {"cases": TRIALS_PER_CASE}


class Uninterrupted(NamedTuple):
    """A run that was left alone.

    Args:
        output: Its folder.
        seconds: From its start to its end.
        saves: How many there were.
        save_seconds: Of the longest.
        calls: Those that touched files in the saves, and their returns.
    """

    output: Path
    seconds: float
    saves: int
    save_seconds: float
    calls: int


@functools.cache
def uninterrupted() -> Uninterrupted:
    output = workspace() / "uninterrupted"
    child = Child(arguments_of(output), output.with_suffix(".log"), watch_saves)
    start = 0.0
    saves: list[float] = []
    for event, number, at in iter(child.next_event, None):
        start = start or at
        if event == "began":
            saves.append(-at)
        elif event == "ended":
            saves[-1] += at
        calls = number
    assert child.end() == 0, child.said()
    return Uninterrupted(output, time.monotonic() - start, len(saves), max(saves), calls)


def trial(number: int, kind: str) -> None:
    """Kill a run, some of them again and again, resume it to its end, and compare it with another."""
    expected = uninterrupted()
    draw = random.Random(number)
    output = workspace() / f"run{number}"
    first = command = arguments_of(output, workers=draw.choice((0, 1, 2)))
    children = []
    for _ in range(1 if kind == "command" else draw.choice((1, 1, 1, 2, 3))):
        children.append(killed(command, output, kind, draw.random() * left_of(output)))
        command = again(output, first, draw.choice((0, 1, 2)))
    children.append((Command if kind == "command" else Child)(command, output.with_suffix(".log")))
    assert children[-1].end() == 0, f"it does not go on: {children[-1].said()}"
    check_same_run(output, expected.output)
    assert all(child.is_alone() for child in children), "processes that load images outlive their run"
    shutil.rmtree(output)


def left_of(output: Path) -> float:
    """The share of its steps that a run has before it."""
    from stochca.checkpoint import STATE, load_state

    state = output / STATE
    return 1 - load_state(state)["step"] / STEPS if state.exists() else 1.0


def killed(command: list[str], output: Path, kind: str, share: float) -> Child:
    """Start a command, and kill it when about a share of it is done; begin again where it ends before."""
    expected = uninterrupted()
    before = output.with_name(f"{output.name}-before")
    if output.exists():
        shutil.copytree(output, before)
    while True:
        if kind == "call":
            fault = functools.partial(watch_saves, die_at=1 + int(share * expected.calls))
            child = Child(command, output.with_suffix(".log"), fault)
            child.join(120)
        elif kind == "save":
            child = Child(command, output.with_suffix(".log"), watch_saves)
            save, rest = divmod(share * expected.saves, 1)
            began = 0
            for event, *_ in iter(child.next_event, None):
                began += event == "began"
                if began > save:
                    break
            time.sleep(rest * expected.save_seconds)
        elif kind == "command":
            child = Command(command, output.with_suffix(".log"))
            while not (output / "config.yaml").exists() and child.join(0.01) is None:
                pass
            child.join(share * expected.seconds)
        else:
            child = Child(command, output.with_suffix(".log"))
            child.join(share * expected.seconds)
        if child.join(0) is None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                child.signal(signal.SIGKILL)
        code = child.end()
        if code == -signal.SIGKILL:
            shutil.rmtree(before, ignore_errors=True)
            return child
        assert code == 0, f"ended with {code} before it was killed: {child.said()}"
        share /= 2
        shutil.rmtree(output)
        if before.exists():
            shutil.copytree(before, output)


def watch_saves(events: Any, die_at: int = 0) -> None:
    """Tell when each save began and ended, and how many calls have touched files; die at one of them."""
    from stochca import checkpoint
    from stochca.train import Trainer

    write_atomically, save = checkpoint.write_atomically, Trainer._save
    calls = 0

    def count(_frame: Any, event: str, function: Any) -> None:
        nonlocal calls
        if event not in ("c_call", "c_return") or isinstance(getattr(function, "__self__", None), io.BytesIO):
            return
        if function.__name__ in TOUCHING:
            calls += 1
            if calls == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    def watched_write(*args: Any) -> None:
        sys.setprofile(count)
        try:
            write_atomically(*args)
        finally:
            sys.setprofile(None)

    def watched_save(trainer: Any) -> None:
        events.send(("began", calls, time.monotonic()))
        save(trainer)
        events.send(("ended", calls, time.monotonic()))

    checkpoint.write_atomically, Trainer._save = watched_write, watched_save
    events.send(("started", calls, time.monotonic()))
