"""A run of the scorecard goes on where it was stopped, and keeps what was off."""

import json

import pytest

from bench.digest import digests
from tests.scorecard import __main__ as runner
from tests.scorecard import journal
from tests.scorecard.journal import Journal, summary
from tests.scorecard.row import Case, NotMeasuredError, Row
from tests.scorecard.rows import ROWS

ROW = Row("R0", "what is counted", "all", "journal.cases", ("bench/digest.py",), at_least=3)


class Trial:
    """Cases that count their calls; those in `off` fail."""

    def __init__(self, *off):
        self.off, self.calls = off, []

    def cases(self, *names, figures=None):
        def check(name):
            self.calls.append(name)
            assert name not in self.off, f"{name} is off"
            return figures

        return [Case(name, lambda name=name: check(name)) for name in names]


@pytest.fixture
def record(tmp_path):
    return Journal(tmp_path, ROW)


def test_cases_that_held_are_not_run_again_and_those_that_were_off_are(record):
    trial = Trial("b")
    record.run(trial.cases("a", "b"))
    trial.off = ()
    record.run(trial.cases("a", "b", "c"))
    assert trial.calls == ["a", "b", "b", "c"]
    where, lines = record.read()
    assert where["code"] == digests(ROW.code)
    assert [line["error"] for line in lines.values()] == [None, None, None]


def test_a_line_that_was_being_written_is_run_again(record):
    trial = Trial()
    record.run(trial.cases("a", "b"))
    text = record.path.read_text()
    record.path.write_text(text[:-9])
    record.run(trial.cases("a", "b"))
    assert trial.calls == ["a", "b", "b"]
    assert set(record.read()[1]) == {"a", "b"}


def test_cases_of_other_code_are_run_again(record, monkeypatch):
    trial = Trial()
    record.run(trial.cases("a"))
    changed = dict.fromkeys(ROW.code, "0")
    monkeypatch.setattr(journal, "digests", lambda code: changed)
    assert record.read() == (None, {})
    record.run(trial.cases("a"))
    assert trial.calls == ["a", "a"]


def test_a_summary_counts_cases_and_keeps_the_largest_figure_and_what_was_off(record):
    trial = Trial("c")
    record.run(
        [
            *trial.cases("a", figures={"cases": 2, "largest_error": 1.5}),
            *trial.cases("b", figures={"largest_error": 0.5, "seconds_waited": 7}),
            *trial.cases("c"),
        ]
    )
    result = summary(ROW, *record.read())
    assert result["cases"] == 4
    assert result["figures"] == {"largest_error": 1.5, "seconds_waited": 7}
    assert list(result["off"]) == ["c"]
    assert result["off"]["c"].startswith("AssertionError: c is off")
    assert not result["reached"]


@pytest.mark.parametrize(
    ("cases", "off", "allowed", "reached"),
    [(2, 0, 0, False), (3, 0, 0, True), (3, 1, 0, False), (20, 1, 0.05, True), (20, 2, 0.05, False)],
)
def test_a_target_needs_enough_cases_and_allows_its_share_to_be_off(cases, off, allowed, reached):
    row = Row("R0", "", "", "", at_least=3, allowed=allowed)
    lines = {
        str(n): {"figures": {}, "seconds": 0.0, "error": "off" if n < off else None, "unmeasured": None}
        for n in range(cases)
    }
    assert summary(row, {}, lines)["reached"] is reached


def test_what_could_not_be_measured_is_tried_again_and_reaches_no_target(record):
    def check():
        raise NotMeasuredError("there is no network")

    trial = Trial()
    record.run([*trial.cases("a", "b", "c"), Case("d", check)])
    result = summary(ROW, *record.read())
    assert (result["cases"], result["off"]) == (3, {})
    assert result["unmeasured"] == {"d": "there is no network"}
    assert not result["reached"]
    record.run(trial.cases("a", "b", "c", "d"))
    assert trial.calls == ["a", "b", "c", "d"]
    assert summary(ROW, *record.read())["reached"]


def test_rows_that_did_not_run_keep_what_was_measured(tmp_path):
    path = tmp_path / "reliability.json"
    runner.write(path, {"R1": {"cases": 1}})
    runner.write(path, {"R2": {"cases": 2}})
    rows = json.loads(path.read_text())["rows"]
    assert list(rows) == [row.id for row in ROWS]
    assert rows["R1"]["measured"] == {"cases": 1}
    assert rows["R2"]["measured"] == {"cases": 2}
    assert rows["R3"]["measured"] is None


def test_a_process_that_dies_is_a_case_that_is_off(tmp_path, monkeypatch):
    monkeypatch.setattr(runner.sys, "executable", "/bin/false")
    measured = runner.measure([ROWS[0]], 1, tmp_path)[ROWS[0].id]
    assert list(measured["off"]) == ["process"]
    assert not measured["reached"]


def test_an_unknown_row_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        runner.main(["R99"])
    assert "got R99" in capsys.readouterr().err


def test_two_cases_of_one_name_are_refused(monkeypatch):
    monkeypatch.setattr(journal, "cases", lambda long: Trial().cases("a", "a"), raising=False)
    with pytest.raises(ValueError, match="R0 has two cases named a"):
        ROW.list(long=True)
