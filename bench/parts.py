"""Parts of a step, each done in more than one way: `python -m bench.parts [--device cuda] [--output FILE]`.

What they decide is written in `bench/LOG.md`.
"""

import argparse
import copy
import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.benchmark import Timer

from bench.environment import environment

WIDTH, HIDDEN, LENGTH = 768, 3072, 197

Ways = Mapping[str, Callable[[], Any]]
"""Ways to do the same, by name; the first is what plain code does."""


class Part(NamedTuple):
    """One thing that a step does.

    Args:
        name: What, and at which size.
        ways: How.
    """

    name: str
    ways: Ways


def products_of_two_models(batch: int, device: torch.device, dtype: torch.dtype) -> Part:
    """The first layer of both models' MLPs: one after the other, as one batched product, on two streams."""
    x, weight, bias = (
        torch.randn(2, *shape, device=device).to(dtype)
        for shape in ((batch * LENGTH, WIDTH), (HIDDEN, WIDTH), (1, HIDDEN))
    )

    def in_turn() -> list[Tensor]:
        return [F.linear(x[i], weight[i], bias[i, 0]) for i in range(2)]

    def batched() -> Tensor:
        return torch.baddbmm(bias, x, weight.mT)

    def stacked_first() -> Tensor:
        return torch.baddbmm(bias, torch.stack((x[0], x[1])), torch.stack((weight[0], weight[1])).mT)

    ways: dict[str, Callable[[], Any]] = {
        "in turn": in_turn,
        "batched": batched,
        "stacked, then batched": stacked_first,
    }
    if device.type == "cuda":
        ways["two streams"] = partial(_on_two_streams, x, weight, bias)
    return Part(f"fc1 of two ViT-B, B={batch}, N={LENGTH}", ways)


def stem_of_images(batch: int, device: torch.device, dtype: torch.dtype) -> Part:
    """Patch embedding, forward and backward: channels first, and last."""
    with device:
        embed = timm.create_model("vit_base_patch16_224", depth=0, num_classes=0).patch_embed.to(dtype)
        images = torch.randn(batch, 3, 224, 224).to(dtype)
    last: Any = copy.deepcopy(embed)
    last.to(memory_format=torch.channels_last)
    images_last = images.contiguous(memory_format=torch.channels_last)

    def run(module: nn.Module, x: Tensor) -> None:
        module(x).sum().backward()

    ways = {
        "channels first": partial(run, embed, images),
        "channels last": partial(run, last, images_last),
    }
    return Part(f"patch embedding of ViT-B/16, B={batch}", ways)


def norm_before_a_frozen_product(batch: int, device: torch.device, dtype: torch.dtype) -> Part:
    """Layer norm and projection to q, k, v: the norm's gain and bias apart, and folded into the product."""
    with device:
        norm, linear = nn.LayerNorm(WIDTH).to(dtype), nn.Linear(WIDTH, 3 * WIDTH).to(dtype)
        nn.init.normal_(norm.weight, 1.0, 0.1)
        nn.init.normal_(norm.bias, 0.0, 0.1)
        x = torch.randn(batch, LENGTH, WIDTH).to(dtype)
    bare = nn.LayerNorm(WIDTH, elementwise_affine=False)
    with torch.no_grad():
        weight, bias = linear.weight * norm.weight, linear.bias + linear.weight @ norm.bias

    def apart() -> Tensor:
        with torch.no_grad():
            return linear(norm(x))

    def folded() -> Tensor:
        with torch.no_grad():
            return F.linear(bare(x), weight, bias)

    torch.testing.assert_close(folded(), apart(), rtol=2e-2, atol=2e-2)
    return Part(f"norm1 and qkv of a frozen ViT-B, B={batch}", {"apart": apart, "folded": folded})


def frozen_blocks_under_autocast(batch: int, device: torch.device, dtype: torch.dtype) -> Part:
    """A block of the source: its weights cast in every call, and held in the dtype of products."""
    low = torch.bfloat16
    with device:
        block = timm.create_model("vit_base_patch16_224", depth=1, num_classes=0).blocks[0].eval()
        x = torch.randn(batch, LENGTH, WIDTH)
    block.requires_grad_(False)
    held = copy.deepcopy(block)
    for module in held.modules():
        if isinstance(module, nn.Linear):
            module.to(low)

    def run(module: nn.Module) -> Tensor:
        with torch.no_grad(), torch.autocast(device.type, low):
            return module(x)

    assert torch.equal(run(block), run(held))
    ways = {"cast in every call": partial(run, block), "held": partial(run, held)}
    return Part(f"frozen block of ViT-B under autocast to bfloat16, B={batch}", ways)


def optimizer_step(device: torch.device) -> Part:
    """AdamW over the parameters of ViT-S."""
    ways: dict[str, Callable[[], Any]] = {}
    for name, options in (
        ("loop", {"foreach": False}),
        ("foreach", {"foreach": True}),
        ("fused", {"fused": True}),
    ):
        with device:
            parameters = list(timm.create_model("vit_small_patch16_224").parameters())
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        ways[name] = torch.optim.AdamW(parameters, lr=1e-4, **options).step  # type: ignore[arg-type]
    return Part("AdamW on ViT-S/16", ways)


def parts(device: torch.device, dtype: torch.dtype) -> Iterable[Part]:
    """All of them."""
    yield from (products_of_two_models(batch, device, dtype) for batch in (1, 4, 16))
    yield from (stem_of_images(batch, device, dtype) for batch in (8, 32))
    yield from (norm_before_a_frozen_product(batch, device, dtype) for batch in (1, 8))
    yield from (frozen_blocks_under_autocast(batch, device, dtype) for batch in (1, 8))
    yield optimizer_step(device)


def measure(part: Part, min_seconds: float) -> dict[str, Any]:
    """Milliseconds of each way, median and quartiles, and its time over that of the first."""
    times = {}
    for name, way in part.ways.items():
        taken = Timer("way()", globals={"way": way}, num_threads=torch.get_num_threads())
        found = taken.blocked_autorange(min_run_time=min_seconds)
        times[name] = {"p50_ms": 1e3 * found.median, "iqr_ms": 1e3 * found.iqr}
    first = next(iter(times.values()))["p50_ms"]
    return {"name": part.name, "ways": {n: {**t, "ratio": t["p50_ms"] / first} for n, t in times.items()}}


def _on_two_streams(x: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    main, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(main)
    with torch.cuda.stream(side):
        second = F.linear(x[1], weight[1], bias[1, 0])
    first = F.linear(x[0], weight[0], bias[0, 0])
    main.wait_stream(side)
    return [first, second]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each way, at the least")
    parser.add_argument("--output", type=Path, help="write a JSON file as well")
    args = parser.parse_args()
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    found = []
    for part in parts(torch.device(args.device), dtype):
        found.append(measure(part, args.seconds))
        print(found[-1]["name"])
        for name, way in found[-1]["ways"].items():
            print(f"  {name:<24} {way['p50_ms']:9.3f} ms  {way['ratio']:5.2f}")
    if args.output:
        result = {"device": args.device, "parts": found, **environment(("bench/parts.py",))}
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
