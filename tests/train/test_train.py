"""What a run computes and writes."""

import json
import math
import sys
from pathlib import Path

import pytest
import timm
import torch
from image_folder import TINY, write_images
from interruption import read_metrics
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stochca.checkpoint import load_weights, read_metadata
from stochca.config import EvaluateOptions
from stochca.evaluation import evaluate, evaluate_checkpoint
from stochca.recipe import create_optimizer, create_schedule
from stochca.train import Trainer, finetune


def weights_of(options):
    finetune(options)
    return load_file(f"{options.output}/last.safetensors")


def metrics_of(options):
    return read_metrics(options.output)


def best_of(options):
    return Path(options.output) / "best.safetensors"


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def scales_by_name(target, optimizer):
    names = {id(parameter): name for name, parameter in target.named_parameters()}
    return {
        names[id(parameter)]: group["lr_scale"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_every_group_keeps_its_own_rate_through_warm_up_and_cosine(make_options, layer_decay):
    options = make_options(layer_decay=layer_decay, head_lr_mult=7.0, lr=0.1, warmup_lr=0.01, min_lr=0.02)
    target = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3, **TINY)
    optimizer = create_optimizer(target, options)
    schedule = create_schedule(optimizer, options, total_steps=40, steps_per_epoch=10)
    for step in range(41):
        schedule.step_update(step)
        if step < 10:
            expected = 0.01 + (0.1 - 0.01) * step / 10
        else:
            expected = 0.02 + 0.08 * (1 + math.cos(math.pi * step / 40)) / 2
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(expected * group["lr_scale"])
    scales = scales_by_name(target, optimizer)
    decay = layer_decay or 1.0
    assert scales["head.weight"] == scales["head.bias"] == 7.0
    assert scales["norm.weight"] == decay
    assert scales["blocks.1.attn.qkv.weight"] == decay
    assert scales["blocks.0.mlp.fc1.bias"] == decay**2
    assert scales["patch_embed.proj.weight"] == scales["cls_token"] == decay**3


def test_weight_decay_spares_norms_biases_and_embeddings(make_options):
    target = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3, **TINY)
    optimizer = create_optimizer(target, make_options(weight_decay=0.3))
    names = {id(parameter): name for name, parameter in target.named_parameters()}
    decayed = {names[id(p)] for g in optimizer.param_groups if g["weight_decay"] == 0.3 for p in g["params"]}
    assert decayed == {
        name
        for name, parameter in target.named_parameters()
        if parameter.ndim > 1 and name not in ("cls_token", "pos_embed")
    }


def test_both_heads_of_a_distilled_model_have_the_heads_learning_rate(make_options):
    target = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=1, num_classes=3)
    optimizer = create_optimizer(target, make_options(head_lr_mult=7.0))
    scales = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in target.named_parameters():
        assert scales[id(parameter)] == (7.0 if name.startswith("head") else 1.0), name


def test_a_constant_schedule_warms_up_and_stays(make_options):
    options = make_options(sched="constant", lr=0.1, warmup_lr=0.0, warmup_steps=2)
    optimizer = create_optimizer(timm.create_model("test_vit", num_classes=3), options)
    schedule = create_schedule(optimizer, options, total_steps=10, steps_per_epoch=5)
    rates = []
    for step in range(11):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.0, 0.05] + [0.1] * 9)


def test_the_optimizer_holds_the_target_and_nothing_of_the_source(make_options):
    trainer = Trainer(make_options())
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in trainer.model.target.parameters()}


def test_training_leaves_the_source_and_moves_the_target(make_options):
    trainer = Trainer(make_options(epochs=1))
    before = {name: tensor.clone() for name, tensor in trainer.model.source.state_dict().items()}
    trainer.run()
    assert_equal(before, dict(trainer.model.source.state_dict()))
    after = trainer.model.target.state_dict()
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_it_learns(make_options):
    options = make_options(epochs=8, lr=5e-3, no_aug=True)
    assert finetune(options)["best_top1"] == 100.0
    rows = metrics_of(options)
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]


