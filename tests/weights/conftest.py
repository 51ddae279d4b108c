"""A small image folder, and runs on it."""

import pytest
import torch

from stochca.config import FinetuneOptions
from tests.train.image_folder import write_images
from tests.weights.others import NAME, SIZES


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """8 training and 8 validation images of two classes."""
    return write_images(tmp_path_factory.mktemp("images"), {"train": 4, "validation": 4}, ("ant", "bee"))


@pytest.fixture
def make_options(folder, tmp_path):
    """Options of a run of 2 epochs of 2 steps from weights of a file."""

    def make(path, **changes):
        kwargs = dict(SIZES)
        options = {
            "model": NAME,
            "pretrained_path": str(path),
            "img_size": kwargs.pop("img_size"),
            "model_kwargs": kwargs,
            "data_dir": str(folder),
            "batch_size": 4,
            "epochs": 2,
            "warmup_epochs": 0,
            "lr": 1e-3,
            "p": 0.5,
            "workers": 0,
            "device": "cpu",
            "output": str(tmp_path / "run"),
        }
        return FinetuneOptions(**{**options, **changes})

    return make
