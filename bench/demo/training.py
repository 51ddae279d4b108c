"""Pretraining the source, and one fine-tuning run."""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
from timm.models import VisionTransformer
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from bench.demo.digits import NUM_CLASSES, Images, Labels, Parts, Task, augment, draw_task
from stochca import StochCA

ARCHITECTURE: dict[str, Any] = {
    "model_name": "vit_tiny_patch16_224",
    "img_size": 8,
    "patch_size": 2,
    "in_chans": 1,
    "embed_dim": 64,
    "depth": 4,
    "num_heads": 4,
    "num_classes": NUM_CLASSES,
}
"""Arguments of `timm.create_model`: 17 tokens of width 64."""


@dataclass(frozen=True)
class Recipe:
    """How a model is optimised: AdamW, and a cosine learning rate after a linear warm-up.

    Args:
        steps: Number of batches.
        batch_size: Images in each.
        lr: Peak learning rate.
        augmentation: Strength, see `augment`.
        weight_decay: AdamW's.
        warmup: Length of the warm-up, as a share of the steps.
    """

    steps: int
    batch_size: int
    lr: float
    augmentation: float
    weight_decay: float = 0.05
    warmup: float = 0.05


@dataclass(frozen=True)
class Variant:
    """A way to fine-tune.

    Args:
        name: As in the table.
        p: StochCA's probability that a block reads the source; None trains the plain timm model.
        drop_path: timm's `drop_path_rate`.
        share: The share of the recipe's steps that is taken, under a schedule of that length.
    """

    name: str
    p: float | None = None
    drop_path: float = 0.0
    share: float = 1.0


@dataclass(frozen=True)
class Run:
    """One fine-tuning run: everything it depends on but the source and the images.

    Args:
        variant: The way.
        labels: What it is trained on.
        recipe: How it is optimised.
        seed: Of the images, replaced labels, batches, augmentation, head and coins.
    """

    variant: Variant
    labels: Labels
    recipe: Recipe
    seed: int

    @property
    def steps(self) -> int:
        """How many steps it takes."""
        return round(self.variant.share * self.recipe.steps)


@dataclass(frozen=True)
class Result:
    """What a run gave.

    Args:
        accuracy: Of the target alone, on the target's test images.
        accuracy_on_source: The same where every block reads the source.
        source_fraction: Mean share of the source's blocks that ran in a step.
    """

    accuracy: float
    accuracy_on_source: float
    source_fraction: float


def build_model(seed: int = 0, drop_path: float = 0.0) -> VisionTransformer:
    """A timm ViT with random weights.

    timm's position embeddings (standard deviation 0.02) leave a model this small at half the accuracy.
    """
    torch.manual_seed(seed)
    model = timm.create_model(**ARCHITECTURE, drop_path_rate=drop_path, weight_init="moco")
    nn.init.normal_(model.pos_embed, std=0.5)
    return model


def pretrain(images: Images, recipe: Recipe, seed: int = 0) -> VisionTransformer:
    """Train the source from scratch on augmented images, with a progress bar."""
    model = build_model(seed)
    generator = torch.Generator().manual_seed(seed)
    batches = torch.randint(len(images.labels), (recipe.steps, recipe.batch_size), generator=generator)
    data = augmented(images, batches, recipe.augmentation, generator)
    for _ in tqdm(train(model, data, recipe), "pretrain on digits 0-4", recipe.steps, unit="step"):
        pass
    return model.eval()


def finetune(run: Run, parts: Parts, source: nn.Module) -> tuple[Result, nn.Module]:
    """Fine-tune the source on the target's digits; return the numbers and the plain timm target."""
    target, model = prepare(run.variant, source, run.seed)
    task = draw_task(parts.target_pool, run.labels, run.recipe.steps, run.recipe.batch_size, run.seed)
    recipe = replace(run.recipe, steps=run.steps)
    fractions = [
        model.plan.source_fraction if isinstance(model, StochCA) and model.plan else 0.0
        for _ in train(model, task_batches(task, recipe), recipe)
    ]
    reader = StochCA(target, source)
    result = Result(
        accuracy=accuracy(target, parts.target_test),
        accuracy_on_source=accuracy(reader, parts.target_test, coins=[True] * ARCHITECTURE["depth"]),
        source_fraction=sum(fractions) / len(fractions),
    )
    return result, target


def prepare(variant: Variant, source: nn.Module, seed: int) -> tuple[nn.Module, nn.Module]:
    """The pretrained target with a new head: alone, and as it is trained.

    Args:
        variant: The way it will be fine-tuned.
        source: The pretrained model.
        seed: Of the head, the coins, and what drop path drops.
    """
    target = build_model(seed, variant.drop_path)
    target.load_state_dict({**source.state_dict(), **target.get_classifier().state_dict(prefix="head.")})
    if variant.p is None:
        return target, target
    return target, StochCA(target, copy.deepcopy(source), p=variant.p, seed=seed)


def task_batches(task: Task, recipe: Recipe) -> Iterator[tuple[Tensor, Tensor]]:
    """Pixels and labels of as many of the task's batches as the recipe has steps."""
    generator = torch.Generator().manual_seed(task.seed)
    return augmented(task.train, task.batches[: recipe.steps], recipe.augmentation, generator)


def augmented(
    images: Images, batches: Tensor, strength: float, generator: Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented pixels, and labels, of rows `[steps, batch_size]`."""
    return ((augment(images.pixels[rows], strength, generator), images.labels[rows]) for rows in batches)


def train(model: nn.Module, data: Iterable[tuple[Tensor, Tensor]], recipe: Recipe) -> Iterator[int]:
    """Train on `data`, and yield after each step how many there were."""
    optimizer = create_optimizer_v2(
        model, opt="adamw", lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True
    )
    scheduler = CosineLRScheduler(
        optimizer, t_initial=recipe.steps, warmup_t=round(recipe.warmup * recipe.steps), t_in_epochs=False
    )
    for step, (pixels, labels) in enumerate(data, start=1):
        model.train()
        F.cross_entropy(model(pixels), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step_update(step)
        yield step


@torch.inference_mode()
def accuracy(model: nn.Module, images: Images, **options: Any) -> float:
    """Share of images that is classified correctly in eval mode; options go to `model.forward`."""
    predicted = model.eval()(images.pixels, **options).argmax(dim=1)
    return (predicted == images.labels).double().mean().item()
