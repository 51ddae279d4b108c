"""The model of many GPUs is called a prediction, and what two processes took is called measured."""

import pytest

pytest.importorskip("matplotlib")

from bench.report import scaling
from bench.report.__main__ import main
from bench.report.pages import PAGES
from tests.recorded import make_checkout, record


def made_up(**others):
    rows = [
        {
            "gpus": gpus,
            "equal_ms": 10.0 + gpus / 64,
            "independent_ms": 12.0,
            "simulated_ms": 11.9,
            "simulated_error_ms": 0.1,
            "equal_efficiency": 10 / (10 + gpus / 64),
            "independent_efficiency": 0.8,
            "images_per_s": 1000.0 * gpus,
            "states_gib": 1.5,
        }
        for gpus in (1, 2, 64)
    ]
    case = {"workload": "vit", "title": "ViT", "one_gpu_ms": 10.0, "one_gpu": "predicted", "rows": rows}
    run = {
        "model": "tiny",
        "depth": 4,
        "image_size": 32,
        "batch": 2,
        "p": 0.5,
        "alone_ms": 5.0,
        "equal_ms": 6.0,
        "independent_ms": 7.5,
        "measured_ratio": 1.25,
        "predicted_ratio": 1.2,
    }
    cases = [{**case, "p": p, "strategy": strategy} for p in (0.1, 0.5) for strategy in ("DDP", "FSDP")]
    return {"cases": cases, "processes": [run], "seconds": 9.0, **others}


@pytest.fixture
def checkout(tmp_path):
    return make_checkout(tmp_path)


def test_prediction_and_measurement_are_told_apart(checkout):
    record(checkout, "scaling", made_up())
    predicted, measured = scaling.section(checkout).split("*Measured* on a machine")
    assert predicted.startswith("A *prediction*: no run on many GPUs was measured.")
    assert "- ViT, p=0.1: a step on one GPU takes 10.0 ms, predicted." in predicted
    assert "| ViT | 0.1 | FSDP | 64 | 11.00 | 12.00 | 11.90 ± 0.10 | 90.9% | 80.0% |" in predicted
    assert "| tiny, 4 blocks, 32 px, B=2 | 0.5 | 5.0 | 6.0 | 7.5 | 1.250 | 1.200 |" in measured


def test_without_processes_nothing_is_called_measured(checkout):
    record(checkout, "scaling", made_up(processes=[]))
    assert "*Measured*" not in scaling.section(checkout)


def test_nothing_recorded_and_stale_records_are_said(checkout):
    assert scaling.section(checkout).startswith("Not measured yet: `python -m bench.scaling")
    assert scaling.pictures(checkout) == {}
    record(checkout, "scaling", made_up())
    assert "**Stale**" not in scaling.section(checkout)
    (checkout.root / "code" / "one.py").write_text("x = 2\n")
    assert scaling.section(checkout).startswith("**Stale**")
    assert scaling.pictures(checkout)["scaling-efficiency"].title.endswith(", stale")


def test_the_picture_is_of_the_first_case_under_each_strategy(checkout):
    result = made_up()
    for case in result["cases"][2:]:
        case["rows"] = [{**row, "independent_efficiency": 0.5} for row in case["rows"]]
    record(checkout, "scaling", result)
    picture = scaling.pictures(checkout)["scaling-efficiency"]
    assert picture.title == "Predicted efficiency: ViT, p=0.1"
    assert picture.lines["DDP, equal coins"][1:] == [
        (2, pytest.approx(99.69, abs=0.01)),
        (64, pytest.approx(90.91, abs=0.01)),
    ]
    assert picture.lines["FSDP, independent coins"] == [(1, 80.0), (2, 80.0), (64, 80.0)]
    assert "(figures/scaling-efficiency.svg)" in scaling.section(checkout)


def test_the_picture_is_written_and_checked(checkout, monkeypatch, capsys):
    for page in PAGES:
        monkeypatch.setitem(PAGES, page, {})
        (checkout.root / page).write_text("")
    record(checkout, "scaling", made_up())
    assert main(["--check"], checkout) == 1
    assert capsys.readouterr().out.startswith("docs/figures/scaling-efficiency.svg: differs")
    assert main([], checkout) == 0
    assert main(["--check"], checkout) == 0
