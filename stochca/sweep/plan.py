"""Which runs a sweep has: settings, their names, and the record that a continued sweep must agree with."""

import argparse
import dataclasses
import difflib
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from stochca.checkpoint import read_config, save_config
from stochca.config import FinetuneOptions, changed_options
from stochca.sweep.options import SweepOptions

RECORD = "sweep.yaml"

# The sweep gives each run its own.
OWN = {
    "output": "the sweep chooses the folders of its runs",
    "resume": "the sweep resumes by itself what was interrupted",
    "seed": "the seeds are an option of the sweep itself",
}

LONGEST_NAME = 80


@dataclass(frozen=True)
class Setting:
    """What is compared.

    Args:
        name: In tables, in plots, and of its folder.
        changes: The options in which it differs from the base.
        options: All of them; seed and output are those of no run.
    """

    name: str
    changes: dict[str, Any] = field(hash=False)
    options: FinetuneOptions = field(hash=False)

    @property
    def p(self) -> float | None:
        """The probability, where that number is all that distinguishes the setting."""
        p = self.changes.get("p")
        return p if set(self.changes) == {"p"} and isinstance(p, float) else None


@dataclass(frozen=True)
class Run:
    """One setting with one seed, in a folder of its own."""

    setting: Setting
    seed: int
    folder: Path

    @property
    def options(self) -> FinetuneOptions:
        """Of `stochca finetune`."""
        return dataclasses.replace(self.setting.options, seed=self.seed, output=str(self.folder))

    def __str__(self) -> str:
        return f"{self.setting.name}, seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """A sweep.

    Args:
        base: Options that the settings start from.
        settings: The first is what the others are compared with.
        seeds: Of each setting.
        output: Folder of the sweep.
    """

    base: FinetuneOptions
    settings: list[Setting]
    seeds: list[int]
    output: Path

    def runs(self) -> list[Run]:
        """Every setting with the first seed, then with the next: comparisons come early."""
        return [
            Run(setting, seed, self.output / setting.name / f"seed-{seed}")
            for seed in self.seeds
            for setting in self.settings
        ]


def make_plan(options: SweepOptions) -> Plan:
    """Expand the options of a sweep.

    Args:
        options: Of the sweep.

    Returns:
        The plan; nothing is written.

    Raises:
        FileNotFoundError: No such base configuration.
        ValueError: An option of `stochca finetune` that does not exist or fit, settings that are equal, or
            names that are.
    """
    given = _read_base(options.base_config) | _without_own(options.base, "--base")
    base = _finetune_options(given, "the base")
    changes = [{"p": p} for p in options.p] + [{"mode": mode} for mode in options.modes] + options.settings
    settings: list[Setting] = []
    for change in changes:
        setting = _make_setting(given, change)
        _check_new(setting, settings)
        settings.append(setting)
    return Plan(base, settings, options.seeds, Path(options.output))


def open_folder(output: Path) -> None:
    """Make the folder of a sweep, unless it is there.

    Raises:
        FileExistsError: It is there, and holds something else.
    """
    # What is hidden may be the lock of a sweep that ended before it wrote its record.
    is_other = output.is_dir() and any(not path.name.startswith(".") for path in output.iterdir())
    if (is_other or output.is_file()) and not (output / RECORD).is_file():
        raise FileExistsError(f"--output {output} exists and holds no sweep: choose another one")
    output.mkdir(parents=True, exist_ok=True)


def record_plan(plan: Plan, options: SweepOptions) -> None:
    """Write the sweep as options that continue it, after a look at what was recorded before.

    Args:
        plan: The sweep. It may have more settings and seeds than before.
        options: What it was made from.

    Raises:
        ValueError: The base or a setting changed, or a setting or seed is gone.
    """
    path = plan.output / RECORD
    if path.is_file():
        before = dataclasses.replace(make_plan(SweepOptions(**read_config(path))), output=plan.output)
        if before == plan:
            return
        if differences := list(_differences(before, plan)):
            raise ValueError(
                f"{plan.output} holds another sweep: {'; '.join(differences)}; choose another --output"
            )
    record = {
        **dataclasses.asdict(options),
        "base_config": None,
        "base": {name: value for name, value in dataclasses.asdict(plan.base).items() if name not in OWN},
        "p": [],
        "modes": [],
        "settings": [{"name": setting.name, **setting.changes} for setting in plan.settings],
    }
    save_config(path, record)


def _differences(before: Plan, now: Plan) -> Iterator[str]:
    for difference in changed_options(dataclasses.asdict(before.base), now.base):
        yield f"in the base, {difference}"
    settings = {setting.name: setting for setting in now.settings}
    for old in before.settings:
        new = settings.get(old.name)
        if new is None:
            yield f"the setting {old.name} was in it, and is not"
            continue
        for name in sorted(old.changes.keys() | new.changes.keys()):
            then, value = (getattr(setting.options, name) for setting in (old, new))
            if then != value:
                yield f"in the setting {old.name}, {name} was {then}, is {value}"
    if gone := [seed for seed in before.seeds if seed not in now.seeds]:
        yield f"seeds were {before.seeds}, are {now.seeds}, which lacks {gone}"


def _read_base(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    if not Path(path).is_file():
        raise FileNotFoundError(f"--base-config {path} is not a file")
    try:
        content = yaml.safe_load(Path(path).read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"--base-config {path} is not YAML: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"--base-config {path} must hold options by name, got {content!r}")
    return {name: value for name, value in content.items() if name not in OWN}


def _without_own(changes: dict[str, Any], where: str) -> dict[str, Any]:
    for name, reason in OWN.items():
        if name in changes:
            raise ValueError(f"{name} cannot be given in {where}: {reason}")
    return changes


def _make_setting(base: dict[str, Any], change: dict[str, Any]) -> Setting:
    changes = {key: value for key, value in change.items() if key != "name"}
    where = f"the setting {change}"
    options = _finetune_options(base | _without_own(changes, where), where)
    if "p" in changes and options.p_schedule is not None:
        raise ValueError(f"p in {where} would be without effect, as p_schedule is {options.p_schedule}")
    # As they were read: 0 is 0.0 then, and 1e-5 in YAML no longer a word.
    changes = {key: getattr(options, key) for key in changes}
    name = change["name"] if "name" in change else _name(changes)
    _check_name(name, where)
    return Setting(name, changes, options)


def _finetune_options(values: dict[str, Any], where: str) -> FinetuneOptions:
    names = [field.name for field in dataclasses.fields(FinetuneOptions)]
    for key in values:
        if key not in names:
            close = difflib.get_close_matches(str(key), names, n=1, cutoff=0)[0]
            raise ValueError(f"{where} has the unknown option {key}: the nearest that exists is {close}")
    try:
        return FinetuneOptions(**_parser().parse_object(values).as_dict())
    except (argparse.ArgumentError, ValueError) as error:
        raise ValueError(f"{where} does not fit: {_one_line(error)}") from error


@functools.cache
def _parser() -> ArgumentParser:
    """Reads options of `stochca finetune` by the types of their annotations."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(FinetuneOptions)
    return parser


