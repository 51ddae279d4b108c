"""StochCA: fine-tune a Vision Transformer with stochastic cross-attention against its frozen pretrained copy.

Names are imported when first used, so that the command line can print its help without loading torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stochca.attention import StochCAAttention
    from stochca.model import StochCA
    from stochca.plan import CoinSampler, StepPlan

__version__ = "0.1.0"

_MODULES = {
    "StochCA": "stochca.model",
    "StochCAAttention": "stochca.attention",
    "CoinSampler": "stochca.plan",
    "StepPlan": "stochca.plan",
}

__all__ = ["CoinSampler", "StepPlan", "StochCA", "StochCAAttention"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'stochca' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
