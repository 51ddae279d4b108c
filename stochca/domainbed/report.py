"""What the runs came to: one row per run, and methods against domains."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from stochca.checkpoint import METRICS, SUMMARY, save_metrics, write_atomically
from stochca.domainbed.plan import Plan, Run
from stochca.history import History, Metric
from stochca.statistics import DEFINITIONS, NOTHING, Estimate, Spread, markdown_table, number, with_spread

MEAN = "mean over domains"


class Selection(NamedTuple):
    """What a reported accuracy is of.

    Args:
        label: In tables.
        column: Of results.
        text: What it is.
    """

    label: str
    column: str
    text: str


VALIDATION = Selection(
    "training-domain validation",
    "accuracy",
    "of the evaluations of a run, the one with the {best} on the held-out images of the training domains",
)
ORACLE = Selection(
    "oracle",
    "oracle_accuracy",
    "the evaluation with the best accuracy on the held-out images of the left-out domain, which in practice "
    "nobody has: no result of the method",
)
SWAD = Selection(
    "SWAD",
    "swad_accuracy",
    "the mean of the weights along the flat part of a run, chosen by the training domains' held-out images; "
    "without the runs that have not converged",
)


@dataclass(frozen=True)
class Row:
    """One method.

    Args:
        selection: What the accuracies are of.
        method: Its name.
        estimates: For each domain left out, and last for their mean.
    """

    selection: Selection
    method: str
    estimates: dict[str, Estimate]


def read_result(run: Run, domains: Sequence[str]) -> dict[str, Any]:
    """What a complete run came to, from its files.

    Args:
        run: The run.
        domains: All that there are.

    Returns:
        A row of `results.csv`; accuracies in percent, None for one that there is not.

    Raises:
        ValueError: The run was evaluated on other domains.
    """
    with open(run.folder / METRICS, newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    summary = json.loads((run.folder / SUMMARY).read_text())
    ending = "_out_top1"
    evaluated = [name.removesuffix(ending) for name in rows[0] if name.endswith(ending)]
    if sorted(evaluated) != sorted(domains):
        raise ValueError(
            f"{run.folder} was run with the domains {', '.join(sorted(evaluated))}, "
            f"now they are {', '.join(domains)}: choose another --output"
        )
    best = selected_row(rows, run.options.eval_metric)
    oracle = max(rows, key=lambda row: row[run.domain + ending])
    accuracy = f"{run.domain}_in_top1"
    return {
        "method": run.method,
        "seed": run.seed,
        "domain": run.domain,
        "selected_step": int(best["step"]),
        VALIDATION.column: best[accuracy],
        "oracle_step": int(oracle["step"]),
        ORACLE.column: oracle[accuracy],
        SWAD.column: summary.get(f"swad_{accuracy}"),
        "source_fraction": summary["source_fraction"],
        "images_per_second": summary["images_per_second"],
        "skipped": len(summary["skipped"]),
    }


def selected_row(rows: list[dict[str, float]], metric: Metric) -> dict[str, float]:
    """The evaluation that selected a run's best checkpoint."""
    history = History(metric)
    history.rows = rows
    return history.best()


def summarise(results: Sequence[dict[str, Any]], plan: Plan, kind: Spread) -> list[Row]:
    """The rows of the table: all methods by validation, then by oracle, then with SWAD where it is asked for.

    The mean over domains is taken within a seed that has all of them, and its spread over such seeds.
    """
    selections = [VALIDATION, ORACLE, SWAD] if plan.options.swad else [VALIDATION, ORACLE]
    return [
        Row(selection, method, _estimates(results, method, selection.column, plan.left_out, kind))
        for selection in selections
        for method in plan.options.methods
    ]


def _estimates(
    results: Sequence[dict[str, Any]], method: str, column: str, left_out: Sequence[str], kind: Spread
) -> dict[str, Estimate]:
    seeds: dict[int, dict[str, float]] = {}
    for result in results:
        if result["method"] == method and result[column] is not None:
            seeds.setdefault(result["seed"], {})[result["domain"]] = result[column]
    values = {name: [of[name] for of in seeds.values() if name in of] for name in left_out}
    values[MEAN] = [fmean(of.values()) for of in seeds.values() if len(of) == len(left_out)]
    return {name: Estimate(numbers, kind) for name, numbers in values.items()}


def write_reports(plan: Plan, runs: Sequence[Run]) -> str:
    """Write `results.csv`, `table.csv` and `table.md`.

    Args:
        plan: All runs.
        runs: Those that are complete, at least one.

    Returns:
        The content of `table.md`.
    """
    results = [read_result(run, plan.domains) for run in runs]
    rows = summarise(results, plan, plan.options.spread)
    filled = [
        {name: NOTHING if value is None else value for name, value in result.items()} for result in results
    ]
    save_metrics(plan.output / "results.csv", filled)
    save_metrics(plan.output / "table.csv", [_columns(row) for row in rows])
    text = markdown(rows, plan)

    def write(file: Path) -> None:
        file.write_text(text)

    write_atomically(plan.output / "table.md", write)
    return text


def _columns(row: Row) -> dict[str, Any]:
    columns: dict[str, Any] = {"selection": row.selection.label, "method": row.method}
    for name, estimate in row.estimates.items():
        columns[f"{name}_accuracy"] = number(estimate.mean, ".4f")
        columns[f"{name}_{estimate.kind.replace(' ', '_')}"] = number(estimate.spread, ".4f")
        columns[f"{name}_n"] = estimate.n
    return columns


def markdown(rows: Sequence[Row], plan: Plan) -> str:
    """One table for each selection, under its name, with what the numbers are below."""
    kind, n = plan.options.spread, len(plan.options.seeds)
    best = "best mean accuracy" if plan.options.eval_metric == "top1" else "lowest mean loss"
    titles = [name.replace("|", r"\|") for name in (*plan.left_out, MEAN)]
    header = ["method", *(f"{title}, %, mean ± {kind}, n = {n}" for title in titles)]
    parts = []
    for selection in dict.fromkeys(row.selection for row in rows):
        of = [row for row in rows if row.selection == selection]
        suffix = "" if selection is VALIDATION else f", {selection.label}"
        cells = [
            [row.method + suffix, *(_cell(estimate, n) for estimate in row.estimates.values())] for row in of
        ]
        title = selection.label[0].upper() + selection.label[1:]
        parts.append(f"**{title}**: {selection.text.format(best=best)}.\n\n{markdown_table(header, cells)}")
    return "\n\n".join([*parts, caption(plan)]) + "\n"


def _cell(estimate: Estimate, n: int) -> str:
    text = with_spread(estimate, ".2f")
    return text if estimate.n in (0, n) else f"{text} (n = {estimate.n})"


def caption(plan: Plan) -> str:
    """What the numbers are."""
    options, n = plan.options, len(plan.options.seeds)
    return (
        f"Accuracy on the {1 - options.holdout_fraction:.0%} of the left-out domain's images that are not "
        f"held out, after training on the other domains: mean ± {DEFINITIONS[options.spread]} over n = {n} "
        f"seed{'s' * (n != 1)}, or over as many as a cell says. The mean over domains is taken within each "
        "seed; its spread is that of the seeds' means."
    )
