"""R11: damaged files of weights are refused, wherever they are read, and no code in them runs.

A file counts as loaded silently where it is read without an error and gives other weights, or another
description of them, than the whole one. What no reader can notice is not tried: bits of tensors in files
without a digest, as others write them.
"""

import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from tests.scorecard import damages
from tests.scorecard.malicious import payloads, wrappers
from tests.scorecard.row import Case, Figures

Damaged = Iterable[tuple[str, bytes]]


class Way(NamedTuple):
    """A way in which the product reads a file.

    Args:
        path: Of the whole file.
        read: Reads a file, and returns what tells its content.
    """

    path: Path
    read: Callable[[Path], Any]


def cases(long: bool) -> Iterator[Case]:
    """Files that we wrote, files of others, and files made up."""
    slices, count = (4, 30) if long else (1, 5)
    for way in ("evaluate", "pretrained", "resume", "pickle", "jax"):
        for i in range(slices):
            yield Case(f"{way}: bits flipped, {i}", partial(_bits, way, count, seed=i))
        yield Case(f"{way}: cut short", partial(_cut, way, 2 * count if long else 5))
        yield Case(f"{way}: blocks of zeros", partial(_zeros, way, count))
        yield Case(f"{way}: something else", partial(_something_else, way))
    yield Case("foreign: bits of the header flipped", partial(_header_bits, 4 * count))
    yield Case("foreign: cut short", partial(_cut, "foreign", count))
    yield Case("foreign: headers made up", _headers)
    for way in ("evaluate", "foreign", "pickle", "folder", *(["finetune"] if long else [])):
        yield Case(f"{way}: weights of something else", partial(_other_states, way, 1 if long else 3))
    yield Case("resume: states of something else", partial(_other_trainer_states, 1 if long else 12))
    for wrapper in wrappers() if long else ["zip"]:
        yield Case(f"code in a file, {wrapper}", partial(_code, wrapper))
    yield Case("code in a trainer state", _code_in_a_state)
    yield Case("commands: one line and no traceback", partial(_commands, long))


def _bits(way: str, count: int, seed: int) -> Figures:
    return _refused(way, damages.flipped(_whole(way), count, seed))


def _cut(way: str, count: int) -> Figures:
    return _refused(way, damages.truncated(_whole(way), count))


def _zeros(way: str, count: int) -> Figures:
    return _refused(way, damages.zeroed(_whole(way), count))


def _something_else(way: str) -> Figures:
    return _refused(way, damages.not_weights().items())


def _header_bits(count: int) -> Figures:
    whole = _whole("foreign")
    return _refused("foreign", damages.flipped(whole, count, within=8 + int.from_bytes(whole[:8], "little")))


def _headers() -> Figures:
    return _refused("foreign", damages.headers(_whole("foreign")))


def _whole(way: str) -> bytes:
    return _ways()[way].path.read_bytes()


def _refused(way: str, damaged: Damaged) -> Figures:
    """Read each content in the place of the whole file."""
    path, read = _ways()[way]
    wanted = _wanted(way)
    count = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        for what, content in damaged:
            copy.write_bytes(content)
            _is_refused(what, copy, read, wanted)
            count += 1
        copy.unlink()
        copy.mkdir()
        _is_refused("a folder", copy, read, wanted)
    return {"cases": count + 1}


def _is_refused(what: str, path: Path, read: Callable[[Path], Any], wanted: Any) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = read(path)
    except (ValueError, OSError) as error:
        if path.name not in str(error) and path.parent.name not in str(error):
            raise AssertionError(f"{what}: {error} names no file") from error
        return
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    assert found == wanted, f"{what}: read without an error, as something else"


@cache
def _wanted(way: str) -> Any:
    path, read = _ways()[way]
    return read(path)


@cache
def _ways() -> dict[str, Way]:
    from tests.scorecard.checkpoints import made

    return made()


