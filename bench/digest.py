"""Digests of code: which change of it makes a recorded result stale.

A digest is of what the code says, not of how it is written down: comments, docstrings, blank lines, spaces
and line breaks inside brackets do not matter. It is made of tokens, and equal under every version of Python.
"""

import hashlib
import io
import token
import tokenize
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Up to Python 3.11 a formatted string is one token, from 3.12 on it is several between these two.
_OPENING = {getattr(token, name, -1) for name in ("FSTRING_START", "TSTRING_START")} - {-1}
_CLOSING = {getattr(token, name, -1) for name in ("FSTRING_END", "TSTRING_END")} - {-1}


def digests(prefixes: Sequence[str], root: Path = ROOT) -> dict[str, str]:
    """SHA-256 of the Python code at each path.

    Args:
        prefixes: Files, or folders with all below them, relative to the root.
        root: Of the repository.

    Raises:
        FileNotFoundError: There is no Python code at one of them.
    """
    return {prefix: _digest(root, prefix) for prefix in prefixes}


def file_digest(path: Path) -> str | None:
    """SHA-256 of the bytes of a file, such as a result that another one starts from; None where it is not."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def meaning(source: str) -> str:
    """The code without what it does not mean: its tokens, one on each line, with blocks in braces."""
    lines: list[str] = []
    for statement in _statements(source):
        # Strings alone are documentation, whatever they stand below.
        if any(kind != token.STRING for kind, _ in statement):
            lines += [text for _, text in statement]
            lines.append(";")
    return "\n".join(lines)


def _digest(root: Path, prefix: str) -> str:
    path = root / prefix
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise FileNotFoundError(f"there is no Python code at {prefix} in {root}")
    whole = hashlib.sha256()
    for file in files:
        whole.update(
            f"{file.relative_to(root).as_posix()} {_of_source(file.read_text(encoding='utf-8'))}\n".encode()
        )
    return whole.hexdigest()


@cache
def _of_source(source: str) -> str:
    return hashlib.sha256(meaning(source).encode()).hexdigest()


def _statements(source: str) -> Iterator[list[tuple[int, str]]]:
    """Kinds and texts of the tokens of each logical line; a block's braces are statements of their own."""
    statement: list[tuple[int, str]] = []
    for kind, text in _tokens(source):
        if kind == token.NEWLINE:
            yield statement
            statement = []
        elif kind in (token.INDENT, token.DEDENT):
            yield [(kind, "{" if kind == token.INDENT else "}")]
        elif kind not in (token.NL, token.COMMENT, token.ENDMARKER):
            statement.append((kind, text))


def _tokens(source: str) -> Iterator[tuple[int, str]]:
    """Kinds and texts of all tokens; a formatted string is one of them."""
    lines = list(io.StringIO(source))
    opened: list[tuple[int, int]] = []
    for item in tokenize.generate_tokens(io.StringIO(source).readline):
        if item.type in _OPENING:
            opened.append(item.start)
        elif item.type in _CLOSING:
            start = opened.pop()
            if not opened:
                yield token.STRING, _between(lines, start, item.end)
        elif not opened:
            yield item.type, item.string


def _between(lines: Sequence[str], start: tuple[int, int], end: tuple[int, int]) -> str:
    """The text between two positions, rows counted from 1."""
    rows = list(lines[start[0] - 1 : end[0]])
    rows[-1] = rows[-1][: end[1]]
    rows[0] = rows[0][start[1] :]
    return "".join(rows)
