"""Which runs there are, what each trains on, and the record that a continued command must agree with."""

import dataclasses
import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stochca.checkpoint import SUMMARY, read_config, save_config
from stochca.config import DomainBedOptions, changed_options, flag
from stochca.data import check_layout, open_domains
from stochca.run_data import RunData

RECORD = "domainbed.yaml"

# A continued command may have more of them.
GROWING = ("methods", "seeds", "test_domains")

# The options of plain fine-tuning.
PLAIN: dict[str, Any] = {"p": 0.0, "p_schedule": None, "mode": "stochastic"}


@dataclass(frozen=True)
class Run:
    """One method with one seed, without one domain.

    Args:
        method: Its name.
        seed: Of the run, and of the domains' splits.
        domain: The one that is left out.
        options: Of the run.
    """

    method: str
    seed: int
    domain: str
    options: DomainBedOptions = field(hash=False)

    @property
    def folder(self) -> Path:
        """Of the run."""
        return Path(self.options.output)

    @property
    def is_complete(self) -> bool:
        """Whether its summary is written."""
        return (self.folder / SUMMARY).is_file()

    def __str__(self) -> str:
        return f"{self.method}, seed {self.seed}, without {self.domain}"


@dataclass(frozen=True)
class Plan:
    """All runs.

    Args:
        options: With the names of the domains that are left out.
        domains: All that there are.
    """

    options: DomainBedOptions
    domains: list[str]

    @property
    def output(self) -> Path:
        """The folder of all runs."""
        return Path(self.options.output)

    @property
    def left_out(self) -> list[str]:
        """The domains that are left out, one after the other."""
        return self.options.test_domains or []

    def runs(self) -> list[Run]:
        """Every method for the first seed and domain, then for the next: comparisons come early."""
        return [
            Run(method, seed, domain, run_options(self.options, method, seed, domain))
            for seed in self.options.seeds
            for domain in self.left_out
            for method in self.options.methods
        ]


def make_plan(options: DomainBedOptions) -> Plan:
    """Look at the domains, and choose those to leave out.

    Args:
        options: Of the command.

    Returns:
        The plan; nothing is written.

    Raises:
        FileNotFoundError: No folder of domains.
        ValueError: An option does not fit, or the folder is not one of at least two domains of equal classes.
    """
    if options.data_dir is None:
        raise ValueError("--data-dir must be a folder with one folder per domain, and was not given")
    if options.seed != type(options)().seed:
        raise ValueError(f"--seed would be without effect: give --seeds {options.seed}")
    if options.resume is not None:
        raise ValueError(f"--resume is not needed: what is in --output {options.output} is continued")
    for loss in options.losses:
        if "miro" in ([loss] if isinstance(loss, str) else loss):
            raise ValueError(
                "--losses are those of all methods and must be without miro: "
                "give --methods miro and --miro-weight"
            )
    if options.layout is not None:
        check_layout(options.layout, options.data_dir)
    domains = list(
        open_domains(options.data_dir, seed=options.seeds[0], holdout_fraction=options.holdout_fraction)
    )
    left_out = domains if options.test_domains is None else options.test_domains
    if not left_out or len(set(left_out)) < len(left_out):
        raise ValueError(f"--test-domains must be different domains, at least one, got {left_out}")
    for name in left_out:
        if name not in domains:
            nearest = difflib.get_close_matches(name, domains, n=1, cutoff=0)[0]
            raise ValueError(
                f"--test-domains has {name}, which is not in {options.data_dir}: "
                f"the nearest is {nearest}, all are {', '.join(domains)}"
            )
    return Plan(dataclasses.replace(options, test_domains=left_out), domains)


def run_options(options: DomainBedOptions, method: str, seed: int, domain: str) -> DomainBedOptions:
    """The options of one run, which do not depend on what other runs there are."""
    own: dict[str, Any] = {
        "seed": seed,
        "output": str(Path(options.output) / method / f"seed-{seed}" / domain),
        "methods": [method],
        "seeds": [seed],
        "test_domains": [domain],
        "spread": type(options)().spread,
    }
    if "stochca" not in method:
        own |= PLAIN
    if "miro" in method:
        own["losses"] = [*options.losses, {"miro": {"weight": options.miro_weight}}]
    return dataclasses.replace(options, **own)


def leave_one_out(options: DomainBedOptions, left_out: str) -> RunData:
    """The images of one run.

    Args:
        options: Of the run.
        left_out: The domain that neither trains nor selects.

    Returns:
        Training on the "in" splits of the other domains, selection by their "out" splits; evaluated are
        those, and both splits of the domain left out.
    """
    assert options.data_dir is not None
    domains = open_domains(options.data_dir, seed=options.seed, holdout_fraction=options.holdout_fraction)
    test = domains.pop(left_out)
    selection = {f"{name}_out": splits["out"] for name, splits in domains.items()}
    return RunData(
        train=[splits["in"] for splits in domains.values()],
        evaluations={**selection, f"{left_out}_in": test["in"], f"{left_out}_out": test["out"]},
        selection=list(selection),
    )


def check_folder(plan: Plan) -> None:
    """Check that the folder can hold these runs.

    Raises:
        FileExistsError: It holds something else.
        ValueError: It holds runs with other options, or of methods, seeds or domains that are gone.
    """
    output, path = plan.output, plan.output / RECORD
    if path.is_file():
        saved = read_config(path)
        if differences := list(_differences(saved, plan.options)):
            raise ValueError(
                f"{output} holds runs with other options: {'; '.join(differences)}; choose another --output"
            )
    # What is hidden may be a record that was never complete.
    elif output.is_file() or (output.is_dir() and any(not p.name.startswith(".") for p in output.iterdir())):
        raise FileExistsError(
            f"--output {output} exists and holds no runs of stochca domainbed: choose another one"
        )


def save_record(plan: Plan) -> None:
    """Write the options that continue the command."""
    plan.output.mkdir(parents=True, exist_ok=True)
    save_config(plan.output / RECORD, dataclasses.asdict(plan.options))


def _differences(saved: dict[str, Any], options: DomainBedOptions) -> Iterator[str]:
    free = {name: saved[name] for name in (*GROWING, "spread")}
    yield from changed_options(saved, dataclasses.replace(options, **free))
    for name in GROWING:
        now = getattr(options, name)
        if gone := [value for value in saved[name] if value not in now]:
            yield f"{flag(name)} was {saved[name]}, is {now}, which lacks {gone}"
