"""`python -m bench.step --quick --output bench/results/step.json`.

All of these are estimates. On an H200 everything takes three hours; `--quick` ends within five minutes, half
of which is compilation, and names what it has not reached by then: `--budget 450` reaches all of it. `--cpu`
takes about nine minutes on two cores that do nothing else, half of it for the first case, which is the one
that the goals are about.
"""

import argparse
import json
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.environment import METHOD, environment
from bench.step.cases import Case, cpu_cases, dtype_name, gpu_cases, quick_gpu_cases, tiny_cases
from bench.step.clock import Deadline
from bench.step.goals import Goal, cpu_goals, gpu_goals, judge
from bench.step.measure import Settings, broken_reason, measure, not_measured
from bench.step.providers import PROVIDERS
from bench.step.rate import matmul_rates
from bench.step.report import case_lines, goal_lines
from bench.step.stage import Stage, free_memory

MEASURED = (
    *METHOD,
    "stochca_kernels",
    "bench/cost.py",
    "bench/counts.py",
    "bench/kernels/clock.py",
    "bench/step",
)
# How many draws stand for all, and how often each is run.
FULL, QUICK, CPU, TINY = (16, 5), (8, 4), (8, 3), (2, 2)
QUICK_SECONDS = 290.0


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark; arguments are those of the command line."""
    args = _parse(arguments)
    # A graph that is compiled again and again is a failure, not a reason to run eagerly in silence.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        _run(args)


def _run(args: argparse.Namespace) -> None:
    start, machine = time.perf_counter(), environment(MEASURED)
    deadline = Deadline(args.budget)
    device = torch.device("cpu" if args.cpu or args.tiny else "cuda")
    if device.type == "cuda":  # products in float32 are products of float32, as is torch's default
        torch.set_float32_matmul_precision("highest")
    cases: list[Case] = args.cases
    goals: list[Goal] = [] if args.tiny else cpu_goals() if args.cpu else gpu_goals()
    rates = matmul_rates(_dtypes(cases), device)
    num_draws, rounds = TINY if args.tiny else CPU if args.cpu else QUICK if args.quick else FULL
    settings = Settings(num_draws, rounds, deadline, rates)
    result: dict[str, Any] = {
        "device": device.type,
        "rounds": rounds,
        "allow_tf32": torch.backends.cuda.matmul.allow_tf32,
        "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
        "without": args.without,
        "matmul_flops_per_s": rates[cases[0].dtype],
        "matmul_flops_per_s_by_dtype": {dtype_name(dtype): rate for dtype, rate in rates.items()},
        **machine,
        "seconds": 0.0,
        "goals": judge(goals, []),
        "cases": [],
    }
    stage: Stage | None = None
    for case in cases:
        is_usable = stage is None or stage.broken_by is None
        if is_usable and (stage is None or stage.setting.workload != case.workload):
            stage = None
            torch.compiler.reset()
            free_memory()
        recorded, stage = _measure(case, stage, device, settings)
        result["cases"].append(recorded)
        result["goals"] = judge(goals, result["cases"])
        result["seconds"] = round(time.perf_counter() - start, 1)
        _write(result, args.output)  # after each case, so that a run that is stopped leaves what it has
        print(*case_lines(recorded), f"    {result['seconds']:.0f} s since the start", sep="\n", flush=True)
    if goals:
        print("", *goal_lines(result["goals"]), sep="\n")
    products = ", ".join(f"{dtype_name(dtype)} {rate / 1e12:.2f}" for dtype, rate in rates.items())
    print(f"\n{len(cases)} cases in {result['seconds']:.0f} s; matrix products in TFLOP/s: {products}")


def _measure(
    case: Case, stage: Stage | None, device: torch.device, settings: Settings
) -> tuple[dict[str, Any], Stage | None]:
    """Measure a case, whatever happens."""
    if settings.deadline.passed():
        return not_measured(case, "not reached", "no time was left"), stage
    if stage is not None and stage.broken_by is not None:
        return not_measured(case, "not reached", broken_reason(stage.broken_by)), stage
    try:
        stage = stage or Stage(case.workload, device)
        return measure(case, stage, settings), stage
    except Exception as error:  # the workload itself does not fit, say: the other cases go on
        return not_measured(case, "failed", f"{type(error).__name__}: {error}"[:1000]), None


def _dtypes(cases: Sequence[Case]) -> list[torch.dtype]:
    """All precisions that occur, the first case's first."""
    return list(
        dict.fromkeys(
            dtype
            for case in cases
            for dtype in (case.dtype, *(PROVIDERS[name].precision_in(case.dtype) for name in case.providers))
        )
    )


def _write(result: dict[str, Any], output: Path | None) -> None:
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=2) + "\n")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.step",
        description="Time training steps of StochCA and of what a user would run instead.",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="what the goals are about, on a GPU")
    size.add_argument("--cpu", action="store_true", help="a reduced set on the CPU")
    size.add_argument("--tiny", action="store_true", help="a model of no use on the CPU, in seconds")
    parser.add_argument("--only", metavar="REGEX", default="", help="cases whose name matches")
    parser.add_argument("--without", metavar="REGEX", help="providers whose name matches are left out")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write a JSON file")
    parser.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help=f"after which nothing new is begun; default {QUICK_SECONDS:g} with --quick, else none",
    )
    args = parser.parse_args(arguments)
    if not (args.cpu or args.tiny) and not torch.cuda.is_available():
        parser.error("there is no GPU: use --cpu")
    if args.budget is None and args.quick:
        args.budget = QUICK_SECONDS
    chosen = (
        tiny_cases if args.tiny else cpu_cases if args.cpu else quick_gpu_cases if args.quick else gpu_cases
    )
    args.cases = [case for case in chosen() if re.search(args.only, case.name)]
    if not args.cases:
        parser.error(f"--only {args.only}: no case has such a name")
    if args.without is not None:
        args.cases = [_without(case, args.without) for case in args.cases]
        if not all(case.providers for case in args.cases):
            parser.error(f"--without {args.without}: a case is left without a provider")
    return args


def _without(case: Case, pattern: str) -> Case:
    return replace(case, providers=[name for name in case.providers if not re.search(pattern, name)])


if __name__ == "__main__":
    main()
