"""Optimizer and schedule of a fine-tuning run: timm's, with a learning rate of its own for the classifier."""

import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from stochca.config import OptimizerOptions


def create_optimizer(target: nn.Module, options: OptimizerOptions) -> torch.optim.Optimizer:
    """The optimizer of timm, with a learning rate of its own for the classifier.

    Layer decay and the classifier's factor are `lr_scale` of a parameter group, by which timm's schedulers
    multiply the learning rate in every step.
    """
    no_decay = target.no_weight_decay()  # type: ignore[operator]
    head = {id(parameter) for parameter in target.get_classifier().parameters()}  # type: ignore[operator]
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
    return create_optimizer_v2(split, opt=options.opt, lr=options.lr, momentum=options.momentum)


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
