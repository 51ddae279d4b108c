"""Runs that are stopped, or cannot write: what they end with, what they say, and what they leave."""

import contextlib
import errno
import functools
import shutil
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tests.scorecard import faults
from tests.scorecard.children import Child, Fault, again, arguments_of, workspace
from tests.scorecard.kills import uninterrupted
from tests.scorecard.row import Case, Figures
from tests.scorecard.same_run import check_same_run


class Situation(NamedTuple):
    """What happens to a run, and what it should make of it.

    Args:
        code: The exit code, negative for a signal that it died of.
        says: What it prints, in this order; "{output}" stands for its folder.
        fault: What goes wrong inside.
        signals: Sent once the fault says that it is time, each with the seconds to wait before it.
        to_all: Whether the processes that load images get them too.
        step: Of the state that is left, None for none.
        workers: Processes that load images.
        tidy: What the user does before going on.
    """

    code: int
    says: tuple[str, ...] = ()
    fault: Fault | None = None
    signals: tuple[tuple[float, int], ...] = ()
    to_all: bool = False
    step: int | None = None
    workers: int = 0
    tidy: Any = None


TERM, INT = (0.0, signal.SIGTERM), (0.0, signal.SIGINT)
AGAIN = "continue with: stochca finetune --resume {output}"
IN_STEP_3 = functools.partial(faults.tell_in_step, 3)


def stopped(name: str, step: int) -> tuple[str, ...]:
    return f"{name}: saving after the step at work", f"stopped by {name} after step {step}; {AGAIN}"


def not_saved(step: int, reason: str, file: str = "trainer_state.pt") -> tuple[str, ...]:
    return (
        f"stochca finetune: cannot save the state of step {step} in {{output}}, that of step {step - 1} is "
        f"whole: ",
        reason,
        f"{{output}}/{file}",
        AGAIN,
    )


SITUATIONS = {
    "SIGTERM in a step": Situation(143, stopped("SIGTERM", 3), IN_STEP_3, (TERM,), step=3),
    "SIGINT in a step": Situation(130, stopped("SIGINT", 3), IN_STEP_3, (INT,), step=3),
    "SIGTERM to all processes": Situation(
        143, stopped("SIGTERM", 3), IN_STEP_3, (TERM,), True, step=3, workers=2
    ),
    "SIGINT to all processes": Situation(
        130, stopped("SIGINT", 3), IN_STEP_3, (INT,), True, step=3, workers=2
    ),
    "SIGTERM twice at once to all processes": Situation(
        143, stopped("SIGTERM", 3), IN_STEP_3, (TERM, (0.2, signal.SIGTERM)), True, step=3, workers=2
    ),
    "SIGINT again in a step that hangs": Situation(
        130, ("SIGINT: saving after",), functools.partial(faults.tell_in_step, 3, seconds=100),
        (INT, (1.2, signal.SIGINT)), True, step=2, workers=2,
    ),
    "SIGTERM again in a step that hangs": Situation(
        -signal.SIGTERM, ("SIGTERM: saving after",), functools.partial(faults.tell_in_step, 3, seconds=100),
        (TERM, (1.2, signal.SIGTERM)), True, step=2, workers=2,
    ),
    "SIGTERM in an evaluation": Situation(
        143, stopped("SIGTERM", 5), faults.tell_in_evaluation, (TERM,), True, step=5, workers=2
    ),
    "SIGINT while it saves": Situation(
        130, stopped("SIGINT", 3), functools.partial(faults.tell_in_save, 3), (INT,), step=3
    ),
    "SIGTERM while images are loaded": Situation(
        143, stopped("SIGTERM", 1), faults.tell_while_loading, (TERM,), True, step=1, workers=2
    ),
    "SIGINT before the first step": Situation(130, (), faults.tell_in_preparation, (INT,)),
    "SIGTERM before the first step": Situation(-signal.SIGTERM, (), faults.tell_in_preparation, (TERM,)),
    "SIGINT in the last test": Situation(130, (), faults.tell_in_test, (INT,), step=10),
    "a disk that is full": Situation(
        2, not_saved(3, "No space left on device"),
        functools.partial(faults.full_disk, 3, "trainer_state.pt"), step=2,
    ),
    "a disk that is full of the state, with no room for the weights": Situation(
        2, ("cannot save the weights of step 3, its state is whole: ", "No space left on device",
            "{output}/last.safetensors", AGAIN),
        functools.partial(faults.full_disk, 3, "last.safetensors"), step=3,
    ),
    "a disk that is full at the start": Situation(
        2, ("stochca finetune: ", "No space left on device", "{output}/config.yaml"),
        functools.partial(faults.full_disk, 0, "config.yaml"),
    ),
    "a disk that is full at the end": Situation(
        2, ("stochca finetune: ", "No space left on device", "{output}/summary.json"),
        functools.partial(faults.full_disk, 10, "summary.json"), step=10,
    ),
    "a limit of the size of files": Situation(
        2, not_saved(3, "File too large"), functools.partial(faults.small_files, 3), step=2
    ),
    "a quota that is used up": Situation(
        2, not_saved(3, "Disk quota exceeded"), functools.partial(faults.refuse, 3, errno.EDQUOT), step=2
    ),
    "a file system that becomes read-only": Situation(
        2, not_saved(3, "Read-only file system"), functools.partial(faults.refuse, 3, errno.EROFS), step=2
    ),
    "a folder that becomes a file": Situation(
        2, ("cannot save the state of step 3 in {output}, there is none before: ", "Not a directory"),
        functools.partial(faults.replace_folder, 3), tidy=Path.unlink,
    ),
    "a folder that is deleted": Situation(
        2, ("cannot save the state of step 3 in {output}, there is none before: ", "No such file"),
        functools.partial(faults.delete_folder, 3),
    ),
}  # fmt: skip