def test_metrics_have_a_row_per_evaluation_and_the_best_is_kept(make_options):
    options = make_options(epochs=4, val_interval=2, eval_metric="loss", lr=5e-3)
    summary = finetune(options)
    rows = metrics_of(options)
    assert [(row["epoch"], row["step"]) for row in rows] == [(2, 8), (4, 16)]
    best = min(rows, key=lambda row: row["val_loss"])
    assert summary["best_step"] == best["step"] == read_metadata(best_of(options))["step"]
    assert all(0 <= row["source_fraction"] <= 1 and row["images_per_second"] > 0 for row in rows)


@pytest.mark.parametrize(("p", "fraction"), [(0.0, 0.0), (1.0, 1.0), ([1.0, 0.0], 0.5)])
def test_the_fraction_of_source_blocks_is_counted(make_options, p, fraction):
    assert finetune(make_options(p=p, epochs=1))["source_fraction"] == fraction


def test_the_best_checkpoint_is_a_plain_timm_model_that_evaluates_as_it_did(make_options, folder):
    options = make_options()
    summary = finetune(options)
    path = str(best_of(options))
    model = timm.create_model(
        "vit_tiny_patch16_224", checkpoint_path=path, num_classes=3, img_size=32, **TINY
    )
    assert model.state_dict().keys() == load_file(path).keys()
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["classes"]) == ["ant", "bee", "cow"]
    again = evaluate_checkpoint(
        EvaluateOptions(checkpoint=path, data_dir=str(folder), workers=0, device="cpu", batch_size=4)
    )
    row = next(row for row in metrics_of(options) if row["step"] == summary["best_step"])
    assert (again["top1"], again["loss"]) == pytest.approx((row["top1"], row["val_loss"]))
    assert again["images"] == 9


def test_evaluation_takes_normalisation_from_the_checkpoint(make_options, folder):
    options = make_options(epochs=1, mean=[0.1, 0.2, 0.3], std=[0.9, 0.8, 0.7])
    finetune(options)
    assert read_metadata(best_of(options))["data_config"]["mean"] == [0.1, 0.2, 0.3]
    again = evaluate_checkpoint(
        EvaluateOptions(checkpoint=str(best_of(options)), data_dir=str(folder), workers=0, device="cpu")
    )
    assert again["loss"] == pytest.approx(metrics_of(options)[0]["val_loss"])


def test_evaluation_refuses_a_folder_of_other_classes(make_options, tmp_path):
    options = make_options(epochs=1)
    finetune(options)
    other = write_images(tmp_path / "other", {"val": 1}, classes=("ant", "bee", "dog"))
    with pytest.raises(ValueError, match=r"lacks 1 \(cow\) and adds 1 \(dog\)"):
        evaluate_checkpoint(EvaluateOptions(checkpoint=str(best_of(options)), data_dir=str(other), workers=0))


def test_evaluation_is_timms_forward_and_leaves_the_mode(make_options):
    trainer = Trainer(make_options())
    trainer.model.train()
    loader, options, world = trainer.evaluator.loaders["val"], trainer.options, trainer.world
    ours = evaluate(trainer.model, loader, options, world)
    assert trainer.model.training
    assert trainer.model.coins.step == 0
    assert ours == evaluate(trainer.model.target, loader, options, world)


def test_the_rate_follows_the_steps_to_the_end_of_the_cosine(make_options):
    options = make_options(lr=0.5, warmup_epochs=1, warmup_lr=0.1, opt="sgd", clip_grad=1e-3)
    rates = []
    trainer = Trainer(options)
    train_step = trainer._train_step

    def recording(*args):
        rates.append(trainer._lr())
        return train_step(*args)

    trainer._train_step = recording
    trainer.run()
    cosine = [0.25 * (1 + math.cos(math.pi * step / 12)) for step in range(4, 12)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, *cosine])
    assert trainer._lr() == 0.0


