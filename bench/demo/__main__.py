"""`python -m bench.demo --output runs/demo`."""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from textwrap import fill
from typing import Any

import torch

from bench.demo.cost import measure
from bench.demo.digits import load_parts
from bench.demo.experiment import DEFAULT, MEASURED, PLAIN, QUICK, STOPPED, Settings, run_all
from bench.demo.plots import draw_all
from bench.demo.report import Row, conclusions, summarise, table
from bench.demo.training import Result, Run, accuracy, pretrain
from bench.environment import METHOD, environment


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demo; arguments are those of the command line."""
    args = _parse(arguments)
    settings, output = _settings(args), Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    start = time.perf_counter()

    parts = load_parts()
    source = pretrain(parts.source_train, settings.pretraining)
    source_accuracy = accuracy(source, parts.source_test)
    results = run_all(settings, source, output)
    timing = replace(settings.finetuning, steps=settings.timed_steps)
    costs = measure(MEASURED, source, parts.target_pool, timing)
    costs[STOPPED] = costs[PLAIN]

    rows = summarise(settings, results, costs)
    sentences = conclusions(rows, settings)
    print(f"\nThe source classifies {source_accuracy:.1%} of unseen digits 0-4 correctly.\n")
    print(table(rows, settings), *(fill(sentence, width=100) for sentence in sentences), sep="\n\n")
    plots = draw_all(rows, output)
    metrics = _metrics(settings, source_accuracy, results, rows, sentences)
    metrics["seconds"] = round(time.perf_counter() - start, 1)
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    written = [output / "target.safetensors", output / "target.json", output / "metrics.json", *plots]
    print(f"\n{metrics['seconds']:.0f} s. Written:", *written, sep="\n  ")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.demo", description="Fine-tune a small ViT on scikit-learn's digits."
    )
    parser.add_argument("--output", default="runs/demo", help="folder; what an earlier demo left is replaced")
    parser.add_argument(
        "--seeds", type=_at_least(2), help="how many (default: 8, of which 6 on clean labels)"
    )
    parser.add_argument(
        "--steps", type=_at_least(4), help=f"of a fine-tuning run (default: {DEFAULT.finetuning.steps})"
    )
    parser.add_argument(
        "--workers", type=_at_least(1), default=DEFAULT.workers, help="processes, one core each"
    )
    parser.add_argument("--quick", action="store_true", help="two seeds of a few steps: does it run?")
    return parser.parse_args(arguments)


def _at_least(least: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return int(text)

    return integer


def _settings(args: argparse.Namespace) -> Settings:
    base = QUICK if args.quick else DEFAULT
    finetuning = replace(base.finetuning, steps=args.steps or base.finetuning.steps)
    settings = replace(base, workers=args.workers, finetuning=finetuning)
    return replace(settings, seeds=args.seeds, clean_seeds=args.seeds) if args.seeds else settings


def _metrics(
    settings: Settings,
    source_accuracy: float,
    results: Mapping[Run, Result],
    rows: Sequence[Row],
    sentences: Sequence[str],
) -> dict[str, Any]:
    return {
        "settings": asdict(settings),
        **environment((*METHOD, "stochca_kernels", "bench/demo")),
        "source_accuracy": source_accuracy,
        "runs": [{**asdict(run), "steps": run.steps, **asdict(result)} for run, result in results.items()],
        "rows": [asdict(row) for row in rows],
        "table": table(rows, settings),
        "conclusions": list(sentences),
    }


if __name__ == "__main__":
    main()
