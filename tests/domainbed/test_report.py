"""The tables, from runs whose numbers are known."""

import csv
import json

import numpy as np
import pytest

from stochca.domainbed import domainbed
from stochca.domainbed.plan import make_plan, save_record
from tests.domainbed.conftest import DOMAINS, results_of, rows_of

SEEDS = [0, 1, 2]
LEFT_OUT = ["Real World", "clay"]
# By method and domain, of each seed.
ACCURACY = {
    "erm": {"Real World": [50.0, 60.0, 70.0], "clay": [80.0, 84.0, 82.0]},
    "miro_stochca": {"Real World": [66.0, 63.0, 72.0], "clay": [90.0, 85.0, 86.0]},
}
ORACLE_IS_HIGHER_BY = 2.0
# Two runs have not converged.
SWAD_IS_HIGHER_BY = 1.0
NO_SWAD = {("erm", 1, "clay"), ("erm", 2, "clay")}


def write_run(run):
    """The files of a complete run; the three selections are at the steps 4, 2 and 6."""
    of = ACCURACY[run.method]
    accuracy = of[run.domain][SEEDS.index(run.seed)] if run.domain in of else 10.0
    others = [name for name in DOMAINS if name != run.domain]
    rows = [
        {"step": 2, "val_loss": 0.9, "top1": 70.0, f"{run.domain}_out_top1": 95.0},
        {"step": 4, "val_loss": 0.8, "top1": 90.0, f"{run.domain}_out_top1": 60.0},
        {"step": 6, "val_loss": 0.7, "top1": 80.0, f"{run.domain}_out_top1": 95.0},
    ]
    at = {2: accuracy + ORACLE_IS_HIGHER_BY, 4: accuracy, 6: accuracy - 5}
    for row in rows:
        row |= {f"{name}_out_top1": row["top1"] for name in others}
        row[f"{run.domain}_in_top1"] = at[row["step"]]
    run.folder.mkdir(parents=True)
    with open(run.folder / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    summary = {"source_fraction": 0.25, "images_per_second": 9.5, "skipped": ["a.jpg"]}
    if (run.method, run.seed, run.domain) not in NO_SWAD:
        summary[f"swad_{run.domain}_in_top1"] = accuracy + SWAD_IS_HIGHER_BY
    (run.folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def finished(make_options, tmp_path):
    """Options of a command all of whose runs are complete."""

    def make(**changes):
        given = {"methods": list(ACCURACY), "seeds": SEEDS, "test_domains": LEFT_OUT, "swad": True}
        options = make_options(**{**given, **changes})
        plan = make_plan(options)
        if not plan.output.exists():
            save_record(plan)
        for run in plan.runs():
            if not run.is_complete:
                write_run(run)
        return options

    return make


@pytest.mark.parametrize("kind", ["standard deviation", "standard error"])
def test_means_and_spreads_are_numpys(finished, tmp_path, kind):
    domainbed(finished(spread=kind))
    column = kind.replace(" ", "_")
    shift = {"training-domain validation": 0, "oracle": ORACLE_IS_HIGHER_BY, "SWAD": SWAD_IS_HIGHER_BY}
    table = rows_of(tmp_path / "bed" / "table.csv")
    assert [(row["selection"], row["method"]) for row in table] == [(s, m) for s in shift for m in ACCURACY]
    for row in table:
        values = np.array([ACCURACY[row["method"]][name] for name in LEFT_OUT]) + shift[row["selection"]]
        columns = {name: values[i] for i, name in enumerate(LEFT_OUT)}
        columns["mean over domains"] = values.mean(0)
        if (row["selection"], row["method"]) == ("SWAD", "erm"):
            columns["clay"] = columns["clay"][:1]
            columns["mean over domains"] = columns["mean over domains"][:1]
        for name, numbers in columns.items():
            assert int(row[f"{name}_n"]) == len(numbers)
            assert float(row[f"{name}_accuracy"]) == pytest.approx(numbers.mean(), abs=1e-4)
            if len(numbers) == 1:
                assert row[f"{name}_{column}"] == "-"
                continue
            spread = numbers.std(ddof=1) / (np.sqrt(len(numbers)) if kind == "standard error" else 1)
            assert float(row[f"{name}_{column}"]) == pytest.approx(spread, abs=1e-4)


def test_the_tables_name_selection_spread_and_n(finished, tmp_path):
    text = domainbed(finished())["markdown"]
    assert (tmp_path / "bed" / "table.md").read_text() == text
    header = (
        "| method | Real World, %, mean ± standard error, n = 3 | clay, %, mean ± standard error, n = 3 "
        "| mean over domains, %, mean ± standard error, n = 3 |"
    )
    rule = "| --- | ---: | ---: | ---: |"
    validation, oracle, swad, caption = text.replace("|\n\n", "|\n\n\n").strip().split("\n\n\n")
    # Means over domains within the seeds: 65, 72, 76; and 78, 74, 79.
    assert validation.split("\n") == [
        "**Training-domain validation**: of the evaluations of a run, the one with the best mean accuracy on "
        "the held-out images of the training domains.",
        "", header, rule,
        "| erm | 60.00 ± 5.77 | 82.00 ± 1.15 | 71.00 ± 3.21 |",
        "| miro_stochca | 67.00 ± 2.65 | 87.00 ± 1.53 | 77.00 ± 1.53 |",
    ]  # fmt: skip
    assert oracle.startswith("**Oracle**: ")
    assert "held-out images of the left-out domain, which in practice nobody has" in oracle
    assert oracle.split("\n")[2:] == [
        header, rule,
        "| erm, oracle | 62.00 ± 5.77 | 84.00 ± 1.15 | 73.00 ± 3.21 |",
        "| miro_stochca, oracle | 69.00 ± 2.65 | 89.00 ± 1.53 | 79.00 ± 1.53 |",
    ]  # fmt: skip
    assert swad.startswith("**SWAD**: the mean of the weights along the flat part of a run")
    assert swad.split("\n")[2:] == [
        header, rule,
        "| erm, SWAD | 61.00 ± 5.77 | 81.00 ± - (n = 1) | 66.00 ± - (n = 1) |",
        "| miro_stochca, SWAD | 68.00 ± 2.65 | 88.00 ± 1.53 | 78.00 ± 1.53 |",
    ]  # fmt: skip
    assert "70% of the left-out domain's images" in caption
    assert "mean ± standard error of the mean (sample standard deviation over the root of n)" in caption
    assert "over n = 3 seeds" in caption

    text = domainbed(finished(spread="standard deviation"))["markdown"]
    assert "| erm | 60.00 ± 10.00 | 82.00 ± 2.00 | 71.00 ± 5.57 |" in text
    assert "clay, %, mean ± standard deviation, n = 3" in text
    assert "sample standard deviation (n - 1)" in text


def test_without_swad_there_is_no_table_of_it(finished):
    text = domainbed(finished(swad=False))["markdown"]
    assert "**Oracle**" in text
    assert "SWAD" not in text


def test_each_run_has_its_row(finished, tmp_path):
    result = domainbed(finished())
    rows = rows_of(tmp_path / "bed" / "results.csv")
    assert len(rows) == result["runs"] == 12
    assert result["skipped"] == ["a.jpg"]
    expected = {
        "method": "erm", "seed": "1", "domain": "clay", "selected_step": "4", "accuracy": "84.0",
        "oracle_step": "2", "oracle_accuracy": "86.0", "swad_accuracy": "-", "source_fraction": "0.25",
        "images_per_second": "9.5", "skipped": "1",
    }  # fmt: skip
    assert expected in rows


def test_the_lowest_loss_selects_where_the_options_say_so(finished, tmp_path):
    text = domainbed(finished(eval_metric="loss"))["markdown"]
    assert "the one with the lowest mean loss on the held-out images of the training domains" in text
    row = results_of(tmp_path / "bed")[0]
    assert (row["selected_step"], row["accuracy"]) == ("6", "45.0")
    assert (row["oracle_step"], row["oracle_accuracy"]) == ("2", "52.0")


def test_a_continued_command_may_have_more_of_everything(finished, tmp_path):
    domainbed(finished(methods=["erm"], seeds=[0, 1], test_domains=["clay"]))
    assert len(results_of(tmp_path / "bed")) == 2
    domainbed(finished())
    rows = results_of(tmp_path / "bed")
    assert [(row["method"], row["seed"], row["domain"]) for row in rows] == [
        (method, str(seed), name) for method in ACCURACY for seed in SEEDS for name in LEFT_OUT
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.5}, "--lr was 0.001, is 0.5"),
        ({"p": 0.3}, "--p was 0.5, is 0.3"),
        ({"holdout_fraction": 0.5}, "--holdout-fraction was 0.3, is 0.5"),
        ({"miro_weight": 2.0}, "--miro-weight was 1.0, is 2.0"),
        ({"seeds": [0, 3]}, r"--seeds was \[0, 1, 2\], is \[0, 3\], which lacks \[1, 2\]"),
        ({"methods": ["erm"]}, r"--methods was .*, is \['erm'\], which lacks \['miro_stochca'\]"),
        (
            {"test_domains": ["clay", "ink"]},
            r"--test-domains was \['Real World', 'clay'\], is .*, which lacks \['Real World'\]",
        ),
    ],
)
def test_what_decides_results_is_not_changed(finished, make_options, tmp_path, changes, message):
    finished()
    record = (tmp_path / "bed" / "domainbed.yaml").read_text()
    given = {"methods": list(ACCURACY), "seeds": SEEDS, "test_domains": LEFT_OUT, "swad": True}
    with pytest.raises(ValueError, match=f"holds runs with other options: {message}; choose another"):
        domainbed(make_options(**{**given, **changes}))
    assert (tmp_path / "bed" / "domainbed.yaml").read_text() == record


def test_runs_of_other_domains_are_not_mixed_in(finished):
    options = finished()
    for path in (options.output + "/erm/seed-1/clay/metrics.csv",):
        with open(path) as file:
            text = file.read()
        with open(path, "w") as file:
            file.write(text.replace("ink_out_top1", "tar_out_top1"))
    with pytest.raises(ValueError, match=r"clay was run with the domains .* tar, now they are .* ink"):
        domainbed(options)
