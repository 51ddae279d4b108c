"""Losses in a step: all at once, under autocast, with every coin pattern, and in two processes."""

import copy
import gc
import itertools
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from stochca.losses import LOSSES, Step, create_losses
from tests.losses.steps import CLASSES, SOURCE_CLASSES, make_labels, make_pair, whole_step
from tests.models import make_images, perturb

ALL = [
    {"l2_sp": {"weight": 0.5}},
    {"bss": {"weight": 0.1, "k": 2}},
    {"co_tuning": {"relationship": "direct"}},
    "miro",
    "distillation",
    {"feature_distillation": {"taps": [1]}},
]
COINS = list(itertools.product([False, True], repeat=2))


def make_losses(model, specs=ALL):
    losses = create_losses(specs, model)
    generator = torch.Generator().manual_seed(0)
    for loss in losses:
        perturb(loss)
        if loss.fits_source_logits:
            logits = torch.randn(40, SOURCE_CLASSES, generator=generator, dtype=torch.float64)
            loss.fit(logits, torch.arange(40) % CLASSES)
    return losses


def needs(losses):
    """What `forward_step` is asked for."""
    taps = sorted({tap for loss in losses for tap in loss.taps})
    return {"taps": taps, "source_logits": any(loss.reads_source_logits for loss in losses)}


def total(losses, step):
    return F.cross_entropy(step.outputs.logits, step.labels) + sum(loss(step) for loss in losses)


@pytest.mark.parametrize("class_rows", [True, False], ids=["class-rows", "all-rows"])
@pytest.mark.parametrize("coins", COINS, ids=["".join("SC"[coin] for coin in coins) for coins in COINS])
def test_all_losses_at_once_have_the_gradients_of_two_whole_passes(coins, class_rows):
    model = make_pair(depth=2, stochca={"class_rows": class_rows})
    losses = make_losses(model)
    images, labels = make_images(4), make_labels()
    parameters = [*model.target.parameters(), *losses.parameters()]
    outputs = model.forward_step(images, coins, **needs(losses))
    term = total(losses, Step(model, outputs, labels))
    expected = total(losses, Step(model, whole_step(model, images, coins, needs(losses)["taps"]), labels))
    torch.testing.assert_close(term, expected, rtol=1e-12, atol=1e-12)
    grads, wanted = (
        torch.autograd.grad(t, parameters, allow_unused=True, materialize_grads=True)
        for t in (term, expected)
    )
    torch.testing.assert_close(grads, wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", LOSSES)
def test_a_term_reads_only_what_its_loss_asked_for(name):
    """So it is the same alone, where nothing else is computed, as with all others."""
    model = make_pair(depth=2)
    losses = make_losses(model)
    (loss,) = (loss for loss in losses if loss.name == name)
    terms = []
    for asked in ([loss], losses):
        outputs = model.forward_step(make_images(4), (True, False), **needs(asked))
        terms.append(loss(Step(model, outputs, make_labels())))
    torch.testing.assert_close(*terms, rtol=1e-12, atol=0)


def test_a_step_reaches_all_parameters_of_the_losses_and_none_of_the_source():
    model = make_pair(depth=2)
    losses = make_losses(model)
    for weight in (None, 0.0):  # a loss that is weighted by nothing leaves no parameter without a gradient
        for loss in losses:
            loss.weight = loss.weight if weight is None else weight
            loss.zero_grad(set_to_none=True)
        outputs = model.forward_step(make_images(4), (True, True), **needs(losses))
        total(losses, Step(model, outputs, make_labels())).backward()
        assert all((p.grad.abs().max() > 0) == (weight is None) for p in losses.parameters())
        assert all(p.grad is None for p in model.source.parameters())


@pytest.mark.parametrize("source_dtype", [None, "bfloat16"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_term_under_autocast_stays_near_float64(name, source_dtype):
    specs = [spec for spec in ALL if name in spec]
    model = make_pair(depth=2, dtype=torch.float32, stochca={"source_dtype": source_dtype})
    losses = make_losses(model, specs)
    exact = make_pair(depth=2)
    exact_losses = make_losses(exact, specs)
    expected_outputs = whole_step(exact, make_images(4), (False, True), needs(exact_losses)["taps"])
    expected = exact_losses[0](Step(exact, expected_outputs, make_labels()))
    with torch.autocast("cpu", torch.bfloat16):
        images = make_images(4, dtype=torch.float32)
        outputs = model.forward_step(images, (False, True), **needs(losses))
        term = losses[0](Step(model, outputs, make_labels()))
    assert term.dtype == torch.float32
    torch.testing.assert_close(term.double(), expected, rtol=0.02, atol=0)
    term.backward()
    assert all(p.grad.isfinite().all() for p in losses.parameters())
    grads = [p.grad for p in model.target.parameters() if p.grad is not None]
    assert grads
    assert all(grad.isfinite().all() for grad in grads)


def test_losses_survive_copies_and_restore_their_state():
    model = make_pair(depth=2)
    losses = make_losses(model)
    outputs = model.forward_step(make_images(4), (True, False), **needs(losses))
    step = Step(model, outputs, make_labels())
    fresh = create_losses(ALL, model)
    fresh.load_state_dict(losses.state_dict())
    for again in (copy.deepcopy(losses), fresh):
        assert torch.equal(total(again, step), total(losses, step))


class Root(nn.Module):
    """A model and its losses, as DDP sees them."""

    def __init__(self, name):
        super().__init__()
        self.model = make_pair(depth=2)
        self.losses = make_losses(self.model, [spec for spec in ALL if name in spec])

    def forward(self, images, labels, coins):
        outputs = self.model.forward_step(images, coins, **needs(self.losses))
        return total(self.losses, Step(self.model, outputs, labels))


def run_rank(rank, port, results):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    grads = {}
    for name in LOSSES:
        root = Root(name)
        parallel = DistributedDataParallel(root)
        for coins in ((True, True), (False, True)):  # the second finds all gradients of the first reduced
            root.zero_grad()
            parallel(make_images(4).split(2)[rank], make_labels().split(2)[rank], coins).backward()
        grads[name] = {key: p.grad.numpy() for key, p in root.named_parameters()}
        dist.barrier()
        del parallel  # before the process group, or its threads may wait for each other
    results.put((rank, grads))
    dist.barrier()
    gc.collect()
    dist.destroy_process_group()


def test_two_processes_train_as_one_with_the_joined_batch_and_bss_with_each_its_own():
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [context.Process(target=run_rank, args=(rank, port, results)) for rank in range(2)]
    for process in ranks:
        process.start()
    received = dict(results.get(timeout=120) for _ in ranks)
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    for name in LOSSES:
        root = Root(name)
        batches = 2 if name == "bss" else 1
        for images, labels in zip(make_images(4).chunk(batches), make_labels().chunk(batches), strict=True):
            (root(images, labels, (False, True)) / batches).backward()
        for key, p in root.named_parameters():
            for grads in received.values():
                torch.testing.assert_close(
                    torch.from_numpy(grads[name][key]),
                    p.grad,
                    rtol=1e-10,
                    atol=1e-11,
                    msg=lambda m, name=name, key=key: f"{name}, {key}: {m}",
                )
