"""A digest changes with what code does, and with nothing else."""

import ast
import time

import pytest

from bench.digest import ROOT, digests, meaning
from bench.environment import METHOD, environment

CODE = '''"""A module."""
import math  # of the standard library

SCALE = 2.0


def area(radius: float) -> float:
    """Of a disc."""
    # A comment.
    if radius < 0:
        raise ValueError(f"radius must be positive, got {radius!r:>{10}} {'a' 'b'}")
    return SCALE * math.pi * radius**2
'''


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"""A module."""\n', ""),
        ("  # of the standard library", ""),
        ('"""Of a disc."""', '"""Of a disc\n\n    of any size.\n    """'),
        ("    # A comment.\n", "\n    # Another,\n# longer comment.\n"),
        ("SCALE = 2.0\n", 'SCALE = 2.0\n"""Documented below."""\n'),
        ("SCALE * math.pi * radius**2", "SCALE*math.pi * \\\n        radius ** 2"),
        ("math.pi", "math  .pi"),
        ("        raise", "          raise"),
    ],
)
def test_how_code_is_written_down_does_not_matter(old, new):
    assert old in CODE
    assert meaning(CODE.replace(old, new)) == meaning(CODE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("2.0", "2.1"),
        ("    return", "        return"),
        ("got {radius!r", "got {radius!s"),
        ("must be positive", "must be  positive"),
        ("radius < 0", "radius <= 0"),
        ("import math", "import cmath as math"),
        ("\n    return", "\n    'a'; return"),
    ],
)
def test_what_code_does_matters(old, new):
    assert old in CODE
    assert meaning(CODE.replace(old, new)) != meaning(CODE)


def test_a_formatted_string_is_one_token_in_every_version_of_python():
    assert "f\"radius must be positive, got {radius!r:>{10}} {'a' 'b'}\"" in meaning(CODE).splitlines()


def test_files_of_a_folder_count_wherever_they_are(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "one.py").write_text(CODE)
    before = digests(["a"], tmp_path)
    (tmp_path / "a" / "notes.md").write_text("no code")
    assert digests(["a"], tmp_path) == before
    (tmp_path / "a" / "b" / "two.py").write_text("x = 1\n")
    added = digests(["a"], tmp_path)
    (tmp_path / "a" / "b" / "two.py").rename(tmp_path / "a" / "two.py")
    assert len({value["a"] for value in (before, added, digests(["a"], tmp_path))}) == 3


def test_code_that_is_not_there_has_no_digest(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no Python code at bench/nowhere"):
        digests(["bench/nowhere"], tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty"):
        digests(["empty"], tmp_path)


def test_results_name_the_code_that_they_measured():
    measured = ("stochca_kernels", "bench/counts.py")
    assert environment(measured)["code"] == digests(measured)
    assert environment()["code"] == {}


def test_digests_take_no_time():
    start = time.process_time()
    digests(["stochca", "stochca_kernels", "bench"], ROOT)
    assert time.process_time() - start < 2


def test_the_method_is_what_the_model_imports():
    found, unread = {"stochca/__init__.py"}, ["stochca/model.py"]
    while unread:
        path = unread.pop()
        found.add(path)
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("stochca."):
                other = node.module.replace(".", "/") + ".py"
                unread += [other] * (other not in found)
    assert found == set(METHOD)
