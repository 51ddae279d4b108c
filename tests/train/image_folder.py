"""Image files that the tests write, and a model small enough for them."""

from pathlib import Path

import numpy as np
from PIL import Image

TINY = {"patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2}


def write_images(root: Path, splits: dict[str, int], classes=("ant", "bee", "cow")) -> Path:
    """Write PNG and JPEG files of sizes that differ; each class has a colour of its own."""
    generator = np.random.default_rng(0)
    for split, count in splits.items():
        for level, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.normal(60 + 60 * level, 30, (36 + i, 40, 3)).clip(0, 255)
                image = Image.fromarray(pixels.astype("uint8"))
                image.save(folder / f"{i}.{'png' if i % 2 else 'jpg'}")
    return root
