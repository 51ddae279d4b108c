"""Which runs a sweep has, and what it refuses."""

import dataclasses
import re

import pytest
import yaml

from stochca.config import FinetuneOptions
from stochca.sweep.options import SweepOptions
from stochca.sweep.plan import make_plan, open_folder, record_plan


def recorded(options):
    plan = make_plan(options)
    open_folder(plan.output)
    record_plan(plan, options)
    return plan.output / "sweep.yaml"


def test_every_setting_runs_with_every_seed_on_top_of_the_base(make_options):
    options = make_options(
        base={"epochs": 3, "p": 0.2},
        p=[0, 0.1],
        modes=["mix", "sum", "concat"],
        settings=[
            {"p": [0, 0.3]},
            {"p_schedule": [0.5, 0.25]},
            {"mode": "mix", "p": 0.3},
            {"p": 0.1, "losses": ["bss", {"miro": {"weight": 1.0}}]},
            {"name": "slow", "lr": "1e-6"},
            {},
        ],
        seeds=[4, 2],
    )
    expected = {
        "p=0": {"p": 0.0},
        "p=0.1": {"p": 0.1},
        "mix": {"mode": "mix"},
        "sum": {"mode": "sum"},
        "concat": {"mode": "concat"},
        "p=0,0.3": {"p": [0.0, 0.3]},
        "p_schedule=0.5,0.25": {"p_schedule": [0.5, 0.25]},
        "mix,p=0.3": {"mode": "mix", "p": 0.3},
        "p=0.1,losses=bss,miro(weight(1))": {"p": 0.1, "losses": ["bss", {"miro": {"weight": 1.0}}]},
        "slow": {"lr": 1e-6},
        "base": {},
    }
    runs = make_plan(options).runs()
    assert [(run.seed, run.setting.name) for run in runs] == [
        (seed, name) for seed in (4, 2) for name in expected
    ]
    for run in runs:
        changes = expected[run.setting.name]
        folder = f"{options.output}/{run.setting.name}/seed-{run.seed}"
        assert run.options == FinetuneOptions(
            **{"epochs": 3, "p": 0.2, **changes, "seed": run.seed, "output": folder}
        )
    numbers = {run.setting.name: run.setting.p for run in runs if run.setting.p is not None}
    assert numbers == {"p=0": 0.0, "p=0.1": 0.1}


