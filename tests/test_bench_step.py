"""The benchmark of training steps times nobody who is wrong, and a failure hides no other's figures."""

import ast
import copy
import json
import math
import time
import weakref
from collections import Counter
from dataclasses import replace
from functools import partial
from statistics import fmean

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.cost import Size, plain_flops, representative_draws, step_flops
from bench.digest import ROOT
from bench.step import by_hand, cases, clock, goals, measure, published, reference, stage
from bench.step.__main__ import MEASURED, main
from bench.step.breakdown import breakdown, category, idle_ms
from bench.step.cases import Case, cpu_cases, gpu_cases, quick_gpu_cases, tiny_cases
from bench.step.check import Check, Wrong, draws_to_check, largest_unit, relative_errors
from bench.step.clock import Deadline, summarize
from bench.step.measure import Settings, ratios
from bench.step.provider import Provider
from bench.step.providers import BY_HAND_EAGER, OURS, OURS_COMPILED, PLAIN, PLAIN_COMPILED, PROVIDERS
from bench.step.reference import Outcome, Reference
from bench.step.report import goal_lines
from bench.step.stage import Stage
from bench.step.training import TF32Step, TrainingStep, make_optimizer
from bench.step.workloads import TINY, Setting, Workload
from tests import plain

HAS_GPU = torch.cuda.is_available()
CPU = torch.device("cpu")
F32, BF16 = torch.float32, torch.bfloat16
SETTINGS = Settings(2, 1, Deadline(), {F32: 1e9, BF16: 1e9, torch.float16: 1e9})
MIXED = (False, True, True, False)
OTHER = replace(TINY, batch=3)
NORM = "norm and elementwise"


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "new" / "step.json"
    main(["--tiny", "--output", str(path)])
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def setting():
    return Setting.make(TINY, CPU)


@pytest.fixture
def tiny():
    return Stage(TINY, CPU)


def measured(monkeypatch, stage, *providers, p=0.5, dtype=F32, settings=SETTINGS, study="p"):
    """Entries of some providers, and of the eager ones beside them."""
    for provider in providers:
        monkeypatch.setitem(PROVIDERS, provider.name, provider)
    names = [*(provider.name for provider in providers), PLAIN, BY_HAND_EAGER]
    return measure.measure(Case(TINY, p, dtype, study, names), stage, settings)


def spoiled(spoil, name=OURS, **kwargs):
    """The eager rival, its forward changed: `spoil(forward, images, coins)`."""

    def build(setting):
        return partial(spoil, by_hand.ByHand(setting.target, setting.source))

    return Provider(name, build, **kwargs)


def test_everybody_is_checked_and_timed(result):
    assert [case["name"] for case in result["cases"]] == [case.name for case in tiny_cases()]
    for case, wanted in zip(result["cases"], tiny_cases(), strict=True):
        assert list(case["providers"]) == list(wanted.providers)
        assert len(case["draws"]) == (1 if wanted.p == 0 else 2)
        for name, entry in case["providers"].items():
            assert entry["status"] == "timed", f"{case['name']}, {name}: {entry}"
            assert 0 < entry["p20_ms"] <= entry["p50_ms"] <= entry["p80_ms"]
            assert 0 < entry["without_optimizer"]["mean_ms"] < entry["mean_ms"]
            assert len(entry["round_mean_ms"]) == result["rounds"]
            if len(case["draws"]) == 2:  # the median of two steps is their mean
                assert fmean(entry["round_mean_ms"]) == pytest.approx(entry["mean_ms"])
            assert entry["images_per_s"] == pytest.approx(1e3 * TINY.batch / entry["mean_ms"])
            assert entry["error"]["logits"] <= 2
            assert entry["error"]["gradients"] <= 3
            rate = result["matmul_flops_per_s_by_dtype"][entry["precision"]]
            assert entry["mfu"] == pytest.approx(entry["flops"] / entry["mean_ms"] * 1e3 / rate)
            assert entry["saved_mib"] > 0
            assert entry["peak_mib"] is None, "there is none on a CPU"
            if case["study"] == "main":
                assert entry["breakdown"]["GEMM"] > 0
                assert len(entry["longest"]) == 10
            if name != OURS:
                ours = case["providers"][OURS]
                assert case["ratios"][name] == pytest.approx(ours["mean_ms"] / entry["mean_ms"])


