"""What `make install` is held to can be installed with every Python that it promises."""

from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

LINES = (Path(__file__).parent.parent / "constraints.txt").read_text().splitlines()
PINS = [Requirement(line) for line in LINES if not line.startswith("#")]


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_one_release_of_each_package_is_pinned_and_takes_this_python(python):
    held = [pin for pin in PINS if not pin.marker or pin.marker.evaluate({"python_version": python})]
    releases = {canonicalize_name(pin.name): str(pin.specifier) for pin in held}
    assert len(releases) == len(held)
    # Of the releases that are installed here it is known which Pythons they take.
    known = {canonicalize_name(d.name): d for d in distributions() if d.name}
    for name, release in releases.items():
        if name in known and release == f"=={known[name].version}":
            takes = known[name].metadata.get("Requires-Python") or ""
            assert SpecifierSet(takes).contains(python + ".99"), f"{name}{release} takes Python {takes}"
