"""What regularises, ends or selects a run, and what its weights start from: each option does what it says."""

import math
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from image_folder import TINY, write_images
from interruption import assert_same_run, read_metrics, resumed, stop_after
from PIL import Image
from safetensors.torch import load_file
from torchvision.models.vision_transformer import interpolate_embeddings

import stochca.memory
from stochca.checkpoint import load_state
from stochca.losses import CoTuning
from stochca.model import StochCA
from stochca.progress import Interrupted
from stochca.train import Trainer, finetune

CLASSES = 3
SOURCE_CLASSES = 7


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


def save_pretrained(path, **kwargs):
    """A file of weights, of a model with classes of its own."""
    torch.manual_seed(5)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=SOURCE_CLASSES, **{**TINY, **kwargs})
    torch.save(model.state_dict(), path)
    return model


# Mixup and cutmix


def next_batch(trainer):
    """A batch as it is read, and as a step gets it."""
    trainer.sampler.epoch = trainer.sampler.start = 0
    plain = [t.clone() for t in next(iter(trainer.loader))]
    trainer.sampler.epoch = trainer.sampler.start = 0
    return plain, trainer._next(iter(trainer.loader))


def shares_of(images, mixed):
    """The share of each image in what it was mixed to, `[B]`."""
    ratio = (mixed - images.flip(0)) / (images - images.flip(0))
    return ratio.flatten(1).nanmedian(dim=1).values


def mixed_labels(labels, shares, smoothing=0.0):
    one_hot = (1 - smoothing) * F.one_hot(labels, CLASSES) + smoothing / CLASSES
    return shares * one_hot + (1 - shares) * one_hot.flip(0)


@pytest.mark.parametrize(
    ("mode", "smoothing"), [("batch", 0.0), ("batch", 0.3), ("pair", 0.0), ("elem", 0.3)]
)
def test_mixup_mixes_images_and_labels_by_the_same_shares(make_options, mode, smoothing):
    trainer = Trainer(make_options(mixup=1.0, smoothing=smoothing, mixup_mode=mode))
    (images, labels), (mixed, soft) = next_batch(trainer)
    shares = shares_of(images, mixed)
    assert ((shares > 0.001) & (shares < 0.999)).all()
    each = shares[:, None, None, None]
    torch.testing.assert_close(mixed, each * images + (1 - each) * images.flip(0), rtol=1e-3, atol=1e-3)
    expected = mixed_labels(labels, shares[:, None], smoothing)
    torch.testing.assert_close(soft, expected, rtol=1e-3, atol=1e-3)
    assert len(labels.unique()) > 1
    number = {"batch": 1, "pair": 2, "elem": 4}[mode]
    assert len((1000 * shares).round().unique()) == number


def test_cutmix_pastes_a_box_and_labels_by_its_area(make_options):
    trainer = Trainer(make_options(cutmix=1.0, smoothing=0.0))
    (images, labels), (mixed, soft) = next_batch(trainer)
    pasted = (mixed != images).any(dim=1).any(dim=0)  # [H, W]
    rows, columns = pasted.any(dim=1).nonzero()[:, 0], pasted.any(dim=0).nonzero()[:, 0]
    box = (..., slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1))
    expected = images.clone()
    expected[box] = images.flip(0)[box]
    assert torch.equal(mixed, expected)
    area = len(rows) * len(columns) / pasted.numel()
    assert 0 < area < 1
    torch.testing.assert_close(soft, mixed_labels(labels, 1 - area))


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({"mixup": 1.0, "mixup_prob": 0.0}, 0.0),
        ({"mixup": 1.0, "cutmix": 1.0, "mixup_switch_prob": 0.0}, 1.0),
        ({"mixup": 1.0, "cutmix": 1.0, "mixup_switch_prob": 1.0}, 0.5),
    ],
)
def test_how_often_is_mixed_and_by_which_of_the_two(make_options, options, share):
    """Mixup changes whole images, cutmix a part."""
    (images, _), (mixed, _) = next_batch(Trainer(make_options(**options)))
    changed = (mixed != images).double().mean().item()
    assert changed == pytest.approx(share, abs=0.45 if share == 0.5 else 0.05)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_a_mixed_run_resumes_bitwise_equal(make_options, monkeypatch, tmp_path, mode):
    options = {"mixup": 0.4, "cutmix": 1.0, "mixup_mode": mode, "mixup_prob": 0.7, "mixup_off_epoch": 2}
    assert_resumes(make_options, monkeypatch, tmp_path, steps=(2, 7), **options)


