"""The operator's benchmark times nobody who is wrong, and compares with the fastest."""

import contextlib
import json
import os
import subprocess
from dataclasses import replace

import pytest
import torch

from bench import environment as where
from bench.kernels import attend, clock, goals, shapes
from bench.kernels.__main__ import main
from bench.kernels.check import Check, Wrong, checked_samples
from bench.kernels.floors import Ceilings, pass_bytes, pass_flops
from bench.kernels.inputs import Draw
from bench.kernels.measure import Case, Settings, all_cases, compare, measure
from bench.kernels.paths import CLASS_ROW_SELF, COINS, CROSS, PATHS, PROJECTION_WITH_SOURCE, SELF
from bench.kernels.providers import OURS, Provider, bind, providers
from bench.kernels.shapes import TINY
from stochca_kernels import autograd

HAS_GPU = torch.cuda.is_available()
interpreted = pytest.mark.skipif(HAS_GPU, reason="kernels are interpreted where there is no GPU")
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU")

CPU = torch.device("cpu")
SETTINGS = Settings(CPU, torch.float32, 2, Ceilings(1e9, 1e9))


def draw(path, shape=TINY, dtype=torch.float32):
    return path.draw(Draw(shape, dtype, CPU, seed=0))


def eager_provider(path, run=None, name=OURS, factor=2.0):
    """Somebody who is right, or does `run(outputs)` to what is right."""
    right = path.rival_with(attend.eager)
    return Provider(name, right if run is None else lambda t: tuple(map(run, right(t))), factor)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    if HAS_GPU:
        pytest.skip("kernels are interpreted where there is no GPU")
    path = tmp_path_factory.mktemp("bench") / "kernels.json"
    main(["--device", "cpu", "--quick", "--output", str(path)])
    return json.loads(path.read_text())


def test_every_path_is_checked_and_timed(result):
    assert [case["name"] for case in result["cases"]] == [case.name for case in all_cases(CPU)]
    assert {case["path"] for case in result["cases"]} == {path.name for path in PATHS}
    for case in result["cases"]:
        for name in (OURS, "sdpa flash", "sdpa math", "eager"):
            entry = case["providers"][name]
            assert entry["status"] == "timed", f"{case['name']}, {name}: {entry}"
            assert 0 < entry["p20_us"] <= entry["p50_us"] <= entry["p80_us"]
            assert entry["error_factor"] in (2.0, 4.0)
            assert entry["bytes_fraction"] == pytest.approx(case["bytes_floor_us"] / entry["p50_us"])
            assert entry["flops_fraction"] == pytest.approx(case["flops_floor_us"] / entry["p50_us"])
        assert case["providers"][OURS]["error_factor"] == 2.0


def test_ratio_is_to_the_fastest_rival(result):
    for case in result["cases"]:
        times = {n: entry["p50_us"] for n, entry in case["providers"].items() if entry["status"] == "timed"}
        ours = times.pop(OURS)
        assert times[case["best_rival"]] == min(times.values())
        assert case["ratio"] == pytest.approx(min(times.values()) / ours)
        backends = {name: time for name, time in times.items() if name in attend.SDPA}
        assert backends[case["best_sdpa"]] == min(backends.values())


def test_what_does_not_run_here_is_recorded_with_its_reason(result):
    for case in result["cases"]:
        for name in ("sdpa cudnn", "sdpa efficient", *(["flex"] if case["path"] == "self" else [])):
            entry = case["providers"][name]
            assert entry["status"] == "unsupported"
            assert len(entry["reason"]) > 20
            assert "p50_us" not in entry


def test_machine_is_recorded(result, monkeypatch):
    assert result["versions"]["torch"] == torch.__version__.split("+")[0]
    assert result["versions"]["triton"]
    assert result["gpu"] is None
    status = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=False)
    if status.returncode == 0:
        assert isinstance(result["dirty"], bool)
    for changes, dirty in ((" M bench/counts.py", True), ("", False), (None, None)):
        monkeypatch.setattr(where, "_git", lambda *_, changes=changes: changes)
        assert where.environment()["dirty"] is dirty
    monkeypatch.setattr(where, "PACKAGES", ("torch", "no-such-package"))
    assert where.environment()["versions"]["no-such-package"] is None


