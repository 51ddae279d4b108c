"""`python -m bench.tune --quick --output tune.json`: time tiles on this GPU, print rows for the tables.

A dry run compiles the candidates for a GPU that need not be there, and times nothing.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from bench.environment import environment
from bench.programs import SHARED_LIMIT
from bench.tune.candidates import Candidate, candidates
from bench.tune.choice import Columns, Key, column, fastest, format_row, format_tiles, format_winner
from bench.tune.compiled import Figures, default_workers, submit, workers
from bench.tune.groups import KERNELS, Group, groups
from bench.tune.timing import Settings, Timed, time_group
from bench.tune.winners import KINDS, choose_winners, installed, time_kind
from stochca_kernels import tiles

ROUNDS, QUICK_ROUNDS = 100, 20
QUICK_MINUTES = 4.5
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
WINNERS = "winners"
DEVICE = torch.device("cuda")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; arguments are those of the command line."""
    args = _parse(arguments)
    result: dict[str, Any] = {
        "gpu_row": args.gpu,
        "dtype": args.dtype,
        "groups": [],
        "rows": [],
        **environment(),
    }
    stream = nullcontext() if args.dry_run else torch.cuda.stream(torch.cuda.Stream())
    with workers(args.workers) as pool, stream:
        _run(args, pool, result)


def _run(args: argparse.Namespace, pool: Executor | None, result: dict[str, Any]) -> None:
    start = time.perf_counter()
    deadline = start + 60 * args.minutes
    gpu_name, commit = (result["gpu"] or {}).get("name"), args.commit or result["commit"] or "unknown"
    origin = f"{gpu_name}, commit {commit[:7]}"
    settings = Settings(DEVICE, DTYPES[args.dtype], QUICK_ROUNDS if args.quick else ROUNDS)
    tuned: dict[Key, Columns] = {}
    kernels = _start(args, pool)
    for kernel, started in kernels if pool is None else list(kernels):
        chosen: tuple[dict[int | None, Candidate], ...] = ({}, {})
        for group, tried, futures in started:
            found = [future.result() for future in futures] if time.perf_counter() < deadline else []
            report, best = _tune_group(group, tried, found, None if args.dry_run else settings)
            chosen[group.column].update(best)
            result["groups"].append(report)
        if any(chosen):
            key = (kernel, _row_gpu(args), _arithmetic(args))
            first, second = map(column, tiles._TABLE.get(key, ((), ())), chosen, (origin, origin))
            tuned[key] = (first, second)
            result["rows"] += format_row(key, tuned[key])
        _write(args.output, result, start)
    if not args.dry_run:
        result["winners"] = _winner_lines(settings, tuned, args, origin, deadline)
        print("\nstochca_kernels.tiles._TABLE:", *result["rows"], sep="\n")
        print("\nstochca_kernels.dispatch._WINNERS:", *result["winners"], sep="\n")
        if result["dirty"] is not False:
            print("\nNot a clean checkout: the commit that these rows name is not what was timed.")
    _write(args.output, result, start)
    print(f"\n{time.perf_counter() - start:.0f} s", flush=True)


def _tune_group(
    group: Group, tried: Sequence[Candidate], found: Sequence[Figures], settings: Settings | None
) -> tuple[dict[str, Any], dict[int | None, Candidate]]:
    """Report on one row of the table, and say by its `max_keys` what was chosen, if anything was.

    Args:
        group: The row.
        tried: Its candidates.
        found: Their figures; none where time is over.
        settings: How they are timed; None in a dry run.
    """
    print(f"\n{group.name}", *_figure_lines(tried, found), sep="\n", flush=True)
    report: dict[str, Any] = {"group": group.name, "candidates": _compiled(tried, found)}
    if not found:
        print("  not tuned: out of time")
    if not found or settings is None:
        return report, {}
    kept = [candidate for candidate, f in zip(tried, found, strict=True) if not f.dropped]
    timed = time_group(group, kept, settings)
    best = fastest(timed)
    print(*_time_lines(kept, timed, best), sep="\n", flush=True)
    report["cases"] = _recorded(kept, timed)
    return report, {} if best is None else {group.most_keys: kept[best[0]]}


def _start(
    args: argparse.Namespace, pool: Executor | None
) -> Iterator[tuple[tiles.Kernel, list[tuple[Group, list[Candidate], list["Future[Figures]"]]]]]:
    """Start compiling everything, in the order in which it is timed."""
    arithmetic = _arithmetic(args)
    for kernel in KERNELS:
        if kernel not in args.only:
            continue
        started = []
        for group in groups(kernel, args.quick):
            present = group.present(args.gpu, arithmetic)
            if present is None and (kernel != "dqkv" or arithmetic != "half"):
                print(f"{group.name}: the table has no row that it could be compared with")
                continue
            tried = candidates(group, arithmetic, present, args.quick)[: args.at_most]
            compiled_for = (args.gpu, DTYPES[args.dtype], arithmetic, _multiprocessors(args))
            started.append((group, tried, submit(pool, group, tried, *compiled_for)))
        yield kernel, started


