"""How images are read, and what is said about those that cannot be."""

import numpy as np
import pytest
import torch
from PIL import Image

from stochca.data import Images, make_loader, open_images
from tests.data.helpers import CONFIG, damage, defaults, loader_of
from tests.train.image_folder import write_images


def test_evaluation_images_are_normalised_as_the_config_says(folder):
    images, loader, _ = loader_of(folder, "validation", batch_size=9)
    pixels, _ = next(iter(loader))
    # Class 0 was drawn around grey level 60, class 2 around 180.
    assert pixels[:3].mean().item() == pytest.approx((60 / 255 - 0.5) / 0.5, abs=0.05)
    assert pixels[6:].mean().item() == pytest.approx((180 / 255 - 0.5) / 0.5, abs=0.05)
    assert images.classes == ["ant", "bee", "cow"]


@pytest.mark.parametrize("how", ["truncated", "empty", "text"])
@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("file", ["1.png", "0.jpg"])
def test_a_damaged_image_is_named(tmp_path, how, split, file):
    root = write_images(tmp_path / "images", {"train": 2, "validation": 2})
    bad = damage(root / split / "bee" / file, how)
    images, loader, _ = loader_of(root, split, batch_size=6)
    list(loader)
    with pytest.raises(ValueError, match=f"cannot read image {bad}"):
        images.check_readable()
    assert images.unreadable_names() == [str(bad)]


def test_a_damaged_image_found_by_a_worker_process_is_known_to_the_main_one(tmp_path):
    root = write_images(tmp_path / "images", {"train": 2})
    bad = damage(root / "train" / "cow" / "0.jpg", "truncated")
    images, loader, _ = loader_of(root, "train", batch_size=6, workers=1)
    list(loader)
    assert images.unreadable_names() == [str(bad)]


def test_a_damaged_training_image_is_replaced_and_a_damaged_test_image_has_no_target(tmp_path):
    root = write_images(tmp_path / "images", {"train": 2, "validation": 2})
    damage(root / "train" / "bee" / "1.png", "text")
    damage(root / "validation" / "bee" / "1.png", "text")
    _, loader, _ = loader_of(root, "train", batch_size=6)
    assert sorted(next(iter(loader))[1].tolist()) == [0, 0, 1, 2, 2, 2]
    _, loader, _ = loader_of(root, "validation", batch_size=6)
    assert next(iter(loader))[1].tolist() == [0, 0, 1, -1, 2, 2]


def test_a_dataset_of_damaged_images_alone_is_refused(tmp_path):
    root = write_images(tmp_path / "images", {"train": 1})
    for path in root.rglob("*.jpg"):
        damage(path, "empty")
    _, loader, _ = loader_of(root, "train", batch_size=3)
    with pytest.raises(ValueError, match="none of the 3 images can be read"):
        list(loader)


def test_a_damaged_image_of_a_part_is_named_and_one_outside_of_it_is_not_read(tmp_path):
    root = write_images(tmp_path / "images", {"train": 2})
    damage(root / "train" / "ant" / "0.jpg", "text")
    bad = damage(root / "train" / "cow" / "1.png", "text")
    part = open_images(str(root), "", "train", is_training=True).part([1, 2, 3, 5])
    loader, _ = make_loader(part, CONFIG, 4, **defaults())
    list(loader)
    assert part.unreadable_names() == [str(bad)]
    with pytest.raises(ValueError, match=f"cannot read image {bad}"):
        part.check_readable()


def test_grey_images_of_torchvision_become_rgb():
    images = Images([(Image.new("L", (8, 8), 7), 3)], seed=0, is_training=False)
    images.transform = lambda image: image.getpixel((0, 0))
    assert images[0] == ((7, 7, 7), 3)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_images_of_16_bits_keep_their_brightness(tmp_path, suffix):
    levels = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    (tmp_path / "only").mkdir()
    Image.fromarray(levels).save(tmp_path / "only" / f"deep.{suffix}")
    images = Images([(Image.open(tmp_path / "only" / f"deep.{suffix}"), 0)], seed=0, is_training=False)
    images.transform = np.asarray
    pixels, _ = images[0]
    assert (pixels == (levels // 256)[:, :, None]).all()
    images.check_readable()


def test_a_part_for_evaluation_does_not_change_the_images_for_training(folder):
    images, loader, _ = loader_of(folder, "train", batch_size=18)
    part = images.part(is_training=False)
    make_loader(part, CONFIG, 18, **defaults())
    assert images.is_training
    assert images.transform is not part.transform
    assert torch.equal(next(iter(loader))[1].sort().values, torch.tensor([0] * 6 + [1] * 6 + [2] * 6))
