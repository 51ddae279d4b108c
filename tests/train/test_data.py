"""Which images a run sees, in which order, and what it says about those that it cannot."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from image_folder import write_images
from PIL import Image

from stochca.data import Images, check_classes, make_loader, number_of_classes, open_images

CONFIG = {
    "input_size": (3, 32, 32),
    "interpolation": "bicubic",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "crop_pct": 0.9,
    "crop_mode": "center",
}


def loader_of(root, split, batch_size=4, workers=0, seed=0, **augmentation):
    images = open_images(str(root), "", split, is_training=split == "train", seed=seed)
    loader, sampler = make_loader(
        images, CONFIG, batch_size, device=torch.device("cpu"), workers=workers, **augmentation
    )
    return images, loader, sampler


def batches_of(root, epoch=0, start=0, **kwargs):
    _, loader, sampler = loader_of(root, "train", **kwargs)
    sampler.epoch, sampler.start = epoch, start
    return [(images.clone(), target.clone()) for images, target in loader]


def damage(path: Path, how: str) -> Path:
    content = path.read_bytes()
    path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "text": b"no image"}[how])
    return path


@pytest.mark.parametrize("augmentation", [{}, {"reprob": 0.9, "auto_augment": "rand-m9-mstd0.5"}])
def test_images_and_augmentation_do_not_depend_on_the_number_of_workers(folder, augmentation):
    alone, shared = batches_of(folder, **augmentation), batches_of(folder, workers=1, **augmentation)
    for (images, target), (other_images, other_target) in zip(alone, shared, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(target, other_target)


def test_an_epoch_that_starts_in_the_middle_is_the_rest_of_the_whole_one(folder):
    whole, rest = batches_of(folder, epoch=1), batches_of(folder, epoch=1, start=8)
    assert len(rest) == len(whole) - 2
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(whole[2:], rest, strict=True))


def test_an_image_is_augmented_anew_in_every_epoch_and_for_every_seed_but_else_the_same(folder):
    images, _, _ = loader_of(folder, "train")
    other, _, _ = loader_of(folder, "train", seed=1)
    first, again, next_epoch, other_seed = images[5][0], images[5][0], images[18 + 5][0], other[5][0]
    assert (first == again).all()
    assert (first != next_epoch).any()
    assert (first != other_seed).any()


def test_epochs_and_seeds_differ_in_order(folder):
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        _, _, sampler = loader_of(folder, "train", seed=seed)
        sampler.epoch = epoch
        orders.append([position % 18 for position in sampler])
    assert orders[0] != orders[1]
    assert orders[0] != orders[2]


def test_loading_leaves_the_global_generators_alone(folder):
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    batches_of(folder)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()


def test_each_image_is_seen_once_per_epoch(folder):
    _, _, sampler = loader_of(folder, "train")
    for epoch in range(2):
        sampler.epoch = epoch
        assert sorted(position - epoch * 18 for position in sampler) == list(range(18))


def test_evaluation_sees_every_image_once_the_last_partial_batch_included(folder):
    _, loader, _ = loader_of(folder, "validation")
    assert [len(target) for _, target in loader] == [4, 4, 1]
    assert torch.cat([target for _, target in loader]).tolist() == [0] * 3 + [1] * 3 + [2] * 3


def test_evaluation_images_are_normalised_as_the_config_says(folder):
    images, loader, _ = loader_of(folder, "validation", batch_size=9)
    pixels, _ = next(iter(loader))
    # Class 0 was drawn around grey level 60, class 2 around 180.
    assert pixels[:3].mean().item() == pytest.approx((60 / 255 - 0.5) / 0.5, abs=0.05)
    assert pixels[6:].mean().item() == pytest.approx((180 / 255 - 0.5) / 0.5, abs=0.05)
    assert images.classes == ["ant", "bee", "cow"]


@pytest.mark.parametrize("how", ["truncated", "empty", "text"])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_damaged_image_is_named(tmp_path, how, split):
    root = write_images(tmp_path / "images", {"train": 2, "validation": 2})
    bad = damage(root / split / "bee" / "1.png", how)
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


@pytest.mark.parametrize("name", ["val", "valid", "validation", "eval"])
def test_the_validation_folder_may_have_any_of_its_usual_names(tmp_path, name):
    root = write_images(tmp_path / "images", {"train": 1, name: 2})
    assert len(open_images(str(root), "", "validation", is_training=False)) == 6


def test_a_missing_split_is_refused_where_timm_would_read_the_whole_folder(tmp_path):
    root = write_images(tmp_path / "images", {"train": 1, "held_out": 1})
    with pytest.raises(
        FileNotFoundError, match="no folder for the split 'validation', it has: held_out, train"
    ):
        open_images(str(root), "", "validation", is_training=False)


def test_grey_images_of_torchvision_become_rgb():
    images = Images([(Image.new("L", (8, 8), 7), 3)], seed=0, is_training=False)
    images.transform = lambda image: image.getpixel((0, 0))
    assert images[0] == ((7, 7, 7), 3)


def test_torchvision_would_take_the_splits_for_classes_and_is_refused(tmp_path):
    root = write_images(tmp_path / "images", {"train": 1, "held_out": 1})
    with pytest.raises(FileNotFoundError, match="no folder for the split 'validation'"):
        open_images(str(root), "torch/image_folder", "validation", is_training=False)


def test_an_empty_split_name_reads_the_folder_itself(folder):
    images = open_images(str(folder / "validation"), "", "", is_training=False)
    assert images.classes == ["ant", "bee", "cow"]


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        open_images(str(tmp_path / "nowhere"), "", "train", is_training=True)
    for dataset in ("", "torch/cifar10"):
        with pytest.raises(ValueError, match="--data-dir is missing"):
            open_images(None, dataset, "train", is_training=True)
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match="Found 0 images"):
        open_images(str(tmp_path), "", "train", is_training=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "stray.png")
    with pytest.raises(ValueError, match="one folder per class"):
        open_images(str(tmp_path), "", "train", is_training=True)


@pytest.mark.parametrize("dataset", ["wds/shards", "tfds/cifar10", "hfids/cifar10"])
def test_streams_are_refused(dataset):
    with pytest.raises(ValueError, match=f"{dataset} is a stream"):
        open_images("anywhere", dataset, "train", is_training=True)


@pytest.mark.parametrize("dataset", ["foo/bar", "image_folder", "torch", "tor/cifar10"])
def test_a_name_that_timm_would_ignore_is_refused(folder, dataset):
    with pytest.raises(ValueError, match=f"--dataset must be .*, got {dataset}"):
        open_images(str(folder), dataset, "train", is_training=True)


def test_a_missing_package_of_a_dataset_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delitem(sys.modules, "timm.data.readers.reader_hfds", raising=False)
    with pytest.raises(ValueError, match=r"--dataset hfds/some needs a package .* datasets"):
        open_images(None, "hfds/some", "train", is_training=True)


def test_an_unknown_torchvision_dataset_is_named(folder):
    with pytest.raises(ValueError, match="torch/nothing is not known"):
        open_images(str(folder), "torch/nothing", "train", is_training=True)


def test_a_torchvision_dataset_has_names_order_and_damaged_images_found(tmp_path):
    root = write_images(tmp_path / "images", {"train": 2})
    bad = damage(root / "train" / "ant" / "1.png", "text")
    images = open_images(str(root), "torch/image_folder", "train", is_training=True)
    loader, _ = make_loader(images, CONFIG, 6, device=torch.device("cpu"), workers=0)
    list(loader)
    assert images.classes == ["ant", "bee", "cow"]
    with pytest.raises(ValueError, match=f"cannot read image {bad}"):
        images.check_readable()


def test_a_tar_file_is_read_and_has_no_splits(folder, tmp_path):
    path = shutil.make_archive(str(tmp_path / "images"), "tar", folder / "validation")
    images = open_images(path, "", "", is_training=False)
    loader, _ = make_loader(images, CONFIG, 9, device=torch.device("cpu"), workers=0)
    assert next(iter(loader))[1].tolist() == [0] * 3 + [1] * 3 + [2] * 3
    images.check_readable()
    images.base.reader.tar_state.tf.close()
    with pytest.raises(FileNotFoundError, match="no folder for the split 'train'"):
        open_images(path, "", "train", is_training=True)


def test_differing_classes_are_named():
    with pytest.raises(
        ValueError, match=r"'val' has other classes than 'train': lacks 1 \(b\) and adds 1 \(c\)"
    ):
        check_classes(["a", "b"], ["a", "c"], "'val'", "'train'")
    with pytest.raises(ValueError, match="in another order"):
        check_classes(["a", "b"], ["b", "a"], "'val'", "'train'")


def test_the_number_of_classes_must_fit(folder):
    images = open_images(str(folder), "", "train", is_training=True)
    assert number_of_classes(images, None) == number_of_classes(images, 3) == 3
    with pytest.raises(ValueError, match="--num-classes is 4, but the dataset has 3 classes"):
        number_of_classes(images, 4)
    images.classes = None
    with pytest.raises(ValueError, match="give --num-classes"):
        number_of_classes(images, None)


def test_a_batch_larger_than_the_dataset_is_refused(folder):
    with pytest.raises(ValueError, match="--batch-size is 19, but there are only 18"):
        loader_of(folder, "train", batch_size=19)
