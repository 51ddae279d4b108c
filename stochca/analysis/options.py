"""Options of `stochca analyze`. No torch here: help comes at once."""

# ruff: noqa: RUF009 (`_option` makes a dataclass field)

from dataclasses import dataclass
from typing import Any, Literal

from stochca.config import BatchOptions, DeviceOptions, _check, _option

Weights = Literal["best", "last", "swad"]


@dataclass(kw_only=True)
class PairOptions:
    """Targets and their sources."""

    runs: list[str] = _option(
        [], "folders or safetensors files of stochca finetune; with --model, weights of that timm model"
    )
    weights: Weights = _option("best", "which weights of a folder")
    names: list[str] | None = _option(None, "what the runs are called; by their folders if not given")
    source: str | None = _option(
        None, "file of the source's weights; those that each run started from if not given"
    )
    model: str | None = _option(None, "name of a timm model: the runs are any weights of it")
    model_kwargs: dict[str, Any] = _option({}, "further arguments of --model, as {depth: 2, ...}")
    img_size: int | None = _option(None, "height and width of the images of --model in pixels")


@dataclass(kw_only=True)
class HeldOutOptions:
    """The images."""

    data_dir: str | None = _option(
        None,
        "folder with one folder of classes per split, or the dataset's root; that of the runs if not given",
    )
    dataset: str | None = _option(None, "dataset as timm names it; that of the runs if not given", "-d")
    val_split: str | None = _option(None, "split to analyse; what the runs were validated on if not given")
    num_images: int | None = _option(
        None, "analyse so many images, evenly spread over the split, or all of them"
    )


@dataclass(kw_only=True)
class AnalyzeOptions(DeviceOptions, BatchOptions, HeldOutOptions, PairOptions):
    """Options of `stochca analyze`."""

    output: str = _option(
        "output/analysis", "folder of the tables, plots and report; made if it is not there"
    )
    attention: bool = _option(True, "compare attention maps too")
    pictures: int = _option(4, "images of which the report shows where the models look; 0 for none")

    def __post_init__(self) -> None:
        _check(self, at_least_one="batch_size img_size num_images", not_negative="workers pictures")
        if self.names is not None and len(self.names) != len(self.runs):
            raise ValueError(f"--names must be one per run ({len(self.runs)}), got {len(self.names)}")
        if len(set(self.names or [])) < len(self.names or []):
            raise ValueError(f"--names must differ from each other, got {self.names}")
        if self.model is None and (self.model_kwargs or self.img_size):
            raise ValueError("--model-kwargs and --img-size are for --model: a run knows its own")
