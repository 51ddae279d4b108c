"""Cases have names of their own, and goals are about them."""

import pytest

from bench.step import cases, goals
from bench.step.cases import Case, cpu_cases, gpu_cases, quick_gpu_cases, tiny_cases
from bench.step.providers import OURS, PLAIN, PROVIDERS
from bench.step.report import goal_lines
from bench.step.workloads import TINY
from tests.bench_step.common import F32


def test_cases_have_names_of_their_own():
    for chosen in (gpu_cases(), quick_gpu_cases(), cpu_cases(), tiny_cases()):
        names = [case.name for case in chosen]
        assert len(set(names)) == len(names)
        assert all(name in PROVIDERS for case in chosen for name in case.providers)
    assert cases.gpu_cases()[0].name == "main vit_base_patch16_224-B128 bfloat16 p=0.1"


def test_goals_are_about_cases_that_are_measured():
    for aims, chosen in (
        (goals.cpu_goals(), [cpu_cases()]),
        (goals.gpu_goals(), [gpu_cases(), quick_gpu_cases()]),
    ):
        for found in chosen:
            assert {goal.case.name for goal in aims} <= {case.name for case in found}
    full = {case.name: case.providers for case in (*gpu_cases(), *cpu_cases())}
    quick = {case.name: case.providers for case in quick_gpu_cases()}
    for goal in goals.cpu_goals():
        assert {goal.above, goal.below} <= set(full[goal.case.name])
    for goal in goals.gpu_goals():
        assert {goal.above, goal.below} <= set(full[goal.case.name]) & set(quick[goal.case.name])


def test_goals_are_reached_first():
    names = [case.name for case in quick_gpu_cases()]
    aims = {goal.case.name for goal in goals.gpu_goals()}
    assert set(names[: len(aims)]) == aims


@pytest.mark.parametrize(("figure", "has_interval"), [(goals.TIME, True), (goals.MEMORY, False)])
def test_a_time_has_an_interval_over_rounds(figure, has_interval):
    case = Case(TINY, 0.1, F32)
    entries = {
        PLAIN: {figure: 2.0, "round_mean_ms": [2.0, 2.0, 4.0, 2.0, 2.0, 2.0]},
        OURS: {figure: 1.0, "round_mean_ms": [1.0, 3.0, 4.0, 0.8, 1.2]},  # had no time for the last
    }
    goal = goals.Goal("faster", case, OURS, PLAIN, figure, at_most=0.5)
    (judged,) = goals.judge([goal], [{"name": case.name, "providers": entries}])
    assert (judged["value"], judged["verdict"]) == (0.5, "reached")
    if has_interval:
        # Ratios in order: 0.4, 0.5, 0.6, 1, 1.5.
        assert (judged["low"], judged["high"]) == pytest.approx((0.48, 1.1))
    else:
        assert "low" not in judged
    assert ("0.480 to 1.100" in goal_lines([judged])[1]) == has_interval
    (unknown,) = goals.judge([goal], [])
    assert unknown.get("low") is unknown.get("high") is None


@pytest.mark.parametrize(
    ("bound", "ours", "verdict"),
    [
        ({"at_most": 0.5}, 1.0, "reached"),
        ({"at_most": 0.5}, 1.01, "missed"),
        ({"at_least": 0.5}, 1.0, "reached"),
        ({"at_least": 0.5}, 0.99, "missed"),
        ({"at_least": 0.5}, None, "not measured"),
    ],
)
def test_goals_are_judged(bound, ours, verdict):
    case = Case(TINY, 0.1, F32)
    goal = goals.Goal("faster", case, OURS, PLAIN, **bound)
    entries = {PLAIN: {"mean_ms": 2.0}, OURS: {} if ours is None else {"mean_ms": ours}}
    (judged,) = goals.judge([goal], [{"name": case.name, "providers": entries}])
    assert judged["verdict"] == verdict
    assert judged["value"] == (None if ours is None else ours / 2)
    assert judged.items() >= {**bound, "goal": "faster", "case": case.name}.items()
    assert goals.judge([goal], [])[0]["verdict"] == "not measured"
