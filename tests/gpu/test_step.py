"""Whole training steps: nothing waits for the host, and other ways to run one compute the same."""

import contextlib
import itertools

import pytest
import torch
from PIL import Image

from bench.step import experiments
from bench.step.training import TrainingStep, make_optimizer
from bench.step.workloads import Setting, Workload
from stochca import StochCA
from stochca.config import FinetuneOptions
from stochca.train import Trainer
from tests.gpu.paths import DEVICE, gpu

# Compilers warn about much that is not ours.
pytestmark = [*gpu, pytest.mark.filterwarnings("default")]

SMALL = Workload("ViT-Tiny, 4 blocks", "vit_tiny_patch16_224", 8, kwargs={"depth": 4})
DRAWS = [(True, False, True, False), (False, True, True, True), (False,) * 4, (True, True, False, True)]
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def setting():
    return Setting.make(SMALL, torch.device(DEVICE))


@pytest.fixture
def deterministic(monkeypatch):
    """The patch embedding's gradient too."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@contextlib.contextmanager
def no_synchronization():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("per", ["batch", "sample"])
@pytest.mark.parametrize("how", ["eager", "compiled", "recompute", "checkpointing"])
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_a_step_never_waits_for_the_device(setting, per, how, dtype):
    model = StochCA(setting.target, setting.source, p=0.5, per=per, recompute=how == "recompute").train()
    model.set_grad_checkpointing(how == "checkpointing")
    if how == "compiled":
        model.compile()
    step = TrainingStep(lambda images, _: model(images), setting, make_optimizer(setting), dtype)
    for _ in range(12):  # until every case has been compiled
        step.forward_backward(())
        step.update()
    try:
        with no_synchronization():
            for _ in range(4):
                step.forward_backward(())
                step.update()  # with a fused optimizer the scaler decides on the device
    finally:
        model.set_grad_checkpointing(False)


@pytest.mark.parametrize("amp_dtype", ["bfloat16", "float16"])
def test_a_step_of_the_command_line_never_waits_for_the_device(tmp_path, amp_dtype):
    for i, name in enumerate(f"{split}/{label}" for split in ("train", "val") for label in "ab"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for j in range(4):
            Image.new("RGB", (40, 36), (60 * i, 60 * j, 90)).save(tmp_path / "data" / name / f"{j}.png")
    options = FinetuneOptions(
        data_dir=str(tmp_path / "data"),
        val_split="val",
        output=str(tmp_path / "run"),
        model="vit_tiny_patch16_224",
        pretrained=False,
        model_kwargs={"depth": 2},
        img_size=32,
        batch_size=2,
        device=DEVICE,
        amp=True,
        amp_dtype=amp_dtype,
        clip_grad=1.0,
        drop_path=0.1,
        p=0.5,
        workers=0,
        steps=50,
    )
    run = Trainer(options)
    run.model.train()
    batches = itertools.cycle(list(run.loader))
    for _ in range(8):
        run._train_step(batches, 1)
    with no_synchronization():
        for _ in range(4):
            run._train_step(batches, 1)


WAYS = {
    "one launch": experiments.one_launch,
    "fused projection": lambda setting: experiments.one_launch(setting, fused=True),
    "side stream": experiments.side_stream,
    "prefetched": experiments.prefetched,
    "recompute": experiments.recomputing,
    "graphs of blocks": experiments.cuda_graphs_of_blocks,
}


def outcomes(setting, forward, step=TrainingStep, draws=DRAWS):
    run = step(forward, setting, make_optimizer(setting), BF16)
    return [run.outcome(coins) for coins in draws]


@pytest.mark.parametrize("way", [*WAYS, "graph of the step"])
def test_other_ways_to_run_a_step_compute_the_same(way):
    setting = Setting.make(SMALL, torch.device(DEVICE))  # its parameters have run on no other stream
    ours = StochCA(setting.target, setting.source).train()
    expected = outcomes(setting, lambda images, coins: ours(images, coins=coins))
    if way == "graph of the step":
        found = outcomes(setting, experiments.coins_on_device(setting), experiments.GraphedStep)
    else:
        # Twice: what runs ahead is read the second time.
        found = outcomes(setting, WAYS[way](setting), draws=DRAWS * 2)
    for actual, wanted in zip(found, expected * 2, strict=False):
        for result, exact in zip(actual, wanted, strict=True):
            error = torch.linalg.vector_norm(result - exact) / torch.linalg.vector_norm(exact)
            assert error < 3e-2, way


@pytest.mark.usefixtures("deterministic")
def test_recomputation_changes_no_bit_and_takes_less_memory(setting):
    results, peaks = [], []
    for recompute in (False, True):
        model = StochCA(setting.target, setting.source, recompute=recompute).train()
        step = TrainingStep(lambda x, c, m=model: m(x, coins=c), setting, make_optimizer(setting), BF16)
        results.append(step.outcome(DRAWS[0]))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step.logits(DRAWS[0])
        peaks.append(torch.cuda.max_memory_allocated() - before)
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)
    assert peaks[1] < 0.9 * peaks[0]


@pytest.mark.usefixtures("deterministic")
def test_weights_that_are_held_change_no_bit(setting):
    results = []
    for source in (setting.source, setting.with_source_in(BF16).source):
        model = StochCA(setting.target, source).train()
        results += outcomes(setting, lambda x, c, m=model: m(x, coins=c), draws=DRAWS[:1])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_a_source_in_float8_is_near(setting):
    pytest.importorskip("torchao", reason="needs torchao")
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("float8 needs compute capability 8.9")
    ours = StochCA(setting.target, setting.source).train()
    (expected,) = outcomes(setting, lambda x, c: ours(x, coins=c), draws=DRAWS[:1])
    (actual,) = outcomes(setting, experiments.float8_source(setting), draws=DRAWS[:1])
    for result, exact in zip(actual, expected, strict=True):
        assert 0 < torch.linalg.vector_norm(result - exact) / torch.linalg.vector_norm(exact) < 0.1
