"""The program that `compute-sanitizer` watches."""

import pytest
import torch

from stochca_kernels import backward, backward_joint, forward, projected, tokens
from tests.gpu import sanitized
from tests.gpu.paths import DEVICE


def zeroed(new):
    return lambda *args, **kwargs: new(*args, **kwargs).zero_()


@pytest.mark.skipif(DEVICE == "cuda", reason="some kernels are for some GPUs alone")
def test_the_program_launches_every_kernel(monkeypatch):
    launched = set()

    class Spy:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            launched.add(self.name)
            return lambda *args, **kwargs: None

    kernels = set()
    for module in (forward, backward, backward_joint, projected, tokens):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Spy(name))
            kernels.add(name)
    monkeypatch.setattr(tokens, "token_splits", lambda *_: 3)  # of a GPU's
    for name in ("new_empty", "new_empty_strided"):  # nothing is computed
        monkeypatch.setattr(torch.Tensor, name, zeroed(getattr(torch.Tensor, name)))
    monkeypatch.setattr(torch, "empty_like", torch.zeros_like)
    sanitized.main()
    assert len(kernels) == 9
    assert launched == kernels
