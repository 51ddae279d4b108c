"""All runs of the demo, in worker processes, and the checkpoint of one of them."""

import functools
import json
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from bench.demo.digits import Labels, Parts, load_parts
from bench.demo.training import ARCHITECTURE, Recipe, Result, Run, Variant, build_model, finetune

PLAIN = Variant("plain")
STOCHCA = [Variant(f"StochCA p={p}", p=p) for p in (0.1, 0.3, 0.5)]
DROP_PATH = Variant("drop path 0.2", drop_path=0.2)
STOPPED = Variant("plain, 1/4 of the steps", share=0.25)
MEASURED = [PLAIN, *STOCHCA, DROP_PATH]  # the others' steps are the same as one of these
VARIANTS = [*MEASURED, STOPPED]

CHECKPOINT = "target.safetensors"
CHECKPOINT_OF = STOCHCA[1]


@dataclass(frozen=True)
class Settings:
    """Everything that decides what the demo measures.

    Args:
        seeds: How many; each has its own training images, replaced labels, batches, head and coins.
        clean_seeds: How many of them are trained on clean labels too.
        first_seed: The others follow. The setting was chosen on smaller ones.
        noisy: The labels of the accuracy comparison.
        clean: The labels of the mechanism.
        pretraining: Of the source.
        finetuning: Of every run.
        timed_steps: Steps of each variant whose time is taken.
        workers: Processes, each on one core.
    """

    seeds: int
    clean_seeds: int
    first_seed: int
    noisy: Labels
    clean: Labels
    pretraining: Recipe
    finetuning: Recipe
    timed_steps: int
    workers: int

    def runs(self) -> list[Run]:
        """Every variant on partly wrong labels, then plain and StochCA on clean ones; seed by seed."""
        return [
            Run(variant, labels, self.finetuning, seed)
            for labels, seeds, variants in (
                (self.noisy, self.seeds, VARIANTS),
                (self.clean, self.clean_seeds, [PLAIN, *STOCHCA]),
            )
            for seed in range(self.first_seed, self.first_seed + seeds)
            for variant in variants
        ]


DEFAULT = Settings(
    seeds=8,
    clean_seeds=6,
    first_seed=100,
    noisy=Labels(per_class=20, noise=0.4),
    clean=Labels(per_class=10, noise=0.0),
    pretraining=Recipe(steps=800, batch_size=32, lr=1e-3, augmentation=1.0),
    finetuning=Recipe(steps=400, batch_size=32, lr=3e-3, augmentation=0.7),
    timed_steps=100,
    workers=2,
)
QUICK = replace(
    DEFAULT,
    seeds=2,
    clean_seeds=2,
    pretraining=replace(DEFAULT.pretraining, steps=50),
    finetuning=replace(DEFAULT.finetuning, steps=12),
    timed_steps=10,
)
"""For a look at whether it runs: nothing is learned."""


def run_all(settings: Settings, source: nn.Module, output: Path) -> dict[Run, Result]:
    """Fine-tune every run, with a progress bar, and write the checkpoint.

    Args:
        settings: Which runs, and how many processes.
        source: The pretrained model; it is written to `output` too, where the processes read it.
        output: An existing folder.
    """
    runs = settings.runs()
    kept = next(run for run in runs if run.variant == CHECKPOINT_OF)
    save_file(source.state_dict(), output / "source.safetensors")
    with get_context("spawn").Pool(settings.workers, torch.set_num_threads, (1,)) as pool:
        results = pool.imap(functools.partial(run_one, output=output, kept=kept), runs)
        return dict(zip(runs, tqdm(results, "fine-tune on digits 5-9", len(runs), unit="run"), strict=True))


def run_one(run: Run, output: Path, kept: Run) -> Result:
    """One run, in a worker process; writes its target if it is the one that is kept."""
    source = build_model()
    source.load_state_dict(load_file(output / "source.safetensors"))
    parts = load_parts()
    result, target = finetune(run, parts, source)
    if run == kept:
        save_checkpoint(target, run, result, parts, output)
    return result


def save_checkpoint(target: nn.Module, run: Run, result: Result, parts: Parts, output: Path) -> None:
    """Write the plain timm target, what is needed to load it, and check that it comes back the same.

    Args:
        target: The timm model.
        run: What it comes from.
        result: Its numbers.
        parts: The images it is checked on.
        output: An existing folder.
    """
    save_file(target.state_dict(), output / CHECKPOINT)
    description = {
        "timm.create_model": {**ARCHITECTURE, "checkpoint_path": CHECKPOINT},
        "input": "[B, 1, 8, 8]: pixel / 8 - 1 for scikit-learn's pixels from 0 to 16",
        "classes": [5, 6, 7, 8, 9],
        "run": asdict(run),
        "result": asdict(result),
    }
    (output / "target.json").write_text(json.dumps(description, indent=2) + "\n")
    with torch.inference_mode():
        pixels = parts.target_test.pixels
        if not torch.equal(load_checkpoint(output)(pixels), target.eval()(pixels)):
            raise RuntimeError(f"{output / CHECKPOINT} gives other logits than the model it was written from")


def load_checkpoint(output: Path) -> nn.Module:
    """The target that `save_checkpoint` wrote, in eval mode; timm alone is needed."""
    arguments = json.loads((output / "target.json").read_text())["timm.create_model"]
    arguments["checkpoint_path"] = str(output / arguments["checkpoint_path"])
    return timm.create_model(**arguments).eval()
