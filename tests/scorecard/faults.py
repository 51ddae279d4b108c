"""What goes wrong in a child: each is called in it, before the command, with its end of a pipe."""

import functools
import os
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def before(owner: Any, name: str, act: Callable[..., object]) -> None:
    """Have a function of a class or module preceded by another, which gets the same arguments."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def both(*args: Any, **kwargs: Any) -> Any:
        act(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, both)


def _tell(events: Any, seconds: float = 0.5) -> None:
    """Say that it is time, and take long enough for a signal to come."""
    events.send("now")
    end = time.monotonic() + seconds
    while time.monotonic() < end:  # a sleep goes on after a signal that was noted
        time.sleep(0.01)


def tell_in_step(step: int, events: Any, seconds: float = 0.5) -> None:
    from stochca.train import Trainer

    before(Trainer, "_train_step", lambda self, *_: _tell(events, seconds) if self.step + 1 == step else None)


def tell_in_save(step: int, events: Any) -> None:
    """After the state has been written, before it gets its name."""
    from stochca import checkpoint

    def act(source: Path, target: Path) -> None:
        if target.name == checkpoint.STATE and next(saves) == step:
            _tell(events)

    saves = iter(range(1, 1000))
    before(checkpoint.os, "replace", act)


def tell_in_evaluation(events: Any) -> None:
    from stochca import evaluation

    before(evaluation, "evaluate", _once(lambda *_, **__: _tell(events)))


def tell_in_test(events: Any) -> None:
    from stochca.evaluation import Evaluator

    before(Evaluator, "test", lambda *_: _tell(events))


def tell_while_loading(events: Any) -> None:
    """While the first batch is awaited."""
    from stochca.data import Images

    def act(images: Any, position: int) -> None:
        if images.is_training and not told:
            told.append(position)
            _tell(events, 0.5)

    told: list[int] = []
    before(Images, "__getitem__", act)


def tell_in_preparation(events: Any) -> None:
    from stochca import train

    before(train, "create_optimizer", lambda *_: _tell(events))


def full_disk(step: int, file: str, _events: Any) -> None:
    """The temporary file of one is the device on which there is no room."""
    _at(step, lambda output: (output / f".{file}.tmp").symlink_to("/dev/full"))


def small_files(step: int, _events: Any) -> None:
    def act(_output: Path) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))

    _at(step, act)


def refuse(step: int, number: int, _events: Any) -> None:
    """The system answers so when a file should get its name."""

    def act(_output: Path) -> None:
        def answer(source: Path, target: Path) -> None:
            raise OSError(number, os.strerror(number), str(source), None, str(target))

        os.replace = answer

    _at(step, act)


def replace_folder(step: int, _events: Any) -> None:
    def act(output: Path) -> None:
        shutil.rmtree(output)
        output.touch()

    _at(step, act)


def delete_folder(step: int, _events: Any) -> None:
    _at(step, shutil.rmtree)


def _at(step: int, act: Callable[[Path], object]) -> None:
    """Do something to the folder of a run within a step; in the preparation for step 0."""
    from stochca import train

    if step:
        before(
            train.Trainer, "_train_step", lambda self, *_: act(self.output) if self.step + 1 == step else None
        )
    else:
        before(train.files, "save_config", lambda path, _: act(path.parent))


def _once(act: Callable[..., object]) -> Callable[..., None]:
    calls: list[None] = []

    def first(*args: Any, **kwargs: Any) -> None:
        calls.append(None)
        if len(calls) == 1:
            act(*args, **kwargs)

    return first
