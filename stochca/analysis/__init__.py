"""`stochca analyze`: how queries, keys, values and attention of a target differ from those of its source.

Names are imported when first used, so that the command line can print its help without loading torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stochca.analysis.comparison import Comparison, compare

__all__ = ["Comparison", "compare"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'stochca.analysis' has no attribute {name!r}")
    from stochca.analysis import comparison

    return getattr(comparison, name)
