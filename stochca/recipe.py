"""What a run is made of, from its options: images, model, optimizer and schedule, each of them timm's."""

from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_data_config
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from stochca.config import FinetuneOptions, OptimizerOptions
from stochca.data import Images, check_classes, open_images
from stochca.model import StochCA
from stochca.vit import TimmViT

# Of torch: one kernel for all parameters, on the CPU too.
_FUSED = ("adam", "adamw", "sgd")


def create_model(options: FinetuneOptions, num_classes: int) -> StochCA:
    """The model that the options describe."""
    overlay: dict[str, Any] = {}
    if (path := options.pretrained_path) is not None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"--pretrained-path {path} is not a file")
        # timm's own loader of JAX weights is for those alone.
        overlay = {"pretrained_cfg_overlay": {"file": path, "custom_load": path.endswith(".npz")}}
    try:
        model = StochCA.from_timm(
            options.model,
            pretrained=options.pretrained,
            p=options.p,
            per=options.per,
            mode=options.mode,
            seed=options.seed,
            recompute=options.recompute,
            source_dtype=options.source_dtype or (options.amp_dtype if options.amp else None),
            impl=options.impl,
            drop_path_rate=options.drop_path,
            **overlay,
            **target_kwargs(options, num_classes),
        )
    except (RuntimeError, TypeError, ImportError) as error:
        # An unknown name or argument, weights that are not there or do not fit, no plain ViT, or no torchao.
        raise ValueError(f"cannot create {options.model}: {error}") from error
    model.set_grad_checkpointing(options.grad_checkpointing)
    if options.torchcompile:
        model.compile()
    return model


def target_kwargs(options: FinetuneOptions, num_classes: int) -> dict[str, Any]:
    """What `timm.create_model` needs besides the name to build the target that a checkpoint fits."""
    size = {"img_size": options.img_size} if options.img_size else {}
    return {**options.model_kwargs, **size, "num_classes": num_classes}


def open_splits(options: FinetuneOptions) -> tuple[Images, Images]:
    """The images to train on and those to evaluate on, of the same classes."""
    where = (options.data_dir, options.dataset)
    how: dict[str, Any] = {"seed": options.seed, "download": options.dataset_download}
    train = open_images(*where, options.train_split, is_training=True, **how)
    val = open_images(*where, options.val_split, is_training=False, **how)
    check_classes(train.classes, val.classes, f"the split {options.val_split!r}", repr(options.train_split))
    return train, val


def resolve_preparation(options: FinetuneOptions, target: nn.Module) -> dict[str, Any]:
    """Size, normalisation, crop and interpolation of the images: the options', else the model's."""
    given = {name: getattr(options, name) for name in ("mean", "std", "crop_pct", "interpolation")}
    given["img_size"] = options.img_size
    for name in ("mean", "std"):
        if given[name] is not None and len(given[name]) not in (1, 3):
            raise ValueError(f"--{name} must be one number or one per channel (3), got {given[name]}")
    return resolve_data_config(given, model=target)


def create_optimizer(target: TimmViT, options: OptimizerOptions) -> torch.optim.Optimizer:
    """The optimizer of timm, with a learning rate of its own for the classifier.

    Layer decay and the classifier's factor are `lr_scale` of a parameter group, by which timm's schedulers
    multiply the learning rate in every step.
    """
    no_decay = target.no_weight_decay()
    classifier = target.get_classifier()  # distilled models have two, in a tuple
    heads = classifier if isinstance(classifier, tuple) else (classifier,)
    head = {id(parameter) for module in heads for parameter in module.parameters()}
    if not head:
        raise ValueError(f"{type(target).__name__} has no classifier to train")
    if options.layer_decay is None:
        groups = param_groups_weight_decay(target, options.weight_decay, no_weight_decay_list=no_decay)
    else:
        groups = param_groups_layer_decay(
            target, options.weight_decay, no_weight_decay_list=no_decay, layer_decay=options.layer_decay
        )
    split = []
    for group in groups:
        for in_head, factor in ((False, 1.0), (True, options.head_lr_mult)):
            parameters = [p for p in group["params"] if (id(p) in head) == in_head]
            if parameters:
                scale = group.get("lr_scale", 1.0) * factor
                split.append({**group, "params": parameters, "lr_scale": scale})
    fused = {"fused": True} if options.opt in _FUSED else {}
    return create_optimizer_v2(split, opt=options.opt, lr=options.lr, momentum=options.momentum, **fused)


def create_schedule(
    optimizer: torch.optim.Optimizer, options: OptimizerOptions, total_steps: int, steps_per_epoch: int
) -> Scheduler:
    """The scheduler of timm, over optimizer steps."""
    warmup = options.warmup_steps
    if warmup is None:
        warmup = round(options.warmup_epochs * steps_per_epoch)
    is_constant = options.sched == "constant"
    scheduler, _ = create_scheduler_v2(
        optimizer,
        # A step schedule that never steps; timm's "constant" is younger.
        sched="step" if is_constant else options.sched,
        decay_epochs=total_steps,
        decay_rate=1.0,
        num_epochs=total_steps,
        min_lr=options.min_lr,
        warmup_lr=options.warmup_lr,
        warmup_epochs=min(warmup, total_steps - 1),
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    return scheduler
