"""What a training step costs by count, not by clock: FLOPs, and bytes kept for the backward.

`python -m bench.counts` prints both relative to plain timm fine-tuning, as exact expectations over the coins,
and `--output FILE` keeps them for the tables of the README.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.environment import METHOD, environment
from stochca import StepPlan, StochCA
from stochca.block import source_step
from stochca.recompute import Recomputation
from stochca.vit import stem

MEASURED = (*METHOD, "stochca_kernels", "bench/counts.py")


@dataclass(frozen=True)
class Cost:
    """Cost of a step relative to plain fine-tuning, for one p.

    Args:
        p: Probability that a block reads the source.
        full_source: FLOPs where the whole source runs in every step and nothing is left out.
        truncated_source: Expected FLOPs where the source stops at the last block that is read.
        flops_all_rows: Expected FLOPs where, besides, what reads the source projects no K, V of its own.
        flops: Expected FLOPs with all savings: besides, only the class row is computed where only it is read.
        flops_max: The largest of these over all draws.
        saved_bytes: Expected bytes kept for the backward.
        saved_bytes_max: The largest over all draws.
        recomputed_bytes: Expected bytes where norms, activations and the source's pairs are recomputed.
        source_fraction: Expected share of the source's blocks that ran.
    """

    p: float
    full_source: float
    truncated_source: float
    flops_all_rows: float
    flops: float
    flops_max: float
    saved_bytes: float
    saved_bytes_max: float
    recomputed_bytes: float
    source_fraction: float


def step_flops(run: Callable[[], Tensor]) -> int:
    """FLOPs of `run().sum().backward()`, forward included, as torch's counter counts them."""
    with FlopCounterMode(display=False) as counter:
        run().sum().backward()
    return counter.get_total_flops()


def saved_bytes(run: Callable[[], Tensor], parameters: Iterable[Tensor] = ()) -> int:
    """Bytes of distinct storages that the forward `run()` keeps for its backward, parameters left out."""
    known = {p.untyped_storage()._cdata for p in parameters}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor.detach()  # a node that keeps its own output would never be freed

    pack = Recomputation._pack

    def keep_packed(self: Recomputation, tensor: Tensor) -> Any:
        saved = pack(self, tensor)
        for kept in saved.versions.tensors:
            keep(kept)
        return saved

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        mock.patch.object(Recomputation, "_pack", keep_packed),  # of its hooks only the innermost act
    ):
        run()
    return sum(storage.nbytes() for key, storage in kept.items() if key not in known)


def draws(depth: int) -> list[tuple[bool, ...]]:
    """All coin patterns of a model."""
    return list(itertools.product((False, True), repeat=depth))


def signature(coins: Sequence[bool]) -> tuple[tuple[str, ...], bool]:
    """What of a draw its cost depends on: blocks of one kind cost the same, in whatever order."""
    plan = StepPlan(tuple(coins))
    kinds = (
        f"{'cross' if coin else 'self'}"
        f"{' rows' if i >= plan.first_class_row_block else ''}"
        f"{' first' if i == plan.first_class_row_block else ''}"
        f"{' advance' if i + 1 < plan.source_blocks else ''}"
        for i, coin in enumerate(coins)
    )
    return tuple(sorted(kinds)), plan.source_blocks > 0


def by_signature(depth: int) -> dict[tuple[tuple[str, ...], bool], list[tuple[bool, ...]]]:
    """All draws, those of equal cost together."""
    classes: dict[tuple[tuple[str, ...], bool], list[tuple[bool, ...]]] = {}
    for coins in draws(depth):
        classes.setdefault(signature(coins), []).append(coins)
    return classes


def probability(coins: Sequence[bool], p: float) -> float:
    """How likely a draw is when every block reads the source with probability p."""
    return p ** sum(coins) * (1 - p) ** (len(coins) - sum(coins))


def relative_costs(
    depth: int, cost: Callable[[Sequence[bool]], int], baseline: int, probabilities: Iterable[float]
) -> list[tuple[float, float]]:
    """Expectation and maximum over the coins of `cost(coins) / baseline`, for each p."""
    classes = [(cost(members[0]) / baseline, members) for members in by_signature(depth).values()]
    return [
        (
            sum(ratio * probability(coins, p) for ratio, members in classes for coins in members),
            max(ratio for ratio, members in classes if any(probability(coins, p) for coins in members)),
        )
        for p in probabilities
    ]


