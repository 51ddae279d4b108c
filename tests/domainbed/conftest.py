"""Three domains of two classes, and options of runs on them that take a second each."""

import csv
from pathlib import Path

import pytest
import torch

from stochca.config import DomainBedOptions
from tests.train.image_folder import TINY, write_images

DOMAINS = {"Real World": 10, "clay": 8, "ink": 6}
HOLDOUT = 0.3


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """20, 16 and 12 images, of which 6, 4 and 3 are held out."""
    return write_images(tmp_path_factory.mktemp("domains"), DOMAINS, classes=("ant", "bee"))


def values_of(folder, output, **changes) -> dict:
    """Options of runs of 6 steps, evaluated every 2."""
    options = {
        "model": "vit_tiny_patch16_224",
        "pretrained": False,
        "img_size": 32,
        "model_kwargs": TINY,
        "data_dir": str(folder),
        "holdout_fraction": HOLDOUT,
        "methods": ["stochca"],
        "seeds": [0],
        "batch_size": 2,
        "steps": 6,
        "val_steps": 2,
        "lr": 1e-3,
        "warmup_steps": 0,
        "p": 0.5,
        "workers": 0,
        "device": "cpu",
        "output": str(output),
    }
    return {**options, **changes}


@pytest.fixture
def make_options(folder, tmp_path):
    """Options of `values_of`."""
    return lambda **changes: DomainBedOptions(**values_of(folder, tmp_path / "bed", **changes))


def rows_of(path: str | Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def metrics_of(folder: Path) -> list[dict[str, float]]:
    """The evaluations of a run."""
    return [{name: float(value) for name, value in row.items()} for row in rows_of(folder / "metrics.csv")]


def results_of(output: Path) -> list[dict[str, str]]:
    """The rows of all runs, without how long they took."""
    return [
        {name: value for name, value in row.items() if name != "images_per_second"}
        for row in rows_of(output / "results.csv")
    ]
