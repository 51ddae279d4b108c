"""Images of a dataset that is read by index, whole or in part; damaged ones are found, not replaced."""

import contextlib
import os
import random
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import ImageDataset
from torch.utils.data import Dataset

# What Pillow raises on a damaged file.
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

NO_TARGET = -1

LONGEST = 100
"""Times the short side that an image may be long."""


class Images(Dataset):
    """A timm or torchvision dataset, or a part of it, whose damaged images are found.

    An image that cannot be read is marked in `unreadable`, in memory that worker processes share. Its place
    is taken by the next readable one in training, by a blank one with target `NO_TARGET` in evaluation.
    Whoever reads the batches asks `check_readable` whether to go on.

    Args:
        base: The dataset, without a transform.
        seed: Of the augmentation.
        is_training: See above.
        indices: `[len(self)]`, the images of `base` that belong to the part; all of them if not given.

    Attributes:
        transform: Set by timm's `create_loader`.
        classes: Names of the classes in order; None if the dataset has no names.
        unreadable: Bool tensor `[len(self)]`.
    """

    def __init__(
        self, base: Any, *, seed: int, is_training: bool, indices: Sequence[int] | np.ndarray | None = None
    ) -> None:
        self.base = base
        self.seed = seed
        self.is_training = is_training
        self.indices = np.arange(len(base)) if indices is None else np.asarray(indices, dtype=np.int64)
        self.transform: Any = None
        self.classes = class_names(base)
        self.unreadable = torch.zeros(len(self.indices), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Any, int]:
        """Sample at `epoch * len(self) + index`: the epoch decides how the image is augmented."""
        epoch, index = divmod(position, len(self))
        image, target = self._decode(index)
        with generators_seeded(self.seed, epoch, int(self.indices[index])):
            return self.transform(image), target

    def part(
        self, indices: Sequence[int] | np.ndarray | None = None, *, is_training: bool | None = None
    ) -> "Images":
        """Some of the images, or all of them, with a transform and marks of their own.

        Args:
            indices: Which, counted in this part; all of them if not given.
            is_training: Whether to train on them; as these if not given.
        """
        return Images(
            self.base,
            seed=self.seed,
            is_training=self.is_training if is_training is None else is_training,
            indices=self.indices if indices is None else self.indices[np.asarray(indices, dtype=np.int64)],
        )

    def targets(self) -> np.ndarray:
        """Class of each image, `[len(self)]`, without reading an image.

        Raises:
            ValueError: The dataset tells the class of an image only together with the image.
        """
        reader = getattr(self.base, "reader", self.base)
        if hasattr(reader, "targets"):
            targets = reader.targets
        elif hasattr(reader, "samples"):
            targets = [target for _, target in reader.samples]
        elif hasattr(reader, "label_key"):
            targets = reader.dataset[reader.label_key]
        else:
            raise ValueError(
                "the dataset does not tell the classes of its images without reading all of them"
            )
        return np.asarray(targets)[self.indices]

    def name(self, index: int) -> str:
        """Path of an image in characters that can be shown, or what its dataset calls it."""
        source = int(self.indices[index])
        samples = getattr(self.base, "samples", None)
        if isinstance(self.base, ImageDataset):
            name = self.base.filename(source, absolute=True)
        else:
            name = samples[source][0] if samples else f"sample {source}"
        return os.fsencode(name).decode("utf-8", "backslashreplace")

    def check_readable(self) -> None:
        """Raise a ValueError that names the first image that could not be read, if there is one."""
        if self.unreadable.any():
            index = int(self.unreadable.nonzero()[0])
            reason = "it was readable at a second attempt"
            try:
                self._read(index)
            except UNREADABLE as error:
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
            except UNREADABLE:
                self.unreadable[candidate] = True
                if not self.is_training:
                    return Image.new("RGB", (32, 32)), NO_TARGET
        raise ValueError(f"none of the {len(self)} images can be read, the first is {self.name(0)}")

    def _read(self, index: int) -> tuple[Image.Image, int]:
        source = int(self.indices[index])
        if not isinstance(self.base, ImageDataset):
            image, target = self.base[source]
            return as_rgb(image), target
        # Its own __getitem__ would go on to the next image after an error.
        file, target, *_ = self.base.reader[source]
        with file, Image.open(file) as image:
            return as_rgb(image), target


def class_names(base: Any) -> list[str] | None:
    """Names of a dataset's classes in order; None if it has no names."""
    reader = getattr(base, "reader", base)
    indices = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)
    return [str(name) for name in sorted(indices, key=indices.get)] if indices else None


def open_rgb(path: str) -> Image.Image:
    """The image in a file, as `as_rgb` has it."""
    with Image.open(path) as image:
        return as_rgb(image)


def as_rgb(image: Image.Image) -> Image.Image:
    """An image as 8-bit RGB, upright as its EXIF data say; of an animated one the first frame.

    Raises:
        ValueError: It has no range of pixels that is known, or is so long that transforms, which scale by the
            short side, would make something huge of it.
    """
    if max(image.size) > LONGEST * min(image.size):
        raise ValueError(
            f"it has {image.width} x {image.height} pixels, over {LONGEST} times as long as wide"
        )
    with contextlib.suppress(*UNREADABLE):  # of EXIF data that are damaged; pixels are read again below
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):
        # 16 bits per pixel, of which Pillow would clip all but the darkest 256 values to white.
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() >= 2**16:
            raise ValueError(f"its pixels are 32-bit integers, {pixels.min()} to {pixels.max()}")
        image = Image.fromarray((pixels >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers")
    if "transparency" in image.info:
        image = image.convert("RGBA")  # as Pillow asks for
    return image.convert("RGB")


@contextlib.contextmanager
def generators_seeded(*seed: int) -> Iterator[None]:
    """Seed the global generators, which timm's transforms draw from, and restore them afterwards."""
    sample_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
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
