"""What the cases of a row gave, kept on disk as they end, so that a run which was stopped can go on."""

import json
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.digest import digests
from bench.environment import environment
from tests.scorecard.row import Case, NotMeasuredError, Row


class Journal:
    """The file of one row: where and of which code it was made, then a line per case.

    Lines made of other code do not count: the file is begun again.

    Args:
        folder: Of the files.
        row: Whose cases they are.
    """

    def __init__(self, folder: Path, row: Row) -> None:
        self.path = folder / f"{row.id}.jsonl"
        self.row = row

    def read(self) -> tuple[dict[str, Any] | None, dict[str, dict[str, Any]]]:
        """Where the row ran, and the last line of each case; nothing where the code has changed since."""
        if not self.path.exists():
            return None, {}
        where, *lines = (
            json.loads(line) for line in self.path.read_text().splitlines() if line.endswith("}")
        )
        if where["code"] != digests(self.row.code):
            return None, {}
        return where, {line["name"]: line for line in lines}

    def run(self, cases: list[Case]) -> None:
        """Run the cases that have not been seen to hold."""
        where, done = self.read()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        begun = [where, *done.values()] if where else [environment(self.row.code)]
        self.path.write_text("".join(f"{json.dumps(line)}\n" for line in begun))
        with self.path.open("a") as file:
            for case in cases:
                if case.name not in done or done[case.name]["error"] or done[case.name]["unmeasured"]:
                    file.write(json.dumps(attempt(case)) + "\n")
                    file.flush()


def attempt(case: Case) -> dict[str, Any]:
    """Run one case: its name, figures, seconds, the error of one that is off, or why it was not measured."""
    start = time.monotonic()
    figures: Mapping[str, float] = {}
    error = unmeasured = None
    try:
        figures = case.check() or {}
    except NotMeasuredError as raised:
        unmeasured = str(raised)
    except Exception as raised:
        traceback.print_exc()
        error = f"{type(raised).__name__}: {raised}"
    seconds = round(time.monotonic() - start, 2)
    return {
        "name": case.name,
        "seconds": seconds,
        "figures": dict(figures),
        "error": error,
        "unmeasured": unmeasured,
    }


def summary(row: Row, where: Mapping[str, Any], lines: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the scorecard keeps of a row."""
    names = {name for line in lines.values() for name in line["figures"]} - {"cases"}
    unmeasured = {name: line["unmeasured"] for name, line in lines.items() if line["unmeasured"] is not None}
    counted = [line for name, line in lines.items() if name not in unmeasured]
    count = sum(int(line["figures"].get("cases", 1)) for line in counted)
    off = {name: line["error"] for name, line in lines.items() if line["error"] is not None}
    return {
        **where,
        "seconds": round(sum(line["seconds"] for line in lines.values())),
        "cases": count,
        "off": off,
        "unmeasured": unmeasured,
        "figures": {
            name: max(line["figures"][name] for line in lines.values() if name in line["figures"])
            for name in sorted(names)
        },
        "reached": not unmeasured and count >= row.at_least and len(off) <= row.allowed * count,
    }
