"""What a run is made of, from its options: model, loss, optimizer and schedule, each of them timm's."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from timm.data import Mixup, resolve_data_config
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.distributed.tensor import DTensor

from stochca.config import LossOptions, OptimizerOptions, RecipeOptions, StochCAOptions
from stochca.lora import add_adapters
from stochca.losses import Companion, create_losses, read_source_head
from stochca.model import StochCA
from stochca.objective import Objective
from stochca.precision import SourceDtype
from stochca.vit import TimmViT
from stochca.weights.pair import create_pair

# Of torch: one kernel for all parameters, on the CPU too.
_FUSED = ("adam", "adamw", "sgd")
_FUSED_SHARDED = ("adam", "adamw")


def create_model(options: RecipeOptions, num_classes: int) -> StochCA:
    """The model that the options describe, whose source has its pretrained head where a loss reads that.

    Raises:
        FileNotFoundError: No file of weights.
        ValueError: The model, its weights or an option do not fit.
    """
    try:
        target, source = create_pair(options, num_classes, keep_head=read_source_head(options.losses))
        if options.mean or options.std:  # what a source of its own is renormalised from
            config = resolve_preparation(options, target)
            target.pretrained_cfg = {**target.pretrained_cfg, "mean": config["mean"], "std": config["std"]}
        if options.lora_rank:
            add_adapters(
                target, options.lora_targets, options.lora_rank, options.lora_alpha, options.lora_dropout
            )
        model = StochCA(
            target,
            source,
            options.p,
            per=options.per,
            mode=options.mode,
            seed=options.seed,
            recompute=options.recompute,
            source_dtype=_source_dtype(options),
            impl=options.impl,
        )
    except (RuntimeError, TypeError, ImportError) as error:
        # An unknown name or argument, weights that are not there or do not fit, no plain ViT, or no torchao.
        raise ValueError(f"cannot create {options.model}: {error}") from error
    model.set_grad_checkpointing(options.grad_checkpointing)
    if options.torchcompile:
        model.compile()
    return model


def _source_dtype(options: RecipeOptions) -> SourceDtype | None:
    """What the source's weights are held in: the dtype of the steps, where they are not the target's."""
    if options.lora_rank:
        return None
    return options.source_dtype or (options.amp_dtype if options.amp else None)


def target_kwargs(options: RecipeOptions, num_classes: int) -> dict[str, Any]:
    """What `timm.create_model` needs besides the name to build the target that a checkpoint fits."""
    size = {"img_size": options.img_size} if options.img_size else {}
    return {**options.model_kwargs, **size, "num_classes": num_classes}


def probability(options: StochCAOptions, draws_per_epoch: int, epochs: int) -> Callable[[int], float] | Any:
    """The probability that a block reads the source: constant, or by the number of the draw.

    Raises:
        ValueError: The schedule ends before the run.
    """
    schedule = options.p_schedule
    if schedule is None:
        return options.p
    if len(schedule) < epochs:
        raise ValueError(
            f"--p-schedule has to name a probability for each of {epochs} epochs, got {len(schedule)}"
        )
    return lambda draw: schedule[draw // draws_per_epoch]


def create_mixup(options: LossOptions, num_classes: int) -> Mixup | None:
    """Mixup and cutmix of whole batches, by timm; None where neither is asked for."""
    if not (options.mixup or options.cutmix):
        return None
    return Mixup(
        mixup_alpha=options.mixup,
        cutmix_alpha=options.cutmix,
        prob=options.mixup_prob,
        switch_prob=options.mixup_switch_prob,
        mode=options.mixup_mode,
        label_smoothing=options.smoothing,
        num_classes=num_classes,
    )


def create_objective(options: LossOptions, model: StochCA) -> Objective:
    """The loss that the options describe, on the model's device."""
    # Mixed labels are smoothed as they are mixed.
    is_mixed = options.mixup or options.cutmix
    criterion = (
        SoftTargetCrossEntropy() if is_mixed else nn.CrossEntropyLoss(label_smoothing=options.smoothing)
    )
    try:
        losses = create_losses(options.losses, model)
    except ImportError as error:
        raise ValueError(f"--losses: {error}") from error
    device = next(model.parameters()).device
    return Objective(model, criterion, losses).to(device)


def resolve_preparation(options: RecipeOptions, target: nn.Module) -> dict[str, Any]:
    """Size, normalisation, crop and interpolation of the images: the options', else the model's."""
    given = {
        name: getattr(options, name) for name in ("mean", "std", "crop_pct", "crop_mode", "interpolation")
    }
    given["img_size"] = options.img_size
    for name in ("mean", "std"):
        if given[name] is not None and len(given[name]) not in (1, 3):
            raise ValueError(f"--{name} must be one number or one per channel (3), got {given[name]}")
    return resolve_data_config(given, model=target)


def create_optimizer(
    target: TimmViT, options: OptimizerOptions, losses: Iterable[Companion] = ()
) -> torch.optim.Optimizer:
    """The optimizer of timm, with learning rates of their own for the classifier and for losses.

    Layer decay and these factors are `lr_scale` of a parameter group, by which timm's schedulers multiply the
    learning rate in every step.
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
    for loss in losses:
        for group in param_groups_weight_decay(loss, options.weight_decay):
            if group["params"]:
                split.append({**group, "lr_scale": loss.lr_mult})
    is_sharded = any(isinstance(p, DTensor) for p in target.parameters())
    fused = {"fused": True} if options.opt in (_FUSED_SHARDED if is_sharded else _FUSED) else {}
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
