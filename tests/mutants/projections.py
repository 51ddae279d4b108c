"""Faults of the operator where it is given tokens and weights in the place of keys and values."""

from tests.mutants.mutant import Mutant

OPERATOR = ("tests/kernels/test_operator.py", "-k", "triton and (attends or gradients_are)")
PROJECTED = "stochca_kernels/projected.py"
TOKENS = "stochca_kernels/tokens.py"
FEW_ROWS = "stochca_kernels/few_rows.py"
TEST_PROJECTED = ("tests/kernels/test_projected.py",)
TEST_TOKENS = ("tests/kernels/test_tokens.py",)
TEST_DISPATCH = ("tests/kernels/test_dispatch.py",)

MUTANTS = [
    Mutant(
        "projected_value_bias_forgotten",
        PROJECTED,
        "out = acc / row_sum[:, None] + bias[None, :]",
        "out = acc / row_sum[:, None]",
        (*TEST_PROJECTED, "-k", "on_chip and fp32-none-cross"),
    ),
    Mutant(
        "projected_value_bias_in_delta_forgotten",
        PROJECTED,
        "(out.to(tl.float32) - bias[None, :])",
        "out.to(tl.float32)",
        (*TEST_PROJECTED, "-k", "on_chip and fp32-none-cross"),
    ),
    Mutant(
        "projected_keys_and_values_swapped",
        PROJECTED,
        "values = append(values, tiles[2 * i + 1]",
        "values = append(values, tiles[2 * i]",
        (*TEST_PROJECTED, "-k", "on_chip and fp32-none-cross"),
    ),
    Mutant(
        "projected_factor_forgotten",
        PROJECTED,
        "            if HAS_RSTD:",
        "            if False:",
        (*TEST_PROJECTED, "-k", "on_chip and fp32-none-cross"),
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
        (*TEST_PROJECTED, "-k", "on_chip and projected-self"),
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
        "few_rows_take_the_long_way",
        "stochca_kernels/attention.py",
        "if len(widths) == 1:",
        "if False:",
        (*TEST_DISPATCH, "-k", "few_rows_launch"),
    ),
    Mutant(
        "tokens_outside_not_masked",
        TOKENS,
        'logits = tl.where(tokens[None, :] < last, logits, float("-inf"))',
        "logits += 0.0",
        (*TEST_TOKENS, "-k", "eager_torch and D32-C96"),
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
        "factors_of_another_stride",
        PROJECTED,
        "source._replace(rstd=source.rstd.contiguous())",
        "source",
        (*TEST_PROJECTED, "-k", "lie_anywhere"),
    ),
    Mutant(
        "tokens_of_two_widths",
        "stochca_kernels/attention.py",
        "if len(widths) == 1:",
        "if len(widths) <= 2:",
        (*OPERATOR[:2], "differ_in_width"),
    ),
]
