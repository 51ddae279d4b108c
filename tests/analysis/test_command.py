"""What `stochca analyze` writes, prints and refuses."""

import csv
import importlib.util
import json

import numpy as np
import pytest
import torch

from stochca.analysis import compare
from stochca.analysis.command import analyze
from stochca.analysis.measures import MEASURES
from stochca.analysis.runs import find_runs, load
from stochca.cli import main
from stochca.data import make_loader, open_images
from tests.train.image_folder import write_images


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def read(path, run, measure):
    return [row for row in rows_of(path) if (row["run"], row["measure"]) == (run, measure)]


@pytest.fixture(scope="module")
def expected(runs, folder):
    """The comparison of each run over all validation images, by the functions that the command is made of."""
    from stochca.analysis.options import AnalyzeOptions

    found = {}
    for run in find_runs(AnalyzeOptions(runs=[str(run) for run in runs])):
        models = load(run, None)
        images = open_images(str(folder), "", "validation", is_training=False)
        loader, _ = make_loader(images, models.data_config, 3, device=torch.device("cpu"), workers=0)
        found[run.name] = compare(models.target, models.source, (batch for batch, _ in loader))
    return found


def test_tables_hold_every_number_of_the_comparison(analyzed, expected):
    for name, comparison in expected.items():
        for measure, measured in comparison.measured.items():
            for level in ("runs", "blocks", "heads"):
                estimate = measured.model if level == "runs" else getattr(measured, level)
                rows = read(analyzed.output / f"{level}.csv", name, measure)
                for column, wanted in (("mean", estimate.mean), ("standard_deviation", estimate.deviation)):
                    found = np.reshape([float(row[column]) for row in rows], wanted.shape)
                    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-9)
                assert {row["images"] for row in rows} == {"9"}
    assert {row["measure"] for row in rows_of(analyzed.output / "runs.csv")} == set(MEASURES)
    last = read(analyzed.output / "heads.csv", "stochca", "key_cosine")[-1]
    assert (last["block"], last["head"]) == ("1", "1")


def test_it_prints_means_and_what_their_spread_is(analyzed, expected):
    lines = analyzed.printed.splitlines()
    assert lines[0] == "|  | plain | stochca |"
    keys = [expected[name].measured["key_cosine"].model for name in ("plain", "stochca")]
    cells = " | ".join(f"{key.mean:.3f} ± {key.deviation:.3f}" for key in keys)
    assert f"| keys, all tokens (cosine similarity) | {cells} |" in lines
    assert "standard deviation (n - 1) over n = 9 images" in analyzed.printed
    assert f"report: {analyzed.output / 'report.html'}" in lines


def test_fewer_images_are_spread_over_the_classes(numbers_alone, make_options, expected, tmp_path):
    result = analyze(make_options(num_images=3, attention=False, pictures=0))
    assert result["images"] == 3
    names = {row["measure"] for row in rows_of(tmp_path / "analysis" / "runs.csv")}
    assert not any("attention" in name for name in names)
    # The first image of the first class, the middle one of the second, the last of the third.
    (run, _) = find_runs(make_options())
    models = load(run, None)
    images = open_images(run.options.data_dir, "", "validation", is_training=False).part([0, 4, 8])
    loader, _ = make_loader(images, models.data_config, 3, device=torch.device("cpu"), workers=0)
    found = (
        compare(models.target, models.source, (batch for batch, _ in loader)).measured["query_cosine"].model
    )
    (row,) = read(tmp_path / "analysis" / "runs.csv", "plain", "query_cosine")
    assert float(row["mean"]) == pytest.approx(float(found.mean), rel=1e-6)
    assert float(row["mean"]) != pytest.approx(
        float(expected["plain"].measured["query_cosine"].model.mean), rel=1e-6
    )


def test_unreadable_images_end_it_or_are_left_out_and_named(numbers_alone, make_options, tmp_path):
    folder = write_images(tmp_path / "images", {"validation": 2})
    (folder / "validation" / "bee" / "0.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"cannot read image .*bee/0\.jpg.*--skip-corrupt"):
        analyze(make_options(data_dir=str(folder)))
    result = analyze(make_options(data_dir=str(folder), skip_corrupt=True, attention=False))
    assert result["images"] == 5
    assert [name.endswith("bee/0.jpg") for name in result["skipped"]] == [True]


def test_runs_on_different_images_need_to_be_told_which(
    numbers_alone, make_run, runs, make_options, tmp_path
):
    elsewhere = write_images(tmp_path / "elsewhere", {"train": 4, "validation": 2})
    other = make_run("elsewhere", data_dir=str(elsewhere))
    both = [str(runs[0]), str(other)]
    with pytest.raises(ValueError, match=r"plain and elsewhere are of different images .* give --data-dir"):
        analyze(make_options(runs=both))
    assert (
        analyze(make_options(runs=both, data_dir=str(elsewhere), attention=False, pictures=0))["images"] == 6
    )


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_a_missing_package_is_named_before_anything_runs(package, make_options, monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest)
    )
    with pytest.raises(ValueError, match=rf"need {package}: pip install stochca\[plots\]"):
        analyze(make_options())
    assert not (tmp_path / "analysis").exists()


def test_errors_are_one_line(capsys):
    assert main(["analyze", "/nowhere"]) == 2
    assert capsys.readouterr().err == "stochca analyze: there is no run /nowhere\n"


def test_options_can_come_from_a_file(numbers_alone, runs, tmp_path, capsys):
    config = tmp_path / "analysis.yaml"
    values = {"num_images": 2, "workers": 0, "device": "cpu", "pictures": 0, "output": str(tmp_path / "out")}
    config.write_text(json.dumps(values))
    assert main(["analyze", str(runs[0]), "--config", str(config), "--no-attention"]) == 0
    assert "over n = 2 images" in capsys.readouterr().out