def test_batches_are_mixed_until_the_epoch_that_says_so(make_options, monkeypatch):
    trainer = Trainer(make_options(mixup=1.0, mixup_off_epoch=2, smoothing=0.0))
    seen, forward = [], trainer.module.forward

    def spying(images, labels):
        seen.append(bool(((labels > 0) & (labels < 1)).any()))
        return forward(images, labels)

    monkeypatch.setattr(trainer.module, "forward", spying)
    trainer.run()
    assert any(seen[:4])
    assert any(seen[4:8])
    assert not any(seen[8:])


# Averages


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


# When a run evaluates, ends, and what it selects


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


# Probability


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_probability_follows_its_schedule_epoch_by_epoch(make_options, monkeypatch, accumulate):
    options = make_options(p_schedule=[1.0, 0.0, 1.0], grad_accum_steps=accumulate, p=0.25)
    trainer = Trainer(options)
    coins, draw = [], trainer.model.coins.draw

    def recording(*args):
        plan = draw(*args)
        coins.append(set(plan.coins))
        return plan

    monkeypatch.setattr(trainer.model.coins, "draw", recording)
    trainer.run()
    assert coins == 4 * [{True}] + 4 * [{False}] + 4 * [{True}]
    assert [row["source_fraction"] for row in read_metrics(options.output)] == [1.0, 0.0, 1.0]


def test_a_scheduled_run_resumes_bitwise_equal(make_options, monkeypatch, tmp_path):
    assert_resumes(make_options, monkeypatch, tmp_path, steps=(3, 6), p_schedule=[0.1, 0.9, 0.5])


@pytest.mark.parametrize(("length", "epochs"), [({"epochs": 4}, 4), ({"steps": 13}, 4)])
def test_a_schedule_that_ends_before_the_run_is_refused(make_options, length, epochs):
    with pytest.raises(ValueError, match=f"--p-schedule .* each of {epochs} epochs, got 3"):
        Trainer(make_options(p_schedule=[0.1, 0.2, 0.3], **length))
    Trainer(make_options(p_schedule=[0.1, 0.2, 0.3], steps=12))


# Losses beside cross-entropy, and the source that they read


MIRO = {"miro": {"weight": 0.5, "lr_mult": 5.0}}
CO_TUNING = {"co_tuning": {"relationship": "direct", "lr_mult": 2.0}}


@pytest.fixture
def own_head(monkeypatch, tmp_path):
    """Options whose architecture has 7 classes of its own, and weights with a head for them."""
    path = tmp_path / "weights.pt"
    model = save_pretrained(path, img_size=32)
    create = timm.create_model

    def create_with_classes(name, num_classes=SOURCE_CLASSES, **kwargs):
        overlay = {"num_classes": SOURCE_CLASSES, **kwargs.pop("pretrained_cfg_overlay", {})}
        return create(name, num_classes=num_classes, pretrained_cfg_overlay=overlay, **kwargs)

    monkeypatch.setattr(timm, "create_model", create_with_classes)
    return model, {"pretrained": True, "pretrained_path": str(path)}


@pytest.mark.parametrize("loss", [None, "l2_sp", "bss", MIRO, CO_TUNING, "distillation"])
def test_the_source_keeps_its_head_where_a_loss_reads_it(make_options, own_head, loss):
    pretrained, options = own_head
    reads = loss in (CO_TUNING, "distillation")
    model = Trainer(make_options(losses=[loss] if loss else [], **options)).model
    assert model.target.num_classes == CLASSES
    assert model.source.num_classes == (SOURCE_CLASSES if reads else CLASSES)
    if reads:
        assert torch.equal(model.source.head.weight, pretrained.head.weight)
    for body in (model.target, model.source):
        assert torch.equal(body.blocks[1].mlp.fc1.weight, pretrained.blocks[1].mlp.fc1.weight)
        assert torch.equal(body.norm.weight, pretrained.norm.weight)


