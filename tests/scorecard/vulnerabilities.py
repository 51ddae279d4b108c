"""Known vulnerabilities of releases, as the Python Package Index tells them."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterable
from typing import Any

from tests.scorecard.row import NotMeasuredError

INDEX = "https://pypi.org/pypi"
# Its newest release has been vulnerable since 2017: an index that knows nothing of it knows of none.
CONTROL = ("pycrypto", "2.6.1")


def known(name: str, version: str) -> list[str] | None:
    """Identifiers of what is known of a release; None where the index does not tell.

    An index that has no page of each release has one of the newest.
    """
    for page in (f"{INDEX}/{name}/{version}/json", f"{INDEX}/{name}/json"):
        answer = _read(page)
        if answer is not None and answer["info"]["version"] == version and "vulnerabilities" in answer:
            return [entry["id"] for entry in answer["vulnerabilities"] if not entry.get("withdrawn")]
    return None


def check(releases: Iterable[tuple[str, str]]) -> int:
    """Raise where something is known of a release, or where that could not be found out; else count them."""
    if not known(*CONTROL):
        raise NotMeasuredError(f"{INDEX} knows of no vulnerability of {' '.join(CONTROL)}")
    answers = {release: known(*release) for release in releases}
    assert not any(answers.values()), {" ".join(r): found for r, found in answers.items() if found}
    if unknown := [" ".join(release) for release, found in answers.items() if found is None]:
        raise NotMeasuredError(f"{INDEX} does not tell of {', '.join(unknown)}")
    return len(answers)


def _read(page: str) -> dict[str, Any] | None:
    try:
        with urllib.request.urlopen(page, timeout=60) as answer:
            content: dict[str, Any] = json.load(answer)
            return content
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise
    except urllib.error.URLError as error:
        raise NotMeasuredError(f"{page} cannot be reached ({error.reason})") from error
