"""The statistics of a sweep, its files, and its plot."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stochca.sweep.command import sweep
from stochca.sweep.plan import make_plan
from stochca.sweep.report import seeds, summarise
from stochca.sweep.runs import Outcome
from tests.sweep.conftest import rows_of

SEEDS = [0, 1, 2, 3]
# By setting and seed; None is a run that failed.
BEST: dict[str, list[float | None]] = {
    "p=0": [80.0, 82.5, 81.0, None],
    "p=0.5": [84.0, 83.5, 85.25, 84.5],
    "mix": [79.0, None, None, None],
    "sum": [None, None, None, None],
    "concat": [None, None, None, 70.0],
}
LAST_IS_LOWER_BY = 0.75


@pytest.fixture
def finished(make_options, monkeypatch):
    """Run a sweep whose runs came to `BEST`."""

    def outcome(run):
        best = BEST[run.setting.name][run.seed]
        if best is None:
            return Outcome("failed", message="exit code 2")
        numbers = {"steps": 40, "best_step": 8, "images_per_second": 9.5, "source_fraction": 0.25}
        return Outcome(
            "complete",
            {**numbers, "best_top1": best, "last_top1": best - LAST_IS_LOWER_BY, "skipped": ["a.jpg"]},
        )

    monkeypatch.setattr(
        "stochca.sweep.command.execute", lambda runs, *_: ({run: outcome(run) for run in runs}, 0)
    )

    def run(**changes):
        return sweep(make_options(modes=["mix", "sum", "concat"], seeds=SEEDS, **changes))

    return run


@pytest.mark.parametrize("kind", ["standard deviation", "standard error"])
def test_mean_and_spread_and_paired_difference_are_numpys(finished, tmp_path, kind):
    finished(spread=kind)
    table = {row["setting"]: row for row in rows_of(tmp_path / "sweep" / "table.csv")}
    assert list(table) == list(BEST)
    column = kind.replace(" ", "_")
    first = np.array(BEST["p=0"], dtype=float)
    for name, row in table.items():
        values = np.array(BEST[name], dtype=float)
        there = values[~np.isnan(values)]
        assert int(row["n"]) == len(there)
        differences = values - first
        differences = differences[~np.isnan(differences)] if name != "p=0" else there[:0]
        assert int(row["difference_n"]) == len(differences)
        for metric, shift in (("best_top1", 0), ("last_top1", LAST_IS_LOWER_BY)):
            if len(there):
                assert float(row[f"{metric}_mean"]) == pytest.approx(there.mean() - shift, abs=1e-4)
            else:
                assert row[f"{metric}_mean"] == "-"
            if len(there) > 1:
                spread = there.std(ddof=1) / (np.sqrt(len(there)) if kind == "standard error" else 1)
                assert float(row[f"{metric}_{column}"]) == pytest.approx(spread, abs=1e-4)
            else:
                assert row[f"{metric}_{column}"] == "-"
            if len(differences):
                assert float(row[f"{metric}_difference"]) == pytest.approx(differences.mean(), abs=1e-4)
            else:
                assert row[f"{metric}_difference"] == "-"
            if len(differences) > 1:
                error = differences.std(ddof=1) / np.sqrt(len(differences))
                shown = float(row[f"{metric}_difference_standard_error"])
                assert shown == pytest.approx(error, abs=1e-4)
            else:
                assert row[f"{metric}_difference_standard_error"] == "-"


def test_the_table_names_its_spread_and_n(finished, tmp_path):
    result = finished(spread="standard error")
    text = (tmp_path / "sweep" / "table.md").read_text()
    assert result["markdown"] == text
    lines = text.splitlines()
    assert lines[0] == (
        "| setting | n | best top-1, %, mean ± standard error | last top-1, %, mean ± standard error "
        "| best top-1 minus that of p=0, points, mean ± standard error "
        "| last top-1 minus that of p=0, points, mean ± standard error | seeds in common |"
    )
    # Differences of 4, 1 and 4.25 points.
    assert lines[2:7] == [
        "| p=0 | 3 | 81.17 ± 0.73 | 80.42 ± 0.73 | - | - | - |",
        "| p=0.5 | 4 | 84.31 ± 0.37 | 83.56 ± 0.37 | +3.08 ± 1.04 | +3.08 ± 1.04 | 3 |",
        "| mix | 1 | 79.00 ± - | 78.25 ± - | -1.00 ± - | -1.00 ± - | 1 |",
        "| sum | 0 | - | - | - | - | - |",
        "| concat | 1 | 70.00 ± - | 69.25 ± - | - | - | - |",
    ]
    assert "standard error of the mean" in lines[8]
    assert "n = 0 to 4 seeds" in lines[8]
    text = finished(spread="standard deviation")["markdown"]
    assert "| p=0 | 3 | 81.17 ± 1.26 |" in text
    assert "best top-1, %, mean ± standard deviation |" in text
    assert "sample standard deviation (n - 1)" in text


def test_every_run_has_its_row(finished, tmp_path):
    result = finished()
    rows = rows_of(tmp_path / "sweep" / "results.csv")
    assert len(rows) == result["runs"] == 20
    assert result["complete"] == 9
    assert len(result["failed"]) == 11
    assert result["failed"]["sum, seed 2"] == "exit code 2"
    expected = {
        "setting": "p=0.5", "seed": "2", "status": "complete", "steps": "40", "best_step": "8",
        "best_top1": "85.25", "last_top1": "84.5", "images_per_second": "9.5", "source_fraction": "0.25",
        "skipped": "1",
    }  # fmt: skip
    assert expected in rows
    failed = next(row for row in rows if (row["setting"], row["seed"]) == ("p=0", "3"))
    assert set(failed.values()) == {"p=0", "3", "failed", "-"}


def test_the_plot_shows_means_spreads_and_seeds(finished, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    paths = finished(metric="last_top1")["plots"]
    assert [Path(path).name for path in paths] == ["sweep.png", "sweep.svg"]
    with Image.open(paths[0]) as image:
        assert image.width >= 800
    assert "<svg" in Path(paths[1]).read_text()

    over_p, others = figures[0].axes
    assert over_p.get_ylabel() == "last top-1 accuracy, %"
    assert over_p.get_xlabel().startswith("p, probability")
    assert figures[0].get_suptitle() == (
        "mean and standard deviation over n = 1 to 4 seeds, which are the small dots"
    )
    mean, *dots = over_p.lines
    np.testing.assert_allclose(mean.get_xydata(), [[0, 80.4167], [0.5, 83.5625]], atol=1e-4)
    last = [[value - LAST_IS_LOWER_BY for value in BEST[name] if value] for name in ("p=0", "p=0.5")]
    assert [list(line.get_ydata()) for line in dots] == last
    (band,) = over_p.collections
    heights = band.get_paths()[0].vertices[:, 1]
    deviation = np.std(last[1], ddof=1)
    assert heights.max() == pytest.approx(83.5625 + deviation)
    # Without a complete run, sum has nothing to show.
    assert [label.get_text() for label in others.get_xticklabels()] == ["mix", "concat"]


@pytest.mark.parametrize(
    "names",
    [
        ["mix", "sum", "concat"],
        ["p_schedule=0.5,0.3,0.1", "p=0,0,0,0,0,0,0.3,0.3,0.3,0.3,0.3,0.3", "mix", "sum", "concat"],
        [f"losses=miro(weight({weight}))" for weight in range(9)],
        ["p=" + ",".join(["0.3"] * 19), "mix", "sum", "concat", "p=" + ",".join(["0.5"] * 19)],
    ],
    ids=["modes", "lists", "many", "long"],
)
def test_labels_of_the_plot_do_not_overlap(names, tmp_path, monkeypatch):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from stochca.sweep.plot import draw
    from stochca.sweep.report import Estimate, Row

    figures = []

    def save(self, path, **_):
        figures.append(self)
        Path(path).touch()

    monkeypatch.setattr(Figure, "savefig", save)
    numbers = [(f"p={p}", p) for p in (0.0, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0)]
    rows = []
    for name, p in [*numbers, *((name, None) for name in names)]:
        estimate = Estimate([79.0, 80.0, 82.0], "standard deviation")
        rows.append(Row(name, p, {"best_top1": estimate, "last_top1": estimate}, {}))
    draw(rows, "best_top1", "standard deviation", tmp_path)
    canvas = FigureCanvasAgg(figures[0])
    canvas.draw()
    renderer = canvas.get_renderer()
    texts = [figures[0]._suptitle]
    for axes in figures[0].axes:
        assert axes.get_position().height > 0.4
        low, high = axes.get_xlim()
        ticks = [label for label in axes.get_xticklabels() if low <= label.get_position()[0] <= high]
        texts += [*ticks, axes.xaxis.label, axes.yaxis.label]
    shown = [text for text in texts if text.get_text()]
    boxes = [text.get_window_extent(renderer) for text in shown]
    for index, box in enumerate(boxes):
        assert figures[0].bbox.padded(1).containsx(box.x0)
        assert figures[0].bbox.padded(1).containsx(box.x1)
        assert figures[0].bbox.padded(1).containsy(box.y0)
        assert not [shown[i] for i in range(index + 1, len(boxes)) if box.overlaps(boxes[i])], shown[index]


def test_without_matplotlib_the_plot_is_left_out_and_said(finished, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "stochca.sweep.plot", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = finished()
    assert result["plots"] == []
    assert (
        "the plot is left out, as it needs matplotlib: pip install stochca[plots]" in capsys.readouterr().out
    )


def test_a_sweep_of_one_seed_says_that_there_is_no_spread(make_options):
    runs = make_plan(make_options(seeds=[0])).runs()
    summary = {"best_top1": 1.0, "last_top1": 1.0}
    rows = summarise({run: Outcome("complete", summary) for run in runs}, "standard deviation")
    assert seeds(rows) == "n = 1 seed"
    assert [json.dumps(row.estimates["best_top1"].spread) for row in rows] == ["null", "null"]
