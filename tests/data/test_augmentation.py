"""How training images are cropped and changed, and evaluation images cropped."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation, ResizeKeepRatio
from torchvision import transforms

from stochca.data import Images, make_loader
from tests.data.helpers import CONFIG, defaults

SQUASH_448 = {**CONFIG, "input_size": (3, 448, 448), "crop_pct": 448 / 550, "crop_mode": "squash"}


def transform_of(config=CONFIG, is_training=True, **augmentation):
    images = Images([(Image.new("RGB", (8, 8)), 0)], seed=0, is_training=is_training)
    make_loader(images, config, 1, **defaults(), **augmentation)
    return images.transform.transforms


def test_training_squashes_to_550_pixels_crops_448_at_random_and_flips():
    squash, crop, flip, *_ = transform_of(SQUASH_448, train_crop_mode="squash", color_jitter=None)
    assert (type(squash), squash.size) == (transforms.Resize, (550, 550))
    assert squash.interpolation == transforms.InterpolationMode.BICUBIC
    assert (type(crop), crop.size) == (transforms.RandomCrop, (448, 448))
    assert type(flip) is transforms.RandomHorizontalFlip


def test_evaluation_squashes_to_550_pixels_and_crops_448_in_the_centre():
    squash, crop, *_ = transform_of(SQUASH_448, is_training=False)
    assert (type(squash), squash.size) == (transforms.Resize, (550, 550))
    assert (type(crop), crop.size) == (transforms.CenterCrop, (448, 448))


@pytest.mark.parametrize("crop_pct", [1.0, 0.9, 0.875, 0.8])
def test_training_and_evaluation_squash_to_the_same_size(crop_pct):
    config = {**CONFIG, "crop_pct": crop_pct, "crop_mode": "squash"}
    training, evaluation = transform_of(config, train_crop_mode="squash"), transform_of(config, False)
    assert training[0].size == evaluation[0].size


def test_a_squashed_image_is_cropped_elsewhere_in_every_epoch():
    ramp = Image.fromarray(np.arange(64, dtype=np.uint8)[None, :].repeat(48, 0)).convert("RGB")
    images = Images([(ramp, 0)], seed=0, is_training=True)
    config = {**CONFIG, "input_size": (3, 24, 24), "crop_pct": 0.5}
    loader, sampler = make_loader(
        images, config, 1, **defaults(), train_crop_mode="squash", color_jitter=None, hflip=0.0
    )
    columns = set()
    for sampler.epoch in range(8):
        (pixels, _) = next(iter(loader))
        assert pixels.shape == (1, 3, 24, 24)
        columns.add(round(pixels[0, 0, 0, 0].item(), 3))
    assert len(columns) > 3


@pytest.mark.parametrize(
    ("mode", "first"),
    [(None, RandomResizedCropAndInterpolation), ("rrc", RandomResizedCropAndInterpolation)]
    + [(mode, ResizeKeepRatio) for mode in ("rkrc", "rkrr")],
)
def test_the_crops_of_timm_are_offered(mode, first):
    assert type(transform_of(train_crop_mode=mode)[0]) is first


def test_without_augmentation_nothing_is_cropped_at_random():
    resize, crop, *_ = transform_of(no_aug=True, train_crop_mode="squash")
    assert (type(resize), type(crop)) == (transforms.Resize, transforms.CenterCrop)


def test_colours_jitter_by_one_number_or_by_three_or_four():
    jitters = []
    for strength in (0.3, [0.3, 0.2, 0.1], [0.3, 0.3, 0.3, 0.2]):
        (jitter,) = (t for t in transform_of(color_jitter=strength) if isinstance(t, transforms.ColorJitter))
        jitters.append((jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue))
    assert jitters[0] == ((0.7, 1.3), (0.7, 1.3), (0.7, 1.3), None)
    assert jitters[1] == ((0.7, 1.3), (0.8, 1.2), (0.9, 1.1), None)
    assert jitters[2] == ((0.7, 1.3), (0.7, 1.3), (0.7, 1.3), (-0.2, 0.2))


def test_strengths_of_another_number_are_refused():
    with pytest.raises(ValueError, match=r"--color-jitter must be one number, .*, got \[0.3, 0.3\]"):
        transform_of(color_jitter=[0.3, 0.3])


def test_an_image_loses_its_colours_with_the_probability_given():
    images = Images([(Image.new("RGB", (32, 32), (200, 100, 50)), 0)], seed=0, is_training=True)
    loader, sampler = make_loader(images, CONFIG, 1, **defaults(), color_jitter=None, grayscale_prob=0.5)
    grey = 0
    for sampler.epoch in range(40):
        ((red, green, _),) = next(iter(loader))[0].mean((2, 3)).tolist()
        grey += red == green
    assert 10 <= grey <= 30


def test_random_erasing_changes_images():
    images = Images([(Image.new("RGB", (32, 32), (200, 100, 50)), 0)], seed=0, is_training=True)
    loader, _ = make_loader(images, CONFIG, 1, **defaults(), color_jitter=None, reprob=1.0)
    (pixels, _) = next(iter(loader))
    assert torch.unique(pixels).numel() == 4  # three channels, and the erased rectangle
