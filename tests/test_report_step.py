"""Tables of steps and their pictures say what was recorded of everybody, losers and failures included."""

import re

import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from bench import step_bytes, step_times
from bench.report import benchmarks, pictures, plots, step
from bench.report.__main__ import main
from bench.report.pages import PAGES
from bench.report.roofline import roofline
from bench.sizes import size_of
from bench.step.cases import ABLATION, ALL
from bench.step.workloads import Workload
from tests.recorded import make_case, make_checkout, make_step, record, timed

OUT_OF_MEMORY = {"status": "out of memory", "reason": "OutOfMemoryError: 9 GiB <a|b>\nsecond line"}


def rows(text):
    """Cells of all lines of a table."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line
    ]


@pytest.fixture
def checkout(tmp_path):
    return make_checkout(tmp_path)


@pytest.fixture
def measured():
    """Two p, three image sizes, an ablation, goals; ours loses to plain, somebody fails."""
    everybody = {
        "plain": timed(40.0, peak_mib_without_frozen=1000.0, flops=8e12, mfu=0.25),
        "ours": timed(50.0, peak_mib_without_frozen=900.0, flops=9e12, mfu=0.2),
        "by hand": timed(100.0, peak_mib_without_frozen=None, flops=10e12, mfu=0.125),
        "as published": OUT_OF_MEMORY,
    }
    eager = {name: everybody[name] for name in ("plain", "ours")}
    sizes = [make_case(eager, "N", batch=16, image_size=size) for size in (448, 224, 320)]
    goals = [
        {"goal": "over plain", "at_most": 1.0, "value": 1.25, "verdict": "missed"},
        {"goal": "over published", "at_least": 10.0, "value": None, "verdict": "not measured"},
        {"goal": "over by hand", "at_most": 0.8, "value": 0.5, "verdict": "reached"},
    ]
    return make_step(
        make_case(everybody),
        make_case(eager, p=0.5),
        *sizes,
        make_case({"ours": timed(50.0), "ours, all rows": timed(60.0)}, "ablation"),
        device="cuda",
        matmul_flops_per_s_by_dtype={"bfloat16": 800e12, "float32": 50e12},
        goals=[{**goal, "case": "main vit-B128 bfloat16 p=0.1"} for goal in goals],
    )


def test_a_case_has_a_row_for_everybody(measured):
    header, _, *lines = rows(step.case_table(measured["cases"][0]))
    assert header == [
        "provider",
        "p50 (p20-p80), ms",
        "mean over coins, ms",
        "peak without frozen, MiB",
        "TFLOP a step",
        "MFU",
        "ours / it",
    ]
    assert lines == [
        ["plain", "40.0 (36.0-44.0)", "40.0 ± 4.0", "1000", "8.00", "25%", "**1.25**"],
        ["ours", "50.0 (45.0-55.0)", "50.0 ± 5.0", "900", "9.00", "20%", "-"],
        ["by hand", "100 (90.0-110)", "100 ± 10", "-", "10.0", "12%", "0.50"],
        ["as published", "*out of memory*", "-", "-", "-", "-", "-"],
    ]


@pytest.mark.parametrize("status", ["wrong", "failed", "unsupported", "not reached", "checked"])
def test_whoever_was_not_timed_is_named_with_a_reason(status):
    case = make_case({"ours": timed(1.0), "other": {"status": status, "reason": "because"}})
    result = make_step(case)
    assert f"| other | *{status}* |" in step.case_table(case)
    assert step.failures(result) == f"- ViT, B=128, bfloat16, p=0.1, other: *{status}*, because"


def test_a_reason_is_one_line_of_text():
    result = make_step(make_case({"ours": timed(1.0), "other": OUT_OF_MEMORY}))
    assert step.failures(result).endswith("OutOfMemoryError: 9 GiB &lt;a|b>")
    long = {"status": "failed", "reason": "x" * 5000}
    assert len(step.failures(make_step(make_case({"ours": timed(1.0), "other": long})))) < 300


def test_a_case_of_which_nothing_was_measured_has_its_rows():
    refused = {"status": "not reached", "reason": "no time was left"}
    assert rows(step.case_table(make_case({"plain": refused})))[2:] == [["plain", "*not reached*", "-"]]


def test_times_over_p_come_from_all_cases_of_a_setting(measured):
    text = step.p_tables(measured)
    assert rows(text)[0][1:] == ["0.1", "0.5"]
    assert ["ours", "50.0", "50.0"] in rows(text)
    assert ["by hand", "100 (0.50)", "-"] in rows(text)
    assert ["as published", "*out of memory*", "-"] in rows(text)


def test_of_two_cases_of_one_p_that_of_more_providers_counts(measured):
    few = make_case({"ours": timed(70.0)}, "p")
    measured["cases"].append(few)
    assert ["ours", "50.0", "50.0"] in rows(step.p_tables(measured))
    measured["cases"] = [few, *measured["cases"][:-1]]
    assert ["ours", "50.0", "50.0"] in rows(step.p_tables(measured))


def test_no_case_is_left_out():
    entries = {"ours": timed(10.0)}
    alone, over_p = make_case(entries, "p", batch=1), [make_case(entries, "p", p=p) for p in (0.1, 0.5)]
    experiment = make_case(entries, "experiments", batch=2)
    text = step.other_tables(make_step(alone, *over_p, experiment))
    assert re.findall(r"B=(\d+)", text) == ["1", "2"]


def test_growth_is_in_the_order_of_what_grows(measured):
    tables = rows(step.growth_tables(measured))
    assert tables[0][1:] == ["224", "320", "448"]
    assert tables[4] == ["peak without frozen, MiB, pixels =", "224", "320", "448"]
    assert tables[7] == ["ours", "900", "900", "900"]
    assert tables[8] == ["MFU, pixels =", "224", "320", "448"]
    assert tables[10] == ["plain", "25%", "25%", "25%"]
    depths = [make_case({"ours": timed(9.0)}, "depth", depth=depth) for depth in (12, 4)]
    assert rows(step.growth_tables(make_step(*depths)))[0][1:] == ["4", "12"]
    unknown = make_case({"ours": {"status": "not reached"}}, "N", image_size=None)
    assert step.growth_tables(make_step(unknown)) == ""


def test_where_peak_and_utilisation_are_unknown_other_figures_are_shown():
    entries = [{"ours": timed(9.0, saved_mib=70.0 * n, images_per_s=5.0 * n, mfu=None)} for n in (1, 2)]
    cases = [make_case(entry, "B", batch=n + 1) for n, entry in enumerate(entries)]
    tables = rows(step.growth_tables(make_step(*cases)))
    assert tables[3:] == [
        ["saved for backward, MiB, B =", "1", "2"],
        ["---", "---:", "---:"],
        ["ours", "70.0", "140"],
        ["images/s, B =", "1", "2"],
        ["---", "---:", "---:"],
        ["ours", "5.00", "10.0"],
    ]


def test_a_goal_has_its_interval_over_rounds():
    goal = {"goal": "g", "at_most": 1.0, "value": 0.9, "low": 0.85, "high": 1.01, "verdict": "reached"}
    assert "0.900 (0.850-1.010) reached" in step.goal_table({"goals": [{**goal, "case": "c"}]})
    unknown = {**goal, "low": None, "high": None, "case": "c"}
    assert "| 0.900 reached |" in step.goal_table({"goals": [unknown]})


def test_predicted_goals_that_are_missed_say_so(checkout):
    for text in (benchmarks.readme_gpu(checkout), benchmarks.goals(checkout)):
        (line,) = [
            row for row in rows(text) if row[0].endswith("over plain fine-tuning") and "peak" in row[0]
        ]
        assert all(cell.startswith("**") and cell.endswith(" missed**") for cell in line[2:])


def test_goals_are_reached_missed_or_neither(measured):
    assert rows(step.goal_table(measured)) == [
        ["goal", "goal is", "ViT, B=128, bfloat16, p=0.1"],
        ["---", "---:", "---:"],
        ["over plain", "<= 1.00", "**1.250 missed**"],
        ["over published", ">= 10.00", "**not measured**"],
        ["over by hand", "<= 0.80", "0.500 reached"],
    ]


def test_where_the_time_goes_is_a_table_of_its_own():
    case = make_case({"ours": timed(9.0, breakdown={"attention": 2.0, "idle": 0.0}), "plain": timed(8.0)})
    assert rows(step.breakdown_table(case))[2:] == [["ours", "2.00", "0.00"]]
    assert "where the time goes" in step.main_tables(make_step(case))
    assert step.breakdown_table(make_case({"ours": timed(9.0)})) == ""


def test_what_is_not_measured_is_said_with_its_command_and_predicted(checkout):
    for text in (benchmarks.readme_gpu(checkout), benchmarks.goals(checkout)):
        assert "*prediction*" in text
        assert "`python3 -m bench.step --quick --output bench/results/step.json` measures it" in text
        assert "*measured*" not in text
    for section in (benchmarks.readme_cpu, benchmarks.cpu):
        assert section(checkout).startswith("Not measured yet: `python -m bench.step --cpu")
    assert pictures.pictures(checkout) == {}


def test_a_measurement_takes_the_place_of_the_prediction(checkout, measured):
    record(checkout, "step", measured)
    text = benchmarks.readme_gpu(checkout)
    assert "*measured* on a GPU, driver 570.1, CUDA 12.8" in text.replace("\n", " ")
    assert "prediction" not in text
    assert ["plain", "40.0 (**1.25**)", "40.0 (**1.25**)", "1000"] in rows(text)
    assert "**1.250 missed**" in text
    assert "![Step over p: ViT, B=128, bfloat16](docs/figures/step-time-over-p.svg)" in text
    page = benchmarks.gpu(checkout)
    for heading in ("Main workloads", "Over p", "Growth", "Ablation", "Not timed", "Pictures"):
        assert f"### {heading}" in page
    assert "800 TFLOP/s bfloat16, 50.0 TFLOP/s float32." in page.replace("\n", " ")


def test_a_result_without_cases_is_rendered(checkout):
    record(checkout, "step-cpu", make_step())
    assert benchmarks.readme_cpu(checkout) == "No main case was measured."
    assert "Measured on a machine" in benchmarks.cpu(checkout)
    assert pictures.pictures(checkout) == {}


def test_stale_results_stay_and_say_so(checkout, measured):
    record(checkout, "step", measured)
    fresh = benchmarks.readme_gpu(checkout), benchmarks.gpu(checkout), benchmarks.goals(checkout)
    before = pictures.pictures(checkout)
    (checkout.root / "code" / "one.py").write_text("x = 2\n")
    stale = benchmarks.readme_gpu(checkout), benchmarks.gpu(checkout), benchmarks.goals(checkout)
    for now, then in zip(stale, fresh, strict=True):
        assert "**Stale**: measured at commit 0123456789ab" in now
        assert set(then.splitlines()) <= set(now.splitlines())
    for name, picture in pictures.pictures(checkout).items():
        assert picture.title.endswith("a GPU, stale")
        assert plots.digest(picture) != plots.digest(before[name])


def test_pictures_show_what_was_recorded(checkout, measured):
    record(checkout, "step", measured)
    drawn = pictures.pictures(checkout)
    assert list(drawn) == [
        f"step-{kind}" for kind in ("time-over-p", "memory-over-p", "time-over-size", "ablation", "roofline")
    ]
    assert drawn["step-time-over-p"].lines["plain"] == [(0.1, 40.0), (0.5, 40.0)]
    assert drawn["step-time-over-p"].lines["by hand"] == [(0.1, 100.0)]
    assert drawn["step-memory-over-p"].lines.keys() == {"plain", "ours"}, "null is no memory"
    assert drawn["step-time-over-size"].lines["ours"] == [(224, 50 / 16), (320, 50 / 16), (448, 50 / 16)]
    assert drawn["step-ablation"].bars == {"ours": (50.0, 5.0), "ours, all rows": (60.0, 6.0)}
    assert drawn["step-roofline"].points.keys() == {"plain", "ours", "by hand"}


def test_the_roofline_has_flops_per_byte_and_what_was_measured_in_the_same_run(measured):
    case = measured["cases"][0]
    case["providers"]["as published"] = timed(400.0, flops=10e12)
    case["providers"]["somebody"] = timed(40.0, flops=1e12)
    picture = roofline(measured, "a GPU")
    size = size_of(Workload("", "vit_tiny_patch16_224", 128, 224))
    moved = step_bytes.expected_bytes(size, 128, step_times.PLAIN_EAGER, case["draws"])
    assert picture.points["plain"] == pytest.approx((8e12 / moved, 200.0))
    assert "FLOP per byte" in picture.x
    assert "bytes counted on paper" in picture.title
    assert picture.roofs == {"products, bfloat16": 800.0, "products, float32": 50.0}
    assert picture.slope is None, "memory of this GPU is not known"
    assert "somebody" not in picture.points, "whose bytes nobody has counted"
    measured["gpu"]["name"] = "NVIDIA H200"
    assert roofline(measured, "a GPU").slope == pytest.approx(4.3)
    del measured["matmul_flops_per_s_by_dtype"]
    assert roofline(measured, "a GPU").roofs == {"products, bfloat16 (assumed)": 790.0}


def test_rates_below_the_slope_and_the_roofs_are_drawn_below_them():
    points = {"plain": (50.0, 100.0), "ours": (400.0, 300.0)}
    picture = plots.Roofline("t", "x", "y", points, {"bf16": 800.0, "f32": 50.0}, 4.0, "memory")
    axes = Figure().add_subplot()
    picture.draw(axes)
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    assert lines["bf16"] == [[200.0, 800.0], [800.0, 800.0]]
    assert lines["f32"] == [[12.5, 50.0], [800.0, 50.0]]
    assert lines["memory"] == [[6.25, 25.0], [200.0, 800.0]]
    assert lines["plain"] == [[50.0, 100.0]]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")


def test_a_float32_step_moves_float32_bytes():
    entries = {name: timed(40.0, flops=1e9) for name in ("plain", "plain compiled", "ours")}
    half, full = (roofline(make_step(make_case(entries, dtype=d)), "") for d in ("bfloat16", "float32"))
    assert full.points["plain"][0] < 0.75 * half.points["plain"][0]
    assert full.points.keys() == {"plain", "ours"}, "whose fused kernels in float32 are not known"


def test_memory_of_a_cpu_is_what_is_kept_for_the_backward(checkout):
    entries = {"ours": timed(9.0, peak_mib_without_frozen=None, saved_mib=77.0)}
    record(checkout, "step-cpu", make_step(make_case(entries), make_case(entries, p=0.5)))
    picture = pictures.pictures(checkout)["step-cpu-memory-over-p"]
    assert picture.lines == {"ours": [(0.1, 77.0), (0.5, 77.0)]}
    assert picture.y == "saved for the backward, MiB"


def test_everybody_in_a_picture_looks_different():
    names = ["ours", "ours compiled", "plain", "as published", "as published, autocast", "ours, all rows"]
    looks = [(s["color"], s["marker"], s["linestyle"]) for s in plots._styles([*names, "a", "b", "c"])]
    assert len(set(looks)) == len(looks)
    for names in (ABLATION, ALL):
        looks = [(s["color"], s["marker"], s["linestyle"]) for s in plots._styles(names)]
        assert len(set(looks)) == len(names)
    assert len(plots._styles([f"ours {n}" for n in range(100)])) == 100, "no number of them is too many"


def write_pages(results):
    """Pages with nothing in their sections that are about steps, and no others."""
    for page, sections in PAGES.items():
        text = "".join(f"<!-- {name} -->\n<!-- /{name} -->\n" for name in sections)
        (results.root / page).write_text(text)


def test_check_fails_until_pages_and_pictures_are_written(checkout, measured, monkeypatch, capsys):
    for page in PAGES:
        about_steps = {name: of for name, of in PAGES[page].items() if of.__module__ == benchmarks.__name__}
        monkeypatch.setitem(PAGES, page, about_steps)
    record(checkout, "step", measured)
    write_pages(checkout)
    assert main(["--check"], checkout) == 1
    said = capsys.readouterr().out
    assert "README.md, section step: differs" in said
    assert "docs/figures/step-roofline.svg: differs" in said
    assert not (checkout.root / "docs" / "figures").exists()

    assert main([], checkout) == 0
    assert main(["--check"], checkout) == 0
    files = {path: path.read_bytes() for path in checkout.root.rglob("*") if path.suffix in (".md", ".svg")}
    for path in files:
        path.unlink() if path.suffix == ".svg" else None
    assert main([], checkout) == 0
    assert all(path.read_bytes() == content for path, content in files.items()), "the same every time"
    linked = re.findall(r"\]\((figures/.*?\.svg)\)", (checkout.root / "docs" / "benchmarks.md").read_text())
    assert {f"docs/{name}" for name in linked} == {
        path.relative_to(checkout.root).as_posix() for path in files if path.suffix == ".svg"
    }

    measured["cases"][0]["providers"]["plain"]["mean_ms"] = 41.0
    record(checkout, "step", measured)
    capsys.readouterr()
    assert main(["--check"], checkout) == 1
    said = capsys.readouterr().out
    assert "docs/benchmarks.md, section step: differs" in said
    assert "docs/figures/step-time-over-p.svg: differs" in said
    assert "step-ablation.svg" not in said

    (checkout.root / "bench" / "results" / "step.json").unlink()
    assert main([], checkout) == 0
    assert not list((checkout.root / "docs" / "figures").glob("*.svg")), "nothing is recorded for them"
