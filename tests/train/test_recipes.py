"""Every recipe of fine-tuning runs from the command line, on images that lie as its dataset does."""

import json
from pathlib import Path

import pytest
import timm
import yaml
from PIL import Image

from stochca.cli import main
from stochca.data import LAYOUTS
from stochca.recipes import recipe_names, recipe_path
from tests.train.image_folder import TINY

RECIPES = [name for name in recipe_names() if LAYOUTS[name.split("_")[0]].part == "split"]
SMALL = [
    "--model", "vit_tiny_patch16_224", "--model-kwargs", json.dumps(TINY), "--no-pretrained",
    "--img-size", "32", "--batch-size", "4", "--steps", "3", "--warmup-steps", "1", "--val-steps", "2",
    "--validation-batch-size", "128", "--workers", "0", "--device", "cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The folder of a dataset, with one image in each folder of a class."""
    made: dict[str, Path] = {}

    def make(layout: str) -> Path:
        if layout not in made:
            made[layout] = tmp_path_factory.mktemp(layout)
            for split in LAYOUTS[layout].parts:
                for label in range(LAYOUTS[layout].num_classes):
                    folder = made[layout] / split / f"class {label:03}"
                    folder.mkdir(parents=True)
                    Image.new("RGB", (40, 36), (label, 90, 200)).save(folder / "0.jpg")
        return made[layout]

    return make


def test_there_is_a_recipe_for_each_dataset_and_size():
    names = {f"{layout}_{size}" for layout in ("cub", "cars", "aircraft", "dogs") for size in (224, 448)}
    assert set(RECIPES) == names


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_completes_reports_and_resumes(name, root, tmp_path, capsys):
    layout, size = name.split("_")
    output = str(tmp_path / "run")
    arguments = ["finetune", "--config", name, "--data-dir", str(root(layout)), "--output", output, *SMALL]
    assert main(arguments) == 0
    assert "3 steps done: best top-1" in capsys.readouterr().out
    resolved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    recipe = yaml.safe_load(recipe_path(name).read_text())
    assert recipe["img_size"] == int(size)
    for option in ("p", "lr", "weight_decay", "train_crop_mode", "crop_mode", "crop_pct", "sched", "layout"):
        assert resolved[option] == recipe[option], option
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 0 <= summary["test_top1"] <= 100
    path = str(tmp_path / "run" / "best.safetensors")
    classes = LAYOUTS[layout].num_classes
    timm.create_model("vit_tiny_patch16_224", checkpoint_path=path, num_classes=classes, img_size=32, **TINY)
    assert main(["finetune", "--resume", output]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary


def test_a_dataset_that_lies_otherwise_is_refused(root, tmp_path, capsys):
    arguments = ["--data-dir", str(root("cub")), "--output", str(tmp_path / "run")]
    assert main(["finetune", "--config", "dogs_224", *arguments, *SMALL]) == 2
    wanted = "Stanford Dogs wants 120 folders of classes in each split"
    assert capsys.readouterr().err.startswith(f"stochca finetune: {wanted}; {root('cub')}/train has 200")


def test_the_name_of_no_recipe_is_a_file_that_is_not_there(capsys):
    with pytest.raises(SystemExit):
        main(["finetune", "--config", "cub_449"])
    assert "cub_449" in capsys.readouterr().err


def test_a_recipe_that_is_none_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match=rf"there is no recipe 'cub_1', only .*{recipe_names()[-1]}"):
        recipe_path("cub_1")
