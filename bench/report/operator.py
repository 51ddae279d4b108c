"""What arithmetic says of the operator's goals, and what its programs need."""

from bench import predictions
from bench.report.markdown import provenance, table
from bench.report.recorded import Results

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
