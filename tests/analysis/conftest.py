"""Two runs on a small image folder, and options of an analysis of them."""

import contextlib
import io
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from stochca.analysis.options import AnalyzeOptions
from stochca.cli import main
from stochca.config import FinetuneOptions
from stochca.train import finetune
from tests.train.image_folder import TINY, write_images


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """12 training and 9 validation images of three classes."""
    return write_images(tmp_path_factory.mktemp("images"), {"train": 4, "validation": 3})


@pytest.fixture(scope="session")
def make_run(folder, tmp_path_factory):
    """Fine-tune for three steps and return the folder of the run."""

    def make(name: str, **changes) -> Path:
        options = {
            "model": "vit_tiny_patch16_224", "pretrained": False, "img_size": 32, "model_kwargs": TINY,
            "data_dir": str(folder), "batch_size": 4, "epochs": 1, "lr": 1e-2, "warmup_epochs": 0.0,
            "workers": 0, "device": "cpu", "output": str(tmp_path_factory.mktemp("runs") / name),
        }  # fmt: skip
        return Path(finetune(FinetuneOptions(**{**options, **changes}))["output"])

    return make


@pytest.fixture(scope="session")
def runs(make_run) -> list[Path]:
    """One run with and one without StochCA, from the same source."""
    return [make_run("plain", p=0.0), make_run("stochca", p=0.5)]


class Analyzed(NamedTuple):
    output: Path
    printed: str


@pytest.fixture(scope="session")
def analyzed(runs, tmp_path_factory) -> Analyzed:
    """Both runs, analysed by the command with everything that it writes."""
    output = tmp_path_factory.mktemp("analysis") / "both"
    arguments = ["--workers", "0", "--device", "cpu", "--pictures", "2", "--output", str(output)]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["analyze", *map(str, runs), *arguments]) == 0
    return Analyzed(output, printed.getvalue())


@pytest.fixture
def numbers_alone(monkeypatch):
    """Leave out plots and report, which take seconds."""
    monkeypatch.setattr("stochca.analysis.plots.write_plots", lambda *_: [])
    monkeypatch.setattr("stochca.analysis.report.write_report", lambda output, *_: output / "report.html")


@pytest.fixture
def make_options(runs, tmp_path):
    """Options of an analysis of both runs."""

    def make(**changes) -> AnalyzeOptions:
        options = {
            "runs": [str(run) for run in runs],
            "batch_size": 4,
            "workers": 0,
            "device": "cpu",
            "pictures": 2,
            "output": str(tmp_path / "analysis"),
        }
        return AnalyzeOptions(**{**options, **changes})

    return make