def test_the_speed_that_is_shown_counts_the_step_at_work(make_options, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr("stochca.train.time.perf_counter", lambda: float(next(clock)))
    shown = []
    trainer = Trainer(make_options(log_interval=1, epochs=1))
    with trainer._bar() as bar:
        bar.set_postfix_str = lambda text, refresh: shown.append(text.split(", ")[-1])
        trainer._epoch(bar, lambda row: None)
    assert shown == ["4 images/s"] * 4


def test_how_often_is_evaluated_does_not_change_training(make_options, tmp_path):
    often = weights_of(make_options(output=str(tmp_path / "often"), drop_path=0.2))
    seldom = weights_of(make_options(output=str(tmp_path / "seldom"), drop_path=0.2, val_interval=3))
    assert_equal(often, seldom)


def test_accumulated_gradients_are_those_of_the_joined_batch(make_options, tmp_path):
    common = {"p": 1.0, "opt": "sgd", "lr": 0.1, "no_aug": True, "steps": 2, "epochs": 1}
    joined = weights_of(make_options(output=str(tmp_path / "a"), batch_size=8, **common))
    parts = weights_of(make_options(output=str(tmp_path / "b"), batch_size=4, grad_accum_steps=2, **common))
    for name, tensor in joined.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-5, atol=1e-6)


def test_the_last_step_of_an_epoch_averages_the_batches_that_are_left(make_options):
    trainer = Trainer(make_options(grad_accum_steps=3, epochs=2))
    assert trainer.steps_per_epoch == 2
    trainer.run()
    assert (trainer.step, trainer.model.coins.step) == (4, 8)


def test_clipping_bounds_the_step(make_options):
    options = make_options(
        opt="momentum",
        momentum=0.0,
        weight_decay=0.0,
        lr=0.5,
        sched="constant",
        warmup_steps=0,
        clip_grad=0.01,
        steps=1,
    )
    trainer = Trainer(options)
    before = [p.detach().clone() for p in trainer.model.target.parameters()]
    trainer.run()
    moved = sum(
        (p - q).square().sum() for p, q in zip(before, trainer.model.target.parameters(), strict=True)
    )
    assert moved.sqrt().item() == pytest.approx(0.5 * 0.01, rel=1e-3)


def test_gradient_checkpointing_changes_no_weight(make_options, tmp_path):
    stored = weights_of(make_options(output=str(tmp_path / "a"), drop_path=0.2))
    recomputed = weights_of(make_options(output=str(tmp_path / "b"), drop_path=0.2, grad_checkpointing=True))
    assert_equal(stored, recomputed)


@pytest.mark.parametrize("options", [{}, {"amp": True}], ids=["float32", "bfloat16"])
def test_recomputation_changes_no_weight(make_options, tmp_path, options):
    stored = weights_of(make_options(output=str(tmp_path / "a"), **options))
    recomputed = weights_of(make_options(output=str(tmp_path / "b"), recompute=True, **options))
    assert_equal(stored, recomputed)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_trains_in_fp32_weights_near_those_of_fp32(make_options, tmp_path, dtype):
    full = weights_of(make_options(output=str(tmp_path / "a"), epochs=1, opt="sgd"))
    mixed = weights_of(
        make_options(output=str(tmp_path / "b"), epochs=1, opt="sgd", amp=True, amp_dtype=dtype)
    )
    assert not torch.equal(full["head.weight"], mixed["head.weight"])
    for name, tensor in full.items():
        torch.testing.assert_close(mixed[name], tensor, rtol=0.02, atol=0.002)


def test_steps_and_epochs_are_two_ways_to_say_how_long(make_options, tmp_path):
    by_epochs = weights_of(make_options(output=str(tmp_path / "a"), epochs=2))
    by_steps = weights_of(make_options(output=str(tmp_path / "b"), epochs=99, steps=8))
    assert_equal(by_epochs, by_steps)


def test_a_run_may_end_in_the_middle_of_an_epoch(make_options):
    options = make_options(steps=6)
    finetune(options)
    assert [(row["epoch"], row["step"]) for row in metrics_of(options)] == [(1, 4), (1.5, 6)]


