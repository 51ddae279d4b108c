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
        seeds = len(self.values)
        return f"{self.difference:+.1f} ± {self.error:.1f} points (above in {self.above} of {seeds} seeds)"


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
        runs = [run for run in results if (run.variant, run.labels) == (variant, labels)]
        return [100 * getattr(results[run], quantity) for run in runs]

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
    layout = "{:23}  {:>11}  {:>11}  {:>6}  {:>5}  {:>18}  {:>5}  {:>5}  {:>5}  {:>6}"
    lines = [
        layout.format(
            "", "accuracy", "to plain", "above", "", "step, ms", "time", "FLOPs", "bytes", "source"
        ),
        layout.format("", "%", "points", "plain", "steps", "p50 (p20-p80)", "ratio", "ratio", "ratio", "ran"),
    ]
    for row in rows:
        noisy, cost = row.noisy, row.cost
        is_plain = row.name == PLAIN.name
        lines.append(
            layout.format(
                row.name,
                f"{noisy.mean:.1f} ± {noisy.std:.1f}",
                "" if is_plain else f"{noisy.difference:+.1f} ± {noisy.error:.1f}",
                "" if is_plain else f"{noisy.above} of {settings.seeds}",
                row.steps,
                f"{cost.p50:.1f} ({cost.p20:.1f}-{cost.p80:.1f})",
                f"{cost.time:.2f}",
                f"{cost.flops:.3f}",
                f"{cost.saved_bytes:.3f}",
                f"{row.source_fraction:.1%}",
            )
        )
    labels = settings.noisy
    legend = f"""
accuracy  on unseen digits 5-9, mean ± standard deviation over {settings.seeds} seeds, after training
          on {labels.per_class} labels per class, of which {labels.noise:.0%} are replaced at random
to plain  difference to plain, seed by seed: mean ± standard error, and in how many seeds it is above
step      measured on one core, the variants taking turns
ratios    to plain; FLOPs and bytes kept for the backward are counted, expected over the coins
source    share of the source's blocks that a step ran, mean over all steps"""
    return "\n".join([*lines, legend])


def conclusions(rows: Sequence[Row], settings: Settings) -> list[str]:
    """What this run shows and does not show."""
    by_name = {row.name: row for row in rows}
    ours = [by_name[variant.name] for variant in STOCHCA]
    controls = [by_name[variant.name] for variant in (DROP_PATH, STOPPED)]
    return [
        _wrong_labels(ours, settings),
        _controls(ours, controls),
        _mechanism(by_name[PLAIN.name], ours, settings),
        _cost(ours),
        "Limits: one small model and data set, in a setting chosen in earlier trials (on other seeds) "
        "because plain fine-tuning learns some of the wrong labels there; without augmentation, or with "
        "more, no variant stood out. It shows that the method runs and what it changes, not what it gains "
        "elsewhere.",
    ]


def _each(rows: Sequence[Row], quantity: str) -> str:
    return ", ".join(f"{row.name} {getattr(row, quantity)}" for row in rows)


def _wrong_labels(ours: Sequence[Row], settings: Settings) -> str:
    clear = [row.name for row in ours if abs(row.noisy.difference) > 2 * row.noisy.error]
    verdict = f"only {' and '.join(clear)}" if 0 < len(clear) < len(ours) else "each" if clear else "none"
    return (
        f"Wrong labels, against plain fine-tuning: {_each(ours, 'noisy')}; {verdict} differs by more than "
        f"two standard errors at n = {settings.seeds}."
    )


def _controls(ours: Sequence[Row], controls: Sequence[Row]) -> str:
    best = max(ours, key=lambda row: row.noisy.mean)
    ahead = [row.name for row in controls if row.noisy.mean >= best.noisy.mean]
    verdict = (
        f"{' and '.join(f'{name!r}' for name in ahead)} did as well as {best.name} or better: what it does "
        "against wrong labels is not particular to it"
        if ahead
        else f"neither reached the mean of {best.name} in this run"
    )
    return f"Controls: {_each(controls, 'noisy')}; {verdict}."


def _mechanism(plain: Row, ours: Sequence[Row], settings: Settings) -> str:
    assert plain.clean_on_source is not None
    return (
        f"Mechanism, {settings.clean.per_class} clean labels per class: when every block reads the source, "
        f"plain fine-tuning is right in {plain.clean_on_source.mean:.1f} %, against it "
        f"{_each(ours, 'clean_on_source')}. That is how far the target has learned to read the source. "
        f"The target alone: {_each(ours, 'clean')}."
    )


def _cost(ours: Sequence[Row]) -> str:
    times, flops = [row.cost.time for row in ours], [row.cost.flops for row in ours]
    return (
        f"Cost: a StochCA step took {min(times):.2f} to {max(times):.2f} times as long as a plain one, with "
        f"{min(flops):.2f} to {max(flops):.2f} times the FLOPs. On so small a model time is mostly overhead "
        "per operation, and the savings of class-token rows weigh more than in a deep one."
    )
