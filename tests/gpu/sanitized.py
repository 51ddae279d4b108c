"""Run every kernel once on small shapes, for `compute-sanitizer`: `python -m tests.gpu.sanitized`.

Nothing but the kernels and torch's simplest ones runs, so that a finding is about us.
"""

import torch

from stochca_kernels.tokens import tokens_backward, tokens_forward
from tests.gpu.paths import DEVICE, Case, Tensors, draw, run

ARITHMETIC = "bf16" if DEVICE == "cuda" else "fp16"  # which the interpreter can
# On chip, streamed, and over scratch memory. The matrix unit takes rows and columns outside as zeros.
CASES = [
    Case(path, coin, length, batch=2, heads=1, arithmetic=ARITHMETIC)
    for path, length in (("pair", 50), ("split", 50), ("packed", 197), ("fused", 50), ("fused", 273))
    for coin in ("self", "cross", "mixed")
]
TOKENS = Case("tokens", "mixed", 273, batch=2, heads=1, rows=24, arithmetic=ARITHMETIC)


def few_rows(case: Case) -> Tensors:
    """The kernels of the path "tokens" without the products that it leaves to cuBLAS."""
    t = draw(case)
    queries = torch.ones(case.batch, case.heads * case.rows, case.channels, dtype=t["x"].dtype).to(DEVICE)
    sides = (t["x"], None, t["source_x"], t["source_rstd"], t["coins"])
    mixed, lse = tokens_forward(queries, *sides, 0.125)
    dqueries, dx = tokens_backward(mixed, queries, *sides, mixed, lse, 0.125, True)
    return {"mixed": mixed, "lse": lse, "dqueries": dqueries, "dx": dx}


def main() -> None:
    """Run, and say what ran."""
    results = {str(case): run(case, draw(case)) for case in CASES}
    results[str(TOKENS)] = few_rows(TOKENS)
    for case, tensors in results.items():
        for name, t in tensors.items():
            assert t.cpu().isfinite().all(), f"{case}: {name}"
        print(case)  # noqa: T201, a program


if __name__ == "__main__":
    main()
