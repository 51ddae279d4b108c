"""How training images are cropped and changed: timm's transforms, and the crop of a squashed image."""

from typing import Any

from timm.data import create_transform
from torchvision import transforms


def check_auto_augment(policy: str | None) -> None:
    """Raise a ValueError for a policy of `--aa` that timm does not know."""
    try:
        create_transform(is_training=True, auto_augment=policy)
    except (AssertionError, ValueError) as error:
        raise ValueError(f"--aa {policy} is not a policy of timm: {error}") from error


def check_color_jitter(strength: float | list[float] | tuple[float, ...] | None) -> None:
    """Raise a ValueError for strengths of `--color-jitter` that are not one number, or three or four."""
    if isinstance(strength, list | tuple) and len(strength) not in (3, 4):
        raise ValueError(
            "--color-jitter must be one number, or one each for brightness, contrast, saturation and, where "
            f"wanted, hue, got {strength}"
        )


def squash_and_crop(transform: transforms.Compose, data_config: dict[str, Any]) -> None:
    """Replace the random resized crop of timm's training transform, in place.

    The image is resized to the square that evaluation with `crop_mode="squash"` resizes to, and a random
    square of the input's size is cropped from it.

    Args:
        transform: Of timm's `create_transform`, in training.
        data_config: `input_size`, `interpolation` and `crop_pct` as of timm's `resolve_data_config`.
    """
    names = ("input_size", "interpolation", "crop_pct")
    squash, *_ = create_transform(
        crop_mode="squash", **{name: data_config[name] for name in names}
    ).transforms
    crop = transforms.RandomCrop(data_config["input_size"][-2:])
    transform.transforms[:1] = [squash, crop]
