"""The long form of the scorecard.

    python -m tests.scorecard [ROW ...]

Runs the cases of all rows that this machine can run, and writes `bench/reliability.json`, of which
`python -m bench.report` makes `docs/reliability.md`. A run that was stopped goes on where it was: cases that
held are not run again until the code that they depend on changes.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from bench.digest import ROOT
from bench.environment import environment
from tests.scorecard.journal import Journal, summary
from tests.scorecard.row import Row
from tests.scorecard.rows import ROWS


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.scorecard",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    ids = [row.id for row in ROWS]
    parser.add_argument("rows", nargs="*", metavar="ROW", help="such as R2; all that can run here by default")
    parser.add_argument("--jobs", type=int, default=2, help="rows that run at the same time")
    parser.add_argument("--journal", type=Path, default=Path("runs/scorecard"), help="folder to resume from")
    parser.add_argument("--output", type=Path, default=Path("bench/reliability.json"))
    parser.add_argument("--here", action="store_true", help="run the rows in this process; write no figures")
    args = parser.parse_args(arguments)
    if unknown := [name for name in args.rows if name not in ids]:
        parser.error(f"rows must be among {', '.join(ids)}, got {', '.join(unknown)}")
    device = "gpu" if torch.cuda.is_available() else "cpu"
    rows = [row for row in ROWS if row.id in args.rows or (not args.rows and row.device == device)]
    if args.here:
        import tests.conftest  # noqa: F401 (one thread, and kernels interpreted where there is no GPU)

        for row in rows:
            Journal(args.journal, row).run(row.list(long=True))
        return 0
    measured = measure(rows, args.jobs, args.journal)
    write(args.output, measured)
    for row in rows:
        result = measured[row.id]
        print(f"{row.id}: {result['cases']} cases, {len(result['off'])} off, target {row.target}")
        for name, error in result["off"].items():
            print(f"    {name}: {error}")
        for name, reason in result["unmeasured"].items():
            print(f"    {name} was not measured: {reason}")
    return 0 if all(result["reached"] for result in measured.values()) else 1


def measure(rows: Sequence[Row], jobs: int, journal: Path) -> dict[str, dict[str, Any]]:
    """Run each row in a process of its own; one that dies is a case that is off.

    Args:
        rows: Which.
        jobs: How many at the same time.
        journal: Folder of the outcomes of their cases, and of what the processes print.

    Returns:
        What the scorecard keeps of each row, by its id.
    """

    def in_process(row: Row) -> tuple[Row, int]:
        log = journal / f"{row.id}.log"
        with log.open("a") as file:
            command = [sys.executable, "-m", "tests.scorecard", "--here", "--journal", str(journal), row.id]
            return row, subprocess.run(command, cwd=ROOT, stdout=file, stderr=file, check=False).returncode

    journal = journal.resolve()
    journal.mkdir(parents=True, exist_ok=True)
    measured = {}
    with ThreadPoolExecutor(jobs) as pool:
        for ended in as_completed([pool.submit(in_process, row) for row in rows]):
            row, code = ended.result()
            where, lines = Journal(journal, row).read()
            if code:
                lines["process"] = {
                    "name": "process",
                    "seconds": 0.0,
                    "figures": {},
                    "error": f"ended with {code}, see {os.path.relpath(journal / row.id)}.log",
                    "unmeasured": None,
                }
            measured[row.id] = summary(row, where or environment(row.code), lines)
            print(f"{row.id} ended after {measured[row.id]['seconds']} s", file=sys.stderr)
    return measured


def write(path: Path, measured: dict[str, dict[str, Any]]) -> None:
    """Renew the rows that were measured in the file of the scorecard, keep the others."""
    known = json.loads(path.read_text())["rows"] if path.exists() else {}
    rows = {
        row.id: {
            "figure": row.figure,
            "target": row.target,
            "measured": measured.get(row.id) or known.get(row.id, {}).get("measured"),
        }
        for row in ROWS
    }
    path.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
