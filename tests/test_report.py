"""Pages say what is recorded, and say so when it is old. The results here are made up."""

import json
import shutil

import pytest

pytest.importorskip("matplotlib")

from bench.digest import file_digest
from bench.report import pieces
from bench.report.__main__ import main
from bench.report.method import counts
from bench.report.pages import PAGES, render
from bench.report.recorded import Results
from tests.recorded import make_checkout, record

NOTE = "**Stale**: measured at commit 0123456789ab"


@pytest.fixture
def checkout(tmp_path):
    """A repository whose result is of the code that it has."""
    results = make_checkout(tmp_path)
    record(results, "scaling", {"value": 3})
    return results


def section(results):
    result = results.need("scaling")
    return f"{results.stale_note('scaling', result)}value {result['value']}"


PAGE = "# Page\n\n<!-- some-value -->\n<!-- /some-value -->\n\nEnd.\n"


def rendered(results, text=PAGE):
    return render(text, {"some-value": section}, results)


def test_a_section_is_filled_and_the_rest_is_left_alone(checkout):
    text, differing = rendered(checkout)
    assert text == PAGE.replace("<!-- some-value -->\n", "<!-- some-value -->\nvalue 3\n")
    assert differing == ["some-value"]
    assert rendered(checkout, text) == (text, [])
    record(checkout, "scaling", {"value": 4})
    assert rendered(checkout, text)[1] == ["some-value"]


def test_changed_code_is_said_and_changed_comments_are_not(checkout):
    text, _ = rendered(checkout)
    (checkout.root / "code" / "one.py").write_text('"""Now documented."""\nx = 1\n')
    assert rendered(checkout, text) == (text, [])
    (checkout.root / "code" / "one.py").write_text("x = 2  # one\n")
    stale, differing = rendered(checkout, text)
    assert differing == ["some-value"]
    assert f"{NOTE}, after which this code has changed: `code`." in stale.replace("\n", " ")
    assert "value 3" in stale, "stale results are shown, not hidden"
    assert rendered(checkout, stale) == (stale, []), "a page that says so is up to date"


def test_a_result_is_stale_when_what_it_started_from_appears_or_changes(checkout):
    record(checkout, "scaling", {"value": 3, "inputs": {"step": None}})
    assert "Stale" not in rendered(checkout)[0]
    record(checkout, "step", {"value": 1})
    note = "It did not start from this result as it is now: `bench/results/step.json`."
    assert f"{NOTE}. {note}" in rendered(checkout)[0].replace("\n", " ")
    step = checkout.root / "bench" / "results" / "step.json"
    record(checkout, "scaling", {"value": 3, "inputs": {"step": file_digest(step)}})
    assert "Stale" not in rendered(checkout)[0]
    record(checkout, "step", {"value": 2})
    assert note in rendered(checkout)[0].replace("\n", " ")


def test_code_that_is_gone_has_changed(checkout):
    (checkout.root / "code" / "one.py").unlink()
    assert NOTE in rendered(checkout)[0]


@pytest.mark.parametrize("code", [{}, None])
def test_results_without_digests_are_stale(checkout, code):
    record(checkout, "scaling", {"value": 3, "code": code})
    assert f"{NOTE}, before digests of code were recorded." in rendered(checkout)[0].replace("\n", " ")


def test_uncommitted_changes_are_said(checkout):
    record(checkout, "scaling", {"value": 3, "code": {}, "dirty": True})
    assert f"{NOTE} with uncommitted changes" in rendered(checkout)[0].replace("\n", " ")


