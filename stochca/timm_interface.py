"""What timm's functions for data, optimizers and heads ask of a model, answered by the target."""

import re
from typing import Any

from torch import Tensor, nn

from stochca.vit import TimmViT


class TimmInterface(nn.Module):
    """A module around a timm model, which timm can treat as one of its own.

    Attributes:
        target: The timm model, under whose name its parameters are found here.
    """

    target: TimmViT

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """As timm's: normalisation and size of the images, which timm's data functions read here."""
        return self.target.pretrained_cfg

    @property
    def num_classes(self) -> int:
        """As timm's."""
        return self.target.num_classes

    @property
    def num_features(self) -> int:
        """As timm's."""
        return self.target.num_features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """As timm's."""
        return self.target.forward_head(x, pre_logits=pre_logits)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As timm's: recompute each block of the target in the backward."""
        self.target.set_grad_checkpointing(enable)

    def get_classifier(self) -> nn.Module | tuple[nn.Module, ...]:
        """As timm's."""
        return self.target.get_classifier()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """As timm's."""
        self.target.reset_classifier(num_classes, global_pool)

    def no_weight_decay(self) -> set[str]:
        """As timm's, under this module's parameter names."""
        return {f"target.{name}" for name in self.target.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """As timm's, under this module's parameter names: layer decay sees the target's layers."""

        def prefixed(pattern: str) -> str:
            without_anchors = re.sub(r"(^|\|)\^", r"\1", pattern)
            return rf"^target\.(?:{without_anchors})"

        matcher = self.target.group_matcher(coarse)
        return {
            group: prefixed(patterns)
            if isinstance(patterns, str)
            else [(prefixed(pattern), key) for pattern, key in patterns]
            for group, patterns in matcher.items()
        }
