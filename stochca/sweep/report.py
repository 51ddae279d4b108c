"""What the runs of a sweep came to: one row per run, one per setting, and the difference to the first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stochca.checkpoint import save_metrics, write_atomically
from stochca.statistics import (
    DEFINITIONS,
    NOTHING,
    Estimate,
    Spread,
    markdown_table,
    number,
    with_spread,
)
from stochca.sweep.options import Metric
from stochca.sweep.plan import Run
from stochca.sweep.runs import Outcome

METRICS: dict[Metric, str] = {"best_top1": "best top-1", "last_top1": "last top-1"}

# Of a run's summary, in the rows of runs.
SUMMARY_COLUMNS = ("steps", "best_step", "best_top1", "last_top1", "images_per_second", "source_fraction")


@dataclass(frozen=True)
class Row:
    """One setting.

    Args:
        name: Of the setting.
        p: The probability, where that number is all that distinguishes the setting.
        estimates: Of each accuracy, in percent.
        differences: To the first setting over the seeds that both have, in points, with standard errors.
    """

    name: str
    p: float | None
    estimates: dict[Metric, Estimate]
    differences: dict[Metric, Estimate]


def summarise(outcomes: Mapping[Run, Outcome], kind: Spread) -> list[Row]:
    """One row per setting, in their order."""
    settings = {run.setting.name: run.setting for run in outcomes}
    summaries: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in settings}
    for run, outcome in outcomes.items():
        if outcome.status == "complete":
            summaries[run.setting.name][run.seed] = outcome.summary
    first, *_ = summaries.values()

    def differences(of: dict[int, dict[str, Any]], metric: Metric) -> list[float]:
        if of is first:
            return []
        return [of[seed][metric] - first[seed][metric] for seed in of if seed in first]

    return [
        Row(
            name,
            settings[name].p,
            {metric: Estimate([one[metric] for one in of.values()], kind) for metric in METRICS},
            {metric: Estimate(differences(of, metric), "standard error") for metric in METRICS},
        )
        for name, of in summaries.items()
    ]


def write_reports(output: Path, outcomes: Mapping[Run, Outcome], rows: Sequence[Row], kind: Spread) -> str:
    """Write `results.csv`, `table.csv` and `table.md`.

    Args:
        output: Folder of the sweep.
        outcomes: Of its runs.
        rows: Of its settings.
        kind: Of the spread in the rows.

    Returns:
        The content of `table.md`.
    """
    runs = [
        {
            "setting": run.setting.name,
            "seed": run.seed,
            "status": outcome.status,
            **{name: outcome.summary.get(name, NOTHING) for name in SUMMARY_COLUMNS},
            "skipped": len(outcome.summary["skipped"]) if outcome.summary else NOTHING,
        }
        for run, outcome in outcomes.items()
    ]
    save_metrics(output / "results.csv", runs)
    save_metrics(output / "table.csv", [_columns(row, kind) for row in rows])
    text = markdown(rows, kind)

    def write(file: Path) -> None:
        file.write_text(text)

    write_atomically(output / "table.md", write)
    return text


def _columns(row: Row, kind: Spread) -> dict[str, Any]:
    spread = kind.replace(" ", "_")
    columns: dict[str, Any] = {"setting": row.name, "n": row.estimates["best_top1"].n}
    for metric, estimate in row.estimates.items():
        columns[f"{metric}_mean"] = number(estimate.mean, ".4f")
        columns[f"{metric}_{spread}"] = number(estimate.spread, ".4f")
    columns["difference_n"] = row.differences["best_top1"].n
    for metric, difference in row.differences.items():
        columns[f"{metric}_difference"] = number(difference.mean, ".4f")
        columns[f"{metric}_difference_standard_error"] = number(difference.spread, ".4f")
    return columns


def markdown(rows: Sequence[Row], kind: Spread) -> str:
    """The rows as a table, with what the columns mean below."""
    first = rows[0].name
    header = ["setting", "n"]
    header += [f"{name}, %, mean ± {kind}" for name in METRICS.values()]
    header += [f"{name} minus that of {first}, points, mean ± standard error" for name in METRICS.values()]
    header += ["seeds in common"]
    cells = [
        [
            row.name,
            str(row.estimates["best_top1"].n),
            *(with_spread(estimate, ".2f") for estimate in row.estimates.values()),
            *(with_spread(difference, "+.2f") for difference in row.differences.values()),
            str(row.differences["best_top1"].n or NOTHING),
        ]
        for row in rows
    ]
    return f"{markdown_table(header, cells)}\n\n{caption(rows, kind)}\n"


def caption(rows: Sequence[Row], kind: Spread) -> str:
    """What the numbers are."""
    return (
        f"Accuracy on the validation images: mean ± {DEFINITIONS[kind]} over {seeds(rows)}. Best is the "
        "evaluation that selects a run's checkpoint, so it is chosen on these images; last is the final one. "
        f"Differences to {rows[0].name} are taken seed by seed, with the standard error of their mean."
    )


def seeds(rows: Sequence[Row]) -> str:
    """The number of seeds in words."""
    counts = [row.estimates["best_top1"].n for row in rows]
    low, high = min(counts), max(counts)
    if low < high:
        return f"n = {low} to {high} seeds"
    return f"n = {low} seed{'s' * (low != 1)}"