def test_losses_are_terms_of_the_run(make_options):
    options = make_options(losses=["l2_sp", "bss", MIRO], lr=3e-3)
    plain = make_options(output=f"{options.output}-plain", lr=3e-3)
    trainer = Trainer(options)
    trainer.run()
    finetune(plain)
    rows = read_metrics(options.output)
    assert all(row["train_l2_sp"] > 0 and row["train_bss"] >= 0 for row in rows)
    assert all(math.isfinite(row["train_miro"]) for row in rows)
    assert {
        name.split(".")[0] for name in load_state(Path(options.output) / "trainer_state.pt")["losses"]
    } == {"2"}
    ours, theirs = (load_file(f"{o.output}/last.safetensors") for o in (options, plain))
    assert ours.keys() == theirs.keys()
    assert not torch.equal(ours["blocks.0.attn.qkv.weight"], theirs["blocks.0.attn.qkv.weight"])


def test_co_tuning_is_fitted_to_the_plain_training_images(make_options, own_head, folder):
    source, options = own_head
    trainer = Trainer(make_options(losses=[CO_TUNING], aa="rand-m9", **options))
    transform = timm.data.create_transform(**trainer.data_config, is_training=False)
    paths = sorted((folder / "train").glob("*/*"))
    logits = []
    for path in paths:
        with Image.open(path) as image:
            logits.append(source.eval()(transform(image.convert("RGB"))[None])[0].detach())
    logits = torch.stack(logits)
    labels = torch.tensor([["ant", "bee", "cow"].index(path.parent.name) for path in paths])
    expected = torch.stack([logits[labels == t].softmax(1).mean(0) for t in range(CLASSES)])
    (loss,) = trainer.objective.companions
    torch.testing.assert_close(loss.relationship, expected, rtol=1e-5, atol=1e-6)
    assert len(labels) == 18


def test_a_resumed_run_does_not_fit_again(make_options, own_head, monkeypatch, tmp_path):
    _, options = own_head
    fit, fits = CoTuning.fit, []
    monkeypatch.setattr(CoTuning, "fit", lambda *args: fits.append(1) or fit(*args))
    losses = [CO_TUNING, MIRO]
    assert_resumes(make_options, monkeypatch, tmp_path, steps=(2, 7), losses=losses, lr=3e-3, **options)
    assert len(fits) == 2  # of the run as a whole, and of the one that was stopped twice
    states = [load_state(tmp_path / name / "trainer_state.pt")["losses"] for name in ("whole", "parts")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], t) for name, t in states[1].items())
    assert not torch.equal(states[0]["0.head.weight"], own_head[0].head.weight)


def test_rates_of_layers_head_and_losses_keep_their_ratio_through_the_schedule(
    make_options, own_head, monkeypatch
):
    _, kwargs = own_head
    options = make_options(
        losses=[MIRO, CO_TUNING], layer_decay=0.5, head_lr_mult=3.0, lr=1e-3, warmup_lr=1e-4, min_lr=1e-5,
        warmup_steps=3, **kwargs,
    )  # fmt: skip
    trainer = Trainer(options)
    parameters = dict(trainer.objective.named_parameters())

    def rates(run):
        held = {id(p): group["lr"] for group in run.optimizer.param_groups for p in group["params"]}
        assert len(held) == len(parameters)
        return {name: held[id(p)] for name, p in parameters.items()}

    first = rates(trainer)
    found = record_steps(monkeypatch, trainer, rates)
    trainer.run()
    names = {
        "model.target.head.weight": 3.0,
        "model.target.norm.weight": 0.5,
        "model.target.blocks.1.attn.qkv.weight": 0.5,
        "model.target.blocks.0.attn.qkv.weight": 0.25,
        "model.target.patch_embed.proj.weight": 0.125,
        "losses.1.head.weight": 2.0,
        next(name for name in parameters if name.startswith("losses.0.")): 5.0,
    }
    for step, at_step in enumerate([first, *found]):
        if step < 3:
            rate = 1e-4 + (1e-3 - 1e-4) * step / 3
        else:
            rate = 1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * step / 12)) / 2
        for name, factor in names.items():
            assert at_step[name] == pytest.approx(factor * rate), (step, name)


# Position embeddings


def test_position_embeddings_are_resampled_as_torchvision_does_if_asked(make_options, tmp_path):
    """From 4 x 4 patches of 56 pixels to 6 x 6."""
    path = tmp_path / "weights.pt"
    kwargs = {**TINY, "patch_size": 56}
    own = save_pretrained(path, patch_size=56).pos_embed.detach()
    options = {"pretrained": True, "pretrained_path": str(path), "model_kwargs": kwargs, "img_size": 336}
    ours = Trainer(make_options(pos_embed_interpolation="torchvision", **options)).model
    timms = Trainer(make_options(**options)).model
    expected = interpolate_embeddings(336, 56, {"encoder.pos_embedding": own})["encoder.pos_embedding"]
    assert expected.shape == (1, 37, 32)
    for model in (ours.target, ours.source):
        assert torch.equal(model.pos_embed, expected)
    assert torch.equal(timms.target.pos_embed[:, :1], expected[:, :1])
    assert (timms.target.pos_embed - expected).abs().max() > 0.1 * expected.abs().max()