def _check_new(setting: Setting, others: list[Setting]) -> None:
    for other in others:
        if other.options == setting.options:
            raise ValueError(f"the settings {other.name} and {setting.name} are equal")
        # Folders that differ in case alone are one on some file systems.
        if other.name.casefold() == setting.name.casefold():
            raise ValueError(
                f"two settings are called {setting.name}: {other.changes} and {setting.changes}; "
                "give one another name"
            )


def _check_name(name: Any, where: str) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w .,+=()-]*", name) or name.endswith(" "):
        raise ValueError(
            f"the name of {where} must be made of letters, digits, spaces and _ . , + = - ( ), "
            f"a letter or digit first, got {name!r}"
        )
    if len(name) > LONGEST_NAME:
        raise ValueError(f"{where} needs a name of at most {LONGEST_NAME} characters, got {name}")
    if name in (RECORD, "results.csv", "table.csv", "table.md", "sweep.png", "sweep.svg"):
        raise ValueError(f"{where} cannot be called {name}: that is a file of the sweep")


def _name(changes: dict[str, Any]) -> str:
    """A name from the options, as `p=0.1,losses=bss`; a mode is named by its word alone."""
    parts = [_text(value) if key == "mode" else f"{key}={_text(value)}" for key, value in changes.items()]
    return ",".join(parts) or "base"


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(_text, value)) or "none"
    if isinstance(value, dict):
        parts = [key if inner is None else f"{key}({_text(inner)})" for key, inner in value.items()]
        return ",".join(parts) or "none"
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return re.sub(r"[^\w.+-]+", "-", str(value))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
