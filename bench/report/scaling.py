"""What `bench.scaling` expects of many GPUs, and found on two processes."""

from collections.abc import Mapping
from typing import Any

from bench.report.markdown import item, paragraph, provenance, table
from bench.report.pictures import FOLDER, links
from bench.report.plots import Lines, Picture
from bench.report.recorded import Results, not_measured
from bench.scaling import report

NAME = "scaling"
# Which numbers of GPUs the table has; the picture has all.
GPUS = (1, 8, 64, 1024)


def section(results: Results) -> str:
    """The model's steps on 1 to 1024 GPUs, a *prediction*; and the steps of two processes, measured."""
    result = results.read(NAME)
    if result is None:
        return not_measured(NAME)
    parts = [
        paragraph(
            "A *prediction*: no run on many GPUs was measured. Equal coins are drawn alike by all ranks;",
            "where coins are independent, ranks wait for the slowest: as expected by formula, and simulated.",
            "The step of one GPU that it starts from:",
        ),
        "\n".join(item(sentence) for sentence in report.origins(result)),
        table(report.HEADER, report.rows(result, GPUS), left=3),
    ]
    parts += [links(pictures(results), FOLDER.removeprefix("docs/"))]
    if result["processes"]:
        measured = (
            f"*Measured* on {result['machine']}: two processes of one thread each, and what the model expects"
        )
        parts += [
            paragraph(f"{measured} from the times of one alone."),
            table(report.PROCESS_HEADER, report.process_rows(result)),
        ]
    note = results.stale_note(NAME, result)
    parts += [f"<sub>{provenance(result)}; {result['seconds']:.0f} s</sub>"]
    return note + "\n\n".join(part for part in parts if part)


def pictures(results: Results) -> dict[str, Picture]:
    """The picture of the model, none where it has not been recorded."""
    result = results.read(NAME)
    if result is None or not result["cases"]:
        return {}
    return {f"{NAME}-efficiency": efficiency(result, ", stale" if results.is_stale(result) else "")}


def efficiency(result: Mapping[str, Any], mark: str) -> Picture:
    """Predicted efficiency over the number of GPUs."""
    first = result["cases"][0]
    cases = [c for c in result["cases"] if (c["title"], c["p"]) == (first["title"], first["p"])]
    return Lines(
        title=f"Predicted efficiency: {first['title']}, p={first['p']:g}{mark}",
        x="GPUs",
        y="time of one GPU over that of many, %",
        lines={
            f"{case['strategy']}, {kind} coins": [
                (row["gpus"], 100 * row[f"{kind}_efficiency"]) for row in case["rows"]
            ]
            for case in cases
            for kind in ("equal", "independent")
        },
        log_x=True,
    )
