"""Steps whose losses the tests compute: of random tensors, or of two whole passes through the models."""

import torch

from stochca import StochCA
from stochca.model import StepOutputs
from tests import plain
from tests.models import make_target, perturb

CLASSES, SOURCE_CLASSES = 5, 7


def make_pair(dtype=torch.float64, stochca=None, source_classes=SOURCE_CLASSES, **kwargs):
    """StochCA whose source has kept a head of its own."""
    source = make_target(dtype=dtype, **{"depth": 3, **kwargs, "num_classes": source_classes})
    target = make_target(dtype=dtype, **{"depth": 3, **kwargs, "num_classes": CLASSES})
    perturb(target, seed=1)
    return StochCA(target, source, p=0.5, **(stochca or {})).train()


def make_outputs(model, taps=(), batch=4, tokens=6, dtype=torch.float64, seed=0):
    """Random outputs, of which those of the target are leaves that want a gradient."""
    generator = torch.Generator().manual_seed(seed)
    width = model.target.embed_dim

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return StepOutputs(
        random(batch, model.target.num_classes).requires_grad_(),
        random(batch, width).requires_grad_(),
        {tap: random(batch, tokens, width).requires_grad_() for tap in taps},
        {tap: random(batch, tokens, width) for tap in taps},
        random(batch, model.source.num_classes),
    )


def make_labels(batch=4):
    return torch.arange(batch) % CLASSES


def whole_step(model, images, coins, taps, attend=plain.select):
    """What `forward_step` returns, of a whole pass through timm's source and then one through the target."""
    target, source = model.target, model.source
    (stem, ropes), pairs = plain.stem_and_ropes(source, images), []
    x0 = [stem]
    with torch.no_grad():
        for block, rope in zip(source.blocks, ropes, strict=True):
            pairs.append(plain.qkv(block.attn, block.norm1(x0[-1]), rope)[1:])
            x0.append(block(x0[-1]) if rope is None else block(x0[-1], rope=rope))
        source_logits = source.forward_head(source.norm(x0[-1]))
    stem, ropes = plain.stem_and_ropes(target, images)
    x = [stem]
    for block, pair, coin, rope in zip(target.blocks, pairs, coins, ropes, strict=True):

        def read(q, k, v, pair=pair, coin=coin):
            return attend(q, (k, v), pair, coin)

        x.append(plain.block(block, x[-1], read, rope))
    features = target.forward_head(target.norm(x[-1]), pre_logits=True)
    taps, source_taps = {tap: x[tap] for tap in taps}, {tap: x0[tap].detach() for tap in taps}
    return StepOutputs(target.get_classifier()(features), features, taps, source_taps, source_logits)


def gradients(term, *tensors):
    """Gradients of a term, zeros where it does not reach."""
    return torch.autograd.grad(term, tensors, allow_unused=True, materialize_grads=True)


def assert_same_term(term, expected, *tensors, tolerance=1e-10):
    """Two terms and their gradients agree, and a gradient that is zero is so in both."""
    torch.testing.assert_close(term.double(), expected.double(), rtol=tolerance, atol=tolerance)
    pairs = zip(gradients(term, *tensors), gradients(expected, *tensors), strict=True)
    for grad, wanted in pairs:
        torch.testing.assert_close(grad, wanted, rtol=tolerance, atol=tolerance)
