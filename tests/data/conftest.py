"""A small image folder, and one of three domains."""

from pathlib import Path

import pytest

from tests.train.image_folder import write_images


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """18 training and 9 validation images of three classes."""
    return write_images(tmp_path_factory.mktemp("images"), {"train": 6, "validation": 3})


@pytest.fixture(scope="session")
def domains_folder(tmp_path_factory) -> Path:
    """12, 15 and 30 images of the same three classes."""
    return write_images(tmp_path_factory.mktemp("domains"), {"clay": 4, "ink": 5, "oil": 10})
