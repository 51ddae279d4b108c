"""torch.compile on a GPU, with inductor."""

import copy

import pytest
import timm
import torch
import torch._dynamo.testing
from torch.nn import functional as F

from stochca import StochCA
from tests.gpu.paths import DEVICE, DTYPES, Case, call, draw, gpu, run, settings

pytestmark = [
    *gpu,
    # The compilers warn of themselves, and of the GPU.
    pytest.mark.filterwarnings("default"),
]

CASES = [
    *(Case(path) for path in ("packed", "fused", "tokens")),
    *(Case("packed", coin) for coin in ("self", "cross")),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiles_as_one_graph_once_for_all_batch_sizes(case):
    def doubled(case, tensors, impl):
        return {name: 2 * t for name, t in call(case, tensors, impl).items()}

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(doubled, fullgraph=True, backend=counter)
    with settings(case):
        for batch in (2, 3, 5):
            tensors = draw(case._replace(batch=batch))
            actual, expected = run(case, tensors, function=compiled), run(case, tensors, function=doubled)
            for name in expected:
                torch.testing.assert_close(actual[name], expected[name], rtol=2e-2, atol=2e-2)
    # The second batch size makes the batch symbolic, the third must not compile again.
    assert counter.frame_count == 2


def test_compiled_model_trains_as_the_uncompiled_one():
    torch._dynamo.reset()
    torch.manual_seed(0)
    target = timm.create_model("vit_tiny_patch16_224", depth=3, num_classes=10).to(DEVICE)
    models = [StochCA(target, impl="triton").train()]
    models.append(copy.deepcopy(models[0]))
    models[1].compile()
    images = torch.randn(4, 3, 224, 224, device=DEVICE)
    labels = torch.arange(4, device=DEVICE)
    mixed = torch.arange(4, device=DEVICE) % 2 == 1
    losses: list[list[torch.Tensor]] = [[], []]
    for model, values in zip(models, losses, strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(3):
            with torch.autocast(DEVICE, DTYPES["bf16"]):
                loss = F.cross_entropy(model(images, coins=[True, mixed, False]), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(loss.detach())
    torch.testing.assert_close(*(torch.stack(values) for values in losses), rtol=2e-2, atol=2e-2)
    assert losses[1][2] < losses[1][0]
