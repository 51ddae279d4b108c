"""Which pictures there are, by what has been recorded, and what they show."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.report.cases import (
    Case,
    Entry,
    growth,
    of_study,
    over_p,
    provider_names,
    timed,
    title,
)
from bench.report.markdown import device_name
from bench.report.plots import Bars, Lines, Picture
from bench.report.recorded import Results
from bench.report.roofline import roofline

FOLDER = "docs/figures"
STEP_RESULTS = ("step", "step-cpu")

Value = Callable[[Case, Entry], float | None]
Drawn = Callable[[Mapping[str, Any], str], Picture | None]


def pictures(results: Results) -> dict[str, Picture]:
    """All, by their names without the ending."""
    return {name: picture for of in STEP_RESULTS for name, picture in step_pictures(results, of).items()}


def step_pictures(results: Results, name: str) -> dict[str, Picture]:
    """Those of one result of `bench.step`, none where it has not been recorded."""
    result = results.read(name)
    if result is None:
        return {}
    where = device_name(result) + (", stale" if results.is_stale(result) else "")
    drawn = {f"{name}-{kind}": draw(result, where) for kind, draw in STEP_PICTURES.items()}
    return {name: picture for name, picture in drawn.items() if picture is not None}


def time_over_p(result: Mapping[str, Any], where: str) -> Picture | None:
    """Of everybody in the first setting that was measured for more than one p."""
    for name, cases in over_p(result).items():
        return _lines(f"Step over p: {name}\n{where}", "p", "mean step over coins, ms", cases, _p, _time)
    return None


def memory_over_p(result: Mapping[str, Any], where: str) -> Picture | None:
    """Peak without frozen weights; where that is not known, as on a CPU, what is kept for the backward."""

    def peak(case: Case, entry: Entry) -> float | None:
        return entry.get("peak_mib_without_frozen")

    def kept(case: Case, entry: Entry) -> float | None:
        return entry.get("saved_mib")

    for name, cases in over_p(result).items():
        title, axis = f"Memory over p: {name}\n{where}", "peak without frozen weights, MiB"
        of_backward = "saved for the backward, MiB"
        return _lines(title, "p", axis, cases, _p, peak) or _lines(title, "p", of_backward, cases, _p, kept)
    return None


def time_over_size(result: Mapping[str, Any], where: str) -> Picture | None:
    """Time of an image, as images grow."""
    cases = growth(result, "N")
    if len(cases) < 2:
        return None
    return _lines(
        f"An image over its size: {cases[0]['workload']['model']}, p={cases[0]['p']:g}\n{where}",
        "height and width, pixels",
        "mean step over coins, ms for each image",
        cases,
        lambda case: case["workload"]["image_size"],
        lambda case, entry: entry["mean_ms"] / case["workload"]["batch"],
    )


def ablation(result: Mapping[str, Any], where: str) -> Picture | None:
    """Time of everybody in the first case of the ablation."""
    for case in of_study(result, "ablation"):
        bars = {name: (entry["mean_ms"], entry.get("spread_ms")) for name, entry in timed(case).items()}
        if bars:
            return Bars(f"Savings: {title(case)}\n{where}", "mean step over coins, ms", bars)
    return None


STEP_PICTURES: Mapping[str, Drawn] = {
    "time-over-p": time_over_p,
    "memory-over-p": memory_over_p,
    "time-over-size": time_over_size,
    "ablation": ablation,
    "roofline": roofline,
}


def links(drawn: Mapping[str, Picture], folder: str) -> str:
    """Pictures in Markdown.

    Args:
        drawn: By name.
        folder: Where a page finds them.
    """
    return "\n".join(
        f"![{picture.title.splitlines()[0]}]({folder}/{name}.svg)" for name, picture in drawn.items()
    )


def _lines(
    heading: str,
    x: str,
    y: str,
    cases: Sequence[Case],
    at: Callable[[Case], float],
    value: Value,
) -> Picture | None:
    lines: dict[str, list[tuple[float, float]]] = {}
    for name in provider_names(cases):
        entries = [(case, timed(case)[name]) for case in cases if name in timed(case)]
        points = [(at(case), value(case, entry)) for case, entry in entries]
        known = [(x, y) for x, y in points if y is not None]
        if known:
            lines[name] = known
    if not lines:
        return None
    heights = [y for points in lines.values() for _, y in points]
    return Lines(heading, x, y, lines, log_y=max(heights) > 4 * min(heights))


def _p(case: Case) -> float:
    return case["p"]


def _time(case: Case, entry: Entry) -> float:
    return entry["mean_ms"]
