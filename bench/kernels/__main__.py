"""`python -m bench.kernels --quick --output bench/results/kernels.json`."""

import argparse
import json
import os
import re
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.environment import environment
from bench.kernels.floors import measure_ceilings
from bench.kernels.goals import GOALS, judge
from bench.kernels.measure import Settings, all_cases, measure
from bench.kernels.providers import providers
from bench.kernels.report import case_lines, goal_lines

ROUNDS, QUICK_ROUNDS, CPU_ROUNDS = 100, 20, 2
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark; arguments are those of the command line."""
    args = _parse(arguments)
    device = torch.device(args.device)
    # A backward runs on the stream of its forward, and only another stream than the default can be captured.
    with torch.cuda.stream(torch.cuda.Stream()) if device.type == "cuda" else nullcontext():
        _run(args, device)


def _run(args: argparse.Namespace, device: torch.device) -> None:
    start, machine = time.perf_counter(), environment(("stochca_kernels", "bench/kernels"))
    rounds = CPU_ROUNDS if device.type == "cpu" else QUICK_ROUNDS if args.quick else ROUNDS
    dtype = DTYPES[args.dtype]
    settings = Settings(device, dtype, rounds, measure_ceilings(dtype, rounds, device))
    result: dict[str, Any] = {
        "device": args.device,
        "dtype": args.dtype,
        "rounds": rounds,
        "ceilings": asdict(settings.ceilings),
        "cases": [],
        **machine,
    }
    for case in args.cases:
        result["cases"].append(measure(case, providers(case.path, case.shape), settings))
        print(*case_lines(result["cases"][-1]), sep="\n", flush=True)
        result["goals"] = judge(GOALS, result["cases"])
        result["seconds"] = round(time.perf_counter() - start, 1)
        if args.output:  # after each case, so that a run that is stopped leaves what it has
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(result, indent=2) + "\n")
    print("", *goal_lines(result["goals"]), sep="\n")
    copy, matmul = settings.ceilings.copy_bytes_per_s, settings.ceilings.matmul_flops_per_s
    print(f"\n{len(args.cases)} cases in {result['seconds']:.0f} s, {args.dtype}")
    print(f"copy {copy / 1e12:.2f} TB/s, product {matmul / 1e12:.1f} TFLOP/s")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels",
        description="Time the operator against what a user would call instead.",
    )
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds of each, not {ROUNDS}")
    parser.add_argument("--only", metavar="REGEX", default="", help="cases whose name matches")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write a JSON file")
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a tiny shape, kernels interpreted"
    )
    parser.add_argument(
        "--dtype",
        choices=list(DTYPES),
        help="default: bfloat16, on the CPU float32 (bfloat16 is not interpreted)",
    )
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU")
    if args.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("--device cpu: set TRITON_INTERPRET=1, which Triton reads as it is imported")
    if args.device == "cpu" and args.dtype == "bfloat16":
        parser.error("--dtype bfloat16: Triton's interpreter multiplies it wrongly, use float32")
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    args.cases = [case for case in all_cases(torch.device(args.device)) if re.search(args.only, case.name)]
    if not args.cases:
        parser.error(f"--only {args.only}: no case has such a name")
    return args


if __name__ == "__main__":
    main()
