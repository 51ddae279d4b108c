"""Options of a sweep over runs that take a second each."""

from pathlib import Path

import pytest

from stochca.sweep.options import SweepOptions
from tests.train.image_folder import TINY, write_images


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> dict:
    """Options of `stochca finetune`: 10 epochs of 4 steps."""
    folder = write_images(tmp_path_factory.mktemp("images"), {"train": 6, "validation": 3})
    return {
        "model": "vit_tiny_patch16_224",
        "pretrained": False,
        "img_size": 32,
        "model_kwargs": TINY,
        "data_dir": str(folder),
        "batch_size": 4,
        "epochs": 10,
        "lr": 1e-3,
        "workers": 0,
        "device": "cpu",
        "recovery_interval": 1,
    }


@pytest.fixture
def make_options(base, tmp_path):
    """Options of a sweep over p = 0 and 0.5 and the seeds 0 and 1."""

    def make(**changes) -> SweepOptions:
        options = {"base": base, "p": [0.0, 0.5], "seeds": [0, 1], "output": str(tmp_path / "sweep")}
        return SweepOptions(**{**options, **changes})

    return make


def rows_of(path: str | Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    import csv

    with open(path, newline="") as file:
        return list(csv.DictReader(file))
