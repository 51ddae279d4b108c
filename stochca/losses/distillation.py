"""Distillation from the frozen source: of its logits, or of its features."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from stochca.losses.base import Companion, Step, exact
from stochca.losses.checks import check_choice, check_number, classifier_of, resolve_taps
from stochca.model import StochCA

Head = Literal["source", "target"]


class Distillation(Companion):
    r"""Keep what the source's head says of the images.

    :math:`w\,T^2\,\mathrm{KL}\!\left(\mathrm{softmax}(z^0 / T) \,\|\, \mathrm{softmax}(z / T)\right)`, a mean
    over samples, where :math:`z^0` are the source's logits.

    Args:
        model: Target, and a source that has kept its pretrained head.
        weight: :math:`w`.
        temperature: :math:`T`.
        head: What gives :math:`z`. "source": the source's own head, frozen, on the target's features,
            whatever the target's classes are. "target": the target's classifier, where both have the same
            classes.

    Raises:
        ValueError: An option is out of range, the source has no head of at least two classes, or
            `head="target"` meets a target of another number of classes.

    Source: Hinton, Vinyals and Dean, arXiv 1503.02531; on the old head Li and Hoiem, arXiv 1606.09282.
    """

    name = "distillation"
    reads_source_logits = True

    def __init__(
        self, model: StochCA, weight: float = 1.0, temperature: float = 2.0, head: Head = "source"
    ) -> None:
        super().__init__()
        check_number(self.name, "weight", weight)
        check_number(self.name, "temperature", temperature, positive=True)
        check_choice(self.name, "head", head, get_args(Head))
        classifier_of(self.name, model, "source", at_least=2)
        classes, target_classes = model.source.num_classes, model.target.num_classes
        if head == "target" and classes != target_classes:
            raise ValueError(
                f'{self.name}: head="target" needs a target of the source\'s {classes} classes, '
                f"got {target_classes}"
            )
        self.weight, self.temperature, self.head = weight, temperature, head

    def forward(self, step: Step) -> Tensor:
        """The term, see `Companion.forward`."""
        logits, source_logits = step.outputs.logits, step.outputs.source_logits
        assert source_logits is not None
        if self.head == "source":
            logits = step.model.source.get_classifier()(step.outputs.features)
        log_shares, log_source_shares = (
            F.log_softmax(exact(z) / self.temperature, dim=-1) for z in (logits, source_logits)
        )
        divergence = F.kl_div(log_shares, log_source_shares, reduction="batchmean", log_target=True)
        return self.weight * self.temperature**2 * divergence

    def extra_repr(self) -> str:
        """The options."""
        return f"weight={self.weight}, temperature={self.temperature}, head={self.head!r}"


class FeatureDistillation(Companion):
    """Keep the tokens near the source's: `weight` times their mean squared distance, a mean over taps too.

    Args:
        model: Target and source.
        weight: Of the term.
        taps: After how many blocks tokens are compared; None for those before the first block and after each
            quarter of the blocks.

    Raises:
        ValueError: An option is out of range, or a tap outside the model.

    Source: Romero et al., arXiv 1412.6550, without their regressor, as both models have one width.
    """

    name = "feature_distillation"

    def __init__(self, model: StochCA, weight: float = 1.0, taps: list[int] | None = None) -> None:
        super().__init__()
        check_number(self.name, "weight", weight)
        self.weight = weight
        self.taps = resolve_taps(self.name, taps, model)

    def forward(self, step: Step) -> Tensor:
        """The term, see `Companion.forward`."""
        taps, source_taps = step.outputs.taps, step.outputs.source_taps
        distances = [F.mse_loss(exact(taps[tap]), exact(source_taps[tap])) for tap in self.taps]
        return self.weight * torch.stack(distances).mean()

    def extra_repr(self) -> str:
        """The options."""
        return f"weight={self.weight}, taps={self.taps}"
