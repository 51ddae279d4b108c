"""How much of the packages the ordinary tests run, and what of them could run what is in a file.

The long form runs the tests folder by folder, in processes that are measured, and keeps what each ran in
`runs/scorecard/coverage`. Kernels count line by line where they are interpreted: Triton compiles what it
rewrote under the name of the file and with the numbers of its lines.
"""

import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from coverage import Coverage

from bench.digest import ROOT
from tests.scorecard.row import Case, Figures
from tests.scorecard.unsafe_loads import unsafe_loads

PACKAGES = ("stochca", "stochca_kernels")
LEAST_PERCENT = 95
CONFIG = str(ROOT / "pyproject.toml")
FOLDER = ROOT / "runs" / "scorecard" / "coverage"


def cases(long: bool) -> Iterator[Case]:
    """Each folder of tests, then what they ran together; the short form sees that a kernel's lines count."""
    yield Case("unsafe loads", safe)
    if os.environ.get("TRITON_INTERPRET") == "1":
        yield Case("lines of an interpreted kernel", kernel_lines)
    if long:
        for name, tests in slices().items():
            yield Case(f"run of {name}", partial(run, name, tests))
        for package in PACKAGES:
            yield Case(f"lines and branches of {package}", partial(covered, package))


def slices() -> dict[str, list[str]]:
    """All files of tests: those of a folder together, those beside the folders by ten."""
    folders: dict[str, list[str]] = {}
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        folders.setdefault(file.parent.name, []).append(file.relative_to(ROOT).as_posix())
    files = folders.pop("tests")
    return {**folders, **{f"tests {i // 10 + 1}": files[i : i + 10] for i in range(0, len(files), 10)}}


def safe() -> Figures:
    """No call in the source can run what is in a file that it reads."""
    found = unsafe_loads()
    assert not found, "\n".join(found)
    return {"unsafe_loads_count": len(found)}


def kernel_lines() -> None:
    """One launch runs all lines of a kernel, but those of the branches that it does not take."""
    from stochca_kernels import forward, stochca_attention

    q, k, v = torch.randn(3, 1, 1, 5, 16)
    measured = Coverage(data_file=None, config_file=False, branch=True, include=[inspect.getfile(forward)])
    with measured.collect():
        stochca_attention(q, (k, v), None, False, impl="triton")
    _, statements, _, missed, _ = measured.analysis2(inspect.getfile(forward))
    lines, first = inspect.getsourcelines(forward._attn_fwd_kernel.fn)
    body = {line for line in statements if first < line < first + len(lines)}
    assert len(body) > 20, f"the kernel has {len(body)} lines"
    share = len(body - set(missed)) / len(body)
    assert share > 0.5, f"of the {len(body)} lines of a kernel that was launched {share:.0%} count"


def run(name: str, tests: list[str]) -> Figures:
    """Run tests, and keep what they ran.

    A test that fails here has run fewer lines, not more: some, as those of how long something takes, may.
    What pytest says goes to the log of the row.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        # Measuring is a debugger to Python, and some libraries warn about one.
        pytest = ["pytest", "--numprocesses", "2", "--dist", "worksteal", "-o", "filterwarnings=default"]
        result = subprocess.run(
            [sys.executable, "-m", "coverage", "run", f"--rcfile={CONFIG}", "-m", *pytest, *tests],
            cwd=ROOT,
            env={**os.environ, "COVERAGE_FILE": f"{folder}/.coverage"},
            capture_output=True,
            text=True,
            check=False,
        )
        sys.stdout.write(result.stdout)
        # Tests that fail, and none at all, which is so where all are skipped, are no error of pytest.
        assert result.returncode in (0, 1, 5), result.stdout[-2000:] + result.stderr[-2000:]
        together = Coverage(data_file=str(file_of(name)), config_file=CONFIG)
        together.combine([str(path) for path in Path(folder).iterdir()])
        together.save()
    return {"cases": 0}


def covered(package: str) -> Figures:
    """What all tests ran of a package, in percent of its lines and of its branches."""
    with tempfile.TemporaryDirectory() as folder:
        measured = Coverage(data_file=f"{folder}/.coverage", config_file=CONFIG)
        measured.combine([str(file_of(name)) for name in slices()], strict=True, keep=True)
        report = Path(folder) / "report.json"
        measured.json_report(outfile=str(report), include=[f"{ROOT / package}/*"])
        found = json.loads(report.read_text())
    totals = found["totals"]
    percents = {
        "line": 100 * totals["covered_lines"] / totals["num_statements"],
        "branch": 100 * totals["covered_branches"] / totals["num_branches"],
    }
    gaps = {
        os.path.relpath(file, ROOT): f"lines {of['missing_lines']}, branches {of['missing_branches']}"
        for file, of in found["files"].items()
        if of["missing_lines"] or of["missing_branches"]
    }
    assert min(percents.values()) >= LEAST_PERCENT, f"{package}: {percents}, {gaps}"
    return {f"{package}_{of}_percent": round(percent, 2) for of, percent in percents.items()}


def file_of(name: str) -> Path:
    """Where is kept what the tests of a slice ran."""
    return FOLDER / f"{name.replace(' ', '-')}.sqlite"
