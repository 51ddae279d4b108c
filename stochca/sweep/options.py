"""Options of `stochca sweep`. No torch here: help comes at once."""

# ruff: noqa: RUF009 (`_option` makes a dataclass field)

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from stochca.config import MAX_SEED, _option
from stochca.statistics import Spread

Metric = Literal["best_top1", "last_top1"]


@dataclass(kw_only=True)
class PlanOptions:
    """What is run: each setting with each seed, on top of the same base."""

    base_config: str | None = _option(
        None, "YAML file with options of stochca finetune; its output, resume and seed are not used"
    )
    base: dict[str, Any] = _option(
        {}, "options of stochca finetune, on top of --base-config: {epochs: 3, ...}"
    )
    p: list[float] = _option([], "settings that differ in p, as 0 0.1 0.3")
    modes: list[Literal["stochastic", "mix", "sum", "concat"]] = _option(
        [], "settings that differ in the mode, as [mix, sum, concat]"
    )
    settings: list[dict[str, Any]] = _option(
        [],
        "further settings, each by the options of stochca finetune that are its own, and a name if wanted: "
        "[{p: [0, 0.3]}, {p_schedule: [0.5, 0.1]}, {name: spectral, p: 0.1, losses: [bss]}]",
    )
    seeds: list[int] = _option([0, 1, 2], "seeds of the runs of each setting")


@dataclass(kw_only=True)
class SweepOptions(PlanOptions):
    """The sweep."""

    output: str = _option("output/sweep", "folder of the sweep; one that holds it already is continued")
    jobs: int | None = _option(
        None, "runs at once; if not given, as many as there are GPUs, or half of the CPU's cores"
    )
    spread: Spread = _option(
        "standard deviation", "spread over seeds that is shown: of a run, or the error of the mean"
    )
    metric: Metric = _option("best_top1", "accuracy that is drawn")

    def __post_init__(self) -> None:
        if self.jobs is not None and self.jobs < 1:
            raise ValueError(f"--jobs must be at least 1, got {self.jobs}")
        if not self.seeds:
            raise ValueError("--seeds must hold at least one seed, got none")
        if not all(0 <= seed <= MAX_SEED for seed in self.seeds):
            raise ValueError(f"--seeds must be between 0 and {MAX_SEED}, got {self.seeds}")
        if not all(0 <= p <= 1 for p in self.p):
            raise ValueError(f"--p must be between 0 and 1, got {self.p}")
        for name, values in (("seeds", self.seeds), ("p", self.p), ("modes", self.modes)):
            _check_distinct(name, values)
        if not (self.p or self.modes or self.settings):
            raise ValueError("nothing to compare: give --p, --modes or --settings")


def _check_distinct(name: str, values: Sequence[Any]) -> None:
    if len(set(values)) < len(values):
        raise ValueError(f"--{name} must differ from each other, got {values}")