def test_a_missing_result_names_what_records_it(checkout):
    (checkout.root / "bench" / "results" / "scaling.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"scaling\.json is missing: `python -m bench\.scaling"):
        rendered(checkout)


def test_bytes_with_recomputation_are_shown_where_they_were_counted(checkout):
    names = ("p", "full_source", "truncated_source", "flops_all_rows", "flops", "flops_max")
    names += ("saved_bytes", "saved_bytes_max", "source_fraction")
    cost = dict(zip(names, (0.1, 1.3, 1.2, 1.1, 1.0, 1.2, 0.9, 0.95, 0.5), strict=True))
    record(checkout, "counts", {"model": "vit", "costs": [cost]})
    row = "| 0.1 | 1.300 | 1.200 | 1.100 | **1.000** (max 1.200) | **0.900** (max 0.950) |"
    assert f"{row} 50% |" in counts(checkout)
    assert "recompute" not in counts(checkout)
    record(checkout, "counts", {"model": "vit", "costs": [{**cost, "recomputed_bytes": 0.8}]})
    assert f"{row} **0.800** | 50% |" in counts(checkout)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("# No section\n", "sections must be some-value, got $"),
        (f"{PAGE}<!-- other -->\n<!-- /other -->\n", "sections must be some-value, got other, some-value"),
        (PAGE.replace("<!-- /some-value -->\n", ""), "must end with <!-- /some-value -->"),
    ],
)
def test_sections_of_a_page_are_those_that_are_rendered(checkout, text, error):
    with pytest.raises(ValueError, match=error):
        rendered(checkout, text)


def test_pieces_and_float8_are_shown_or_named(checkout):
    assert "Not measured yet: `python -m bench.parts" in pieces.parts(checkout)
    assert "Not measured yet: `python -m bench.float8" in pieces.float8(checkout)
    ways = {"in turn": {"p50_ms": 2.0, "iqr_ms": 0.1, "ratio": 1.0}}
    ways["batched"] = {"p50_ms": 2.5, "iqr_ms": 0.1, "ratio": 1.25}
    record(checkout, "parts", {"device": "cpu", "parts": [{"name": "products", "ways": ways}]})
    assert "| products | batched | 2.50 | 1.25 |" in pieces.parts(checkout)
    found = {"logits": 0.0123, "gradients": 0.02, "cosine": 0.9, "q": [1.0, 0.9], "k": [1.0], "v": [1.0]}
    result = {"model": "vit", "batch": 4, "coins": [True, False], "differences": {"float8": found}}
    record(checkout, "float8", result)
    assert "| float8 | 1.23% | 2.00% | 0.90000 | 0.90000 | 1.00000 | 1.00000 |" in pieces.float8(checkout)
    assert "1 of 2 read the source" in pieces.float8(checkout)
    (checkout.root / "code" / "one.py").write_text("x = 2\n")
    assert pieces.parts(checkout).startswith("**Stale**")
    assert pieces.float8(checkout).startswith("**Stale**")


def test_check_names_page_and_section_and_changes_nothing(tmp_path, capsys, monkeypatch):
    root = Results().root
    # The others are checked by `make lint`: their predictions take longest.
    monkeypatch.setattr("bench.report.__main__.PAGES", {"README.md": PAGES["README.md"]})
    for name in ("bench/results", "docs", *dict.fromkeys(result_code(Results()))):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if (root / name).is_dir():  # one result may name a folder, another a file in it
            shutil.copytree(root / name, tmp_path / name, dirs_exist_ok=True)
        else:
            shutil.copy(root / name, tmp_path / name)
    for page in ("README.md", "bench/reliability.json"):
        shutil.copy(root / page, tmp_path / page)
    readme = tmp_path / "README.md"
    assert main([], Results(tmp_path)) == 0
    right = readme.read_text()
    assert main(["--check"], Results(tmp_path)) == 0
    wrong = right.replace("| 0.1 | 1.334 |", "| 0.1 | 1.234 |")
    readme.write_text(wrong)
    assert main(["--check"], Results(tmp_path)) == 1
    assert "README.md, section counts: differs" in capsys.readouterr().out
    assert readme.read_text() == wrong
    assert main([], Results(tmp_path)) == 0
    assert readme.read_text() == right


def result_code(results):
    """Whatever the recorded results measured."""
    for path in (results.root / "bench" / "results").glob("*.json"):
        yield from json.loads(path.read_text()).get("code") or {}
    rows = json.loads((results.root / "bench" / "reliability.json").read_text())["rows"]
    for row in rows.values():
        yield from (row["measured"] or {}).get("code") or {}
