"""Faults of the training engine."""

from tests.mutants.mutant import Mutant

TRAIN, PLAN, EVALUATION = "stochca/train.py", "stochca/plan.py", "stochca/evaluation.py"
DISTRIBUTED, OBJECTIVE, RECIPE = "stochca/distributed.py", "stochca/objective.py", "stochca/recipe.py"
RUNS = ("tests/distributed", "-k", "joined_batch")
TWO = ("tests/scorecard/test_rows.py", "-k", "R14-")
KILLED = ("tests/scorecard/test_rows.py", "-k", "R9-")
RESUME = ("tests/train/test_resume.py", "-k", "stopped_after_any_step")

MUTANTS = [
    Mutant(
        "ranks_share_their_samples_coins", PLAN, "[:, start : start + batch_size]", "[:, :batch_size]", RUNS
    ),
    Mutant(
        "each_process_evaluates_its_part_alone",
        EVALUATION,
        "sums = world.sum(torch.tensor([loss, *correct.tolist()], dtype=torch.float64)).tolist()",
        "sums = torch.tensor([loss, *correct.tolist()], dtype=torch.float64).tolist()",
        RUNS,
    ),
    Mutant(
        "every_process_reads_all_images",
        "stochca/data/loader.py",
        "range(rank, len(images), world_size)",
        "range(len(images))",
        ("tests/data",),
    ),
    Mutant(
        "all_processes_read_the_same_batch",
        "stochca/data/samplers.py",
        "chunks[:, self.rank].ravel()",
        "chunks[:, 0].ravel()",
        RUNS,
    ),
    Mutant(
        "losses_are_left_out",
        OBJECTIVE,
        "sum(terms.values(), start=",
        "sum([*terms.values()][:1], start=",
        RUNS,
    ),
    Mutant(
        "a_loss_is_not_optimized",
        TRAIN,
        "options, self.objective.companions)",
        "options)",
        ("tests/train/test_regularisation.py", "-k", "rates_of_layers"),
    ),
    Mutant(
        "moving_average_is_not_resumed",
        TRAIN,
        'distributed.load_model_state(self.average.module, state["average"])',
        "state",
        TWO,
    ),
    Mutant(
        "losses_are_not_resumed",
        TRAIN,
        'distributed.load_model_state(self.objective.losses, state["losses"])',
        "state",
        TWO,
    ),
    Mutant(
        "all_processes_resume_with_the_same_random_numbers",
        TRAIN,
        'files.set_rng_state(state["rng"][self.world.rank])',
        'files.set_rng_state(state["rng"][0])',
        TWO,
    ),
    Mutant("coins_start_anew", TRAIN, 'self.model.coins.step = state["coin_step"]', "state", RESUME),
    Mutant("data_starts_anew", TRAIN, "self.sampler.start = done", "self.sampler.start = 0 * done", RESUME),
    Mutant("swad_starts_anew", TRAIN, 'self.swad.restore(state["swad"], self.device)', "state", KILLED),
    Mutant(
        "means_start_anew",
        TRAIN,
        'self.running.restore(state["running"][self.world.rank])',
        "state",
        KILLED,
    ),
    Mutant(
        "loading_processes_die_of_a_second_signal",
        "stochca/data/loader.py",
        "if came_at[-1] - came_at[0] > 1:",
        "if len(came_at) > 1:",
        ("tests/scorecard/test_rows.py", "-k", "R10-"),
    ),
    Mutant(
        "restarted_processes_start_anew",
        TRAIN,
        "if was_restarted() and",
        "if False and",
        ("tests/train/test_resume.py", "-k", "torchrun"),
    ),
    Mutant(
        "torch_hides_what_the_system_said",
        "stochca/checkpoint.py",
        "cause = _system_error(error)",
        "cause = None",
        ("tests/train/test_resume.py", "-k", "full_disk_is_told"),
    ),
    Mutant(
        "fused_sgd_of_shards", RECIPE, '_FUSED_SHARDED = ("adam", "adamw")', "_FUSED_SHARDED = _FUSED", RUNS
    ),
]
