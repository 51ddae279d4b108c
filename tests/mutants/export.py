"""Faults of exports."""

from tests.mutants.mutant import Mutant

PLAIN, PROGRAMS, MODEL = "stochca/export/plain.py", "stochca/export/programs.py", "stochca/export/model.py"
IN_TIMM = ("tests/export/test_timm_folder.py", "-k", "timm_alone or prepares")
REFUSED = ("tests/export/test_timm_folder.py", "-k", "refused")
CHECKED = ("tests/export/test_programs.py", "-k", "refused")

MUTANTS = [
    Mutant(
        "an_export_names_our_attention",
        PLAIN,
        "{**(model_args or {}), **own}",
        "{**(model_args or {})}",
        IN_TIMM,
    ),
    Mutant("an_export_prepares_images_as_the_pretrained_weights", PLAIN, "        **config,\n", "", IN_TIMM),
    Mutant(
        "an_export_keeps_what_is_outdated",
        PLAIN,
        "        **dict.fromkeys(_OUTDATED),\n",
        "",
        ("tests/export/test_timm_folder.py", "-k", "said_of_themselves"),
    ),
    Mutant("an_export_has_no_names", PLAIN, '{"label_names": self.classes}', "{}", IN_TIMM),
    Mutant("an_export_is_not_compared", PLAIN, "if not torch.equal(got, wanted):", "if False:", REFUSED),
    Mutant("an_epsilon_is_lost", PLAIN, "if eps != own:", "if False:", REFUSED),
    Mutant(
        "an_export_is_written_over",
        MODEL,
        "if output.is_dir() and (held",
        "if not output.is_dir() and (held",
        REFUSED,
    ),
    Mutant("a_program_is_compared_at_the_traced_size_alone", PROGRAMS, "(1, 2, 5)", "(2,)", CHECKED),
    Mutant(
        "an_error_that_is_no_number_passes",
        PROGRAMS,
        "torch.stack(errors).max().item()",
        "max(0.0, *(error.item() for error in errors))",
        CHECKED,
    ),
    Mutant(
        "a_program_takes_one_batch_size",
        PROGRAMS,
        'dynamic_shapes=({0: Dim("batch")},)',
        "dynamic_shapes=({},)",
        ("tests/export/test_command.py", "-k", "becomes_a_model_of_timm_and_programs"),
    ),
    Mutant(
        "the_best_weights_are_exported_whatever_is_asked_for",
        "stochca/export/command.py",
        '_FILES[options.which or "best"]',
        '_FILES["best"]',
        ("tests/export/test_command.py", "-k", "last_weights"),
    ),
    Mutant(
        "what_is_to_be_private_is_published",
        MODEL,
        "            private=private,\n",
        "",
        ("tests/export/test_hub.py", "-k", "what_is_published"),
    ),
]