def cases(long: bool) -> Iterable[Case]:
    short = ("SIGTERM twice at once to all processes", "SIGINT to all processes")
    for name, situation in SITUATIONS.items():
        if long or name in short:
            yield Case(name, functools.partial(check, name, situation))
    if long:
        yield Case("a folder below a file", below_a_file)
        yield Case("a folder of the system", in_a_folder_that_refuses)


def check(name: str, situation: Situation) -> Figures:
    """Let it happen, look at what is left, go on, and compare the end with that of an uninterrupted run."""
    output = workspace() / name.replace(" ", "-").replace(",", "")
    first = arguments_of(output, workers=situation.workers)
    child = Child(first, output.with_suffix(".log"), situation.fault)
    if situation.signals:
        assert child.next_event() == "now", f"it did not come so far: {child.said()}"
    sent = time.monotonic()
    for seconds, signum in situation.signals:
        time.sleep(seconds)
        child.signal_all(signum) if situation.to_all else child.signal(signum)
    code = child.end()
    seconds = time.monotonic() - sent
    said = child.said()
    assert code == situation.code, f"it ended with {code}: {said}"
    assert "Traceback" not in said, said
    rest = said
    for wanted in situation.says:
        text = wanted.format(output=output)
        assert text in rest, f"it does not say {text!r}: {said}"
        rest = rest.partition(text)[2]
    assert step_of(output) == situation.step, f"the state that is left is that of step {step_of(output)}"
    assert child.is_alone(), "processes that load images outlive their run"
    if situation.tidy is not None:
        situation.tidy(output)
    last = Child(again(output, first), output.with_suffix(".log"))
    assert last.end() == 0, f"it does not go on: {last.said()}"
    check_same_run(output, uninterrupted().output)
    shutil.rmtree(output)
    return {"seconds_until_the_end": seconds} if situation.signals else {}


def step_of(output: Path) -> int | None:
    """The step of the state in a folder, which must be whole."""
    from stochca.checkpoint import STATE, load_state

    return load_state(output / STATE)["step"] if (output / STATE).exists() else None


def below_a_file() -> None:
    (workspace() / "file").touch()
    refused(workspace() / "file" / "run", "Not a directory")


def in_a_folder_that_refuses() -> None:
    # Refuses root as well.
    refused(Path("/proc/self/run"), "No such file or directory")


def refused(output: Path, reason: str) -> None:
    """A folder that cannot be made is named before anything is trained."""
    arguments = arguments_of(workspace() / "refused")
    child = Child([*arguments, "--output", str(output)], workspace() / "refused.log")
    code = child.end()
    assert code == 2, f"it ended with {code}: {child.said()}"
    assert f"{reason}: '{output}'" in child.said(), child.said()
    assert "Traceback" not in child.said(), child.said()
    with contextlib.suppress(OSError):
        output.unlink()
