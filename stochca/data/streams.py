"""Datasets that are read from the beginning: WebDataset, Hugging Face streaming, TFDS, by timm's readers."""

import logging
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from timm.data import create_dataset
from torch.utils.data import IterableDataset, get_worker_info

from stochca.data.images import UNREADABLE, as_rgb, class_names, generators_seeded

STREAMS = ("hfids/", "tfds/", "wds/")


class ImageStream(IterableDataset):
    """An iterable dataset of timm, with the interface of `Images` but for the access by index.

    Args:
        base: The dataset, without a transform.
        name: What messages call it.
        seed: Of the order and of the augmentation.
        is_training: Whether to train on it: shuffled, and repeated until each process has as much.

    Attributes:
        transform: Set by timm's `create_loader`.
        classes: Names of the classes in order; None if the dataset has no names.
    """

    def __init__(self, base: Any, name: str, *, seed: int, is_training: bool) -> None:
        self.base = base
        self.stream_name = name
        self.seed = seed
        self.is_training = is_training
        self.transform: Any = None
        self.classes = class_names(base)
        self.rank = 0
        self.skipped = multiprocessing.Value("q", 0)
        self.epoch = multiprocessing.Value("q", 0)

    def __len__(self) -> int:
        """Images of an epoch that this process reads: in training exactly, in evaluation about."""
        return len(self.base)

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        if self._shards() == []:
            return  # WebDataset cannot read none
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        place = (self.seed, self.epoch.value, self.rank * workers + number)
        if worker is None and hasattr(self.base.reader, "worker_seed"):
            # In a worker process it is that of the process, which `StreamLoader` sees to.
            self.base.reader.worker_seed = int(np.random.SeedSequence(place).generate_state(1)[0])
        self.base.reader.ds = None  # what it would continue to shuffle
        counter = _Counter(self.skipped)
        logger = logging.getLogger("timm.data.readers.reader_wds")
        logger.addHandler(counter)
        try:
            for index, (image, target) in enumerate(self.base):
                try:
                    image = as_rgb(image)
                except UNREADABLE:
                    with self.skipped.get_lock():
                        self.skipped.value += 1
                    continue
                with generators_seeded(*place, index):
                    yield self.transform(image), target
        except UNREADABLE as error:
            raise ValueError(f"cannot read an image of {self.stream_name}: {error}") from error
        finally:
            logger.removeHandler(counter)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the augmentation of the next iteration."""
        self.epoch.value = epoch
        self.base.set_epoch(epoch)

    def set_share(self, batch_size: int, workers: int, rank: int, world_size: int) -> None:
        """Choose what this process reads; arguments as of `make_loader`.

        Raises:
            ValueError: There are fewer shards than readers.
        """
        self.rank = rank
        reader = self.base.reader
        reader.batch_size = batch_size
        shards = self._shards()
        if shards is not None and not self.is_training:
            # timm would cut all processes to the same number of images.
            reader.split_info.filenames = shards[rank::world_size]
            rank, world_size = 0, 1
        elif shards is not None and len(shards) < world_size * max(1, workers):
            raise ValueError(
                f"{self.stream_name} has {len(shards)} shards, fewer than the {world_size * max(1, workers)} "
                "that would read them, --workers of each process: give fewer"
            )
        reader.dist_rank, reader.dist_num_replicas = rank, world_size
        self.base.set_loader_cfg(num_workers=workers)

    def name(self, index: int) -> str:
        """What an image is called: a stream has no names, but for its own."""
        return f"image {index} of {self.stream_name}"

    def check_readable(self) -> None:
        """Raise a ValueError if an image could not be read."""
        if self.skipped.value:
            raise ValueError(f"cannot read {self.unreadable_names()[0]}. --skip-corrupt leaves them out")

    def unreadable_names(self) -> list[str]:
        """How many images could not be read so far, in words; empty if all could."""
        return [f"{self.skipped.value} images of {self.stream_name}"] if self.skipped.value else []

    def _shards(self) -> list[str] | None:
        """Files of WebDataset; None for another reader."""
        files = getattr(getattr(self.base.reader, "split_info", None), "filenames", None)
        return None if files is None else list(files)


class StreamOrder:
    """Where in a stream the next iteration of its loader begins, as an `EpochSampler` says it of images.

    Attributes:
        epoch: The epoch that the next iteration runs.
        start: How many of its images, over all processes, the next iteration leaves out.
        global_batch_size: Images per batch over all processes.
    """

    def __init__(self, global_batch_size: int) -> None:
        self.global_batch_size = global_batch_size
        self.epoch = 0
        self.start = 0


def within_prefetcher(loader: Any) -> Any:
    """The `DataLoader` of a loader of timm, which has a prefetcher around it or is one."""
    return getattr(loader, "loader", loader)


class StreamLoader:
    """The loader of a stream, whose batches depend on (seed, epoch, workers, processes) alone.

    To resume in the middle of an epoch its first batches are read and thrown away.

    Args:
        loader: Of timm.
        order: Where to begin.

    Attributes:
        dataset: The `ImageStream`.
    """

    def __init__(self, loader: Any, order: StreamOrder) -> None:
        self.loader = loader
        self.order = order
        self.dataset: ImageStream = loader.dataset
        self.batch_size = within_prefetcher(loader).batch_size

    def __len__(self) -> int:
        if self.dataset.is_training:
            return len(self.dataset) // self.batch_size - self._done()
        return -(-len(self.dataset) // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        self.dataset.set_epoch(self.order.epoch)
        # The workers' seeds come from it.
        seed = np.random.SeedSequence([self.dataset.seed, self.order.epoch]).generate_state(1)[0]
        within_prefetcher(self.loader).generator.manual_seed(int(seed))
        for number, batch in enumerate(self.loader):
            if number >= self._done():
                yield batch

    def _done(self) -> int:
        return self.order.start // self.order.global_batch_size


def open_stream(
    data_dir: str | None,
    dataset: str,
    split: str,
    *,
    is_training: bool,
    seed: int,
    download: bool,
    num_samples: int | None,
) -> ImageStream:
    """Open a split of a stream; arguments as of `open_images`.

    Raises:
        FileNotFoundError: The folder is missing.
        ValueError: The split is not there, its length is not known, or a package is missing.
    """
    is_local = data_dir is not None and "://" not in data_dir and not data_dir.startswith("pipe:")
    if is_local and not Path(str(data_dir)).exists():
        raise FileNotFoundError(f"--data-dir {data_dir} does not exist")
    if data_dir is None and dataset.lower().startswith("wds/"):
        raise ValueError("--data-dir is missing: the folder or the address of the shards")
    try:
        base = create_dataset(
            dataset,
            root=data_dir,
            split=split,
            is_training=is_training,
            download=download,
            seed=seed,
            num_samples=num_samples,
            # `as_rgb` does more; TensorFlow decodes images itself.
            input_img_mode="RGB" if dataset.lower().startswith("tfds/") else "",
        )
    except ImportError as error:
        raise ValueError(f"--dataset {dataset} needs a package that is not installed: {error}") from error
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ValueError(f"cannot open split {split!r} of {dataset}: {error}") from error
    return ImageStream(base, f"split {split!r} of {dataset}", seed=seed, is_training=is_training)


class _Counter(logging.Handler):
    """Counts the images that WebDataset leaves out, of which timm tells the log alone."""

    def __init__(self, count: Any) -> None:
        super().__init__(logging.WARNING)
        self.count = count

    def emit(self, record: logging.LogRecord) -> None:
        with self.count.get_lock():
            self.count.value += 1
