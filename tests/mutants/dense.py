"""Faults of dense outputs, and of the examples."""

from tests.mutants.mutant import Mutant

MODEL = "stochca/model.py"
DENSE = ("tests/method/test_dense.py", "-k", "pattern or size or nothing_runs")
EXAMPLES = ("tests/examples/test_scripts.py",)

MUTANTS = [
    Mutant(
        "dense_never_stops_early", MODEL, "StepPlan(plan.coins[: last + 1])", "StepPlan(plan.coins)", DENSE
    ),
    Mutant("dense_is_not_normed", MODEL, "self.target.norm(t) if norm else t for", "t for", DENSE),
    Mutant("registers_among_patches", MODEL, "[t[:, split:] for t", "[t[:, 1:] for t", DENSE),
    Mutant("grid_is_turned", MODEL, "unflatten(2, (height, width))", "unflatten(2, (width, height))", DENSE),
    Mutant(
        "example_processes_train_alone",
        "examples/ddp.py",
        "parallel = DistributedDataParallel(model)",
        "parallel = model",
        (*EXAMPLES, "-k", "processes"),
    ),
    Mutant(
        "example_leaves_variances_as_they_are",
        "examples/miro.py",
        ', {"params": miro.parameters(), "lr": args.lr * miro.lr_mult}]',
        "]",
        (*EXAMPLES, "-k", "miro"),
    ),
    Mutant(
        "source_of_an_own_model_is_not_normed",
        "examples/own_model.py",
        "source_kv(block.norm(x))",
        "source_kv(x)",
        (*EXAMPLES, "-k", "own"),
    ),
    Mutant(
        "union_counts_the_intersection_twice",
        "examples/segmentation.py",
        "counts.sum(0) + counts.sum(1) - counts.diag()",
        "counts.sum(0) + counts.sum(1)",
        (*EXAMPLES, "-k", "iou"),
    ),
    Mutant(
        "windows_of_the_source_are_others",
        "docs/dense.md",
        "frozen.source_kv(cut(x0))",
        "frozen.source_kv(cut(x0).flip(0))",
        ("tests/examples/test_dense_page.py",),
    ),
]
