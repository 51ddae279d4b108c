"""The page of the scorecard says what was measured, what was off, and what was not measured."""

import json

import pytest

pytest.importorskip("matplotlib")

from bench.report import reliability
from tests.recorded import make_checkout, where

MEASURED = {
    "seconds": 300,
    "cases": 2000,
    "off": {},
    "unmeasured": {},
    "figures": {"error_ratio": 1.734, "seconds_waited": 12},
    "reached": True,
}


@pytest.fixture
def checkout(tmp_path):
    return make_checkout(tmp_path)


def record(results, **measured):
    rows = {
        name: {"figure": f"what {name} counts", "target": "all", "measured": found}
        for name, found in measured.items()
    }
    for row in rows.values():
        if row["measured"]:
            row["measured"] = {**where(results), **row["measured"]}
    name = results.root / "bench" / "reliability.json"
    name.write_text(json.dumps({"rows": rows}).replace("_gpu", "-gpu"))


def test_a_row_shows_its_target_its_cases_and_its_figures(checkout):
    record(checkout, R2=MEASURED)
    assert reliability.scorecard(checkout).splitlines()[-1] == (
        "| R2 | what R2 counts | all | 2,000 cases, 0 off; error ratio 1.73; seconds waited 12 | reached |"
    )
    assert reliability.where(checkout) == (
        "- R2 (5 min): a machine; python 3.11.7, torch 2.11.0; commit 0123456789ab."
    )


def test_what_was_off_is_listed_and_a_missed_target_stays_in_the_table(checkout):
    off = {"a seed": "AssertionError: 3 is not\n2"}
    record(checkout, R2={**MEASURED, "off": off, "reached": False})
    text = reliability.scorecard(checkout)
    assert "2,000 cases, 1 off" in text
    assert "| **missed** |" in text
    assert text.endswith("- R2, a seed: AssertionError: 3 is not")


def test_cases_that_could_not_be_measured_are_listed_and_no_target_is_reached(checkout):
    reason = {"an audit": "there is no network\n2"}
    record(checkout, R2={**MEASURED, "unmeasured": reason, "reached": False})
    text = reliability.scorecard(checkout)
    assert "2,000 cases, 0 off, 1 not measured" in text
    assert "| measured in part |" in text
    assert text.endswith("Cases that could not be measured:\n\n- R2, an audit: there is no network")
    assert "0 did not, 1 were not measured or in part" in reliability.readme(checkout).replace("\n", " ")


def test_rows_that_were_not_measured_say_so_and_what_measures_them(checkout):
    record(checkout, R3=None, R6_gpu=None)
    assert "| R3 | what R3 counts | all | not measured | - |" in reliability.scorecard(checkout)
    assert reliability.where(checkout).splitlines() == [
        "- R3: not measured; `make stress` measures on a CPU.",
        "- R6-gpu: not measured; `python3 -m tests.scorecard` measures on a GPU.",
    ]


def test_a_row_whose_code_has_changed_is_stale(checkout):
    record(checkout, R2=MEASURED)
    (checkout.root / "code" / "one.py").write_text("x = 2\n")
    assert "| reached, **stale** |" in reliability.scorecard(checkout)
    assert reliability.where(checkout).endswith("- **Stale**, as code has changed after the commit: R2.")
    assert "(1 at an earlier state of the code)" in reliability.readme(checkout).replace("\n", " ")


def test_the_readme_counts_what_reached_missed_and_was_not_measured(checkout):
    record(checkout, R1=MEASURED, R2={**MEASURED, "reached": False}, R3=None)
    assert reliability.readme(checkout).replace("\n", " ") == (
        "Of 3 figures of reliability 1 reached their target, 1 did not, 1 were not measured or in part "
        "(commit 0123456789ab)."
    )


def test_without_a_record_its_command_is_named(checkout):
    with pytest.raises(FileNotFoundError, match="make stress"):
        reliability.scorecard(checkout)
