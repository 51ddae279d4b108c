"""The operator alone: what was measured and predicted of its goals, and what its programs need."""

from collections.abc import Mapping
from typing import Any

from bench import predictions
from bench.report.markdown import NOTHING, device, item, not_timed, number, paragraph, provenance, table
from bench.report.recorded import Results, not_measured

PROGRAM_HEADER = (
    "kernel",
    "inputs",
    "tile",
    "warps",
    "stages",
    "shape",
    "registers",
    "spilled",
    "shared",
    "WGMMA",
)


def measured(results: Results) -> str:
    """The goals, every case with its fastest rival, and whoever was not timed."""
    result = results.read("kernels")
    if result is None:
        return not_measured("kernels")
    goals = [
        [
            goal["goal"],
            f"{goal['at_least']:.2f}",
            NOTHING if goal["ratio"] is None else f"{goal['ratio']:.2f}",
            goal["verdict"] if goal["verdict"] == "reached" else f"**{goal['verdict']}**",
        ]
        for goal in result["goals"]
    ]
    parts = [
        paragraph(
            f"*Measured* on {device(result)}, {result['dtype']}: medians, and in brackets 20th and 80th",
            "percentiles. The ratio is the fastest rival's time over ours; **bold** where ours is slower.",
        ),
        table(["goal", "at least", "measured", "verdict"], goals),
        table(["case", "ours, us", "fastest rival", "its time, us", "ratio"], map(_case, result["cases"])),
        "\n".join(line for case in result["cases"] for line in _failures(case)),
        f"<sub>{provenance(result)}; {result['seconds']:.0f} s</sub>",
    ]
    return results.stale_note("kernels", result) + "\n\n".join(part for part in parts if part)


def prediction(results: Results) -> str:
    """What arithmetic says of the goals."""
    return table(predictions.HEADER, predictions.rows())


def programs(results: Results) -> str:
    """What each row of the tile table needs, one table for each GPU; inputs with equal figures in one row."""
    result = results.need("programs")
    tables = []
    for gpu in dict.fromkeys(program["name"].split("-")[1] for program in result["programs"]):
        inputs: dict[tuple[str, ...], list[str]] = {}
        for program in result["programs"]:
            kernel, of, arithmetic, tile, *shape = program["name"].split("-")
            if of == gpu:
                limit = program["shared_limit"]
                figures = (
                    program[key] for key in ("warps", "stages", "registers", "spills", "shared", "wgmma")
                )
                row = (f"`{kernel}`", tile, " ".join(shape), *map(str, figures))
                inputs.setdefault(row, []).append(arithmetic)
        rows = [
            [kernel, ", ".join(names), tile, warps, stages, shape, *usage]
            for (kernel, tile, shape, warps, stages, *usage), names in inputs.items()
        ]
        tables.append(
            f"**{gpu}**, {limit} bytes of shared memory for a program\n\n{table(PROGRAM_HEADER, rows)}"
        )
    return results.stale_note("programs", result) + "\n\n".join([*tables, f"<sub>{provenance(result)}</sub>"])


def _case(case: Mapping[str, Any]) -> list[str]:
    entries, rival, ratio = case.get("providers", {}), case.get("best_rival"), case.get("ratio")
    shown = NOTHING if ratio is None else f"{ratio:.2f}" if ratio >= 1 else f"**{ratio:.2f}**"
    return [case["name"], _time(entries.get("ours")), rival or NOTHING, _time(entries.get(rival)), shown]


def _time(entry: Mapping[str, Any] | None) -> str:
    if entry is None or "p50_us" not in entry:
        return NOTHING if entry is None else f"*{entry['status']}*"
    return f"{number(entry['p50_us'])} ({number(entry['p20_us'])}-{number(entry['p80_us'])})"


def _failures(case: Mapping[str, Any]) -> list[str]:
    """Everybody who was not timed, and why; or why nobody was."""
    entries = case.get("providers", {"all": {"status": "failed", **case}})
    return [
        item(f"{case['name']}, {name}: {not_timed(entry)}")
        for name, entry in entries.items()
        if entry["status"] != "timed"
    ]
