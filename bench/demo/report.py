"""The table, and what it does and does not show, both computed from the results."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.demo.cost import Cost
from bench.demo.digits import Labels
from bench.demo.experiment import DROP_PATH, PLAIN, STOCHCA, STOPPED, VARIANTS, Settings
from bench.demo.training import Result, Run, Variant


@dataclass(frozen=True)
class Paired:
    """A quantity over the seeds, and its difference to plain fine-tuning seed by seed, in percentage points.

    Args:
        values: In percent, one per seed.
        mean: Over the seeds.
        std: Standard deviation over the seeds.
        difference: Mean of the differences.
        error: Standard error of that mean.
        above: In how many seeds it is above plain.
    """

    values: list[float]
    mean: float
    std: float
    difference: float
    error: float
    above: int

    def __str__(self) -> str:
        """The paired difference in words."""
        return (
            f"{self.difference:+.1f} ± {self.error:.1f} points, above in {self.above} of {len(self.values)}"
        )


@dataclass(frozen=True)
class Row:
    """One variant.

    Args:
        name: As in the table.
        p: StochCA's probability, None for the others.
        noisy: Accuracy after training on partly wrong labels.
        clean: Accuracy after training on clean labels; None for the controls.
        clean_on_source: The same where every block reads the source.
        steps: Of a run.
        cost: Of a step.
        source_fraction: Share of the source's blocks that ran, mean over steps and seeds.
    """

    name: str
    p: float | None
    noisy: Paired
    clean: Paired | None
    clean_on_source: Paired | None
    steps: int
    cost: Cost
    source_fraction: float


def summarise(settings: Settings, results: Mapping[Run, Result], costs: Mapping[Variant, Cost]) -> list[Row]:
    """One row per variant, plain first."""

    def collect(variant: Variant, labels: Labels, quantity: str) -> list[float]:
        runs = [Run(variant, labels, settings.finetuning, seed) for seed in range(settings.seeds)]
        return [100 * getattr(results[run], quantity) for run in runs if run in results]

    def paired(variant: Variant, labels: Labels, quantity: str) -> Paired | None:
        values = collect(variant, labels, quantity)
        return compare(values, collect(PLAIN, labels, quantity)) if values else None

    rows = []
    for variant in VARIANTS:
        noisy = paired(variant, settings.noisy, "accuracy")
        assert noisy is not None
        rows.append(
            Row(
                name=variant.name,
                p=variant.p,
                noisy=noisy,
                clean=paired(variant, settings.clean, "accuracy"),
                clean_on_source=paired(variant, settings.clean, "accuracy_on_source"),
                steps=Run(variant, settings.noisy, settings.finetuning, 0).steps,
                cost=costs[variant],
                source_fraction=statistics.mean(collect(variant, settings.noisy, "source_fraction")) / 100,
            )
        )
    return rows


def compare(values: Sequence[float], plain: Sequence[float]) -> Paired:
    """Statistics of a variant's values against plain's for the same seeds, at least two."""
    differences = [value - base for value, base in zip(values, plain, strict=True)]
    return Paired(
        values=list(values),
        mean=statistics.mean(values),
        std=statistics.stdev(values),
        difference=statistics.mean(differences),
        error=statistics.stdev(differences) / math.sqrt(len(differences)),
        above=sum(difference > 0 for difference in differences),
    )


def table(rows: Sequence[Row], settings: Settings) -> str:
    """The rows as text, with what the columns mean below."""
    lines = [
        f"{'':24}{'accuracy':>13}{'to plain':>13}{'above':>8}{'steps':>7}{'step time, ms':>19}"
        f"{'time':>7}{'FLOPs':>7}{'saved':>7}{'source':>8}",
        f"{'':24}{'%':>13}{'points':>13}{'plain':>8}{'':7}{'p50 (p20-p80)':>19}"
        f"{'ratio':>7}{'ratio':>7}{'bytes':>7}{'ran':>8}",
    ]
    for row in rows:
        noisy, cost = row.noisy, row.cost
        difference = f"{noisy.difference:+.1f} ± {noisy.error:.1f}" if row.name != PLAIN.name else "-"
        above = f"{noisy.above} of {settings.seeds}" if row.name != PLAIN.name else "-"
        lines.append(
            f"{row.name:24}{f'{noisy.mean:.1f} ± {noisy.std:.1f}':>13}{difference:>13}{above:>8}{row.steps:7}"
            f"{f'{cost.p50:.2f} ({cost.p20:.2f}-{cost.p80:.2f})':>19}"
            f"{cost.time:7.2f}{cost.flops:7.3f}{cost.saved_bytes:7.3f}{row.source_fraction:8.1%}"
        )
    labels = settings.noisy
    lines += [
        "",
        f"Accuracy on unseen digits 5-9 after training on {labels.per_class} labels per class, of which "
        f"{labels.noise:.0%} were replaced:",
        f"mean ± standard deviation over {settings.seeds} seeds. To plain: mean ± standard error of the "
        "difference seed by seed.",
        "Step time: one core, variants taking turns. Ratios: to plain; FLOPs and the bytes kept for the",
        "backward are counted, expected over the coins. Source ran: share of its blocks that a step computed.",
    ]
    return "\n".join(lines)


def conclusions(rows: Sequence[Row], settings: Settings) -> list[str]:
    """What this run shows and does not show, one sentence each."""
    by_name = {row.name: row for row in rows}
    ours = [by_name[variant.name] for variant in STOCHCA]
    controls = [by_name[variant.name] for variant in (DROP_PATH, STOPPED)]
    return [
        _wrong_labels(ours, settings),
        _controls(ours, controls),
        _mechanism(by_name[PLAIN.name], ours, settings),
        _cost(ours),
        "One small model on one small data set: this shows how the method runs and what it changes, not what "
        "it gains on other images.",
    ]


def _each(rows: Sequence[Row], quantity: str) -> str:
    return "; ".join(f"{row.name}: {getattr(row, quantity)}" for row in rows)


def _wrong_labels(ours: Sequence[Row], settings: Settings) -> str:
    clear = [row for row in ours if abs(row.noisy.difference) > 2 * row.noisy.error]
    verdict = (
        "no p differs from plain by more than two standard errors"
        if not clear
        else "more than two standard errors from plain: "
        + ", ".join(f"p={row.p} ({'above' if row.noisy.difference > 0 else 'below'})" for row in clear)
    )
    return (
        f"With {settings.noisy.noise:.0%} wrong labels, against plain fine-tuning: {_each(ours, 'noisy')} "
        f"({verdict})."
    )


def _controls(ours: Sequence[Row], controls: Sequence[Row]) -> str:
    best = max(ours, key=lambda row: row.noisy.mean)
    ahead = [row.name for row in controls if row.noisy.mean >= best.noisy.mean]
    verdict = f"{' and '.join(ahead)} did" if ahead else "neither did"
    return (
        f"The controls: {_each(controls, 'noisy')}; {verdict} as well as or better than {best.name}, "
        "the best of the three here."
    )


def _mechanism(plain: Row, ours: Sequence[Row], settings: Settings) -> str:
    assert plain.clean_on_source is not None
    return (
        f"With {settings.clean.per_class} clean labels per class and every block reading the source, plain "
        f"fine-tuning has {plain.clean_on_source.mean:.1f} % and {_each(ours, 'clean_on_source')}: how far "
        f"the target has learned to read the source. Its own accuracy then: {_each(ours, 'clean')}."
    )


def _cost(ours: Sequence[Row]) -> str:
    times, flops = [row.cost.time for row in ours], [row.cost.flops for row in ours]
    return (
        f"A StochCA step took {min(times):.2f} to {max(times):.2f} times as long as a plain one with "
        f"{min(flops):.2f} to {max(flops):.2f} times the FLOPs: on so small a model the time is mostly "
        "overhead per operation, and says nothing about large ones."
    )
