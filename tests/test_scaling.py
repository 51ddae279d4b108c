"""The scaling model agrees with itself: law with simulation, stages with steps, ranks with one another."""

import itertools
import json

import numpy as np
import pytest

from bench import cost, digest
from bench.scaling import __main__, model, processes, report, stages, timeline, waiting
from bench.scaling.cluster import Cluster
from bench.step.workloads import MAIN, OVER_DEPTH
from bench.step_times import OURS, step_seconds

VIT_B = next(workload for workload in MAIN if workload.name == "vit_base_patch16_224-B128")
SHALLOW = next(workload for workload in OVER_DEPTH if workload.kwargs == {"depth": 4})
COUNTS = (1, 2, 8, 64, 1024)


def messages(one, gpus):
    return timeline.Messages.of(one.stage_parameters(), gpus, Cluster())


@pytest.fixture(scope="module")
def cases():
    return model.cases([VIT_B, SHALLOW], [0.1, 0.5, 0.8], gpus=COUNTS)


def test_stages_of_every_draw_add_up_to_its_step():
    one = stages.one_gpu(SHALLOW, 0.5, None)
    draws = list(itertools.product((False, True), repeat=4))
    forward, backward, rest = one.stages(np.array(draws))
    for coins, seconds in zip(draws, forward.sum(1) + backward.sum(1) + rest, strict=True):
        assert seconds == pytest.approx(step_seconds(one.size, SHALLOW.batch, OURS, coins)), coins


def test_efficiency_is_at_most_one_and_equal_coins_are_never_slower(cases):
    for case in cases:
        for row in case["rows"]:
            assert row["equal_ms"] <= row["independent_ms"] + 1e-9
            assert 0 < row["independent_efficiency"] <= 1 + 1e-12
            assert 0 < row["equal_efficiency"] <= 1 + 1e-12
        alone = case["rows"][0]
        assert alone["equal_ms"] == pytest.approx(case["one_gpu_ms"])
        assert alone["independent_ms"] == pytest.approx(case["one_gpu_ms"])
        for key in ("equal_ms", "independent_ms"):
            times = [row[key] for row in case["rows"]]
            assert times == sorted(times), "more GPUs never make a step shorter"


def test_simulated_ranks_agree_with_the_law(cases):
    for case in cases:
        for row in case["rows"]:
            noise = 4 * row["simulated_error_ms"]
            above = row["independent_ms"] - row["simulated_ms"]
            # Under DDP the law leaves out messages that other ranks' coins delay. Under FSDP, which gathers a
            # stage ahead, ranks wait less than at every stage; but what is not hidden varies with the coins.
            below, above_by = (0.002, 0.002) if case["strategy"] == "DDP" else (0.02, 0.08)
            simulated = row["simulated_ms"]
            assert -noise - below * simulated <= above <= noise + above_by * simulated


def test_ranks_under_fsdp_wait_more_than_once_and_less_than_at_every_stage():
    fsdp = timeline.STRATEGIES["FSDP"]
    for p in (0.1, 0.5, 0.8):
        one = stages.one_gpu(VIT_B, p, None)
        once = waiting.expected_maximum(*waiting._law(one, fsdp, messages(one, 8)), 8)
        always = waiting.independent_coins(one, fsdp, messages(one, 8), 8)
        simulated, _ = waiting.simulate(one, fsdp, messages(one, 8), 8, 2048)
        assert once < simulated < always


def test_expected_maximum_is_that_of_all_outcomes():
    values, chances = np.array([3.0, 1.0, 2.0]), np.array([0.2, 0.5, 0.3])
    wanted = sum(
        max(values[list(drawn)]) * np.prod(chances[list(drawn)])
        for drawn in itertools.product(range(3), repeat=4)
    )
    assert waiting.expected_maximum(values, chances, 4) == pytest.approx(wanted)
    assert waiting.expected_maximum(values, chances, 1) == pytest.approx(values @ chances)


def test_expected_stages_of_one_rank_are_those_of_all_draws():
    one = stages.one_gpu(SHALLOW, 0.3, None)
    draws = list(itertools.product((False, True), repeat=4))
    chances = [0.3 ** sum(coins) * 0.7 ** (4 - sum(coins)) for coins in draws]
    forward, backward, _ = one.stages(np.array(draws))
    slowest = waiting.slowest_stages(one, 1)
    np.testing.assert_allclose(slowest.forward[0], chances @ forward)
    np.testing.assert_allclose(slowest.backward[0], chances @ backward)


def test_ranks_that_never_differ_do_not_wait():
    for p in (0.0, 1.0):
        one = stages.one_gpu(SHALLOW, p, None)
        for strategy in timeline.STRATEGIES.values():
            equal = waiting.equal_coins(one, strategy, messages(one, 64))
            assert waiting.independent_coins(one, strategy, messages(one, 64), 64) == pytest.approx(equal)
            simulated, error = waiting.simulate(one, strategy, messages(one, 64), 64, 3)
            assert simulated == pytest.approx(equal)
            assert error == pytest.approx(0, abs=1e-12)


