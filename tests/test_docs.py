"""What the pages say runs: code, commands, options, and the site itself."""

import ast
import functools
import importlib
import itertools
import os
import re
import subprocess
import sys

import pytest
import timm
import torch

pytest.importorskip("jsonargparse")

from stochca import cli
from stochca.recipes import recipe_names
from tests.pages import PAGES, ROOT, SHELLS, blocks, commands, options

# Pages whose Python is run, and not only compiled. The script of docs/datasets.md has a test of its own.
RUN = [
    f"docs/{name}.md"
    for name in ("index", "method", "choosing-p", "dense", "implementations", "lora", "tuning", "migration")
]
COMMANDS = re.search(
    r"commands: dict.*?= \{(.*?)\n    \}", (ROOT / "stochca" / "cli.py").read_text(), re.DOTALL
)
NAMES = re.findall(r'^        "(\w+)": \(', COMMANDS[1], re.MULTILINE)
PARSER = functools.cache(cli._parser)  # made once for all commands, which takes most of the time
TEXTS = [page for page in PAGES if page.startswith("docs/")]


@pytest.fixture
def command_line(monkeypatch, tmp_path):
    """Runs the command line up to where a command would begin, in a folder that has the files it reads."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_parser", PARSER)
    for name in NAMES:
        monkeypatch.setattr(cli, f"_{name}", lambda parsed: 0)

    def run(words):
        for flag, value in itertools.pairwise(words):
            if flag in ("--config", "--base-config") and value not in recipe_names():
                (tmp_path / value).write_text("p: [0, 0.1]\n" if words[0] == "sweep" else "epochs: 3\n")
        try:
            return cli.main(words)
        except SystemExit as stop:
            return stop.code

    return run


def imports(tree):
    """Module, and the name taken from it or None, of every import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module, alias.name) for alias in node.names)


def test_every_block_says_what_it_is():
    assert {block.language for block in blocks()} <= {"python", "yaml", "text", *SHELLS}


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_compiles_and_what_it_imports_exists(block):
    for module, name in imports(ast.parse(block.text, str(block))):
        found = importlib.import_module(module)
        assert name is None or hasattr(found, name), f"{module} has no {name}"


@pytest.mark.parametrize("page", RUN)
def test_python_runs_and_prints_what_is_written_beside_it(page, monkeypatch, tmp_path):
    create = timm.create_model
    small = {"img_size": 32, "patch_size": 16, "embed_dim": 48, "num_heads": 3}

    def create_small(name, pretrained=False, **kwargs):
        return create(name, **small, **kwargs)

    def check(*values):
        line = text.splitlines()[sys._getframe(1).f_lineno - 1]
        if expected := re.search(r"  # (.*?)(?:: .*)?$", line):
            assert " ".join(map(str, values)) == expected[1], line

    monkeypatch.setattr(timm, "create_model", create_small)
    monkeypatch.chdir(tmp_path)
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([3, 5])
    names = {"images": images, "labels": labels, "loader": [(images, labels)], "print": check}
    for block in blocks("python", pages=[page]):
        text = block.text
        exec(compile(text, str(block), "exec"), names)


def test_every_command_is_one_that_is_checked():
    assert {words[0] for _, words in commands()} <= {
        "stochca",
        "torchrun",
        "python",
        "python3",
        "make",
        "pip",
    }


@pytest.mark.parametrize(("page", "words"), [c for c in commands() if c[1][0] in ("stochca", "torchrun")])
def test_our_commands_are_taken(page, words, command_line, capsys):
    start = words.index("stochca.cli") if words[0] == "torchrun" else 0
    assert command_line(words[start + 1 :]) == 0, f"{page}: {capsys.readouterr().err}"


@pytest.mark.parametrize(
    "page", ["docs/protocols.md", "docs/migration.md", "docs/choosing-p.md", "docs/training.md"]
)
def test_options_in_the_text_are_taken(page, command_line, capsys):
    for name in NAMES:
        command_line([name, "--help"])
    helps = dict(zip(NAMES, capsys.readouterr().out.split("usage: ")[1:], strict=True))
    assert options(page)
    for words in options(page):
        takers = [name for name in NAMES if re.search(rf"{words[0]}\b(?!-)", helps[name])]
        assert takers, f"{page}: no command has {words[0]}"
        if len(words) > 1:
            needs = {"sweep": ["--p", "0.1"]}
            taken = (command_line([name, *needs.get(name, ["--data-dir", "x"]), *words]) for name in takers)
            assert 0 in taken, f"{page}: {words}: {capsys.readouterr().err}"


@pytest.mark.parametrize(("page", "words"), [c for c in commands() if c[1][0].startswith("python")])
def test_modules_and_their_flags_exist(page, words):
    assert words[1] == "-m"
    spec = importlib.util.find_spec(words[2])
    assert spec is not None
    if words[2].startswith("bench."):
        is_package = spec.submodule_search_locations is not None
        source = importlib.util.find_spec(f"{words[2]}.__main__") if is_package else spec
        text = (ROOT / os.path.relpath(source.origin, ROOT)).read_text()
        for flag in (word for word in words[3:] if word.startswith("--")):
            assert f'"{flag}"' in text, f"{page}: {words[2]} has no {flag}"


def test_targets_and_extras_exist():
    makefile, project = (ROOT / "Makefile").read_text(), (ROOT / "pyproject.toml").read_text()
    targets = [words[1] for _, words in commands() if words[0] == "make"]
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for page, text in PAGES.items():
        for extra in re.findall(r"stochca\[([\w,-]+)\]", text):
            for name in extra.split(","):
                assert re.search(rf"^{name} = \[", project, re.MULTILINE), f"{page}: {name}"


def test_every_page_is_in_the_navigation_once():
    linked = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(linked) == sorted(page.removeprefix("docs/") for page in TEXTS)


def test_tests_that_pages_name_exist():
    named = [name for text in PAGES.values() for name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)]
    assert named
    for file, test in named:
        assert re.search(rf"^def {test}\(", (ROOT / file).read_text(), re.MULTILINE), f"{file}::{test}"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, and what was said while it was built."""
    pytest.importorskip("material")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return folder, f"{done.stdout}{done.stderr}"


def test_the_site_is_built_without_a_warning(site):
    said = [line for line in site[1].splitlines() if line and not line.startswith("INFO ")]
    assert said == []


def test_the_site_has_every_page_and_loads_nothing_from_elsewhere(site):
    folder, _ = site
    built = {path.relative_to(folder).as_posix() for path in folder.rglob("index.html")}
    assert len(built) == len(TEXTS)
    for path in folder.rglob("*.html"):
        text = path.read_text()
        assert not re.search(r"<(?:script|img|iframe)[^>]* src=\"?(?:https?:)?//", text), path
        assert not re.search(
            r"<link[^>]* rel=\"?(?:stylesheet|preconnect|icon)[^>]* href=\"?https?://", text
        ), path


def test_docstrings_are_rendered_whole(site):
    folder, _ = site
    pages = {path: path.read_text() for path in (folder / "reference").rglob("*.html")}
    assert len(pages) == sum(page.startswith("docs/reference/") for page in PAGES)
    for path, text in pages.items():
        left = re.search(r":math:|\.\. math|:class:|:func:", text)
        assert left is None, f"{path}: {left}"
    assert any("<math" in text for text in pages.values())
    operator = pages[folder / "reference" / "operator" / "index.html"]
    for word in ("Parameters:", "Returns:", "Raises:", "use_source"):
        assert word in operator
