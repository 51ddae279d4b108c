"""Position embeddings of weights of another image size, resampled as torchvision does it."""

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.models.vision_transformer import interpolate_embeddings

from stochca.vit import TimmViT


def resample_as_torchvision(model: TimmViT, positions: Callable[[], Tensor]) -> None:
    """Replace the position embedding of a model, which timm has resampled.

    Args:
        model: With a position embedding for one class token and the patches of square images.
        positions: Returns that of the weights, `[1, 1 + patches, C]`; called for such a model alone.

    Raises:
        ValueError: The model is another one.
    """
    has_class = getattr(model, "num_prefix_tokens", 0) == 1 and not getattr(model, "no_embed_class", False)
    if not has_class or getattr(model, "pos_embed", None) is None:
        raise ValueError(
            "--pos-embed-interpolation torchvision is for a position embedding with one class token, "
            f"{model.pretrained_cfg.get('architecture')} has another"
        )
    (height, width), (patch, _) = model.patch_embed.img_size, model.patch_embed.patch_size
    if height != width:
        raise ValueError(f"--pos-embed-interpolation torchvision is for squares, got {height}x{width}")
    state = OrderedDict({"encoder.pos_embedding": positions().float()})
    with torch.no_grad():
        model.pos_embed.copy_(interpolate_embeddings(height, patch, state)["encoder.pos_embedding"])
