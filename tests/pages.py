"""What the pages hold that can be checked: blocks of code, commands, options and names of tests."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]
}
SHELLS = ("sh", "bash", "shell", "console")


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    number: int
    language: str
    text: str

    def __str__(self):
        return f"{self.page}-{self.number}-{self.language}"


def blocks(*languages, pages=tuple(PAGES)):
    found = [
        Block(page, number, language, text)
        for page in pages
        for number, (language, text) in enumerate(
            re.findall(r"^```(\w*)\n(.*?)^```$", PAGES[page], re.DOTALL | re.MULTILINE)
        )
    ]
    return [block for block in found if not languages or block.language in languages]


def commands():
    """Page and words of every command, in fenced blocks and in indented lines that begin with our name."""
    found = []
    for block in blocks(*SHELLS):
        lines = block.text.replace("\\\n", " ").splitlines()
        found += [(block.page, shlex.split(line.removeprefix("$ "), comments=True)) for line in lines]
    for page, text in PAGES.items():
        found += [(page, shlex.split(line)) for line in re.findall(r"^    (stochca .*)$", text, re.MULTILINE)]
    return [(page, words) for page, words in found if words]


def options(page):
    """Words of every inline code that begins with a flag, but for the first column of tables."""
    found = []
    for line in re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.DOTALL | re.MULTILINE).splitlines():
        text = line.split("|", 2)[-1] if line.startswith("|") else line
        found += [shlex.split(code) for code in re.findall(r"`(--[^`]+)`", text)]
    return found
