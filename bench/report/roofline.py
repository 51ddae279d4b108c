"""The roofline of a case: how fast everybody computes, over how much is computed for each byte moved."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from bench.predictions import MATMUL_FLOPS_PER_S, MEMORY_BYTES_PER_S
from bench.report.cases import Case, Entry, matmul_rates, of_study, timed, title
from bench.report.markdown import flops_unit
from bench.report.plots import Roofline
from bench.sizes import size_of
from bench.step.providers import PROVIDERS
from bench.step.workloads import Workload
from bench.step_bytes import expected_bytes
from bench.step_predictions import PREDICTED
from bench.step_times import AUTHORS, FLOAT32, Provider

# Who computes in float32 whatever the case is the authors' computation, with TF32 or without.
_IN_FLOAT32 = {name: AUTHORS for name, of in PROVIDERS.items() if of.precision == torch.float32}
ON_PAPER = _IN_FLOAT32 | PREDICTED
# The GPU whose rates the predictions assume.
ASSUMED = "H200"


def roofline(result: Mapping[str, Any], where: str) -> Roofline | None:
    """Those in the first main case whose FLOPs were counted, and whose bytes can be counted on paper."""
    for case in of_study(result, "main"):
        points = {name: point for name, entry in timed(case).items() if (point := _point(case, name, entry))}
        if not points:
            continue
        roofs = _roofs(result, case, list(points))
        unit, name = flops_unit([*(rate for _, rate in points.values()), *roofs.values()])
        slope = MEMORY_BYTES_PER_S if _is_assumed(result) else None
        return Roofline(
            title=f"Roofline, bytes counted on paper: {title(case)}\n{where}",
            x="FLOP per byte moved: FLOPs counted, bytes counted on paper",
            y=f"rate, {name}/s",
            points={who: (intensity, rate / unit) for who, (intensity, rate) in points.items()},
            roofs={label: roof / unit for label, roof in roofs.items()},
            slope=None if slope is None else slope / unit,
            slope_name=f"memory, {MEMORY_BYTES_PER_S / 1e12:g} TB/s (assumed)",
        )
    return None


def _point(case: Case, name: str, entry: Entry) -> tuple[float, float] | None:
    """FLOP for each byte, and FLOP/s; None where one of them is not known."""
    provider = _on_paper(name, case["dtype"])
    if provider is None or not entry.get("flops"):
        return None
    recorded = case["workload"]
    workload = Workload(
        "", recorded["model"], recorded["batch"], recorded["image_size"], recorded.get("kwargs") or {}
    )
    moved = expected_bytes(size_of(workload), workload.batch, provider, case["draws"])
    return entry["flops"] / moved, 1e3 * entry["flops"] / entry["mean_ms"]


def _on_paper(name: str, dtype: str) -> Provider | None:
    """Whose kernels are known in a precision: compiled ones under autocast alone."""
    provider = ON_PAPER.get(name)
    if provider is None or dtype != "float32" or provider.dtype == "float32":
        return provider
    eager = not PROVIDERS[name].compiled
    return replace(provider, dtype="float32", pointwise=FLOAT32) if eager else None


def _roofs(result: Mapping[str, Any], case: Case, names: list[str]) -> dict[str, float]:
    """Rates of products in the precisions of those drawn: measured in the same run, else assumed."""
    measured = matmul_rates(result)
    wanted = [case["dtype"], *("float32" for name in names if ON_PAPER[name].dtype == "float32")]
    roofs = {f"products, {dtype}": measured[dtype] for dtype in dict.fromkeys(wanted) if dtype in measured}
    if not roofs and _is_assumed(result):
        return {"products, bfloat16 (assumed)": MATMUL_FLOPS_PER_S}
    return roofs


def _is_assumed(result: Mapping[str, Any]) -> bool:
    """Whether it was measured on the GPU whose rates the predictions assume."""
    return result.get("device") == "cuda" and ASSUMED in result["gpu"]["name"]
