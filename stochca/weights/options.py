"""Options of `stochca convert`. No torch here: help comes at once."""

# ruff: noqa: RUF009 (`_option` makes a dataclass field)

from dataclasses import dataclass
from typing import Any, Literal

from stochca.config import _option


@dataclass(kw_only=True)
class ConvertOptions:
    """Options of `stochca convert`."""

    checkpoint: str = _option("", "file of weights in any layout of docs/weights.md")
    to: Literal["timm", "torchvision"] = _option("timm", "layout to write")
    output: str = _option(
        "output/converted.safetensors", "file to write: .safetensors, or for torchvision also .pth"
    )
    model: str | None = _option(
        None, "name of the timm model that the weights are of; not needed for a checkpoint of stochca"
    )
    img_size: int | None = _option(
        None,
        "height and width of the images in pixels, to resample position embeddings; the model's if not given",
    )
    model_kwargs: dict[str, Any] = _option({}, "further arguments of the timm model, as {depth: 2, ...}")
    norm_eps: float | None = _option(None, "epsilon of the layer norms, for weights that do not say it")

    def __post_init__(self) -> None:
        endings = (".safetensors",) if self.to == "timm" else (".safetensors", ".pth")
        if not self.output.endswith(endings):
            raise ValueError(f"--output must end in {' or '.join(endings)}, got {self.output}")
        if self.norm_eps is not None and self.norm_eps <= 0:
            raise ValueError(f"--norm-eps must be positive, got {self.norm_eps}")
        if self.img_size is not None and self.img_size < 1:
            raise ValueError(f"--img-size must be at least 1, got {self.img_size}")