@pytest.mark.parametrize(("log_interval", "step"), [(1, 2), (99, 4)])
def test_a_loss_that_is_not_finite_stops_the_run(make_options, log_interval, step):
    with pytest.raises(ValueError, match=f"the loss is nan at step {step}"):
        finetune(make_options(lr=1e30, opt="sgd", log_interval=log_interval, warmup_steps=0, epochs=5))


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_damaged_image_of_either_split_stops_the_run(make_options, tmp_path, split):
    root = write_images(tmp_path / "images", {"train": 3, "val": 2})
    bad = root / split / "bee" / "1.png"
    bad.write_bytes(bad.read_bytes()[:200])
    with pytest.raises(ValueError, match=f"cannot read image {bad}"):
        finetune(make_options(data_dir=str(root), batch_size=3, epochs=1))


def test_damaged_images_are_left_out_by_name_if_asked(make_options, tmp_path, capsys):
    root = write_images(tmp_path / "images", {"train": 3, "val": 2})
    bad = [root / "train" / "bee" / "1.png", root / "val" / "cow" / "0.jpg"]
    for path in bad:
        path.write_bytes(path.read_bytes()[:200])
    common = {"data_dir": str(root), "batch_size": 3, "epochs": 1}
    options = make_options(**common, skip_corrupt=True)
    assert finetune(options)["skipped"] == [str(path) for path in bad]
    assert f"2 unreadable images were left out so far: {bad[0]}, {bad[1]}" in capsys.readouterr().out
    result = evaluate_checkpoint(
        EvaluateOptions(
            checkpoint=str(best_of(options)), data_dir=str(root), workers=0, device="cpu", skip_corrupt=True
        )
    )
    assert (result["images"], result["skipped"]) == (5, [str(bad[1])])


def test_classes_that_differ_between_the_splits_are_named(make_options, tmp_path):
    root = write_images(tmp_path / "images", {"train": 2})
    write_images(root, {"val": 2}, classes=("ant", "cow"))
    with pytest.raises(
        ValueError, match=r"the split 'validation' has other classes than 'train': lacks 1 \(bee\)"
    ):
        finetune(make_options(data_dir=str(root)))


def test_tensorboard_gets_every_evaluation(make_options):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    options = make_options(log_tensorboard=True)
    finetune(options)
    events = event_accumulator.EventAccumulator(f"{options.output}/tensorboard")
    events.Reload()
    logged = [(event.step, event.value) for event in events.Scalars("top1")]
    assert logged == [(row["step"], pytest.approx(row["top1"])) for row in metrics_of(options)]


def test_missing_tensorboard_is_said(make_options, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"pip install stochca\[tensorboard\]"):
        finetune(make_options(log_tensorboard=True))


def test_a_checkpoint_of_another_model_is_refused_by_tensor_and_shape(make_options):
    options = make_options(epochs=1)
    finetune(options)
    other = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=4, **TINY)
    with pytest.raises(ValueError, match=r"head.bias wanted \(4,\), got \(3,\)"):
        load_weights(best_of(options), other, "a model of 4 classes")


def test_a_truncated_or_foreign_checkpoint_is_refused(make_options, tmp_path):
    options = make_options(epochs=1)
    finetune(options)
    whole = best_of(options).read_bytes()
    for size in (0, 4, 100, len(whole) - 1):
        best_of(options).write_bytes(whole[:size])
        with pytest.raises(ValueError, match="not a complete safetensors file"):
            read_metadata(best_of(options))
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        read_metadata(tmp_path / "nothing.safetensors")


def test_pretrained_weights_are_read_from_a_file_and_are_the_source(make_options, tmp_path):
    path = tmp_path / "weights.safetensors"
    pretrained = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=1000, **TINY)
    save_file(pretrained.state_dict(), path)
    trainer = Trainer(make_options(pretrained=True, pretrained_path=str(path)))
    for model in (trainer.model.target, trainer.model.source):
        assert torch.equal(model.blocks[1].mlp.fc1.weight, pretrained.blocks[1].mlp.fc1.weight)
    assert trainer.model.target.head.out_features == 3
