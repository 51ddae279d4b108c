"""Faults of what is installed."""

from tests.mutants.mutant import Mutant

PROJECT = "pyproject.toml"
DECLARED = ("tests/scorecard/test_rows.py", "-k", "R21-")

MUTANTS = [
    Mutant("a_package_is_not_installed", PROJECT, '    "stochca.weights",\n', "", DECLARED),
    Mutant("the_page_of_a_report_is_not_installed", PROJECT, '["*.css", "*.html"]', '["*.css"]', DECLARED),
]
