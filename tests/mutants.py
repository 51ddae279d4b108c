"""Break the code on purpose and see that a test notices.

    python -m tests.mutants [NAME ...]

Each mutant replaces one text of one file in a copy of the tree and runs the tests that should fail there. One
that survives is a fact that no test checks.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FORWARD, BACKWARD = "stochca_kernels/forward.py", "stochca_kernels/backward.py"
PRIMITIVES, AUTOGRAD = "stochca_kernels/primitives.py", "stochca_kernels/autograd.py"
OPERATOR = ("tests/kernels/test_operator.py", "-k", "triton")
SDPA, ATTENTION = "stochca_kernels/sdpa.py", "stochca/attention.py"
BLOCK, MODEL, PLAN, VIT = "stochca/block.py", "stochca/model.py", "stochca/plan.py", "stochca/vit.py"
RECOMPUTE, PRECISION = "stochca/recompute.py", "stochca/precision.py"
MEMORY = ("tests/method/test_memory.py",)
EXACT, TRAINING = ("tests/method/test_exact.py",), ("tests/method/test_training.py",)
TRITON = ("tests/kernels/test_triton.py",)
ACCURACY = (*TRITON, "-k", "eager_torch or log_sum_exp")
SOFTMAX, PROJECTED = "stochca_kernels/softmax.py", "stochca_kernels/projected.py"
JOINT, TOKENS = "stochca_kernels/backward_joint.py", "stochca_kernels/tokens.py"
FEW_ROWS, COMPILATION = "stochca_kernels/few_rows.py", "stochca_kernels/compilation.py"
TEST_JOINT, TEST_PROJECTED = ("tests/kernels/test_joint.py",), ("tests/kernels/test_projected.py",)
TEST_TOKENS, TEST_DISPATCH = ("tests/kernels/test_tokens.py",), ("tests/kernels/test_dispatch.py",)


class Mutant(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTANTS = [
    Mutant(
        "branch_flipped",
        FORWARD,
        "reads_source = tl.load(use_source_ptr + batch)",
        "reads_source = tl.load(use_source_ptr + batch) == 0",
        OPERATOR,
    ),
    Mutant(
        "branch_flipped_in_backward",
        BACKWARD,
        "reads_source = tl.load(use_source_ptr + batch)",
        "reads_source = tl.load(use_source_ptr + batch) == 0",
        OPERATOR,
    ),
    Mutant(
        "branch_flipped_for_the_batch",
        AUTOGRAD,
        "pair = source_kv if use_source is True else kv",
        "pair = source_kv if use_source is False and source_kv is not None else kv or source_kv",
        OPERATOR,
    ),
    Mutant(
        "only_k_switched",
        FORWARD,
        "(source_k_ptr, stride_skn, source_v_ptr, stride_svn, len_source_kv),",
        "(source_k_ptr, stride_skn, v_ptr, stride_svn, len_source_kv),",
        OPERATOR,
    ),
    Mutant(
        "only_k_switched_in_backward",
        BACKWARD,
        "(source_k_ptr, stride_skn, source_v_ptr, stride_svn, len_source_kv),",
        "(source_k_ptr, stride_skn, v_ptr, stride_svn, len_source_kv),",
        TRITON,
    ),
    Mutant(
        "key_mask_dropped",
        SOFTMAX,
        "logits = tl.where((start + tl.arange(0, ROWS))[None, :] < len_kv,",
        "logits = tl.where((start + tl.arange(0, ROWS))[None, :] < len_kv + ROWS,",
        ACCURACY,
    ),
    Mutant(
        "key_mask_dropped_in_dq",
        SOFTMAX,
        "< len_kv, probs, 0.0)",
        "< len_kv + 128, probs, 0.0)",
        (*TRITON, "-k", "far_below"),
    ),
    Mutant(
        "row_mask_of_loads_dropped",
        PRIMITIVES,
        "tl.load(ptrs, mask=rows[:, None] < length, other=0.0)",
        "tl.load(ptrs)",
        ACCURACY,
    ),
    Mutant(
        "scale_off",
        SOFTMAX,
        "logits = dot_rows(q, keys[i], PRECISION) * (scale",
        "logits = dot_rows(q, keys[i], PRECISION) * (1.01 * scale",
        ACCURACY,
    ),
    Mutant("scale_off_in_dq", BACKWARD, "len_q, dq * scale,", "len_q, dq * scale * 1.01,", ACCURACY),
    Mutant("scale_off_in_dk", BACKWARD, "len_kv, dk * scale,", "len_kv, dk * scale * 1.01,", ACCURACY),
    Mutant("no_rescale", SOFTMAX, "acc * rescale[:, None]", "acc", ACCURACY),
    Mutant("no_rescale_of_the_sum", SOFTMAX, "row_sum * rescale", "row_sum", ACCURACY),
    Mutant(
        "wrong_stride",
        FORWARD,
        "values = load_parts(v_ptr, stride_vn",
        "values = load_parts(v_ptr, stride_kn",
        (*TRITON, "-k", "strides"),
    ),
    Mutant(
        "wrong_stride_of_the_source",
        FORWARD,
        "(source_k_ptr, stride_skn, source_v_ptr, stride_svn, len_source_kv),",
        "(source_k_ptr, stride_skn, source_v_ptr, stride_skn, len_source_kv),",
        (*TRITON, "-k", "strides"),
    ),
    Mutant(
        "unmasked_store",
        PRIMITIVES,
        "mask = (rows[:, None] < length) & (cols[None, :] < HEAD_DIM)",
        "mask = (rows[:, None] >= 0) & (cols[None, :] < HEAD_DIM)",
        TRITON,
    ),
    Mutant(
        "corrupted_lse", FORWARD, "row_max + tl.log2(row_sum)", "row_max + tl.log2(row_sum) + 0.01", ACCURACY
    ),
    Mutant(
        "lse_in_base_e",
        FORWARD,
        "row_max + tl.log2(row_sum)",
        "(row_max + tl.log2(row_sum)) / LOG2_E",
        ACCURACY,
    ),
    Mutant(
        "lse_of_the_source_stored",
        FORWARD,
        "+ rows, lse, mask=rows < len_q)",
        "+ rows, lse, mask=rows < end_row)",
        TRITON,
    ),
    Mutant(
        "dk_where_it_must_be_zero",
        BACKWARD,
        "if tl.load(use_source_ptr + batch):",
        "if tl.load(use_source_ptr + batch) > 1:",
        TRITON,
    ),
    Mutant(
        "zeros_of_dv_not_written",
        BACKWARD,
        "first_row, len_kv, dv, BLOCK_N, HEAD_DIM, BLOCK_D)\n            return",
        "first_row, 0, dv, BLOCK_N, HEAD_DIM, BLOCK_D)\n            return",
        (*TRITON, "-k", "exactly_zero"),
    ),
    Mutant(
        "value_bias_forgotten",
        SDPA,
        "return out if kv.bias is None else",
        "return out if kv.bias is not None else",
        EXACT,
    ),
    Mutant("unselected_side_read", SDPA, "zero_where(kv, use_source)", "kv", (*OPERATOR[:1],)),
    Mutant(
        "source_stops_one_block_early",
        MODEL,
        "advance = plan.advances_source(i)",
        "advance = plan.advances_source(i + 1)",
        EXACT,
    ),
    Mutant(
        "source_runs_to_the_end",
        MODEL,
        "advance = plan.advances_source(i)",
        "advance = True",
        (*EXACT, "-k", "no_further"),
    ),
    Mutant(
        "checkpointing_does_nothing",
        MODEL,
        "checkpointing = self.target.grad_checkpointing and torch.is_grad_enabled()",
        "checkpointing = False",
        (*TRAINING, "-k", "checkpointing"),
    ),
    Mutant(
        "compile_does_nothing",
        MODEL,
        "self._target_step = CompiledPerCase(target_step, *args, **kwargs)",
        "self._target_step = target_step",
        (*TRAINING, "-k", "compiled"),
    ),
    Mutant(
        "cases_share_their_limit",
        "stochca/compile.py",
        "self._compile(_copy(self._function))",
        "self._compile(self._function)",
        (*TRAINING, "-k", "exhausts"),
    ),
    Mutant(
        "unselected_projection_projected",
        "stochca_kernels/attention.py",
        "kv = zero_where(kv, use_source)",
        "kv = kv",
        (*OPERATOR[:1], "-k", "unselected_projection"),
    ),
    Mutant("recipe_outlives_its_tensor", RECOMPUTE, "self._recipes.pop(key, None)", "None", MEMORY),
    Mutant("recipe_of_a_changed_tensor", RECOMPUTE, "recipe.version != tensor._version", "False", MEMORY),
    Mutant(
        "recipe_without_autocast", RECOMPUTE, "torch.no_grad(), self.autocast()", "torch.no_grad()", MEMORY
    ),
    Mutant("recipe_computed_for_each_view", RECOMPUTE, "if self.waiting <= 0:", "if True:", MEMORY),
    Mutant("graph_keeps_itself", RECOMPUTE, "_Versions([tensor.detach()])", "_Versions([tensor])", MEMORY),
    Mutant(
        "pair_is_kept",
        MODEL,
        "recomputation.instead_of(source_kv, keys, projection.x, weights=attn.qkv.parameters())",
        "pass",
        MEMORY,
    ),
    Mutant("changed_weights_pass", RECOMPUTE, "if tensor._version != version:", "if False:", MEMORY),
    Mutant(
        "weights_of_recipes_pass", RECOMPUTE, "_Versions([*inputs, *weights])", "_Versions(inputs)", MEMORY
    ),
    Mutant("hooks_of_users_are_ignored", RECOMPUTE, "if not module._forward_hooks:", "if True:", MEMORY),
    Mutant("norm_of_two_layers_is_cast", RECOMPUTE, 'hasattr(block.mlp, "fc1")', "True", MEMORY),
    Mutant("scales_are_powers_of_two", PRECISION, "round_scales_to_power_of_2=False", "", MEMORY),
    Mutant(
        "weights_stay_cast_back",
        MODEL,
        "self._holds_source_dtype = self.source_dtype is None",
        "pass",
        MEMORY,
    ),
    Mutant("norms_are_kept", MODEL, "() if compiled else self.target.blocks", "()", MEMORY),
    Mutant("weights_are_not_held", MODEL, "hold_weights(self.source, self.source_dtype)", "pass", MEMORY),
    Mutant("keys_in_float8", PRECISION, 'and "qkv" not in name', "", MEMORY),
    Mutant("arithmetic_is_not_checked", PRECISION, "if met != wanted:", "if False:", MEMORY),
    Mutant(
        "class_rows_in_two_layouts",
        MODEL,
        "x = x[:, :rows].contiguous()",
        "x = x[:, :rows]",
        (*TRAINING, "-k", "no_order"),
    ),
    Mutant(
        "cases_share_a_name",
        "stochca/compile.py",
        'co_name=f"{function.__name__}_{next(_NUMBERS)}"',
        "",
        (*TRAINING, "-k", "no_order"),
    ),
    Mutant(
        "wrong_step_is_timed",
        "bench/step/check.py",
        "if not ratio <= allowed[name]:",
        "if False:",
        ("tests/test_bench_step.py",),
    ),
    Mutant(
        "stale_result_looks_fresh",
        "bench/report/recorded.py",
        'return not result.get("code") or bool(self._changed(result) or self._other_inputs(result))',
        "return False",
        ("tests/test_report.py",),
    ),
    Mutant(
        "coins_on_paper_cost_nothing",
        "bench/cost.py",
        "done[Part.CROSS if coin else Part.SELF] += 1",
        "done[Part.SELF] += 1",
        ("tests/test_cost.py",),
    ),
    Mutant(
        "fastest_rank_is_waited_for",
        "bench/scaling/waiting.py",
        "np.cumsum(chances[order]) ** count",
        "np.cumsum(chances[order])",
        ("tests/test_scaling.py",),
    ),
    Mutant("source_in_train_mode", MODEL, "source.eval()", "source.train()", TRAINING),
    Mutant("source_stays_behind", MODEL, "self.source._apply(fn, recurse)", "pass", TRAINING),
    Mutant("layers_without_prefix", MODEL, "^target\\.(?:", "(?:", (*TRAINING, "-k", "layer_decay")),
    Mutant("class_rows_too_early", PLAN, "if coin is not True", "if coin is False", EXACT),
    Mutant(
        "coins_forget_the_step",
        PLAN,
        "default_rng([self.seed, self.step])",
        "default_rng([self.seed, 0])",
        ("tests/method/test_plan.py",),
    ),
    Mutant(
        "coins_per_rank",
        PLAN,
        "default_rng([self.seed, self.step])",
        "default_rng()",
        (*TRAINING, "-k", "two_processes"),
    ),
    Mutant("one_mask_for_both_branches", BLOCK, "branch * masks[1]", "branch * masks[0]", EXACT),
    Mutant(
        "residual_of_all_rows",
        BLOCK,
        "x if num_rows is None else x[:, :num_rows]\n    return",
        "x\n    return",
        EXACT,
    ),
    Mutant(
        "query_norm_forgotten",
        ATTENTION,
        "return attn.q_norm(_split_heads(attn, q, 1)[0])",
        "return _split_heads(attn, q, 1)[0]",
        EXACT,
    ),
    Mutant(
        "key_norm_out_of_the_graph",
        ATTENTION,
        "*_parameters(attn.k_norm))",
        "*())",
        (*TRAINING, "-k", "two_processes"),
    ),
    Mutant(
        "gate_forgotten",
        ATTENTION,
        "out = out * gate(x).sigmoid()",
        "pass",
        ("tests/method/test_attention.py",),
    ),
    Mutant(
        "renormalised_backwards", VIT, "(m - m0) / s0", "(m0 - m) / s0", (*TRAINING, "-k", "renormalisation")
    ),
    Mutant("delta_forgotten", BACKWARD, "probs * (dprobs - delta[None, :])", "probs * dprobs", ACCURACY),
    Mutant(
        "key_mask_dropped_in_joint_backward",
        JOINT,
        "< len_kv, probs, 0.0)",
        "< len_kv + 256, probs, 0.0)",
        (*TEST_JOINT, "-k", "far_above"),
    ),
    Mutant(
        "joint_delta_forgotten",
        JOINT,
        "probs * (dprobs - delta[None, :])",
        "probs * dprobs",
        (*TEST_JOINT, "-k", "eager_torch"),
    ),
    Mutant(
        "joint_scale_of_dk_forgotten",
        JOINT,
        "len_kv, dk, scale, HEAD_DIM",
        "len_kv, dk, 1.0, HEAD_DIM",
        (*TEST_JOINT, "-k", "eager_torch"),
    ),
    Mutant(
        "joint_coin_flipped",
        JOINT,
        "if tl.load(use_source_ptr + batch):",
        "if tl.load(use_source_ptr + batch) == 0:",
        (*TEST_JOINT, "-k", "zero_dk"),
    ),
    Mutant(
        "joint_zeros_of_dv_not_written",
        JOINT,
        "len_kv, dv, 1.0, HEAD_DIM, BLOCK_D)\n            return",
        "0, dv, 1.0, HEAD_DIM, BLOCK_D)\n            return",
        (*TEST_JOINT, "-k", "zero_dk"),
    ),
    Mutant(
        "joint_second_part_masked_as_the_first",
        JOINT,
        "        start += keys[i].shape[0]\n",
        "        start += 0\n",
        TEST_JOINT,
    ),
    Mutant(
        "joint_second_part_stored_over_the_first",
        JOINT,
        "start += tiles[i].shape[0]",
        "start += 0",
        (*TEST_JOINT, "-k", "eager_torch"),
    ),
    Mutant(
        "joint_dq_of_the_last_part_alone",
        JOINT,
        "dlogits, dq, input_precision",
        "dlogits, dq * 0, input_precision",
        (*TEST_JOINT, "-k", "eager_torch"),
    ),
    Mutant(
        "joint_wrong_stride",
        JOINT,
        "load_parts(v_ptr, stride_vn",
        "load_parts(v_ptr, stride_kn",
        (*TEST_JOINT, "-k", "strides"),
    ),
    Mutant(
        "joint_lse_of_another_head",
        JOINT,
        "tl.program_id(0).to(tl.int64) * len_q",
        "batch * len_q",
        (*TEST_JOINT, "-k", "eager_torch"),
    ),
    Mutant(
        "dq_of_the_source_from_the_own_pair",
        BACKWARD,
        'selector, k, v, needs_dkdv = "source", source_k, source_v, False',
        'selector, needs_dkdv = "source", False',
        (*TEST_JOINT, "-k", "mixed"),
    ),
    Mutant(
        "dq_of_the_source_over_all_samples",
        BACKWARD,
        "if reads_source == 0:",
        "if reads_source > 1:",
        (*TEST_JOINT, "-k", "mixed"),
    ),
    Mutant(
        "dq_of_the_source_never_launched",
        BACKWARD,
        'if selector != "pair":\n',
        'if selector != "":\n',
        (*TEST_JOINT, "-k", "mixed"),
    ),
    Mutant(
        "projected_value_bias_forgotten",
        PROJECTED,
        "out = acc / row_sum[:, None] + bias[None, :]",
        "out = acc / row_sum[:, None]",
        (*TEST_PROJECTED, "-k", "on_chip"),
    ),
    Mutant(
        "projected_value_bias_in_delta_forgotten",
        PROJECTED,
        "(out.to(tl.float32) - bias[None, :])",
        "out.to(tl.float32)",
        (*TEST_PROJECTED, "-k", "on_chip"),
    ),
    Mutant(
        "projected_keys_and_values_swapped",
        PROJECTED,
        "values = append(values, tiles[2 * i + 1]",
        "values = append(values, tiles[2 * i]",
        (*TEST_PROJECTED, "-k", "on_chip"),
    ),
    Mutant(
        "projected_factor_forgotten",
        PROJECTED,
        "            if HAS_RSTD:",
        "            if False:",
        (*TEST_PROJECTED, "-k", "on_chip"),
    ),
    Mutant(
        "projected_rows_of_the_first_part",
        PROJECTED,
        "            first_row += PARTS[i]\n        accs = sums",
        "        accs = sums",
        (*TEST_PROJECTED, "-k", "any_length"),
    ),
    Mutant(
        "projected_channels_beyond_the_last",
        PROJECTED,
        "        mask = mask & (columns[None, :] < channels)",
        "        mask = mask & (columns[None, :] < channels + BLOCK_C)",
        (*TEST_PROJECTED, "-k", "any_head_size"),
    ),
    Mutant(
        "projected_query_bias_forgotten",
        PROJECTED,
        "q = (q + q_bias[None, :])",
        "q = (q + 0 * q_bias[None, :])",
        (*TEST_PROJECTED, "-k", "on_chip"),
    ),
    Mutant(
        "projected_coin_ignored",
        PROJECTED,
        "num_blocks = tl.where(tl.load(use_source_ptr + batch), num_blocks, 0)",
        "num_blocks = tl.where(tl.load(use_source_ptr + batch) >= 0, num_blocks, 0)",
        (*TEST_PROJECTED, "-k", "mixed"),
    ),
    Mutant(
        "projected_coin_ignored_in_backward",
        PROJECTED,
        "reads_source = tl.load(use_source_ptr + batch)",
        "reads_source = tl.load(use_source_ptr + batch) >= 0",
        (*TEST_PROJECTED, "-k", "mixed"),
    ),
    Mutant(
        "scratch_of_another_program",
        PROJECTED,
        "values_ptr = scratch_ptr + length * HEAD_DIM",
        "values_ptr = scratch_ptr + length * HEAD_DIM // 2",
        (*TEST_PROJECTED, "-k", "scratch"),
    ),
    Mutant(
        "one_lane_for_both_pairs",
        FORWARD,
        "reads_source = reads_source | is_source_lane",
        "reads_source = reads_source",
        TRITON,
    ),
    Mutant(
        "whole_row_without_its_maximum",
        SOFTMAX,
        "row_max = tl.maximum(row_max, tl.max(logits, 1))\n            scores",
        "row_max = tl.maximum(row_max, tl.max(logits, 1)) * 0\n            scores",
        (*TRITON, "-k", "outliers or far_below"),
    ),
    Mutant(
        "parts_masked_from_the_first",
        SOFTMAX,
        "            columns = start + tl.arange(0, keys[i].shape[0])",
        "            columns = tl.arange(0, keys[i].shape[0])",
        (*TRITON, "-k", "eager_torch"),
    ),
    Mutant(
        "packed_gradient_of_keys_and_values_swapped",
        BACKWARD,
        "*unpack(dqkv)",
        "*(unpack(dqkv)[i] for i in (0, 2, 1))",
        (*TEST_PROJECTED, "-k", "packed"),
    ),
    Mutant(
        "mixed_pairs_of_different_lengths_on_chip",
        "stochca_kernels/tiles.py",
        "return tuple(row for row in rows if row.block_n)",
        "return rows",
        (*TRITON, "-k", "eager_torch"),
    ),
    Mutant(
        "too_large_rows_not_replaced",
        "stochca_kernels/launch.py",
        "            if tiles is rows[-1]:",
        "            if True:",
        TEST_DISPATCH,
    ),
    Mutant(
        "warmup_without_class_rows",
        COMPILATION,
        "    if class_rows:",
        "    if not class_rows:",
        TEST_DISPATCH,
    ),
    Mutant(
        "warmup_without_the_sources_own_attention",
        COMPILATION,
        "stochca_attention(source_q, (k, v), None, False",
        "stochca_attention(source_q, None, (k, v), False",
        TEST_DISPATCH,
    ),
    Mutant(
        "few_rows_take_the_long_way",
        "stochca_kernels/attention.py",
        "use_source, source_q) and len(widths) == 1",
        "use_source, source_q) and False",
        TEST_DISPATCH,
    ),
    Mutant(
        "tokens_outside_not_masked",
        TOKENS,
        'logits = tl.where(tokens[None, :] < last, logits, float("-inf"))',
        "logits += 0.0",
        (*TEST_TOKENS, "-k", "eager_torch"),
    ),
    Mutant(
        "tokens_outside_not_masked_in_backward",
        TOKENS,
        "probs = tl.where(tokens[None, :] < last, tl.exp2(logits - lse[:, None]), 0.0)",
        "probs = tl.exp2(logits - lse[:, None])",
        (*TEST_TOKENS, "-k", "far_below_zero"),
    ),
    Mutant(
        "tokens_branch_flipped",
        TOKENS,
        "reads_source = tl.load(use_source_ptr + batch)",
        "reads_source = tl.load(use_source_ptr + batch) == 0",
        (*TEST_TOKENS, "-k", "mixed"),
    ),
    Mutant(
        "tokens_no_zeros_in_dx",
        TOKENS,
        "            if not ADDS_DX:\n",
        "            if ADDS_DX:\n",
        (*TEST_TOKENS, "-k", "exactly_zero"),
    ),
    Mutant(
        "tokens_dx_of_the_last_block_of_rows_alone",
        TOKENS,
        "ADDS_DX=first_row > 0",
        "ADDS_DX=False",
        (*TEST_TOKENS, "-k", "eager_torch and self and Nq7"),
    ),
    Mutant(
        "tokens_splits_weigh_the_same",
        TOKENS,
        "weights = tl.exp2(lse - largest)",
        "weights = tl.exp2(lse * 0)",
        (*TEST_TOKENS, "-k", "splits"),
    ),
    Mutant(
        "tokens_factor_not_on_values",
        TOKENS,
        "            probs *= factor[None, :]\n",
        "            probs *= 1.0\n",
        (*TEST_TOKENS, "-k", "factor"),
    ),
    Mutant(
        "tokens_factor_not_in_dqueries",
        TOKENS,
        "            dlogits *= factor[None, :]\n",
        "            dlogits *= 1.0\n",
        (*TEST_TOKENS, "-k", "factor"),
    ),
    Mutant(
        "tokens_read_twice",
        TOKENS,
        "WIDTHS, STREAMS)\n            tile = tl.dot(probs",
        "WIDTHS, True)\n            tile = tl.dot(probs",
        (*TEST_TOKENS, "-k", "loaded_once"),
    ),
    Mutant(
        "tokens_queries_not_zeroed",
        FEW_ROWS,
        "own, source = (q.masked_fill(mask[..., None], 0) for mask in (coin, ~coin))",
        "own, source = q, q",
        (*TEST_TOKENS, "-k", "nan_in_a_weight"),
    ),
    Mutant(
        "tokens_mixed_not_zeroed",
        FEW_ROWS,
        "own, source = (mixed.masked_fill(mask, 0) for mask in (coin, ~coin))",
        "own, source = mixed, mixed",
        (*TEST_TOKENS, "-k", "nan_in_a_weight"),
    ),
    Mutant(
        "tokens_value_bias_of_the_keys",
        FEW_ROWS,
        ".view(2, heads, 1, head_dim)[1]",
        ".view(2, heads, 1, head_dim)[0]",
        (*TEST_TOKENS, "-k", "key_bias or eager_torch"),
    ),
    Mutant(
        "coins_of_another_stride",
        "stochca_kernels/attention.py",
        "use_source = use_source.contiguous()",
        "use_source = use_source",
        (*OPERATOR[:2], "any_stride"),
    ),
    Mutant(
        "factors_of_another_stride",
        PROJECTED,
        "source._replace(rstd=source.rstd.contiguous())",
        "source",
        (*TEST_PROJECTED, "-k", "lie_anywhere"),
    ),
    Mutant(
        "tokens_of_two_widths",
        "stochca_kernels/attention.py",
        "and len(widths) == 1",
        "and len(widths) <= 2",
        (*OPERATOR[:2], "differ_in_width"),
    ),
    Mutant(
        "running_maximum_from_minus_infinity",
        SOFTMAX,
        "-3.4028234663852886e38",
        'float("-inf")',
        (*TRITON, "-k", "minus_infinity"),
    ),
]


def survives(mutant: Mutant) -> bool:
    """Run the tests of one mutant in a copy of the tree. Passing tests mean that nothing noticed."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "tree"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "*.egg-info"))
        path = copy / mutant.file
        text = path.read_text()
        if text.count(mutant.old) != 1:
            raise SystemExit(
                f"{mutant.name}: the old text is {text.count(mutant.old)} times in {mutant.file}"
            )
        path.write_text(text.replace(mutant.old, mutant.new))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutant.tests]
        result = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    if result.returncode > 1:  # neither passed, nor failed, nor killed by a signal: no verdict
        raise SystemExit(f"{mutant.name}: pytest could not run\n{result.stdout}{result.stderr}")
    return result.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", choices=[[], *(mutant.name for mutant in MUTANTS)], metavar="NAME"
    )
    names = parser.parse_args().names
    survivors = []
    for mutant in MUTANTS:
        if not names or mutant.name in names:
            survived = survives(mutant)
            survivors += [mutant.name] * survived
            sys.stdout.write(f"{'SURVIVED' if survived else 'killed  '} {mutant.name}\n")
            sys.stdout.flush()
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
