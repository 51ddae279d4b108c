"""What is trained, what selects and what is reported, of real runs."""

import shutil
from statistics import fmean

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from stochca.config import DomainBedOptions
from stochca.data import make_loader, open_domains
from stochca.domainbed import domainbed
from tests.domainbed.conftest import DOMAINS, HOLDOUT, metrics_of, results_of, rows_of, values_of
from tests.train.image_folder import TINY

METHODS = ["erm", "stochca", "miro", "miro_stochca"]
LEFT_OUT = ["clay", "Real World"]
# The first segment of steps has converged, whatever follows, so that every run has an average.
OPTIONS = {"swad": True, "swad_converge": 1, "batch_size": 4, "miro_weight": 0.25}


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """All methods on two of three domains: the folder, and what the command returned."""
    output = tmp_path_factory.mktemp("finished") / "bed"
    options = values_of(folder, output, methods=METHODS, test_domains=LEFT_OUT, **OPTIONS)
    return output, domainbed(DomainBedOptions(**options))


def test_every_method_is_run_without_each_domain_and_reported(finished):
    output, result = finished
    rows = results_of(output)
    assert [(row["method"], row["seed"], row["domain"]) for row in rows] == [
        (method, "0", domain) for method in METHODS for domain in LEFT_OUT
    ]
    for row in rows:
        run = output / row["method"] / "seed-0" / row["domain"]
        assert {path.name for path in run.iterdir()} >= {"summary.json", "metrics.csv", "best.safetensors"}
    assert result["runs"] == 8
    assert result["skipped"] == []
    assert result["markdown"] == (output / "table.md").read_text()
    table = rows_of(output / "table.csv")
    assert [(row["selection"], row["method"]) for row in table] == [
        (selection, method)
        for selection in ("training-domain validation", "oracle", "SWAD")
        for method in METHODS
    ]
    for row in table[:4]:
        mine = [float(r["accuracy"]) for r in rows if r["method"] == row["method"]]
        shown = [float(row[f"{name}_accuracy"]) for name in (*LEFT_OUT, "mean over domains")]
        assert shown == pytest.approx([*mine, fmean(mine)], abs=1e-4)


def test_reported_accuracies_are_those_of_the_metrics_at_the_selected_steps(finished):
    output, _ = finished
    for row in results_of(output):
        left_out = row["domain"]
        metrics = metrics_of(output / row["method"] / "seed-0" / left_out)
        assert [line["step"] for line in metrics] == [2, 4, 6]
        validation = [
            fmean(line[f"{name}_out_top1"] for name in DOMAINS if name != left_out) for line in metrics
        ]
        oracle = [line[f"{left_out}_out_top1"] for line in metrics]
        for scores, step, accuracy in (
            (validation, "selected_step", "accuracy"),
            (oracle, "oracle_step", "oracle_accuracy"),
        ):
            at = scores.index(max(scores))
            assert int(row[step]) == metrics[at]["step"]
            assert float(row[accuracy]) == metrics[at][f"{left_out}_in_top1"]


@pytest.mark.parametrize(("file", "column"), [("best", "accuracy"), ("swad", "swad_accuracy")])
def test_checkpoints_have_the_reported_accuracies_on_the_images_not_held_out(folder, finished, file, column):
    output, _ = finished
    for row in results_of(output):
        path = output / row["method"] / "seed-0" / row["domain"] / f"{file}.safetensors"
        model = timm.create_model(
            "vit_tiny_patch16_224", checkpoint_path=str(path), num_classes=2, img_size=32, **TINY
        ).eval()
        images = open_domains(str(folder), seed=0, holdout_fraction=HOLDOUT)[row["domain"]]["in"]
        assert len(images) == 2 * DOMAINS[row["domain"]] - int(2 * DOMAINS[row["domain"]] * HOLDOUT)
        config = timm.data.resolve_data_config({"img_size": 32}, model=model)
        loader, _ = make_loader(images, config, 16, device=torch.device("cpu"), workers=0)
        with torch.no_grad():
            hits = torch.cat([model(batch).argmax(1) == target for batch, target in loader])
        assert float(row[column]) == pytest.approx(100 * hits.double().mean().item(), abs=1e-9)


