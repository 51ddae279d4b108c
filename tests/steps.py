"""What a training step computes, for tests that compare two ways to run one."""

import torch


def outcome(forward, setting, coins):
    """Logits, and the gradients of all parameters, zeros where none arrives."""
    logits = forward(setting.images, coins)
    parameters = list(setting.target.parameters())
    return logits, torch.autograd.grad(
        logits.square().sum(), parameters, allow_unused=True, materialize_grads=True
    )


def assert_same(actual, expected):
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-4, atol=1e-4)
    for grad, other in zip(actual[1], expected[1], strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-3, atol=1e-3)
