"""Faults of dense outputs, of what timm asks of a model, and of the examples."""

from tests.mutants.mutant import Mutant

MODEL = "stochca/model.py"
INTERFACE = "stochca/timm_interface.py"
DENSE = ("tests/method/test_dense.py", "-k", "pattern or size or nothing_runs")
FEATURES = ("tests/method/test_timm_features.py",)
CONDITIONS = ("tests/method/test_timm_conditions.py",)
PARITY = ("tests/scorecard/test_rows.py", "-k", "R1-")
EXAMPLES = ("tests/examples/test_scripts.py",)

MUTANTS = [
    Mutant(
        "dense_never_stops_early", MODEL, "StepPlan(plan.coins[: last + 1])", "StepPlan(plan.coins)", DENSE
    ),
    Mutant("dense_is_not_normed", MODEL, "self.target.norm(t) if norm else t for", "t for", DENSE),
    Mutant("registers_among_patches", MODEL, "[t[:, split:] for t", "[t[:, 1:] for t", DENSE),
    Mutant("grid_is_turned", MODEL, "unflatten(2, (height, width))", "unflatten(2, (width, height))", DENSE),
    Mutant(
        "source_keeps_its_blocks",
        INTERFACE,
        "self.source.prune_intermediate_layers(indices, prune_norm, prune_head)",
        "pass",
        (*FEATURES, "-k", "prunes"),
    ),
    Mutant("coins_of_pruned_blocks_stay", MODEL, ".coins[:depth]", ".coins", (*FEATURES, "-k", "prunes")),
    Mutant(
        "images_have_timms_default_size",
        INTERFACE,
        "return self.target._traits",
        "return {}",
        (*CONDITIONS, "-k", "configuration"),
    ),
    Mutant(
        "attention_asks_a_traced_value",
        "stochca/attention.py",
        "if is_causal is False else",
        "if not is_causal else",
        (*CONDITIONS, "-k", "traced"),
    ),
    Mutant(
        "layer_scale_of_eva_is_left_out",
        "stochca/block.py",
        "return branch if gamma is None else gamma * branch",
        "return branch",
        PARITY,
    ),
    Mutant(
        "evaluation_is_lockstep",
        MODEL,
        "if not self.training and coins is None:\n            return self.target(images, **timm_kwargs)",
        "if False:\n            return self.target(images, **timm_kwargs)",
        PARITY,
    ),
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
