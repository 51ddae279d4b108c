"""The recipes: their options are real ones, and the protocol's."""

import pytest
import torch
import yaml
from PIL import Image
from torchvision import transforms

from stochca.cli import _parser
from stochca.config import DomainBedOptions, FinetuneOptions
from stochca.data import LAYOUTS, Images, make_loader
from stochca.recipes import recipe_names, recipe_path
from tests.data.helpers import CONFIG

FINETUNE = [f"{name}_{size}" for name in ("cub", "cars", "aircraft", "dogs") for size in (448, 224)]
DOMAINS = ["pacs", "vlcs", "officehome", "terraincognita", "domainnet"]


def options_of(name):
    """The options of a recipe, as the command line reads them."""
    options_class = FinetuneOptions if name in FINETUNE else DomainBedOptions
    parsed = _parser(options_class, "").parse_args(["--config", str(recipe_path(name))]).as_dict()
    parsed.pop("config")
    return options_class(**parsed)


def test_there_is_a_recipe_for_each_dataset():
    assert recipe_names() == sorted(FINETUNE + DOMAINS)
    with pytest.raises(ValueError, match="no recipe 'flowers', only aircraft_224, "):
        recipe_path("flowers")


@pytest.mark.parametrize("name", FINETUNE + DOMAINS)
def test_each_value_of_a_recipe_reaches_the_options(name):
    values, options = yaml.safe_load(recipe_path(name).read_text()), options_of(name)
    assert values["layout"] == name.split("_")[0]
    assert LAYOUTS[values["layout"]].part == ("split" if name in FINETUNE else "domain")
    for key, value in values.items():
        assert getattr(options, key) == value


@pytest.mark.parametrize("name", FINETUNE)
def test_fine_tuning_follows_the_protocol(name):
    options = options_of(name)
    assert options.lr == pytest.approx(5e-4 * options.batch_size / 512)
    assert (options.steps, options.warmup_steps, options.sched) == (10_000, 100, "cosine")
    assert (options.opt, options.weight_decay, options.p, options.smoothing) == ("adamw", 0.05, 0.1, 0.0)
    assert options.batch_size == {448: 16, 224: 32}[options.img_size]
    assert options.steps // options.val_steps == 10


@pytest.mark.parametrize(("name", "size", "resized"), [("cub_448", 448, 550), ("cub_224", 224, 275)])
def test_fine_tuning_crops_a_squashed_image(name, size, resized):
    options = options_of(name)
    config = {**CONFIG, "input_size": (3, size, size)}
    config |= {"crop_pct": options.crop_pct, "crop_mode": options.crop_mode}
    for is_training, crop in ((True, transforms.RandomCrop), (False, transforms.CenterCrop)):
        images = Images([(Image.new("RGB", (8, 8)), 0)], seed=0, is_training=is_training)
        given = {"train_crop_mode": options.train_crop_mode} if is_training else {}
        make_loader(images, config, 1, device=torch.device("cpu"), workers=0, **given)
        squash, crops, *_ = images.transform.transforms
        assert squash.size == (resized, resized)
        assert (type(crops), crops.size) == (crop, (size, size))


@pytest.mark.parametrize("name", DOMAINS)
def test_domain_generalisation_follows_the_protocol(name):
    options = options_of(name)
    assert options.holdout_fraction == 0.2
    assert (options.steps, options.batch_size, options.val_steps) == (5001, 32, 300)
    assert (options.lr, options.weight_decay, options.sched, options.p) == (1e-5, 0.01, "constant", 0.1)
    assert (options.scale, options.hflip) == ([0.7, 1.0], 0.5)
    assert (options.color_jitter, options.grayscale_prob) == ([0.3] * 4, 0.1)