def _winner_lines(
    settings: Settings, tuned: dict[Key, Columns], args: argparse.Namespace, origin: str, deadline: float
) -> list[str]:
    """Rows for the winners, timed with the rows that were just found."""
    lines = []
    with installed(tuned):
        for kind in KINDS if WINNERS in args.only else ():
            if time.perf_counter() > deadline:
                print(f"{kind.name}: not timed, out of time")
                continue
            cases = list(time_kind(kind, settings))
            for case in cases:
                entries = case.get("providers", {"-": {"reason": case.get("reason")}})
                shown = (
                    f"{n} {e['p50_us']:.1f} us" if "p50_us" in e else f"{n} {e}" for n, e in entries.items()
                )
                print(f"{case['name']}: {', '.join(shown)}", flush=True)
            rows = choose_winners(kind, cases, origin)
            lines += [format_winner(kind.name, args.gpu, bound, found) for bound, found in rows]
    return lines


def _describe(candidate: Candidate) -> str:
    return "no row" if candidate is None else format_tiles(candidate).replace(f', "{candidate.origin}"', "")


def _figure_lines(tried: Sequence[Candidate], found: Sequence[Figures]) -> list[str]:
    return [
        f"  {_describe(candidate):<58} " + (f"dropped: {f.dropped}" if f.dropped else _figures(f))
        for candidate, f in zip(tried, found, strict=False)
    ]


def _figures(f: Figures) -> str:
    return f"registers {f.registers}, shared {f.shared} bytes, wgmma {f.wgmma}" if f.registers else "-"


def _time_lines(
    kept: Sequence[Candidate], timed: dict[str, list[Timed]], best: tuple[int, float] | None
) -> list[str]:
    lines = []
    for name, each in timed.items():
        lines.append(f"  {name}, microseconds")
        for candidate, found in zip(kept, each, strict=True):
            shown = f"{found.times['p50_us']:.1f}" if found.times else found.reason
            lines.append(f"    {_describe(candidate):<58} {shown}")
    return [*lines, "  none was timed" if best is None else f"  fastest: {_describe(kept[best[0]])}"]


def _compiled(tried: Sequence[Candidate], found: Sequence[Figures]) -> list[dict[str, Any]]:
    return [{"tiles": _describe(c), **f._asdict()} for c, f in zip(tried, found, strict=False)]


def _recorded(kept: Sequence[Candidate], timed: dict[str, list[Timed]]) -> dict[str, Any]:
    return {
        name: [
            {"tiles": _describe(c), **f.times, **({"reason": f.reason} if f.reason else {})}
            for c, f in zip(kept, each, strict=True)
        ]
        for name, each in timed.items()
    }


def _write(path: Path | None, result: dict[str, Any], start: float) -> None:
    """After each kernel, so that a run that is stopped leaves what it has."""
    result["seconds"] = round(time.perf_counter() - start, 1)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


def _arithmetic(args: argparse.Namespace) -> str:
    return "half" if args.dtype != "float32" else tiles.dot_precision(torch.empty(0))


def _row_gpu(args: argparse.Namespace) -> str:
    """The GPU as the table has it."""
    return "nvidia" if _arithmetic(args) != "half" else tiles._LIKE.get(args.gpu, args.gpu)


def _multiprocessors(args: argparse.Namespace) -> int:
    if args.dry_run:
        return 132
    return tiles._multiprocessors(DEVICE)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tune", description="Time tiles on this GPU and print rows for the tables."
    )
    names = (*KERNELS, WINNERS)
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="kernels, or the winners")
    parser.add_argument("--quick", action="store_true", help="fewer candidates, shapes and rounds")
    parser.add_argument(
        "--minutes", type=float, help=f"start nothing new after these; with --quick {QUICK_MINUTES}"
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write a JSON file")
    parser.add_argument("--dry-run", action="store_true", help="compile the candidates, and time nothing")
    parser.add_argument(
        "--gpu",
        choices=[gpu for gpu in SHARED_LIMIT if gpu.startswith("sm_")],
        help="for a dry run; default sm_90",
    )
    parser.add_argument("--at-most", type=int, metavar="N", help="candidates of each row of the table")
    parser.add_argument(
        "--workers", type=int, default=default_workers(), help="processes that compile, default %(default)s"
    )
    parser.add_argument("--commit", help="recorded where files are not a checkout of git")
    args = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("unset TRITON_INTERPRET: what is interpreted is not compiled")
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("there is no GPU: --dry-run times nothing")
    if not args.dry_run and args.gpu:
        parser.error("--gpu is for a dry run: rows are for the GPU that is there")
    args.gpu = args.gpu or ("sm_90" if args.dry_run else tiles.gpu_of(DEVICE))
    if not args.dry_run and args.gpu not in SHARED_LIMIT:
        parser.error(f"{args.gpu} has no limits in bench.programs")
    args.minutes = args.minutes or (QUICK_MINUTES if args.quick else float("inf"))
    return args


if __name__ == "__main__":
    main()
