"""The loss of a step: cross-entropy and its companions, in one module that can be distributed as a whole."""

from collections.abc import Callable, Iterable

from timm.models import group_parameters
from torch import Tensor, nn

from stochca.losses.base import Companion, Step
from stochca.model import StochCA


class Objective(nn.Module):
    """From images and labels to the loss.

    Distribute this module, not its model: every parameter that a loss reads is then in the forward of the
    root, which is what `DistributedDataParallel` and `fully_shard` want.

    Args:
        model: Target and source.
        criterion: From logits and labels to a scalar.
        losses: `Companion`s, terms that are added to it.
    """

    def __init__(self, model: StochCA, criterion: nn.Module, losses: Iterable[nn.Module] = ()) -> None:
        super().__init__()
        self.model = model
        self.criterion = criterion
        self.losses = nn.ModuleList(losses)

    @property
    def companions(self) -> list[Companion]:
        """The losses beside the criterion."""
        return [loss for loss in self.losses if isinstance(loss, Companion)]

    def no_weight_decay(self) -> set[str]:
        """As timm's, under this module's parameter names."""
        return {f"model.{name}" for name in self.model.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """As timm's, under this module's parameter names; the losses' are in the layer of the head."""
        layers = group_parameters(self.model, self.model.group_matcher(coarse), reverse=True)
        last = max(layers.values())
        return lambda name: layers.get(name.removeprefix("model."), last)

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Compute the loss of a batch, with one pass of the target and as much of the source as is read.

        Args:
            images: `[B, 3, H, W]`.
            labels: Class indices `[B]`, or shares of the classes `[B, num_classes]`.

        Returns:
            `loss`, a scalar; its terms, `cross_entropy` and each companion's by name; and `output`, the
            logits `[B, num_classes]`.
        """
        companions = self.companions
        if not companions:
            logits = self.model(images)
            loss = self.criterion(logits, labels)
            return {"loss": loss, "cross_entropy": loss.detach(), "output": logits}
        outputs = self.model.forward_step(
            images,
            taps={tap for companion in companions for tap in companion.taps},
            source_logits=any(companion.reads_source_logits for companion in companions),
        )
        step = Step(self.model, outputs, labels)
        terms = {"cross_entropy": self.criterion(outputs.logits, labels)}
        terms |= {companion.name: companion(step) for companion in companions}
        loss = sum(terms.values(), start=outputs.logits.new_zeros((), dtype=terms["cross_entropy"].dtype))
        return {
            "loss": loss,
            **{name: term.detach() for name, term in terms.items()},
            "output": outputs.logits,
        }
