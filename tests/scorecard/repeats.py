"""Repeats of the same work: equal bit by bit, whatever else the machine does."""

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.gpu import paths
from tests.gpu.paths import DEVICE, PATHS
from tests.models import make_images, make_model
from tests.scorecard.operator_calls import interpreted
from tests.scorecard.row import Case, Figures

Tensors = dict[str, Tensor]
SMALL = tuple(path._replace(batch=2, heads=2, length=20, head_dim=16, channels=32) for path in PATHS)
COINS = ((True, False, True, False), (False, True, True, True))
# Two threads share what torch computes; or one thread computes it while another one keeps torch busy.
WAYS = ("one thread", "two threads", "beside other work")

GPU_CASES = [
    *(case._replace(batch=16) for case in PATHS),
    paths.Case("pair", length=785, batch=16),
    # Programs that take turns share a slot of scratch memory.
    paths.Case("fused", length=785, batch=96),
    # Parts of a sum by several programs, and gradients that several launches add up.
    paths.Case("tokens", length=785, heads=12, channels=768, rows=2),
    *(case._replace(arithmetic="ieee") for case in PATHS if case.path in ("pair", "tokens")),
]


def cases(long: bool) -> Iterator[Case]:
    for small in SMALL if long else SMALL[1::3]:
        case = small._replace(arithmetic="fp16")
        yield Case(f"triton {case}", lambda case=case: _repeat(_operator(case, "triton"), 10 if long else 1))
    for arithmetic, small in itertools.product(("ieee", "bf16") if long else ("bf16",), SMALL):
        if small.path != "split":  # of the kernels alone
            case = small._replace(arithmetic=arithmetic, length=197)
            for way in WAYS[1:]:
                run, count = _operator(case, "sdpa"), 7 if long else 1
                yield Case(f"sdpa {case} {way}", lambda run=run, way=way, n=count: _repeat(run, n, way))
    steps = {("sdpa", way): 32 for way in WAYS} | {("triton", WAYS[0]): 4}
    for (impl, way), count in steps.items() if long else [(("sdpa", WAYS[2]), 2)]:
        run = _training(impl)
        yield Case(f"training {impl} {way}", lambda run=run, way=way, n=count: _repeat(run, n, way))


def gpu_cases(long: bool) -> Iterator[Case]:
    for case in GPU_CASES:
        for busy in (False, True):
            name = f"{case} {'beside other work' if busy else 'alone'}"
            count = 500 if long else 100
            yield Case(name, lambda case=case, busy=busy, n=count: _repeat_on_gpu(case, busy, n))


def _operator(case: paths.Case, impl: str) -> Callable[[], Tensors]:
    def run() -> Tensors:
        with interpreted(), paths.poisoned() if impl == "triton" else contextlib.nullcontext():
            return paths.run(case, paths.draw(case, "cpu"), impl)

    return run


def _training(impl: str) -> Callable[[], Tensors]:
    """Two steps of fine-tuning a small ViT: its weights, and what the second step saw."""

    def run() -> Tensors:
        with pytest.MonkeyPatch.context() as patch, interpreted():
            patch.setenv("STOCHCA_IMPL", impl)
            model = make_model(dtype=torch.float32)
            optimizer = torch.optim.AdamW(model.target.parameters(), lr=1e-3)
            images = make_images(4, torch.float32)
            for coins in COINS:
                logits = model(images, coins=list(coins))
                optimizer.zero_grad()
                F.cross_entropy(logits, torch.arange(4)).backward()
                optimizer.step()
            return {"logits": logits.detach(), **model.state_dict()}

    return run


def _repeat(run: Callable[[], Tensors], count: int, way: str = WAYS[0]) -> Figures:
    """Assert that `count` more runs have the bits of the first."""
    with _way(way):
        first = run()
        assert all(t.isfinite().all() for t in first.values())
        for i in range(count):
            differ = [name for name, t in run().items() if not torch.equal(t, first[name])]
            assert not differ, f"repeat {i + 1} differs in {differ}"
    return {"cases": count}


@contextlib.contextmanager
def _way(way: str) -> Iterator[None]:
    threads, ended = torch.get_num_threads(), threading.Event()

    def work() -> None:
        x = torch.ones(64, 64)
        while not ended.is_set():
            x @ x

    beside = threading.Thread(target=work)
    torch.set_num_threads(2 if way == "two threads" else 1)
    if way == "beside other work":
        beside.start()
    try:
        yield
    finally:
        ended.set()
        if way == "beside other work":
            beside.join()
        torch.set_num_threads(threads)


def _repeat_on_gpu(case: paths.Case, busy: bool, count: int) -> Figures:
    with paths.poisoned():
        tensors = paths.draw(case)
        first = paths.run(case, tensors)
        assert all(t.isfinite().all() for t in first.values())
        work = torch.ones(4096, 4096, dtype=torch.bfloat16, device=DEVICE) if busy else None
        beside = torch.cuda.Stream() if busy else None
        differs = {name: torch.zeros((), dtype=torch.bool, device=DEVICE) for name in first}
        for _ in range(count):
            if work is not None:
                with torch.cuda.stream(beside):
                    work @ work
            for name, t in paths.run(case, tensors).items():
                differs[name] |= (t != first[name]).any()
    differ = [name for name, differ in differs.items() if differ]
    assert not differ, f"repeats differ in {differ}"
    return {"cases": count}
