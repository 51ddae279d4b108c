"""CUDA graphs: what is captured once runs with whatever coins the device holds at the time of a replay."""

import copy

import pytest
import timm
import torch
from torch.nn import functional as F

from stochca import StochCA
from tests.gpu.paths import DEVICE, DTYPES, PATHS, Case, capture, draw, gpu, run

pytestmark = gpu


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", [*PATHS, Case("fused", length=785), Case("tokens", length=785)], ids=str)
def test_replays_with_other_coins_equal_eager_launches(case):
    tensors = draw(case)

    def step():
        return tuple(run(case, tensors).values())

    captured, replay = capture(step)
    for pattern in ([0, 0, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 1, 0]):
        tensors["coins"].copy_(torch.tensor(pattern, dtype=torch.bool))
        replay()
        for actual, expected in zip(captured, step(), strict=True):
            if case.path == "tokens":  # which leaves products to cuBLAS
                torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-2)
            else:
                assert torch.equal(actual, expected)


def test_a_whole_training_step_replays_with_other_coins_and_trains():
    torch.manual_seed(0)
    target = timm.create_model("vit_tiny_patch16_224", depth=3, num_classes=10).to(DEVICE)
    models = [StochCA(target, p=0.5, per="sample", impl="triton").train()]
    models.append(copy.deepcopy(models[0]))
    images = torch.randn(4, 3, 224, 224, device=DEVICE)
    labels = torch.arange(4, device=DEVICE)
    coins = [torch.zeros(4, dtype=torch.bool, device=DEVICE) for _ in target.blocks]

    def step(model):
        with torch.autocast(DEVICE, DTYPES["bf16"], cache_enabled=False):
            loss = F.cross_entropy(model(images, coins=coins), labels)
        parameters = list(model.parameters())
        grads = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            torch._foreach_add_(parameters, grads, alpha=-0.01)
        return (loss.detach(),)

    initial = copy.deepcopy(models[0].state_dict())
    (captured,), replay = capture(lambda: step(models[0]))
    models[0].load_state_dict(initial)
    losses = []
    for pattern in ([0, 0, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 1, 0]):
        for coin in coins:
            coin.copy_(torch.tensor(pattern, dtype=torch.bool))
        replay()
        (expected,) = step(models[1])
        torch.testing.assert_close(captured, expected, rtol=1e-2, atol=1e-2)
        losses.append(captured.item())
    assert losses[3] < losses[0]