def test_the_options_of_a_finished_run_serve_as_base(make_options, tmp_path):
    path = tmp_path / "config.yaml"
    run = FinetuneOptions(lr=0.5, epochs=7, seed=9, output="elsewhere", resume="elsewhere")
    path.write_text(yaml.safe_dump(dataclasses.asdict(run)))
    first, *_ = make_plan(make_options(base_config=str(path), base={"epochs": 8}, seeds=[3])).runs()
    assert first.options == dataclasses.replace(
        run, epochs=8, p=0.0, seed=3, output=str(first.folder), resume=None
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": {"weight_dekay": 1}}, "the base has the unknown option weight_dekay: .* is weight_decay"),
        ({"settings": [{"epoch": 3}]}, r"the setting \{'epoch': 3\} has the unknown .* nearest .* is epochs"),
        ({"settings": [{"lr": "fast"}]}, "the setting .* does not fit: .*lr.*fast"),
        ({"settings": [{"mode": "blend"}]}, "the setting .* does not fit: .*blend"),
        ({"base": {"batch_size": 0}}, "the base does not fit: --batch-size must be at least 1, got 0"),
        ({"base": {"seed": 3}}, "seed cannot be given in --base: the seeds are an option of the sweep"),
        ({"settings": [{"output": "x"}]}, "output cannot be given in the setting"),
        ({"settings": [{"resume": "x"}]}, "resume cannot be given in the setting"),
        ({"settings": [{"name": "half", "p": 0.5}]}, "the settings p=0.5 and half are equal"),
        ({"settings": [{"p": 0.5}]}, "the settings p=0.5 and p=0.5 are equal"),
        ({"base": {"lr": 0.1}, "settings": [{}, {"lr": 0.1}]}, "the settings base and lr=0.1 are equal"),
        ({"settings": [{"name": "P=0", "lr": 1.0}]}, "two settings are called P=0: .*give one another name"),
        ({"settings": [{"name": "../x", "lr": 1.0}]}, r"must be made of letters.*got '../x'"),
        ({"settings": [{"name": "", "lr": 1.0}]}, "must be made of letters.*got ''"),
        ({"settings": [{"name": 3, "lr": 1.0}]}, "must be made of letters.*got 3"),
        ({"settings": [{"name": "table.md", "lr": 1.0}]}, "cannot be called table.md"),
        ({"settings": [{"p": [0.125] * 24}]}, "needs a name of at most 80 characters"),
        ({"base": {"p_schedule": [0.5]}}, "p in .* without effect, as p_schedule is"),
        ({"seeds": [1, 1]}, r"--seeds must differ from each other, got \[1, 1\]"),
        ({"seeds": []}, "--seeds must hold at least one seed"),
        ({"seeds": [-1]}, "--seeds must be between 0 and"),
        ({"p": [0.1, 0.1]}, "--p must differ from each other"),
        ({"p": [1.5]}, "--p must be between 0 and 1"),
        ({"p": []}, "nothing to compare"),
        ({"jobs": 0}, "--jobs must be at least 1, got 0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_run_is_refused_at_once(make_options, changes, message):
    with pytest.raises(ValueError, match=f"^.*{message}"):
        make_plan(make_options(**{"base": {}, **changes}))


@pytest.mark.parametrize("content", ["- a\n- b\n", "{a: [\n"], ids=["list", "broken"])
def test_a_base_that_is_no_mapping_is_refused(make_options, tmp_path, content):
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"--base-config {path} (must hold options|is not YAML)"):
        make_plan(make_options(base_config=str(path)))
    with pytest.raises(FileNotFoundError, match="--base-config /nowhere is not a file"):
        make_plan(make_options(base_config="/nowhere"))


def test_the_record_repeats_the_sweep_by_itself(make_options):
    options = make_options(settings=[{"p_schedule": [0.5, 0.25]}, {"name": "slow", "lr": 1e-6}], jobs=3)
    path = recorded(options)
    again = SweepOptions(**yaml.safe_load(path.read_text()))
    assert make_plan(again) == make_plan(options)
    assert (again.jobs, again.output) == (3, options.output)


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ({"base": {"lr": 0.1}}, {"base": {"lr": 0.2}}, "in the base, --lr was 0.1, is 0.2"),
        (
            {"settings": [{"name": "slow", "lr": 0.1}]},
            {"settings": [{"name": "slow", "lr": 0.2}]},
            "in the setting slow, lr was 0.1, is 0.2",
        ),
        (
            {"settings": [{"name": "slow", "lr": 0.1}]},
            {"settings": [{"name": "slow", "epochs": 3}]},
            "in the setting slow, epochs was 10, is 3; in the setting slow, lr was 0.1, is 5e-05",
        ),
        ({}, {"p": [0.5]}, "the setting p=0 was in it, and is not"),
        ({}, {"seeds": [1, 2]}, "seeds were [0, 1], are [1, 2], which lacks [0]"),
    ],
    ids=["base", "setting", "other-option", "setting-gone", "seed-gone"],
)
def test_a_sweep_that_changed_is_refused_with_both_values(make_options, before, now, message):
    path = recorded(make_options(**{"base": {}, **before}))
    content = path.read_text()
    with pytest.raises(ValueError, match=re.escape(f"holds another sweep: {message}; choose another")):
        recorded(make_options(**{"base": {}, **now}))
    assert path.read_text() == content


def test_a_sweep_may_grow_and_move(make_options, tmp_path):
    recorded(make_options(base={"workers": 1}))
    more = make_options(base={"workers": 2}, settings=[{"mode": "sum"}], seeds=[0, 1, 2])
    again = SweepOptions(**yaml.safe_load(recorded(more).read_text()))
    assert make_plan(again) == make_plan(more)
    (tmp_path / "sweep").rename(tmp_path / "moved")
    recorded(dataclasses.replace(more, output=str(tmp_path / "moved")))


def test_a_record_that_says_the_same_is_left_as_it_is(make_options):
    path = recorded(make_options())
    path.write_text("# mine\n" + path.read_text())
    recorded(make_options())
    assert path.read_text().startswith("# mine\n")


def test_a_folder_of_something_else_is_refused(make_options, tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / ".lock").touch()
    recorded(make_options(output=str(tmp_path / "sweep")))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    for name in ("other", "other/thesis.tex"):
        with pytest.raises(FileExistsError, match=f"--output .*{name} exists and holds no sweep"):
            recorded(make_options(output=str(tmp_path / name)))
