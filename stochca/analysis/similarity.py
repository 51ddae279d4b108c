"""Cosine similarity of queries, keys and values."""

from torch import Tensor
from torch.nn import functional as F

from stochca.analysis.heads import Heads, Layout, device_of_float64


def float64(x: Tensor) -> Tensor:
    """A tensor in float64, on the CPU where its device has none."""
    return x.to(device_of_float64(x)).double()


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """Cosine between vectors `[..., D]`, in float64: `[...]`; 0 where one of them is zero."""
    return F.cosine_similarity(float64(x), float64(y), dim=-1)


def similarities(target: Heads, source: Heads, layout: Layout) -> dict[str, Tensor]:
    """Mean cosine over all tokens, and that of the class token, by the names of `MEASURES`: `[B, H]` each."""
    parts = {
        name: cosine(getattr(target, name[0]), getattr(source, name[0])) for name in ("query", "key", "value")
    }
    over_tokens = {f"{name}_cosine": cosines.mean(-1) for name, cosines in parts.items()}
    if not layout.has_class:
        return over_tokens
    return over_tokens | {f"class_{name}_cosine": cosines[..., 0] for name, cosines in parts.items()}
