"""What torch's compiler is asked for in a training: a few graphs of a block, then nothing more."""

import collections
import itertools
import random
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch._dynamo.utils import counters

from stochca import StochCA
from tests.models import make_images, make_model
from tests.scorecard.row import Case, Figures

STEPS = 1000
PROBABILITIES = (0.1, 0.5, 0.9)
SMALL = {"depth": 3, "embed_dim": 32, "num_heads": 2, "img_size": 16}
KINDS: dict[str, dict[str, Any]] = {
    "average-pool": {"global_pool": "avg"},
    "class-token": {},
    "per-sample": {"stochca": {"per": "sample"}},
    "image-sizes": {"dynamic_img_size": True},
    "checkpointed-and-recomputed": {"stochca": {"per": "sample", "recompute": True}},
    "rope-qk-norm-and-stochastic-depth": {
        "name": "vit_base_patch16_rope_reg1_gap_256",
        "qk_norm": True,
        "drop_path_rate": 0.3,
    },
}
# Of self-attention and cross-attention; with a class token one more of each for the class row alone, and with
# coins per sample one more where samples differ.
GRAPHS = {"average-pool": 2, "class-token": 4, "rope-qk-norm-and-stochastic-depth": 2}
# Up to the next block that is read, that and its pair, and its pair alone; again where few queries will ask.
GRAPHS_OF_SOURCE = {"average-pool": 3, "class-token": 6, "rope-qk-norm-and-stochastic-depth": 3}
FULL = 4
# The last batch of an epoch has what is left over; a single image is apart for torch.
BATCHES = (FULL, FULL - 1, 1)


def cases(long: bool) -> Iterable[Case]:
    if not long:
        yield Case("average-pool", partial(steps, "average-pool", 40, batches=(FULL, FULL - 1)))
        return
    for kind in KINDS:
        yield Case(kind, partial(steps, kind, STEPS))
    yield Case("average-pool-inductor", partial(steps, "average-pool", 100, "inductor", (FULL, FULL - 1)))


def steps(kind: str, count: int, backend: str = "eager", batches: Sequence[int] = BATCHES) -> Figures:
    """Random steps as those of a training, after a warm-up that meets each way to run a block."""
    kwargs = {**SMALL, **KINDS[kind]}
    model = make_model(dtype=torch.float32, p=_probability, **kwargs)
    model.set_grad_checkpointing(kind == "checkpointed-and-recomputed")
    torch._dynamo.reset()
    compiler = Compiler(backend)
    model.compile(backend=compiler, fullgraph=True)  # which makes an error of a graph break
    sizes = [16, 24] if kind == "image-sizes" else [16]
    patterns = list(itertools.product([False, True], repeat=SMALL["depth"]))
    for coins in patterns:
        _train(model, FULL, sizes[0], coins)
    graphs, of_source = compiler.graphs["target"], compiler.graphs["source"]
    wanted = GRAPHS_OF_SOURCE.get(kind, of_source)
    assert of_source == wanted, f"{of_source} graphs of a block of the source"
    assert graphs == GRAPHS.get(kind, graphs), f"{graphs} graphs of a block of the target"
    warm_up(model, sizes, batches, patterns)
    compiler.graphs.clear()
    counters.clear()
    generator = random.Random(0)
    for i in range(count):
        batch = generator.randint(batches[-1], FULL - 1) if i % 10 == 9 else FULL
        size = generator.choice(sizes)
        _train(model, batch, size, keep=generator.random() < 0.2)
        if i % 25 == 24:
            model.eval()
            with torch.no_grad():
                model(make_images(FULL, torch.float32, size))
            model.train()
        again = sum(compiler.graphs.values()) + counters["frames"]["total"]
        assert not again, f"step {i} of batch {batch} at size {size} is compiled: {model.plan}"
    torch._dynamo.reset()
    figures = {"cases": count, "recompilations_count": float(sum(compiler.graphs.values()))}
    if kind not in GRAPHS:
        return figures
    counts = {f"{kind}_graphs_count": graphs, f"{kind}_graphs_of_the_source_count": of_source}
    return {**figures, **{name: float(count) for name, count in counts.items()}}


def warm_up(
    model: StochCA, sizes: Sequence[int], batches: Sequence[int], patterns: Sequence[tuple[bool, ...]]
) -> None:
    """Every pattern of coins, with each batch at each image size."""
    is_per_sample = model.coins.per == "sample"
    for batch, size in itertools.product(batches, sizes):
        for coins in patterns:
            _train(model, batch, size, coins)
        if is_per_sample and batch > 1:
            mixed = torch.arange(batch) % 2 == 0
            for coins in itertools.product([False, True, mixed], repeat=SMALL["depth"]):
                _train(model, batch, size, coins)
    model.zero_grad()


def _train(
    model: StochCA, batch: int, size: int, coins: Sequence[Any] | None = None, keep: bool = False
) -> None:
    """A step; its gradients may stay, to be accumulated."""
    model(make_images(batch, torch.float32, size), coins=coins).square().mean().backward()
    if not keep:
        model.zero_grad()


def _probability(step: int) -> float:
    return PROBABILITIES[step % len(PROBABILITIES)]


class Compiler:
    """A backend that counts the graphs it is given.

    Args:
        name: Of the backend that does the work.
    """

    def __init__(self, name: str) -> None:
        self.graphs: collections.Counter[str] = collections.Counter()
        self._compile = torch._dynamo.lookup_backend(name)

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        trained = any(isinstance(t, torch.Tensor) and t.requires_grad for t in inputs)
        self.graphs["target" if trained else "source"] += 1
        return self._compile(graph, inputs)
