"""Runs that are stopped, watched and resumed, and what makes two runs the same."""

import csv
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stochca.config import FinetuneOptions
from stochca.progress import Interrupted
from stochca.train import Trainer, finetune


def stop_after(monkeypatch, step: int, signum=signal.SIGTERM):
    """Send this process a signal within a step."""
    train_step = Trainer._train_step

    def step_and_signal(self, *args):
        if self.step + 1 == step:
            os.kill(os.getpid(), signum)
        return train_step(self, *args)

    monkeypatch.setattr(Trainer, "_train_step", step_and_signal)


def resumed(options: FinetuneOptions, **changes) -> FinetuneOptions:
    return FinetuneOptions(**{**vars(options), "resume": options.output, **changes})


def read_metrics(output: str | Path) -> list[dict[str, float]]:
    with open(Path(output) / "metrics.csv") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def assert_same_run(output, expected):
    """The same weights and metrics, bit for bit."""
    for name in ("last.safetensors", "best.safetensors"):
        ours, theirs = load_file(f"{output}/{name}"), load_file(f"{expected}/{name}")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    for ours, theirs in zip(read_metrics(output), read_metrics(expected), strict=True):
        for name in ours.keys() - {"seconds", "images_per_second"}:
            assert ours[name] == theirs[name], name


def run_interrupted(options, monkeypatch, steps):
    """Run, stopped after each of these steps and resumed."""
    for step in steps:
        with monkeypatch.context() as patch:
            stop_after(patch, step)
            with pytest.raises(Interrupted, match=f"after step {step};"):
                finetune(options)
        options = resumed(options)
    return finetune(options)


def assert_resumes(make_options, monkeypatch, tmp_path, steps=(3,), **changes):
    """A run that is stopped and resumed is the one that was not, bit for bit; returns both summaries."""
    whole, parts = (make_options(output=str(tmp_path / name), **changes) for name in ("whole", "parts"))
    expected = finetune(whole)
    summary = run_interrupted(parts, monkeypatch, steps)
    assert_same_run(parts.output, whole.output)
    return summary, expected


def record_steps(monkeypatch, trainer, read):
    """What `read` says of the trainer after each of its steps."""
    found = []
    train_step = trainer._train_step

    def recording(*args):
        result = train_step(*args)
        found.append(read(trainer))
        return result

    monkeypatch.setattr(trainer, "_train_step", recording)
    return found
