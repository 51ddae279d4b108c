"""One training step: forward and loss under autocast, backward, optimizer."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.step.reference import Outcome, flat_gradients
from bench.step.workloads import Setting

Forward = Callable[[Tensor, Sequence[bool]], Tensor]
"""From images `[B, 3, H, W]` and one coin per block to logits `[B, classes]`."""


class TrainingStep:
    """A step of one provider, on the setting's target and with the optimizer that all providers share.

    Nothing in it waits for the device.

    Args:
        forward: What the provider does.
        setting: Target, images and labels.
        optimizer: Of the target's parameters.
        precision: Of autocast; float32 runs without, float16 with a loss scaler.
    """

    def __init__(
        self, forward: Forward, setting: Setting, optimizer: torch.optim.Optimizer, precision: torch.dtype
    ) -> None:
        self.forward, self.setting, self.optimizer, self.precision = forward, setting, optimizer, precision
        device = setting.device.type
        # A scale at which no gradient overflows, so that no step is skipped.
        self.scaler = torch.amp.GradScaler(device, init_scale=2.0**10, enabled=precision == torch.float16)

    def logits(self, coins: Sequence[bool]) -> Tensor:
        """The forward."""
        enabled = self.precision != torch.float32
        dtype = self.precision if enabled else None
        with torch.autocast(self.setting.device.type, dtype=dtype, enabled=enabled):
            return self.forward(self.setting.images, coins)

    def forward_backward(self, coins: Sequence[bool]) -> Tensor:
        """Leave the gradients of the mean cross-entropy at the target's parameters; return the logits."""
        logits = self.logits(coins)
        loss = F.cross_entropy(logits.float(), self.setting.labels)
        self.scaler.scale(loss).backward()
        return logits.detach()

    def update(self) -> None:
        """Let the optimizer step, and drop the gradients."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Free the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def outcome(self, coins: Sequence[bool]) -> Outcome:
        """What a step computes, without an update."""
        self.drop_gradients()
        logits = self.forward_backward(coins).double()
        gradients = flat_gradients(self.setting.target).double() / self.scaler.get_scale()
        self.drop_gradients()
        return Outcome(logits, gradients)


class TF32Step(TrainingStep):
    """A step in float32 whose products are of TF32: what a user gets who asks for that."""

    def forward_backward(self, coins: Sequence[bool]) -> Tensor:
        """The same, the switch set for its time alone."""
        matmul = torch.backends.cuda.matmul
        before = matmul.allow_tf32
        matmul.allow_tf32 = True
        try:
            return super().forward_backward(coins)
        finally:
            matmul.allow_tf32 = before


def make_optimizer(setting: Setting) -> torch.optim.Optimizer:
    """Fused AdamW at a learning rate of 0: the work of any rate, and weights stay equal for all providers.

    Its state exists from here on, so that no step allocates it.
    """
    parameters = list(setting.target.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=True)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer
