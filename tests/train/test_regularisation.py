"""What regularises a run, and what its weights start from: each option does what it says."""

import math
from pathlib import Path

import pytest
import timm
import torch
from image_folder import TINY
from interruption import assert_resumes, read_metrics, record_steps
from PIL import Image
from safetensors.torch import load_file
from torchvision.models.vision_transformer import interpolate_embeddings

from stochca.checkpoint import load_state
from stochca.losses import CoTuning
from stochca.train import Trainer, finetune

CLASSES = 3
SOURCE_CLASSES = 7


def save_pretrained(path, **kwargs):
    """A file of weights, of a model with classes of its own."""
    torch.manual_seed(5)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=SOURCE_CLASSES, **{**TINY, **kwargs})
    torch.save(model.state_dict(), path)
    return model


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
