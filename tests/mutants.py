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
EXACT, TRAINING = ("tests/method/test_exact.py",), ("tests/method/test_training.py",)
TRITON = ("tests/kernels/test_triton.py",)
ACCURACY = (*TRITON, "-k", "eager_torch or log_sum_exp")


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
        "v_ptr = tl.where(reads_source, source_v_ptr, v_ptr)",
        "v_ptr = tl.where(False, source_v_ptr, v_ptr)",
        OPERATOR,
    ),
    Mutant(
        "only_k_switched_in_backward",
        BACKWARD,
        "v_ptr = tl.where(reads_source, source_v_ptr, v_ptr)",
        "v_ptr = tl.where(False, source_v_ptr, v_ptr)",
        OPERATOR,
    ),
    Mutant(
        "key_mask_dropped",
        FORWARD,
        '< len_kv, logits, float("-inf"))',
        '< len_kv + ROWS, logits, float("-inf"))',
        ACCURACY,
    ),
    Mutant(
        "key_mask_dropped_in_dq",
        BACKWARD,
        "< len_kv, probs, 0.0)",
        "< len_kv + ROWS, probs, 0.0)",
        (*TRITON, "-k", "far_below"),
    ),
    Mutant(
        "row_mask_of_loads_dropped",
        PRIMITIVES,
        "tl.load(ptrs, mask=rows[:, None] < length, other=0.0)",
        "tl.load(ptrs)",
        ACCURACY,
    ),
    Mutant("scale_off", FORWARD, "* (scale * LOG2_E)", "* (scale * 1.01 * LOG2_E)", ACCURACY),
    Mutant("scale_off_in_dq", BACKWARD, "len_q, dq * scale,", "len_q, dq * scale * 1.01,", ACCURACY),
    Mutant("scale_off_in_dk", BACKWARD, "len_kv, dk * scale,", "len_kv, dk * scale * 1.01,", ACCURACY),
    Mutant("no_rescale", FORWARD, "acc * rescale[:, None]", "acc", ACCURACY),
    Mutant("no_rescale_of_the_sum", FORWARD, "row_sum * rescale", "row_sum", ACCURACY),
    Mutant(
        "wrong_stride",
        FORWARD,
        "v_ptr, stride_vn, start, len_kv, ROWS",
        "v_ptr, stride_kn, start, len_kv, ROWS",
        (*TRITON, "-k", "strides"),
    ),
    Mutant(
        "wrong_stride_of_the_source",
        FORWARD,
        "tl.where(reads_source, stride_svn, stride_vn)",
        "tl.where(reads_source, stride_skn, stride_vn)",
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
        "mask = mask & (is_source == 0)",
        "mask = mask & (block >= 0)",
        TRITON,
    ),
    Mutant(
        "dk_where_it_must_be_zero",
        BACKWARD,
        "if tl.load(use_source_ptr + batch):",
        "if tl.load(use_source_ptr + batch) > 1:",
        OPERATOR,
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
        "unselected_side_read", SDPA, "zero_where(kv, use_source)", "kv", ("tests/kernels/test_operator.py",)
    ),
    Mutant(
        "source_stops_one_block_early",
        MODEL,
        "advance = i + 1 < plan.source_blocks",
        "advance = i + 2 < plan.source_blocks",
        EXACT,
    ),
    Mutant(
        "source_runs_to_the_end",
        MODEL,
        "advance = i + 1 < plan.source_blocks",
        "advance = True",
        (*EXACT, "-k", "no_further"),
    ),
    Mutant(
        "checkpointing_does_nothing",
        MODEL,
        "recompute = self.target.grad_checkpointing and torch.is_grad_enabled()",
        "recompute = False",
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
    Mutant("source_in_train_mode", MODEL, "source.eval()", "source.train()", TRAINING),
    Mutant("source_stays_behind", MODEL, "self.source._apply(fn, recurse)", "pass", TRAINING),
    Mutant("layers_without_prefix", MODEL, r"^target\.(?:", "(?:", (*TRAINING, "-k", "layer_decay")),
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
