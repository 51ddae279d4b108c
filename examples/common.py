"""What the examples share: flags, small data that needs no download, and how well a model does on it."""

import argparse
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset, TensorDataset

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VIT = {"model": "vit_tiny_patch16_224", "pretrained": True, "img_size": 64}


def flags(doc: str, **defaults: Any) -> argparse.Namespace:
    """Read the command line: one flag for each default, of its type."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    for name, value in defaults.items():
        kind = {"action": argparse.BooleanOptionalAction} if value in (True, False) else {"type": type(value)}
        parser.add_argument(f"--{name.replace('_', '-')}", default=value, help=f"{value}", **kind)
    return parser.parse_args()


def digits(img_size: int) -> tuple[TensorDataset, TensorDataset]:
    """scikit-learn's handwritten digits as RGB images between -1 and 1: 1500 to train on, 297 to test on."""
    data = load_digits()
    pixels = torch.from_numpy(data.images).float()[:, None] / 8 - 1
    images = interpolate(pixels, size=(img_size, img_size), mode="bilinear").expand(-1, 3, -1, -1)
    labels = torch.from_numpy(data.target)
    return TensorDataset(images[:1500], labels[:1500]), TensorDataset(images[1500:], labels[1500:])


def shapes(count: int, img_size: int) -> tuple[Tensor, Tensor]:
    """A reddish disc and a bluish square on noise, with the class of each pixel: ground 0, disc 1, square 2.

    Images are `[count, 3, img_size, img_size]`, masks `[count, img_size, img_size]`. The square is in front.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, img_size, img_size, generator=generator)
    masks = torch.zeros(count, img_size, img_size, dtype=torch.long)
    position = torch.arange(img_size) / img_size
    for label, norm, hue in ((1, 2, (1, 0, 0)), (2, torch.inf, (0, 0, 1))):  # balls of two norms
        y, x, radius = torch.rand(3, count, 1, 1, generator=generator)
        offsets = torch.broadcast_tensors(position[:, None] - y, position - x)
        inside = torch.linalg.vector_norm(torch.stack(offsets), norm, dim=0) < 0.1 + 0.2 * radius
        colour = torch.tensor(hue)[:, None, None] + torch.randn(count, 3, 1, 1, generator=generator) / 2
        images = torch.where(inside[:, None], colour + images / 2, images)
        masks[inside] = label
    return images, masks


@torch.no_grad()
def accuracy(model: nn.Module, dataset: Dataset) -> float:
    """Share of the images, in percent, of which the model in eval mode names the class."""
    model.eval()
    batches = DataLoader(dataset, batch_size=256)
    right = [model(images.to(DEVICE)).argmax(1).cpu() == labels for images, labels in batches]
    return 100 * torch.cat(right).float().mean().item()
