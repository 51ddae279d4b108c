"""Tables of the scaling model, as fields of text."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

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
    "load before",
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
    return [
        [
            f"{run['model']}, {run['depth']} blocks, {run['image_size']} px, B={run['batch']}",
            f"{run['p']:g}",
            f"{run['alone_ms']:.1f}",
            f"{run['equal_ms']:.1f}",
            f"{run['independent_ms']:.1f}",
            f"{run['measured_ratio']:.3f}",
            f"{run['predicted_ratio']:.3f}",
            f"{result['load_before']:.1f} on {run['cores']} cores",
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
