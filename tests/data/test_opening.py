"""Which datasets are opened, and what is said about those that cannot be."""

import shutil
import sys

import pytest
from PIL import Image

from stochca.data import check_classes, make_loader, number_of_classes, open_images
from tests.data.helpers import CONFIG, damage, defaults
from tests.train.image_folder import write_images


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


def test_a_dataset_that_is_not_extracted_is_told(tmp_path):
    archive = tmp_path / "CUB_200_2011.tgz"
    archive.write_bytes(b"")
    with pytest.raises(ValueError, match=r"has: no folders and the archives CUB_200_2011.tgz, which must be"):
        open_images(str(tmp_path), "", "train", is_training=True)
    with pytest.raises(ValueError, match=f"{archive} is an archive: extract it"):
        open_images(str(archive), "", "train", is_training=True)
    write_images(tmp_path, {"train": 1})
    with pytest.raises(FileNotFoundError, match=r"it has: train and the archives CUB_200_2011.tgz"):
        open_images(str(tmp_path), "", "validation", is_training=False)


def test_a_file_that_is_no_dataset_is_refused(tmp_path):
    (tmp_path / "list.txt").write_text("")
    with pytest.raises(ValueError, match=r"must be a folder or a tar file, .*list\.txt is a file"):
        open_images(str(tmp_path / "list.txt"), "", "train", is_training=True)


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
    loader, _ = make_loader(images, CONFIG, 6, **defaults())
    list(loader)
    assert images.classes == ["ant", "bee", "cow"]
    with pytest.raises(ValueError, match=f"cannot read image {bad}"):
        images.check_readable()


def test_a_tar_file_is_read_and_has_no_splits(folder, tmp_path):
    path = shutil.make_archive(str(tmp_path / "images"), "tar", folder / "validation")
    images = open_images(path, "", "", is_training=False)
    loader, _ = make_loader(images, CONFIG, 9, **defaults())
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


def test_what_timm_does_not_know_is_refused_by_its_name(tmp_path):
    with pytest.raises(ValueError, match="--dataset torch/nothing is not known to timm: Unknown"):
        open_images(str(tmp_path), "torch/nothing", "train", is_training=True)
