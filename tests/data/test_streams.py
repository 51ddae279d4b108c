"""Datasets that are read from their beginning: what each process sees of them, and when."""

import io
import itertools
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stochca.data import ImageStream, make_loader, number_of_classes, open_images, subset_per_class
from tests.data.helpers import CONFIG, assert_same, defaults, read
from tests.train.image_folder import write_images

# WebDataset leaves files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

SHARDS, PER_SHARD = 6, 4
TRAIN = f"set-train-{{0..{SHARDS - 1}}}.tar|{SHARDS * PER_SHARD}"


def add(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def write_shards(root: Path, bad=None) -> Path:
    """Shards of images whose class is their number; the one of the number `bad` is no image."""
    root.mkdir()
    for shard in range(SHARDS):
        with tarfile.open(root / f"set-train-{shard}.tar", "w") as tar:
            for number in range(shard * PER_SHARD, (shard + 1) * PER_SHARD):
                file = io.BytesIO()
                Image.new("RGB", (40, 36), (9 * number, 50, 90)).save(file, "png")
                add(tar, f"{number:04}.png", b"no image" if number == bad else file.getvalue())
                add(tar, f"{number:04}.cls", str(number).encode())
    return root


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """24 images in six tar files."""
    return write_shards(tmp_path_factory.mktemp("streams") / "shards")


def open_shards(root, is_training=True, seed=0, split=TRAIN):
    return open_images(str(root), "wds/set", split, is_training=is_training, seed=seed)


def loader_of(root, batch_size=4, is_training=True, seed=0, **how):
    images = open_shards(root, is_training, seed)
    return images, *make_loader(images, CONFIG, batch_size, **{**defaults(), **how})


def targets_of(batches):
    return [target.tolist() for _, target in batches]


def numbers_of(batches):
    return sorted(itertools.chain.from_iterable(targets_of(batches)))


def test_an_epoch_of_training_has_each_image_once_and_pixels_of_its_class(shards):
    images, loader, order = loader_of(shards, color_jitter=None)
    batches = read(loader, order)
    assert isinstance(images, ImageStream)
    assert (len(loader), len(images)) == (6, 24)
    assert numbers_of(batches) == list(range(24))
    for pixels, target in batches:
        red = (pixels[:, 0].mean((1, 2)) * 0.5 + 0.5) * 255
        assert torch.allclose(red, 9.0 * target, atol=1)


@pytest.mark.parametrize("workers", [0, 2])
def test_order_and_augmentation_depend_on_seed_and_epoch_alone(shards, workers):
    _, loader, order = loader_of(shards, workers=workers)
    first, second, again = (read(loader, order, epoch) for epoch in (0, 1, 0))
    assert_same(first, again)
    assert targets_of(first) != targets_of(second)
    _, loader, order = loader_of(shards, workers=workers)
    assert_same(second, read(loader, order, epoch=1))
    _, loader, order = loader_of(shards, workers=workers, seed=1)
    assert targets_of(first) != targets_of(read(loader, order))


@pytest.mark.parametrize("workers", [0, 1])
def test_even_one_shard_is_shuffled_anew_in_every_epoch(shards, workers):
    images = open_shards(shards, split="set-train-0.tar|4")
    loader, order = make_loader(images, CONFIG, 4, **{**defaults(), "workers": workers})
    orders = {tuple(read(loader, order, epoch)[0][1].tolist()) for epoch in range(5)}
    assert len(orders) > 1


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_that_starts_in_the_middle_is_the_rest_of_the_whole_one(shards, workers):
    _, loader, order = loader_of(shards, workers=workers)
    whole = read(loader, order, epoch=1)
    _, loader, order = loader_of(shards, workers=workers)
    rest = read(loader, order, epoch=1, start=2 * order.global_batch_size)
    assert len(loader) == len(rest) == 4
    assert_same(whole[2:], rest)


def test_processes_read_shards_of_their_own_and_equally_many_batches(shards):
    seen = []
    for rank in range(2):
        _, loader, order = loader_of(shards, batch_size=3, rank=rank, world_size=2, workers=rank)
        batches = read(loader, order)
        assert order.global_batch_size == 6
        assert len(loader) == len(batches) == 4
        seen.append(numbers_of(batches))
    assert sorted(seen[0] + seen[1]) == list(range(24))


def test_all_processes_have_equally_many_batches_of_shards_that_do_not_divide(shards):
    for rank in range(4):
        _, loader, order = loader_of(shards, batch_size=4, rank=rank, world_size=4)
        assert len(loader) == len(read(loader, order)) == 2


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 4, 7])
def test_processes_evaluate_every_image_once_and_some_may_have_none(shards, world_size, workers):
    seen = []
    for rank in range(world_size):
        _, loader, order = loader_of(
            shards, batch_size=3, is_training=False, rank=rank, world_size=world_size, workers=workers
        )
        assert order is None
        seen += numbers_of(list(loader))
    assert sorted(seen) == list(range(24))