def test_goals_that_were_not_measured_say_so(result):
    assert [goal["verdict"] for goal in result["goals"]] == ["not measured"] * len(goals.GOALS)


def test_goals_are_about_cases_that_exist():
    names = {case.name for case in all_cases(torch.device("cuda"))}
    assert {case.name for goal in goals.GOALS for case in goal.cases} <= names


def test_the_smallest_ratio_decides_a_goal():
    goal = goals.Goal("both", 1.5, [Case(SELF, "forward", TINY), Case(CROSS, "backward", TINY)])
    first, second = (case.name for case in goal.cases)

    def verdict(*ratios):
        measured = [{"name": n, "ratio": r} for n, r in zip((first, second), ratios, strict=False)]
        judged = goals.judge([goal], measured)[0]
        return judged["verdict"], judged["ratio"]

    assert verdict(1.5, 1.7) == ("reached", 1.5)
    assert verdict(1.49, 9.0) == ("missed", 1.49)
    assert verdict(9.0) == ("not measured", 9.0)
    assert verdict(9.0, None) == ("not measured", 9.0)
    assert verdict() == ("not measured", None)


@interpreted
def test_only_selects_by_name(tmp_path):
    path = tmp_path / "new" / "one.json"
    main(["--device", "cpu", "--only", "^class-row-cross", "--output", str(path)])
    assert [case["path"] for case in json.loads(path.read_text())["cases"]] == ["class-row-cross"]


@interpreted
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu", "--only", "no such"], "no case"),
        (["--device", "cpu", "--dtype", "bfloat16"], "use float32"),
        ([], "there is no GPU"),
    ],
)
def test_arguments_that_cannot_be_met_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