def test_weights_of_another_size_than_the_models_are_resampled_once(make_options, tmp_path):
    path = tmp_path / "weights.pt"
    own = save_pretrained(path, img_size=32).pos_embed.detach()
    options = {"pretrained": True, "pretrained_path": str(path), "pos_embed_interpolation": "torchvision"}
    same = Trainer(make_options(img_size=32, **options)).model
    assert torch.equal(same.target.pos_embed, own)
    larger = Trainer(make_options(img_size=48, **options)).model
    expected = interpolate_embeddings(48, 8, {"encoder.pos_embedding": own})["encoder.pos_embedding"]
    assert torch.equal(larger.target.pos_embed, expected)


@pytest.mark.parametrize(
    "kwargs", [{"class_token": False, "global_pool": "avg"}, {"no_embed_class": True}, {"reg_tokens": 2}]
)
def test_torchvisions_way_is_for_one_class_token(make_options, kwargs):
    with pytest.raises(ValueError, match="is for a position embedding with one class token"):
        Trainer(make_options(pos_embed_interpolation="torchvision", model_kwargs={**TINY, **kwargs}))


# The machine


@pytest.mark.parametrize(("tf32", "precision"), [(False, "highest"), (True, "high")])
def test_tf32_is_for_products_of_float32(make_options, tf32, precision):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        Trainer(make_options(tf32=tf32))
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.fixture
def limit_memory(monkeypatch):
    """Have the model run out of memory above some number of images."""

    def limit(images_that_fit):
        forward = StochCA.forward

        def limited(model, images, *args, **kwargs):
            if len(images) > images_that_fit:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return forward(model, images, *args, **kwargs)

        monkeypatch.setattr(StochCA, "forward", limited)

    return limit


@pytest.mark.parametrize(
    ("batch_size", "fits", "accumulate", "message"),
    [
        (16, 16, 1, None),
        (16, 11, 1, "at --batch-size 16; 8 fits: --batch-size 8 --grad-accum-steps 2 is a step of as many"),
        (18, 2, 3, "at --batch-size 18; 2 fits: --batch-size 2 --grad-accum-steps 27 is"),
        (6, 1, 1, "at --batch-size 6; 1 fits: --batch-size 1 --grad-accum-steps 6 is"),
        (16, 0, 1, "at --batch-size 16, and not even one image fits: --recompute, --grad-checkpointing"),
    ],
)
def test_out_of_memory_says_what_fits(make_options, limit_memory, batch_size, fits, accumulate, message):
    limit_memory(fits)
    # One step in the last epoch of a schedule, after which nothing is to be drawn.
    options = make_options(
        batch_size=batch_size, grad_accum_steps=accumulate, epochs=1, steps=1, p_schedule=[0.5]
    )
    trainer = Trainer(options)
    before = [p.detach().clone() for p in trainer.model.target.parameters()]
    if message is None:
        trainer.run()
        return
    with pytest.raises(ValueError, match=f"^step 1: out of memory {message}"):
        trainer.run()
    for p, q in zip(trainer.model.target.parameters(), before, strict=True):
        assert torch.equal(p, q)
        assert p.grad is None


def test_what_fits_is_tried_with_the_coins_that_did_not(make_options, limit_memory, monkeypatch):
    trainer = Trainer(make_options())
    trainer.model.coins.step = 8  # drawn by the step that failed: 7
    steps, draw = [], trainer.model.coins.draw

    def recording(*args):
        steps.append(trainer.model.coins.step)
        return draw(*args)

    monkeypatch.setattr(trainer.model.coins, "draw", recording)
    limit_memory(1)
    limited = StochCA.forward

    def drawing(model, images, *args):
        model.coins.draw(len(images))
        return limited(model, images, *args)

    monkeypatch.setattr(StochCA, "forward", drawing)
    assert stochca.memory.largest_fitting(trainer.model.train(), (3, 32, 32), 8) == 1
    assert set(steps[:3]) == {7}
    assert trainer.model.coins.step == 8