def test_loading_leaves_the_global_generators_alone(shards):
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    _, loader, order = loader_of(shards)
    read(loader, order)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()


def test_more_readers_than_shards_are_refused(shards):
    with pytest.raises(ValueError, match="has 6 shards, fewer than the 8 that would read them"):
        loader_of(shards, world_size=4, workers=2)


def test_the_number_of_classes_must_be_given(shards):
    images = open_shards(shards)
    assert images.classes is None
    assert number_of_classes(images, 24) == 24
    with pytest.raises(ValueError, match="give --num-classes"):
        number_of_classes(images, None)


def test_a_stream_has_no_subset(shards):
    with pytest.raises(ValueError, match="read by index; this one is a stream"):
        subset_per_class(open_shards(shards), 0.5, seed=0)


def test_the_length_comes_from_the_split_its_information_or_an_option(shards, tmp_path):
    assert len(open_shards(shards)) == 24
    unknown = f"set-train-{{0..{SHARDS - 1}}}.tar"
    with pytest.raises(ValueError, match="num_samples not specified"):
        open_shards(shards, split=unknown)
    given = open_images(str(shards), "wds/set", unknown, is_training=True, num_samples=12)
    assert len(given) == 12
    root = write_shards(tmp_path / "shards")
    names = [f"set-train-{shard}.tar" for shard in range(SHARDS)]
    split = {"name": "train", "num_samples": 24, "filenames": names, "shard_lengths": [PER_SHARD] * SHARDS}
    (root / "_info.json").write_text(json.dumps({"splits": {"train": split}}))
    assert len(open_shards(root, split="train")) == 24
    with pytest.raises(ValueError, match=r"cannot open split 'validation' of wds/set: .* not found"):
        open_shards(root, split="validation")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("is_training", [True, False])
def test_a_damaged_image_is_left_out_and_counted(tmp_path, workers, is_training):
    root = write_shards(tmp_path / "shards", bad=7)
    images, loader, order = loader_of(root, is_training=is_training, workers=workers)
    images.check_readable()
    seen = numbers_of(read(loader, order) if is_training else list(loader))
    assert 7 not in seen
    assert len(seen) == (24 if is_training else 23)
    count = images.skipped.value
    assert count == 1 if not is_training else count >= 1
    assert images.unreadable_names() == [f"{count} images of split {TRAIN!r} of wds/set"]
    with pytest.raises(ValueError, match=f"cannot read {count} images of split .* --skip-corrupt"):
        images.check_readable()


def test_pickles_beside_an_image_are_not_read(tmp_path):
    marker = tmp_path / "ran"
    root = write_shards(tmp_path / "shards")
    with tarfile.open(root / "set-train-0.tar", "a") as tar:
        for ending in ("pyd", "pickle", "pth"):
            add(tar, f"{PER_SHARD - 1:04}.{ending}", b"cposix\nsystem\n(S'touch " + bytes(marker) + b"'\ntR.")
    _, loader, _ = loader_of(root, is_training=False)
    assert numbers_of(list(loader)) == list(range(24))
    assert not marker.exists()


