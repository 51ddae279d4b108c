"""A whole run of the benchmark of training steps: what it records, and what it refuses to begin."""

import ast
import json
from dataclasses import replace
from statistics import fmean

import pytest
import torch

from bench.cost import Size, plain_flops
from bench.digest import ROOT
from bench.step import cases, measure, stage
from bench.step.__main__ import MEASURED, main
from bench.step.cases import Case, tiny_cases
from bench.step.providers import BY_HAND_EAGER, OURS, PLAIN, PROVIDERS
from bench.step.workloads import TINY, Setting, Workload
from tests.bench_step.common import BF16, CPU, F32, SETTINGS, spoiled

HAS_GPU = torch.cuda.is_available()
OTHER = replace(TINY, batch=3)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "new" / "step.json"
    main(["--tiny", "--output", str(path)])
    return json.loads(path.read_text())


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


def test_without_time_nothing_is_begun(tmp_path):
    main(["--tiny", "--budget", "0", "--output", str(tmp_path / "step.json")])
    for case in json.loads((tmp_path / "step.json").read_text())["cases"]:
        assert {entry["status"] for entry in case["providers"].values()} == {"not reached"}


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
