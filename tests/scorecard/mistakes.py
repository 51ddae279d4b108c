"""R13: mistakes of users end in an error that says what was wanted and what came."""

import atexit
import contextlib
import importlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from tests.scorecard.row import Case, Figures


class Mistake(NamedTuple):
    """A mistake in a program.

    Args:
        name: Of the mistake.
        make: Makes it.
        error: The exact type of the error.
        message: Pattern of what the error says.
    """

    name: str
    make: Callable[[], object]
    error: type[Exception]
    message: str


def cases(long: bool) -> Iterator[Case]:
    """In programs, and on the command line, whose code is 2 and whose error is no traceback."""
    yield Case("the operator", partial(_refused, "operator_mistakes"))
    yield Case("the model", partial(_refused, "model_mistakes", 1 if long else 4))
    for name in ("options", "data", "runs", "files") if long else ("options",):
        yield Case(f"the command line: {name}", partial(_commands, name, 1 if long else 6))


def _refused(module: str, every: int = 1) -> Figures:
    mistakes: list[Mistake] = list(importlib.import_module(f"tests.scorecard.{module}").mistakes())[
        every - 1 :: every
    ]
    wrong = [f"{mistake.name}: {off}" for mistake in mistakes if (off := _off(mistake)) is not None]
    assert not wrong, "\n".join(wrong)
    return {"cases": len(mistakes)}


def _off(mistake: Mistake) -> str | None:
    """What is not as it should be, None where all is."""
    try:
        mistake.make()
    except Exception as error:
        if type(error) is mistake.error and re.search(mistake.message, str(error), re.DOTALL):
            return None
        return f"{type(error).__name__}: {error}"
    return "no error"


def _commands(group: str, every: int) -> Figures:
    from tests.scorecard import command_mistakes
    from tests.scorecard.commands import call

    wrong = []
    mistakes = list(getattr(command_mistakes, group)(_folder()))[every - 1 :: every]
    for arguments, message in mistakes:
        try:
            code, errors = call(arguments)
        except Exception as error:
            wrong.append(f"{' '.join(arguments)}: {type(error).__name__}: {error}")
            continue
        if code != 2 or "Traceback" in errors or not re.search(message, errors, re.DOTALL):
            wrong.append(f"{' '.join(arguments)}: wanted {message!r}, got {code}: {errors}")
    assert not wrong, "\n".join(wrong)
    assert not (_folder() / "ran").exists(), "code in a YAML file ran"
    return {"cases": len(mistakes)}


@cache
def _folder() -> Path:
    """A folder with images of two classes, a run on them, and files that are something else."""
    from tests.scorecard.commands import call, finetuning
    from tests.train.image_folder import write_images

    root = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, root)
    images = write_images(root / "images", {"train": 2, "validation": 2}, ("ant", "bee"))
    write_images(root / "others", {"train": 2, "validation": 2}, ("ant", "cow"))
    (root / "empty").mkdir()
    (root / "flat" / "train").mkdir(parents=True)
    shutil.copy(images / "train" / "ant" / "0.jpg", root / "flat" / "train" / "0.jpg")
    (root / "file.txt").write_text("text")
    code, errors = call(finetuning(images, root / "run"))
    assert code == 0, errors
    configs: dict[str, Any] = {
        "unknown": {"learning_rate": 0.1},
        "type": {"lr": "fast"},
        "nested": {"model_kwargs": [1, 2]},
        "list": [1, 2],
    }
    for name, content in configs.items():
        (root / f"{name}.yaml").write_text(json.dumps(content))
    (root / "broken.yaml").write_text("lr: [1, 2")
    (root / "code.yaml").write_text(f"output: !!python/object/apply:os.system ['touch {root}/ran']")
    with contextlib.suppress(FileExistsError):
        (root / "full").mkdir()
    (root / "full" / "notes.txt").write_text("text")
    return root
