"""Faults of the operator where it is given keys and values."""

from tests.mutants.mutant import Mutant

FORWARD = "stochca_kernels/forward.py"
BACKWARD = "stochca_kernels/backward.py"
PRIMITIVES = "stochca_kernels/primitives.py"
AUTOGRAD = "stochca_kernels/autograd.py"
OPERATOR = ("tests/kernels/test_operator.py", "-k", "triton and (attends or gradients_are)")
SDPA = "stochca_kernels/sdpa.py"
PRECISION = "stochca/precision.py"
EXACT = ("tests/method/test_exact.py",)
TRITON = ("tests/kernels/test_triton.py",)
ACCURACY = (*TRITON, "-k", "eager_torch and self and (N1-D32 or N16-D32 or N17-D32)")
# More keys than lie on chip at once
LONG = (*TRITON, "-k", "eager_torch and self and B2-H1-N209-D32-fp32")
SOFTMAX = "stochca_kernels/softmax.py"
JOINT = "stochca_kernels/backward_joint.py"
COMPILATION = "stochca_kernels/compilation.py"
TEST_JOINT = ("tests/kernels/test_joint.py",)
TEST_PROJECTED = ("tests/kernels/test_projected.py",)
TEST_DISPATCH = ("tests/kernels/test_dispatch.py",)
LAUNCH = "stochca_kernels/launch.py"
TEST_HOST = ("tests/kernels/test_host.py",)
SHORT_FORMS = ("tests/scorecard/test_rows.py", "-k")
OFFSETS = ("tests/scorecard/test_rows.py", "-k", "R7-")

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
        "infinite_key_meets_rows_of_zeros",
        BACKWARD,
        "q = load_queries(q_ptr, stride_qn, start, len_q, ROWS, HEAD_DIM, BLOCK_D)",
        "q = load_rows(q_ptr, stride_qn, start, len_q, ROWS, HEAD_DIM, BLOCK_D, True)",
        (*TRITON, "-k", "infinite_key"),
    ),
    Mutant(
        "infinite_key_meets_rows_of_zeros_in_one_kernel",
        JOINT,
        "q = load_queries(q_ptr, stride_qn, first_row, len_q, BLOCK_M, HEAD_DIM, BLOCK_D)",
        "q = load_rows(q_ptr, stride_qn, first_row, len_q, BLOCK_M, HEAD_DIM, BLOCK_D, True)",
        (*TEST_JOINT, "-k", "infinite_key"),
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
        (*TRITON, "-k", "eager_torch and mixed and B2-H1-N1-D32"),
    ),
    Mutant(
        "key_mask_dropped",
        SOFTMAX,
        "logits = tl.where((start + tl.arange(0, ROWS))[None, :] < len_kv,",
        "logits = tl.where((start + tl.arange(0, ROWS))[None, :] < len_kv + ROWS,",
        (*TRITON, "-k", "eager_torch and self and B2-H1-N65-D72-fp32"),
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
    Mutant("no_rescale", SOFTMAX, "acc * rescale[:, None]", "acc", LONG),
    Mutant("no_rescale_of_the_sum", SOFTMAX, "row_sum * rescale", "row_sum", LONG),
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
        ACCURACY,
    ),
    Mutant(
        "offset_in_32_bits",
        FORWARD,
        "q_rows_ptr = q_ptr + rows.to(tl.int64) * stride_qn",
        "q_rows_ptr = q_ptr + rows * stride_qn",
        OFFSETS,
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
        ACCURACY,
    ),
    Mutant(
        "dk_where_it_must_be_zero",
        BACKWARD,
        "if tl.load(use_source_ptr + batch):",
        "if tl.load(use_source_ptr + batch) > 1:",
        (*TRITON, "-k", "exactly_zero"),
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
    Mutant(
        "unselected_side_read",
        SDPA,
        "zero_where(kv, use_source)",
        "kv",
        (*OPERATOR[:2], "nan_in_the_unselected_pair"),
    ),
    Mutant(
        "unselected_projection_projected",
        "stochca_kernels/attention.py",
        "kv = zero_where(kv, use_source)",
        "kv = kv",
        (*OPERATOR[:1], "-k", "unselected_projection"),
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
        (*TEST_JOINT, "-k", "eager_torch and self and fp16"),
    ),
    Mutant(
        "joint_scale_of_dk_forgotten",
        JOINT,
        "len_kv, dk, scale, HEAD_DIM",
        "len_kv, dk, 1.0, HEAD_DIM",
        (*TEST_JOINT, "-k", "eager_torch and self and fp16"),
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
        (*TEST_JOINT, "-k", "far_above"),
    ),
    Mutant(
        "joint_second_part_stored_over_the_first",
        JOINT,
        "start += tiles[i].shape[0]",
        "start += 0",
        (*TEST_JOINT, "-k", "eager_torch and self and fp16"),
    ),
    Mutant(
        "joint_dq_of_the_last_part_alone",
        JOINT,
        "dlogits, dq, input_precision",
        "dlogits, dq * 0, input_precision",
        (*TEST_JOINT, "-k", "eager_torch and self and fp16"),
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
        (*TEST_JOINT, "-k", "eager_torch and (H2 or H3)"),
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
        "one_lane_for_both_pairs",
        FORWARD,
        "reads_source = reads_source | is_source_lane",
        "reads_source = reads_source",
        ACCURACY,
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
        (*TRITON, "-k", "eager_torch and self and B2-H1-N65-D32"),
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
        (*TRITON, "-k", "eager_torch and mixed and Ns"),
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
        "coins_of_another_stride",
        "stochca_kernels/attention.py",
        "use_source = use_source.contiguous()",
        "use_source = use_source",
        (*OPERATOR[:2], "any_stride"),
    ),
    Mutant(
        "running_maximum_from_minus_infinity",
        SOFTMAX,
        "-3.4028234663852886e38",
        'float("-inf")',
        (*TRITON, "-k", "minus_infinity"),
    ),
    Mutant(
        "misaligned_tensors_run_an_aligned_program",
        LAUNCH,
        "if tensor.data_ptr() % 16:",
        "if tensor.data_ptr() % 8:",
        TEST_HOST,
    ),
    Mutant(
        "kinds_of_launches_forget_the_dtype",
        LAUNCH,
        "return tuple([(t.dtype, t.stride()) for t in tensors])",
        "return tuple([(None, t.stride()) for t in tensors])",
        TEST_HOST,
    ),
    Mutant(
        "triton_is_asked_at_every_launch",
        LAUNCH,
        "found is not None and found[0] is kernel",
        "found is not None and found[0] is None",
        TEST_HOST,
    ),
    Mutant(
        "queries_of_the_source_in_a_weight",
        SDPA,
        "q.masked_fill(coin, 0)",
        "q",
        (*OPERATOR[:2], "reaches_no_weight"),
    ),
    Mutant(
        "reference_of_an_empty_batch_without_gradients",
        "stochca_kernels/reference.py",
        "out = q.clone()",
        "out = torch.zeros_like(q)",
        (*OPERATOR[:2], "empty_batch"),
    ),
    Mutant(
        "scale_off_over_tokens",
        SDPA,
        "q * scale, weight_k",
        "q * (1.01 * scale), weight_k",
        (*SHORT_FORMS, "R2-"),
    ),
    Mutant(
        "index_of_a_sample_in_32_bits",
        FORWARD,
        "batch = (batch_head // num_heads).to(tl.int64)",
        "batch = batch_head // num_heads",
        (*SHORT_FORMS, "R7-"),
    ),
    Mutant(
        "weight_of_the_source_in_other_samples",
        SDPA,
        "q.masked_fill(~coin, 0)",
        "q",
        (*SHORT_FORMS, "R8-"),
    ),
]
