"""Evaluation: the target alone, each image once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.utils import AverageMeter, accuracy
from torch import nn

from stochca.checkpoint import load_weights, read_metadata
from stochca.config import DeviceOptions, EvaluateOptions, FinetuneOptions
from stochca.data import Images, check_classes, make_loader, open_images


def resolve_device(name: str) -> torch.device:
    """The device of a name; "auto" is the GPU if there is one."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    kind, count = (accelerator.type, torch.accelerator.device_count()) if accelerator else ("", 0)
    try:
        device = torch.device((kind or "cpu") if name == "auto" else name)
    except RuntimeError as error:
        raise ValueError(f"--device {name} is not a device: {error}") from error
    if device.type != "cpu" and (device.type != kind or (device.index or 0) >= count):
        held = f"cpu and {kind}, {count} of it" if kind else "cpu alone"
        raise ValueError(f"--device {name} is not there, this machine has {held}")
    return device


def autocast(options: DeviceOptions, device: torch.device) -> torch.autocast:
    """The precision of `--amp` and `--amp-dtype`."""
    return torch.autocast(device.type, getattr(torch, options.amp_dtype), enabled=options.amp)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Any,
    options: FinetuneOptions | EvaluateOptions,
    device: torch.device,
    should_stop: Callable[[], object] = lambda: None,
) -> dict[str, float] | None:
    """Loss and accuracy over a whole split.

    Args:
        model: Called in eval mode; its mode is restored.
        loader: Of `make_loader`.
        options: For `amp`, `amp_dtype` and `skip_corrupt`.
        device: Of the model.
        should_stop: Asked before every batch.

    Returns:
        `loss` (mean cross-entropy, in nats), `top1` and `top5` (percent), `images` (their number); None if
        stopped.

    Raises:
        ValueError: An image is unreadable, unless `options.skip_corrupt`; or all of them are.
    """
    images: Images = loader.dataset
    loss, top1, top5 = AverageMeter(), AverageMeter(), AverageMeter()
    was_training = model.training
    model.eval()
    try:
        for batch, target in loader:
            if should_stop():
                return None
            if not options.skip_corrupt:
                images.check_readable()
            batch, target = batch.to(device), target.to(device)
            if options.skip_corrupt:
                batch, target = batch[target >= 0], target[target >= 0]
            if not len(target):
                continue
            with autocast(options, device):
                logits = model(batch)
            at1, at5 = accuracy(logits, target, topk=(1, 5))
            loss.update(nn.functional.cross_entropy(logits.float(), target).item(), len(target))
            top1.update(at1.item(), len(target))
            top5.update(at5.item(), len(target))
    finally:
        model.train(was_training)
    if not loss.count:
        raise ValueError(f"none of the {len(images)} images can be read, the first is {images.name(0)}")
    return {"loss": loss.avg, "top1": top1.avg, "top5": top5.avg, "images": loss.count}


def evaluate_checkpoint(options: EvaluateOptions) -> dict[str, Any]:
    """Evaluate a checkpoint of `stochca finetune` on a dataset.

    Model, classes and normalisation come from the checkpoint.

    Returns:
        What `evaluate` returns, the model's name, and `skipped`: the images that could not be read.
    """
    path = Path(options.checkpoint)
    metadata = read_metadata(path)
    device = resolve_device(options.device)
    images = open_images(
        options.data_dir,
        options.dataset,
        options.val_split,
        is_training=False,
        download=options.dataset_download,
    )
    check_classes(metadata["classes"], images.classes, options.data_dir or options.dataset, str(path))
    model = timm.create_model(metadata["model"], **metadata["model_kwargs"])
    load_weights(path, model, metadata["model"])
    loader, _ = make_loader(
        images, metadata["data_config"], options.batch_size, device=device, workers=options.workers
    )
    result = evaluate(model.to(device), loader, options, device)
    assert result is not None
    return {"model": metadata["model"], **result, "skipped": images.unreadable_names()}
