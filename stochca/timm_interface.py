"""What timm's functions for data, optimizers, heads and features ask of a model, answered by the target."""

import re
from typing import Any

from torch import Tensor, nn

from stochca.vit import TimmViT


class TimmInterface(nn.Module):
    """A module around a timm model and its frozen source, which timm can treat as one model of its own.

    Attributes:
        target: The timm model, under whose name its parameters are found here.
    """

    target: TimmViT
    _unregistered: list[TimmViT]

    @property
    def source(self) -> TimmViT:
        """The frozen source."""
        return self._unregistered[0]

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """As timm's: normalisation and size of the images, which timm's data functions read here."""
        return self.target.pretrained_cfg

    @property
    def default_cfg(self) -> dict[str, Any]:
        """As timm's: another name of `pretrained_cfg`."""
        return self.target.default_cfg

    @property
    def _traits(self) -> dict[str, Any]:
        # timm's functions for data read the size of the images here, since 1.0.31.
        return self.target._traits

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """As timm's: what `FeatureGetterNet` knows of each block's tokens."""
        return self.target.feature_info

    @property
    def in_chans(self) -> int:
        """As timm's."""
        return self.target.in_chans

    @property
    def num_classes(self) -> int:
        """As timm's."""
        return self.target.num_classes

    @property
    def num_features(self) -> int:
        """As timm's."""
        return self.target.num_features

    @property
    def head_hidden_size(self) -> int:
        """As timm's."""
        return self.target.head_hidden_size

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

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """As timm's, for target and source."""
        self.target.set_input_size(*args, **kwargs)
        self.source.set_input_size(*args, **kwargs)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """As timm's, for target and source: the blocks that stay draw the coins that they drew before."""
        self.source.prune_intermediate_layers(indices, prune_norm, prune_head)
        return self.target.prune_intermediate_layers(indices, prune_norm, prune_head)

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
