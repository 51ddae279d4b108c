"""Diagrams of the pages show the code as it is."""

import shutil
from xml.etree import ElementTree

import pytest

from bench.diagrams.__main__ import FOLDER, diagrams, main
from bench.diagrams.step import CLASS_ROWS, TRUNCATED, step
from stochca_kernels import tiles

SVG = "{http://www.w3.org/2000/svg}"
KEY = ("fwd", "sm_90", "half")


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(FOLDER, tmp_path / "diagrams")


def texts(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_diagrams_of_this_repository_show_its_code(capsys):
    assert main(["--check"]) == 0, capsys.readouterr().out


def test_a_changed_row_of_the_table_changes_its_diagram_alone(monkeypatch, folder, capsys):
    (first, *others), wide = tiles._TABLE[KEY]
    monkeypatch.setitem(tiles._TABLE, KEY, ((first._replace(block_m=32), *others), wide))
    assert main(["--check"], folder) == 1
    said = capsys.readouterr().out
    assert said == "diagrams/tiles-fwd-resident.svg: differs, run `python -m bench.diagrams`\n"
    assert main([], folder) == 0
    assert "blocks of 32 queries: the target's, then the" in texts(
        (folder / "tiles-fwd-resident.svg").read_text()
    )
    assert main(["--check"], folder) == 0


def test_a_diagram_of_nothing_is_removed_and_a_missing_one_drawn(folder):
    (folder / "old.svg").write_text("<svg/>")
    (folder / "tiles-dq.svg").unlink()
    assert main(["--check"], folder) == 1
    assert (folder / "old.svg").exists(), "a check changes nothing"
    main([], folder)
    assert {path.name: path.read_text() for path in folder.iterdir()} == diagrams()


@pytest.mark.parametrize("name", diagrams())
def test_nothing_is_drawn_outside(name):
    root = ElementTree.fromstring(diagrams()[name])
    width, height = map(float, root.attrib["viewBox"].split()[2:])
    for element in root.iter(f"{SVG}rect"):
        x, y = (float(element.attrib.get(key, 0)) for key in "xy")
        assert 0 <= x <= x + float(element.attrib["width"]) <= width + 1e-3
        assert 0 <= y <= y + float(element.attrib["height"]) <= height + 1e-3
    for element in root.iter(f"{SVG}text"):
        letters = len(element.text) * (6.2 if "small" in element.attrib["class"] else 7.2)
        middle, end = ("middle" in element.attrib["class"], "end" in element.attrib["class"])
        start = float(element.attrib["x"]) - letters * (0.5 if middle else 1 if end else 0)
        assert start >= 0, element.text
        assert start + letters <= width, element.text
        assert float(element.attrib["y"]) <= height


@pytest.mark.parametrize(("coins", "not_run", "class_rows"), [(TRUNCATED, 4, 1), (CLASS_ROWS, 1, 3)])
def test_a_step_leaves_out_what_its_plan_leaves_out(coins, not_run, class_rows):
    svg = str(step("title", coins))
    shown = texts(svg)
    assert shown.count("not run") == not_run
    assert shown.count("β = 1") == sum(coins)
    assert shown.count("K₀, V₀") == sum(coins) + 1, "of the last one, they are all that runs"
    assert svg.count('height="14"') == class_rows
