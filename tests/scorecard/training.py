"""A small ViT trained with the kernels, beside runs with the reference that differ by roundings alone.

The runs share weights, images and coins. In a rival each output of the reference, and each gradient that
arrives there, is moved by one rounding of its dtype, up or down at random. After every few steps a run says
what its target makes, in float32, of images that it is not trained on. The kernels stay together with the
reference if until every step their largest distance from it is at most `ALLOWED` times that of the rivals, of
which the mean counts.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

import stochca_kernels.attention
from stochca import StochCA
from stochca_kernels.dispatch import Impl
from stochca_kernels.reference import attention_reference
from tests.models import make_target
from tests.scorecard.row import Case, Figures

ALLOWED = 4.0
RIVALS = 3
# Of a loss in float16, small enough that no step overflows: whether one does is no question of rounding.
SCALE = 256.0
CLASSES = 5
# 17 tokens, which 16 does not divide, and heads of 32.
SMALL = {"img_size": 32, "embed_dim": 64, "num_heads": 2, "depth": 4}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Setting(NamedTuple):
    """What the runs of a case have in common.

    Args:
        dtype: Of products, under autocast where it is not float32, with the loss scaled for float16.
        steps: How many are trained.
        every: After how many steps the target is asked.
        batch: Images of a step.
        device: Where.
        kwargs: Of the model.
    """

    dtype: torch.dtype
    steps: int
    every: int = 5
    batch: int = 4
    device: str = "cpu"
    kwargs: Mapping[str, Any] = SMALL


class Run(NamedTuple):
    """What a run said of the images, `[times, images, classes]`, its losses, its coins and its last scale."""

    logits: Tensor
    losses: list[float]
    coins: list[tuple]
    scale: float


def cases(long: bool) -> Iterable[Case]:
    if not long:
        tiny = Setting(torch.float16, 4, 1, 2, kwargs={**SMALL, "img_size": 24, "depth": 2})
        yield Case("kernels-float16", partial(together, "triton", tiny))
        yield Case("sdpa-float32", partial(together, "sdpa", Setting(torch.float32, 20)))
        return
    for dtype in ("float32", "float16"):
        yield Case(f"kernels-{dtype}", partial(together, "triton", Setting(DTYPES[dtype], 200)))
        yield Case(f"sdpa-{dtype}", partial(together, "sdpa", Setting(DTYPES[dtype], 200)))


def gpu_cases(long: bool) -> Iterable[Case]:
    larger = {"img_size": 112, "embed_dim": 192, "num_heads": 3, "depth": 6}  # 197 tokens, heads of 64
    for name, dtype in DTYPES.items():
        setting = Setting(dtype, 500 if long else 10, 10 if long else 1, 32, "cuda", larger)
        yield Case(f"kernels-{name}", partial(together, "triton", setting))


def together(impl: Impl, setting: Setting) -> Figures:
    """An implementation stays as near to the reference as roundings let it."""
    reference, ours = train("reference", setting), train(impl, setting)
    rivals = []
    for seed in range(RIVALS):
        with rounded_otherwise(seed, setting.device):
            rivals.append(train("reference", setting))
    assert ours.coins == reference.coins, "other coins"
    assert ours.scale == reference.scale == SCALE, "a step was left out, because its gradients overflowed"
    assert ours.logits.isfinite().all()
    distance = _largest_so_far(ours, reference)
    unit = torch.stack([_largest_so_far(rival, reference) for rival in rivals]).mean(0)
    assert unit[0] > 0, "the rivals do not differ"
    ratio = distance / unit
    worst = int(ratio.argmax())
    assert ratio[worst] <= ALLOWED, (
        f"after {(worst + 1) * setting.every} steps {distance[worst]:.2g} from the reference, whose rivals "
        f"are {unit[worst]:.2g} away: {ratio[worst]:.2g} times"
    )
    if setting.steps >= 100:
        first, last = (sum(part) / len(part) for part in (ours.losses[:20], ours.losses[-20:]))
        assert last < 0.7 * first, f"the loss went from {first:.2g} to {last:.2g}, nothing was learned"
    name = str(setting.dtype).removeprefix("torch.")
    return {"cases": setting.steps, f"{impl}_{name}_distance_ratio": ratio[worst].item()}


def train(impl: Impl, setting: Setting) -> Run:
    """Train as the command line does: float32 weights, autocast, for float16 a scaled loss.

    By gradients as they are: AdamW steps as far where a gradient is nothing but roundings, and errors a
    hundred times as large would not show beside that.
    """
    dtype, device = setting.dtype, setting.device
    target = make_target(dtype=torch.float32, **setting.kwargs)
    model = StochCA(target, p=0.5, per="sample", seed=1, impl=impl).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    scaler = torch.amp.GradScaler(device, init_scale=SCALE, enabled=dtype == torch.float16)
    generator = torch.Generator().manual_seed(3)
    patterns = torch.randn(CLASSES, *_shape(setting), generator=generator)
    unseen, _ = _draw(patterns, 16, generator)
    logits, losses, coins = [], [], []
    for step in range(1, setting.steps + 1):
        images, labels = (t.to(device) for t in _draw(patterns, setting.batch, generator))
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(model(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
        coins.append(tuple(c.tolist() if isinstance(c, Tensor) else c for c in model.plan.coins))
        if step % setting.every == 0:
            model.eval()
            with torch.no_grad():
                logits.append(model(unseen.to(device)).double().cpu())
            model.train()
    scale = scaler.get_scale() if scaler.is_enabled() else SCALE
    return Run(torch.stack(logits), losses, coins, scale)


@contextmanager
def rounded_otherwise(seed: int, device: str) -> Iterator[None]:
    """Within it the reference rounds its outputs, and the gradients that arrive there, to a neighbour."""
    generator = torch.Generator(device).manual_seed(seed)

    def attention(*args: Any) -> tuple[Tensor, Tensor | None]:
        out, source_out = attention_reference(*args)
        return _Moved.apply(out, generator), source_out

    with mock.patch.object(stochca_kernels.attention, "attention_reference", attention):
        yield


class _Moved(torch.autograd.Function):
    """One rounding up or down, forwards and backwards."""

    @staticmethod
    def forward(ctx, x, generator):
        ctx.generator = generator
        return _moved(x, generator)

    @staticmethod
    def backward(ctx, grad):
        return _moved(grad, ctx.generator), None


def _moved(x: Tensor, generator: torch.Generator) -> Tensor:
    signs = torch.randint(0, 2, x.shape, generator=generator, device=x.device) * 2 - 1
    return (x.double() * (1 + torch.finfo(x.dtype).eps * signs)).to(x.dtype)


def _largest_so_far(run: Run, reference: Run) -> Tensor:
    """From the reference, until each time."""
    return (run.logits - reference.logits).flatten(1).norm(dim=1).cummax(0).values


def _shape(setting: Setting) -> tuple[int, int, int]:
    return 3, setting.kwargs["img_size"], setting.kwargs["img_size"]


def _draw(patterns: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise over the pattern of a class."""
    labels = torch.randint(0, len(patterns), (count,), generator=generator)
    return patterns[labels] + torch.randn(count, *patterns.shape[1:], generator=generator), labels