def test_missing_shards_and_packages_are_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        open_shards(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="--data-dir is missing"):
        open_images(None, "wds/set", TRAIN, is_training=True)
    for package, reader, name in (
        ("tensorflow_datasets", "reader_tfds", "tfds/cifar10"),
        ("datasets", "reader_hfids", "hfids/cifar10"),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.delitem(sys.modules, f"timm.data.readers.{reader}", raising=False)
        with pytest.raises(ValueError, match=f"--dataset {name} needs a package that is not installed"):
            open_images(None, name, "train", is_training=True)
    monkeypatch.setattr("timm.data.readers.reader_wds.wds", None)
    with pytest.raises(ValueError, match="webdataset"):
        open_shards(tmp_path)


@pytest.fixture(scope="session")
def hugging_face(tmp_path_factory):
    """A folder that the package `datasets` takes for one: 18 training images of three classes."""
    return write_images(tmp_path_factory.mktemp("hf") / "images", {"train": 6, "validation": 3})


def test_hugging_face_datasets_are_streamed(hugging_face):
    images = open_images(None, f"hfids/{hugging_face}", "train", is_training=True, num_samples=18)
    loader, order = make_loader(images, CONFIG, 6, **defaults())
    first, second = read(loader, order), read(loader, order, epoch=1)
    assert images.classes is None  # the package tells them of what was prepared alone
    assert numbers_of(first) == [0] * 6 + [1] * 6 + [2] * 6
    assert targets_of(first) != targets_of(second)
    assert_same(second[1:], read(loader, order, epoch=1, start=6))
    seen = []
    for rank in range(2):
        images = open_images(None, f"hfids/{hugging_face}", "validation", is_training=False, num_samples=9)
        loader, _ = make_loader(images, CONFIG, 2, **defaults(), rank=rank, world_size=2)
        seen += numbers_of(list(loader))
    assert sorted(seen) == [0] * 3 + [1] * 3 + [2] * 3


def test_prepared_hugging_face_datasets_tell_classes_and_length(hugging_face, tmp_path):
    images = open_images(str(tmp_path), f"hfids/{hugging_face}", "train", is_training=True, download=True)
    assert images.classes == ["ant", "bee", "cow"]
    assert len(images) == 18
    loader, order = make_loader(images, CONFIG, 6, **defaults())
    assert numbers_of(read(loader, order)) == [0] * 6 + [1] * 6 + [2] * 6


def test_hugging_face_datasets_that_are_not_streamed_have_subsets(hugging_face, tmp_path):
    images = open_images(str(tmp_path), f"hfds/{hugging_face}", "train", is_training=True)
    part = subset_per_class(images, 0.5, seed=0)
    loader, _ = make_loader(part, CONFIG, 9, **defaults())
    assert next(iter(loader))[1].bincount().tolist() == [3, 3, 3]
    part.check_readable()


def test_a_stream_that_does_not_say_its_length_is_refused(hugging_face):
    with pytest.raises(ValueError, match="Dataset length is unknown"):
        open_images(None, f"hfids/{hugging_face}", "train", is_training=True)


def test_a_damaged_image_of_hugging_face_stops_the_run_by_name(tmp_path):
    root = write_images(tmp_path / "images", {"train": 2})
    (root / "train" / "bee" / "1.png").write_bytes(b"no image")
    images = open_images(None, f"hfids/{root}", "train", is_training=True, num_samples=6)
    loader, _ = make_loader(images, CONFIG, 6, **defaults())
    with pytest.raises(ValueError, match=f"cannot read an image of split 'train' of hfids/{root}"):
        list(loader)
