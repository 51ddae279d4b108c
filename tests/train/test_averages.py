"""Averages of weights along a run: what is evaluated, saved and resumed."""

import pytest
import torch
from interruption import assert_resumes, read_metrics, record_steps
from safetensors.torch import load_file

from stochca.train import Trainer


def test_the_average_is_what_is_evaluated_and_saved(make_options, monkeypatch):
    options = make_options(model_ema=True, model_ema_decay=0.7, lr=3e-3)
    trainer = Trainer(options)
    targets = record_steps(
        monkeypatch,
        trainer,
        lambda run: {name: t.clone() for name, t in run.model.target.state_dict().items()},
    )
    summary = trainer.run()
    averages, average = {}, targets[0]  # timm's average begins with the first step
    for step, weights in enumerate(targets, start=1):
        average = {name: 0.7 * average[name] + 0.3 * t for name, t in weights.items()}
        averages[step] = average
    for file, step in {"last": 12, "best": summary["best_step"]}.items():
        saved = load_file(f"{options.output}/{file}.safetensors")
        assert saved.keys() == averages[step].keys()
        for name, t in saved.items():
            torch.testing.assert_close(t, averages[step][name], rtol=1e-5, atol=1e-6)
            assert not torch.equal(t, targets[step - 1][name])
    model = trainer._plain_target()
    model.load_state_dict(load_file(f"{options.output}/last.safetensors"))
    results = trainer.evaluator.splits(model)
    assert results["val"]["loss"] == pytest.approx(read_metrics(options.output)[-1]["val_loss"])


def test_the_average_warms_up_if_asked(make_options):
    for warmup in (False, True):
        trainer = Trainer(make_options(model_ema=True, model_ema_decay=0.99, model_ema_warmup=warmup))
        assert (trainer.average.get_decay(3) < 0.99) == warmup


def test_an_averaged_run_resumes_bitwise_equal(make_options, monkeypatch, tmp_path):
    options = {"model_ema": True, "model_ema_decay": 0.7, "model_ema_warmup": True}
    assert_resumes(make_options, monkeypatch, tmp_path, steps=(2, 6), **options)


def test_swad_is_the_mean_of_the_weights_along_the_run_and_resumes(make_options, monkeypatch, tmp_path):
    options = {"swad": True, "swad_converge": 1, "swad_tolerance_ratio": 100.0}
    trainer = Trainer(make_options(output=str(tmp_path / "spied"), **options))
    weights = record_steps(monkeypatch, trainer, lambda run: run.model.target.head.weight.detach().clone())
    trainer.run()
    summary, expected = assert_resumes(make_options, monkeypatch, tmp_path, steps=(6,), **options)
    assert summary["swad_steps"] == expected["swad_steps"] == [1, 12]
    assert summary["swad_top1"] == expected["swad_top1"]
    ours, theirs = (load_file(tmp_path / name / "swad.safetensors") for name in ("parts", "whole"))
    assert all(torch.equal(ours[name], t) for name, t in theirs.items())
    torch.testing.assert_close(ours["head.weight"], torch.stack(weights).mean(0), rtol=1e-5, atol=1e-6)
