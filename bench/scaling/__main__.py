"""`python -m bench.scaling`: predicted steps on many GPUs, and measured ones on two processes."""

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.digest import ROOT, file_digest
from bench.environment import METHOD, environment
from bench.scaling import report
from bench.scaling.cluster import Cluster
from bench.scaling.model import cases
from bench.scaling.processes import Training, measure
from bench.step.workloads import MAIN

MEASURED = (
    *METHOD,
    "stochca_kernels",
    "bench/scaling",
    "bench/cost.py",
    "bench/sizes.py",
    "bench/step_times.py",
    "bench/predictions.py",
    "bench/kernels",
    "bench/step/workloads.py",
)
WORKLOADS = [
    workload
    for workload in MAIN
    if workload.name in ("vit_base_patch16_224-B128", "vit_large_patch16_224-B64")
]
PROBABILITIES = (0.1, 0.5)
TRAININGS = [
    Training("vit_tiny_patch16_224", image_size=64, depth=12, batch=8, p=p, steps=16, repeats=6)
    for p in (0.1, 0.5, 0.8)
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Compute, run and print; arguments are those of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__)
    parser.add_argument("--output", type=Path, metavar="FILE", help="write a JSON file")
    parser.add_argument(
        "--step",
        type=Path,
        metavar="FILE",
        default=ROOT / "bench" / "results" / "step.json",
        help="result of bench.step that the time of one GPU is taken from, where it exists (%(default)s)",
    )
    parser.add_argument("--no-processes", action="store_true", help="leave out the run on two processes")
    args = parser.parse_args(arguments)
    start, machine = time.perf_counter(), environment(MEASURED)
    load = os.getloadavg()[0]  # threads that ran in the last minute, none of them ours
    measured = json.loads(args.step.read_text()) if args.step.exists() else None
    result: dict[str, Any] = {
        "load_before": load,
        "cluster": asdict(Cluster()),
        "cases": cases(WORKLOADS, PROBABILITIES, measured),
        "inputs": {"step": file_digest(args.step)},  # by name of the result
        "processes": [] if args.no_processes else [measure(training) for training in TRAININGS],
        **machine,
    }
    result["seconds"] = round(time.perf_counter() - start, 1)
    print(
        "Predictions for 1 to 1024 GPUs; no run on many GPUs was measured.", *report.origins(result), sep="\n"
    )
    print("", *report.lines(report.HEADER, report.rows(result)), sep="\n")
    print("", *report.lines(report.PROCESS_HEADER, report.process_rows(result)), sep="\n")
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
