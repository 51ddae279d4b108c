"""Every option of a run reaches what it is for."""

import dataclasses
import sys

import pytest
import torch
from image_folder import TINY

from stochca.config import changed_options
from stochca.distributed import resolve_device
from stochca.model import StochCA
from stochca.train import Trainer

CROP = "RandomResizedCropAndInterpolation"


def step_of(images, kind):
    """The step of that class among those that an image goes through; None if there is none."""
    return next((step for step in images.transform.transforms if type(step).__name__ == kind), None)


def in_training(kind, read):
    return lambda run: (step := step_of(run.data.train, kind)) and read(step)


def in_evaluation(kind, read):
    return lambda run: (step := step_of(run.data.evaluations["val"], kind)) and read(step)


# An option, a value that is not the default, and where to find it.
REACHES = [
    ("p", 0.25, lambda run: run.model.coins.p),
    ("per", "sample", lambda run: run.model.coins.per),
    ("mode", "mix", lambda run: run.model.coins.mode),
    ("seed", 7, lambda run: run.model.coins.seed),
    ("seed", 7, lambda run: run.data.train.seed),
    ("seed", 7, lambda run: run.sampler.seed),
    ("impl", "reference", lambda run: run.model.impl),
    ("drop_path", 0.3, lambda run: getattr(run.model.target.blocks[-1].drop_path1, "drop_prob", 0.0)),
    ("img_size", 40, lambda run: run.model.target.patch_embed.img_size[0]),
    ("img_size", 40, in_training(CROP, lambda step: step.size[0])),
    ("img_size", 40, in_evaluation("CenterCrop", lambda step: step.size[0])),
    ("model_kwargs", {**TINY, "depth": 3}, lambda run: {**TINY, "depth": len(run.model.target.blocks)}),
    ("grad_checkpointing", True, lambda run: run.model.target.grad_checkpointing),
    ("recompute", True, lambda run: run.model.recompute),
    ("source_dtype", "float32", lambda run: run.model.source_dtype),
    ("batch_size", 5, lambda run: run.loader.loader.batch_sampler.batch_size),
    ("batch_size", 5, lambda run: run.evaluator.loaders["val"].loader.batch_size),
    ("validation_batch_size", 7, lambda run: run.evaluator.loaders["val"].loader.batch_size),
    ("workers", 1, lambda run: run.loader.loader.num_workers),
    ("workers", 1, lambda run: run.evaluator.loaders["val"].loader.num_workers),
    ("mean", [0.1, 0.2, 0.3], lambda run: (run.loader.mean.flatten() / 255).tolist()),
    ("mean", [0.1, 0.2, 0.3], lambda run: (run.evaluator.loaders["val"].mean.flatten() / 255).tolist()),
    ("std", [0.1, 0.2, 0.3], lambda run: (run.loader.std.flatten() / 255).tolist()),
    ("std", [0.1, 0.2, 0.3], lambda run: (run.evaluator.loaders["val"].std.flatten() / 255).tolist()),
    ("crop_pct", 0.5, in_evaluation("Resize", lambda step: 32 / step.size)),
    ("interpolation", "box", in_training(CROP, lambda step: step.interpolation.value)),
    ("interpolation", "box", in_evaluation("Resize", lambda step: step.interpolation.value)),
    ("no_aug", True, lambda run: step_of(run.data.train, CROP) is None),
    ("scale", [0.2, 0.3], in_training(CROP, lambda step: list(step.scale))),
    ("ratio", [1.2, 1.3], in_training(CROP, lambda step: list(step.ratio))),
    ("hflip", 0.3, in_training("RandomHorizontalFlip", lambda step: step.p)),
    ("color_jitter", 0.2, in_training("ColorJitter", lambda step: step.brightness[1] - 1)),
    ("aa", "rand-n4", in_training("RandAugment", lambda step: f"rand-n{step.num_layers}")),
    ("reprob", 0.3, in_training("RandomErasing", lambda step: step.probability)),
    ("smoothing", 0.3, lambda run: run.objective.criterion.label_smoothing),
    ("opt", "adamax", lambda run: type(run.optimizer).__name__.lower()),
    ("weight_decay", 0.3, lambda run: run.optimizer.param_groups[-1]["weight_decay"]),
    ("lr", 0.3, lambda run: run.optimizer.param_groups[0]["initial_lr"]),
    ("min_lr", 0.3, lambda run: run.schedule.lr_min),
    ("warmup_lr", 0.3, lambda run: run.schedule.warmup_lr_init),
    ("warmup_steps", 2, lambda run: run.schedule.warmup_t),
    ("warmup_epochs", 2, lambda run: run.schedule.warmup_t / 4),
    ("sched", "tanh", lambda run: type(run.schedule).__name__[:4].lower()),
    ("steps", 5, lambda run: run.total_steps),
    ("epochs", 5, lambda run: run.total_steps / 4),
]


