"""The cases of a recorded `bench.step`, as its tables and pictures ask for them."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

Case = Mapping[str, Any]
Entry = Mapping[str, Any]

TIMED = "timed"
AXES: Mapping[str, tuple[str, Callable[[Case], float | None]]] = {
    "p": ("p", lambda case: case["p"]),
    "N": ("pixels", lambda case: case["workload"].get("image_size")),
    "B": ("B", lambda case: case["workload"].get("batch")),
    "depth": ("blocks", lambda case: case["workload"].get("kwargs", {}).get("depth")),
}
"""By study: what is varied, and its value in a case."""


def of_study(result: Mapping[str, Any], *studies: str) -> list[Case]:
    """Cases of some studies, in the order in which they were measured."""
    return [case for case in result.get("cases", []) if case["study"] in studies]


def timed(case: Case) -> dict[str, Entry]:
    """Entries of those providers that were timed."""
    return {name: entry for name, entry in case["providers"].items() if entry["status"] == TIMED}


def provider_names(cases: Iterable[Case]) -> list[str]:
    """Everybody in some cases, each once, in the order of their first appearance."""
    return list(dict.fromkeys(name for case in cases for name in case["providers"]))


def title(case: Case) -> str:
    """As in `ViT-B/16 at 224, B=128, bfloat16, p=0.1`."""
    return f"{setting(case)}, p={case['p']:g}"


def setting(case: Case) -> str:
    """Workload and precision of a case, without p."""
    workload = case["workload"]
    return f"{workload.get('title', workload['name'])}, B={workload['batch']}, {case['dtype']}"


def over_p(result: Mapping[str, Any]) -> dict[str, list[Case]]:
    """Cases that differ in p alone, by their setting, p rising; settings of one p are left out.

    Cases of the main study count too; of two with the same p the one of more providers is taken.
    """
    by_setting: dict[str, dict[float, Case]] = {}
    for case in sorted(of_study(result, "main", "p"), key=lambda case: len(timed(case))):
        by_setting.setdefault(setting(case), {})[case["p"]] = case
    order = dict.fromkeys(setting(case) for case in of_study(result, "main", "p"))
    return {
        name: [by_setting[name][p] for p in sorted(by_setting[name])]
        for name in order
        if len(by_setting[name]) > 1
    }


def growth(result: Mapping[str, Any], study: str) -> list[Case]:
    """Cases of a study of growth in the order of what is varied; those of unknown size are left out."""
    value = AXES[study][1]
    known = [(at, case) for case in of_study(result, study) if (at := value(case)) is not None]
    return [case for _, case in sorted(known, key=lambda pair: pair[0])]


def matmul_rates(result: Mapping[str, Any]) -> dict[str, float]:
    """FLOP/s of large products in the same run, by precision; if one is known, that of the first case."""
    rates = result.get("matmul_flops_per_s_by_dtype")
    if rates is None and result.get("matmul_flops_per_s") and result.get("cases"):
        rates = {result["cases"][0]["dtype"]: result["matmul_flops_per_s"]}
    return rates or {}
