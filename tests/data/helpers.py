"""How the tests open and read images."""

from pathlib import Path

import torch

from stochca.data import make_loader, open_images

CONFIG = {
    "input_size": (3, 32, 32),
    "interpolation": "bicubic",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "crop_pct": 0.9,
    "crop_mode": "center",
}


def loader_of(root, split, batch_size=4, seed=0, **how):
    """Images of a split, their loader, and its sampler if it is the training split."""
    images = open_images(str(root), "", split, is_training=split == "train", seed=seed)
    return images, *make_loader(images, CONFIG, batch_size, **{**defaults(), **how})


def defaults():
    """What a loader needs beside images and batch size."""
    return {"device": torch.device("cpu"), "workers": 0}


def batches_of(root, epoch=0, start=0, **how):
    """Batches of an epoch of the training split."""
    _, loader, sampler = loader_of(root, "train", **how)
    return read(loader, sampler, epoch, start)


def read(loader, sampler, epoch=0, start=0):
    """Batches of an epoch."""
    sampler.epoch, sampler.start = epoch, start
    return [(images.clone(), target.clone()) for images, target in loader]


def assert_same(batches, others):
    """The same images and targets in the same batches."""
    for (images, target), (other_images, other_target) in zip(batches, others, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(target, other_target)


def damage(path: Path, how: str) -> Path:
    """Spoil an image file."""
    content = path.read_bytes()
    path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "text": b"no image"}[how])
    return path