@pytest.mark.parametrize(("name", "value", "read"), REACHES, ids=[name for name, _, _ in REACHES])
def test_an_option_reaches_what_it_is_for(make_options, name, value, read):
    assert read(Trainer(make_options(**{name: value}))) == pytest.approx(value)
    assert read(Trainer(make_options())) != pytest.approx(value)


def test_momentum_reaches_the_optimizer(make_options):
    optimizer = Trainer(make_options(opt="sgd", momentum=0.3)).optimizer
    assert {group["momentum"] for group in optimizer.param_groups} == {0.3}


@pytest.mark.parametrize(
    ("options", "held"),
    [
        ({}, None),
        ({"amp": True}, "bfloat16"),
        ({"amp": True, "amp_dtype": "float16"}, "float16"),
        ({"amp": True, "source_dtype": "float8"}, "float8"),
    ],
)
def test_the_source_is_held_in_what_steps_compute_in(make_options, options, held):
    assert Trainer(make_options(**options)).model.source_dtype == held


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source_dtype": "bfloat16"}, "steps in float32, which take float32"),
        ({"source_dtype": "float8"}, "steps in float32"),
        ({"source_dtype": "float32", "amp": True}, "steps in bfloat16, which take bfloat16 or float8"),
        ({"source_dtype": "float8", "amp": True, "amp_dtype": "float16"}, "which take float16:"),
    ],
)
def test_a_source_held_in_what_steps_do_not_compute_in_is_refused(make_options, options, message):
    with pytest.raises(ValueError, match=message):
        make_options(**options)


def test_float8_without_torchao_is_one_line(make_options, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(ValueError, match=r"cannot create .* torchao"):
        Trainer(make_options(amp=True, source_dtype="float8"))


def test_a_run_older_than_an_option_had_its_default(make_options):
    saved = dataclasses.asdict(make_options())
    del saved["recompute"], saved["source_dtype"]
    assert changed_options(saved, make_options()) == []
    assert changed_options(saved, make_options(recompute=True)) == ["--recompute was False, is True"]


@pytest.mark.parametrize("opt", ["adamw", "sgd", "lamb"])
def test_the_optimizer_is_fused_where_torch_has_it_fused(make_options, opt):
    optimizer = Trainer(make_options(opt=opt)).optimizer
    assert optimizer.defaults.get("fused", False) == (opt != "lamb")


@pytest.mark.parametrize("torchcompile", [False, True])
def test_the_model_is_compiled_if_asked(make_options, monkeypatch, torchcompile):
    compiled = []
    monkeypatch.setattr(StochCA, "compile", lambda model: compiled.append(model))
    run = Trainer(make_options(torchcompile=torchcompile))
    assert [id(model) for model in compiled] == [id(run.model)] * torchcompile


def test_the_device_is_one_that_the_machine_has(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    for name, device in {"auto": "cuda", "cuda": "cuda", "cuda:1": "cuda:1", "cpu": "cpu"}.items():
        assert resolve_device(name) == torch.device(device)
    for name in ("cuda:2", "meta", "xpu", "mps"):
        with pytest.raises(
            ValueError, match=f"--device {name} is not there, this machine has cpu and cuda, 2"
        ):
            resolve_device(name)
