"""The scorecard of `python -m tests.scorecard`."""

import json
from collections.abc import Mapping
from typing import Any, Literal

from bench.report.markdown import NOTHING, commit, device, item, number, paragraph, provenance, table
from bench.report.recorded import Results

COMMANDS = {
    "cpu": "make stress",
    "gpu": "python3 -m tests.scorecard",
}
"""What measures the rows of each device."""

Measured = Mapping[str, Any]


def scorecard(results: Results) -> str:
    """Every row with its target, and what was measured."""
    rows = [
        [name, row["figure"], row["target"], _figures(row["measured"]), _verdict(results, row["measured"])]
        for name, row in _rows(results).items()
    ]
    parts = [table(["row", "what is counted", "target", "measured", "verdict"], rows, left=5)]
    if off := _listed(results, "off"):
        parts += ["Cases that are off:", "\n".join(off)]
    if unmeasured := _listed(results, "unmeasured"):
        parts += ["Cases that could not be measured:", "\n".join(unmeasured)]
    return "\n\n".join(parts)


def where(results: Results) -> str:
    """Machines, versions and commits of the rows, and what measures those that are missing or stale."""
    rows = _rows(results)
    places: dict[str, list[str]] = {}
    for name, row in rows.items():
        if row["measured"]:
            places.setdefault(f"{device(row['measured'])}; {provenance(row['measured'])}", []).append(
                f"{name} ({_duration(row['measured']['seconds'])})"
            )
    lines = [item(f"{', '.join(names)}: {place}.") for place, names in places.items()]
    for kind, command in COMMANDS.items():
        missing = [name for name, row in rows.items() if not row["measured"] and _device(name) == kind]
        if missing:
            lines.append(
                item(f"{', '.join(missing)}: not measured; `{command}` measures on a {kind.upper()}.")
            )
    if stale := [name for name, row in rows.items() if row["measured"] and results.is_stale(row["measured"])]:
        lines.append(item(f"**Stale**, as code has changed after the commit: {', '.join(stale)}."))
    return "\n".join(lines)


def readme(results: Results) -> str:
    """The scorecard in a sentence."""
    rows = [row["measured"] for row in _rows(results).values()]
    measured = [row for row in rows if row]
    whole = [row for row in measured if row["off"] or not row["unmeasured"]]
    reached = [row for row in measured if row["reached"]]
    stale = sum(results.is_stale(row) for row in measured)
    commits = sorted({commit(row) for row in measured})
    return paragraph(
        f"Of {len(rows)} figures of reliability {len(reached)} reached their target,",
        f"{len(whole) - len(reached)} did not, {len(rows) - len(whole)} were not measured or in part",
        *([f"({stale} at an earlier state of the code)"] if stale else []),
        f"(commit {', '.join(commits)})." if commits else ".",
    )


def _rows(results: Results) -> dict[str, dict[str, Any]]:
    path = results.root / "bench" / "reliability.json"
    if not path.exists():
        raise FileNotFoundError(f"bench/reliability.json is missing: `{COMMANDS['cpu']}` records it")
    return json.loads(path.read_text())["rows"]


def _figures(measured: Measured | None) -> str:
    """Cases, those that are off or were not measured, and the largest of each other figure."""
    if measured is None:
        return "not measured"
    count = f"{measured['cases']:,} cases, {len(measured['off'])} off"
    if measured["unmeasured"]:
        count += f", {len(measured['unmeasured'])} not measured"
    others = [f"{_unscored(name)} {_short(value)}" for name, value in measured["figures"].items()]
    return "; ".join([count, *others])


def _verdict(results: Results, measured: Measured | None) -> str:
    if measured is None:
        return NOTHING
    reached = "reached" if measured["reached"] else "**missed**"
    if measured["unmeasured"] and not measured["off"]:
        reached = "measured in part"
    return f"{reached}, **stale**" if results.is_stale(measured) else reached


def _listed(results: Results, kind: Literal["off", "unmeasured"]) -> list[str]:
    """A line for each case that is off, or that was not measured."""
    lines = []
    for name, row in _rows(results).items():
        for case, reason in (row["measured"] or {kind: {}})[kind].items():
            first = next(iter(reason.splitlines()), "").replace("`", "'").replace("<", "&lt;")
            lines.append(item(f"{name}, {case}: {first[:300]}"))
    return lines


def _unscored(name: str) -> str:
    return name.replace("_", " ")


def _short(value: float) -> str:
    if value == int(value):
        return f"{int(value):,}"
    return number(value) if 1e-3 <= abs(value) < 1e6 else f"{value:.1e}"


def _duration(seconds: float) -> str:
    return f"{seconds} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _device(name: str) -> str:
    return "gpu" if name.endswith("-gpu") else "cpu"