def test_everybody_runs_every_draw_equally_often(result):
    for case in result["cases"]:
        assert {entry["steps"] for entry in case["providers"].values()} == {4}


def test_provenance_is_recorded(result):
    assert result["device"] == "cpu"
    assert result["versions"]["torch"] == torch.__version__.split("+")[0]
    assert set(result["code"]) == set(MEASURED)
    assert result["allow_tf32"] is False
    assert result["cudnn_allow_tf32"] is True
    assert result["without"] is None
    assert [case["workload"]["name"] for case in result["cases"]] == [TINY.name] * len(result["cases"])


# Not of the code that numbers come from: machine and digests, and what a type annotation alone needs.
APART = {"bench/environment.py", "bench/digest.py", "bench/kernels/providers.py"}


def test_all_code_that_numbers_come_from_is_named():
    def is_named(path):
        return any(path == name or path.startswith(f"{name}/") for name in MEASURED)

    reached = imported_files("bench/step/__main__.py", APART)
    assert "bench/cost.py" in reached
    assert [path for path in reached if not is_named(path)] == []


def imported_files(first, apart):
    """Files of the repository that one imports, and those that they import, without those that are apart."""
    found, left = set(), [first]
    while left:
        path = left.pop()
        if path in found or path in apart:
            continue
        found.add(path)
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            else:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            files = (f"{name.replace('.', '/')}{end}" for name in names for end in (".py", "/__init__.py"))
            left += [file for file in files if (ROOT / file).is_file()]
    return sorted(path for path in found if (ROOT / path).stat().st_size)


def test_work_is_counted_by_who_does_it(result):
    main_case = result["cases"][0]
    flops = {name: entry["flops"] for name, entry in main_case["providers"].items()}
    with torch.device("meta"):
        assert flops[PLAIN] == TINY.batch * plain_flops(Size.of(Setting.make(TINY, CPU).target))
    assert flops["as published"] == flops["as published, autocast"]
    assert flops[OURS] < flops[PLAIN] < flops[BY_HAND_EAGER] < flops["as published"]
    assert main_case["providers"]["as published"]["precision"] == "float32"


def test_the_definition_is_the_one_of_the_tests(setting):
    """Two texts that share no line."""
    exact = Reference(setting)(MIXED)
    target, source = (copy.deepcopy(model).double() for model in (setting.target, setting.source))
    logits = plain.logits(target, source, setting.images.double(), MIXED)
    torch.testing.assert_close(exact.logits, logits.detach(), rtol=1e-12, atol=1e-12)
    torch.nn.functional.cross_entropy(logits, setting.labels).backward()
    torch.testing.assert_close(exact.gradients, reference.flat_gradients(target), rtol=1e-10, atol=1e-12)