def test_methods_differ_in_source_and_miro(finished):
    output, _ = finished
    weights = {}
    for method in METHODS:
        run = output / method / "seed-0" / "clay"
        options = yaml.safe_load((run / "config.yaml").read_text())
        assert options["p"] == (0.5 if "stochca" in method else 0.0)
        assert options["losses"] == ([{"miro": {"weight": 0.25}}] if "miro" in method else [])
        assert ("train_miro" in metrics_of(run)[0]) == ("miro" in method)
        weights[method] = load_file(run / "last.safetensors")["blocks.0.attn.qkv.weight"]
    fractions = {row["method"]: float(row["source_fraction"]) for row in results_of(output)}
    assert fractions["erm"] == 0
    assert 0 < fractions["stochca"] < 1
    assert fractions["miro"] == fractions["miro_stochca"] == 1
    for i, method in enumerate(METHODS):
        for other in METHODS[:i]:
            assert not torch.equal(weights[method], weights[other]), (method, other)


def test_plain_fine_tuning_ignores_what_belongs_to_the_source(make_options, finished):
    output, _ = finished
    options = {"mode": "sum", "per": "sample", "p_schedule": [0.9] * 3, "test_domains": ["clay"]}
    result = domainbed(make_options(methods=["erm"], **OPTIONS, **options))
    ours, theirs = (
        load_file(f"{root}/erm/seed-0/clay/last.safetensors") for root in (result["output"], output)
    )
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def spoiled(folder, root, paths):
    """A copy of the domains in which some images are noise."""
    shutil.copytree(folder, root)
    generator = np.random.default_rng(0)
    for path in paths:
        noise = generator.integers(0, 256, (36, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(str(path).replace(str(folder), str(root)))
    return root


def without_clay(data, output):
    """Weights of StochCA after the last step and at the selected one, and its metrics."""
    options = {"data_dir": str(data), "test_domains": ["clay"]}
    domainbed(DomainBedOptions(**values_of(data, output, **OPTIONS, **options)))
    return read(output / "stochca" / "seed-0" / "clay")


def read(run):
    return load_file(run / "last.safetensors"), load_file(run / "best.safetensors"), metrics_of(run)


def equal(weights, others):
    return all(torch.equal(weights[name], tensor) for name, tensor in others.items())


def differing(metrics, others):
    """Names of the columns that differ, but for those of time."""
    pairs = list(zip(metrics, others, strict=True))
    timed = {"seconds", "images_per_second"}
    return {name for name in metrics[0] if any(a[name] != b[name] for a, b in pairs)} - timed


def test_the_domain_left_out_takes_no_part_in_training_and_selection(folder, finished, tmp_path):
    last, best, metrics = read(finished[0] / "stochca" / "seed-0" / "clay")
    clay = spoiled(folder, tmp_path / "images", sorted((folder / "clay").rglob("*.*")))
    found = without_clay(clay, tmp_path / "bed")
    assert equal(found[0], last)
    assert equal(found[1], best)
    changed = differing(found[2], metrics)
    assert changed  # the images have been looked at
    assert changed <= {"clay_in_top1", "clay_out_top1"}


@pytest.mark.parametrize("split", ["in", "out"])
def test_held_out_images_of_training_domains_select_and_the_others_train(folder, finished, tmp_path, split):
    last, _, metrics = read(finished[0] / "stochca" / "seed-0" / "clay")
    domains = open_domains(str(folder), seed=0, holdout_fraction=HOLDOUT)
    images = domains["ink"][split]
    paths = [images.name(index) for index in range(len(images))]
    assert len(paths) == {"in": 9, "out": 3}[split]
    found = without_clay(spoiled(folder, tmp_path / "images", paths), tmp_path / "bed")
    changed = differing(found[2], metrics)
    if split == "in":
        assert not equal(found[0], last)
        assert "train_loss" in changed
    else:
        assert equal(found[0], last)
        assert "val_loss" in changed
        assert changed <= {"val_loss", "top1", "ink_out_top1"}


def test_a_batch_may_be_larger_than_a_domain(make_options):
    result = domainbed(make_options(batch_size=20, steps=1, val_steps=1, test_domains=["Real World"]))
    assert result["runs"] == 1
