"""The wheel and the sdist: how they are built, and what has to be in them."""

import fnmatch
import re
import subprocess
import tarfile
import zipfile
from pathlib import Path

from bench.digest import ROOT

PACKAGES = ("stochca", "stochca_kernels")
_NOT_SOURCE = {".pyc"}


def files_of_packages() -> set[str]:
    """All that lies in the packages, relative to the root: what an installation should have."""
    return {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix not in _NOT_SOURCE
    }


def check_declaration() -> None:
    """`pyproject.toml` names every package, and every file that is not Python."""
    text = (ROOT / "pyproject.toml").read_text()
    table = re.search(r"^\[tool\.setuptools\]\npackages = \[(.*?)\]", text, flags=re.DOTALL | re.MULTILINE)[1]
    declared = set(re.findall(r'"([\w.]+)"', table))
    table = text.split("[tool.setuptools.package-data]\n")[1].split("\n\n")[0]
    patterns = {
        package: re.findall(r'"([^"]+)"', globs)
        for package, globs in re.findall(r'^"?([\w.]+)"? = (\[.*\])$', table, flags=re.MULTILINE)
    }
    files = files_of_packages()
    packages = {Path(file).parent.as_posix().replace("/", ".") for file in files}
    assert packages == declared, f"packages are {sorted(packages ^ declared)} different from those declared"
    for file in sorted(files):
        if not file.endswith(".py"):
            package = Path(file).parent.as_posix().replace("/", ".")
            assert any(fnmatch.fnmatch(Path(file).name, glob) for glob in patterns.get(package, ())), (
                f"{file} is not among the package data of pyproject.toml"
            )


def build(python: Path, tree: Path, folder: Path) -> tuple[Path, Path]:
    """The wheel and the sdist of a tree, by a Python that has `build`."""
    command = [str(python), "-m", "build", "--sdist", "--wheel", "--outdir", str(folder), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    (sdist,) = folder.glob("*.tar.gz")
    return wheel, sdist


def check_contents(wheel: Path, sdist: Path) -> None:
    """Both hold the packages as they are, with all data, and nothing of tests and benchmarks."""
    files = files_of_packages()
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert names == files, f"the wheel differs in {sorted(names ^ files)}"
        for name in names:
            assert archive.read(name) == (ROOT / name).read_bytes(), f"{name} of the wheel is another"
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    packages = {name for name in names if name.partition("/")[0] in PACKAGES}
    assert packages == files, f"the sdist differs in {sorted(packages ^ files)}"
    others = {name.partition("/")[0] for name in names - packages}
    wanted = {"LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg", "setup.py"}
    assert others == {*wanted, "stochca.egg-info"}, f"the sdist has {sorted(others ^ wanted)}"


def check_same(built: Path, other: Path) -> None:
    """Two wheels hold the same."""
    contents = []
    for path in (built, other):
        with zipfile.ZipFile(path) as archive:
            contents.append({name: archive.read(name) for name in archive.namelist()})
    differing = sorted(name for name in contents[0].keys() | contents[1].keys()
                       if contents[0].get(name) != contents[1].get(name))  # fmt: skip
    assert not differing, f"the wheel built from the sdist differs in {differing}"


def oldest_of(wheel: Path) -> list[str]:
    """The oldest release of each dependency that the wheel asks for, as pip takes it: torch==2.9."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(name).decode()
    requirements = re.findall(r"^Requires-Dist: ([^;\n]+?)(;.*)?$", metadata, flags=re.MULTILINE)
    needed = [text for text, marker in requirements if "extra" not in marker]
    assert all(">=" in text for text in needed), needed
    return [text.strip().replace(">=", "==") for text in needed]
