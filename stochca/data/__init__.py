"""Images and their loaders, on timm's datasets, readers, transforms and loaders.

The order of the images and the augmentation of each depend on (seed, epoch, image) alone: not on the number
of workers or processes, nor on where a run was interrupted.
"""

from stochca.data.augmentation import check_auto_augment
from stochca.data.domains import DomainImages, make_domain_loader, open_domains
from stochca.data.images import NO_TARGET, Images
from stochca.data.layouts import LAYOUTS, check_layout
from stochca.data.loader import make_loader
from stochca.data.opening import check_classes, number_of_classes, open_images
from stochca.data.samplers import DomainSampler, EpochSampler
from stochca.data.streams import ImageStream, StreamOrder
from stochca.data.subset import subset_per_class

__all__ = [
    "LAYOUTS",
    "NO_TARGET",
    "DomainImages",
    "DomainSampler",
    "EpochSampler",
    "ImageStream",
    "Images",
    "StreamOrder",
    "check_auto_augment",
    "check_classes",
    "check_layout",
    "make_domain_loader",
    "make_loader",
    "number_of_classes",
    "open_domains",
    "open_images",
    "subset_per_class",
]
