"""Loaders of batches, by timm's `create_loader`, with an order of our own and for several processes."""

import multiprocessing
import os
import signal
import time
from multiprocessing.context import DefaultContext
from typing import Any

import torch
from timm.data import create_loader
from torch.utils.data import IterableDataset

from stochca.data.augmentation import check_color_jitter, squash_and_crop
from stochca.data.images import Images
from stochca.data.samplers import EpochSampler
from stochca.data.streams import ImageStream, StreamLoader, StreamOrder, within_prefetcher
from stochca.signals import STOPPING


def make_loader(
    images: Images | ImageStream,
    data_config: dict[str, Any],
    batch_size: int,
    *,
    device: torch.device,
    workers: int,
    rank: int = 0,
    world_size: int = 1,
    **augmentation: Any,
) -> tuple[Any, EpochSampler | StreamOrder | None]:
    """The loader of one process.

    In training W processes with batches of B see the images, and the augmentation of each, of one process
    with batches of W * B, and equally many batches. In evaluation process r reads the images r, r + W, ...:
    each image is read once, and processes may have unequally many, or none.

    The shards of a stream are dealt out to processes and their workers: what a process sees depends on the
    number of both, and a run must be resumed with the same.

    Args:
        images: The dataset.
        data_config: Of timm's `resolve_data_config`.
        batch_size: Images per batch of a process. In training the last, incomplete batch of an epoch is left
            out.
        device: Where the batches go.
        workers: Processes that load images, for each that trains.
        rank: Of this process.
        world_size: Processes that train or evaluate together.
        augmentation: Goes to `create_loader`; `train_crop_mode` may be "squash" as well.

    Returns:
        The loader, and in training its sampler.

    Raises:
        ValueError: Too few images for one batch of each process, or an augmentation that does not fit.
    """
    if isinstance(images, ImageStream):
        images.set_share(batch_size, workers, rank, world_size)
        given = augmentation if images.is_training else {}
        loader = timm_loader(images, data_config, batch_size, device=device, workers=workers, **given)
        set_generator(loader, images.seed)
        order = StreamOrder(world_size * batch_size)
        return StreamLoader(loader, order), order if images.is_training else None
    if not images.is_training:
        loader = timm_loader(images, data_config, batch_size, device=device, workers=workers)
        set_order(loader, range(rank, len(images), world_size), images.seed)
        return loader, None
    if len(images) < world_size * batch_size:
        processes = f" in each of {world_size} processes" if world_size > 1 else ""
        raise ValueError(
            f"--batch-size is {batch_size}{processes}, but there are only {len(images)} training images"
        )
    loader = timm_loader(images, data_config, batch_size, device=device, workers=workers, **augmentation)
    sampler = EpochSampler(len(images), images.seed, batch_size, rank, world_size)
    set_order(loader, sampler, images.seed)
    return loader, sampler


def timm_loader(
    dataset: Any,
    data_config: dict[str, Any],
    batch_size: int,
    *,
    device: torch.device,
    workers: int,
    train_crop_mode: str | None = None,
    **augmentation: Any,
) -> Any:
    """The loader of timm for a dataset that says whether it `is_training`; arguments as of `make_loader`."""
    check_color_jitter(augmentation.get("color_jitter"))
    is_squashed = train_crop_mode == "squash"
    loader = create_loader(
        dataset,
        batch_size=batch_size,
        is_training=dataset.is_training,
        num_workers=workers,
        # A stream begins anew, and its workers get new seeds.
        persistent_workers=workers > 0 and not isinstance(dataset, IterableDataset),
        pin_memory=device.type == "cuda",
        device=device,
        # timm's prefetcher erases on the device, ahead of the step, with the global generator.
        use_prefetcher=not augmentation.get("reprob"),
        worker_seeding=_outlive_signals,
        train_crop_mode=None if is_squashed else train_crop_mode,
        **{
            key: data_config[key]
            for key in ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
        },
        **{"re_prob" if key == "reprob" else key: value for key, value in augmentation.items()},
    )
    if workers > 0:
        context = _WorkerContext(multiprocessing.get_context())
        within_prefetcher(loader).multiprocessing_context = context
    if is_squashed and not augmentation.get("no_aug"):
        squash_and_crop(dataset.transform, data_config)
    return loader


def set_order(loader: Any, order: Any, seed: int) -> None:
    """Let a loader of timm read the positions of `order`, a sampler, and leave the global generator alone."""
    set_generator(loader, seed)
    within_prefetcher(loader).batch_sampler.sampler = order


def set_generator(loader: Any, seed: int) -> None:
    """Give a loader of timm a generator of its own: the global one, of dropout, must not advance."""
    within_prefetcher(loader).generator = torch.Generator().manual_seed(seed)


class _Worker(multiprocessing.Process):
    """A process that signals cannot reach before it knows what to do with them, see `_outlive_signals`."""

    def start(self) -> None:
        # What this thread holds back, the process that it starts does.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _WorkerContext(DefaultContext):
    """Starts processes as the default context does."""

    Process = _Worker


def _outlive_signals(worker_info: Any) -> int:
    """Called in each worker: a signal that the whole process group gets is for the main process to act on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    came_at: list[float] = []

    def outlive(signum: int, _frame: object) -> None:
        came_at.append(time.monotonic())
        if came_at[-1] - came_at[0] > 1:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        elif len(came_at) == 2:
            # The same request, as in `StopRequest`; or torch, which so ends workers that hang at a run's end.
            signal.alarm(30)

    signal.signal(signal.SIGTERM, outlive)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    return worker_info.seed
