"""Planted faults still fit the code that they are planted in."""

from collections import Counter

import pytest

from tests.mutants.__main__ import MUTANTS
from tests.mutants.mutant import ROOT


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_replaces_one_text_of_its_file(mutant):
    assert (ROOT / mutant.file).read_text().count(mutant.old) == 1
    assert mutant.old != mutant.new
    assert (ROOT / mutant.tests[0]).exists()


def test_mutants_have_names_of_their_own():
    assert max(Counter(mutant.name for mutant in MUTANTS).values()) == 1
