"""How steps are timed, and a step taken apart."""

import math
import time
from collections import Counter
from dataclasses import replace

import pytest

from bench.cost import Size, step_flops
from bench.step import clock, measure
from bench.step.breakdown import breakdown, category, idle_ms
from bench.step.clock import Deadline, summarize
from bench.step.measure import ratios
from bench.step.providers import OURS, OURS_COMPILED, PLAIN, PLAIN_COMPILED, PROVIDERS
from bench.step.workloads import TINY, Setting
from tests.bench_step.common import CPU, F32, MIXED, SETTINGS, measured, spoiled


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


def test_idle_is_where_no_kernel_runs():
    kernels = [("a", 0.0, 10.0), ("c", 30.0, 40.0), ("b", 5.0, 20.0), ("e", 6.0, 8.0), ("d", 40.0, 50.0)]
    assert idle_ms(kernels) == pytest.approx(0.01)
    assert idle_ms([]) == 0


NORM = "norm and elementwise"


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


def test_the_draw_of_median_work_is_taken_apart():
    """Two draws that read the source in as many blocks differ in work."""
    size = Size.of(Setting.make(TINY, CPU).target)
    draws = [(True, True, False, False), (False, False, True, True), (False, True, True, True)]
    flops = [step_flops(size, coins) for coins in draws]
    assert len(set(flops)) == 3
    assert flops[draws.index(measure.median_draw(size, draws))] == sorted(flops)[1]
    assert measure.median_draw(size, draws[::-1]) == measure.median_draw(size, draws)
