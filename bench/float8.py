"""What a source in float8 changes: `python -m bench.float8 [--model NAME] [--output FILE]`.

One training step under autocast to bfloat16, with all of it in bfloat16 and with most of the source in float8
(see `stochca.precision`), each against the same step in float32: same weights, images and coins. On a CPU
float8 is emulated, with the same rounding. Weights are random: trained ones have larger outliers.
"""

import argparse
import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.environment import METHOD, environment
from bench.step.reference import flat_gradients
from bench.step.workloads import Setting, Workload
from stochca import StochCA
from stochca.precision import SourceDtype
from stochca.vit import TimmViT, stem

PROBABILITY, SEED = 0.3, 0
DTYPES: tuple[SourceDtype, ...] = ("bfloat16", "float8")


class Step:
    """A forward and backward of StochCA.

    Args:
        setting: Target, source, images and labels.
        dtype: Of the source, under autocast to bfloat16; "float32" runs without.
        coins: One per block.

    Attributes:
        logits: `[B, classes]`.
        gradients: Of the target, in one vector.
        heads: The source's queries, keys and values of every block, `[depth, 3, B, N, H, D]`.
    """

    def __init__(self, setting: Setting, dtype: SourceDtype, coins: Sequence[bool]) -> None:
        source = copy.deepcopy(setting.source)
        model = StochCA(setting.target, source, source_dtype=dtype).train()
        enabled = dtype != "float32"
        with torch.autocast(setting.device.type, torch.bfloat16, enabled=enabled):
            logits = model(setting.images, coins=coins)
            self.heads = _heads(source, setting.images)
        F.cross_entropy(logits.float(), setting.labels).backward()
        self.logits = logits.detach().double()
        self.gradients = flat_gradients(setting.target).double()
        setting.target.zero_grad(set_to_none=True)


def compare(setting: Setting) -> dict[str, Any]:
    """Differences to float32 with the source in bfloat16, and in float8.

    Returns:
        `coins`, and for each dtype `logits` and `gradients`, the relative L2 norm of the difference; `cosine`
        of the gradients; and `q`, `k`, `v`: for each block, the mean cosine of the source's vectors.
    """
    generator = torch.Generator().manual_seed(SEED)
    coins = (torch.rand(len(setting.target.blocks), generator=generator) < PROBABILITY).tolist()
    exact = Step(setting, "float32", coins)
    found = {}
    for dtype in DTYPES:
        step = Step(setting, dtype, coins)
        cosines = F.cosine_similarity(step.heads, exact.heads, dim=-1).flatten(2).mean(-1)
        found[dtype] = {
            "logits": _relative(step.logits, exact.logits),
            "gradients": _relative(step.gradients, exact.gradients),
            "cosine": F.cosine_similarity(step.gradients, exact.gradients, dim=0).item(),
            **{name: cosines[:, i].tolist() for i, name in enumerate("qkv")},
        }
    return {"coins": coins, "differences": found}


def lines(result: dict[str, Any]) -> list[str]:
    """The table."""
    rows = [f"{'source':<10}{'logits':>10}{'gradients':>11}{'cosine':>9}   least cosine of a block: q, k, v"]
    for dtype, values in result["differences"].items():
        least = "  ".join(f"{min(values[name]):.5f}" for name in "qkv")
        figures = f"{values['logits']:>10.1%}{values['gradients']:>11.1%}{values['cosine']:>9.5f}"
        rows.append(f"{dtype:<10}{figures}   {least}")
    return rows


@torch.no_grad()
def _heads(source: TimmViT, images: Tensor) -> Tensor:
    x, heads = stem(source, images).tokens, []
    for block in source.blocks:
        attn = block.attn
        heads.append(attn.qkv(block.norm1(x)).unflatten(-1, (3, attn.num_heads, attn.head_dim)))
        x = block(x)
    return torch.stack(heads).movedim(-3, 1).float()


def _relative(actual: Tensor, exact: Tensor) -> float:
    return (torch.linalg.vector_norm(actual - exact) / torch.linalg.vector_norm(exact)).item()


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_small_patch16_224", help="timm model name")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output", type=Path, help="write a JSON file as well")
    args = parser.parse_args(arguments)
    workload = Workload(args.model, args.model, args.batch_size)
    result = compare(Setting.make(workload, torch.device(args.device)))
    print(*lines(result), sep="\n")
    if args.output:
        measured = (*METHOD, "stochca_kernels", "bench/float8.py")
        record = {"model": args.model, "batch": args.batch_size, **result, **environment(measured)}
        args.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
