"""What the predictions of a step count is what runs; what they assume is in one place."""

import functools
from dataclasses import replace

import pytest
import timm
import torch

from bench import cost, counts, step_bytes, step_predictions, step_times
from bench.cost import Part, Size, work
from bench.sizes import size_of, title
from bench.step.goals import MEMORY, TIME, gpu_goals
from bench.step.providers import PROVIDERS
from bench.step.workloads import VIT_B_448
from stochca import StochCA

SMALL = {"img_size": 112, "patch_size": 8, "depth": 4, "embed_dim": 64, "num_heads": 2, "num_classes": 5}


@pytest.fixture(scope="module")
def vit_b():
    return size_of(step_predictions.VIT_B_224)


@pytest.mark.parametrize("coins", ["ssss", "cssc", "sccs", "cccc", "sscc"])
def test_memory_that_is_predicted_is_what_a_step_keeps(coins):
    """Under autocast on the CPU, whose SDPA keeps what a GPU's does; copies of weights are kept as well."""
    vit = timm.create_model("vit_tiny_patch16_224", **SMALL)
    model = StochCA(vit, impl="sdpa").train()
    recomputing = StochCA(vit, model.source, recompute=True, impl="sdpa").train()
    size, images = Size.of(model.target), torch.zeros(2, 3, 112, 112)
    draw = [coin == "c" for coin in coins]
    parameters = [*model.parameters(), *model.source.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        kept = counts.saved_bytes(lambda: model(images, coins=draw), parameters)
        again = counts.saved_bytes(lambda: recomputing(images, coins=draw), parameters)
        plain = counts.saved_bytes(lambda: model.target(images), parameters)
    for provider, counted in (
        (step_times.OURS_EAGER, kept),
        (step_times.OURS_RECOMPUTING, again),
        (step_times.PLAIN_EAGER, plain),
    ):
        predicted = step_times.peak_bytes(size, 2, provider, draw)
        predicted -= step_times.STATE_BYTES * size.parameters
        assert predicted == pytest.approx(counted, abs=0.04 * plain)


def test_products_take_their_flops_at_the_share_of_the_rate(vit_b):
    nothing = step_times.Pointwise(*[0] * 10)
    provider = replace(step_times.OURS, pointwise=nothing)
    flops = work(vit_b, Part.SOURCE_KV).gemm
    rate = step_times.GEMM_SHARE * step_times.MATMUL_FLOPS_PER_S
    assert step_times.part_seconds(vit_b, 8, provider, Part.SOURCE_KV) == pytest.approx(8 * flops / rate)
    fp8 = replace(provider, source_speedup=2.0)
    assert step_times.part_seconds(vit_b, 8, fp8, Part.SOURCE_KV) == pytest.approx(4 * flops / rate)
    own = [step_times.part_seconds(vit_b, 8, of, Part.SELF) for of in (provider, fp8)]
    assert own[0] == own[1], "the target's products stay in bf16"


def test_by_hand_pays_the_whole_source_under_every_draw(vit_b):
    plain, by_hand = (
        step_times.step_seconds(vit_b, 128, provider, (False,) * 12)
        for provider in (step_times.PLAIN, step_times.HAND)
    )
    parts = {Part.SOURCE: 12, Part.SOURCE_STEM: 1}
    source = sum(n * step_times.part_seconds(vit_b, 128, step_times.HAND, part) for part, n in parts.items())
    assert by_hand - plain == pytest.approx(source), "whose weights are held, not cast in every step"
    cross = step_times.step_seconds(vit_b, 128, step_times.HAND, (True,) * 12)
    own, none = (step_times.part_seconds(vit_b, 128, step_times.HAND, p) for p in (Part.SELF, Part.CROSS))
    assert by_hand - cross == pytest.approx(12 * (own - none))
    kv = 6 * 128 * vit_b.length * 2 * vit_b.width**2 / step_times.HAND.matmul_flops_per_s
    assert own - none > kv, "queries alone are projected where the source is read"


def test_who_recomputes_takes_longer_and_keeps_less(vit_b):
    eager, again = step_times.OURS_EAGER, step_times.OURS_RECOMPUTING
    for part in (Part.SELF, Part.CROSS, Part.SELF_ROWS):
        extra = (step_times.part_seconds(vit_b, 128, of, part) for of in (again, eager))
        norms = 1 if part is Part.SELF_ROWS else 2
        moved = norms * eager.pointwise.norm + (4 * eager.pointwise.activation if norms == 2 else 0)
        pair = 128 * work(vit_b, Part.SOURCE_KV).gemm / eager.matmul_flops_per_s
        wanted = 128 * vit_b.length * vit_b.width * moved / step_times.MEMORY_BYTES_PER_S
        now, before = extra
        assert now - before == pytest.approx(wanted + (pair if part is Part.CROSS else 0)), part


def test_each_kernel_reads_and_writes_its_tensors_once(vit_b):
    silent = replace(step_times.OURS, pointwise=step_times.Pointwise(*[0] * 10))
    moved = {part: step_bytes.part_bytes(vit_b, 8, silent, part) for part in Part}
    tokens, width = 8 * 197, 768
    token = 2 * tokens * width  # bytes of a tensor [B, N, C] in bfloat16
    assert moved[Part.SOURCE_KV] == 2 * (tokens * (width + 2 * width) + width * 2 * width)
    weights = 2 * (3 + 1 + 4 + 4) * width**2
    assert moved[Part.SOURCE] == (4 + 2 + 5 + 5 + 4) * token + weights
    assert moved[Part.SELF] == 3 * (4 + 2 + 5 + 5) * token + 3 * weights + (4 + 8) * token
    assert moved[Part.CROSS] == 3 * (2 + 2 + 5 + 5) * token + 3 * (weights - 4 * width**2) + (4 + 6) * token
    again = replace(silent, recomputes=True)
    extra = step_bytes.part_bytes(vit_b, 8, again, Part.CROSS) - moved[Part.CROSS]
    assert extra == moved[Part.SOURCE_KV], "which is projected a second time"
    rows = {part: step_bytes.part_bytes(vit_b, 8, silent, part) for part in (Part.SELF_ROWS, Part.CROSS_ROWS)}
    assert rows[Part.SELF_ROWS] - rows[Part.CROSS_ROWS] == token, "the gradient of the tokens"
    scores = replace(step_times.AUTHORS, pointwise=silent.pointwise)
    source = step_bytes.part_bytes(vit_b, 8, scores, Part.SOURCE)
    assert source == 2 * (16 * token + weights) + 24 * 8 * 12 * 197**2 + 32 * tokens * width


def test_bytes_of_a_step_are_those_of_its_parts_and_of_its_weights(vit_b):
    none, every = (False,) * 12, (True,) * 12
    for provider in step_times.PROVIDERS:
        parts = step_times.parts_of(vit_b, provider, every)
        moved = sum(n * step_bytes.part_bytes(vit_b, 128, provider, part) for part, n in parts.items())
        weights = step_times.weights_bytes(vit_b, provider)
        assert step_bytes.step_bytes(vit_b, 128, provider, every) == moved + weights
        mean = step_bytes.expected_bytes(vit_b, 128, provider, [none, every])
        assert mean == pytest.approx(
            (step_bytes.step_bytes(vit_b, 128, provider, none) + moved + weights) / 2
        )


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_expected_seconds_are_the_mean_over_the_coins(vit_b, p):
    for provider in step_times.PROVIDERS:
        step = functools.partial(step_times.step_seconds, vit_b, 128, provider)
        mean = cost.expectation(step, 12, p)
        assert step_times.expected_seconds(vit_b, 128, provider, p) == pytest.approx(mean, rel=1e-12)


def test_nobody_is_predicted_above_the_roofline(vit_b):
    coins = (True, False) * 6
    for provider in step_times.PROVIDERS:
        seconds = step_times.step_seconds(vit_b, 128, provider, coins)
        moved = step_bytes.step_bytes(vit_b, 128, provider, coins)
        assert 0.1 * seconds < moved / step_times.MEMORY_BYTES_PER_S < seconds, provider.name


def test_the_optimizer_takes_the_same_whoever_computes_the_step(vit_b):
    for provider in step_times.PROVIDERS:
        coins = (True, False) * 6
        with_it, without = (
            step_times.step_seconds(vit_b, 64, provider, coins, optimizer) for optimizer in (True, False)
        )
        assert with_it - without == pytest.approx(28 * vit_b.parameters / 4.3e12)


def test_tables_have_a_field_for_each_column_and_a_row_for_each_case():
    lines = step_predictions.rows([VIT_B_448], [0.1, 0.5])
    assert [line[:2] for line in lines] == [[title(VIT_B_448), p] for p in ("0.1", "0.5")]
    assert {len(line) for line in lines} == {len(step_predictions.HEADER)}
    assert {len(line) for line in step_predictions.goal_rows()} == {len(step_predictions.GOAL_HEADER)}


def test_predicted_goals_are_those_that_are_measured_and_judged_alike():
    judged = step_predictions.predicted()["goals"]
    wanted = gpu_goals()
    assert [(goal["goal"], goal["case"]) for goal in judged] == [(g.text, g.case.name) for g in wanted]
    for goal, of in zip(judged, wanted, strict=True):
        who = [step_predictions.PREDICTED[name] for name in (of.above, of.below)]
        figure = {TIME: step_predictions.seconds, MEMORY: step_predictions.peak}[of.figure]
        above, below = (figure(of.case.workload, provider, of.case.p) for provider in who)
        assert goal["value"] == pytest.approx(above / below)
        reached = above / below <= of.at_most if of.at_most is not None else above / below >= of.at_least
        assert goal["verdict"] == ("reached" if reached else "missed")
    missed = {goal["goal"] for goal in judged if goal["verdict"] == "missed"}
    assert "peak memory without frozen weights over plain fine-tuning" in missed, (
        "at the most over draws, of which one keeps as much as plain"
    )


def test_who_is_predicted_runs_as_who_is_measured():
    for name, provider in step_predictions.PREDICTED.items():
        measured = PROVIDERS[name]
        compiled = provider.pointwise in (step_times.COMPILED, replace(step_times.COMPILED, unpack=0))
        assert compiled == measured.compiled, name
        assert (provider.savings is None) == (measured.savings is None), name
        assert provider.dtype == str(measured.precision_in(torch.bfloat16)).removeprefix("torch."), name
        if measured.reads_source and provider.dtype == "bfloat16":
            assert provider.casts_source == (not measured.holds_source), name
        assert provider.savings == measured.savings, name


def test_one_product_for_two_saves_waves_at_small_batches():
    lines = {
        name: [float(ratio) for ratio in ratios] for name, *ratios in step_predictions.small_batch_rows()
    }
    # B=4: 7 x 3 tiles of one product leave most of 132 multiprocessors idle, two fit beside each other.
    assert lines["output"][0] == 0.5
    assert all(0.5 <= ratio <= 1 for line in lines.values() for ratio in line)
