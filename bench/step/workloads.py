"""What is trained: models, batches and image sizes that people fine-tune with, and their random weights."""

import copy
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import timm
import torch
from torch import Tensor

from stochca.precision import hold_weights
from stochca.vit import TimmViT

NUM_CLASSES = 200
# Standard deviation of what is added to every weight of the source, and of what the target then differs by.
NOISE = 0.02
# What LayerScale multiplies with: a fresh 1e-5 would hide what the blocks compute.
LAYER_SCALE = 0.5


@dataclass(frozen=True)
class Workload:
    """A model, a batch and an image size.

    Args:
        title: For a reader.
        model: timm's name.
        batch: B.
        image_size: Height and width in pixels; None for the model's own.
        kwargs: Go to `timm.create_model`; what they change is named.
    """

    title: str
    model: str
    batch: int
    image_size: int | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As in `vit_base_patch16_224-448px-depth6-B16`: what is the model's own is left out."""
        size = [f"{self.image_size}px"] if self.image_size else []
        changes = [f"{key}{value}" for key, value in self.kwargs.items()]
        return "-".join([self.model, *size, *changes, f"B{self.batch}"])

    def record(self, image_size: int | None = None) -> dict[str, Any]:
        """As in the results, with the image size of the model if it is known."""
        return {"name": self.name, **asdict(self), "image_size": image_size or self.image_size}


@dataclass(frozen=True)
class Setting:
    """A workload on a device: models, images and labels that all providers share.

    Args:
        workload: What it is.
        target: timm's model, in training.
        source: The frozen one, in evaluation.
        images: `[B, 3, H, W]`, float32.
        labels: `[B]`.
    """

    workload: Workload
    target: TimmViT
    source: TimmViT
    images: Tensor
    labels: Tensor

    @classmethod
    def make(cls, workload: Workload, device: torch.device, seed: int = 0) -> "Setting":
        """Draw weights, images and labels.

        The target differs from the source a little, as after some training, so that coins matter.
        """
        options = {"num_classes": NUM_CLASSES, **workload.kwargs}
        if workload.image_size:
            options["img_size"] = workload.image_size
        with torch.random.fork_rng(devices=[]), torch.device(device):
            torch.manual_seed(seed)
            source = timm.create_model(workload.model, pretrained=False, **options)
            target = timm.create_model(workload.model, pretrained=False, **options)
        generator = torch.Generator(device).manual_seed(seed)
        _settle(source, generator)
        target.load_state_dict(source.state_dict())
        _add_noise(target, generator)
        size = source.patch_embed.img_size
        return cls(
            workload,
            target.train(),
            source.eval().requires_grad_(False),
            torch.randn(workload.batch, 3, *size, generator=generator, device=device),
            torch.randint(NUM_CLASSES, (workload.batch,), generator=generator, device=device),
        )

    def with_source_in(self, dtype: torch.dtype) -> "Setting":
        """The same, with a copy of the source whose weights are held in a dtype; itself for float32."""
        if dtype == torch.float32:
            return self
        source = copy.deepcopy(self.source)
        hold_weights(source, "bfloat16" if dtype == torch.bfloat16 else "float16")
        return replace(self, source=source)

    @property
    def image_size(self) -> int:
        """Height in pixels."""
        return self.images.shape[-2]

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return self.images.device


@torch.no_grad()
def _settle(model: TimmViT, generator: torch.Generator) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            parameter.fill_(LAYER_SCALE)
    _add_noise(model, generator)


@torch.no_grad()
def _add_noise(model: TimmViT, generator: torch.Generator) -> None:
    for p in model.parameters():
        p.add_(torch.randn(p.shape, generator=generator, device=p.device), alpha=NOISE)


_SMALL, _BASE, _LARGE = "vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224"
VIT_S = Workload("ViT-S/16 at 224", _SMALL, 128)
VIT_B = Workload("ViT-B/16 at 224", _BASE, 128)
VIT_B_448 = Workload("ViT-B/16 at 448", _BASE, 16, 448)
SMALL_BATCH = Workload("ViT-B/16 at 224", _BASE, 16)
MAIN = (
    VIT_B,
    VIT_B_448,
    *(Workload("ViT-B/16 at 224", _BASE, batch) for batch in (32, 96, 256)),
    Workload("ViT-B/16 at 448", _BASE, 32, 448),
    VIT_S,
    Workload("ViT-L/16 at 224", _LARGE, 64),
    Workload("CLIP ViT-L/14 at 224", "vit_large_patch14_clip_224", 64),
    Workload("DINOv2 ViT-B/14 at 518", "vit_base_patch14_dinov2", 16),
)
OVER_N = tuple(Workload(f"ViT-B/16 at {size}", _BASE, 16, size) for size in (224, 320, 448, 576, 768))
OVER_B = tuple(Workload("ViT-B/16 at 224", _BASE, batch) for batch in (8, 16, 32, 64, 128, 256))
OVER_DEPTH = tuple(
    Workload(f"ViT-B/16 at 224, {depth} blocks", _BASE, 64, kwargs={"depth": depth})
    for depth in (4, 8, 12, 18, 24)
)

VIT_S_CPU = Workload("ViT-S/16 at 224", _SMALL, 8)


def _reduced(batch: int = 4, size: int = 96, depth: int = 6) -> Workload:
    return Workload(f"ViT-S/16 at {size}, {depth} blocks", _SMALL, batch, size, {"depth": depth})


REDUCED = _reduced()
REDUCED_OVER_N = tuple(_reduced(size=size) for size in (64, 96, 160, 224))
REDUCED_OVER_B = tuple(_reduced(batch=batch) for batch in (1, 4, 16))
REDUCED_OVER_DEPTH = tuple(_reduced(depth=depth) for depth in (3, 6, 12))
TINY = Workload(
    "none, 4 narrow blocks",
    "vit_tiny_patch16_224",
    2,
    48,
    {"depth": 4, "embed_dim": 48, "num_heads": 3},
)
