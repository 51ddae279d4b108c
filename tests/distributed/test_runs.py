"""Two processes compute what one does, and what they write is whole."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from stochca.checkpoint import load_state
from stochca.config import FinetuneOptions
from stochca.train import finetune
from tests.train.image_folder import TINY, write_images

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
MIRO = {"losses": [{"miro": {"weight": 0.5}}, "bss", "l2_sp"]}
# Two processes with two images each; "one" stands beside each of these with four.
RUNS = {
    "ddp": {},
    "accumulated": {"grad_accum_steps": 2, "clip_grad": 0.5},
    "per sample": {"per": "sample"},
    "qk norm": {"model_kwargs": {**TINY, "qk_norm": True}},
    "average": {"model_ema": True, "model_ema_decay": 0.5},
    "companions": {"losses": ["l2_sp", {"miro": {"weight": 0.5}}]},
    "fsdp": {"distribute": "fsdp"},
    "fsdp average": {
        "distribute": "fsdp", "model_ema": True, "model_ema_decay": 0.5, "clip_grad": 0.5,
        "grad_accum_steps": 2, "losses": ["l2_sp", {"miro": {"weight": 0.5}}],
    },
}  # fmt: skip
# Adam makes much of gradients that are nothing but rounding, as that of a key's bias.
SGD = {"opt": "sgd", "lr": 0.05}
# Runs without a counterpart in one process.
OTHERS = {
    "independent": {"independent_coins": True, "model_kwargs": {**TINY, "qk_norm": True}, **MIRO},
    "too many": {"batch_size": 10},
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """18 training and 7 validation images: unequally many for two processes."""
    root = write_images(tmp_path_factory.mktemp("images"), {"train": 6, "validation": 3})
    for name in ("ant/0.jpg", "bee/0.jpg"):
        (root / "validation" / name).unlink()
    return root


def options_of(folder, output, **changes):
    return {
        "model": "vit_tiny_patch16_224", "pretrained": False, "img_size": 32, "model_kwargs": TINY,
        "data_dir": str(folder), "batch_size": 2, "epochs": 2, "lr": 1e-3, "p": 0.5, "workers": 0,
        "device": "cpu", "output": str(output), **changes,
    }  # fmt: skip


@pytest.fixture(scope="module")
def two(folder, tmp_path_factory) -> Path:
    """Folders of all runs of two processes."""
    root = tmp_path_factory.mktemp("two")
    runs = [
        options_of(folder, root / name, **{**SGD, **changes}) for name, changes in {**RUNS, **OTHERS}.items()
    ]
    (root / "runs.json").write_text(json.dumps(runs))
    command = [*TORCHRUN, "-m", "tests.distributed.runs", str(root / "runs.json")]
    done = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return root


def metrics_of(output):
    with open(output / "metrics.csv") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_compute_what_one_with_the_joined_batch_does(two, folder, tmp_path, name):
    changes = {**RUNS[name], **SGD, "distribute": "ddp"}
    finetune(FinetuneOptions(**options_of(folder, tmp_path / "one", **changes, batch_size=4)))
    ours, theirs = (load_file(root / "last.safetensors") for root in (two / name, tmp_path / "one"))
    initial = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3, **TINY).state_dict()
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-3, atol=2e-5, msg=lambda m, k=key: f"{k}: {m}")
    assert any(not torch.equal(theirs[key], tensor) for key, tensor in initial.items())
    for row, expected in zip(metrics_of(two / name), metrics_of(tmp_path / "one"), strict=True):
        assert row["step"] == expected["step"]
        # Samples of one process agree more often than those of both, and then need less of the source.
        others = {"seconds", "images_per_second", "step"} | (
            {"source_fraction"} if name == "per sample" else set()
        )
        for metric in row.keys() - others:
            assert row[metric] == pytest.approx(expected[metric], rel=1e-3), metric


@pytest.mark.parametrize("name", ["ddp", "fsdp", "fsdp average"])
def test_checkpoints_are_those_of_plain_timm(two, name):
    for file in ("best", "last"):
        path = two / name / f"{file}.safetensors"
        model = timm.create_model(
            "vit_tiny_patch16_224", checkpoint_path=str(path), num_classes=3, img_size=32, **TINY
        )
        assert {key: t.shape for key, t in model.state_dict().items()} == {
            key: t.shape for key, t in load_file(path).items()
        }


def test_independent_coins_train_with_norms_and_companions(two):
    state = load_state(two / "independent" / "trainer_state.pt")
    assert state["step"] == 8
    assert {name.split(".")[0] for name in state["losses"]} == {"0"}  # of MIRO alone


def test_more_processes_than_images_allow_are_refused(two):
    for rank in range(2):
        message = (two / f"too many.rank{rank}.error").read_text()
        assert message == "--batch-size is 10 in each of 2 processes, but there are only 18 training images"
