"""The report in a real browser, and the colours that its plots have in it."""

import re

import pytest

from stochca.analysis.measures import MEASURES
from stochca.analysis.style import INK, SERIES, series, themed
from tests.analysis.browser import browser, shown

IN_BROWSER = pytest.mark.skipif(browser() is None, reason="needs Chromium: on the path, or named by CHROME")

# For each of two runs; a legend, 9 plots over blocks, 5 maps of heads, and for each of 2 images both maps.
PLOTS = 2 + 9 + 2 * 5
PICTURES = 2 * (1 + 1 + 2)


@pytest.fixture(scope="module")
def page(analyzed, tmp_path_factory):
    """The report as a browser shows it on a desktop."""
    return shown(analyzed.output / "report.html", tmp_path_factory.mktemp("profile"), 1280)


@IN_BROWSER
def test_the_page_is_whole_in_itself(page):
    assert page["title"] == "Target and source: plain, stochca"
    assert page["asked"] == ["/", "/page.html"]
    assert [name for name in page["requests"] if not name.startswith("data:")] == []
    assert page["console"] == []


@IN_BROWSER
def test_all_images_are_there_and_described(page):
    assert len(page["images"]) == PLOTS + PICTURES
    for image in page["images"]:
        assert image["width"] > 0
        assert image["shown"] > 20
    described = [image["alt"] for image in page["images"] if image["alt"]]
    assert len(described) == PLOTS + PICTURES - 2  # the legend's lines, whose names stand beside them
    assert sum("plain: " in alt and "stochca: " in alt for alt in described) == 9
    assert sum(alt.startswith("Map of ") for alt in described) == 10
    assert [alt.split(":")[0] for alt in described[-8:-4]] == [
        "Image 1", "Attention of source", "Attention of plain", "Attention of stochca",
    ]  # fmt: skip


@IN_BROWSER
def test_tables_have_a_row_for_each_measure_block_and_option(page, analyzed):
    tables = {table["caption"]: table["rows"] for table in page["tables"]}
    means = tables["Means of each run"]
    assert means[0] == ["measure", "plain", "stochca"]
    assert [row[0] for row in means[1:]] == [measure.label for measure in MEASURES.values()]
    printed = [line.strip("| ").split(" | ") for line in analyzed.printed.splitlines() if " ± " in line]
    assert means[1:] == printed[: len(means) - 1]
    for measure in MEASURES.values():
        rows = tables[measure.label]
        assert [row[0] for row in rows] == ["block", "0", "1"]
        assert all(re.fullmatch(r"-?[\d.]+ ± [\d.]+", cell) for row in rows[1:] for cell in row[1:])
    options = {name: cells for name, *cells in tables["Options that differ from the defaults"]}
    assert options["p"] == ["0.0", "0.5"]
    assert options["lr"] == ["0.01", "0.01"]
    facts = {name: cells for name, *cells in tables["Where the weights come from"]}
    assert all(cell.endswith("(the digest is that of the run's source)") for cell in facts["source"])


@IN_BROWSER
def test_it_fits_a_phone_and_follows_the_readers_preference(page, analyzed, tmp_path):
    phone = shown(analyzed.output / "report.html", tmp_path, 375, dark=True)
    assert (page["overflow"], phone["overflow"]) == (0, 0)
    assert (page["background"], phone["background"]) == ("rgb(255, 255, 255)", "rgb(21, 25, 30)")
    assert phone["console"] == []


def test_the_page_names_versions_device_and_images(analyzed, folder):
    text = (analyzed.output / "report.html").read_text()
    for name in ("Python", "torch", "timm", "stochca", "device", "precision of the models", "data_dir"):
        assert re.search(rf"<dt>{name}</dt><dd>[^<]+</dd>", text), name
    assert f"<dd>{folder}</dd>" in text
    assert "<script" not in text


def test_plots_change_their_colours_with_the_page():
    svg = f'<?xml version="1.0"?><svg width="1"><path style="stroke: {SERIES[0][0]}; fill: {INK[0]}"/></svg>'
    found = themed(svg)
    stroke, fill = re.search(r"stroke: var\((--\w+)\); fill: var\((--\w+)\)", found).groups()
    light, dark = found.split("@media (prefers-color-scheme:dark)")
    for name, (on_white, on_black) in ((stroke, SERIES[0]), (fill, INK)):
        assert f"{name}:{on_white}" in light
        assert f"{name}:{on_black}" in dark


def test_runs_are_told_apart_by_colour_and_marker():
    looks = [tuple(series(index).values()) for index in range(30)]
    assert len(set(looks)) == 30
    assert len({color for color, _ in looks[:6]}) == len({marker for _, marker in looks[:6]}) == 6
