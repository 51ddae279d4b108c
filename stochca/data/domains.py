"""Domains of the same classes: each split in two to leave one out, and batches that hold all alike."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from stochca.data.folders import contents, folders_in, listed
from stochca.data.images import Images
from stochca.data.loader import set_order, timm_loader
from stochca.data.opening import check_classes, open_images
from stochca.data.samplers import DomainSampler


class DomainImages(Dataset):
    """Several domains as one dataset, read at pairs of a domain and a position in it.

    Args:
        domains: Of the same classes.

    Attributes:
        domains: The domains, opened for training, with marks of unreadable images of their own.
        classes: Names of their classes in order; None if they have no names.
    """

    is_training = True

    def __init__(self, domains: Sequence[Images]) -> None:
        self.domains = [images.part(is_training=True) for images in domains]
        self.classes = self.domains[0].classes
        for number, images in enumerate(self.domains):
            check_classes(self.classes, images.classes, f"training domain {number}", "training domain 0")

    def __len__(self) -> int:
        return sum(len(images) for images in self.domains)

    def __getitem__(self, place: tuple[int, int]) -> tuple[Any, int]:
        domain, position = place
        return self.domains[domain][position]

    @property
    def transform(self) -> Any:
        """Of all domains; set by timm's `create_loader`."""
        return self.domains[0].transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        for images in self.domains:
            images.transform = transform

    def check_readable(self) -> None:
        """Raise a ValueError that names the first image that could not be read, if there is one."""
        for images in self.domains:
            images.check_readable()

    def unreadable_names(self) -> list[str]:
        """Names of the images that could not be read so far."""
        return [name for images in self.domains for name in images.unreadable_names()]


def open_domains(root: str, *, seed: int, holdout_fraction: float = 0.2) -> dict[str, dict[str, Images]]:
    """Open a folder `root/domain/class/image` and split each domain in two.

    Args:
        root: The folder.
        seed: Of the split, which depends on it and on the domain alone, and of the augmentation.
        holdout_fraction: Share of each domain's images that its "out" split gets, rounded down.

    Returns:
        For each domain, by name in order, its splits "in" and "out", opened for evaluation.

    Raises:
        FileNotFoundError: No such folder.
        ValueError: Not the layout above; domains of different classes; a class or a split without images.
    """
    if not 0 < holdout_fraction < 1:
        raise ValueError(f"the holdout fraction must be between 0 and 1, got {holdout_fraction}")
    domains = {name: _open_domain(Path(root), name, seed) for name in _domain_folders(Path(root))}
    first = next(iter(domains))
    for name, images in domains.items():
        check_classes(domains[first].classes, images.classes, f"domain {name} in {root}", f"domain {first}")
    return {name: _split(images, name, seed, holdout_fraction) for name, images in domains.items()}


def make_domain_loader(
    domains: Sequence[Images],
    data_config: dict[str, Any],
    batch_size: int,
    *,
    device: torch.device,
    workers: int,
    rank: int = 0,
    world_size: int = 1,
    **augmentation: Any,
) -> tuple[Any, DomainSampler]:
    """The training loader of one process, with equally many images of each domain in every batch.

    A batch is `batch_size` images of the first domain, then as many of the second, and so on. W processes
    with B images per domain see the images, and the augmentation of each, of one process with W * B.

    Args:
        domains: The training domains.
        data_config: Of timm's `resolve_data_config`.
        batch_size: Images per domain and batch of a process.
        device: Where the batches go.
        workers: Processes that load images, for each that trains.
        rank: Of this process.
        world_size: Processes that train together.
        augmentation: As of `make_loader`.

    Returns:
        The loader, whose `dataset` is a `DomainImages`, and its sampler.

    Raises:
        ValueError: No domains, domains of different classes, or an augmentation that does not fit.
    """
    if not domains:
        raise ValueError("there must be at least one training domain")
    images = DomainImages(domains)
    loader = timm_loader(
        images, data_config, len(domains) * batch_size, device=device, workers=workers, **augmentation
    )
    seed = images.domains[0].seed
    sampler = DomainSampler([len(part) for part in images.domains], seed, batch_size, rank, world_size)
    set_order(loader, sampler, seed)
    return loader, sampler


def _domain_folders(root: Path) -> list[str]:
    wanted = (
        f"{root} must hold one folder per domain, at least two, and in each one folder of images per class"
    )
    if not root.is_dir():
        raise FileNotFoundError(f"{wanted}, but it is {'a file' if root.exists() else 'not there'}")
    names = folders_in(root)
    if len(names) < 2:
        raise ValueError(f"{wanted}; it has: {contents(root)}")
    for name in names:
        if not folders_in(root / name):
            raise ValueError(f"{wanted}; {name} has: {contents(root / name)}")
    return names


def _open_domain(root: Path, name: str, seed: int) -> Images:
    images = open_images(str(root / name), "", "", is_training=False, seed=seed)
    assert isinstance(images, Images)  # a folder is no stream
    folders = folders_in(root / name)
    if empty := [folder for folder in folders if folder not in (images.classes or [])]:
        raise ValueError(f"domain {name} in {root} has no images in its class folders {listed(empty)}")
    check_classes(
        sorted(folders), sorted(images.classes or []), f"domain {name} in {root}", "its folders say"
    )
    return images


def _split(images: Images, name: str, seed: int, holdout_fraction: float) -> dict[str, Images]:
    order = np.random.default_rng([seed, *name.encode()]).permutation(len(images))
    held_out = int(len(images) * holdout_fraction)
    if held_out == 0:
        raise ValueError(f"domain {name} has {len(images)} images, of which {holdout_fraction} is none")
    return {
        "in": images.part(np.sort(order[held_out:])),
        "out": images.part(np.sort(order[:held_out])),
    }