def _other_states(way: str, every: int) -> Figures:
    """Whole files, but not of the model."""
    from safetensors.torch import load_file

    from tests.scorecard.checkpoints import write

    path, read = _ways()[way]
    like = _ways()["evaluate"].path
    state, count = load_file(like), 0
    with tempfile.TemporaryDirectory() as folder:
        for what, other in islice(damages.other_states(state), 0, None, every):
            copy = Path(folder) / path.name
            write(copy, other, like if way == "evaluate" else None)
            _is_refused(what, copy, read, None)
            count += 1
    return {"cases": count}


def _other_trainer_states(every: int) -> Figures:
    """States that are whole, but not of the run."""
    import torch

    from tests.scorecard.checkpoints import resume

    path = _ways()["resume"].path
    whole, count = torch.load(path, weights_only=True), 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(path.parent, Path(folder) / "run")) / path.name
        for what, state in islice(_trainer_states(whole), 0, None, every):
            torch.save(state, copy)
            _is_refused(what, copy, resume, None)
            count += 1
    return {"cases": count}


def _trainer_states(whole: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    import torch

    optimizer = whole["optimizer"]
    moments = {number: {**entry, "exp_avg": torch.zeros(3)} for number, entry in optimizer["state"].items()}
    yield "moments of other shapes", {**whole, "optimizer": {**optimizer, "state": moments}}
    yield "a list", [whole]
    yield "another format", {**whole, "format": 2}
    yield "one entry more", {**whole, "extra": 1}
    for name in whole:
        yield f"without {name}", {key: value for key, value in whole.items() if key != name}
    for name in ("options", "model", "optimizer", "schedule", "history", "rng", "running", "losses"):
        yield f"{name} is a number", {**whole, name: 7}
    for what, model in islice(damages.other_states(whole["model"]), 0, None, 3):
        yield f"model: {what}", {**whole, "model": model}
    yield "no groups", {**whole, "optimizer": {**optimizer, "param_groups": []}}
    yield "another source", {**whole, "source_digest": "0" * 64}
    yield "other classes", {**whole, "classes": ["cat", "dog"]}
    yield "more processes", {**whole, "world_size": 2}
    yield "another number of images", {**whole, "train_images": 7}
    yield "other options", {**whole, "options": {**whole["options"], "lr": 7.0}}


def _code(wrapper: str) -> Figures:
    """Nothing in a pickle is run, whatever reads it and however it is wrapped."""
    wrap, count = wrappers()[wrapper], 0
    with tempfile.TemporaryDirectory() as folder:
        marker = Path(folder) / "ran"
        for way in ("pickle", "resume", "pretrained", "jax", "folder"):
            path, read = _ways()[way]
            copy = Path(folder) / path.name
            for what, pickled in payloads(marker):
                copy.write_bytes(wrap(pickled))
                _is_refused(f"{way}, {what}", copy, read, None)
                assert not marker.exists(), f"{way}, {what}: the code ran"
                count += 1
    return {"cases": count}


def _code_in_a_state() -> Figures:
    """Nothing in a state that is whole otherwise is run."""
    import torch

    from tests.scorecard.checkpoints import Runs, resume

    path = _ways()["resume"].path
    whole, count = torch.load(path, weights_only=True), 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(path.parent, Path(folder) / "run")) / path.name
        marker = Path(folder) / "ran"
        for name in ("model", "optimizer", "rng", "history", "swad", "schedule"):
            torch.save({**whole, name: Runs(marker)}, copy)
            _is_refused(name, copy, resume, None)
            assert not marker.exists(), f"{name}: the code ran"
            count += 1
    return {"cases": count}


def _commands(long: bool) -> Figures:
    """Each command ends with code 2 and one line, where the file it reads is cut short."""
    from tests.scorecard.checkpoints import commands

    count = 0
    with tempfile.TemporaryDirectory() as folder:
        for arguments, damaged in commands(Path(folder)):
            _ends_with_one_line(arguments, damaged)
            count += 1
            if not long and count == 2:
                break
    return {"cases": count}


def _ends_with_one_line(arguments: list[str], damaged: Path) -> None:
    from tests.scorecard.commands import call

    code, errors = call(arguments)
    assert code == 2, f"{arguments[0]}: ended with {code}: {errors}"
    assert damaged.name in errors or damaged.parent.name in errors, f"{arguments[0]}: {errors}"
    assert "Traceback" not in errors, errors
