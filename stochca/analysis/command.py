"""`stochca analyze` from its options to its tables, plots and report."""

import dataclasses
import importlib.util
import platform
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from stochca.analysis.comparison import attention_to_patches, compare, paired
from stochca.analysis.options import AnalyzeOptions
from stochca.analysis.results import Analysis, Pictures
from stochca.analysis.runs import Models, Run, find_runs, load
from stochca.analysis.tables import markdown, write_tables
from stochca.data import Images, ImageStream, make_loader, open_images
from stochca.distributed import resolve_device
from stochca.evaluation import autocast

PACKAGES = ("stochca", "torch", "timm", "numpy", "matplotlib")


def analyze(options: AnalyzeOptions) -> dict[str, Any]:
    """Compare the targets of runs with their sources, and the runs with each other, on the same images.

    It writes `runs.csv`, `blocks.csv` and `heads.csv`, plots as PNG, and `report.html`, one file that needs
    no other.

    Args:
        options: Of the command.

    Returns:
        `output`, the folder; `report`, the path; `images`, their number; `skipped`, those that could not be
        read; `markdown`, the means of each run as a table.

    Raises:
        FileNotFoundError: No such run, file or data.
        ValueError: Runs, weights or images do not fit, or matplotlib is missing.
    """
    _check_plots()
    runs = find_runs(options)
    images = _open_images(options, runs)
    device = resolve_device(options.device)
    if options.tf32:
        torch.set_float32_matmul_precision("high")
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    analyses = [_analyze(run, images, options, device) for run in runs]

    from stochca.analysis.plots import write_plots
    from stochca.analysis.report import write_report

    write_tables(output, analyses)
    write_plots(output, analyses)
    skipped = images.unreadable_names()
    about = {**_environment(device, options), "images left out as unreadable": str(len(skipped))}
    report = write_report(output, analyses, _where(options, runs[0]), about)
    return {
        "output": str(output),
        "report": str(report),
        "images": analyses[0].comparison.images,
        "skipped": skipped,
        "markdown": markdown(analyses),
    }


def _check_plots() -> None:
    """Before anything is computed."""
    for package in ("matplotlib", "jinja2"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"plots and report need {package}: pip install stochca[plots]")


def _where(options: AnalyzeOptions, run: Run) -> dict[str, Any]:
    """The dataset: as the options have it, else as the run has it."""
    names = ("data_dir", "dataset", "val_split")
    given = {name: getattr(options, name) for name in names}
    return {name: getattr(run.options, name) if given[name] is None else given[name] for name in names}


def _open_images(options: AnalyzeOptions, runs: Sequence[Run]) -> Images | ImageStream:
    where = _where(options, runs[0])
    for run in runs[1:]:
        if (other := _where(options, run)) != where:
            raise ValueError(
                f"{runs[0].name} and {run.name} are of different images ({where}, {other}): "
                "give --data-dir, --dataset and --val-split"
            )
    images = open_images(
        where["data_dir"],
        where["dataset"],
        where["val_split"],
        is_training=False,
        num_samples=runs[0].options.val_num_samples,
    )
    if options.num_images is None:
        return images
    return _spread(images, options.num_images)


def _spread(images: Images | ImageStream, count: int) -> Images:
    """Some of the images, evenly spread: a folder has one class after the other."""
    if not isinstance(images, Images):
        raise ValueError(
            f"--num-images chooses among images in a known order, {images.stream_name} is a stream"
        )
    if count >= len(images):
        return images
    return images.part(np.linspace(0, len(images) - 1, count).round())


def _analyze(
    run: Run, images: Images | ImageStream, options: AnalyzeOptions, device: torch.device
) -> Analysis:
    models = load(run, options.source)
    models.target.to(device)
    models.source.to(device)
    batches = _batches(images, models, options, device, options.batch_size)
    with autocast(options, device):
        comparison = compare(
            models.target,
            models.source,
            tqdm(batches, desc=run.name, unit="batch", dynamic_ncols=True, disable=None),
            attention=options.attention,
        )
        pictures = _pictures(images, models, options, device) if options.pictures else None
    facts = {**run.facts, "source": models.origin}
    return Analysis(run.name, comparison, facts, dataclasses.asdict(run.options), pictures)


def _batches(
    images: Images | ImageStream,
    models: Models,
    options: AnalyzeOptions,
    device: torch.device,
    batch_size: int,
) -> Iterator[Tensor]:
    """Batches as the target takes them, without images that cannot be read."""
    loader, _ = make_loader(images, models.data_config, batch_size, device=device, workers=options.workers)
    for batch, target in loader:
        if not options.skip_corrupt:
            images.check_readable()
        readable = batch[target >= 0]
        if len(readable):
            yield readable


def _pictures(
    images: Images | ImageStream, models: Models, options: AnalyzeOptions, device: torch.device
) -> Pictures:
    """Where both models look in some images, evenly spread over those of a folder."""
    some = _spread(images, options.pictures) if isinstance(images, Images) else images
    batch = next(_batches(some, models, options, device, options.pictures))
    with paired(models.target, models.source) as pair:
        target, source = attention_to_patches(pair, batch, block=-1)
    mean, std = (batch.new_tensor(models.data_config[name])[:, None, None] for name in ("mean", "std"))
    pixels = (batch * std + mean).clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return Pictures(pixels.cpu().numpy(), target, source)


def _environment(device: torch.device, options: AnalyzeOptions) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    return {
        "made": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "Python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "system": f"{platform.system()} {platform.machine()}",
        "device": f"{device} ({name})",
        "precision of the models": options.amp_dtype
        if options.amp
        else "TF32"
        if options.tf32
        else "float32",
        "precision of the measures": "float64",
    }