def vit_flops(
    name: str, probabilities: Sequence[float], class_rows: bool = True
) -> list[tuple[float, float]]:
    """Expected and largest FLOPs of a step relative to plain fine-tuning, on the meta device."""
    with torch.device("meta"):
        model = StochCA(timm.create_model(name, num_classes=10), class_rows=class_rows).train()
        images = torch.empty(1, *model.target.pretrained_cfg["input_size"])
    return relative_costs(
        len(model.target.blocks),
        lambda coins: step_flops(lambda: model(images, coins=coins)),
        step_flops(lambda: model.target(images)),
        probabilities,
    )


def source_flops(name: str, probabilities: Sequence[float]) -> tuple[float, list[float]]:
    """FLOPs of the source relative to a step of plain fine-tuning: all of it, and as far as it is read."""
    with torch.device("meta"):
        model = StochCA(timm.create_model(name, num_classes=10))
        images = torch.empty(1, *model.target.pretrained_cfg["input_size"])
    blocks = model.source.blocks
    baseline = step_flops(lambda: model.target(images))

    def run(num_blocks: int) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            if num_blocks:
                x, _ = stem(model.source, images)
                for i, block in enumerate(blocks[:num_blocks]):
                    *_, x = source_step(block, x, True, i + 1 < num_blocks)
        return counter.get_total_flops()

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.source.forward_features(images)
    by_length = [run(n) for n in range(len(blocks) + 1)]
    expected = [
        sum(probability(coins, p) * by_length[StepPlan(coins).source_blocks] for coins in draws(len(blocks)))
        for p in probabilities
    ]
    return counter.get_total_flops() / baseline, [flops / baseline for flops in expected]


def vit_saved_bytes(
    name: str, probabilities: Sequence[float], recompute: bool = False
) -> list[tuple[float, float]]:
    """Expected and largest bytes kept for the backward relative to plain fine-tuning, SDPA on both sides."""
    model = StochCA(timm.create_model(name, num_classes=10), recompute=recompute, impl="sdpa").train()
    images = torch.zeros(1, *model.target.pretrained_cfg["input_size"])
    parameters = [*model.parameters(), *model.source.parameters()]
    return relative_costs(
        len(model.target.blocks),
        lambda coins: saved_bytes(lambda: model(images, coins=coins), parameters),
        saved_bytes(lambda: model.target(images), parameters),
        probabilities,
    )


def expected_source_fraction(depth: int, p: float) -> float:
    """Expected share of the source's blocks that a step needs."""
    return sum(probability(coins, p) * StepPlan(coins).source_fraction for coins in draws(depth))


def count(name: str, depth: int, probabilities: Sequence[float]) -> list[Cost]:
    """All counts of one model."""
    flops, all_rows = vit_flops(name, probabilities), vit_flops(name, probabilities, class_rows=False)
    whole, truncated = source_flops(name, probabilities)
    kept, recomputed = (vit_saved_bytes(name, probabilities, recompute) for recompute in (False, True))
    return [
        Cost(
            p=p,
            full_source=1 + whole,
            truncated_source=1 + truncated[i],
            flops_all_rows=all_rows[i][0],
            flops=flops[i][0],
            flops_max=flops[i][1],
            saved_bytes=kept[i][0],
            saved_bytes_max=kept[i][1],
            recomputed_bytes=recomputed[i][0],
            source_fraction=expected_source_fraction(depth, p),
        )
        for i, p in enumerate(probabilities)
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_base_patch16_224", help="timm model name")
    parser.add_argument("--p", type=float, nargs="+", default=[0.0, 0.1, 0.3, 0.5, 0.8])
    parser.add_argument("--output", type=Path, help="write a JSON file as well")
    args = parser.parse_args()
    with torch.device("meta"):
        depth = len(timm.create_model(args.model).blocks)
    machine = environment(MEASURED)
    costs = count(args.model, depth, args.p)
    if args.output:
        result = {"model": args.model, "costs": [asdict(cost) for cost in costs], **machine}
        args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{args.model}: cost of a training step over that of plain timm fine-tuning, counted")
    header = (
        "p",
        "full source",
        "truncated",
        "no own K,V",
        "class rows",
        "max",
        "bytes",
        "max",
        "recomputed",
        "source run",
    )
    print("  ".join(f"{name:>11}" for name in header))
    for cost in costs:
        p, *ratios, fraction = astuple(cost)
        print("  ".join([f"{p:11g}", *(f"{ratio:11.3f}" for ratio in ratios), f"{fraction:11.1%}"]))


if __name__ == "__main__":
    main()
