"""A random share of the images of each class."""

import numpy as np

from stochca.data.images import Images
from stochca.data.streams import ImageStream


def subset_per_class(images: Images | ImageStream, share: float, seed: int) -> Images:
    """Keep `int(n * share)` random images of each class of n.

    The choice depends on the seed and on the dataset alone, and a smaller share is part of a larger one.

    Args:
        images: The dataset.
        share: Above 0 and at most 1.
        seed: Of the choice.

    Raises:
        ValueError: A class would be left without an image; a share out of range; or a dataset that tells the
            class of an image only together with the image, as a stream.
    """
    if not 0 < share <= 1:
        raise ValueError(f"--train-subset must be above 0 and at most 1, got {share}")
    if isinstance(images, ImageStream):
        raise ValueError("--train-subset needs a dataset that is read by index; this one is a stream")
    targets = images.targets()
    names = images.classes or [str(target) for target in range(int(targets.max()) + 1)]
    members = [np.flatnonzero(targets == target) for target in range(len(names))]
    empty = [
        f"{name} ({len(its)} images)"
        for name, its in zip(names, members, strict=True)
        if int(len(its) * share) == 0
    ]
    if empty:
        raise ValueError(
            f"--train-subset {share} leaves no image of {len(empty)} of {len(names)} classes: "
            f"{', '.join(empty[:5])}{', ...' * (len(empty) > 5)}"
        )
    kept = [
        np.random.default_rng([seed, target]).permutation(its)[: int(len(its) * share)]
        for target, its in enumerate(members)
    ]
    return images.part(np.sort(np.concatenate(kept)))
