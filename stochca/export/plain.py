"""The plain timm model behind a trained one, in timm's own folder: weights, config and card."""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.data import resolve_data_config
from timm.models import save_for_hf
from timm.models._hub import generate_readme
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from stochca.attention import StochCAAttention
from stochca.lora import has_adapters, merged_model
from stochca.model import StochCA
from stochca.weights.facts import norm_eps

# The first whose local-dir: reads safetensors.
OLDEST_TIMM = "1.0.26"

PREPARATION = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")

# What timm's config says of the pretrained weights and is not so of the trained ones.
_OUTDATED = (
    "test_input_size", "test_crop_pct", "test_pool_size", "label_names", "label_descriptions", "label_offset",
)  # fmt: skip


class PlainModel(NamedTuple):
    """A timm model, and what others need to know of it.

    Args:
        model: A copy in eval mode, on the CPU, whose `pretrained_cfg` describes these weights.
        model_args: Arguments of `timm.create_model` beside those that timm has recorded.
        data_config: How its images are prepared, by the names of `PREPARATION`.
        classes: Their names in order; None if they have none.
    """

    model: Any
    model_args: dict[str, Any]
    data_config: dict[str, Any]
    classes: list[str] | None

    @property
    def architecture(self) -> str:
        """Its name in timm."""
        return self.model.pretrained_cfg["architecture"]

    def config(self) -> dict[str, Any]:
        """The arguments of timm's functions that save or publish a model."""
        return {
            "model_config": {} if self.classes is None else {"label_names": self.classes},
            "model_args": dict(self.model_args),
            "safe_serialization": True,
        }

    def metadata(self) -> dict[str, str]:
        """Architecture, classes and preparation of the images as strings, JSON where they are none."""
        values = {"classes": self.classes, **self.data_config}
        return {"architecture": self.architecture} | {name: json.dumps(v) for name, v in values.items()}

    def random_images(self, number: int) -> Tensor:
        """Normal noise `[number, channels, height, width]`, the same in every call."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(number, *self.data_config["input_size"], generator=generator)


def plain_model(
    model: nn.Module,
    classes: Sequence[str] | None = None,
    data_config: Mapping[str, Any] | None = None,
    model_args: Mapping[str, Any] | None = None,
) -> PlainModel:
    """The timm model in a StochCA, or in DDP or a compiled module; arguments as of `export_model`.

    Raises:
        TypeError: There is no timm model in it.
        ValueError: Weights, classes or preparation are not as they have to be, the model does not take
            images of that size, its logits are not finite, or timm is too old.
    """
    if TorchVersion(timm.__version__) < OLDEST_TIMM:
        raise ValueError(f"exports need timm {OLDEST_TIMM} or newer, got {timm.__version__}")
    found: Any = unwrap_model(model)
    found = found.target if isinstance(found, StochCA) else found
    found = merged_model(found) if has_adapters(found) else found
    if not getattr(found, "pretrained_cfg", None):
        raise TypeError(f"wanted a StochCA or a model of timm, got {type(found).__name__}")
    if others := sorted({str(p.dtype) for p in found.parameters()} - {"torch.float32"}):
        raise ValueError(f"the weights must be torch.float32, got {', '.join(others)}: export model.float()")
    if classes is not None and len(classes) != found.num_classes:
        raise ValueError(f"classes must be {found.num_classes} names, one per logit, got {len(classes)}")
    config = _preparation(found, data_config or {})
    plain = copy.deepcopy(found).to("cpu", memory_format=torch.contiguous_format).eval()  # of safetensors
    plain.pretrained_cfg = {
        **found.pretrained_cfg,
        **config,
        "num_classes": found.num_classes,
        "custom_load": False,  # the weights are timm's, whatever these started from
        **dict.fromkeys(_OUTDATED),
    }
    own = {"attn_layer": "attn"} if any(isinstance(m, StochCAAttention) for m in found.modules()) else {}
    names = None if classes is None else list(classes)
    result = PlainModel(plain, {**(model_args or {}), **own}, config, names)
    _check_runs(result)
    return result


def _preparation(model: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    if unknown := sorted({*given} - {*PREPARATION}):
        raise ValueError(f"data_config takes {', '.join(PREPARATION)}, got {', '.join(unknown)}")
    cfg = model.pretrained_cfg
    channels, *size = cfg["input_size"]
    channels = getattr(model, "in_chans", channels)
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or size
    size_of_model = (channels, *size)
    for name in ("mean", "std"):
        values = given.get(name, cfg[name])
        if len(values) not in (1, channels):
            raise ValueError(
                f"{name} in data_config must be one number, or one per channel ({channels}), got {values}"
            )
    return resolve_data_config(
        {"input_size": size_of_model, "mean": cfg["mean"], "std": cfg["std"], **given}, cfg
    )


def _check_runs(plain: PlainModel) -> None:
    images = plain.random_images(2)
    try:
        logits = logits_of(plain.model, images)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"the model does not take images {list(images.shape[1:])}: {brief(error)}"
        ) from error
    if not logits.isfinite().all():
        raise ValueError("the logits of the model are not all finite")


def save_folder(plain: PlainModel, folder: Path, card: Mapping[str, Any]) -> None:
    """Write what `timm.create_model("local-dir:<folder>", pretrained=True)` loads, and a model card."""
    save_for_hf(plain.model, str(folder), **plain.config())
    text = generate_readme(dict(card), plain.architecture)
    (folder / "README.md").write_text(text, encoding="utf-8")
    # safetensors makes it private.
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)


def check_folder(plain: PlainModel, folder: Path) -> None:
    """Load the folder as anybody would, and compare.

    Raises:
        ValueError: timm does not rebuild the model, or its logits are not the same bit for bit.
    """
    images = plain.random_images(2)
    try:
        loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        got = logits_of(loaded, images)
    except (AssertionError, RuntimeError, TypeError) as error:
        raise ValueError(
            "timm does not rebuild the model from its export, give in model_args what timm.create_model was "
            f"given: {brief(error)}"
        ) from error
    eps, own = norm_eps(loaded), norm_eps(plain.model)
    if eps != own:
        raise ValueError(
            f"timm's config cannot say that the epsilon of the layer norms is {own}, not {eps}: this model "
            "can be exported as onnx and torch-export alone"
        )
    wanted = logits_of(plain.model, images)
    if not torch.equal(got, wanted):
        raise ValueError(
            "timm rebuilds another model from the export, whose logits differ by "
            f"{(got - wanted).abs().max():.1e}. Give in model_args what timm.create_model was given"
        )


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """Logits of a model in eval mode."""
    return model(images)


def brief(error: BaseException) -> str:
    """What an error says, on one line."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:297]}..."
