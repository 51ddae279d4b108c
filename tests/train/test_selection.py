"""When a run evaluates and ends, and which weights it selects."""

import pytest
import torch
from image_folder import write_images
from interruption import assert_resumes, assert_same_run, read_metrics, resumed
from safetensors.torch import load_file

import stochca.memory
from stochca.train import Trainer, finetune


@pytest.fixture
def accuracies(monkeypatch):
    """Have evaluations find these accuracies, by step, and losses that fall."""

    def set_accuracies(top1):
        def found(self, model, should_stop=None):
            count.append(len(count))
            return {"val": {"loss": 9.0 - len(count), "top1": top1[len(count) - 1], "top5": 100.0}}

        count = []
        monkeypatch.setattr("stochca.evaluation.Evaluator.splits", found)

    return set_accuracies


@pytest.mark.parametrize(
    ("top1", "patience", "steps"),
    [
        ([10.0, 50.0, 50.0, 49.0, 60.0, 70.0], 2, 16),  # an equal one is no better
        ([10.0, 50.0, 49.0, 51.0, 50.0, 50.0], 2, 24),
        ([10.0, 9.0, 50.0, 51.0, 52.0, 53.0], 1, 8),
        ([10.0, 50.0, 50.0, 49.0, 48.0, 47.0], None, 24),
    ],
)
def test_patience_ends_a_run_after_so_many_evaluations_without_a_better(
    make_options, accuracies, top1, patience, steps
):
    accuracies(top1)
    options = make_options(epochs=6, patience=patience)
    summary = finetune(options)
    assert summary["steps"] == steps
    done = top1[: steps // 4]
    assert summary["best_step"] == 4 * (1 + done.index(max(done)))
    assert summary["last_top1"] == done[-1]


def test_patience_looks_at_the_metric_that_selects(make_options, accuracies):
    accuracies([50.0, 40.0, 30.0, 20.0])
    assert finetune(make_options(epochs=4, patience=1, eval_metric="loss"))["steps"] == 16


def test_an_impatient_run_resumes_to_the_same_end(make_options, monkeypatch, tmp_path):
    options = {"epochs": 12, "patience": 3, "lr": 1e-5}
    summary, expected = assert_resumes(make_options, monkeypatch, tmp_path, steps=(2, 9), **options)
    assert summary["steps"] == expected["steps"] < 48
    ended = make_options(output=str(tmp_path / "whole"), **options)
    assert finetune(resumed(ended))["steps"] == expected["steps"]  # and does not go on


def test_val_steps_says_after_which_steps_is_evaluated(make_options, monkeypatch, tmp_path):
    options = {"val_steps": 5, "val_interval": 2}
    assert_resumes(make_options, monkeypatch, tmp_path, steps=(5, 7), **options)
    rows = read_metrics(tmp_path / "whole")
    assert [(row["step"], row["epoch"]) for row in rows] == [(5, 1.25), (10, 2.5), (12, 3.0)]


@pytest.fixture
def folder_with_test(tmp_path):
    return write_images(tmp_path / "images", {"train": 6, "validation": 3, "test": 2})


def test_the_best_checkpoint_is_evaluated_once_on_the_test_split(make_options, monkeypatch, folder_with_test):
    options = make_options(data_dir=str(folder_with_test), test_split="test", lr=5e-3)
    evaluated, evaluate = [], stochca.evaluation.evaluate

    def counting(model, loader, *args, **kwargs):
        result = evaluate(model, loader, *args, **kwargs)
        weights = {name: t.clone() for name, t in model.state_dict().items()}
        evaluated.append((len(loader.dataset), weights, result))
        return result

    monkeypatch.setattr(stochca.evaluation, "evaluate", counting)
    summary = finetune(options)
    assert [size for size, _, _ in evaluated] == [9, 9, 9, 6]
    *_, (_, weights, result) = evaluated
    best = load_file(f"{options.output}/best.safetensors")
    assert all(torch.equal(weights[name], t) for name, t in best.items())
    assert {name: summary[f"test_{name}"] for name in ("top1", "top5", "loss")} == {
        name: result[name] for name in ("top1", "top5", "loss")
    }


def test_the_test_split_selects_nothing(make_options, tmp_path, folder_with_test):
    with_test = make_options(data_dir=str(folder_with_test), test_split="test", output=str(tmp_path / "with"))
    without = make_options(data_dir=str(folder_with_test), output=str(tmp_path / "without"))
    summary, expected = finetune(with_test), finetune(without)
    assert_same_run(with_test.output, without.output)
    assert {"test_top1", "test_top5", "test_loss"} == summary.keys() - expected.keys()
    assert summary["best_step"] == expected["best_step"]


def test_a_wrong_test_split_is_refused_before_the_run(make_options, folder_with_test):
    options = {"data_dir": str(folder_with_test)}
    with pytest.raises(FileNotFoundError, match="nothing"):
        Trainer(make_options(test_split="nothing", **options))
    write_images(folder_with_test, {"other": 1}, classes=("ant", "bee", "dog"))
    with pytest.raises(ValueError, match=r"the split 'other' has other classes .* lacks 1 \(cow\)"):
        Trainer(make_options(test_split="other", **options))


def test_unreadable_images_of_the_test_split_are_reported(make_options, folder_with_test):
    bad = folder_with_test / "test" / "bee" / "1.png"
    bad.write_bytes(bad.read_bytes()[:200])
    options = {"data_dir": str(folder_with_test), "test_split": "test", "epochs": 1}
    summary = finetune(make_options(skip_corrupt=True, **options))
    assert summary["skipped"] == [str(bad)]
