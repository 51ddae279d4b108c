"""Faults of reading images, and of telling what is wrong."""

from tests.mutants.mutant import Mutant

IMAGES, OPENING, STREAMS = (f"stochca/data/{name}.py" for name in ("images", "opening", "streams"))
KINDS = ("tests/scorecard/test_rows.py", "-n0", "-k", "R12-")
MISTAKES = ("tests/scorecard/test_rows.py", "-n0", "-k", "R13-")

MUTANTS = [
    Mutant(
        "signals_reach_a_worker_that_starts",
        "stochca/data/loader.py",
        "signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)",
        "signal.pthread_sigmask(signal.SIG_BLOCK, ())",
        ("tests/data/test_order.py", "-k", "signal_to_the_group"),
    ),
    Mutant(
        "photographs_lie_as_they_were_taken",
        IMAGES,
        "ImageOps.exif_transpose(image, in_place=True)",
        "image.load()",
        KINDS,
    ),
    Mutant(
        "thin_images_are_scaled",
        IMAGES,
        "    if max(image.size) >",
        "    if False and max(image.size) >",
        KINDS,
    ),
    Mutant("numbers_without_a_range_are_cut", IMAGES, '    if image.mode == "F":', "    if False:", KINDS),
    Mutant("names_that_are_no_text_stop_the_report", IMAGES, '"utf-8", "backslashreplace"', '"utf-8"', KINDS),
    Mutant("links_in_circles_are_followed", OPENING, "        _check_links(", "        str(", KINDS),
    Mutant(
        "shards_of_16_bits_are_white",
        STREAMS,
        'startswith("tfds/") else ""',
        'startswith("tfds/") else "RGB"',
        KINDS,
    ),
    Mutant(
        "a_word_is_a_probability",
        "stochca/plan.py",
        "        if values.dtype.kind not in",
        "        if False and values.dtype.kind not in",
        MISTAKES,
    ),
    Mutant(
        "a_compiled_model_is_not_named",
        "stochca/vit.py",
        'if hasattr(model, "_orig_mod")',
        'if hasattr(model, "_original")',
        MISTAKES,
    ),
]
