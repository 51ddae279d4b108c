"""The images of a run: what it trains on, what it is evaluated on, and what selects its best checkpoint."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from stochca.config import FinetuneOptions, RecipeOptions
from stochca.data import (
    Images,
    ImageStream,
    check_classes,
    check_layout,
    make_domain_loader,
    make_loader,
    open_images,
    subset_per_class,
)
from stochca.distributed import World

AUGMENTATION = (
    "no_aug", "scale", "ratio", "hflip", "color_jitter", "grayscale_prob", "reprob", "train_crop_mode",
)  # fmt: skip


class RunData(NamedTuple):
    """Images of a run, opened and of the same classes.

    Args:
        train: A dataset, or several domains of which every batch holds equally many images.
        evaluations: The splits that are evaluated on, by name.
        selection: Those whose mean accuracy, or loss, selects the best checkpoint.
        test: What the best checkpoint is evaluated on once, at the end, if anything.
    """

    train: Images | ImageStream | Sequence[Images]
    evaluations: Mapping[str, Images | ImageStream]
    selection: Sequence[str]
    test: Images | ImageStream | None = None

    @property
    def parts(self) -> Sequence[Images | ImageStream]:
        """The training images, one domain after the other."""
        return self.train if isinstance(self.train, Sequence) else [self.train]

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes in order; None if they have no names."""
        return self.parts[0].classes

    def train_loader(
        self, data_config: dict[str, Any], options: RecipeOptions, world: World
    ) -> tuple[Any, Any]:
        """The loader of this process, and its sampler."""
        make: Any = make_domain_loader if isinstance(self.train, Sequence) else make_loader
        return make(
            self.train,
            data_config,
            options.batch_size,
            auto_augment=options.aa,
            **{name: getattr(options, name) for name in AUGMENTATION},
            **_shared(options, world),
        )

    def plain_train_loaders(
        self, data_config: dict[str, Any], options: RecipeOptions, world: World
    ) -> list[Any]:
        """Loaders of all training images without augmentation, each process reading all of them."""
        if streams := [images for images in self.parts if isinstance(images, ImageStream)]:
            raise ValueError(
                f"one of --losses has to see all training images first: {streams[0].stream_name} is a stream"
            )
        alone = World(world.device)
        return [
            make_loader(
                images.part(is_training=False), data_config, options.batch_size, **_shared(options, alone)
            )[0]
            for images in self.parts
            if isinstance(images, Images)
        ]


def evaluation_loader(
    images: Images | ImageStream, data_config: dict[str, Any], options: RecipeOptions, world: World
) -> Any:
    """The loader of this process for a split that is evaluated on."""
    batch_size = options.validation_batch_size or options.batch_size
    return make_loader(images, data_config, batch_size, **_shared(options, world))[0]


def _shared(options: RecipeOptions, world: World) -> dict[str, Any]:
    return {
        "device": world.device,
        "workers": options.workers,
        "rank": world.rank,
        "world_size": world.size,
    }


def finetune_data(options: FinetuneOptions) -> RunData:
    """The images to train on and those to evaluate on.

    Raises:
        FileNotFoundError: A folder is missing.
        ValueError: A split is of other classes, or the options do not fit the dataset.
    """
    if options.layout is not None:
        check_layout(options.layout, options.data_dir or "")
    where = (options.data_dir, options.dataset)
    how: dict[str, Any] = {"seed": options.seed, "download": options.dataset_download}
    train = open_images(
        *where, options.train_split, is_training=True, num_samples=options.train_num_samples, **how
    )
    if options.train_subset < 1:
        seed = options.seed if options.subset_seed is None else options.subset_seed
        train = subset_per_class(train, options.train_subset, seed)

    def evaluated(split: str) -> Images | ImageStream:
        images = open_images(*where, split, is_training=False, num_samples=options.val_num_samples, **how)
        check_classes(train.classes, images.classes, f"the split {split!r}", repr(options.train_split))
        return images

    val = evaluated(options.val_split)
    test = None if options.test_split is None else evaluated(options.test_split)
    return RunData(train, {"val": val}, ["val"], test)
