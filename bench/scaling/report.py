"""Tables of the scaling model, as fields of text."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# Mean number of running threads up to which cores count as idle.
IDLE_LOAD = 0.5
HEADER = [
    "workload of each GPU",
    "p",
    "strategy",
    "GPUs",
    "equal coins, ms",
    "independent, ms",
    "simulated, ms",
    "efficiency, equal",
    "efficiency, independent",
    "images/s, equal",
    "weights and states, GiB",
]
PROCESS_HEADER = [
    "trained on two processes",
    "p",
    "alone, ms",
    "equal coins, ms",
    "independent, ms",
    "independent / equal",
    "predicted",
]


def rows(result: Mapping[str, Any], gpus: Sequence[int] | None = None) -> list[list[str]]:
    """Expected steps.

    Args:
        result: Of `bench.scaling`.
        gpus: Which numbers of GPUs; None for all.
    """
    return [
        [
            f"{case['title']}",
            f"{case['p']:g}",
            case["strategy"],
            f"{row['gpus']}",
            f"{row['equal_ms']:.2f}",
            f"{row['independent_ms']:.2f}",
            f"{row['simulated_ms']:.2f} ± {row['simulated_error_ms']:.2f}",
            f"{row['equal_efficiency']:.1%}",
            f"{row['independent_efficiency']:.1%}",
            f"{row['images_per_s']:,.0f}",
            f"{row['states_gib']:.2f}",
        ]
        for case in result["cases"]
        for row in case["rows"]
        if gpus is None or row["gpus"] in gpus
    ]


def process_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """What two processes took, and what their times alone predict: comparable where cores are idle."""
    load = result.get("load_before", 0.0)
    busy = f" (cores were busy: load {load:.1f} before)" if load > IDLE_LOAD else ""
    return [
        [
            f"{run['model']}, {run['depth']} blocks, {run['image_size']} px, B={run['batch']}{busy}",
            f"{run['p']:g}",
            f"{run['alone_ms']:.1f}",
            f"{run['equal_ms']:.1f}",
            f"{run['independent_ms']:.1f}",
            f"{run['measured_ratio']:.3f}",
            f"{run['predicted_ratio']:.3f}",
        ]
        for run in result["processes"]
    ]


def origins(result: Mapping[str, Any]) -> list[str]:
    """Where the time of one GPU is from, a sentence for each workload and p."""
    sentences = (
        f"{case['title']}, p={case['p']:g}: a step on one GPU takes {case['one_gpu_ms']:.1f} "
        f"ms, {case['one_gpu']}."
        for case in result["cases"]
    )
    return list(dict.fromkeys(sentences))


def lines(header: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    """A table as aligned lines of text, the first column to the left."""
    table = [list(header), *map(list, body)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            [
                f"{row[0]:{widths[0]}}",
                *(f"{field:>{width}}" for field, width in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in table
    ]
