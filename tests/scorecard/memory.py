"""What a training holds in memory after more and more steps, the same at the same point of a step."""

import contextlib
import ctypes
import gc
import itertools
import os
import random
import tempfile
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from timm.loss import LabelSmoothingCrossEntropy
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from stochca import StochCA
from stochca.config import FinetuneOptions
from stochca.losses.distillation import Distillation
from stochca.losses.miro import MIRO
from stochca.objective import Objective
from stochca.train import Trainer
from tests.models import make_model
from tests.scorecard.row import Case, Figures

STEPS = 2000
MOST_PER_STEP = 1000.0
# Of those steps in which everything is met that is kept for later, such as plans of launches.
WARM_UP = 0.25
PROBABILITIES = (0.1, 0.5, 0.9)
SMALL = {"depth": 2, "embed_dim": 32, "num_heads": 2, "dynamic_img_size": True}
KINDS: dict[str, dict[str, Any]] = {
    "class-token": {},
    "per-sample": {"stochca": {"per": "sample"}},
    "rope-average-pool": {"name": "vit_base_patch16_rope_reg1_gap_256"},
}
Step = Callable[[int], None]


def cases(long: bool) -> Iterable[Case]:
    yield Case("a-tensor-kept-is-noticed", partial(_leak_is_noticed, "tensors"))
    yield Case("bytes-kept-are-noticed", partial(_leak_is_noticed, "host"))
    if not long:
        yield Case("tensors", partial(tensors, "per-sample", 60))
        return
    yield Case("per-sample-tensors", partial(tensors, "per-sample", STEPS))
    yield Case("rope-tensors", partial(tensors, "rope-average-pool", STEPS // 2))
    yield Case("kernels-tensors", partial(tensors, "per-sample", 50, impl="triton"))
    yield Case("class-token-host", partial(host, "class-token", STEPS))
    yield Case("rope-host", partial(host, "rope-average-pool", STEPS // 2))
    yield Case("compiled-host", partial(host, "class-token", STEPS // 2, compiled=True))
    yield Case("kernels-host", partial(host, "per-sample", 150, impl="triton"))
    yield Case("trainer", trainer)


def tensors(kind: str, steps: int, **how: Any) -> Figures:
    """The memory of all tensors is the same, to the byte, whenever a step has ended."""
    training = Training(kind, **how)
    training.warm_up()
    with _only_new_garbage(), Storages() as storages:
        return _tensors(training.step, training.rest, storages, steps)


def host(kind: str, steps: int, **how: Any) -> Figures:
    """The process does not grow by more than noise, nor do the objects of Python."""
    training = Training(kind, **how)
    training.warm_up()
    return _host(training.step, training.rest, steps)


def _tensors(step: Step, rest: Callable[[], None], storages: "Storages", steps: int) -> Figures:
    seen = []
    for i in range(steps):
        step(i)
        if i % 10 == 9:
            rest()
            gc.collect()
            seen.append(storages.bytes())
    grown = max(seen) - seen[0]
    assert len(set(seen)) == 1, f"tensors held {seen[0]} bytes, then {sorted(set(seen))[-1]}"
    return {"cases": steps, "device_growth_bytes": grown}


def _host(step: Step, rest: Callable[[], None], steps: int) -> Figures:
    points, resident, objects = [], [], []
    with _only_new_garbage(), _traced():
        for i in range(steps):
            step(i)
            if i >= WARM_UP * steps and i % 10 == 9:
                rest()
                gc.collect()
                points.append(i)
                resident.append(_resident_bytes())
                objects.append(tracemalloc.get_traced_memory()[0])
    figures = {
        "host_bytes_per_step": _slope(points, resident),
        "python_bytes_per_step": _slope(points, objects),
    }
    for name, figure in figures.items():
        assert figure < MOST_PER_STEP, f"{name} is {figure:.0f}"
    return {"cases": steps, **figures}


def _slope(x: list[int], y: list[float]) -> float:
    """The median slope of all pairs of points (Theil and Sen), which a few pages more or less do not move."""
    pairs = itertools.combinations(zip(x, y, strict=True), 2)
    return float(np.median([(y1 - y0) / (x1 - x0) for (x0, y0), (x1, y1) in pairs]))


def _resident_bytes() -> int:
    """Of this process, without what the allocator keeps for later."""
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def _traced() -> Iterator[None]:
    tracemalloc.start(1)
    try:
        yield
    finally:
        tracemalloc.stop()


@contextlib.contextmanager
def _only_new_garbage() -> Iterator[None]:
    """The collector leaves what is there, modules above all, and takes a hundredth of the time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Storages(TorchDispatchMode):
    """The memory of tensors that were made under this mode and live, autograd's included."""

    def __init__(self) -> None:
        super().__init__()
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._held:  # no other has its address while this one is referred to
                    self._held[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return made

    def bytes(self) -> int:
        self._held = {key: held for key, held in self._held.items() if not held[0].expired()}
        return sum(size for _, size in self._held.values())


class Training:
    """Steps of random coins, batches, image sizes and losses, with evaluations between them.

    Args:
        kind: One of `KINDS`.
        compiled: Compile the blocks, with no backend.
        impl: Of the operator.
    """

    def __init__(self, kind: str, compiled: bool = False, impl: str = "auto") -> None:
        kwargs = {**SMALL, **KINDS[kind]}
        stochca = {**kwargs.pop("stochca", {}), "impl": impl}
        p = lambda step: PROBABILITIES[step % len(PROBABILITIES)]  # noqa: E731
        self.model: StochCA = make_model(dtype=torch.float32, p=p, stochca=stochca, **kwargs)
        self.compiled = compiled
        if compiled:
            torch._dynamo.reset()
            self.model.compile(backend="eager", fullgraph=True)
        losses = [MIRO(self.model), Distillation(self.model)]
        criterion = LabelSmoothingCrossEntropy()
        self.objectives = [Objective(self.model, criterion), Objective(self.model, criterion, losses)]
        self.optimizer = torch.optim.AdamW(self.objectives[1].parameters(), lr=1e-4)
        self.random = random.Random(0)

    def warm_up(self) -> None:
        """Meet everything that is kept: moments of the optimizer, recorded sizes and layouts."""
        for i in range(24):
            self.step(i)
        self.rest()

    def step(self, i: int) -> None:
        """A random one."""
        batch, size = self.random.choice([4, 4, 3]), self.random.choice([(24, 24), (24, 32)])
        self.model.set_grad_checkpointing(not self.compiled and self.random.random() < 0.2)
        self.model.recompute = not self.compiled and self.random.random() < 0.3
        self._train(self.random.choice(self.objectives), batch, size)
        if i % 20 == 0:
            self.model.eval()
            with torch.no_grad():
                self.model(torch.randn(batch, 3, *size))
            self.model.train()

    def rest(self) -> None:
        """The step after which memory is looked at."""
        self.model.coins.step = 0
        self._train(self.objectives[0], 4, (24, 24))
        self.model.coins.step = self.random.randrange(10**6)

    def _train(self, objective: Objective, batch: int, size: tuple[int, int]) -> None:
        is_low = not self.compiled and self.random.random() < 0.3
        with torch.autocast("cpu", torch.bfloat16, enabled=is_low):
            terms = objective(torch.randn(batch, 3, *size), torch.arange(batch))
        terms["loss"].backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def trainer() -> Figures:
    """A run with its loader, evaluations and checkpoints."""
    from tests.train.image_folder import TINY, write_images

    with tempfile.TemporaryDirectory() as folder:
        images = write_images(Path(folder) / "images", {"train": 6, "validation": 3})
        options = FinetuneOptions(
            **{"model": "vit_tiny_patch16_224", "pretrained": False, "img_size": 32, "model_kwargs": TINY},
            **{"data_dir": str(images), "batch_size": 4, "epochs": 100, "val_interval": 5, "workers": 0},
            **{"p": 0.5, "device": "cpu", "output": str(Path(folder) / "run")},
        )
        run = Trainer(options)
        train_step, points, resident, objects = run._train_step, [], [], []

        def watched(*args: Any) -> torch.Tensor:
            loss = train_step(*args)
            if run.step >= WARM_UP * run.total_steps and run.step % 4 == 3:
                points.append(run.step)
                resident.append(_resident_bytes())
                objects.append(tracemalloc.get_traced_memory()[0])
            return loss

        with _traced(), mock.patch.object(run, "_train_step", watched):
            run.run()
    figures = {
        "host_bytes_per_step": _slope(points, resident),
        "python_bytes_per_step": _slope(points, objects),
    }
    for name, figure in figures.items():
        assert figure < MOST_PER_STEP, f"{name} is {figure:.0f}"
    return {"cases": run.step, **figures}


def _leak_is_noticed(what: str) -> None:
    """What grows by little more than the limit in each step is off."""
    kept: list[Any] = []
    with Storages() as storages:
        try:
            if what == "tensors":
                _tensors(
                    lambda i: kept.append(torch.zeros(1) if i == 50 else None), lambda: None, storages, 100
                )
            else:
                _host(lambda i: kept.append(bytes(2000)), lambda: None, 400)
        except AssertionError:
            return
    raise AssertionError("a leak went unnoticed")
