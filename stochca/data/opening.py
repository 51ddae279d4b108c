"""Splits of a dataset, opened by timm's `create_dataset` and checked."""

import os
from pathlib import Path

from timm.data import create_dataset

from stochca.data.folders import contents, is_archive
from stochca.data.images import Images, open_rgb
from stochca.data.streams import STREAMS, ImageStream, open_stream


def open_images(
    data_dir: str | None,
    dataset: str,
    split: str,
    *,
    is_training: bool,
    seed: int = 0,
    download: bool = False,
    num_samples: int | None = None,
) -> Images | ImageStream:
    """Open one split of a dataset.

    Args:
        data_dir: Its root.
        dataset: What timm's `create_dataset` takes; empty for a folder of images, or a tar file (no splits).
        split: Name of the split. Of a folder, the folder in it of that name or of one that timm takes for the
            same; empty for the root itself.
        is_training: Open it for training.
        seed: Of the augmentation.
        download: Download it where timm supports that.
        num_samples: Images of a stream (hfids/..., tfds/..., wds/...) whose own information does not say it.

    Raises:
        FileNotFoundError: The folder, or the split in it, is missing.
        ValueError: No images, no class folders, or a dataset that is not known.
    """
    if dataset.lower().startswith(STREAMS):
        return open_stream(
            data_dir,
            dataset,
            split,
            is_training=is_training,
            seed=seed,
            download=download,
            num_samples=num_samples,
        )
    if dataset.lower() not in ("", "tar") and not dataset.lower().startswith(("torch/", "hfds/")):
        # timm reads the folder whatever the name is.
        raise ValueError(
            "--dataset must be torch/..., hfds/..., hfids/..., tfds/..., wds/..., "
            f"or empty for a folder or a tar file, got {dataset}"
        )
    is_folder = dataset.lower() in ("", "tar", "torch/folder", "torch/image_folder")
    if not data_dir and not dataset.lower().startswith("hfds/"):
        raise ValueError("--data-dir is missing: the folder with the images, or where torchvision keeps them")
    if is_folder:
        _check_root(Path(str(data_dir)))
        _check_links(Path(str(data_dir)))
    try:
        base = create_dataset(
            dataset, root=data_dir, split=split, is_training=is_training, download=download, seed=seed
        )
    except AssertionError as error:
        raise ValueError(f"--dataset {dataset} is not known to timm: {error}") from error
    except ImportError as error:
        raise ValueError(f"--dataset {dataset} needs a package that is not installed: {error}") from error
    except RuntimeError as error:
        # timm for a folder without images, torchvision for data that is not downloaded.
        folder = Path(str(data_dir))
        found = f"; {folder} has: {contents(folder)}" if is_folder and folder.is_dir() else ""
        raise ValueError(f"cannot open split {split!r} of {dataset or data_dir}: {error}{found}") from error
    if hasattr(base, "loader"):  # torchvision's own makes 16 bits white
        base.loader = open_rgb
    images = Images(base, seed=seed, is_training=is_training)
    if not len(images):
        raise ValueError(f"split {split!r} of {dataset or data_dir} is empty")
    if is_folder:
        _check_split(
            Path(str(data_dir)), Path(getattr(base, "reader", base).root), split, images.classes or []
        )
    return images


def check_classes(wanted: list[str] | None, came: list[str] | None, where: str, than: str) -> None:
    """Raise a ValueError where two lists of classes differ, naming the classes that one of them lacks."""
    if wanted == came or wanted is None or came is None:
        return
    missing, extra = sorted({*wanted} - {*came}), sorted({*came} - {*wanted})
    differences = [
        f"{word} {len(names)} ({', '.join(names[:5])}{', ...' * (len(names) > 5)})"
        for word, names in (("lacks", missing), ("adds", extra))
        if names
    ]
    raise ValueError(
        f"{where} has other classes than {than}: {' and '.join(differences) or 'in another order'}"
    )


def number_of_classes(images: Images | ImageStream, num_classes: int | None) -> int:
    """The dataset's number of classes, or the one given; a ValueError if they differ or neither is known."""
    if images.classes is None:
        if num_classes is None:
            raise ValueError("the dataset does not name its classes: give --num-classes")
        return num_classes
    if num_classes not in (None, len(images.classes)):
        raise ValueError(f"--num-classes is {num_classes}, but the dataset has {len(images.classes)} classes")
    return len(images.classes)


def _check_root(data_dir: Path) -> None:
    if not data_dir.exists():
        raise FileNotFoundError(f"--data-dir {data_dir} does not exist")
    if data_dir.is_file() and data_dir.suffix != ".tar":
        what = "an archive: extract it, and give the folder" if is_archive(data_dir) else "a file"
        raise ValueError(f"--data-dir must be a folder or a tar file, {data_dir} is {what}")


def _check_links(data_dir: Path) -> None:
    """Refuse a link to a folder around itself, which timm would follow over and over."""
    for folder, folders, _ in os.walk(data_dir, followlinks=True):
        for name in folders:
            path = os.path.join(folder, name)
            if os.path.islink(path) and _is_within(folder, os.path.realpath(path)):
                raise ValueError(f"{path} is a link to a folder that it lies in")


def _is_within(folder: str, other: str) -> bool:
    return os.path.commonpath([os.path.realpath(folder), other]) == other


def _check_split(data_dir: Path, root: Path, split: str, classes: list[str]) -> None:
    # timm reads all of data_dir where it finds no folder of the split.
    if split and root.samefile(data_dir):
        found = contents(root) if root.is_dir() else "no folders"
        raise FileNotFoundError(f"{data_dir} has no folder for the split {split!r}, it has: {found}")
    if "" in classes:
        raise ValueError(f"{root} must hold one folder per class, but has images that are in no such folder")
