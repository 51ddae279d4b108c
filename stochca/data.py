"""Images and their loaders, on timm's datasets, readers, transforms and loaders.

The order of the images and the augmentation of each depend on (seed, epoch, image) alone: not on the number
of workers, nor on where a run was interrupted.
"""

import contextlib
import random
import signal
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset, create_dataset, create_loader, create_transform
from torch.utils.data import Dataset, Sampler

# What Pillow raises on a damaged file.
_UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

_STREAMS = ("hfids/", "tfds/", "wds/")

NO_TARGET = -1


class Images(Dataset):
    """A timm or torchvision dataset whose damaged images are found, not silently replaced.

    An image that cannot be read is marked in `unreadable`, in memory that worker processes share. Its place
    is taken by the next readable one in training, by a blank one with target `NO_TARGET` in evaluation.
    Whoever reads the batches asks `check_readable` whether to go on.

    Args:
        base: The dataset, without a transform.
        seed: Of the augmentation.
        is_training: See above.

    Attributes:
        transform: Set by timm's `create_loader`.
        classes: Names of the classes in order; None if the dataset has no names.
        unreadable: Bool tensor `[len(self)]`.
    """

    def __init__(self, base: Any, *, seed: int, is_training: bool) -> None:
        self.base = base
        self.seed = seed
        self.is_training = is_training
        self.transform: Any = None
        self.classes = _classes(base)
        self.unreadable = torch.zeros(len(base), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, position: int) -> tuple[Any, int]:
        """Sample at `epoch * len(self) + index`: the epoch decides how the image is augmented."""
        epoch, index = divmod(position, len(self))
        image, target = self._decode(index)
        with _generators_seeded(self.seed, epoch, index):
            return self.transform(image), target

    def name(self, index: int) -> str:
        """Path of an image, or what its dataset calls it."""
        if isinstance(self.base, ImageDataset):
            return self.base.filename(index, absolute=True)
        samples = getattr(self.base, "samples", None)
        return samples[index][0] if samples else f"sample {index}"

    def check_readable(self) -> None:
        """Raise a ValueError that names the first image that could not be read, if there is one."""
        if self.unreadable.any():
            index = int(self.unreadable.nonzero()[0])
            reason = "it was readable at a second attempt"
            try:
                self._read(index)
            except _UNREADABLE as error:
                reason = str(error) or type(error).__name__
            raise ValueError(
                f"cannot read image {self.name(index)}: {reason}. --skip-corrupt leaves such images out"
            )

    def unreadable_names(self) -> list[str]:
        """Names of the images that could not be read so far."""
        return [self.name(index) for index in self.unreadable.nonzero().flatten().tolist()]

    def _decode(self, index: int) -> tuple[Image.Image, int]:
        for candidate in range(index, index + len(self)):
            candidate %= len(self)
            try:
                return self._read(candidate)
            except _UNREADABLE:
                self.unreadable[candidate] = True
                if not self.is_training:
                    return Image.new("RGB", (32, 32)), NO_TARGET
        raise ValueError(f"none of the {len(self)} images can be read, the first is {self.name(0)}")

    def _read(self, index: int) -> tuple[Image.Image, int]:
        if not isinstance(self.base, ImageDataset):
            image, target = self.base[index]
            return image.convert("RGB"), target
        # Its own __getitem__ would go on to the next image after an error.
        file, target, *_ = self.base.reader[index]
        with file, Image.open(file) as image:
            return image.convert(self.base.input_img_mode), target


