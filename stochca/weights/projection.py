"""CLIP's projection between the features and a new classifier, in a model that stays timm's.

The projection takes the place of timm's `fc_norm`, which lies there and is empty in CLIP's models: the
features of the model are the projected ones, and its head is the classifier. Both are linear with nothing but
dropout between them, so files of weights hold their product as the head of the plain timm model.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from stochca.vit import TimmViT

_PROJECTION = "fc_norm.weight"


def classify_after_projection(model: TimmViT, num_classes: int) -> None:
    """Put a new classifier after CLIP's projection, which a model with CLIP's own head has as that head.

    Args:
        model: Changed in place.
        num_classes: Of the new classifier.

    Raises:
        ValueError: The head is not CLIP's projection, or its place is taken.
    """
    projection = model.get_classifier()
    if not isinstance(projection, nn.Linear) or projection.bias is None or projection.bias.any():
        raise ValueError(
            "--clip-projection needs weights with CLIP's projection, which timm has as a head without a bias "
            f"({'no such head' if not isinstance(projection, nn.Linear) else 'this head has one'})"
        )
    if not isinstance(getattr(model, "fc_norm", None), nn.Identity):
        raise ValueError(
            f"--clip-projection needs a model without a norm before its head, got {model.fc_norm}"
        )
    model.fc_norm = nn.Linear(projection.in_features, projection.out_features, bias=False)
    model.fc_norm.weight = projection.weight
    model.head = nn.Linear(projection.out_features, num_classes)
    nn.init.trunc_normal_(model.head.weight, std=0.02)  # as timm's heads start
    nn.init.zeros_(model.head.bias)
    model.num_classes = num_classes


def with_plain_head(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the plain timm model: a projection before the head is multiplied into it."""
    if _PROJECTION not in state or state[_PROJECTION].ndim != 2:  # none, or timm's own norm
        return dict(state)
    head, projection = state["head.weight"], state[_PROJECTION]
    plain = {name: tensor for name, tensor in state.items() if name != _PROJECTION}
    return {**plain, "head.weight": (head.double() @ projection.double()).to(head.dtype)}