def test_a_step_ends_when_its_slowest_rank_and_its_last_message_do():
    quiet = timeline.Messages(np.zeros(3), np.zeros(3), np.zeros(3))
    two = stages.Stages(np.array([[1.0, 2, 3], [4, 0, 0]]), np.array([[0.0, 5, 1], [0, 0, 1]]), 0.5)
    assert timeline.ddp(two, quiet) == 12.5
    # The gradients of stages 2 and 1 are summed while the rest is computed, those of stage 0 after it.
    assert timeline.ddp(two, quiet._replace(all_reduce=np.array([7.0, 4, 3]))) == 12 + 4 + 7 + 0.5
    one = stages.Stages(np.ones((1, 3)), np.ones((1, 3)), 0.0)
    gathers = quiet._replace(gather=np.array([2.0, 0.5, 0.5]), scatter=np.array([3.0, 0, 0]))
    assert timeline.fsdp(one, gathers) == 2 + 3 + 3 + 1 + 3, (
        "stage 0 again arrives after stage 1 has computed"
    )


def test_every_parameter_is_in_one_bucket():
    for workload in (VIT_B, SHALLOW):
        one = stages.one_gpu(workload, 0.1, None)
        sizes = timeline._buckets(one.stage_parameters())
        assert sizes.sum() == 4 * one.size.parameters
        assert all(size >= timeline.BUCKET_BYTES for size in sizes[1:] if size)


def test_collectives_move_their_bytes_and_grow_with_the_cluster():
    cluster = Cluster(launch_seconds=0, nvlink_hop_seconds=0, infiniband_hop_seconds=0)
    assert cluster.all_reduce(360e9, 2) == pytest.approx(1)  # each sends half of it, twice
    assert cluster.gather(360e9, 8) == pytest.approx(7 / 8)
    assert cluster.gather(360e9, 16) == pytest.approx(
        7 / 8 + 1 / 2
    )  # each sends its eighth to the other node
    seconds = [Cluster().all_reduce(1e8, gpus) for gpus in model.GPUS]
    assert seconds[0] == 0
    assert seconds == sorted(seconds)


def test_a_measured_step_replaces_the_predicted_one():
    ours = {"status": "timed", "mean_ms": 50.0}
    case = {"workload": {"name": VIT_B.name}, "p": 0.1, "dtype": "bfloat16"}
    result = {"device": "cuda", "gpu": {"name": "NVIDIA H200"}}
    measured = {**result, "cases": [{**case, "providers": {"ours compiled": ours}}]}
    one = stages.one_gpu(VIT_B, 0.1, measured)
    assert one.mean == pytest.approx(0.05)
    assert one.origin == "measured, NVIDIA H200"
    forward, backward, rest = one.stages(np.array([coins for coins, _ in cost.draw_classes(12)]))
    chances = [chance for _, chance in cost.distribution(12, 0.1)]
    assert chances @ (forward.sum(1) + backward.sum(1) + rest) == pytest.approx(0.05)
    failed = {**result, "cases": [{**case, "providers": {"ours compiled": {"status": "failed"}}}]}
    for other in (failed, {**measured, "device": "cpu"}, None):
        assert stages.one_gpu(VIT_B, 0.1, other).origin == "predicted"


def test_ranks_are_predicted_to_wait_for_the_slower_one_in_each_step():
    alone = [[2.0, 5.0, 3.0], [4.0, 1.0, 3.0]]  # with coins of rank 0 and of rank 1, on either rank
    equal, independent = [3.0, 6.0, 4.0], [5.0, 7.0, 4.0]
    steps = np.array([*([coins, coins] for coins in alone), [equal, [1.0] * 3], [[2.0] * 3, independent]])
    seconds = np.stack([steps + 0.5, steps, steps + 9], 2)  # the least of the repeats counts
    found = processes.compare(seconds)
    # In the first step rank 0 waits two seconds for rank 1; in the others rank 1 waits, if anybody.
    assert found["alone_ms"] == pytest.approx(1e3 * 10 / 3)
    assert found["equal_ms"] == pytest.approx(1e3 * 13 / 3)
    assert found["measured_ratio"] == pytest.approx(16 / 13)
    assert found["predicted_ratio"] == pytest.approx((13 + 2) / 13)


def test_a_prediction_names_the_step_that_it_started_from(tmp_path, monkeypatch):
    monkeypatch.setattr(__main__, "WORKLOADS", [])
    step, output = tmp_path / "step.json", tmp_path / "scaling.json"
    step.write_text('{"device": "cuda", "cases": []}')
    __main__.main(["--no-processes", "--output", str(output), "--step", str(step)])
    assert json.loads(output.read_text())["inputs"] == {"step": digest.file_digest(step)}


def test_two_processes_train_and_the_result_is_written(tmp_path, monkeypatch, capsys):
    tiny = processes.Training("vit_tiny_patch16_224", 32, depth=4, batch=1, p=0.5, steps=3, repeats=2)
    monkeypatch.setattr(__main__, "TRAININGS", [tiny])
    monkeypatch.setattr(__main__, "WORKLOADS", [SHALLOW])
    output = tmp_path / "scaling.json"
    __main__.main(["--output", str(output), "--step", str(tmp_path / "none.json")])
    result = json.loads(output.read_text())
    (run,) = result["processes"]
    assert run["alone_ms"] > 0
    assert run["measured_ratio"] == pytest.approx(run["independent_ms"] / run["equal_ms"])
    assert result["inputs"] == {"step": None}
    assert {len(row) for row in report.rows(result)} == {len(report.HEADER)}
    assert {len(row) for row in report.process_rows(result)} == {len(report.PROCESS_HEADER)}
    assert "busy: load 1.5" in report.process_rows({**result, "load_before": 1.5})[0][0]
    assert "busy" not in report.process_rows({**result, "load_before": 0.2})[0][0]
    assert len(report.rows(result, gpus=[8])) == len(result["cases"])
    printed = capsys.readouterr().out
    assert printed.startswith("Predictions")
    assert all(sentence in printed for sentence in report.origins(result))
