"""The model card, in the form of timm's `generate_readme`."""

from collections.abc import Mapping
from typing import Any

from stochca.export.plain import PlainModel

_CITATION = """@article{seo2024stochca,
  title={StochCA: A Novel Approach for Exploiting Pretrained Models with Cross-Attention},
  author={Seo, Seungwon and Lee, Suho and Hwang, Sangheum},
  journal={arXiv preprint arXiv:2402.16092},
  year={2024}
}"""


# More names than these are in config.json alone.
_LISTED = 20


def model_card(plain: PlainModel, address: str, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What is known of a model.

    Args:
        plain: The model.
        address: What `timm.create_model` loads it by.
        given: Entries that replace these; those of `details` are added to them.
    """
    cfg, config, classes = plain.model.pretrained_cfg, plain.data_config, plain.classes
    given = given or {}
    details = {
        "Model": f"timm's {plain.architecture}",
        "Parameters": f"{sum(p.numel() for p in plain.model.parameters()):,}",
        "Images": " x ".join(map(str, config["input_size"])),
        "Mean": _numbers(config["mean"]),
        "Standard deviation": _numbers(config["std"]),
        "Classes": classes if classes and len(classes) <= _LISTED else plain.model.num_classes,
    }
    return {
        "license": cfg.get("license") or "unknown",
        "description": "A model of [timm](https://github.com/huggingface/pytorch-image-models), exported by "
        "StochCA, which fine-tunes a Vision Transformer by [stochastic cross-attention]"
        "(https://arxiv.org/abs/2402.16092) against its frozen pretrained copy; inference does without it.",
        "tags": ["image-classification", "timm"],
        "usage": _usage(address, has_names=classes is not None),
        "citation": _CITATION,
        **given,
        "details": {**details, **given.get("details", {})},
    }


def _numbers(values: Any) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _usage(address: str, has_names: bool) -> str:
    name = 'print(model.pretrained_cfg["label_names"][logits.argmax()])\n' if has_names else ""
    return f'''```python
import timm
import torch
from PIL import Image

model = timm.create_model("{address}", pretrained=True).eval()
config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**config, is_training=False)
with torch.no_grad():
    logits = model(transform(Image.open("image.jpg").convert("RGB"))[None])
{name}```'''
