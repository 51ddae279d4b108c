"""The recipes run on folders of the layout that they name."""

import shutil

import pytest
import yaml
from PIL import Image

from stochca.config import DomainBedOptions
from stochca.data import LAYOUTS
from stochca.domainbed import domainbed
from stochca.recipes import recipe_path
from tests.domainbed.conftest import metrics_of, results_of
from tests.train.image_folder import TINY


@pytest.mark.parametrize("name", ["pacs", "vlcs", "officehome", "terraincognita", "domainnet"])
def test_a_recipe_runs_on_its_layout(name, tmp_path):
    layout = LAYOUTS[name]
    root = tmp_path / name
    Image.new("RGB", (9, 8), (200, 30, 60)).save(tmp_path / "image.jpg")
    for domain in layout.parts:
        for number in range(layout.num_classes):
            folder = root / domain / f"{number:03}"
            folder.mkdir(parents=True)
            shutil.copy(tmp_path / "image.jpg", folder / "0.jpg")
    left_out = layout.parts[-1]
    values = yaml.safe_load(recipe_path(name).read_text())
    tiny = {
        "model": "vit_tiny_patch16_224", "pretrained": False, "img_size": 32, "model_kwargs": TINY,
        "batch_size": 2, "validation_batch_size": 64, "steps": 2, "val_steps": 2, "workers": 0,
        "device": "cpu", "methods": ["stochca"], "seeds": [0], "test_domains": [left_out],
        "data_dir": str(root), "output": str(tmp_path / "bed"),
    }  # fmt: skip
    domainbed(DomainBedOptions(**{**values, **tiny}))
    (row,) = results_of(tmp_path / "bed")
    assert (row["method"], row["domain"], row["selected_step"]) == ("stochca", left_out, "2")
    # All images are one: each class has as many.
    held_out = int(layout.num_classes * 0.2)
    (metrics,) = metrics_of(tmp_path / "bed" / "stochca" / "seed-0" / left_out)
    hits = metrics[f"{left_out}_in_top1"] * (layout.num_classes - held_out) / 100
    assert hits == pytest.approx(round(hits), abs=1e-6)
    assert float(row["accuracy"]) == metrics[f"{left_out}_in_top1"]
    trained = {column.removesuffix("_out_top1") for column in metrics if column.endswith("_out_top1")}
    assert trained == set(layout.parts)