class EpochSampler(Sampler[int]):
    """Positions of one epoch in an order that depends on (seed, epoch) alone.

    Args:
        length: Images in the dataset.
        seed: Of the order.

    Attributes:
        epoch: The epoch that the next iteration runs.
        start: How many of its images the next iteration leaves out, to resume in the middle of it.
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.seed = seed
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        return self.length - self.start

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)
        yield from (self.epoch * self.length + order[self.start :]).tolist()


def open_images(
    data_dir: str | None,
    dataset: str,
    split: str,
    *,
    is_training: bool,
    seed: int = 0,
    download: bool = False,
) -> Images:
    """Open one split of a dataset.

    Args:
        data_dir: Its root.
        dataset: What timm's `create_dataset` takes; empty for a folder of images, or a tar file (no splits).
        split: Name of the split. Of a folder, the folder in it of that name or of one that timm takes for the
            same; empty for the root itself.
        is_training: Open it for training.
        seed: Of the augmentation.
        download: Download it where timm supports that.

    Raises:
        FileNotFoundError: The folder, or the split in it, is missing.
        ValueError: No images, no class folders, or a dataset that is not known or cannot be read by index.
    """
    if dataset.lower().startswith(_STREAMS):
        raise ValueError(
            f"--dataset {dataset} is a stream; a run that can be resumed at any step needs a dataset that is "
            "read by index: an image folder, a tar file, torch/... or hfds/..."
        )
    if dataset.lower() not in ("", "tar") and not dataset.lower().startswith(("torch/", "hfds/")):
        # timm reads the folder whatever the name is.
        raise ValueError(
            f"--dataset must be torch/..., hfds/..., or empty for a folder or a tar file, got {dataset}"
        )
    is_folder = dataset.lower() in ("", "tar", "torch/folder", "torch/image_folder")
    if not data_dir and not dataset.lower().startswith("hfds/"):
        raise ValueError("--data-dir is missing: the folder with the images, or where torchvision keeps them")
    if is_folder and not Path(str(data_dir)).exists():
        raise FileNotFoundError(f"--data-dir {data_dir} does not exist")
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
        raise ValueError(f"cannot open split {split!r} of {dataset or data_dir}: {error}") from error
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


def number_of_classes(images: Images, num_classes: int | None) -> int:
    """The dataset's number of classes, or the one given; a ValueError if they differ or neither is known."""
    if images.classes is None:
        if num_classes is None:
            raise ValueError("the dataset does not name its classes: give --num-classes")
        return num_classes
    if num_classes not in (None, len(images.classes)):
        raise ValueError(f"--num-classes is {num_classes}, but the dataset has {len(images.classes)} classes")
    return len(images.classes)


def check_auto_augment(policy: str | None) -> None:
    """Raise a ValueError for a policy of `--aa` that timm does not know."""
    try:
        create_transform(is_training=True, auto_augment=policy)
    except (AssertionError, ValueError) as error:
        raise ValueError(f"--aa {policy} is not a policy of timm: {error}") from error


def make_loader(
    images: Images,
    data_config: dict[str, Any],
    batch_size: int,
    *,
    device: torch.device,
    workers: int,
    **augmentation: Any,
) -> tuple[Any, EpochSampler | None]:
    """The loader of timm, with an order of our own in training.

    Args:
        images: The dataset.
        data_config: Of timm's `resolve_data_config`.
        batch_size: Images per batch. In training the last, smaller batch of an epoch is left out.
        device: Where the batches go.
        workers: Processes.
        augmentation: Goes to `create_loader`.

    Returns:
        The loader, and in training its sampler.
    """
    if images.is_training and len(images) < batch_size:
        raise ValueError(f"--batch-size is {batch_size}, but there are only {len(images)} training images")
    loader = create_loader(
        images,
        batch_size=batch_size,
        is_training=images.is_training,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
        device=device,
        # timm's prefetcher erases on the device, ahead of the step, with the global generator.
        use_prefetcher=not augmentation.get("reprob"),
        worker_seeding=_outlive_signals,
        **{
            key: data_config[key]
            for key in ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
        },
        **{"re_prob" if key == "reprob" else key: value for key, value in augmentation.items()},
    )
    data_loader = getattr(loader, "loader", loader)  # within the prefetcher
    # A private generator: iterating must not advance the global one, from which dropout draws.
    data_loader.generator = torch.Generator().manual_seed(images.seed)
    if not images.is_training:
        return loader, None
    sampler = EpochSampler(len(images), images.seed)
    data_loader.batch_sampler.sampler = sampler
    return loader, sampler


def _check_split(data_dir: Path, root: Path, split: str, classes: list[str]) -> None:
    # timm reads all of data_dir where it finds no folder of the split.
    if split and root.samefile(data_dir):
        folders = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
        raise FileNotFoundError(
            f"{data_dir} has no folder for the split {split!r}, it has: {', '.join(folders) or 'no folders'}"
        )
    if "" in classes:
        raise ValueError(f"{root} must hold one folder per class, but has images that are in no such folder")


def _classes(base: Any) -> list[str] | None:
    reader = getattr(base, "reader", base)
    indices = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)
    return [str(name) for name in sorted(indices, key=indices.get)] if indices else None


def _outlive_signals(worker_info: Any) -> int:
    """Called in each worker: a signal that the whole process group gets is for the main process to act on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The first one alone: at the end of a run, torch ends workers that hang by the same signal.
    signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))
    return worker_info.seed


@contextlib.contextmanager
def _generators_seeded(seed: int, epoch: int, index: int) -> Iterator[None]:
    """Seed the global generators, which timm's transforms draw from, and restore them afterwards."""
    sample_seed = int(np.random.SeedSequence([seed, epoch, index]).generate_state(1)[0])
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(sample_seed)
    np.random.seed(sample_seed)
    # torch.manual_seed would seed the GPUs as well.
    torch.default_generator.manual_seed(sample_seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
