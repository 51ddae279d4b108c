"""Evaluation: the target alone, each image once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stochca.checkpoint import load_state_dict, read_checkpoint
from stochca.config import DeviceOptions, EvaluateOptions, RecipeOptions
from stochca.data import Images, ImageStream, check_classes, make_loader, open_images
from stochca.distributed import World, resolve_device
from stochca.run_data import RunData, evaluation_loader
from stochca.weights.creation import create_plain


def autocast(options: DeviceOptions, device: torch.device) -> torch.autocast:
    """The precision of `--amp` and `--amp-dtype`."""
    return torch.autocast(device.type, getattr(torch, options.amp_dtype), enabled=options.amp)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Any,
    options: DeviceOptions,
    world: World,
    *,
    skip_corrupt: bool = False,
    should_stop: Callable[[], object] = lambda: None,
) -> dict[str, float] | None:
    """Loss and accuracy over a whole split, each image counted once, whatever the number of processes.

    Args:
        model: Called in eval mode; its mode is restored.
        loader: Of `make_loader`.
        options: For `amp` and `amp_dtype`.
        world: The processes, each of which reads a part of the split.
        skip_corrupt: Leave out images that cannot be read.
        should_stop: Asked before every batch of a single process.

    Returns:
        `loss` (mean cross-entropy, in nats), `top1` and `top5` (percent), `images` (their number); None if
        stopped.

    Raises:
        ValueError: An image is unreadable, unless `skip_corrupt`; or all of them are.
    """
    images: Images = loader.dataset
    loss, correct = 0.0, torch.zeros(3, dtype=torch.int64)
    was_training = model.training
    model.eval()
    try:
        for batch, target in loader:
            if world.size == 1 and should_stop():
                return None
            if not skip_corrupt:
                images.check_readable()
            batch, target = batch.to(world.device), target.to(world.device)
            if skip_corrupt:
                batch, target = batch[target >= 0], target[target >= 0]
            if not len(target):
                continue
            with autocast(options, world.device):
                logits = model(batch)
            loss += nn.functional.cross_entropy(logits.float(), target, reduction="sum").item()
            ranks = logits.topk(min(5, logits.shape[1]), dim=1).indices == target[:, None]
            correct += torch.tensor([ranks[:, 0].sum(), ranks.sum(), len(target)])
    finally:
        model.train(was_training)
    sums = world.sum(torch.tensor([loss, *correct.tolist()], dtype=torch.float64)).tolist()
    count = int(sums[3])
    if not count:
        raise ValueError(f"none of the {len(images)} images can be read, the first is {images.name(0)}")
    return {
        "loss": sums[0] / count,
        "top1": 100 * sums[1] / count,
        "top5": 100 * sums[2] / count,
        "images": count,
    }


class Evaluator:
    """Evaluates models on the splits of a run.

    Args:
        data: Of the run.
        data_config: How its images are prepared.
        options: Of the run.
        world: Its processes.
    """

    def __init__(
        self, data: RunData, data_config: dict[str, Any], options: RecipeOptions, world: World
    ) -> None:
        self.data, self.data_config, self.options, self.world = data, data_config, options, world
        self.loaders = {name: self._loader(images) for name, images in data.evaluations.items()}

    def splits(
        self, model: nn.Module, should_stop: Callable[[], object] = lambda: None
    ) -> dict[str, dict[str, float]] | None:
        """The results of `evaluate` on each split; None if stopped."""
        results = {}
        for name, loader in self.loaders.items():
            result = self._evaluate(model, loader, should_stop)
            if result is None:
                return None
            results[name] = result
        return results

    def test(self, model: nn.Module) -> dict[str, float]:
        """The result of `evaluate` on the images that have selected nothing."""
        assert self.data.test is not None
        result = self._evaluate(model, self._loader(self.data.test))
        assert result is not None  # nobody stops it
        return result

    def _loader(self, images: Images | ImageStream) -> Any:
        return evaluation_loader(images, self.data_config, self.options, self.world)

    def _evaluate(
        self, model: nn.Module, loader: Any, should_stop: Callable[[], object] = lambda: None
    ) -> dict[str, float] | None:
        skip_corrupt = self.options.skip_corrupt
        return evaluate(
            model, loader, self.options, self.world, skip_corrupt=skip_corrupt, should_stop=should_stop
        )


def rebuild(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The plain timm model of a checkpoint of `stochca finetune`, with its weights, and the metadata.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not a checkpoint of `stochca finetune`, or a damaged one.
    """
    state_dict, metadata = read_checkpoint(path)
    try:
        model = create_plain(metadata)
    except (AssertionError, RuntimeError, TypeError) as error:
        raise ValueError(f"cannot create {metadata['model']}, the model of {path}: {error}") from error
    load_state_dict(model, state_dict, f"{path} does not fit {metadata['model']}")
    return model, metadata


def evaluate_checkpoint(options: EvaluateOptions) -> dict[str, Any]:
    """Evaluate a checkpoint of `stochca finetune` on a dataset.

    Model, classes and normalisation come from the checkpoint.

    Returns:
        What `evaluate` returns, the model's name, and `skipped`, the images that could not be read.
    """
    path = Path(options.checkpoint)
    model, metadata = rebuild(path)
    world = World(resolve_device(options.device))
    images = open_images(
        options.data_dir,
        options.dataset,
        options.val_split,
        is_training=False,
        download=options.dataset_download,
    )
    check_classes(metadata["classes"], images.classes, options.data_dir or options.dataset, str(path))
    loader, _ = make_loader(
        images, metadata["data_config"], options.batch_size, device=world.device, workers=options.workers
    )
    model.to(world.device)
    result = evaluate(model, loader, options, world, skip_corrupt=options.skip_corrupt)
    assert result is not None
    return {"model": metadata["model"], **result, "skipped": images.unreadable_names()}