def test_a_batch_in_parts_is_the_whole_batch(setting, monkeypatch):
    whole = Reference(setting)
    monkeypatch.setattr(reference, "MAX_NUMBERS", 1)
    parts = Reference(setting)
    assert (whole.at_once, parts.at_once) == (pytest.approx(whole.at_once, abs=1e9), 1)
    assert whole.at_once >= TINY.batch
    for actual, wanted in zip(parts(MIXED), whole(MIXED), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("block", range(4))
def test_one_wrong_coin_is_noticed(tiny, dtype, block):
    check = Check(tiny.reference, tiny.eager_outcome)
    flipped = tuple(coin ^ (i == block) for i, coin in enumerate(MIXED))
    check(tiny.eager_outcome(dtype, MIXED), dtype, MIXED)
    wrong = tiny.eager_outcome(dtype, flipped)
    with pytest.raises(Wrong, match="relative error"):
        check(wrong, dtype, MIXED)
    exact, unit = check.unit(dtype, MIXED)
    errors = relative_errors(wrong, exact)
    assert all(errors[name] > 3 * unit[name] for name in errors), "in logits as well as in gradients"


class Halved(torch.autograd.Function):
    """Right forwards, wrong backwards."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 0.5 * grad


@pytest.mark.parametrize(
    "spoil",
    [
        lambda forward, images, coins: 1.001 * forward(images, coins),
        lambda forward, images, coins: forward(images, coins) * float("nan"),
        lambda forward, images, coins: forward(images, coins)[:, :-1],
        lambda forward, images, coins: forward(images, [not coin for coin in coins]),
        lambda forward, images, coins: Halved.apply(forward(images, coins)),
    ],
    ids=["scaled", "NaN", "too few", "other coins", "gradients"],
)
def test_who_is_wrong_is_not_timed(tiny, monkeypatch, spoil):
    found = measured(monkeypatch, tiny, spoiled(spoil))
    entry = found["providers"][OURS]
    assert entry.keys() == {"status", "reason"}
    assert entry["status"] in ("wrong", "failed")
    assert {found["providers"][name]["status"] for name in (PLAIN, BY_HAND_EAGER)} == {"timed"}
    assert found["ratios"] == {}


def test_who_is_not_exact_says_by_how_much(tiny, monkeypatch):
    def off(forward, images, coins):
        return (1 + 1e-5) * forward(images, coins)

    assert measured(monkeypatch, tiny, spoiled(off))["providers"][OURS]["status"] == "wrong"
    generous = spoiled(off, allowed={"logits": 1e3, "gradients": 1e3})
    entry = measured(monkeypatch, tiny, generous)["providers"][OURS]
    assert entry["status"] == "timed"
    assert 2 < entry["error"]["logits"] < 1e3


def test_a_wrong_unit_excuses_nobody(tiny, monkeypatch):
    flipped = spoiled(lambda forward, images, coins: forward(images, coins[::-1]), name=BY_HAND_EAGER)
    entries = measured(monkeypatch, tiny, flipped, PROVIDERS[OURS])["providers"]
    assert entries[OURS]["status"] == entries[BY_HAND_EAGER]["status"] == "wrong"
    assert "the unit" in entries[OURS]["reason"]


@pytest.mark.parametrize("calls", [0, 1, 5], ids=["at once", "while checked", "while timed"])
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (IndexError("out of luck"), "failed"),
        (torch.OutOfMemoryError("too much"), "out of memory"),
        (ImportError("not here"), "unsupported"),
    ],
)
def test_who_raises_stops_nobody_else(tiny, monkeypatch, calls, error, status):
    left = iter(range(calls))

    def raising(forward, images, coins):
        if next(left, None) is None:
            raise error
        return forward(images, coins)

    entries = measured(monkeypatch, tiny, spoiled(raising))["providers"]
    assert entries[OURS] == {"status": status, "reason": f"{type(error).__name__}: {error}"}
    assert {entries[name]["status"] for name in (PLAIN, BY_HAND_EAGER)} == {"timed"}


def draw_between(stage, count=8):
    """Of the draws of a case, one that is not compared with the definition."""
    draws = representative_draws(Size.of(stage.setting.target), 0.5, count)
    return next(coins for coins in draws if coins not in draws_to_check(draws))


def test_every_draw_is_looked_at(tiny, monkeypatch):
    bad = draw_between(tiny)

    def nan_under_one(forward, images, coins):
        return forward(images, coins) * (math.nan if tuple(coins) == bad else 1.0)

    eight = replace(SETTINGS, num_draws=8)
    entry = measured(monkeypatch, tiny, spoiled(nan_under_one), settings=eight)["providers"][OURS]
    assert entry["status"] == "wrong"
    assert "not all are finite under coins " + "".join(str(int(coin)) for coin in bad) in entry["reason"]


class NanGradient(torch.autograd.Function):
    """Finite in the forward alone."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.full_like(grad, math.nan)


@pytest.mark.parametrize("late", [2, 5, 6], ids=["checked", "timed", "timed again"])
def test_who_spoils_the_weights_spoils_nobody_else(monkeypatch, late):
    """The weights and moments of all are as they were, and the next case is measured."""
    own = Stage(TINY, CPU)
    before = [p.detach().clone() for p in own.setting.target.parameters()]
    left = iter(range(late))

    def nan_at_last(forward, images, coins):
        logits = forward(images, coins)
        return NanGradient.apply(logits) if next(left, None) is None else logits

    entries = measured(monkeypatch, own, spoiled(nan_at_last))["providers"]
    assert entries[OURS]["status"] == "wrong"
    assert {entries[name]["status"] for name in (PLAIN, BY_HAND_EAGER)} == {"timed"}
    assert all(map(torch.equal, before, own.setting.target.parameters()))
    moments = [state[name] for state in own.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert all(moment.isfinite().all() for moment in moments)
    again = measure.measure(Case(TINY, 0.0, F32, "p", [PLAIN, BY_HAND_EAGER]), own, SETTINGS)["providers"]
    assert {entry["status"] for entry in again.values()} == {"timed"}


def test_setup_is_all_that_is_compiled(tiny, monkeypatch):
    """The first step under each draw, here made slow, and no other."""
    seen = set()

    def slow_at_first(forward, images, coins):
        if tuple(coins) not in seen:
            seen.add(tuple(coins))
            time.sleep(0.3)
        return forward(images, coins)

    slow = spoiled(slow_at_first, name=OURS_COMPILED, compiled=True)
    found = measured(monkeypatch, tiny, slow, settings=replace(SETTINGS, num_draws=8))
    assert len(seen) > 2
    assert 0.3 * len(seen) <= found["providers"][OURS_COMPILED]["setup_s"] < 0.3 * len(seen) + 0.6


def test_a_definition_is_computed_once_per_draw(tiny):
    calls = Counter()

    def exact(coins):
        calls[coins] += 1
        return tiny.reference(coins)

    check = Check(exact, tiny.eager_outcome)
    for dtype in (F32, BF16, F32):
        check(tiny.eager_outcome(dtype, MIXED), dtype, MIXED)
    assert calls == {MIXED: 1}


def test_tf32_is_for_its_own_step_alone(tiny):
    matmul, seen = torch.backends.cuda.matmul, []

    def forward(images, coins):
        seen.append(matmul.allow_tf32)
        if len(seen) == 2:
            raise RuntimeError("in the middle")
        return tiny.setting.target(images)

    step = TF32Step(forward, tiny.setting, tiny.optimizer, F32)
    assert matmul.allow_tf32 is False
    step.outcome(MIXED)
    with pytest.raises(RuntimeError, match="in the middle"):
        step.outcome(MIXED)
    assert seen == [True, True]
    assert matmul.allow_tf32 is False


def test_tf32_is_judged_by_what_rounds_alike(tiny, monkeypatch):
    def off(forward, images, coins):
        return (1 + 2e-4) * forward(images, coins)

    assert measured(monkeypatch, tiny, spoiled(off))["providers"][OURS]["status"] == "wrong"
    entry = measured(monkeypatch, tiny, spoiled(off, tf32=True))["providers"][OURS]
    assert entry["status"] == "timed", entry
    assert entry["mfu"] is None, "at the rate of a product of float32 it would say nothing"


def test_a_convolution_on_a_gpu_may_round_to_tf32(monkeypatch):
    assert largest_unit(F32, CPU) == 2e-5
    assert largest_unit(F32, torch.device("cuda")) == largest_unit(torch.float16, CPU)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert largest_unit(F32, torch.device("cuda")) == 2e-5


@pytest.mark.parametrize("calls", [1, 3], ids=["while checked", "while timed"])
def test_a_device_that_one_breaks_costs_what_is_left(monkeypatch, tmp_path, calls):
    """On the CPU the device is only said to be broken."""
    left, broken = iter(range(calls)), []

    def illegal(forward, images, coins):
        if next(left, None) is None:
            broken.append(True)
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return forward(images, coins)

    def statuses(case):
        return {name: entry["status"] for name, entry in case["providers"].items()}

    monkeypatch.setattr(measure, "is_broken", lambda device: bool(broken))
    monkeypatch.setitem(PROVIDERS, OURS, spoiled(illegal))
    chosen = [Case(workload, 0.0, F32, "p", [PLAIN, OURS, BY_HAND_EAGER]) for workload in (TINY, OTHER)]
    monkeypatch.setattr("bench.step.__main__.tiny_cases", lambda: chosen)
    output = tmp_path / "step.json"
    main(["--tiny", "--output", str(output)])
    first, second = json.loads(output.read_text())["cases"]
    # Plain fine-tuning was timed before, if anybody was.
    plain_status = "timed" if calls > 1 else "not reached"
    assert statuses(first) == {PLAIN: plain_status, OURS: "failed", BY_HAND_EAGER: "not reached"}
    assert "illegal memory access" in first["providers"][OURS]["reason"]
    assert set(statuses(second).values()) == {"not reached"}
    for entry in (first["providers"][BY_HAND_EAGER], *second["providers"].values()):
        assert f"--without '^{OURS}$'" in entry["reason"]

    broken.clear()
    main(["--tiny", "--without", f"^{OURS}$", "--output", str(output)])
    recorded = json.loads(output.read_text())
    assert recorded["without"] == f"^{OURS}$"
    assert [statuses(case) for case in recorded["cases"]] == 2 * [{PLAIN: "timed", BY_HAND_EAGER: "timed"}]


class Broken(TrainingStep):
    """Fails when it is timed."""

    def update(self):
        raise RuntimeError("no optimizer")


class BrokenBackward(TrainingStep):
    """Fails when it is checked."""

    def forward_backward(self, coins):
        super().forward_backward(coins)
        raise RuntimeError("at the very end")


class Clean(TrainingStep):
    """Wants to begin without gradients."""

    def forward_backward(self, coins):
        assert all(p.grad is None for p in self.setting.target.parameters())
        return super().forward_backward(coins)


def test_who_fails_leaves_no_gradients_to_the_next(tiny, monkeypatch):
    broken = replace(PROVIDERS[OURS], step=Broken)
    clean = replace(PROVIDERS[OURS], step=Clean, name=OURS_COMPILED)
    entries = measured(monkeypatch, tiny, broken, clean)["providers"]
    assert entries[OURS] == {"status": "failed", "reason": "RuntimeError: no optimizer"}
    assert entries[OURS_COMPILED]["status"] == "timed", entries[OURS_COMPILED]


def test_who_fails_last_leaves_no_gradients(tiny, monkeypatch):
    monkeypatch.setitem(PROVIDERS, OURS, replace(PROVIDERS[OURS], step=BrokenBackward))
    found = measure.measure(Case(TINY, 0.5, F32, "p", [OURS]), tiny, SETTINGS)
    assert found["providers"][OURS]["reason"] == "RuntimeError: at the very end"
    assert all(p.grad is None for p in tiny.setting.target.parameters())


def test_a_broken_profiler_costs_no_times(tiny, monkeypatch):
    monkeypatch.setattr(measure, "breakdown", lambda step, coins: 1 / 0)
    entry = measured(monkeypatch, tiny, study="main")["providers"][PLAIN]
    assert entry["status"] == "timed"
    assert entry["breakdown_reason"] == "ZeroDivisionError: division by zero"


def test_a_workload_that_cannot_be_set_up_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "bench.step.__main__.tiny_cases",
        lambda: [Case(Workload("", "no_such_model", 1), 0.1, F32), *tiny_cases()[1:2]],
    )
    main(["--tiny", "--output", str(tmp_path / "step.json")])
    missing, present = json.loads((tmp_path / "step.json").read_text())["cases"]
    assert {entry["status"] for entry in missing["providers"].values()} == {"failed"}
    assert "no_such_model" in missing["providers"][OURS]["reason"]
    assert present["providers"][OURS]["status"] == "timed"


def test_without_time_nothing_is_begun(tmp_path, monkeypatch):
    # What the machine reaches is measured in any case, which takes longest here.
    monkeypatch.setattr("bench.step.__main__.matmul_rates", lambda dtypes, device: dict.fromkeys(dtypes, 1e9))
    main(["--tiny", "--budget", "0", "--output", str(tmp_path / "step.json")])
    for case in json.loads((tmp_path / "step.json").read_text())["cases"]:
        assert {entry["status"] for entry in case["providers"].values()} == {"not reached"}


def test_compilation_is_begun_only_where_it_can_end(tiny, monkeypatch):
    slow = replace(PROVIDERS[PLAIN], name=PLAIN_COMPILED, compiled=True)
    short = replace(SETTINGS, deadline=Deadline(measure.COMPILE_SECONDS / 2))
    assert (
        measured(monkeypatch, tiny, slow, settings=short)["providers"][slow.name]["status"] == "not reached"
    )
    assert measured(monkeypatch, tiny, slow)["providers"][slow.name]["status"] == "timed"


def test_a_setting_is_the_same_again(setting):
    again = Setting.make(TINY, CPU)
    torch.testing.assert_close(again.images, setting.images, rtol=0, atol=0)
    for name in ("target", "source"):
        for p, q in zip(getattr(again, name).parameters(), getattr(setting, name).parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=0)


def test_the_optimizer_leaves_the_weights(setting):
    before = [p.clone() for p in setting.target.parameters()]
    optimizer = make_optimizer(setting)
    step = TrainingStep(lambda images, coins: setting.target(images), setting, optimizer, F32)
    step.forward_backward(MIXED)
    assert any(p.grad.any() for p in setting.target.parameters())
    step.update()
    assert all(p.grad is None for p in setting.target.parameters())
    assert all(map(torch.equal, before, setting.target.parameters()))
    assert {int(state["step"]) for state in optimizer.state.values()} == {2}, "once to make its state"


@pytest.mark.parametrize(("dtype", "least", "most"), [(F32, 1e-8, 1e-5), (BF16, 1e-3, 5e-2)])
def test_arithmetic_is_that_of_the_case(tiny, dtype, least, most):
    errors = relative_errors(tiny.eager_outcome(dtype, MIXED), tiny.reference(MIXED))
    assert all(least < error < most for error in errors.values())


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch looks at it while it compiles
def test_by_hand_coins_recompile_nothing(setting, monkeypatch):
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    forward = by_hand.ByHand(setting.target, setting.source, compiled=True)
    for coins in (MIXED, MIXED[::-1], (True,) * 4, (False,) * 4, (False, True, False, True)):
        forward(setting.images, coins)
    torch.compiler.reset()
    assert counter.frame_count == 3  # self, cross, and the source


@pytest.mark.parametrize("coins", [(False,) * 4, (True,) * 4, MIXED], ids=["self", "cross", "mixed"])
@pytest.mark.parametrize("name", [PLAIN, BY_HAND_EAGER, "as published", OURS])
def test_work_is_what_torch_counts(setting, name, coins):
    provider = PROVIDERS[name]
    forward = provider.build(setting)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward(setting.images, coins).sum().backward()
    setting.target.zero_grad(set_to_none=True)
    per_image = measure.provider_flops(provider, Size.of(setting.target), [coins])
    assert counter.get_total_flops() == TINY.batch * per_image


def test_by_hand_keeps_no_queries_of_the_source(setting):
    _, k, v = by_hand.source_block(setting.source.blocks[0], by_hand.embed(setting.source, setting.images))
    assert k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    assert k.untyped_storage().nbytes() == k.nbytes + v.nbytes


def test_by_hand_has_a_bias_or_none():
    workload = replace(TINY, kwargs={**TINY.kwargs, "qkv_bias": False})
    bare = Setting.make(workload, CPU)
    logits = by_hand.ByHand(bare.target, bare.source)(bare.images, MIXED)
    wanted = plain.logits(bare.target, bare.source, bare.images, MIXED)
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


def test_the_authors_keep_nothing_of_the_target(setting, monkeypatch):
    """Without gradients, only those of one block exist at a time."""
    project, made, alive = published._project, [], []

    def watched(block, y):
        triple = project(block, y)
        if block in set(setting.target.blocks):
            alive.append(sum(tensor() is not None for tensor in made))
            made.append(weakref.ref(triple[1]))
        return triple

    monkeypatch.setattr(published, "_project", watched)
    with torch.no_grad():
        published.forward(setting.target, setting.source, setting.images, MIXED)
    assert len(alive) == 4
    assert max(alive) == 1


class Recording:
    """A step that only says that it ran."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def forward_backward(self, coins):
        self.log.append((self.name, coins))

    def update(self):
        pass


def test_providers_take_turns():
    log, draws = [], [(True,), (False,)]
    steps = {name: Recording(name, log) for name in "abc"}
    taken = clock.time_rounds(steps, draws, 3, CPU, Deadline(), None)
    assert set(Counter(log).values()) == {3}
    turns = [log[i : i + 3] for i in range(0, len(log), 3)]
    assert all(len({coins for _, coins in turn}) == 1 for turn in turns), "the same draw side by side"
    assert {turn[0][0] for turn in turns} == {"a", "b", "c"}
    assert {turn[0][1] for turn in turns[::2]} == set(draws), "no draw is always the first"
    assert all(len(times) == 3 for name in "abc" for times in taken[name].whole.values())


def test_one_round_is_timed_whatever_the_deadline():
    log = []
    clock.time_rounds({"a": Recording("a", log)}, [(True,)], 5, CPU, Deadline(0), None)
    assert len(log) == 1


def test_expectation_is_over_draws():
    found = summarize({(True,): [1.0, 2.0, 9.0], (False,): [4.0, 4.0, 4.0]}, [(True,), (False,), (False,)])
    assert found["mean_ms"] == pytest.approx(10 / 3)
    assert found["spread_ms"] == pytest.approx(math.sqrt(8) / 3)
    assert found["p50_ms"] == 4.0


def test_compiled_is_compared_with_compiled():
    times = {PLAIN: 4.0, PLAIN_COMPILED: 2.0, OURS: 3.0, OURS_COMPILED: 1.0}
    entries = {name: {"status": "timed", "mean_ms": ms} for name, ms in times.items()}
    assert ratios(entries) == {PLAIN: 0.75, PLAIN_COMPILED: 0.5}
    del entries[OURS_COMPILED]
    assert ratios(entries) == {PLAIN: 0.75}


def test_the_most_and_the_least_read_draw_is_checked():
    none, one, all_ = (False, False), (True, False), (True, True)
    assert draws_to_check([one, all_, none]) == [all_, none]
    assert draws_to_check([none]) == [none]


def test_plain_knows_no_coins():
    assert PROVIDERS[PLAIN].coins(MIXED) == (False,) * 4
    assert PROVIDERS[OURS].coins(MIXED) == MIXED


def test_errors_are_relative():
    exact = Outcome(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0]))
    off = Outcome(torch.tensor([3.0, 4.5]), torch.tensor([1.0, 2.0]))
    assert relative_errors(off, exact) == pytest.approx({"logits": 0.1, "gradients": 0.5})


def test_idle_is_where_no_kernel_runs():
    kernels = [("a", 0.0, 10.0), ("c", 30.0, 40.0), ("b", 5.0, 20.0), ("e", 6.0, 8.0), ("d", 40.0, 50.0)]
    assert idle_ms(kernels) == pytest.approx(0.01)
    assert idle_ms([]) == 0


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("_attn_bwd_joint_kernel", "attention"),
        ("_tokens_fwd_kernel", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3", "attention"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "attention"),
        ("void (anonymous namespace)::softmax_warp_forward<float, float, float, 8, false>", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_bias_TNT", "GEMM"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32", "GEMM"),
        ("void cutlass::Kernel2<cutlass_80_simt_sgemm_128x256_8x4_nt_align1>", "GEMM"),
        ("aten::addmm", "GEMM"),
        ("aten::bmm", "GEMM"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("void at::native::direct_copy_kernel_cuda", "copies"),
        ("aten::copy_", "copies"),
        ("void at::native::vectorized_layer_norm_kernel<float, float>", NORM),
        ("triton_per_fused_native_layer_norm_gelu_3", NORM),
        ("triton_poi_fused__to_copy_add_native_layer_norm_view_12", NORM),
        ("triton_per_fused__to_copy_gelu_gelu_backward_sum_view_7", NORM),
        (
            "triton_red_fused__to_copy_add_convolution_backward_native_layer_norm_native_layer_norm_backward"
            "_slice_sum_transpose_view_5",
            NORM,
        ),
        ("triton_red_fused__scaled_dot_product_flash_attention_backward__to_copy_sum_21", NORM),
        ("triton_poi_fused__to_copy_permute_slice_backward_stack_sum_view_3", NORM),
        ("triton_poi_fused__to_copy__unsafe_view_clone_permute_stack_view_3", "copies"),
        ("triton_poi_fused__to_copy_slice_1", "copies"),
        ("triton_per_fused__to_copy__log_softmax_nll_loss_forward_2", NORM),
        ("triton_poi_fused_add_addmm_view_9", NORM),
        ("triton_for_fused_0", NORM),
        ("triton_poi_fused__to_copy_0", "copies"),
        ("triton_poi_fused__to_copy_clone_permute_view_31", "copies"),
        ("triton_poi_fused__to_copy_slice_t_transpose_4", "copies"),
        ("triton_poi_fused_stack_1", "copies"),
        ("triton_poi_fused_cat_expand_1", "copies"),
        ("triton_tem_fused__to_copy_addmm_gelu_view_3", "GEMM"),
        ("void (anonymous namespace)::log_softmax_forward", NORM),
        ("void at::native::cunn_SoftMaxForward<4, float, float, float, LogSoftMaxForwardEpilogue>", NORM),
        ("void softmax_warp_forward<float, float, float, 8, true, false>(float*, int)", NORM),
        ("void softmax_warp_backward<float, float, float, 8, true, false>(float*, int)", NORM),
        ("void softmax_warp_backward<float, float, float, 8, false, false>(float*, int)", "attention"),
        ("aten::_log_softmax_backward_data", NORM),
        ("aten::add", NORM),
        ("aten::nll_loss_forward", NORM),
    ],
)
def test_kernels_are_known_by_name(name, kind):
    assert category(name) == kind


def test_breakdown_covers_the_step(tiny):
    step = tiny.ready(PROVIDERS[PLAIN], F32).step
    found = breakdown(step, MIXED)
    assert found["breakdown"].keys() == {"attention", "GEMM", "norm and elementwise", "copies", "idle"}
    assert all(ms >= 0 for ms in found["breakdown"].values())
    assert found["breakdown"]["attention"] > 0


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


def test_the_draw_of_median_work_is_taken_apart():
    """Two draws that read the source in as many blocks differ in work."""
    size = Size.of(Setting.make(TINY, CPU).target)
    draws = [(True, True, False, False), (False, False, True, True), (False, True, True, True)]
    flops = [step_flops(size, coins) for coins in draws]
    assert len(set(flops)) == 3
    assert flops[draws.index(measure.median_draw(size, draws))] == sorted(flops)[1]
    assert measure.median_draw(size, draws[::-1]) == measure.median_draw(size, draws)


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


def test_only_selects_by_name(tmp_path):
    main(["--tiny", "--only", "^p ", "--output", str(tmp_path / "step.json")])
    recorded = json.loads((tmp_path / "step.json").read_text())
    assert [case["study"] for case in recorded["cases"]] == ["p"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tiny", "--only", "no such"], "no case"),
        (["--tiny", "--without", "."], "without a provider"),
        (["--tiny", "--cpu"], "not allowed with"),
        pytest.param(
            ["--quick"], "there is no GPU", marks=pytest.mark.skipif(HAS_GPU, reason="there is one")
        ),
    ],
)
def test_arguments_that_cannot_be_met_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU")
@pytest.mark.filterwarnings("default")  # the compilers warn of themselves, and of the GPU
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=["bf16", "f16"])
def test_on_a_gpu_memory_and_kernels_are_recorded(dtype):
    workload = replace(TINY, batch=8, kwargs={"depth": 4, "embed_dim": 192, "num_heads": 3})
    found = measure.measure(
        Case(workload, 0.5, dtype, providers=cases.ALL), stage.Stage(workload, torch.device("cuda")), SETTINGS
    )
    for name, entry in found["providers"].items():
        assert entry["status"] == "timed", f"{name}: {entry}"
        assert entry["peak_mib"] >= entry["peak_mib_without_frozen"] > 0
        assert (entry["peak_mib"] > entry["peak_mib_without_frozen"]) == (PROVIDERS[name].reads_source)
        assert entry["breakdown"]["GEMM"] > 0
        assert entry["breakdown"]["idle"] > 0
