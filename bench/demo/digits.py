"""The images: scikit-learn's handwritten digits, 0-4 for the source and 5-9 for the target."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Generator, Tensor
from torch.nn import functional as F

NUM_CLASSES = 5
TARGET_POOL = 0.4  # share of the target's images that its labels are drawn from; the others are its test
SOURCE_TEST = 0.2


class Images(NamedTuple):
    """Labelled images.

    Args:
        pixels: `[N, 1, 8, 8]`, between -1 and 1.
        labels: `[N]`, counted from 0 within the part: the target's label 0 is the digit 5.
        rows: `[N]`, which images of scikit-learn's data set these are.
    """

    pixels: Tensor
    labels: Tensor
    rows: Tensor

    def take(self, rows: Tensor) -> "Images":
        """Some of them."""
        return Images(self.pixels[rows], self.labels[rows], self.rows[rows])


class Parts(NamedTuple):
    """The data set in four parts that share no image. No seed changes them."""

    source_train: Images
    source_test: Images
    target_pool: Images
    target_test: Images


def load_parts() -> Parts:
    """Split digits 0-4 and 5-9, and each of the two into training and test images."""
    digits = load_digits()
    pixels = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
    labels = torch.from_numpy(digits.target)
    images = Images(pixels, labels % NUM_CLASSES, torch.arange(len(labels)))
    source, target = images.take(labels < NUM_CLASSES), images.take(labels >= NUM_CLASSES)
    return Parts(*_split(source, SOURCE_TEST), *_split(target, 1 - TARGET_POOL))


def _split(images: Images, test: float) -> tuple[Images, Images]:
    rows = torch.arange(len(images.labels))
    train, held_out = train_test_split(rows.numpy(), test_size=test, stratify=images.labels, random_state=0)
    return images.take(torch.from_numpy(train)), images.take(torch.from_numpy(held_out))


@dataclass(frozen=True)
class Labels:
    """How many labels the target's training set has, and how many of them are wrong.

    Args:
        per_class: Images of each class.
        noise: Share of all labels that is replaced by a random class, which may be the right one.
    """

    per_class: int
    noise: float


class Task(NamedTuple):
    """What one seed fine-tunes on, the same for all variants.

    Args:
        train: Its images, with the labels that are trained on.
        clean_labels: `[N]`, what those images show.
        replaced: Rows of `train` whose label was replaced.
        batches: Rows of `train` in each step, `[steps, batch_size]`.
        seed: Of the augmentation.
    """

    train: Images
    clean_labels: Tensor
    replaced: Tensor
    batches: Tensor
    seed: int


def draw_task(pool: Images, labels: Labels, steps: int, batch_size: int, seed: int) -> Task:
    """Draw a seed's training images, its replaced labels and its batches.

    Args:
        pool: Where the images come from.
        labels: How many, and how many are replaced.
        steps: Number of batches.
        batch_size: Images in each, drawn with replacement.
        seed: Decides all of it.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(pool.labels), generator=generator)
    rows = torch.cat([order[pool.labels[order] == c][: labels.per_class] for c in range(NUM_CLASSES)])
    clean = pool.labels[rows]
    replaced = torch.randperm(len(rows), generator=generator)[: round(labels.noise * len(rows))]
    noisy = clean.clone()
    noisy[replaced] = torch.randint(NUM_CLASSES, (len(replaced),), generator=generator)
    batches = torch.randint(len(rows), (steps, batch_size), generator=generator)
    return Task(pool.take(rows)._replace(labels=noisy), clean, replaced, batches, seed)


def augment(pixels: Tensor, strength: float, generator: Generator) -> Tensor:
    """Rotate, scale and move each image by its own random amounts, and add noise.

    Args:
        pixels: `[N, 1, 8, 8]`.
        strength: 1 is up to 20 degrees, 15 % and one pixel, and a standard deviation of 0.2.
        generator: Decides the amounts.
    """
    count = len(pixels)

    def uniform(bound: float, *shape: int) -> Tensor:
        return (torch.rand(count, *shape, generator=generator) * 2 - 1) * bound * strength

    angle, scale = uniform(math.radians(20)), 1 + uniform(0.15)
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(count, 2, 2)
    theta = torch.cat([rotation * scale[:, None, None], uniform(2 / 8, 2, 1)], dim=2)
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels + 1, grid, align_corners=False) - 1
    return moved + 0.2 * strength * torch.randn(pixels.shape, generator=generator)