@interpreted
def test_cpu_needs_the_interpreter(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(SystemExit):
        main(["--device", "cpu"])
    assert "TRITON_INTERPRET=1" in capsys.readouterr().err


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.001


def only_in_the_last_sample(x):
    scale = torch.ones(len(x), 1, 1, 1)
    scale[-1] = 1.001
    return x * scale


@pytest.mark.parametrize(
    ("which", "spoil"),
    [
        ("forward", lambda out: out * 1.001),
        ("forward", only_in_the_last_sample),
        ("forward", lambda out: out * float("nan")),
        ("forward", lambda out: out[:, :, :-1]),
        ("forward", lambda out: out.double()),
        ("backward", WrongGradient.apply),
        ("forward+backward", WrongGradient.apply),
    ],
    ids=["scaled", "last sample", "NaN", "short", "other dtype", "gradient", "gradient of both"],
)
@pytest.mark.parametrize("name", [OURS, "sdpa flash"])
def test_a_wrong_provider_is_not_timed(which, spoil, name):
    others = [eager_provider(SELF, name=other) for other in (OURS, "sdpa math") if other != name]
    competitors = [eager_provider(SELF, spoil, name=name, factor=4.0), *others]
    found = measure(Case(SELF, which, TINY), competitors, SETTINGS)
    wrong = found["providers"][name]
    assert wrong["status"] == "wrong"
    assert wrong.keys() == {"status", "reason"}
    assert all(found["providers"][other.name]["status"] == "timed" for other in others)
    assert found["best_rival"] == "sdpa math"
    assert (found["ratio"] is None) == (name == OURS)


@pytest.mark.parametrize("wrong", [range(1), range(1, 99)], ids=["first", "later"])
def test_every_kind_of_run_is_checked(wrong):
    """The first one, and the prepared one, which on a GPU is the replay of a graph."""
    runs = iter(range(99))
    provider = eager_provider(SELF, lambda out: out * (1 + (next(runs) in wrong)))
    entries = measure(Case(SELF, "forward", TINY), [provider], SETTINGS)["providers"]
    assert entries[OURS]["status"] == "wrong"


def test_a_right_provider_is_timed():
    found = measure(Case(SELF, "backward", TINY), [eager_provider(SELF)], SETTINGS)
    assert found["providers"][OURS]["status"] == "timed"
    assert found["ratio"] is None, "there is nobody to compare with"


def test_a_provider_that_raises_stops_nobody_else():
    def broken(tensors):
        raise IndexError("out of luck")

    competitors = [Provider("sdpa flash", broken), eager_provider(SELF)]
    entries = measure(Case(SELF, "forward", TINY), competitors, SETTINGS)["providers"]
    assert entries["sdpa flash"] == {"status": "failed", "reason": "IndexError: out of luck"}
    assert entries[OURS]["status"] == "timed"


def test_a_case_whose_definition_fails_is_recorded():
    broken = replace(SELF, rival=lambda t, attend: 1 / 0)
    found = measure(Case(broken, "forward", TINY), [eager_provider(SELF)], SETTINGS)
    assert found["reason"] == "ZeroDivisionError: division by zero"
    assert "providers" not in found


def test_more_error_is_allowed_to_rivals_and_recorded():
    tensors = draw(SELF, dtype=torch.float16)
    definition = bind(SELF.rival_with(attend.eager), tensors, (), "forward")()
    check = Check(SELF, TINY, "forward", tensors, definition)
    error = (definition["out"].double() - check.exact["out"]).abs().max()
    rounding = torch.finfo(torch.float16).eps * check.exact["out"].abs().max()
    off = {"out": (check.exact["out"] + 3 * error + rounding).half()}
    assert check(definition, 4.0) == 2.0
    assert check(off, 4.0) == 4.0
    with pytest.raises(Wrong, match="out: error"):
        check(off, 2.0)


def test_checked_samples_hold_the_first_and_the_last():
    assert checked_samples(SELF, shapes.VIT_B_224) == list(range(128))
    some = checked_samples(SELF, shapes.DINOV2_B)
    assert (some[0], some[-1]) == (0, 15)
    assert 2 <= len(some) < 16
    # A weight's gradient is a sum over samples.
    assert checked_samples(CLASS_ROW_SELF, shapes.DINOV2_B) == list(range(16))


def test_bytes_are_those_read_once_and_written_once():
    rows, item = 2 * 20 * 2 * 16, 4

    def count(path, which):
        tensors = draw(path)
        results = bind(path.rival_with(attend.eager), tensors, path.leaves, which)()
        return pass_bytes(path, tensors, results, which)

    assert count(SELF, "forward") == 4 * rows * item  # q, k, v; out
    assert count(SELF, "backward") == 8 * rows * item  # q, k, v, out, grad; dq, dk, dv
    assert count(SELF, "forward+backward") == 8 * rows * item  # q, k, v, grad; out, dq, dk, dv
    assert count(CROSS, "backward") == 6 * rows * item  # q, k, v, out, grad; dq
    assert count(COINS, "forward") == 4 * rows * item + TINY.batch  # one pair of two is read
    weight = 2 * TINY.width * (TINY.width + 1) * item
    assert count(PROJECTION_WITH_SOURCE, "forward") == 5 * rows * item + weight


def test_flops_follow_the_convention():
    shape = shapes.VIT_B_224
    forward = 4 * 128 * 12 * 197 * 197 * 64
    assert pass_flops(SELF, shape, "forward") == forward
    assert pass_flops(SELF, shape, "backward") == 2.5 * forward
    assert pass_flops(SELF, shape, "forward+backward") == 3.5 * forward
    assert pass_flops(CROSS, shape, "backward") == 1.5 * forward
    product = 2 * (128 * 197) * 768 * (2 * 768)
    assert pass_flops(PROJECTION_WITH_SOURCE, shape, "forward") == product + 2 * forward


def test_class_rows_need_fewer_operations_than_projecting_keys_and_values():
    """By torch's own count of the operator's products."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        bind(CLASS_ROW_SELF.ours_with("sdpa"), draw(CLASS_ROW_SELF), (), "forward")()
    assert pass_flops(CLASS_ROW_SELF, TINY, "forward") == counter.get_total_flops()


def test_providers_take_turns():
    order = []
    work = {name: clock.Work(lambda name=name: order.append(name), "") for name in "abc"}
    samples = clock.time_rounds(work, 4, CPU)
    rounds = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert len(rounds) == clock.WARM_UP_ROUNDS + 4
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert {turn[0] for turn in rounds} == {"a", "b", "c"}
    assert all(len(taken) == 4 for taken in samples.values())


def test_percentiles_are_of_the_samples():
    assert clock.percentiles(range(11)) == {"p20_us": 2.0, "p50_us": 5.0, "p80_us": 8.0}


def test_inputs_are_rotated_until_they_leave_the_cache(monkeypatch):
    class Properties:
        L2_cache_size = 50

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    gpu = torch.device("cuda")
    assert clock.num_sets(200, 1000.0, gpu) == 1
    assert clock.num_sets(30, 1000.0, gpu) == 4
    assert clock.num_sets(1, 1000.0, gpu) == clock.MAX_SETS
    assert clock.num_sets(200, clock.SAMPLE_US / 3, gpu) == 3
    assert clock.num_sets(1, 1.0, CPU) == 1


def test_nobody_is_compared_without_a_time():
    entries = {
        OURS: {"status": "timed", "p50_us": 2.0},
        "eager": {"status": "timed", "p50_us": 9.0},
        "sdpa math": {"status": "timed", "p50_us": 12.0},
        "sdpa flash": {"status": "wrong", "reason": ""},
        "flex": {"status": "timed", "p50_us": 5.0},
    }
    assert compare(entries) == {"best_rival": "flex", "best_sdpa": "sdpa math", "ratio": 2.5}
    assert compare({OURS: entries["sdpa flash"], "eager": entries["eager"]})["ratio"] is None
    assert compare({}) == {"best_rival": None, "best_sdpa": None, "ratio": None}


def test_all_backends_and_the_product_are_rivals():
    factors = {provider.name: provider.factor for provider in providers(SELF, shapes.VIT_B_224)}
    assert factors.pop(OURS) == 2
    assert set(factors) == {"sdpa cudnn", "sdpa flash", "sdpa efficient", "sdpa math", "eager", "flex"}
    assert "product + ours" in [provider.name for provider in providers(PROJECTION_WITH_SOURCE, TINY)]


@interpreted
def test_the_projection_that_is_ours_is_the_fused_one(monkeypatch):
    fused, calls = autograd.attention_projected, []
    monkeypatch.setattr(autograd, "attention_projected", lambda *args: calls.append(1) or fused(*args))
    for provider in providers(PROJECTION_WITH_SOURCE, TINY):
        calls.clear()
        with contextlib.suppress(RuntimeError):  # a backend that is not there
            bind(provider.run, draw(PROJECTION_WITH_SOURCE), (), "forward")()
        assert len(calls) == (provider.name == OURS)
    assert "STOCHCA_FUSED_PROJECTION" not in os.environ


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_graphs_are_timed(tmp_path):
    path = tmp_path / "kernels.json"
    main(["--quick", "--only", "^(self|cross) .*B128-N197-H6", "--output", str(path)])
    result = json.loads(path.read_text())
    assert result["gpu"]["name"] == torch.cuda.get_device_name()
    assert result["gpu"]["driver"]
    assert len(result["cases"]) == 5
    for case in result["cases"]:
        assert case["input_sets"] > 1
        for name in (OURS, "sdpa flash", "sdpa cudnn", "eager"):
            entry = case["providers"][name]
            assert entry["method"] == "CUDA graph", f"{case['name']}, {name}: {entry}"
            assert entry["peak_bytes"] > 0
            assert 0 < entry["bytes_fraction"] < 1
            assert 0 < entry["flops_fraction"] < 1


@pytest.mark.gpu
@needs_gpu
def test_what_a_replay_does_not_write_is_not_a_number():
    with torch.cuda.stream(torch.cuda.Stream()):
        work = clock.prepare([lambda: {"out": torch.empty(8, device="cuda")}], torch.device("cuda"))
        assert work.method == "CUDA graph"
        assert work.run()["out"].isnan().all()
