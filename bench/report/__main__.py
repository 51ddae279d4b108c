"""`python -m bench.report`."""

import argparse
import sys
from collections.abc import Sequence

from bench.report.pages import PAGES, render
from bench.report.recorded import Results


def main(arguments: Sequence[str] | None = None, results: Results | None = None) -> int:
    """Write or check; arguments are those of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.report",
        description="Render recorded results into the pages: no number in them is typed.",
    )
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if a page differs")
    args = parser.parse_args(arguments)
    results = results or Results()
    differences = []
    for page, sections in PAGES.items():
        path = results.root / page
        try:
            text, differing = render(path.read_text(), sections, results)
        except ValueError as error:
            raise ValueError(f"{page}: {error}") from error
        differences += [f"{page}, section {name}" for name in differing]
        if differing and not args.check:
            path.write_text(text)
    for difference in differences:
        print(f"{difference}: {'differs, run `python -m bench.report`' if args.check else 'written'}")
    return 1 if differences and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
