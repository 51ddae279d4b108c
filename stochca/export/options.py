"""Options of `stochca export`. No torch here: help comes at once."""

# ruff: noqa: RUF009 (`_option` makes a dataclass field)

from dataclasses import dataclass
from typing import Literal, TypeAlias

from stochca.config import _option

Format: TypeAlias = Literal["timm", "onnx", "torch-export"]

TOLERANCE = 1e-5


@dataclass(kw_only=True)
class SourceOptions:
    """What is exported."""

    checkpoint: str = _option("", "folder of a run of stochca finetune, or one of its safetensors files")
    which: Literal["best", "last", "swad"] | None = _option(
        None, "weights of the run in that folder; the best if not given"
    )


@dataclass(kw_only=True)
class FormatOptions:
    """What is written."""

    output: str = _option("output/export", "folder of the export; one that is not empty is refused")
    formats: list[Format] = _option(
        ["timm"],
        "timm: weights, config and card, the layout of the Hugging Face hub; onnx: model.onnx; "
        "torch-export: model.pt2",
    )
    tolerance: float = _option(
        TOLERANCE,
        "largest difference of onnx and torch-export to the model, relative to its largest logit",
    )


@dataclass(kw_only=True)
class ExportOptions(SourceOptions, FormatOptions):
    """The Hugging Face hub."""

    push_to_hub: str | None = _option(None, "also publish timm's folder there, as OWNER/NAME")
    private: bool = _option(False, "make a new repository of --push-to-hub private")
    license: str | None = _option(
        None, "licence in the model card; that of the pretrained weights if timm names it, else unknown"
    )

    def __post_init__(self) -> None:
        if not self.formats or len(set(self.formats)) < len(self.formats):
            raise ValueError(f"--formats must be different values, at least one, got {self.formats}")
        if not self.tolerance >= 0:
            raise ValueError(f"--tolerance must be at least 0, got {self.tolerance}")
        if self.private and self.push_to_hub is None:
            raise ValueError("--private is for --push-to-hub")
