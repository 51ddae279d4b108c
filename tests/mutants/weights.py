"""Faults of reading, converting and choosing weights."""

from tests.mutants.mutant import Mutant

LAYOUTS, FACTS, CREATION = (f"stochca/weights/{name}.py" for name in ("layouts", "facts", "creation"))
PAIR, PROJECTION, CONVERT = (f"stochca/weights/{name}.py" for name in ("pair", "projection", "convert"))
READING, CHECKPOINT, TRAIN = "stochca/weights/reading.py", "stochca/checkpoint.py", "stochca/train.py"
CLIP, SOURCE = ("tests/weights/test_clip.py", "-n0"), ("tests/weights/test_source.py", "-n0")
CONVERSION, FILES = ("tests/weights/test_convert.py", "-n0"), ("tests/weights/test_files.py", "-n0")
OTHERS = ("tests/weights/test_layouts.py", "-n0")
INTACT, DAMAGED = "stochca/weights/intact.py", ("tests/scorecard/test_rows.py", "-n0", "-k", "R11-")

MUTANTS = [
    Mutant("keys_and_values_change_places", LAYOUTS, 'for part in "qkv"]', 'for part in "qvk"]', OTHERS),
    Mutant("what_has_no_place_is_dropped", LAYOUTS, "    if homeless:", "    if False:", OTHERS),
    Mutant(
        "the_pooler_is_left_out_silently",
        LAYOUTS,
        'HUGGING_FACE, "timm\'s")), left_out',
        'HUGGING_FACE, "timm\'s")), []',
        OTHERS,
    ),
    Mutant(
        "the_epsilon_is_timms", FACTS, "            module.eps = eps", "            module.eps = 1e-6", OTHERS
    ),
    Mutant(
        "an_unknown_epsilon_is_timms", CREATION, "if own is None and eps is None and", "if False and", OTHERS
    ),
    Mutant("another_epsilon_is_taken", CREATION, "if None not in (own, eps) and", "if False and", OTHERS),
    Mutant("heads_are_not_compared", FACTS, '("heads", facts.num_heads,', '("heads", None,', OTHERS),
    Mutant("quickgelu_is_not_told", FACTS, "    if state.keys() >= _OPENAI_ONLY:", "    if False:", CLIP),
    Mutant(
        "timm_is_lenient",
        CREATION,
        '    classes = {"num_classes": weights.num_classes}',
        '    classes = {"num_classes": weights.num_classes + 1}',
        FILES,
    ),
    Mutant("filters_are_resampled", CREATION, "    if wanted and got and got", "    if False and got", FILES),
    Mutant(
        "code_in_a_file_runs",
        INTACT,
        'map_location="cpu", weights_only=True',
        'map_location="cpu", weights_only=False',
        FILES,
    ),
    Mutant("a_digest_is_not_checked", INTACT, "if wanted is not None and", "if False and", DAMAGED),
    Mutant("sums_of_an_archive_are_not_checked", INTACT, "archive.testzip() if", "None if", DAMAGED),
    Mutant("values_that_are_not_finite_are_loaded", INTACT, "if bad := int(", "if False and int(", DAMAGED),
    Mutant(
        "moments_of_another_shape_are_loaded",
        TRAIN,
        "files.check_optimizer(self.optimizer)",
        "str()",
        DAMAGED,
    ),
    Mutant(
        "a_local_folder_is_loaded_as_leniently_as_timm_does",
        CREATION,
        "and name.startswith(LOCAL)",
        "and False",
        DAMAGED,
    ),
    Mutant(
        "the_normalisation_is_the_models",
        CREATION,
        '"source": "timm", **images}',
        '"source": "timm"}',
        OTHERS,
    ),
    Mutant(
        "a_given_normalisation_is_not_the_sources",
        "stochca/recipe.py",
        "        if options.mean or options.std:",
        "        if False:",
        SOURCE,
    ),
    Mutant(
        "the_source_starts_from_the_targets_weights",
        PAIR,
        "    if options.source_model is None and weights is None:",
        "    if options.source_model is None:",
        SOURCE,
    ),
    Mutant(
        "the_source_has_the_targets_size",
        PAIR,
        "options.source_img_size or options.img_size",
        "options.img_size",
        SOURCE,
    ),
    Mutant(
        "the_saved_head_lacks_the_projection",
        CHECKPOINT,
        'with_plain_head(merged_state(state["average"] or state["model"], state["lora_scale"]))',
        'merged_state(state["average"] or state["model"], state["lora_scale"])',
        CLIP,
    ),
    Mutant(
        "the_averaged_head_lacks_the_projection",
        TRAIN,
        "mean = with_plain_head(found.mean)",
        "mean = found.mean",
        CLIP,
    ),
    Mutant(
        "the_projection_is_turned_around",
        PROJECTION,
        "(head.double() @ projection.double())",
        "(head.double() @ projection.double()).flip(1)",
        CLIP,
    ),
    Mutant("any_head_is_a_projection", PROJECTION, "or projection.bias.any()", "", CLIP),
    Mutant(
        "a_run_forgets_its_epsilon",
        TRAIN,
        '            "norm_eps": norm_eps(self.model.target),\n',
        "",
        CONVERSION,
    ),
    Mutant(
        "torchvision_has_any_epsilon",
        CONVERT,
        '("an epsilon of layer norms", _TORCHVISION_EPS, eps),',
        "",
        CONVERSION,
    ),
    Mutant(
        "a_converted_checkpoint_has_the_models_size",
        CONVERT,
        '{"img_size": kwargs.get("img_size")}',
        "{}",
        CONVERSION,
    ),
]
