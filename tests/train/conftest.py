"""A small image folder, and a run on it that takes a second."""

from pathlib import Path

import pytest
import torch
from image_folder import TINY, write_images

from stochca.config import FinetuneOptions


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """18 training and 9 validation images of three classes."""
    return write_images(tmp_path_factory.mktemp("images"), {"train": 6, "validation": 3})


@pytest.fixture
def make_options(folder, tmp_path):
    """Options of a run of 3 epochs of 4 steps: 18 images, batches of 4."""

    def make(**changes) -> FinetuneOptions:
        options = {
            "model": "vit_tiny_patch16_224",
            "pretrained": False,
            "img_size": 32,
            "model_kwargs": TINY,
            "data_dir": str(folder),
            "batch_size": 4,
            "epochs": 3,
            "lr": 1e-3,
            "p": 0.5,
            "workers": 0,
            "device": "cpu",
            "output": str(tmp_path / "run"),
        }
        return FinetuneOptions(**{**options, **changes})

    return make
