"""A share of the images of each class."""

import shutil

import pytest
import torch
from PIL import Image
from torchvision.datasets import FakeData

from stochca.data import Images, make_loader, open_images, subset_per_class
from tests.data.helpers import CONFIG, defaults
from tests.train.image_folder import write_images


def names_of(images):
    return {images.name(index) for index in range(len(images))}


@pytest.fixture
def uneven(tmp_path):
    """Classes of 7, 4 and 20 images."""
    for name, count in (("ant", 7), ("bee", 4), ("cow", 20)):
        write_images(tmp_path, {"train": count}, [name])
    return open_images(str(tmp_path), "", "train", is_training=True)


@pytest.mark.parametrize(("share", "kept"), [(0.5, [3, 2, 10]), (0.3, [2, 1, 6]), (0.99, [6, 3, 19])])
def test_each_class_keeps_its_share_rounded_down(uneven, share, kept):
    part = subset_per_class(uneven, share, seed=0)
    assert len(part) == sum(kept)
    assert part.classes == ["ant", "bee", "cow"]
    assert torch.bincount(torch.tensor(part.targets())).tolist() == kept


def test_a_loader_reads_the_kept_images_with_their_targets(uneven):
    part = subset_per_class(uneven, 0.5, seed=0)
    loader, _ = make_loader(part, CONFIG, 15, **defaults())
    assert next(iter(loader))[1].bincount().tolist() == [3, 2, 10]
    for index in range(len(part)):
        _, target = part[index]
        assert part.classes[target] in part.name(index)


def test_the_choice_depends_on_the_seed_and_grows_with_the_share(uneven):
    chosen = names_of(subset_per_class(uneven, 0.5, seed=0))
    assert chosen == names_of(subset_per_class(uneven, 0.5, seed=0))
    assert chosen != names_of(subset_per_class(uneven, 0.5, seed=1))
    assert names_of(subset_per_class(uneven, 0.3, seed=0)) < chosen
    assert names_of(subset_per_class(uneven, 1.0, seed=0)) == names_of(uneven)


def test_a_class_left_without_images_is_named_with_its_count(uneven):
    with pytest.raises(ValueError, match=r"0.15 leaves no image of 1 of 3 classes: bee \(4 images\)"):
        subset_per_class(uneven, 0.15, seed=0)


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5])
def test_a_share_out_of_range_is_refused(uneven, share):
    with pytest.raises(ValueError, match=f"above 0 and at most 1, got {share}"):
        subset_per_class(uneven, share, seed=0)


def test_no_image_is_read_to_choose(uneven, monkeypatch):
    monkeypatch.setattr(Image, "open", None)
    assert len(subset_per_class(uneven, 0.5, seed=0)) == 15


def test_a_tar_file_and_a_torchvision_dataset_have_subsets(folder, tmp_path):
    path = shutil.make_archive(str(tmp_path / "images"), "tar", folder / "train")
    for where, dataset in ((path, ""), (str(folder / "train"), "torch/image_folder")):
        part = subset_per_class(open_images(where, dataset, "", is_training=True), 0.5, seed=0)
        assert part.targets().tolist() == [0] * 3 + [1] * 3 + [2] * 3


def test_a_dataset_that_does_not_tell_targets_is_refused():
    images = Images(FakeData(4), seed=0, is_training=True)
    with pytest.raises(ValueError, match="without reading all of them"):
        subset_per_class(images, 0.5, seed=0)
